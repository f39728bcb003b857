# mypy: disable-error-code="empty-body"
import pytest
import trio
import trio.testing

import druvarpc
from druvarpc import Clubbing, RpcError, Status
from druvarpc.testing import connected
from tests.io.services import Chunk, ClosedGate, Gate, MemoryVault, Session, Vault, served


class Desk(druvarpc.Service):
    @druvarpc.rpc
    async def begin(self, owner: str) -> Session: ...

    @druvarpc.rpc
    async def numbers(self, count: int) -> list[int]: ...

    @druvarpc.rpc
    async def table(self) -> dict[str, dict[str, list[int]]]: ...

    @druvarpc.rpc
    async def describe(self, session: Session) -> str: ...

    @druvarpc.rpc
    async def same(self, text: str) -> str: ...

    @druvarpc.rpc
    async def add(self, a: int, b: int = 0) -> int: ...

    @druvarpc.rpc
    async def fail(self, message: str) -> int: ...

    @druvarpc.rpc
    async def put(self, chunk: Chunk) -> int: ...


class MyDesk(Desk):
    def __init__(self) -> None:
        self.ran: list[str] = []

    async def begin(self, owner: str) -> Session:
        return Session(7, owner, ["first", "second"], Chunk(b"id", b"data"))

    async def numbers(self, count: int) -> list[int]:
        return list(range(count))

    async def table(self) -> dict[str, dict[str, list[int]]]:
        return {"a": {"b": [10, 20, 30]}}

    async def describe(self, session: Session) -> str:
        return f"{session.owner} has {session.id}"

    async def same(self, text: str) -> str:
        self.ran.append(text)
        return text

    async def add(self, a: int, b: int = 0) -> int:
        self.ran.append(f"{a}+{b}")
        return a + b

    async def fail(self, message: str) -> int:
        raise RpcError(Status.NOT_FOUND, message, {"message": message})

    async def put(self, chunk: Chunk) -> int:
        return len(chunk.data)


# Calls that gather by themselves.


async def clubs_of(tasks: int, clubbing: Clubbing = Clubbing()) -> druvarpc.Statistics:
    async with connected([MemoryVault()], clubbing=clubbing) as client:
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            for number in range(tasks):
                nursery.start_soon(client.stub(Vault).add, number, 1)
        return client.statistics()


async def test_calls_that_tasks_start_together_share_a_frame():
    statistics = await clubs_of(100)
    assert statistics.clubs_sent == 1
    assert statistics.calls_clubbed == 100


async def test_their_replies_share_frames_too():
    async with served([MemoryVault()]) as server:
        async with druvarpc.connect(server.addresses[0]) as client, trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(client.stub(Vault).add, number, 1)
        statistics = server.statistics()
    assert statistics.clubs_sent < 5
    assert statistics.calls_clubbed > 90


async def test_replies_do_not_wait_for_the_handlers_of_a_whole_club():
    """The client can work on the first of them while handlers of the later calls run."""
    sent_before_each = []

    class Watched(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            sent_before_each.append(server.statistics().clubs_sent)
            return a + b

    async with served([Watched()]) as server, druvarpc.connect(server.addresses[0]) as client:
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(client.stub(Vault).add, number, 1)
        assert client.statistics().clubs_sent == 1
    assert sent_before_each[0] == 0
    assert sent_before_each[-1] >= 2


async def test_calls_that_start_together_share_a_frame_after_a_call_alone_too():
    async with connected([MemoryVault()]) as client:
        vault = client.stub(Vault)
        for number in range(3):
            await vault.add(number, 1)
        before = client.statistics()
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(vault.add, number, 1)
        after = client.statistics()
    assert after.clubs_sent == before.clubs_sent + 1
    assert after.calls_clubbed == before.calls_clubbed + 100


async def test_one_call_alone_is_not_clubbed():
    statistics = await clubs_of(1)
    assert statistics.clubs_sent == 1
    assert statistics.calls_clubbed == 0


async def test_clubs_of_one_are_no_clubs():
    statistics = await clubs_of(20, Clubbing(max_calls=1))
    assert statistics.clubs_sent == 20
    assert statistics.calls_clubbed == 0


async def test_clubs_have_at_most_so_many_calls():
    statistics = await clubs_of(100, Clubbing(max_calls=10))
    assert statistics.clubs_sent == 10
    assert statistics.calls_clubbed == 100


async def test_clubs_have_at_most_so_many_bytes():
    statistics = await clubs_of(100, Clubbing(max_bytes=200))
    assert statistics.clubs_sent > 10


async def test_a_call_lingers_for_others(autojump_clock):
    results = []

    async def add(client, number):
        await trio.sleep(number / 100)
        results.append(await client.stub(Vault).add(number, 0))

    async with connected([MemoryVault()], clubbing=Clubbing(linger=0.5)) as client:
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(add, client, number)
        assert trio.current_time() - start == pytest.approx(0.5)
        assert client.statistics().clubs_sent == 1
    assert sorted(results) == list(range(10))


async def test_without_linger_nothing_waits(autojump_clock):
    async with connected([MemoryVault()]) as client:
        start = trio.current_time()
        for number in range(10):
            await client.stub(Vault).add(number)
        assert trio.current_time() == start
        assert client.statistics().clubs_sent == 10


async def test_one_that_fails_does_not_touch_the_others():
    results = []

    async def call(function, *args):
        try:
            results.append(await function(*args))
        except RpcError as error:
            results.append(error.status.name)

    async with connected([MyDesk()]) as client, trio.open_nursery() as nursery:
        desk = client.stub(Desk)
        for number in range(10):
            nursery.start_soon(call, desk.add, number)
            nursery.start_soon(call, desk.fail, "no")
    assert results.count("NOT_FOUND") == 10
    assert sorted(result for result in results if result != "NOT_FOUND") == list(range(10))


# Clubs that are asked for.


async def test_a_club_is_one_round_trip(reach):
    async with reach([MyDesk()]) as client:
        desk = client.stub(Desk)
        before = client.statistics()
        async with client.club() as club:
            one = club.call(desk.add, 1, 2)
            two = club.call(desk.same, "text")
        assert (one.value, two.value) == (3, "text")
        after = client.statistics()
    assert after.clubs_sent == before.clubs_sent + 1
    assert after.calls_clubbed == before.calls_clubbed + 2
    assert after.calls_started == before.calls_started + 2
    assert after.calls_active == 0


async def test_a_reply_may_be_an_argument(reach):
    async with reach([MyDesk()]) as client:
        desk = client.stub(Desk)
        before = client.statistics().clubs_sent
        async with client.club() as club:
            one = club.call(desk.add, 1, 2)
            two = club.call(desk.add, one, 10)
            three = club.call(desk.add, b=one, a=two)
        assert [reply.value for reply in (one, two, three)] == [3, 13, 16]
        assert client.statistics().clubs_sent == before + 1


async def test_parts_of_a_reply_may_be_arguments():
    async with connected([MyDesk()]) as client:
        desk = client.stub(Desk)
        async with client.club() as club:
            session = club.call(desk.begin, "me")
            whole = club.call(desk.describe, session)
            field = club.call(desk.same, session.field("owner"))
            key = club.call(desk.same, session["owner"])
            tag = club.call(desk.same, session["tags"][1])
            chunk = club.call(desk.put, session.field("last"))
            numbers = club.call(desk.numbers, 5)
            index = club.call(desk.add, numbers[3], numbers[4])
            table = club.call(desk.table)
            deep = club.call(desk.add, table["a"]["b"][2])
        assert session.value.id == 7
        assert whole.value == "me has 7"
        assert [field.value, key.value, tag.value] == ["me", "me", "second"]
        assert chunk.value == 4
        assert index.value == 7
        assert deep.value == 30


async def test_a_chain_of_calls():
    async with connected([MyDesk()]) as client:
        desk = client.stub(Desk)
        async with client.club() as club:
            reply = club.call(desk.add, 0, 1)
            for _ in range(300):
                reply = club.call(desk.add, reply, 1)
        assert reply.value == 301


async def test_calls_without_references_to_each_other_run_at_once():
    gate = ClosedGate()
    async with connected([gate, MyDesk()]) as client, trio.open_nursery() as nursery:

        async def open_when_all_are_inside():
            await gate.until_inside(3)
            gate.opened.set()

        nursery.start_soon(open_when_all_are_inside)
        stub = client.stub(Gate)
        async with client.club() as club:
            names = [club.call(stub.enter, name) for name in "abc"]
            last = club.call(stub.enter_after, names[0], "d")
        assert [name.value for name in names] == list("abc")
        assert last.value == "d after a"
    assert gate.entered == ["a", "b", "c", "d"]


async def test_errors_leave_the_club_as_a_group():
    async with connected([MyDesk()]) as client:
        desk = client.stub(Desk)
        with pytest.raises(ExceptionGroup) as caught:
            async with client.club() as club:
                good = club.call(desk.add, 1, 2)
                bad = club.call(desk.fail, "one")
                club.call(desk.fail, "two")
        assert [error.message for error in caught.value.exceptions] == ["one", "two"]
        assert {error.status for error in caught.value.exceptions} == {Status.NOT_FOUND}
        assert good.value == 3
        with pytest.raises(RpcError) as error:
            _ = bad.value
        assert error.value.details == {"message": "one"}


async def test_errors_can_be_left_to_the_replies():
    async with connected([MyDesk()]) as client:
        desk = client.stub(Desk)
        async with client.club(raise_errors=False) as club:
            good = club.call(desk.add, 1, 2)
            bad = club.call(desk.fail, "one")
        assert good.value == 3
        assert good.error is None
        assert isinstance(bad.error, RpcError)
        for _ in range(2):
            with pytest.raises(RpcError, match="one"):
                _ = bad.value


async def test_a_call_that_needs_one_that_failed_never_runs():
    desk = MyDesk()
    async with connected([desk]) as client:
        stub = client.stub(Desk)
        async with client.club(raise_errors=False) as club:
            bad = club.call(stub.fail, "one")
            needs = club.call(stub.add, bad, 1)
            needs_that = club.call(stub.add, 1, needs)
            free = club.call(stub.add, 1, 1)
        assert free.value == 2
        for reply in (needs, needs_that):
            assert isinstance(reply.error, RpcError)
            assert reply.error.status is Status.FAILED_PRECONDITION
            assert reply.error.not_started
    assert desk.ran == ["1+1"]


@pytest.mark.parametrize("part", [lambda s: s["nobody"], lambda s: s["tags"][2], lambda s: s[0]])
async def test_a_part_that_is_not_there(part):
    desk = MyDesk()
    async with connected([desk]) as client:
        stub = client.stub(Desk)
        async with client.club(raise_errors=False) as club:
            session = club.call(stub.begin, "me")
            same = club.call(stub.same, part(session))
        assert isinstance(same.error, RpcError)
        assert same.error.status is Status.FAILED_PRECONDITION
    assert desk.ran == []


async def test_a_reply_of_the_wrong_type_for_the_argument():
    desk = MyDesk()
    async with connected([desk]) as client:
        stub = client.stub(Desk)
        async with client.club(raise_errors=False) as club:
            number = club.call(stub.add, 1, 2)
            same = club.call(stub.same, number)  # type: ignore[arg-type]
        assert isinstance(same.error, RpcError)
        assert same.error.status is Status.INVALID_ARGUMENT
        assert "argument text" in same.error.message


async def test_a_reply_has_no_value_before_the_block_has_ended():
    async with connected([MyDesk()]) as client:
        desk = client.stub(Desk)
        async with client.club() as club:
            reply = club.call(desk.add, 1, 2)
            with pytest.raises(RuntimeError):
                _ = reply.value
        assert reply.value == 3
        assert reply.value == 3


async def test_a_reply_cannot_be_iterated_or_taken_for_its_value():
    async with connected([MyDesk()]) as client:
        desk = client.stub(Desk)
        async with client.club() as club:
            numbers = club.call(desk.numbers, 3)
            with pytest.raises(TypeError):
                list(numbers)  # type: ignore[call-overload]
            with pytest.raises(TypeError):
                _ = numbers[-1]
            with pytest.raises(TypeError):
                _ = numbers[1:2]  # type: ignore[index]
            with pytest.raises((RpcError, TypeError)):
                club.call(desk.describe, [numbers])  # type: ignore[arg-type]


async def test_an_empty_club_sends_nothing():
    async with connected([MyDesk()]) as client:
        before = client.statistics()
        async with client.club():
            pass
        assert client.statistics().clubs_sent == before.clubs_sent


async def test_nothing_is_sent_if_the_block_raises():
    desk = MyDesk()
    async with connected([desk]) as client:
        with pytest.raises(ValueError, match="mine"):
            async with client.club() as club:
                reply = club.call(client.stub(Desk).add, 1, 2)
                raise ValueError("mine")
        with pytest.raises(RuntimeError):
            _ = reply.value
        with pytest.raises(RuntimeError):
            club.call(client.stub(Desk).add, 1, 2)
        await trio.testing.wait_all_tasks_blocked()
        assert client.statistics().calls_started == 0
    assert desk.ran == []


async def test_the_club_is_over_when_the_block_is():
    async with connected([MyDesk()]) as client:
        desk = client.stub(Desk)
        async with client.club() as club:
            club.call(desk.add, 1, 2)
        with pytest.raises(RuntimeError):
            club.call(desk.add, 1, 2)


async def test_cancelling_the_block_cancels_its_calls():
    gate = ClosedGate()
    async with connected([gate]) as client, trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:

            async def cancel_when_all_are_inside():
                await gate.until_inside(3)
                scope.cancel()

            nursery.start_soon(cancel_when_all_are_inside)
            stub = client.stub(Gate)
            async with client.club() as club:
                first = club.call(stub.enter, "a")
                club.call(stub.enter, "b")
                club.call(stub.enter, "c")
                club.call(stub.enter_after, first, "d")
        assert scope.cancelled_caught
        with pytest.raises(RuntimeError):
            _ = first.value
        await gate.until_empty()
        await trio.testing.wait_all_tasks_blocked()
        assert client.statistics().calls_active == 0
    assert sorted(gate.cancelled) == ["a", "b", "c"]
    assert "d" not in gate.entered


async def test_the_deadline_of_the_block_is_that_of_its_calls(autojump_clock):
    gate = ClosedGate()
    async with connected([gate]) as client:
        start = trio.current_time()
        with pytest.raises(trio.TooSlowError), trio.fail_after(5):
            async with client.club() as club:
                first = club.call(client.stub(Gate).enter, "a")
                club.call(client.stub(Gate).enter_after, first, "b")
        assert trio.current_time() == start + 5
        await gate.until_empty()


async def test_more_calls_than_the_server_takes_at_once(reach):
    limits = druvarpc.Limits(max_club=64, max_calls=100)
    async with reach([MyDesk()], server_limits=limits) as client:
        desk = client.stub(Desk)
        async with client.club() as club:
            replies = [club.call(desk.add, number, 1) for number in range(300)]
        assert [reply.value for reply in replies] == list(range(1, 301))


async def test_calls_that_need_no_others_go_in_as_many_frames_as_their_bytes_take():
    payload = bytes(1000)
    async with connected([MemoryVault()]) as client:
        vault = client.stub(Vault)
        async with client.club() as club:
            replies = [club.call(vault.echo, payload) for _ in range(200)]
        assert {reply.value for reply in replies} == {payload}
        ((names, count),) = client.statistics().clubs.items()
    assert names == ("Vault.echo",)
    assert count.calls == 200
    assert 4 <= count.frames <= 5, "200 kB in frames of 64 KiB, whose calls are whole"


async def test_references_in_a_club_that_needs_several_frames():
    """Those that reach into an earlier frame can't be sent; all others are."""
    desk = MyDesk()
    limits = druvarpc.Limits(max_club=64)
    async with connected([desk], server_limits=limits) as client:
        stub = client.stub(Desk)
        async with client.club(raise_errors=False) as club:
            first = club.call(stub.add, 1, 1)
            for number in range(70):
                last = club.call(stub.add, number, 1)
            far = club.call(stub.add, first, 1)
            near = club.call(stub.add, last, 1)
            needs_far = club.call(stub.add, far, 1)
        assert first.value == 2
        assert last.value == 70
        assert near.value == 71
        for reply in (far, needs_far):
            assert isinstance(reply.error, RpcError)
            assert reply.error.not_started
        assert far.error.status is Status.INVALID_ARGUMENT
        assert needs_far.error.status is Status.FAILED_PRECONDITION


async def test_large_arguments_and_results_in_a_club():
    data = bytes(1024 * 1024)
    async with connected([MemoryVault()]) as client:
        vault = client.stub(Vault)
        async with client.club() as club:
            sizes = [club.call(vault.put, Chunk(b"1", data)) for _ in range(3)]
            echo = club.call(vault.echo, data)
            again = club.call(vault.echo, echo)
        assert [size.value for size in sizes] == [len(data)] * 3
        assert echo.value == again.value == data


async def test_a_reply_of_another_club_is_refused():
    async with connected([MyDesk()]) as client:
        desk = client.stub(Desk)
        async with client.club() as other:
            reply = other.call(desk.add, 1, 2)
        async with client.club() as club:
            with pytest.raises(ValueError, match="club"):
                club.call(desk.add, reply, 1)
            with pytest.raises(ValueError, match="club"):
                club.call(desk.add, reply["part"], 1)
            ok = club.call(desk.add, reply.value, 1)
        assert ok.value == 4


async def test_two_services_in_one_club():
    async with connected([MyDesk(), MemoryVault()]) as client:
        desk, vault = client.stub(Desk), client.stub(Vault, metadata={"a": "b"})
        async with client.club() as club:
            number = club.call(desk.add, 1, 2)
            total = club.call(vault.add, number, 10)
        assert total.value == 13


async def test_what_does_not_belong_in_a_club():
    async with connected([MemoryVault()]) as client, connected([MemoryVault()]) as other:
        vault = client.stub(Vault)
        async with client.club() as club:
            with pytest.raises(TypeError, match=r"Vault\.download"):
                club.call(vault.download, [1])  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                club.call(MemoryVault().add, 1, 2)
            with pytest.raises(TypeError, match=r"Vault\.add"):
                club.call(vault.add)
            with pytest.raises(ValueError, match="another client"):
                club.call(other.stub(Vault).add, 1, 2)
            with pytest.raises(RpcError, match="argument chunk"):
                club.call(vault.put, object())
            fine = club.call(vault.add, 1, 2)
        assert fine.value == 3


async def test_an_unknown_method_in_a_club_fails_alone():
    async with connected([MemoryVault()]) as client:
        async with client.club(raise_errors=False) as club:
            missing = club.call(client.stub(Vault).missing)
            other = club.call(client.stub(Desk).add, 1, 2)
            fine = club.call(client.stub(Vault).add, 1, 2)
        assert fine.value == 3
        assert missing.error.status is Status.UNIMPLEMENTED
        assert other.error.status is Status.UNIMPLEMENTED


async def test_a_part_that_lies_too_deep_is_refused_at_once():
    async with connected([MyDesk()]) as client:
        desk = client.stub(Desk)
        async with client.club() as club:
            part = club.call(desk.table)["a"]
            for _ in range(15):
                part = part["a"]
            with pytest.raises(ValueError, match="16"):
                _ = part["a"]


async def test_a_club_in_a_handler():
    class Relay(MyDesk):
        def __init__(self, client) -> None:
            super().__init__()
            self.client = client

        async def add(self, a: int, b: int = 0) -> int:
            desk = self.client.stub(Desk)
            async with self.client.club() as club:
                one = club.call(desk.add, a, b)
                two = club.call(desk.add, one, one)
            return two.value

    async with connected([MyDesk()]) as client, connected([Relay(client)]) as front:
        assert await front.stub(Desk).add(1, 2) == 6
