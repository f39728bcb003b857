# mypy: disable-error-code="empty-body"
"""Calls that are made again: which, when, and how often."""

import math
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
import trio

import druvarpc
from druvarpc import Retry, RpcError, Status
from druvarpc.testing import Link, connected
from tests.io.networks import Network, Outcomes, refuse
from tests.io.peers import CancelAt
from tests.io.services import ClosedGate, Gate, MemoryVault, Vault

now = trio.current_time


class Fickle(druvarpc.Service):
    @druvarpc.rpc(idempotent=True)
    async def get(self, name: str) -> str: ...

    @druvarpc.rpc
    async def do(self, name: str) -> str: ...

    @druvarpc.rpc(idempotent=True)
    def list(self, name: str) -> AsyncGenerator[str, None]: ...

    @druvarpc.rpc(idempotent=True)
    async def fill(self, pieces: AsyncIterator[bytes]) -> int: ...

    @druvarpc.rpc(idempotent=True)
    def mirror(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]: ...


class MyFickle(Fickle):
    """Fails with each of `errors`, then works.

    Attributes:
        begun: when each call began.
    """

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.begun: list[float] = []

    def begin(self) -> None:
        self.begun.append(now())
        if self.errors:
            raise self.errors.pop(0)

    async def get(self, name: str) -> str:
        self.begin()
        return name

    async def do(self, name: str) -> str:
        self.begin()
        return name

    async def list(self, name: str) -> AsyncGenerator[str, None]:
        self.begin()
        yield name

    async def fill(self, pieces: AsyncIterator[bytes]) -> int:
        total = 0
        async for piece in pieces:
            total += len(piece)
            self.begin()
        return total

    async def mirror(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for piece in pieces:
            self.begin()
            yield piece


def unavailable(count: int = 1) -> list[RpcError]:
    return [RpcError(Status.UNAVAILABLE, "not now") for _ in range(count)]


def busy(seconds: Any) -> RpcError:
    return RpcError(Status.RESOURCE_EXHAUSTED, "busy", {"retry_after": seconds})


async def collect(items: AsyncGenerator[Any, None]) -> list[Any]:
    async with aclosing(items):
        return [item async for item in items]


async def pieces(count: int = 3, size: int = 1) -> AsyncGenerator[bytes, None]:
    for _ in range(count):
        yield bytes(size)


# --- what the method allows ---


@pytest.mark.parametrize("kind", ["unary", "download", "upload", "exchange", "club", "windowed"])
async def test_idempotent_calls_are_made_again_if_the_server_is_unavailable(autojump_clock, kind):
    fickle = MyFickle(*unavailable(2))
    async with connected([fickle]) as client:
        stub = client.stub(Fickle)

        async def club() -> str:
            async with client.club() as club:
                reply = club.call(stub.get, "x")
            return reply.value

        call, result = {
            "unary": (partial(stub.get, "x"), "x"),
            "download": (lambda: collect(stub.list("x")), ["x"]),
            "upload": (lambda: stub.fill(pieces()), 3),
            "exchange": (lambda: collect(stub.mirror(pieces())), [b"\0"] * 3),
            "club": (club, "x"),
            "windowed": (lambda: collect(druvarpc.windowed(stub.get, ["x"])), ["x"]),
        }[kind]
        assert await call() == result
        assert client.statistics().calls_retried == 2
        assert client.statistics().calls_started == 3


@pytest.mark.parametrize("status", [s for s in Status if s not in (Status.OK, Status.UNAVAILABLE)])
async def test_no_other_status_is_worth_an_attempt(autojump_clock, status):
    fickle = MyFickle(RpcError(status, "no"))
    async with connected([fickle]) as client:
        with pytest.raises(RpcError) as failed:
            await client.stub(Fickle).get("x")
        assert failed.value.status is status
        assert len(fickle.begun) == 1


async def test_calls_that_are_not_idempotent_are_made_once(autojump_clock):
    fickle = MyFickle(*unavailable())
    async with connected([fickle]) as client:
        with pytest.raises(RpcError, match="not now"):
            await client.stub(Fickle).do("x")
        assert len(fickle.begun) == 1


async def test_retry_none_is_for_those_who_do_it_themselves(autojump_clock):
    fickle = MyFickle(*unavailable(3))
    async with connected([fickle], retry=None) as client:
        with pytest.raises(RpcError, match="not now"):
            await client.stub(Fickle).get("x")
        with pytest.raises(RpcError, match="not now"):
            await client.stub(Fickle).get("x")
        assert await client.stub(Fickle, retry=Retry()).get("x") == "x"


async def test_as_many_attempts_as_asked_for(autojump_clock):
    for attempts in (1, 2, 7):
        fickle = MyFickle(*unavailable(100))
        async with connected([fickle], retry=Retry(attempts=attempts)) as client:
            with pytest.raises(RpcError, match="not now"):
                await client.stub(Fickle).get("x")
            assert len(fickle.begun) == attempts


async def test_a_stream_is_not_made_again_once_an_item_was_handed_over(autojump_clock):
    class Breaking(MyFickle):
        async def list(self, name: str) -> AsyncGenerator[str, None]:
            yield name
            self.begin()

    fickle = Breaking(*unavailable())
    async with connected([fickle]) as client:
        stream = client.stub(Fickle).list("x")
        async with aclosing(stream):
            assert await anext(stream) == "x"
            with pytest.raises(RpcError, match="not now"):
                await anext(stream)
        assert len(fickle.begun) == 1


async def test_what_is_thrown_into_a_stream_is_not_taken_for_its_failure(autojump_clock):
    async with connected([MyFickle()]) as client:
        stream = client.stub(Fickle).list("x")
        async with aclosing(stream):
            assert await anext(stream) == "x"
            with pytest.raises(RpcError, match="mine"):
                await stream.athrow(RpcError(Status.UNAVAILABLE, "mine", not_started=True))
        assert client.statistics().calls_retried == 0


async def test_an_upload_that_is_too_much_to_keep_is_made_once(autojump_clock):
    class Late(MyFickle):
        async def fill(self, pieces: AsyncIterator[bytes]) -> int:
            total = 0
            async for piece in pieces:
                total += len(piece)
            self.begin()
            return total

    for count, kept in ((10, True), (30, False)):
        fickle = Late(*unavailable())
        async with connected([fickle]) as client:
            stub = client.stub(Fickle)
            if kept:
                assert await stub.fill(pieces(count, 65536)) == count * 65536
            else:
                with pytest.raises(RpcError, match="not now"):
                    await stub.fill(pieces(count, 65536))


# --- pauses ---


async def test_pauses_grow_and_are_random(autojump_clock):
    second, third = [], []
    for _ in range(200):
        fickle = MyFickle(*unavailable(2))
        retry = Retry(attempts=3, first_pause=1.0, longest_pause=1.5)
        async with connected([fickle], retry=retry) as client:
            await client.stub(Fickle).get("x")
        first, again, last = fickle.begun
        second.append(again - first)
        third.append(last - again)
    assert 0 <= min(second) < 0.1
    assert 0.9 < max(second) <= 1.0
    assert 1.35 < max(third) <= 1.5


async def test_never_past_the_deadline(autojump_clock):
    fickle = MyFickle(*unavailable(1000))
    retry = Retry(attempts=1000, first_pause=1.0, least=1000)
    async with connected([fickle], retry=retry) as client:
        start = now()
        with trio.fail_after(5), pytest.raises(RpcError, match="not now"):
            await client.stub(Fickle).get("x")
        assert now() - start < 5, "the error itself, before the time is up"
        assert max(fickle.begun) - start < 5


@pytest.mark.parametrize("idempotent", [True, False])
async def test_a_pause_that_the_server_asks_for(autojump_clock, idempotent):
    fickle = MyFickle(busy(3), busy(2.5))
    async with connected([fickle]) as client:
        stub = client.stub(Fickle)
        if not idempotent:
            with pytest.raises(RpcError) as failed:
                await stub.do("x")
            assert failed.value.retry_after == 3
            return
        assert await stub.get("x") == "x"
        first, second, third = fickle.begun
        assert 3 <= second - first < 3.2
        assert 2.5 <= third - second < 2.8


@pytest.mark.parametrize(
    "seconds", [-1, -math.inf, math.nan, math.inf, 10**400, True, "soon", None, [], {"x": 1}]
)
async def test_absurd_pauses_are_none(autojump_clock, seconds):
    if seconds == 10**400:
        error = RpcError(Status.RESOURCE_EXHAUSTED, "busy", {"retry_after": seconds})
        assert error.retry_after is None
        return
    fickle = MyFickle(busy(seconds))
    async with connected([fickle]) as client:
        with pytest.raises(RpcError, match="busy") as failed:
            await client.stub(Fickle).get("x")
        assert failed.value.retry_after is None
        assert now() == 0


async def test_a_pause_that_is_too_long_is_left_to_the_caller(autojump_clock):
    fickle = MyFickle(busy(1e9), busy(4))
    async with connected([fickle]) as client:
        with pytest.raises(RpcError) as failed:
            await client.stub(Fickle).get("x")
        assert failed.value.retry_after == 1e9
        with trio.fail_after(3), pytest.raises(RpcError) as failed:
            await client.stub(Fickle).get("x")
        assert failed.value.retry_after == 4
        assert now() == 0
        assert len(fickle.begun) == 2


def test_retry_after_of_an_error():
    assert RpcError(Status.ABORTED, "", {"retry_after": 2}).retry_after == 2.0
    assert RpcError(Status.ABORTED, "", {"other": 2}).retry_after is None
    assert RpcError(Status.ABORTED, "", [2]).retry_after is None
    assert RpcError(Status.ABORTED).retry_after is None


# --- the budget ---


async def test_a_server_that_fails_every_call_gets_no_more_than_the_budget(autojump_clock):
    fickle = MyFickle(*unavailable(10_000))
    retry = Retry(first_pause=0.001, budget=0.2, least=1.0)
    async with connected([fickle], retry=retry) as client:
        stub = client.stub(Fickle)

        async def call() -> None:
            with pytest.raises(RpcError, match="not now"):
                await stub.get("x")

        for _ in range(50):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(call)
            await trio.sleep(0.1)
        made = client.statistics().calls_retried
        assert made == len(fickle.begun) - 1000
        assert 100 <= made <= 0.2 * 1000 + 10 + 6


async def test_a_server_that_answers_nothing_cannot_make_a_client_spin(autojump_clock, nursery):
    there = Network(nursery, MemoryVault())
    async with there.connect() as client:
        there.answer = refuse
        there.lose(0)
        start = now()
        with trio.move_on_after(100):
            while True:
                with pytest.raises(druvarpc.ConnectionLost):
                    await client.stub(Vault).echo(b"x")
                await trio.sleep(0.01)
        assert len(there.dials) < 100
        assert now() == start + 100


async def test_a_server_that_refuses_every_call_is_not_asked_for_ever(autojump_clock, nursery):
    """Each connection is drained while the call is on its way."""
    there = Network(nursery, MemoryVault(), link=Link(rtt=0.01))
    drained = 0

    async def drain_each() -> None:
        nonlocal drained
        while True:
            await trio.sleep(0.001)
            if drained < len(there.servers) and client.statistics().calls_active:
                nursery.start_soon(there.servers[drained].drain, 1)
                drained += 1

    async with there.connect() as client, trio.open_nursery() as draining:
        draining.start_soon(drain_each)
        start = now()
        with pytest.raises(druvarpc.ConnectionLost) as lost:
            await client.stub(Vault).add(1)
        assert lost.value.not_started
        assert now() - start < 60
        assert len(there.dials) < 30
        draining.cancel_scope.cancel()


# --- calls known not to have started ---


class Drained:
    """A client whose server goes away with calls on their way to it."""

    def __init__(self, nursery: trio.Nursery, *services: Any) -> None:
        self.link = Link(rtt=1.0)
        self.there = Network(nursery, *services, link=self.link)
        self._nursery = nursery

    def drain(self) -> None:
        """Drain the server of the newest connection, now."""
        self._nursery.start_soon(self.there.servers[-1].drain, 100)


@pytest.mark.parametrize("count", [1, 5, 20])
async def test_calls_that_a_drain_refuses_go_elsewhere_at_once(autojump_clock, nursery, count):
    """Also if the next servers drain, too."""
    vault = MemoryVault()
    drained = Drained(nursery, vault)
    async with drained.there.connect(retry=Retry(attempts=2, least=0, budget=0)) as client:
        stub = client.stub(Vault)
        kinds = (
            partial(stub.add, 1),
            partial(stub.upload, pieces()),
            lambda: collect(stub.download([1])),
            lambda: collect(stub.sync(pieces())),
            lambda: collect(druvarpc.windowed(stub.add, range(100))),
            lambda: collect(druvarpc.windowed(stub.add, range(100), ordered=False)),
            partial(one_club, client),
        )
        outcomes = Outcomes(nursery)
        drained.drain()
        for kind in kinds:
            outcomes.start(kind)
        for _ in range(count - 1):
            await trio.sleep(1.6)  # the next connection is there, and the calls on their way again
            drained.drain()
        await trio.sleep(70)
        assert not outcomes.errors
        assert len(outcomes.results) == len(kinds)


async def one_club(client: druvarpc.Client) -> int:
    stub = client.stub(Vault)
    async with client.club() as club:
        second = club.call(stub.add, club.call(stub.add, 1))
    return second.value


async def test_without_retry_a_refused_call_is_left_to_its_caller(autojump_clock, nursery):
    drained = Drained(nursery, MemoryVault())
    async with drained.there.connect(retry=None) as client:
        drained.drain()
        with pytest.raises(druvarpc.ConnectionLost, match="goes away") as lost:
            await client.stub(Vault).add(1)
        assert lost.value.not_started
        assert await client.stub(Vault).add(1) == 2


async def test_an_upload_that_waits_for_its_items_is_made_again_beside_that(
    autojump_clock, nursery
):
    """Its source may wait for what the server does with the first items."""
    gate = ClosedGate()
    drained = Drained(nursery, gate)
    async with drained.there.connect() as client:
        closed = False

        async def names() -> AsyncGenerator[str, None]:
            nonlocal closed
            try:
                yield "first"
                await gate.until_inside()
                yield "second"
            finally:
                closed = True

        drained.drain()
        with trio.fail_after(20):
            assert await client.stub(Gate).enter_with(names()) == "first and second"
        assert closed
        assert client.statistics().calls_retried == 1


async def test_an_exchange_likewise(autojump_clock, nursery):
    drained = Drained(nursery, MemoryVault())
    async with drained.there.connect() as client:
        answered = trio.Event()

        async def have() -> AsyncGenerator[bytes, None]:
            yield b"first"
            await answered.wait()
            yield b"second"

        drained.drain()
        with trio.fail_after(20):
            async with aclosing(client.stub(Vault).sync(have())) as answers:
                assert await anext(answers) == b"FIRST"
                answered.set()
                assert [answer async for answer in answers] == [b"SECOND"]


async def test_a_source_that_fails_while_its_call_is_made_again(autojump_clock, nursery):
    drained = Drained(nursery, MemoryVault())
    async with drained.there.connect() as client:
        for kind in ("upload", "exchange"):

            async def source() -> AsyncGenerator[bytes, None]:
                yield b"first"
                await trio.sleep(1.2)
                raise KeyError("mine")

            drained.drain()
            stub = client.stub(Vault)
            with trio.fail_after(20), pytest.raises(KeyError, match="mine"):
                if kind == "upload":
                    await stub.upload(source())
                else:
                    await collect(stub.sync(source()))
        await trio.sleep(60)
        assert client.statistics().calls_active == 0


async def test_the_deadline_holds_for_what_is_made_again(autojump_clock, nursery):
    gate = ClosedGate()
    drained = Drained(nursery, gate)
    async with drained.there.connect() as client:

        async def names() -> AsyncGenerator[str, None]:
            yield "first"
            await trio.sleep_forever()

        drained.drain()
        start = now()
        with trio.move_on_after(7) as scope:
            await client.stub(Gate).enter_with(names())
        assert scope.cancelled_caught
        assert now() - start == pytest.approx(7)
        assert gate.entered == ["all"]
        await trio.sleep(2)
        assert not gate.inside
        assert client.statistics().calls_active == 0


async def test_a_club_of_calls_that_need_each_other_is_made_again_as_a_whole(autojump_clock):
    class Overloaded(MyFickle):
        async def get(self, name: str) -> str:
            self.begin()
            return name + "!"

    fickle = Overloaded(*unavailable())
    async with connected([fickle]) as client:
        stub = client.stub(Fickle)
        async with client.club() as club:
            last = club.call(stub.get, club.call(stub.get, "x"))
        assert last.value == "x!!"
        assert len(fickle.begun) == 3


async def test_of_a_club_of_others_only_those_that_failed(autojump_clock):
    fickle = MyFickle(*unavailable())
    async with connected([fickle]) as client:
        stub = client.stub(Fickle)
        async with client.club() as club:
            replies = [club.call(stub.get, f"{number}") for number in range(10)]
        assert [reply.value for reply in replies] == [f"{number}" for number in range(10)]
        assert len(fickle.begun) == 11


class Failing(Fickle):
    """Counts calls by their name, and fails with what it was made with."""

    def __init__(self, error: RpcError) -> None:
        self.error = error
        self.times: dict[str, list[float]] = {}

    async def get(self, name: str) -> str:
        self.times.setdefault(name, []).append(now())
        raise self.error

    do = get


@pytest.mark.parametrize("order", [1, -1])
async def test_the_calls_of_a_club_are_made_again_by_their_own_stubs_options(autojump_clock, order):
    failing = Failing(RpcError(Status.UNAVAILABLE, "not now"))
    async with connected([failing]) as client:
        stubs = {
            "never": client.stub(Fickle, retry=None),
            "twice": client.stub(Fickle, retry=Retry(attempts=2)),
            "default": client.stub(Fickle),
        }
        async with client.club(raise_errors=False) as club:
            replies = [club.call(stubs[name].get, name) for name in [*stubs][::order]]
        assert all(isinstance(reply.error, RpcError) for reply in replies)
        counts = {name: len(times) for name, times in failing.times.items()}
        assert counts == {"never": 1, "twice": 2, "default": 4}
        assert client.statistics().calls_retried == 4


@pytest.mark.parametrize("order", [1, -1])
async def test_a_stub_that_never_retries_keeps_a_club_whose_calls_need_each_other_from_it(
    autojump_clock, order
):
    failing = Failing(RpcError(Status.UNAVAILABLE, "not now"))
    async with connected([failing]) as client:
        first, second = [client.stub(Fickle), client.stub(Fickle, retry=None)][::order]
        async with client.club(raise_errors=False) as club:
            club.call(second.get, club.call(first.get, "x"))
        assert [len(times) for times in failing.times.values()] == [1]


async def test_a_call_of_a_club_is_not_made_again_past_its_own_deadline(autojump_clock):
    failing = Failing(RpcError(Status.RESOURCE_EXHAUSTED, "busy", {"retry_after": 3}))
    async with connected([failing]) as client:
        stub = client.stub(Fickle)
        async with client.club(raise_errors=False) as club:
            with trio.move_on_after(1):  # noqa: ASYNC100 - the deadline is noted
                short = club.call(stub.get, "short")
            with trio.move_on_after(5):  # noqa: ASYNC100 - likewise
                middle = club.call(stub.get, "middle")
            club.call(stub.get, "long")
        assert failing.times["short"] == [0]
        assert "busy" in str(short.error)
        assert failing.times["middle"] == pytest.approx([0, 3], abs=0.3)
        assert "busy" in str(middle.error)
        assert len(failing.times["long"]) == 4


async def test_the_pause_of_one_call_of_a_club_is_not_that_of_another(autojump_clock):
    class Different(Failing):
        async def get(self, name: str) -> str:
            self.error = busy(9.0) if name == "slow" else busy(0.0)
            return await super().get(name)

    failing = Different(busy(0.0))
    async with connected([failing]) as client:
        async with client.club(raise_errors=False) as club:
            club.call(client.stub(Fickle, retry=Retry(attempts=2)).get, "slow")
            club.call(client.stub(Fickle).get, "quick")
        assert failing.times["slow"] == pytest.approx([0, 9], abs=0.1)
        assert failing.times["quick"][-1] < 1


async def test_the_deadline_of_a_clubs_call_holds_when_interceptors_make_it_again(autojump_clock):
    """Also of an attempt that has begun; one that would begin after it isn't made."""
    deadlines: list[float] = []

    class Slow(Failing):
        async def do(self, name: str) -> str:
            deadlines.append(druvarpc.current_call().deadline)
            if len(deadlines) == 1:
                raise self.error
            await trio.sleep(100)
            return name

    outcomes: list[str] = []

    async def persist(call: druvarpc.OutgoingCall, proceed: druvarpc.Proceed) -> Any:
        for _ in range(3):
            try:
                return await proceed()
            except RpcError as error:
                outcomes.append(f"{now():.0f} s: {error}, {error.not_started}")
                await trio.sleep(2)
        return await proceed()

    async with connected([Slow(RpcError(Status.ABORTED, "no"))], interceptors=[persist]) as client:
        async with client.club(raise_errors=False) as club:
            with trio.move_on_after(3):  # noqa: ASYNC100 - the deadline is noted
                reply = club.call(client.stub(Fickle).do, "x")
        assert client.statistics().calls_active == 0
    assert deadlines == pytest.approx([3, 3])
    assert outcomes == [
        "0 s: ABORTED: no, False",
        "3 s: DEADLINE_EXCEEDED: the deadline passed, False",
        "5 s: DEADLINE_EXCEEDED: the deadline passed, True",
    ]
    assert isinstance(reply.error, RpcError)
    assert reply.error.status is Status.DEADLINE_EXCEEDED


async def test_a_window_loses_its_connection(autojump_clock):
    """Each of its calls is made again like one alone, all that were lost together."""
    link = Link(rtt=0.1)
    fickle = MyFickle()
    async with connected([fickle], link=link) as client:

        async def cut() -> None:
            for _ in range(3):
                await trio.sleep(0.33)
                link.cut()

        for ordered in (True, False):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut)
                names = [f"{number}" for number in range(900)]
                start = now()
                got = await collect(
                    druvarpc.windowed(client.stub(Fickle).get, names, window=60, ordered=ordered)
                )
            assert got == names or (not ordered and sorted(got) == sorted(names))
            assert now() - start < 900 / 60 * 0.1 + 3 * 0.6


async def test_a_window_whose_calls_may_not_be_made_again_fails(autojump_clock):
    link = Link(rtt=0.1)
    async with connected([MyFickle()], link=link) as client:
        stub = client.stub(Fickle)
        got = []
        with pytest.raises(druvarpc.ConnectionLost, match="cut"):
            results = druvarpc.windowed(stub.do, map(str, range(1000)), window=50)
            async with aclosing(results) as names:
                async for name in names:
                    got.append(name)
                    if len(got) == 10:
                        await trio.sleep(0.05)  # others are on their way
                        link.cut()
        assert got == [f"{number}" for number in range(len(got))]


class Crowded(Fickle):
    async def do(self, name: str) -> str:
        await trio.sleep(0.02)
        return name


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("window", [None, 100])
async def test_a_window_at_a_server_with_too_few_places_is_as_fast_as_tasks(
    autojump_clock, window, ordered
):
    """Each call comes back when its place is free, not when it is its turn, and all get one."""
    limits = druvarpc.Limits(total_calls=16)
    async with connected([Crowded()], server_limits=limits) as client:
        names = [f"{number}" for number in range(100)]
        results = druvarpc.windowed(client.stub(Fickle).do, names, window=window, ordered=ordered)
        start = now()
        got = await collect(results)
        assert got == names or (not ordered and sorted(got) == sorted(names))
        assert now() - start < 1.0
        assert client.statistics().calls_retried < 100


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("window", [None, 5000])
async def test_a_wide_window_narrows_to_the_places_of_its_server(autojump_clock, window, ordered):
    """All calls are made, however many the window began with, at the rate of the server."""
    limits = druvarpc.Limits(total_calls=200)
    async with connected([Crowded()], server_limits=limits) as client:
        names = [f"{number}" for number in range(20_000)]
        results = druvarpc.windowed(client.stub(Fickle).do, names, window=window, ordered=ordered)
        start = now()
        got = await collect(results)
        assert got == names or (not ordered and sorted(got) == sorted(names))
        # 200 at a time take 2 s; until some of the first have ended the server doesn't know how
        # long they take, and asks the others to wait for longer than need be.
        assert now() - start < 2 * 20_000 / 200 * 0.02 + 5 * (window is not None)
        # Beside the first window no more than the budget allows other calls.
        assert client.statistics().calls_retried < (window or 1024) + 20_000 * Retry().budget


@pytest.mark.parametrize("ordered", [True, False])
async def test_two_windows_share_the_places_of_a_server(autojump_clock, ordered):
    limits = druvarpc.Limits(total_calls=50)
    async with connected([Crowded()], server_limits=limits) as client:
        names = [f"{number}" for number in range(2000)]

        async def work() -> None:
            results = druvarpc.windowed(client.stub(Fickle).do, names, window=200, ordered=ordered)
            assert sorted(await collect(results)) == sorted(names)

        start = now()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            nursery.start_soon(work)
        assert now() - start < 2 * 4000 / 50 * 0.02


@pytest.mark.parametrize("ordered", [True, False])
async def test_refused_calls_whose_connection_is_lost_meanwhile_begin_on_the_next(
    autojump_clock, ordered
):
    class Slow(Fickle):
        async def get(self, name: str) -> str:
            await trio.sleep(0.3)
            return name

    link = Link(rtt=0.01)
    limits = druvarpc.Limits(total_calls=1)
    retry = Retry(attempts=10)  # it doesn't know how long calls take
    async with connected([Slow()], link=link, server_limits=limits, retry=retry) as client:

        async def cut() -> None:
            await trio.sleep(0.05)
            link.cut()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            names = ["a", "b", "c"]
            results = druvarpc.windowed(client.stub(Fickle).get, names, ordered=ordered)
            assert sorted(await collect(results)) == names
        assert now() < 3


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_source_waits_while_nobody_takes_the_results(autojump_clock, ordered):
    """Not even once in a while does it look: under this clock it would do so for ever."""

    async def names() -> AsyncIterator[str]:
        for number in range(100):
            yield f"{number}"

    limits = druvarpc.Limits(total_calls=5)
    async with connected([Crowded()], server_limits=limits) as client:
        stub = client.stub(Fickle, retry=Retry(attempts=10))
        got = []
        results = druvarpc.windowed(stub.do, names(), window=20, ordered=ordered)
        async with aclosing(results) as found:
            async for name in found:
                got.append(name)
                if len(got) in (1, 6, 20):
                    await trio.sleep(10)  # those refused could begin again
        assert sorted(got, key=int) == [f"{number}" for number in range(100)]


class Turns(Fickle):
    """Takes 5 s for the call "long"; refuses others at first, with a pause of 3 s."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    async def do(self, name: str) -> str:
        times = self.times.setdefault(name, [])
        times.append(now())
        if name == "long":
            await trio.sleep(5)
        elif len(times) == 1:
            raise RpcError(Status.RESOURCE_EXHAUSTED, "busy", {"retry_after": 3}, not_started=True)
        return name

    get = do


async def test_a_pause_that_is_over_by_a_calls_turn_is_not_made_again(autojump_clock):
    turns = Turns()
    async with connected([turns]) as client:
        names = ["long", "a", "b", "c"]
        assert await collect(druvarpc.windowed(client.stub(Fickle).get, names)) == names
        assert now() == pytest.approx(5, abs=0.01)
        assert turns.times["a"] == turns.times["c"] == pytest.approx([0, 5], abs=0.01)


@pytest.mark.parametrize("ordered", [True, False])
async def test_no_call_of_a_window_is_attempted_more_often_than_asked_for(autojump_clock, ordered):
    class Full(Failing):
        """Refuses all calls but those of one name: that one when it has been called twice."""

        async def get(self, name: str) -> str:
            times = self.times.setdefault(name, [])
            if int(name) % 2 and len(times) == 2:
                return name
            return await super().get(name)

    full = Full(busy(0.1))
    async with connected([full], retry=Retry(attempts=3)) as client:
        names = [f"{number}" for number in range(1, 10)]
        with pytest.raises(RpcError, match="busy"):
            await collect(druvarpc.windowed(client.stub(Fickle).get, names, ordered=ordered))
        assert max(len(times) for times in full.times.values()) == 3


async def test_calls_that_lingered_when_the_connection_was_lost_had_not_started(autojump_clock):
    link = Link(rtt=0.1)
    clubbing = druvarpc.Clubbing(linger=1.0)
    fickle = MyFickle()
    async with connected([fickle], link=link, clubbing=clubbing) as client:

        async def cut() -> None:
            await trio.sleep(0.5)
            link.cut()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            assert await client.stub(Fickle).do("x") == "x"
        assert len(fickle.begun) == 1


# --- the tuner of a window ---


async def test_calls_that_failed_are_not_taken_for_delivered(autojump_clock):
    """A window goes on as it was after its connection was lost."""
    link = Link(rtt=0.1, bandwidth=1e6)
    async with connected([MyFickle()], link=link) as client:

        async def cut() -> None:
            await trio.sleep(1.03)
            link.cut()

        names = ["x" * 50] * 40_000
        start = now()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            assert len(await collect(druvarpc.windowed(client.stub(Fickle).get, names))) == 40_000
        broken = now() - start
        start = now()
        assert len(await collect(druvarpc.windowed(client.stub(Fickle).get, names))) == 40_000
        assert broken < (now() - start) + 0.7


# --- cancelled at every point ---


async def all_that_is_made_again(drained: Drained, client: druvarpc.Client) -> None:
    """Each kind of call, refused by a server that drains, or failed by one that is unavailable."""
    stub, fickle = client.stub(Vault), client.stub(Fickle)
    hedged = client.stub(Fickle, hedge=druvarpc.Hedge(0.01))
    for kind in (
        partial(stub.add, 1),
        partial(stub.upload, pieces()),
        lambda: collect(stub.sync(pieces())),
        lambda: collect(druvarpc.windowed(stub.add, range(3), ordered=False)),
        partial(one_club, client),
    ):
        drained.drain()
        await kind()
        await trio.sleep(10)
    await fickle.fill(pieces())
    await collect(fickle.list("x"))
    await hedged.get("x")


async def test_cancelled_before_every_fourth_step(autojump_clock, nursery):
    steps, completed = 0, False
    living = None
    while not completed:
        steps += 4  # to cancel before each takes too long
        fickle = MyFickle(*unavailable(2))
        drained = Drained(nursery, MemoryVault(), fickle)
        with trio.CancelScope() as scope:
            async with drained.there.connect() as client:
                instrument = CancelAt(scope, steps)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await all_that_is_made_again(drained, client)
                    completed = not scope.cancel_called
                finally:
                    trio.lowlevel.remove_instrument(instrument)
                    assert client.statistics().calls_active == 0
        await trio.sleep(150)  # until the servers have given up, too
        if living is None:
            living = trio.lowlevel.current_statistics().tasks_living
        assert trio.lowlevel.current_statistics().tasks_living == living
    assert steps > 100


# --- what is kept ---


async def test_what_cannot_be_sent_again_is_not_kept(autojump_clock):
    """Neither what the server has begun and may not begin twice, nor more than the bounds."""

    async def source(count: int, go_on: trio.Event) -> AsyncGenerator[bytes, None]:
        for _ in range(count):
            yield bytes(50_000)
            await trio.testing.wait_all_tasks_blocked()
        await go_on.wait()

    tracemalloc.start()
    try:
        for method, count, kept in (("upload", 15, 0), ("fill", 15, 15), ("fill", 30, 0)):
            async with connected([MemoryVault(), MyFickle()]) as client:
                stub = client.stub(Vault) if method == "upload" else client.stub(Fickle)
                go_on = trio.Event()
                before, _ = tracemalloc.get_traced_memory()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(getattr(stub, method), source(count, go_on))
                    await trio.sleep(1)
                    more = tracemalloc.get_traced_memory()[0] - before
                    assert kept * 50_000 <= more < (kept + 6) * 50_000
                    go_on.set()
                assert tracemalloc.get_traced_memory()[0] - before < 6 * 50_000
    finally:
        tracemalloc.stop()
