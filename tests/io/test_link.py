"""The simulated link, by its own clock: when what arrives, what is lost, who waits for whom."""

import math
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

import druvarpc
from druvarpc.testing import Link, connected
from tests.io.services import MemoryVault, Vault

approx = pytest.approx
KB, MB = 1000, 1000 * 1000
now = trio.current_time


async def send(end, data, size=256 * 1024):
    """Send in writes of `size` bytes."""
    for start in range(0, len(data), size):
        rest = [data[start : start + size]]
        while rest := end.send_nowait(rest):
            await end.wait_writable()


async def send_and_end(end, data):
    await send(end, data)
    end.send_eof()


async def pour(end):
    """Send for ever."""
    while True:
        await send(end, bytes(64 * KB))


async def receive(end, size=math.inf):
    """Return when at least how many bytes were there, until `size` have come, or the end."""
    arrivals = [(now(), 0)]
    while arrivals[-1][1] < size and (data := await end.receive()):
        arrivals.append((now(), arrivals[-1][1] + len(data)))
    return arrivals


async def carry(near, far, data):
    """Return what arrives of data that end."""
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, near, data)
        while piece := await far.receive():
            received += piece
    return bytes(received)


async def count(end, counts, key):
    """Count what comes from now on."""
    counts[key] = 0
    while data := await end.receive():
        counts[key] += len(data)


async def filled(end):
    """Send until nothing is taken for an hour; return how much was."""
    total = 0
    with trio.move_on_after(3600):
        while True:
            rest = end.send_nowait([bytes(64 * KB)])
            total += 64 * KB - sum(map(len, rest))
            if rest:
                await end.wait_writable()
    return total


def run(function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    return trio.run(function, *args, clock=trio.testing.MockClock(autojump_threshold=0))


# The round trip.


async def test_a_call_takes_one_round_trip(autojump_clock):
    async with connected([MemoryVault()], link=Link(rtt=0.1)) as client:
        vault, start = client.stub(Vault), now()
        assert await vault.add(40, 2) == 42
        assert now() - start == approx(0.1)
        assert await client.ping() == approx(0.1)


async def test_a_link_without_arguments_takes_no_time(autojump_clock):
    async with connected([MemoryVault()], link=Link()) as client:
        assert await client.stub(Vault).add(40, 2) == 42
    assert now() == 0


async def test_large_calls_take_their_time_on_the_wire(autojump_clock):
    limits = druvarpc.Limits(stream_window=16 * MB, connection_window=16 * MB)
    async with connected(
        [MemoryVault()],
        limits=limits,
        server_limits=limits,
        link=Link(rtt=0.1, bandwidth=12.5e6),
    ) as client:
        start = now()
        assert len(await client.stub(Vault).echo(bytes(10 * MB))) == 10 * MB
        assert now() - start == approx(0.1 + 2 * 0.8, rel=0.01)


async def test_both_directions_have_the_delay(autojump_clock):
    near, far = Link(rtt=0.2).connect()
    near.send_nowait([b"there"])
    assert await far.receive() == b"there"
    assert now() == approx(0.1)
    far.send_nowait([b"and ", b"back"])
    assert await near.receive() == b"and back"
    assert now() == approx(0.2)


async def test_what_is_sent_is_not_changed_afterwards(autojump_clock):
    near, far = Link(rtt=0.2).connect()
    data = bytearray(b"before")
    near.send_nowait([data, memoryview(data)])
    data[:] = b"after!"
    assert await far.receive() == b"beforebefore"


# The rate.


async def test_bytes_take_their_time_on_the_wire(autojump_clock):
    link = Link(rtt=0.1, bandwidth=12.5e6)
    near, far = link.connect()
    assert await carry(near, far, bytes(10 * MB)) == bytes(10 * MB)
    assert now() == approx(0.05 + 0.8)
    assert (link.bytes_up, link.bytes_down) == (10 * MB, 0)


async def test_a_write_arrives_piece_by_piece(autojump_clock):
    near, far = Link(rtt=0.1, bandwidth=1e6).connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, near, bytes(256 * KB))
        arrivals = await receive(far, 256 * KB)
    assert len(arrivals) > 100
    for time, size in arrivals[1:]:
        assert time == approx(0.05 + size / 1e6)


async def test_the_directions_do_not_share_the_rate(autojump_clock):
    near, far = Link(bandwidth=1e6).connect()
    async with trio.open_nursery() as nursery:
        for end in near, far:
            nursery.start_soon(send_and_end, end, bytes(MB))
            nursery.start_soon(receive, end)
    assert now() == approx(1)


async def test_connections_share_the_rate_fairly(autojump_clock):
    link = Link(rtt=0.1, bandwidth=12.5e6)
    counts: dict[int, int] = {}
    async with trio.open_nursery() as nursery:
        for number in range(5):
            near, far = link.connect()
            nursery.start_soon(pour, near)
            nursery.start_soon(count, far, counts, number)
        with trio.move_on_after(4.05):
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    assert sum(counts.values()) == approx(4 * 12.5e6, rel=0.01)
    for taken in counts.values():
        assert taken == approx(4 * 2.5e6, rel=0.05)


async def test_an_idle_connection_leaves_its_share_to_others(autojump_clock):
    link = Link(bandwidth=1e6)
    link.connect()
    assert len(await carry(*link.connect(), bytes(MB))) == MB
    assert now() == approx(1)


async def test_little_is_taken_ahead_of_the_wire(autojump_clock):
    link = Link(bandwidth=1e6, queue=4 * KB)
    near, far = link.connect()
    rest = near.send_nowait([bytes(1 * KB), bytes(9 * KB), bytes(KB)])
    assert sum(map(len, rest)) == 7 * KB
    await near.wait_writable()
    assert 0.002 <= now() <= 0.0035  # half of it has left, in whole segments
    assert await carry(near, far, bytes(MB)) == bytes(4 * KB + MB)
    assert link.peak_queue == approx(4 * KB, rel=0.01)


@pytest.mark.parametrize("arguments", [{"queue": 1}, {"window": 1}])
async def test_a_byte_at_a_time(arguments, autojump_clock):
    near, far = Link(rtt=0.1, bandwidth=1e6, **arguments).connect()
    assert await carry(near, far, b"byte by byte") == b"byte by byte"
    assert now() == approx(0.05 + (1.1 if "window" in arguments else 0), abs=0.001)


async def test_a_window_holds_each_connection(autojump_clock):
    link = Link(rtt=0.1, bandwidth=12.5e6, window=125 * KB)
    alone, counts = dict[str, int](), dict[str, int]()
    async with trio.open_nursery() as nursery:
        near, far = link.connect()
        nursery.start_soon(pour, near)
        nursery.start_soon(count, far, alone, "first")
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(4.05):
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    assert alone["first"] == approx(4 * 1.25e6, rel=0.05)
    link = Link(rtt=0.1, bandwidth=12.5e6, window=125 * KB)
    async with trio.open_nursery() as nursery:
        for name in "first", "second":
            near, far = link.connect()
            nursery.start_soon(pour, near)
            nursery.start_soon(count, far, counts, name)
        with trio.move_on_after(4.05):
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    assert counts["first"] == approx(alone["first"], rel=0.05)
    assert counts["second"] == approx(alone["first"], rel=0.05)


# Jitter.


async def jittery(seed):
    near, far = Link(rtt=0.1, bandwidth=1e6, jitter=0.01, seed=seed).connect()
    data = b"".join(number.to_bytes(4, "big") for number in range(50 * KB))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, near, data)
        pieces, times = [], []
        while piece := await far.receive():
            pieces.append(piece)
            times.append(now())
    assert b"".join(pieces) == data
    return times


def test_jitter_is_late_by_chance_and_the_same_for_the_same_seed():
    times = run(jittery, 1)
    assert times == run(jittery, 1)
    assert times != run(jittery, 2)
    assert 0.05 + 0.2 <= times[-1] <= 0.05 + 0.2 + 0.01 + 1e-9


def test_jitter_of_a_connection_does_not_depend_on_others():
    async def second(others_first):
        link = Link(jitter=1)
        (near, _), (other, far) = link.connect(), link.connect()
        ends = [near, other] if others_first else [other, near]
        for end in ends:
            end.send_nowait([b"x"])
        await far.receive()
        return now()

    assert run(second, True) == run(second, False)


# Stalls and cuts.


@pytest.mark.parametrize("planned", [True, False])
async def test_nothing_moves_during_a_stall(planned, autojump_clock):
    link = Link(rtt=0.1, bandwidth=1e6, stalls=[(0.5, 3)] if planned else [])
    near, far = link.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, near, bytes(MB))
        before = await receive(far, 400 * KB)
        if not planned:
            nursery.start_soon(stall_at, link, 0.5, 3)
        arrivals = await receive(far, MB - before[-1][1])
    assert arrivals[-1][0] == approx(0.05 + 1 + 3)
    assert not [time for time, _ in arrivals if 0.501 < time < 3.499]


async def stall_at(link, time, seconds):
    await trio.sleep_until(time)
    link.stall(seconds)


async def test_stalls_that_overlap_are_one(autojump_clock):
    link = Link(rtt=0.1, stalls=[(0.02, 1), (0.5, 2), (5, 1)])
    near, far = link.connect()
    near.send_nowait([b"x"])
    await trio.sleep_until(2)
    link.stall(0.25)
    assert await far.receive() == b"x"
    assert now() == approx(2.5 + 0.03)
    link.stall(0)
    link.stall(4)  # until the last one is over
    far.send_nowait([b"y"])
    assert await near.receive() == b"y"
    assert now() == approx(2.53 + 4 + 0.05)


async def test_a_link_may_stall_for_ever(autojump_clock):
    link = Link(rtt=0.1)
    near, far = link.connect()
    near.send_nowait([b"x"])
    link.stall(math.inf)
    with trio.move_on_after(1e6) as scope:
        await far.receive()
    assert scope.cancelled_caught
    link.cut()
    with pytest.raises(trio.BrokenResourceError):
        await far.receive()


@pytest.mark.parametrize("planned", [True, False])
async def test_a_cut_breaks_all_connections_at_both_ends(planned, autojump_clock):
    link = Link(rtt=0.1, bandwidth=1e6, cuts=[5, 2] if planned else [])
    broken = []

    async def wait(attempt):
        with pytest.raises(trio.BrokenResourceError):
            await attempt()
        broken.append(now())

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            near, far = link.connect()
            nursery.start_soon(wait, near.receive)
            nursery.start_soon(wait, partial(pour, near))
            nursery.start_soon(wait, partial(receive, far))
        await trio.sleep_until(2)
        if not planned:
            link.cut()
    assert broken == [approx(2)] * 6
    assert now() == approx(2)
    for attempt in (near.send_eof, partial(near.send_nowait, [b"x"])):
        with pytest.raises(trio.BrokenResourceError):
            attempt()
    await near.wait_writable()
    near.close()
    with pytest.raises(trio.ClosedResourceError):
        await near.receive()
    near, far = link.connect()
    near.send_nowait([b"again"])
    assert await far.receive() == b"again"
    if planned:
        with pytest.raises(trio.BrokenResourceError):
            await far.receive()
        assert now() == approx(5)


async def test_what_is_on_the_way_at_a_cut_is_lost(autojump_clock):
    link = Link(rtt=0.1)
    near, far = link.connect()
    near.send_nowait([b"arrived, and not read"])
    await trio.sleep(0.2)
    near.send_nowait([b"on the way"])
    link.cut()
    with pytest.raises(trio.BrokenResourceError):
        await far.receive()


async def test_a_call_on_a_link_that_is_cut_fails(autojump_clock):
    link = Link(rtt=0.1, cuts=[1])
    async with connected([MemoryVault()], link=link) as client:
        await trio.sleep_until(0.98)
        with pytest.raises(druvarpc.ConnectionLost):
            await client.stub(Vault).add(40, 2)
        assert now() == approx(1)


async def test_a_call_with_a_deadline_ends_on_a_link_that_stalls(autojump_clock):
    link = Link(rtt=0.1)
    async with connected([MemoryVault()], link=link) as client:
        link.stall(15)
        start = now()
        with trio.move_on_after(5) as scope:
            await client.stub(Vault).add(40, 2)
        assert scope.cancelled_caught
        assert now() - start == approx(5)
        assert await client.stub(Vault).add(40, 2) == 42
        assert now() - start == approx(15.1)


# Receivers that don't read, and ends that end.


@pytest.mark.parametrize("arguments", [{}, {"rtt": 0.1, "bandwidth": 12.5e6}, {"rtt": 0.1}])
async def test_a_receiver_that_does_not_read_stops_the_sender(arguments, autojump_clock):
    near, far = Link(**arguments).connect()
    total = await filled(near)
    assert 256 * KB <= total <= 32 * MB
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, near, bytes(MB))
        assert (await receive(far, total + MB))[-1][1] == total + MB


async def test_a_reader_that_is_cancelled_has_read_nothing(autojump_clock):
    near, far = Link(rtt=0.1).connect()
    near.send_nowait([b"whole"])
    with trio.move_on_after(0.01):
        await far.receive()
    await trio.sleep(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await far.receive()
    assert await far.receive() == b"whole"


@pytest.mark.parametrize("way", ["send_eof", "close"])
async def test_the_end_follows_what_was_sent(way, autojump_clock):
    near, far = Link(rtt=0.1, bandwidth=1e6).connect()
    near.send_nowait([bytes(10 * KB)])
    getattr(near, way)()
    getattr(near, way)()
    arrivals = await receive(far)
    assert arrivals[-1] == (approx(0.05 + 0.01), 10 * KB)
    assert now() == approx(0.05 + 0.01)
    assert await far.receive() == b""


async def test_the_end_alone_takes_half_a_round_trip(autojump_clock):
    near, far = Link(rtt=0.1).connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive, far)
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1)
        near.send_eof()
    assert now() == approx(1.05)


async def test_an_end_that_sent_its_end_still_reads(autojump_clock):
    near, far = Link(rtt=0.1).connect()
    near.send_eof()
    with pytest.raises(trio.BrokenResourceError):
        near.send_nowait([b"x"])
    await near.wait_writable()
    assert await far.receive() == b""
    far.send_nowait([b"answer"])
    assert await near.receive() == b"answer"


async def test_a_closed_end_does_nothing_more(autojump_clock):
    near, far = Link(rtt=0.1).connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_closed, near.receive)
        await trio.testing.wait_all_tasks_blocked()
        near.close()
    await expect_closed(near.receive)
    await near.wait_writable()
    for attempt in (near.send_eof, partial(near.send_nowait, [b"x"])):
        with pytest.raises(trio.ClosedResourceError):
            attempt()
    assert now() == 0
    assert await far.receive() == b""


async def expect_closed(attempt):
    with pytest.raises(trio.ClosedResourceError):
        await attempt()


async def test_a_writer_that_waits_is_woken_by_its_own_close(autojump_clock):
    near, _ = Link(bandwidth=1).connect()
    near.send_nowait([bytes(MB)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.wait_writable)
        await trio.testing.wait_all_tasks_blocked()
        near.close()
    assert now() == 0


async def test_a_writer_learns_a_round_trip_later_that_nobody_reads(autojump_clock):
    near, far = Link(rtt=0.1).connect()
    far.close()
    near.send_nowait([b"nobody reads this"])
    await trio.sleep(0.099)
    near.send_nowait([b"nor this"])
    await trio.sleep(0.002)
    with pytest.raises(trio.BrokenResourceError):
        near.send_nowait([b"x"])
    assert await near.receive() == b""


async def test_a_writer_that_waits_learns_that_the_reader_closed(autojump_clock):
    near, far = Link(rtt=0.1).connect()
    await filled(near)
    far.send_nowait([b"last words"])
    async with trio.open_nursery() as nursery:
        start = now()
        nursery.start_soon(near.wait_writable)
        await trio.testing.wait_all_tasks_blocked()
        far.close()
    assert now() - start == approx(0.05)
    with pytest.raises(trio.BrokenResourceError):
        near.send_nowait([b"x"])
    assert await near.receive() == b"last words"
    assert await near.receive() == b""


# All of it.


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rtt", {"rtt": -0.1}),
        ("rtt", {"rtt": math.inf}),
        ("rtt", {"rtt": math.nan}),
        ("bandwidth", {"bandwidth": 0}),
        ("bandwidth", {"bandwidth": math.nan}),
        ("queue", {"queue": 0}),
        ("jitter", {"jitter": -1}),
        ("window", {"window": 0}),
        ("stalls", {"stalls": [(1, 1), (-1, 1)]}),
        ("stalls", {"stalls": [(1, math.nan)]}),
        ("cuts", {"cuts": [-1]}),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Link(**arguments)


async def test_a_stall_has_a_length(autojump_clock):
    with pytest.raises(ValueError, match=r"^seconds must be"):
        Link().stall(-1)


async def test_times_are_counted_from_the_first_connection(autojump_clock):
    await trio.sleep(100)
    link = Link(rtt=0.2, stalls=[(1, 1)], cuts=[3])
    await trio.sleep(100)
    near, far = link.connect()
    await trio.sleep(1)
    near.send_nowait([b"x"])
    await far.receive()
    assert now() == approx(200 + 2.1)
    with pytest.raises(trio.BrokenResourceError):
        await far.receive()
    assert now() == approx(200 + 3)


def test_two_runs_take_the_same_times():
    async def times():
        link = Link(
            rtt=0.1,
            bandwidth=1e6,
            jitter=0.01,
            window=50 * KB,
            stalls=[(0.3, 1)],
        )
        near, far = link.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_end, near, bytes(500 * KB))
            return await receive(far)

    assert run(times) == run(times)


def test_two_runs_of_calls_take_the_same_times_but_for_the_order_of_tasks():
    async def times():
        link = Link(rtt=0.1, bandwidth=1e6, window=50 * KB, stalls=[(2, 1)])
        async with connected([MemoryVault()], link=link) as client:
            times = []
            for size in range(0, 500 * KB, 100 * KB):
                await client.stub(Vault).echo(bytes(size))
                times.append(now())
        return times

    # Trio tosses a coin for the order of tasks that can run at the same time.
    assert run(times) == approx(run(times), abs=0.005)


WRITES = st.lists(st.lists(st.integers(0, 3000) | st.integers(0, 40_000), max_size=4), max_size=6)
SECONDS = st.floats(0, 2)
SIZE = st.integers(100, 10_000)


@given(
    rtt=SECONDS,
    bandwidth=st.floats(1e3, 1e9) | st.just(math.inf),
    queue=st.none() | SIZE,
    jitter=st.just(0.0) | SECONDS,
    window=st.none() | SIZE,
    stalls=st.lists(st.tuples(SECONDS, SECONDS), max_size=4),
    up=WRITES,
    down=WRITES,
    pauses=st.lists(SECONDS, min_size=1, max_size=6),
)
def test_all_bytes_arrive_in_order(rtt, bandwidth, queue, jitter, window, stalls, up, down, pauses):
    chance = Random(len(up))
    up, down = ([[chance.randbytes(size) for size in sizes] for sizes in way] for way in (up, down))

    async def write(end, writes):
        for number, buffers in enumerate(writes):
            await trio.sleep(pauses[number % len(pauses)])
            while buffers := end.send_nowait(buffers):
                await end.wait_writable()
        end.send_eof()

    async def read(end, expected):
        received = bytearray()
        number = 0
        while data := await end.receive():
            received += data
            number += 1
            if number < 20:
                await trio.sleep(pauses[number % len(pauses)])
        assert received == b"".join(b"".join(buffers) for buffers in expected)

    async def main():
        link = Link(
            rtt=rtt,
            bandwidth=bandwidth,
            queue=queue,
            jitter=jitter,
            window=window,
            stalls=stalls,
        )
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                near, far = link.connect()
                nursery.start_soon(write, near, up)
                nursery.start_soon(write, far, down)
                nursery.start_soon(read, far, up)
                nursery.start_soon(read, near, down)
        sent = sum(len(buffer) for buffers in up for buffer in buffers)
        assert link.bytes_up == 2 * sent
        assert now() >= (rtt / 2 + 2 * sent / bandwidth) * (1 - 1e-9)

    run(main)
