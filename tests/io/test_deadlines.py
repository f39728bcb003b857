"""The caller's scope is the handler's: its deadline, and its cancellation."""
# mypy: disable-error-code="empty-body"

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc import RpcError, Status
from druvarpc.testing import connected
from tests.io.services import ClosedGate, Gate, MemoryVault, Vault


class Patient(druvarpc.Service):
    @druvarpc.rpc
    async def wait(self, seconds: float) -> float: ...

    @druvarpc.rpc
    def drip(self, seconds: float) -> AsyncGenerator[float, None]: ...

    @druvarpc.rpc
    async def collect(self, pieces: AsyncIterator[bytes]) -> int: ...


class MyPatient(Patient):
    """Waits, and notes when and how it ended."""

    def __init__(self) -> None:
        self.deadlines: list[float] = []
        self.ended: list[tuple[str, float]] = []

    async def _sleep(self, seconds: float) -> None:
        self.deadlines.append(druvarpc.current_call().deadline)
        how = "cancelled"
        try:
            await trio.sleep(seconds)
            how = "completed"
        finally:
            self.ended.append((how, trio.current_time()))

    async def wait(self, seconds: float) -> float:
        await self._sleep(seconds)
        return seconds

    async def drip(self, seconds: float) -> AsyncGenerator[float, None]:
        while True:
            await self._sleep(seconds)
            yield trio.current_time()

    async def collect(self, pieces: AsyncIterator[bytes]) -> int:
        await self._sleep(math.inf)
        return 0


@pytest.fixture
def patient() -> MyPatient:
    return MyPatient()


@pytest.fixture
async def stub(patient) -> AsyncGenerator[Patient, None]:
    async with connected([patient]) as client:
        yield client.stub(Patient)


async def test_the_handler_is_cancelled_at_the_moment_of_the_callers_deadline(
    stub, patient, autojump_clock
):
    start = trio.current_time()
    with pytest.raises(trio.TooSlowError), trio.fail_after(5):
        await stub.wait(60)
    await trio.testing.wait_all_tasks_blocked()
    assert patient.ended == [("cancelled", start + 5)]


async def test_the_handler_knows_the_deadline(stub, patient, autojump_clock):
    start = trio.current_time()
    with trio.fail_after(5):
        await stub.wait(1)
    assert patient.deadlines == [pytest.approx(start + 5)]


async def test_without_a_deadline_the_handler_has_none(stub, patient, autojump_clock):
    assert await stub.wait(10_000) == 10_000
    assert patient.deadlines == [math.inf]


async def test_the_nearest_of_nested_deadlines_counts(stub, patient, autojump_clock):
    start = trio.current_time()
    with trio.fail_after(100), trio.move_on_after(3) as scope, trio.fail_after(50):
        await stub.wait(60)
    assert scope.cancelled_caught
    await trio.testing.wait_all_tasks_blocked()
    assert patient.ended == [("cancelled", start + 3)]


async def test_a_shield_hides_the_outer_deadline(stub, patient, autojump_clock):
    with trio.move_on_after(3), trio.CancelScope(shield=True):
        assert await stub.wait(60) == 60
    assert patient.deadlines == [math.inf]


async def test_a_deadline_that_is_moved_while_the_call_runs(stub, patient, autojump_clock):
    start = trio.current_time()
    with trio.move_on_after(100) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stub.wait, 60)
            await trio.sleep(1)
            scope.deadline = trio.current_time() + 1
    await trio.testing.wait_all_tasks_blocked()
    assert patient.ended == [("cancelled", start + 2)]


async def test_a_deadline_that_has_passed_never_reaches_the_server(stub, patient, autojump_clock):
    with trio.move_on_after(0) as scope:
        await stub.wait(0)
    assert scope.cancelled_caught
    await trio.testing.wait_all_tasks_blocked()
    assert patient.deadlines == []


async def test_a_stream_ends_with_the_deadline(stub, patient, autojump_clock):
    start = trio.current_time()
    times = []
    with pytest.raises(trio.TooSlowError), trio.fail_after(3.5):
        async with aclosing(stub.drip(1)) as drops:
            async for _ in drops:
                times.append(trio.current_time() - start)
    assert times == [1, 2, 3]
    await trio.testing.wait_all_tasks_blocked()
    assert patient.ended[-1] == ("cancelled", start + 3.5)


async def test_an_upload_ends_with_the_deadline(stub, patient, autojump_clock):
    async def silent():
        yield b"one"
        await trio.sleep_forever()

    start = trio.current_time()
    with trio.move_on_after(3) as scope:
        await stub.collect(silent())
    assert scope.cancelled_caught
    await trio.testing.wait_all_tasks_blocked()
    assert patient.ended == [("cancelled", start + 3)]


async def test_the_callers_timeout_is_trios_and_not_an_rpc_error(stub, autojump_clock):
    for seconds in (0.001, 0.01, 0.1, 1.0, 10.0):
        with trio.move_on_after(seconds) as scope:
            await stub.wait(60)
        assert scope.cancelled_caught


async def test_a_handlers_own_timeout_is_its_own_affair(autojump_clock):
    class Impatient(MyPatient):
        async def wait(self, seconds: float) -> float:
            with trio.move_on_after(1):
                await trio.sleep(seconds)
                return seconds
            return -1

    async with connected([Impatient()]) as client:
        with trio.fail_after(5):
            assert await client.stub(Patient).wait(60) == -1


async def test_a_handlers_too_slow_error_is_internal(caplog, autojump_clock):
    class Strict(MyPatient):
        async def wait(self, seconds: float) -> float:
            with trio.fail_after(1):
                await trio.sleep(seconds)
            return seconds

    async with connected([Strict()]) as client:
        with pytest.raises(RpcError) as caught, trio.fail_after(5):
            await client.stub(Patient).wait(60)
        assert caught.value.status is Status.INTERNAL


async def test_deadline_exceeded_from_a_handler_arrives_when_the_caller_still_waits(
    autojump_clock,
):
    class Strict(MyPatient):
        async def wait(self, seconds: float) -> float:
            raise RpcError(Status.DEADLINE_EXCEEDED, "of a call further on")

    async with connected([Strict()]) as client:
        with pytest.raises(RpcError, match="further on") as caught, trio.fail_after(5):
            await client.stub(Patient).wait(60)
        assert caught.value.status is Status.DEADLINE_EXCEEDED


async def test_a_handler_passes_its_deadline_on(autojump_clock):
    """The deadline of a call that a handler makes is that of its own caller."""
    last = MyPatient()

    class Relay(Patient):
        def __init__(self, further: Patient) -> None:
            self.further = further

        async def wait(self, seconds: float) -> float:
            return await self.further.wait(seconds)

    async with connected([last]) as client:
        async with connected([Relay(client.stub(Patient))]) as front:
            start = trio.current_time()
            with trio.move_on_after(5) as scope:
                await front.stub(Patient).wait(60)
            assert scope.cancelled_caught
        assert last.deadlines == [pytest.approx(start + 5)]
        await trio.testing.wait_all_tasks_blocked()
        assert last.ended == [("cancelled", start + 5)]


async def test_calls_with_other_deadlines_are_none_of_each_others_business(
    stub, patient, autojump_clock
):
    results = []

    async def call(timeout, seconds):
        with trio.move_on_after(timeout) as scope:
            await stub.wait(seconds)
        results.append((timeout, seconds, scope.cancelled_caught))

    async with trio.open_nursery() as nursery:
        for timeout, seconds in ((1, 5), (3, 2), (4, 5), (math.inf, 6)):
            nursery.start_soon(call, timeout, seconds)
    assert results == [(1, 5, True), (3, 2, False), (4, 5, True), (math.inf, 6, False)]


async def test_a_task_that_ran_into_a_deadline_serves_on(stub, autojump_clock):
    for _ in range(50):
        with trio.move_on_after(0.5):
            await stub.wait(60)
        with trio.fail_after(10):
            assert await stub.wait(1) == 1


# Cancellation.


async def test_leaving_the_scope_cancels_the_handler(reach):
    gate = ClosedGate()
    async with reach([gate, MemoryVault()]) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stub(Gate).enter, "one")
            await gate.until_inside()
            nursery.cancel_scope.cancel()
        await gate.until_empty()
        assert gate.cancelled == ["one"]
        assert await client.stub(Vault).add(1, 2) == 3


async def test_cancelling_one_call_of_a_shared_frame_leaves_the_others(reach):
    gate = ClosedGate()
    names = []

    async def enter(stub, name, scope):
        with scope:
            names.append(await stub.enter(name))

    async with reach([gate]) as client, trio.open_nursery() as nursery:
        scopes = [trio.CancelScope() for _ in range(10)]
        for number, scope in enumerate(scopes):
            nursery.start_soon(enter, client.stub(Gate), str(number), scope)
        await gate.until_inside(10)
        scopes[3].cancel()
        scopes[7].cancel()
        await gate.until(lambda: len(gate.inside) == 8)
        gate.opened.set()
    assert sorted(gate.cancelled) == ["3", "7"]
    assert sorted(names) == ["0", "1", "2", "4", "5", "6", "8", "9"]


async def test_leaving_the_scope_cancels_a_streaming_handler():
    gate = ClosedGate()

    async def watch(stub):
        async with aclosing(stub.watch("me")) as sights:
            async for _ in sights:
                pass

    async with connected([gate]) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, client.stub(Gate))
            await gate.until_inside()
            nursery.cancel_scope.cancel()
        await gate.until_empty()


async def test_leaving_the_scope_cancels_the_handler_of_an_upload():
    gate = ClosedGate()

    async def silent():
        yield "one"
        await trio.sleep_forever()

    async with connected([gate]) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stub(Gate).enter_with, silent())
            await gate.until_inside()
            nursery.cancel_scope.cancel()
        await gate.until_empty()
        assert gate.cancelled == ["all"]


async def test_a_call_that_is_cancelled_before_it_is_sent_never_reaches_the_server():
    gate = ClosedGate()
    async with connected([gate, MemoryVault()]) as client:
        before = client.statistics().clubs_sent
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.stub(Gate).enter()
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert client.statistics().clubs_sent == before
        assert await client.stub(Vault).add(1, 2) == 3
    assert gate.entered == []


async def test_a_call_that_is_cancelled_while_it_waits_for_a_place_never_reaches_the_server():
    gate = ClosedGate()
    limits = druvarpc.Limits(max_calls=64)
    async with connected([gate], server_limits=limits) as client, trio.open_nursery() as nursery:
        for _ in range(64):
            nursery.start_soon(client.stub(Gate).enter, "first")
        await gate.until_inside(64)
        async with trio.open_nursery() as inner:
            for _ in range(100):
                inner.start_soon(client.stub(Gate).enter, "late")
            await trio.testing.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        gate.opened.set()
    assert gate.entered == ["first"] * 64


class Shielded(MemoryVault):
    """Its `add` can't be cancelled, and takes ten seconds."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0

    async def add(self, a: int, b: int = 1) -> int:
        self.begun += 1
        with trio.CancelScope(shield=True):
            await trio.sleep(10)
        self.ended += 1
        return a + b


async def test_a_handler_that_shields_itself_holds_on_until_it_ends(autojump_clock):
    vault = Shielded()
    async with connected([vault]) as client:
        start = trio.current_time()
        with trio.move_on_after(1):
            await client.stub(Vault).add(1)
        assert trio.current_time() == start + 1
        assert vault.ended == 0
        await trio.sleep(20)
        assert vault.ended == 1
        with trio.fail_after(30):
            assert await client.stub(Vault).add(1) == 2


async def test_a_place_is_held_until_the_handler_has_ended(autojump_clock):
    vault = Shielded()
    limits = druvarpc.Limits(max_calls=64)
    async with connected([vault], server_limits=limits) as client:
        with trio.move_on_after(1):
            async with trio.open_nursery() as nursery:
                for _ in range(64):
                    nursery.start_soon(client.stub(Vault).add, 1)
        start = trio.current_time()
        assert await client.stub(Vault).echo(b"x") == b"x"
        assert trio.current_time() - start == pytest.approx(9)
        assert vault.begun == vault.ended == 64


async def test_a_handler_that_swallows_cancellation_ends_its_call_only(autojump_clock):
    class Deaf(MyPatient):
        async def wait(self, seconds: float) -> float:
            with trio.CancelScope(shield=True):
                await trio.sleep(seconds)
            return seconds

    async with connected([Deaf()]) as client:
        stub = client.stub(Patient)
        for _ in range(3):
            with trio.move_on_after(1) as scope:
                await stub.wait(5)
            assert scope.cancelled_caught
        await trio.sleep(10)
        assert await stub.wait(1) == 1


async def test_open_and_cancel_many_times(autojump_clock):
    gate = ClosedGate()
    async with connected([gate, MemoryVault()]) as client:
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(client.stub(Gate).enter)
                await gate.until_inside(100)
                nursery.cancel_scope.cancel()
            await gate.until_empty()
        assert client.statistics().calls_active == 0
        assert await client.stub(Vault).add(1, 2) == 3
