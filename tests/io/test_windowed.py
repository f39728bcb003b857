# mypy: disable-error-code="empty-body"
import math
from contextlib import aclosing

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc import RpcError, Status, windowed
from druvarpc.testing import Link, connected
from tests.io.services import Chunk, ClosedGate, Gate, MemoryVault, Vault


class Line(druvarpc.Service):
    @druvarpc.rpc
    async def wait(self, seconds: float) -> float: ...


class MyLine(Line):
    """Waits as long as it is told; a negative time is an error at once."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.running = 0
        self.most = 0
        self.cancelled = 0

    async def wait(self, seconds: float) -> float:
        self.begun.append(seconds)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if seconds < 0:
                raise RpcError(Status.OUT_OF_RANGE, f"{seconds} s")
            await trio.sleep(seconds)
            return seconds
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


async def each(items):
    for item in items:
        yield item


async def collect(generator):
    async with aclosing(generator) as results:
        return [result async for result in results]


@pytest.mark.parametrize("source", [list, tuple, iter, each])
async def test_a_call_for_each_argument(source, reach):
    async with reach([MemoryVault()]) as client:
        results = await collect(windowed(client.stub(Vault).add, source(range(1000))))
    assert results == list(range(1, 1001))


@pytest.mark.parametrize("source", [iter, each])
@pytest.mark.parametrize("window", [None, 1, 2, 100])
async def test_results_come_in_the_order_of_the_arguments(source, window, autojump_clock):
    times = [3, 1, 2, 0, 5, 1, 0]
    async with connected([MyLine()]) as client:
        stub = client.stub(Line)
        assert await collect(windowed(stub.wait, source(times), window=window)) == times


@pytest.mark.parametrize("source", [iter, each])
async def test_or_as_calls_end(source, autojump_clock):
    times = [3, 1, 2, 0.5]
    async with connected([MyLine()]) as client:
        stub = client.stub(Line)
        assert await collect(windowed(stub.wait, source(times), ordered=False)) == sorted(times)


@pytest.mark.parametrize("source", [iter, each])
@pytest.mark.parametrize("window", [1, 2, 7])
@pytest.mark.parametrize("ordered", [True, False])
async def test_no_more_than_the_window_run_at_once(source, window, ordered, autojump_clock):
    line = MyLine()
    async with connected([line]) as client:
        stub = client.stub(Line)
        times = [1, 2, 1, 3, 1, 1, 2, 1, 1, 1]
        results = await collect(windowed(stub.wait, source(times), window=window, ordered=ordered))
    assert sorted(results) == sorted(times)
    assert line.most == window


async def test_a_window_takes_as_long_as_it_should(autojump_clock):
    async with connected([MyLine()]) as client:
        start = trio.current_time()
        await collect(windowed(client.stub(Line).wait, [1] * 12, window=4))
        assert trio.current_time() - start == pytest.approx(3)


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("is_async", [False, True])
async def test_the_source_is_never_further_ahead_than_the_window(window, is_async):
    taken = 0

    def source():
        nonlocal taken
        for number in range(50):
            taken += 1
            yield number

    async def async_source():
        for number in source():
            yield number

    arguments = async_source() if is_async else source()
    async with connected([MemoryVault()]) as client:
        results = 0
        async with aclosing(windowed(client.stub(Vault).add, arguments, window=window)) as sums:
            async for _ in sums:
                results += 1
                await trio.testing.wait_all_tasks_blocked()
                # One more may have been taken that waits for its place.
                assert taken <= results + window + 1
    assert taken == 50


async def test_a_window_of_its_own_choice_is_bounded_too():
    gate = ClosedGate()
    taken = 0

    async def source():
        nonlocal taken
        while True:
            taken += 1
            yield str(taken)

    async with connected([gate]) as client, trio.open_nursery() as nursery:
        nursery.start_soon(collect, windowed(client.stub(Gate).enter, source()))
        await trio.testing.wait_all_tasks_blocked()
        assert 16 <= taken < 5000
        nursery.cancel_scope.cancel()


async def test_large_arguments_are_bounded_in_bytes():
    taken = 0

    def source():
        nonlocal taken
        while True:
            taken += 1
            yield Chunk(b"%d" % taken, bytes(1024 * 1024))

    gate = trio.Event()

    class Stuck(MemoryVault):
        async def put(self, chunk: Chunk) -> int:
            await gate.wait()
            return 0

    async with connected([Stuck()]) as client, trio.open_nursery() as nursery:
        nursery.start_soon(collect, windowed(client.stub(Vault).put, source()))
        await trio.testing.wait_all_tasks_blocked()
        assert taken < 32
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("source", [iter, each])
async def test_a_call_that_fails_raises_in_its_turn(source, autojump_clock):
    line = MyLine()
    results = []
    async with connected([line]) as client:
        with pytest.raises(RpcError) as caught:
            async with aclosing(windowed(client.stub(Line).wait, source([3, 1, -1, 60]))) as times:
                async for time in times:
                    results.append(time)
        assert caught.value.status is Status.OUT_OF_RANGE
        assert results == [3, 1]
        await trio.testing.wait_all_tasks_blocked()
        assert line.cancelled == 1
        assert line.running == 0


async def test_unordered_a_call_that_fails_raises_when_it_does(autojump_clock):
    results = []
    async with connected([MyLine()]) as client:
        calls = windowed(client.stub(Line).wait, [3, 1, -1, 2], ordered=False)
        with pytest.raises(RpcError):
            async with aclosing(calls) as times:
                async for time in times:
                    results.append(time)
    assert results == []


class Broken(Exception):
    pass


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_source_that_fails_raises_after_the_results_before_it(is_async, autojump_clock):
    def source():
        yield 2
        yield 1
        raise Broken

    async def async_source():
        for item in source():
            yield item

    results = []
    async with connected([MyLine()]) as client:
        arguments = async_source() if is_async else source()
        with pytest.raises(Broken):
            async with aclosing(windowed(client.stub(Line).wait, arguments)) as times:
                async for time in times:
                    results.append(time)
    assert results == [2, 1]


@pytest.mark.parametrize("source", [iter, each])
async def test_an_argument_that_cannot_be_encoded_raises_in_its_turn(source):
    results = []
    async with connected([MemoryVault()]) as client:
        with pytest.raises(RpcError) as caught:
            async with aclosing(windowed(client.stub(Vault).add, source([1, object(), 3]))) as sums:
                async for one in sums:
                    results.append(one)
        assert caught.value.status is Status.INVALID_ARGUMENT
        assert results == [2]
        assert await client.stub(Vault).add(1) == 2


@pytest.mark.parametrize("source", [iter, each])
async def test_leaving_early_cancels_what_is_in_flight(source, autojump_clock):
    line = MyLine()
    async with connected([line]) as client:
        async with aclosing(windowed(client.stub(Line).wait, source([1, 60, 70, 80]))) as times:
            async for time in times:
                assert time == 1
                break
        await trio.testing.wait_all_tasks_blocked()
        assert line.cancelled == 3
        assert line.running == 0
        assert client.statistics().calls_active == 0


@pytest.mark.parametrize("is_async", [False, True])
async def test_leaving_early_closes_the_source(is_async):
    closed = []

    def source():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    async def async_source():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    async with connected([MemoryVault()]) as client:
        arguments = async_source() if is_async else source()
        async with aclosing(windowed(client.stub(Vault).add, arguments, window=3)) as sums:
            await anext(sums)
        del arguments
        assert closed == [True]


@pytest.mark.parametrize("source", [iter, each])
@pytest.mark.parametrize("ordered", [True, False])
async def test_an_empty_source(source, ordered):
    async with connected([MemoryVault()]) as client:
        assert await collect(windowed(client.stub(Vault).add, source([]), ordered=ordered)) == []


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("ordered", [True, False])
async def test_a_source_may_wait_for_results(window, ordered):
    sender, receiver = trio.open_memory_channel[int](math.inf)
    sender.send_nowait(1)
    results = []
    async with connected([MemoryVault()]) as client:
        calls = windowed(client.stub(Vault).add, receiver, window=window, ordered=ordered)
        async with aclosing(calls) as sums:
            async for result in sums:
                results.append(result)
                if result == 20:
                    sender.close()
                else:
                    sender.send_nowait(result)
    assert results == list(range(2, 21))


async def test_a_source_that_is_slow(autojump_clock):
    async def slow():
        for number in range(5):
            await trio.sleep(1)
            yield number

    async with connected([MemoryVault()]) as client:
        start = trio.current_time()
        times = []
        async with aclosing(windowed(client.stub(Vault).add, slow())) as sums:
            async for _ in sums:
                times.append(trio.current_time() - start)
    assert times == [1, 2, 3, 4, 5]


async def test_cancelling_the_consumer_cancels_the_calls(autojump_clock):
    line = MyLine()
    async with connected([line]) as client:
        with trio.move_on_after(5) as scope:
            await collect(windowed(client.stub(Line).wait, [60] * 10))
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert line.cancelled == 10


async def test_calls_of_a_window_share_frames():
    async with connected([MemoryVault()]) as client:
        await collect(windowed(client.stub(Vault).add, range(1000)))
        assert client.statistics().clubs_sent < 100


async def test_wrong_arguments():
    async with connected([MemoryVault()]) as client:
        vault = client.stub(Vault)
        with pytest.raises(ValueError, match="0"):
            windowed(vault.add, [1], window=0)
        with pytest.raises(TypeError, match=r"Vault\.upload"):
            windowed(vault.upload, [1])  # type: ignore[type-var]
        with pytest.raises(TypeError):
            windowed(MemoryVault().add, [1])
        with pytest.raises(TypeError):
            windowed(vault.add, 7)  # type: ignore[arg-type]


async def test_a_consumer_that_is_slow_holds_the_calls_back():
    async with connected([MemoryVault()]) as client:
        async with aclosing(windowed(client.stub(Vault).add, range(1000), window=10)) as sums:
            for _ in range(5):
                await anext(sums)
            await trio.testing.wait_all_tasks_blocked()
            assert client.statistics().calls_started <= 15


@pytest.mark.parametrize("source", [iter, each])
async def test_a_connection_that_is_closed(source):
    async with connected([MemoryVault()]) as client:
        add = client.stub(Vault).add
        async with connected([MemoryVault()]) as other:
            closed = other.stub(Vault).add
        with pytest.raises(druvarpc.ConnectionLost):
            await collect(windowed(closed, source([1, 2])))
        assert await collect(windowed(add, source([1, 2]))) == [2, 3]


WIDE = druvarpc.Limits(max_calls=4096)
FAR = Link(rtt=0.04, bandwidth=25e6)


async def test_a_far_server_is_kept_busy_within_a_few_round_trips(autojump_clock):
    async with connected([MemoryVault()], link=FAR, server_limits=WIDE) as client:
        start = trio.current_time()
        results = await collect(windowed(client.stub(Vault).echo, [bytes(64)] * 10_000))
        assert len(results) == 10_000
        assert trio.current_time() - start < 0.25


@pytest.mark.parametrize("source", [iter, each])
@pytest.mark.parametrize("ordered", [True, False])
async def test_no_more_calls_start_than_the_server_takes(source, ordered, autojump_clock):
    line, limits = MyLine(), druvarpc.Limits(max_calls=64)
    async with connected([line], link=FAR, server_limits=limits) as client:
        calls = windowed(client.stub(Line).wait, source([0.1] * 500), ordered=ordered)
        async with aclosing(calls) as results:
            count = 0
            async for _ in results:
                count += 1
                if ordered:
                    assert client.statistics().calls_active <= 72
    assert count == 500
    assert line.most == 64


@pytest.mark.parametrize("source", [iter, each])
async def test_a_slow_call_does_not_keep_the_others_from_starting(source, autojump_clock):
    line = MyLine()
    async with connected([line], server_limits=WIDE) as client:
        times = [10.0] + [0.1] * 1999
        calls = windowed(client.stub(Line).wait, source(times))
        async with aclosing(calls) as results, trio.open_nursery() as nursery:
            nursery.start_soon(anext, results)
            await trio.sleep(5)
            # Its result is the first to be taken. Those behind it wait, and aren't without number.
            assert len(line.begun) == 2000
    line = MyLine()
    async with connected([line], server_limits=WIDE) as client:
        calls = windowed(client.stub(Line).wait, source([10.0] + [0.1] * 20_000))
        async with aclosing(calls) as results, trio.open_nursery() as nursery:
            nursery.start_soon(anext, results)
            await trio.sleep(9)
            assert 2000 <= len(line.begun) <= 2 * 4608
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("source", [iter, each])
@pytest.mark.parametrize("ordered", [True, False])
async def test_a_slow_consumer_stops_the_source(source, ordered, autojump_clock):
    async with connected([MemoryVault()], server_limits=druvarpc.Limits(max_calls=1024)) as client:
        taken = 0

        def numbers():
            nonlocal taken
            for number in range(20_000):
                taken += 1
                yield number

        calls = windowed(client.stub(Vault).add, source(numbers()), ordered=ordered)
        async with aclosing(calls) as sums:
            for _ in range(3):
                await anext(sums)
                await trio.sleep(60)
                assert taken <= 2 * 1152 + 4


@pytest.mark.parametrize("source", [iter, each])
async def test_large_results_are_bounded_in_bytes(source, autojump_clock):
    started = 0

    class Large(MemoryVault):
        async def echo(self, data: bytes) -> bytes:
            nonlocal started
            started += 1
            return bytes(256 * 1024)

    async with connected([Large()]) as client:
        window = windowed(client.stub(Vault).echo, source([b""] * 2000))
        async with aclosing(window) as results:
            for _ in range(1100):
                await anext(results)
            # Those that had begun before the first result came; beyond them some 24 MiB.
            assert started <= 1100 + 96 + 16


async def test_one_argument_that_is_longer_than_all_may_be():
    limits = druvarpc.Limits(max_message=32 * 1024 * 1024)
    async with connected([MemoryVault()], server_limits=limits) as client:
        chunk = Chunk(b"1", bytes(30 * 1024 * 1024))
        assert await collect(windowed(client.stub(Vault).put, [chunk])) == [len(chunk.data)]
