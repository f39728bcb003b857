"""Interceptors on both sides, around calls of every cardinality, alone, in clubs and in windows."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc import (
    CurrentCall,
    InterceptedCall,
    OutgoingCall,
    Proceed,
    RpcError,
    Status,
)
from druvarpc.testing import Link, connected
from tests.io.services import ClosedGate, Gate, MemoryVault, Vault, served

# Each cardinality: how it is called, and what comes of it.
Make = Callable[[Vault], Any]


async def stream(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item


async def unary(vault: Vault) -> Any:
    return await vault.add(1, 2)


async def upload(vault: Vault) -> Any:
    return await vault.upload(stream(b"a", b"bc"))


async def download(vault: Vault) -> Any:
    async with aclosing(vault.download([1, 2])) as pieces:
        return [len(piece) async for piece in pieces]


async def exchange(vault: Vault) -> Any:
    async with aclosing(vault.sync(stream(b"a", b"b"))) as pieces:
        return [piece async for piece in pieces]


CALLS = [(unary, 3), (upload, 3), (download, [1, 2]), (exchange, [b"A", b"B"])]
STREAMS = [(download, [1, 2]), (exchange, [b"A", b"B"])]
RESULTS = [(unary, 3), (upload, 3)]
all_calls = pytest.mark.parametrize(("make", "answer"), CALLS)
SIDES = ["interceptors", "server_interceptors"]
both_sides = pytest.mark.parametrize("side", SIDES)


class Log:
    """An interceptor that writes down what passes it."""

    def __init__(self, name: str, lines: list[str]) -> None:
        self.name = name
        self.lines = lines

    async def __call__(self, call: InterceptedCall, proceed: Proceed) -> Any:
        self.lines.append(f"{self.name} before {call.method}")
        try:
            return await proceed()
        finally:
            self.lines.append(f"{self.name} after")


@all_calls
@both_sides
async def test_they_run_around_every_call_the_first_outermost(side, make, answer):
    lines: list[str] = []
    around = [Log("outer", lines), Log("inner", lines)]
    async with connected([MemoryVault()], **{side: around}) as client:
        assert await make(client.stub(Vault)) == answer
    method = lines[0].split()[-1]
    assert method.startswith("Vault.")
    assert lines == [
        f"outer before {method}",
        f"inner before {method}",
        "inner after",
        "outer after",
    ]


@all_calls
async def test_they_run_over_real_sockets_too(make, answer, nursery):
    lines: list[str] = []

    async def serve(task_status: trio.TaskStatus[druvarpc.Server]) -> None:
        await druvarpc.serve(
            [MemoryVault()],
            "tcp://127.0.0.1:0",
            interceptors=[Log("server", lines)],
            task_status=task_status,
        )

    server = await nursery.start(serve)
    async with druvarpc.connect(server.addresses[0], interceptors=[Log("all", lines)]) as client:
        vault = client.stub(Vault, interceptors=[Log("stub", lines)])
        assert await make(vault) == answer
    assert [line.split()[0] for line in lines] == ["all", "stub", "server"] * 1 + [
        "server",
        "stub",
        "all",
    ]


@all_calls
@both_sides
async def test_what_one_raises_fails_the_call(side, make, answer):
    async def refuse(call: InterceptedCall, proceed: Proceed) -> Any:
        raise RpcError(Status.PERMISSION_DENIED, "no", {"why": "closed"})

    async with connected([MemoryVault()], **{side: [refuse]}) as client:
        with pytest.raises(RpcError, match="PERMISSION_DENIED: no") as caught:
            await make(client.stub(Vault))
    assert caught.value.details == {"why": "closed"}


@all_calls
async def test_a_bug_in_one_of_the_servers_is_none_of_the_callers_business(make, answer, caplog):
    async def fail(call: CurrentCall, proceed: Proceed) -> Any:
        raise KeyError("secret path")

    async with connected([MemoryVault()], server_interceptors=[fail]) as client:
        with pytest.raises(RpcError) as caught:
            await make(client.stub(Vault))
    assert caught.value.status is Status.INTERNAL
    assert "secret" not in str(caught.value)
    assert "secret path" in caplog.text


@all_calls
async def test_a_bug_in_one_of_the_clients_is_raised_as_it_is(make, answer):
    async def fail(call: OutgoingCall, proceed: Proceed) -> Any:
        await proceed()
        raise KeyError("mine")

    async with connected([MemoryVault()], interceptors=[fail]) as client:
        with pytest.raises(KeyError, match="mine"):
            await make(client.stub(Vault))


@pytest.mark.parametrize(("make", "answer"), RESULTS)
@both_sides
async def test_one_may_answer_in_the_calls_place_or_change_the_result(side, make, answer):
    handled: list[str] = []

    class Watched(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            handled.append("add")
            return a + b

    async def answers(call: InterceptedCall, proceed: Proceed) -> Any:
        return 42

    async def doubles(call: InterceptedCall, proceed: Proceed) -> Any:
        return 2 * await proceed()

    async with connected([Watched()], **{side: [doubles, answers]}) as client:
        assert await make(client.stub(Vault)) == 84
    assert handled == []
    async with connected([Watched()], **{side: [doubles]}) as client:
        assert await make(client.stub(Vault)) == 2 * answer


@pytest.mark.parametrize(("make", "answer"), STREAMS)
@both_sides
async def test_a_stream_that_isnt_proceeded_to_is_empty(side, make, answer):
    async def nothing(call: InterceptedCall, proceed: Proceed) -> Any:
        return None

    async with connected([MemoryVault()], **{side: [nothing]}) as client:
        assert await make(client.stub(Vault)) == []


async def retry(call: InterceptedCall, proceed: Proceed) -> Any:
    for _ in range(4):
        try:
            return await proceed()
        except RpcError as error:
            if error.status is not Status.UNAVAILABLE:
                raise
    return await proceed()


class Unreliable(MemoryVault):
    """Fails twice before anything has been sent."""

    def __init__(self, failures: int = 2) -> None:
        self.failures = failures
        self.attempts = 0

    def fail(self) -> None:
        self.attempts += 1
        if self.attempts <= self.failures:
            raise RpcError(Status.UNAVAILABLE, f"attempt {self.attempts}")

    async def add(self, a: int, b: int = 1) -> int:
        self.fail()
        return a + b

    async def upload(self, pieces: AsyncIterator[bytes]) -> int:
        self.fail()
        return await super().upload(pieces)

    async def download(self, sizes: list[int]) -> Any:
        self.fail()
        for size in sizes:
            yield bytes(size)

    async def sync(self, have: AsyncIterator[bytes]) -> Any:
        self.fail()
        async for piece in have:
            yield piece.upper()


@all_calls
async def test_a_retry_on_the_server_attempts_the_handler_again(make, answer):
    vault = Unreliable()
    async with connected([vault], server_interceptors=[retry]) as client:
        assert await make(client.stub(Vault)) == answer
    assert vault.attempts == 3


@pytest.mark.parametrize(("make", "answer"), [(unary, 3), (download, [1, 2])])
async def test_a_retry_on_the_client_makes_the_call_again(make, answer):
    vault = Unreliable()
    attempts: list[int] = []

    async def count(call: OutgoingCall, proceed: Proceed) -> Any:
        try:
            return await proceed()
        finally:
            attempts.append(call.attempt)

    async with connected([vault], interceptors=[retry, count]) as client:
        assert await make(client.stub(Vault)) == answer
    assert vault.attempts == 3
    assert attempts == [1, 2, 3]


@pytest.mark.parametrize("make", [upload, exchange])
async def test_a_stream_of_the_callers_that_has_begun_is_not_sent_again(make):
    vault = Unreliable()
    async with connected([vault], interceptors=[retry]) as client:
        with pytest.raises(RpcError, match="attempt 1"):
            await make(client.stub(Vault))
    assert vault.attempts == 1


@pytest.mark.parametrize("make", [upload, exchange])
async def test_one_that_hasnt_begun_is_sent_by_the_next_attempt(make):
    answers = dict(CALLS)

    async def delayed(call: OutgoingCall, proceed: Proceed) -> Any:
        """Stands for a connection that couldn't be had: fails ahead of the first attempt."""
        if not call.attempt and not failed:
            failed.append(True)
            raise RpcError(Status.UNAVAILABLE, "no connection")
        return await proceed()

    failed: list[bool] = []
    async with connected([MemoryVault()], interceptors=[retry, delayed]) as client:
        assert await make(client.stub(Vault)) == answers[make]


@both_sides
async def test_items_that_were_handed_over_are_not_sent_twice(side):
    class Breaks(MemoryVault):
        attempts = 0

        async def download(self, sizes: list[int]) -> Any:
            Breaks.attempts += 1
            yield b"first"
            raise RpcError(Status.UNAVAILABLE, f"attempt {Breaks.attempts}")

    async with connected([Breaks()], **{side: [retry]}) as client:
        items: list[bytes] = []
        with pytest.raises(RpcError, match="attempt 1"):
            async for item in client.stub(Vault).download([1]):
                items.append(item)
    assert items == [b"first"]
    assert Breaks.attempts == 1


async def counted(items: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for item in items:
        yield item * 2


@both_sides
async def test_streams_can_be_changed(side):
    async def change(call: InterceptedCall, proceed: Proceed) -> Any:
        call.wrap_requests(counted)
        call.wrap_responses(counted)
        return await proceed()

    async with connected([MemoryVault()], **{side: [change]}) as client:
        vault = client.stub(Vault)
        assert await upload(vault) == 6
        assert await download(vault) == [2, 4]
        assert await exchange(vault) == [b"AAAA", b"BBBB"]


@both_sides
async def test_a_wrapper_is_met_once_in_each_attempt(side):
    """The inner one is run again by a retry around it; the outer one isn't, and still counts."""
    vault = Unreliable()

    def wrap(text: bytes) -> Any:
        async def change(items: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            async for item in items:
                yield item + text

        async def interceptor(call: InterceptedCall, proceed: Proceed) -> Any:
            call.wrap_responses(change)
            return await proceed()

        return interceptor

    around = [wrap(b"outer"), retry, wrap(b"inner")]
    async with connected([vault], **{side: around}) as client:
        items = [item async for item in client.stub(Vault).download([1])]
    assert items == [b"\0innerouter"]
    assert vault.attempts == 3


@both_sides
async def test_what_wraps_a_stream_is_closed_with_it(side):
    closed: list[str] = []

    class Watched(MemoryVault):
        async def download(self, sizes: list[int]) -> Any:
            try:
                while True:
                    yield b"more"
            finally:
                closed.append("handler")

    async def change(items: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for item in items:
                yield item
        finally:
            closed.append("wrapper")

    async def interceptor(call: InterceptedCall, proceed: Proceed) -> Any:
        call.wrap_responses(change)
        return await proceed()

    async with connected([Watched()], **{side: [interceptor]}) as client:
        async with aclosing(client.stub(Vault).download([1])) as items:
            assert await anext(items) == b"more"
        await client.ping()
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(closed) == ["handler", "wrapper"]


@all_calls
async def test_one_of_the_clients_sees_and_changes_what_goes_out(make, answer):
    seen: list[Any] = []

    class Watched(MemoryVault):
        def see(self) -> None:
            seen.append(druvarpc.current_call().metadata)

    async def server(call: CurrentCall, proceed: Proceed) -> Any:
        seen.append(dict(call.metadata))
        return await proceed()

    async def client_side(call: OutgoingCall, proceed: Proceed) -> Any:
        assert call.metadata == {"tenant": "a"}
        call.metadata["trace"] = b"\x01"
        return await proceed()

    async with connected(
        [MemoryVault()], interceptors=[client_side], server_interceptors=[server]
    ) as client:
        assert await make(client.stub(Vault, metadata={"tenant": "a"})) == answer
    assert seen == [{"tenant": "a", "trace": b"\x01"}]


async def test_arguments_are_seen_on_both_sides_and_may_be_replaced_by_the_client():
    seen: list[Any] = []

    async def look(call: CurrentCall | OutgoingCall, proceed: Proceed) -> Any:
        seen.append(call.arguments)
        return await proceed()

    async def replace(call: OutgoingCall, proceed: Proceed) -> Any:
        call.arguments = (10, 20)
        return await proceed()

    async with connected(
        [MemoryVault()], interceptors=[look, replace], server_interceptors=[look]
    ) as client:
        assert await client.stub(Vault).add(1, b=2) == 30
    assert seen == [(1, 2), (10, 20)]


async def test_arguments_that_dont_fit_are_refused_where_an_interceptor_asks_for_them():
    async def look(call: CurrentCall, proceed: Proceed) -> Any:
        call.arguments  # noqa: B018 - this decodes them
        return await proceed()

    async with connected([MemoryVault()], server_interceptors=[look]) as client:
        with pytest.raises(RpcError, match=r"INVALID_ARGUMENT: Vault\.add: argument a"):
            await client.stub(Vault).add("text", 1)  # type: ignore[arg-type]


@all_calls
async def test_calls_know_what_they_are(make, answer):
    seen: list[tuple[str, druvarpc.Cardinality, bool, float]] = []

    async def look(call: InterceptedCall, proceed: Proceed) -> Any:
        seen.append((call.method, call.cardinality, call.idempotent, call.deadline))
        return await proceed()

    async with connected(
        [MemoryVault()], interceptors=[look], server_interceptors=[look]
    ) as client:
        with trio.fail_after(60):
            assert await make(client.stub(Vault)) == answer
    (method, cardinality, idempotent, deadline), there = seen
    assert there[:3] == (method, cardinality, idempotent)
    assert there[3] == pytest.approx(deadline, abs=1)
    assert cardinality.server_streaming == isinstance(answer, list)


async def test_the_servers_run_in_the_handlers_scope_and_context():
    """Cancelled with the caller; and what they set in the current call, the handler sees."""
    gate = ClosedGate()
    ended: list[str] = []

    async def watch(call: CurrentCall, proceed: Proceed) -> Any:
        assert druvarpc.current_call() is call
        try:
            return await proceed()
        except trio.Cancelled:
            ended.append("cancelled")
            raise

    async with connected([gate], server_interceptors=[watch]) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stub(Gate).enter, "one")
            await gate.until_inside()
            nursery.cancel_scope.cancel()
        await gate.until_empty()
        await trio.testing.wait_all_tasks_blocked()
    assert ended == ["cancelled"]


@both_sides
async def test_one_may_limit_the_time_of_a_call(side, autojump_clock):
    gate = ClosedGate()

    async def limit(call: InterceptedCall, proceed: Proceed) -> Any:
        with trio.move_on_after(2):
            return await proceed()
        raise RpcError(Status.DEADLINE_EXCEEDED, "2 s are up")

    async with connected([gate], **{side: [limit]}) as client:
        with pytest.raises(RpcError, match="2 s are up"):
            await client.stub(Gate).enter("one")
        items = client.stub(Gate).watch("two")
        assert await anext(items) == "two is inside"
        with pytest.raises(RpcError, match="2 s are up"):
            await anext(items)
    assert gate.inside == []


async def test_a_consumer_that_leaves_ends_the_interceptors_and_waits_for_them(autojump_clock):
    gate = ClosedGate()
    ended: list[str] = []

    async def slow_to_end(call: OutgoingCall, proceed: Proceed) -> Any:
        try:
            return await proceed()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)
            ended.append("interceptor")

    async with connected([gate], interceptors=[slow_to_end]) as client:
        async with aclosing(client.stub(Gate).watch("one")) as items:
            await anext(items)
        assert ended == ["interceptor"]
        await gate.until_empty()


async def test_the_callers_deadline_ends_a_stream_within_interceptors(autojump_clock):
    gate = ClosedGate()
    async with connected([gate], interceptors=[Log("one", [])]) as client:
        items = client.stub(Gate).watch("one")
        with pytest.raises(trio.TooSlowError), trio.fail_after(5):
            async for _ in items:
                pass
        # A deadline that was that of the first item is that of the call.
        items = client.stub(Gate).watch("two")
        with trio.fail_after(5):
            await anext(items)
        with pytest.raises(RpcError, match="DEADLINE_EXCEEDED"):
            await anext(items)


async def test_a_stream_within_interceptors_ends_with_the_client():
    gate = ClosedGate()
    async with connected([gate]) as client:
        items = client.stub(Gate, interceptors=[Log("one", [])]).watch("one")
        await anext(items)
    with pytest.raises(druvarpc.ConnectionLost):
        await anext(items)
    with pytest.raises(druvarpc.ConnectionLost):
        await anext(client.stub(Gate, interceptors=[Log("one", [])]).watch("one"))


async def test_the_context_of_the_caller_is_that_of_the_interceptors():
    who: ContextVar[str] = ContextVar("who")
    seen: list[str] = []

    async def look(call: OutgoingCall, proceed: Proceed) -> Any:
        seen.append(who.get())
        return await proceed()

    async with connected([MemoryVault()], interceptors=[look]) as client:
        who.set("me")
        for make, answer in CALLS:
            assert await make(client.stub(Vault)) == answer
    assert seen == ["me"] * 4


# Clubs.


class Answered:
    """An interceptor of a client that answers calls of `add` whose first argument is 0."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def __call__(self, call: OutgoingCall, proceed: Proceed) -> Any:
        self.seen.append(call.method)
        call.metadata["seen"] = str(len(self.seen))
        if call.arguments[0] == 0:
            return 100
        if call.arguments[0] == -1:
            raise RpcError(Status.PERMISSION_DENIED, "not that one")
        return await proceed()


async def test_each_call_of_a_club_is_intercepted_on_both_sides():
    around = Answered()
    lines: list[str] = []
    metadata: list[Any] = []

    async def look(call: CurrentCall, proceed: Proceed) -> Any:
        lines.append(call.method)
        metadata.append(call.metadata["seen"])
        return await proceed()

    async with connected(
        [MemoryVault()], interceptors=[around], server_interceptors=[look]
    ) as client:
        vault = client.stub(Vault)
        async with client.club() as club:
            one = club.call(vault.add, 1, 2)
            two = club.call(vault.add, one, 10)
            three = club.call(vault.begin, "me")
        assert (one.value, two.value, three.value.owner) == (3, 13, "me")
        assert client.statistics().clubs_sent == 1
    assert sorted(around.seen) == sorted(lines) == ["Vault.add", "Vault.add", "Vault.begin"]
    assert sorted(metadata) == ["1", "2", "3"]


async def test_calls_of_a_club_that_are_answered_by_an_interceptor_dont_go_out():
    ran: list[tuple[int, int]] = []

    class Watched(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            ran.append((a, b))
            return a + b

    async with connected([Watched()], interceptors=[Answered()]) as client:
        vault = client.stub(Vault)
        async with client.club(raise_errors=False) as club:
            answered = club.call(vault.add, 0)
            uses = club.call(vault.add, 1, answered)
            uses_part = club.call(vault.add, 1, answered["part"])
            refused = club.call(vault.add, -1)
            needs = club.call(vault.add, 2, refused)
            alone = club.call(vault.add, 5, 5)
        assert (answered.value, uses.value, alone.value) == (100, 101, 10)
        assert isinstance(refused.error, RpcError)
        assert refused.error.status is Status.PERMISSION_DENIED
        for reply in (needs, uses_part):
            assert isinstance(reply.error, RpcError)
            assert reply.error.status is Status.FAILED_PRECONDITION
    assert sorted(ran) == [(1, 100), (5, 5)]


async def test_a_second_attempt_of_a_clubs_call_is_a_call_of_its_own():
    vault = Unreliable()
    async with connected([vault], interceptors=[retry]) as client:
        stub = client.stub(Vault)
        async with client.club() as club:
            one = club.call(stub.add, 1, 2)
        assert one.value == 3
        assert client.statistics().clubs_sent == 3
    assert vault.attempts == 3


async def test_a_call_of_a_club_that_needs_another_isnt_attempted_again():
    class Refuses(MemoryVault):
        async def put(self, chunk: Any) -> int:
            raise RpcError(Status.UNAVAILABLE, "later")

        async def add(self, a: int, b: int = 1) -> int:
            raise RpcError(Status.UNAVAILABLE, f"later {a}")

    async with connected([Refuses()], interceptors=[retry]) as client:
        stub = client.stub(Vault)
        async with client.club(raise_errors=False) as club:
            session = club.call(stub.begin, "me")
            needs = club.call(stub.add, session.field("id"))
        assert session.value.id == 7
        assert str(needs.error) == "UNAVAILABLE: later 7"


async def test_a_club_that_is_cancelled_ends_its_interceptors():
    gate = ClosedGate()
    lines: list[str] = []
    async with connected([gate], interceptors=[Log("one", lines)]) as client:
        async with trio.open_nursery() as nursery:

            async def club() -> None:
                async with client.club() as club:
                    club.call(client.stub(Gate).enter, "one")

            nursery.start_soon(club)
            await gate.until_inside()
            nursery.cancel_scope.cancel()
        await gate.until_empty()
    assert lines == ["one before Gate.enter", "one after"]


async def test_what_an_interceptor_raises_is_among_the_errors_of_the_club():
    async def fail(call: OutgoingCall, proceed: Proceed) -> Any:
        raise KeyError(call.arguments[0])

    async with connected([MemoryVault()], interceptors=[fail]) as client:
        with pytest.raises(ExceptionGroup) as caught:
            async with client.club() as club:
                club.call(client.stub(Vault).add, 1)
                club.call(client.stub(Vault).add, 2)
    assert [str(error) for error in caught.value.exceptions] == ["1", "2"]


async def test_arguments_that_are_replaced_go_out_in_the_club():
    async def replace(call: OutgoingCall, proceed: Proceed) -> Any:
        call.arguments = (call.arguments[0], 50)
        return await proceed()

    async with connected([MemoryVault()], interceptors=[replace]) as client:
        vault = client.stub(Vault)
        async with client.club() as club:
            one = club.call(vault.add, 1, 2)
            two = club.call(vault.add, one)
        assert (one.value, two.value) == (51, 101)
        assert client.statistics().clubs_sent == 1


async def test_arguments_that_cant_be_sent_fail_their_call_of_the_club_alone():
    async def replace(call: OutgoingCall, proceed: Proceed) -> Any:
        if call.arguments[0] == 1:
            call.arguments = (object(),)
        return await proceed()

    async with connected([MemoryVault()], interceptors=[replace]) as client:
        vault = client.stub(Vault)
        async with client.club(raise_errors=False) as club:
            one = club.call(vault.add, 1)
            needs = club.call(vault.add, one)
            two = club.call(vault.add, 2)
        assert two.value == 3
        assert isinstance(one.error, RpcError)
        assert one.error.status is Status.INVALID_ARGUMENT
        assert isinstance(needs.error, RpcError)
        assert needs.error.status is Status.FAILED_PRECONDITION


def one_at_a_time(limit: int = 1) -> Any:
    """Return an interceptor that lets so many calls through at a time, replies included."""
    free = trio.Semaphore(limit)

    async def interceptor(call: OutgoingCall, proceed: Proceed) -> Any:
        async with free:
            return await proceed()

    return interceptor


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_calls_of_a_club_that_interceptors_let_through_one_at_a_time(autojump_clock, limit):
    link = Link(rtt=0.05)
    async with connected([MemoryVault()], interceptors=[one_at_a_time(limit)], link=link) as client:
        add = client.stub(Vault).add
        before = trio.current_time()
        async with client.club() as club:
            replies = [club.call(add, number) for number in range(5)]
        assert [reply.value for reply in replies] == [1, 2, 3, 4, 5]
        assert trio.current_time() - before < 0.06 * -(-5 // limit)


async def test_calls_of_a_club_that_need_each_other_let_through_one_at_a_time(autojump_clock):
    link = Link(rtt=0.05)
    async with connected([MemoryVault()], interceptors=[one_at_a_time()], link=link) as client:
        vault = client.stub(Vault)
        before = trio.current_time()
        async with client.club() as club:
            session = club.call(vault.begin, "me")
            one = club.call(vault.add, session.field("id"), 1)
            both = club.call(vault.add, one, session.field("id"))
            alone = club.call(vault.add, 1, 1)
        assert (session.value.id, one.value, both.value, alone.value) == (7, 8, 15, 2)
        # They waited for each other once.
        assert trio.current_time() - before < 4 * 0.06 + 0.11


async def test_a_call_let_through_after_one_that_it_needs_has_failed(autojump_clock):
    ran: list[int] = []

    class Refuses(MemoryVault):
        async def begin(self, owner: str) -> Any:
            raise RpcError(Status.NOT_FOUND, owner)

        async def add(self, a: int, b: int = 1) -> int:
            ran.append(a)
            return a

    async with connected([Refuses()], interceptors=[one_at_a_time()]) as client:
        vault = client.stub(Vault)
        async with client.club(raise_errors=False) as club:
            session = club.call(vault.begin, "me")
            needs = club.call(vault.add, session.field("id"))
            needs_that = club.call(vault.add, needs)
        assert "NOT_FOUND: me" in str(session.error)
        for reply in (needs, needs_that):
            assert isinstance(reply.error, RpcError)
            assert reply.error.status is Status.FAILED_PRECONDITION
            assert reply.error.not_started
    assert ran == []


async def test_a_call_of_a_club_goes_ahead_of_one_that_needs_it_and_waits_for_it(autojump_clock):
    begun = trio.Event()

    class Tells(MemoryVault):
        async def begin(self, owner: str) -> Any:
            begun.set()
            return await super().begin(owner)

    async def wait(call: OutgoingCall, proceed: Proceed) -> Any:
        await begun.wait()
        return await proceed()

    for interceptors in ([], [Log("one", [])]):  # around the first call
        begun = trio.Event()
        async with connected([Tells()]) as client:
            session_stub = client.stub(Vault, interceptors=interceptors)
            around = client.stub(Vault, interceptors=[wait])
            async with client.club() as club:
                session = club.call(session_stub.begin, "me")
                late = [club.call(around.add, session.field("id"), number) for number in range(3)]
            assert [reply.value for reply in late] == [7, 8, 9]
            assert client.statistics().clubs_sent == 2


@pytest.mark.parametrize("seconds", [0, 0.03])
async def test_calls_of_a_club_share_a_frame_if_their_interceptors_get_that_far(
    autojump_clock, seconds
):
    """Those that a lock lets through one after the other; and linked ones that take a while."""
    lock = trio.Lock()

    async def look_up(call: OutgoingCall, proceed: Proceed) -> Any:
        async with lock:
            await trio.sleep(seconds)
        return await proceed()

    async with connected([MemoryVault()], interceptors=[look_up]) as client:
        add = client.stub(Vault).add
        async with client.club() as club:
            reply = club.call(add, 0)
            for _ in range(9):
                reply = club.call(add, reply)
        assert reply.value == 10
        assert client.statistics().clubs_sent == 1
        if not seconds:
            async with client.club() as club:
                for number in range(50):
                    club.call(add, number)
            assert client.statistics().clubs_sent == 2


async def test_a_club_that_is_cancelled_while_calls_wait_for_others(autojump_clock):
    gate = ClosedGate()
    async with connected([gate], interceptors=[one_at_a_time()]) as client:
        with trio.move_on_after(5):
            async with client.club() as club:
                for name in "abc":
                    club.call(client.stub(Gate).enter, name)
        await gate.until_empty()
        assert len(gate.entered) == 1
        assert client.statistics().calls_active == 0


@pytest.mark.parametrize("changed", [False, True])
async def test_repeated_keys_of_a_stub_survive_interceptors(changed):
    seen: list[Any] = []

    async def client_side(call: OutgoingCall, proceed: Proceed) -> Any:
        assert call.metadata == {"k": "2", "other": "x"}
        if changed:
            call.metadata["other"] = "y"
            call.metadata["new"] = "z"
        return await proceed()

    async def server_side(call: CurrentCall, proceed: Proceed) -> Any:
        seen.append(list(call.metadata_pairs))
        return await proceed()

    pairs = [("k", "1"), ("other", "x"), ("k", "2")]
    async with connected(
        [MemoryVault()], interceptors=[client_side], server_interceptors=[server_side]
    ) as client:
        vault = client.stub(Vault, metadata=pairs)
        await vault.add(1)
        async with client.club() as club:
            club.call(vault.add, 1)
    kept = [("k", "1"), ("k", "2"), ("other", "y"), ("new", "z")]
    assert seen == 2 * [kept if changed else pairs]


# Windows.


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("source", ["iterable", "generator"])
async def test_each_call_of_a_window_is_intercepted(window, ordered, source):
    lines: list[str] = []

    async with connected([MemoryVault()], interceptors=[Log("one", lines)]) as client:
        arguments = range(20) if source == "iterable" else stream(*range(20))
        method = client.stub(Vault).add
        async with aclosing(
            druvarpc.windowed(method, arguments, window=window, ordered=ordered)
        ) as sums:
            found = [one async for one in sums]
    assert (found if ordered else sorted(found)) == list(range(1, 21))
    assert lines.count("one before Vault.add") == 20


async def test_a_window_takes_arguments_no_further_ahead_than_it_allows():
    gate = ClosedGate()
    taken: list[int] = []

    async def names() -> AsyncIterator[str]:
        for number in range(10):
            taken.append(number)
            yield str(number)

    async with connected([gate], interceptors=[Log("one", [])]) as client:
        async with aclosing(
            druvarpc.windowed(client.stub(Gate).enter, names(), window=3)
        ) as entered:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(anext, entered)
                await gate.until_inside(3)
                await trio.testing.wait_all_tasks_blocked()
                assert taken == [0, 1, 2]
                gate.opened.set()
            assert [name async for name in entered] == [str(n) for n in range(1, 10)]


async def test_the_first_call_of_a_window_that_fails_raises_in_its_turn():
    class Refuses(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            if a == 3:
                raise RpcError(Status.NOT_FOUND, "no 3")
            return a

    async def broken() -> AsyncIterator[int]:
        yield 1
        raise KeyError("source")

    async with connected([Refuses()], interceptors=[Log("one", [])]) as client:
        add = client.stub(Vault).add
        found: list[int] = []
        with pytest.raises(RpcError, match="no 3"):
            async for one in druvarpc.windowed(add, range(10)):
                found.append(one)
        assert found == [0, 1, 2]
        with pytest.raises(KeyError, match="source"):
            async for one in druvarpc.windowed(add, broken()):
                found.append(one)
        assert found == [0, 1, 2, 1]


async def test_a_window_that_is_left_abandons_its_calls():
    gate = ClosedGate()
    async with connected([gate], interceptors=[Log("one", [])]) as client:
        windowed = druvarpc.windowed(client.stub(Gate).enter, ["a", "b"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(anext, windowed)
            await gate.until_inside(2)
            nursery.cancel_scope.cancel()
        await gate.until_empty()
        assert client.statistics().calls_active == 0


async def test_a_windows_deadline_is_the_callers(autojump_clock):
    gate = ClosedGate()
    link = Link(rtt=0.1)
    async with connected([gate], interceptors=[Log("one", [])], link=link) as client:
        windowed = druvarpc.windowed(client.stub(Gate).enter, ["a", "b"])
        with pytest.raises(trio.TooSlowError), trio.fail_after(5):
            await anext(windowed)
        await gate.until_empty()


async def test_no_interceptor_no_task(nursery):
    """What a stub without interceptors does isn't touched: its methods are the plain ones."""
    async with served([MemoryVault()]) as server:
        async with druvarpc.connect(server.addresses[0]) as client:
            assert type(client.stub(Vault).add) is not type(
                client.stub(Vault, interceptors=[Log("one", [])]).add
            )
