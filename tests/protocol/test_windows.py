"""Windows follow the rate and the round trip, both ways, and stay within the memory there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.protocol import Budget, Limits, PongReceived
from druvarpc.protocol.frames import MAX_WINDOW
from druvarpc.protocol.inflow import Inflow
from druvarpc.protocol.windows import LEAST_RTT, MOST_RTT, ReceiveWindow
from tests.protocol.pair import Pair
from tests.protocol.tcp import Transfer

KIB = 1024
MIB = 1024 * 1024
START = 128 * KIB
PLENTY = 2**40
NARROW = Limits(stream_window=START, connection_window=MIB)
UNLIMITED = Limits(stream_window=2**30, connection_window=2**30)


def window(budget: Budget | None = None, start: int = START) -> ReceiveWindow:
    return ReceiveWindow(start, budget or Budget(PLENTY))


class Clock:
    """A sender that keeps a rate as far as the window lets it, and an application that takes all.

    `sizes` are those that the window has had.
    """

    def __init__(self, window: ReceiveWindow, rtt: float = 0.1) -> None:
        self.window = window
        self.rtt = rtt
        self.now = 0.0
        self.sizes: list[int] = []

    def flow(self, rate: float, seconds: float) -> None:
        """Send in twenty parts a round trip."""
        end = self.now + seconds
        while self.now < end:
            self.now += self.rtt / 20
            self.take(min(int(rate * self.rtt / 20), self.window.available))

    def take(self, size: int) -> None:
        """Send so much at once."""
        self.window.receive(size)
        self.window.consume(size, self.now, self.rtt)
        self.window.due()
        self.sizes.append(self.window.size)


# Growth.


@pytest.mark.parametrize("streams", [1, 32])
@pytest.mark.parametrize("upwards", [True, False])
@pytest.mark.parametrize(
    ("rtt", "rate"), [(0.08, 125e6), (0.04, 25e6), (0.2, 12.5e6), (0.3, 125e6)]
)
def test_windows_are_not_what_limits_a_transfer(
    rtt: float, rate: float, upwards: bool, streams: int
) -> None:
    """From the first byte, while TCP's own slow start doubles its rate each round trip."""
    times: list[float] = []
    for limits in (UNLIMITED, Limits()):
        transfer = Transfer(rate, rtt, limits=limits, streams=streams, upwards=upwards)
        times.append(transfer.run(until=lambda: transfer.taken >= 60e6))  # noqa: B023  # runs here
    unlimited, ours = times
    assert ours <= max(1.03 * unlimited, unlimited + rtt)


def test_a_window_grows_within_a_round_trip() -> None:
    one = window()
    one.consume(100 * KIB, 0.0, 0.1)
    assert one.size == 300 * KIB
    one.consume(100 * KIB, 0.09, 0.1)
    assert one.size == 600 * KIB
    one.consume(100 * KIB, 0.11, 0.1)
    assert one.size == 600 * KIB, "this is another round trip"


def test_a_window_grows_before_the_round_trip_is_known() -> None:
    """Until then it may be long, and all that was consumed came within it."""
    two = Pair(server_options={"limits": NARROW}, settled=False)
    mine = two.call(more=True)
    two.client.send(mine, bytes(50_000))
    two.to_server()
    [yours] = two.arrived()
    assert two.server.rtt is None
    two.server.take(yours, two.now)
    assert two.server.incoming(yours).window.size == 3 * 50_064


def test_no_window_grows_beyond_what_the_protocol_counts() -> None:
    one = window(start=MAX_WINDOW - 10)
    one.consume(2**30, 0.0, 0.01)
    assert one.size == MAX_WINDOW


def test_a_sender_never_holds_a_receiver_to_more_than_the_window() -> None:
    transfer = Transfer(125e6, 0.1)
    transfer.run(seconds=2.0)
    transfer.paused = True
    size, taken = transfer.receiver.receive_window, transfer.taken
    transfer.run(seconds=10.0)
    [sink] = transfer.sinks
    while (message := transfer.receiver.take(sink, transfer.now)) is not None:
        transfer.taken += len(message)
    assert size / 3 < transfer.taken - taken <= size


# Shrinking.


def test_a_window_follows_the_rate_down_and_up_again() -> None:
    budget = Budget(PLENTY)
    clock = Clock(window(budget))
    clock.flow(10e6, 2.0)
    assert 3.0e6 <= clock.window.size <= 3.3e6
    clock.flow(1e6, 10.0)
    assert 0.3e6 <= clock.window.size <= 0.44e6
    assert budget.size - budget.left == clock.window.size - START
    clock.flow(10e6, 0.5)
    assert clock.window.size >= 2.9e6


def test_a_window_shrinks_by_half_at_most_each_time_and_to_its_start_at_last() -> None:
    clock = Clock(window(), rtt=0.01)
    clock.flow(2e8, 1.0)
    before = clock.window.size
    for second in range(12):
        clock.flow(1e6, 1.0)
        assert clock.window.size >= before >> (second + 2)
    assert clock.window.size == START


def test_an_idle_window_shrinks_by_what_is_consumed_after_it() -> None:
    """The peer's credit can't be taken back, only not be given again."""
    clock = Clock(window())
    clock.flow(10e6, 2.0)
    before = clock.window.size
    clock.now += 1000.0
    clock.take(100_000)
    assert clock.window.size == before - 100_000
    for _ in range(200):
        clock.now += 0.1
        clock.take(20_000)
        assert clock.window.available >= START * 3 // 4
    assert clock.window.size == START


def test_a_short_pause_changes_nothing() -> None:
    clock = Clock(window())
    for _ in range(20):
        clock.flow(10e6, 1.0)
        clock.now += 0.9
    assert len(set(clock.sizes[1000:])) == 1


def test_a_steady_rate_moves_no_window() -> None:
    clock = Clock(window())
    clock.flow(10e6, 1.0)
    clock.sizes.clear()
    clock.flow(10e6, 100.0)
    assert len(set(clock.sizes)) == 1


@given(st.lists(st.floats(9e6, 11e6), min_size=200, max_size=400))
def test_a_rate_that_wavers_shrinks_no_window(rates: list[float]) -> None:
    clock = Clock(window())
    for rate in rates:
        clock.flow(rate, 0.1)
    assert clock.sizes == sorted(clock.sizes)


# Memory.


def test_a_window_keeps_a_third_of_the_memory_free() -> None:
    budget = Budget(30 * MIB)
    clock = Clock(window(budget))
    clock.flow(1e9, 1.0)
    assert clock.window.size == START + 20 * MIB


def test_windows_shrink_when_memory_is_short_and_grow_again() -> None:
    budget = Budget(30 * MIB)
    clock = Clock(window(budget))
    clock.flow(1e9, 1.0)
    assert budget.take(9 * MIB)
    clock.flow(1e9, 0.4)
    assert clock.window.size == START + 14 * MIB
    budget.overdraw(60 * MIB)
    clock.flow(1e9, 0.4)
    assert clock.window.size == START, "that is what every window may have"
    budget.give(69 * MIB)
    clock.flow(1e9, 1.0)
    assert clock.window.size == START + 20 * MIB


def test_windows_share_the_memory_and_the_largest_shrink_for_the_others() -> None:
    budget = Budget(70 * MIB)
    clocks = [Clock(window(budget)) for _ in range(3)]
    for share in (46, 28, 20):
        growing = clocks[: {46: 1, 28: 2, 20: 3}[share]]
        for _ in range(100):
            for clock in growing:
                clock.flow(1e9, 0.1)
        for clock in growing:
            assert clock.window.size == pytest.approx(START + share * MIB, rel=0.02)


def test_what_is_taken_of_a_budget_is_taken_of_its_parent() -> None:
    whole = Budget(100)
    mine, yours = Budget(80, whole), Budget(80, whole)
    assert mine.take(70)
    assert (mine.left, yours.left, whole.left) == (10, 80, 30)
    assert not mine.take(20), "it has no more itself"
    assert not yours.take(40), "the whole has no more"
    assert (mine.free, yours.free) == (10, 30)
    yours.overdraw(40)
    assert whole.left == -10
    yours.give(40)
    assert (mine.left, yours.left, whole.left) == (10, 80, 30)
    mine.part()
    assert whole.left == 100
    mine.give(70)
    mine.part()
    assert (mine.left, whole.left) == (80, 100)
    with pytest.raises(AssertionError):
        mine.give(1)


def test_the_connections_of_one_process_share_its_memory() -> None:
    whole = Budget(8 * MIB)
    pairs = [Pair(server_options={"limits": NARROW, "budget": whole}) for _ in range(3)]
    streams = [two.accept(more=True) for two in pairs]

    def flow(index: int) -> int:
        two, (mine, yours) = pairs[index], streams[index]
        for _ in range(40):
            two.now += 0.001
            two.client.send(mine, bytes(1_000_000))
            two.run()
            while two.server.take(yours, two.now) is not None:
                two.run()
        return two.server.receive_window - MIB

    alone = flow(0)
    assert alone > MIB
    for _ in range(5):
        grown = [flow(index) for index in range(3)]
    assert all(0 < one < alone for one in grown)
    assert 0 < whole.left < 4 * MIB
    for two in pairs:
        two.server.close()
        two.server.release()
    assert whole.left == 8 * MIB


def test_large_messages_arrive_when_the_memory_of_the_process_is_gone() -> None:
    """Each connection may still finish one after another."""
    whole = Budget(1)
    for _ in range(2):
        two = Pair(server_options={"budget": whole})
        calls = [two.call(payload=bytes(900_000)) for _ in range(6)]
        two.run()
        assert sorted(call.id for call in two.arrived()) == [call.id for call in calls]
        assert whole.left == 1


# What the round trip is.


def test_a_round_trip_measured_in_a_queue_costs_memory_for_a_while_only() -> None:
    inflow = Inflow(Limits(memory=6 * MIB), frozenset(), None)
    clock = Clock(inflow.window)
    start = inflow.window.size
    inflow.measured(70.0)
    clock.rtt = inflow.rtt
    clock.flow(10e6, 100.0)
    assert inflow.window.size == start + 4 * MIB, "all that it may have"
    inflow.measured(0.05)
    clock.rtt = inflow.rtt
    clock.flow(1e6, 60.0)
    assert inflow.window.size == start


def test_what_windows_take_for_a_round_trip_has_bounds() -> None:
    """A shorter one measures two processes, a longer one a queue."""
    inflow = Inflow(Limits(), frozenset(), None)
    for measured, taken in ((0.0, LEAST_RTT), (0.3, 0.3), (70.0, MOST_RTT)):
        inflow.measured(measured)
        assert inflow.rtt == taken


class Measured:
    """A client that data come to all the time, over a route of a round trip that may change."""

    def __init__(self, rtt: float) -> None:
        self.two = Pair(settled=False)
        self.rtt = rtt
        self.samples: list[float] = []
        self.exchange()

    def exchange(self) -> None:
        """Carry what there is, one round trip long."""
        two = self.two
        two.server.ping(two.now)  # for something to come
        two.to_server()
        two.now += self.rtt
        two.to_client()
        self.samples += [
            event.rtt for event in two.client_events if isinstance(event, PongReceived)
        ]
        two.client_events.clear()

    def run(self, seconds: float) -> None:
        end = self.two.now + seconds
        while self.two.now < end:
            self.exchange()


def test_the_round_trip_is_measured_often_at_first() -> None:
    """The first time it may have waited behind the first burst of data."""
    link = Measured(0.5)
    link.exchange()
    link.rtt = 0.05
    link.run(0.5)
    assert link.two.client.rtt == pytest.approx(0.05)
    link.run(5.0)
    assert len(link.samples) >= 8
    before = len(link.samples)
    link.run(60.0)
    assert 10 <= len(link.samples) - before <= 13, "seldom after that"


def test_a_queue_for_half_a_minute_is_no_longer_round_trip() -> None:
    link = Measured(0.05)
    link.run(10.0)
    link.rtt = 0.4
    link.run(30.0)
    assert link.two.client.rtt == pytest.approx(0.05)


def test_a_route_that_became_longer_is_noticed() -> None:
    link = Measured(0.05)
    link.run(10.0)
    link.rtt = 0.4
    link.run(60.0)
    assert link.two.client.rtt == pytest.approx(0.4)


# What always holds.


@given(
    starts=st.lists(st.sampled_from([START, MIB]), min_size=1, max_size=4),
    sizes=st.tuples(st.sampled_from([1, MIB, 20 * MIB]), st.sampled_from([1, MIB, 30 * MIB])),
    steps=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.floats(0.0, 1.0),
            st.floats(0.0, 1.0),
            st.sampled_from([0.0, 0.001, 0.05, 0.3, 30.0]),
            st.sampled_from([LEAST_RTT, 0.1, MOST_RTT]),
            st.sampled_from([0, 0, 0, -1, 1]),
        ),
        max_size=80,
    ),
)
def test_credit_and_memory_are_conserved(
    starts: list[int],
    sizes: tuple[int, int],
    steps: list[tuple[int, float, float, float, float, int]],
) -> None:
    """Whatever is sent, held, consumed and taken of the memory for other things."""
    whole = Budget(sizes[0])
    budgets = [Budget(sizes[1], whole), Budget(sizes[1], whole)]
    windows = [window(budgets[index % 2], start) for index, start in enumerate(starts)]
    held = [0] * len(windows)
    other = 0
    now = 0.0
    for index, sent, consumed, pause, rtt, taking in steps:
        index %= len(windows)
        one, now = windows[index], now + pause
        if taking > 0:
            size = budgets[0].free // 2
            other += size if budgets[0].take(size) else 0
        elif taking < 0:
            budgets[0].give(other)
            other = 0
        size = int(sent * one.available)
        one.receive(size)
        held[index] += size
        size = int(consumed * held[index])
        held[index] -= size
        one.consume(size, now, rtt)
        one.due()
        assert one.available + held[index] + one.owed == one.size
        assert starts[index] <= one.size <= starts[index] + min(sizes) * 2 // 3
        assert 4 * one.owed < one.size, "what is worth a frame was given"
        assert min(whole.left, *(budget.left for budget in budgets)) >= 0
        grown = sum(one.size - start for one, start in zip(windows, starts, strict=True))
        assert whole.size - whole.left == grown + other
    for one in windows:
        one.close()
    budgets[0].give(other)
    assert [whole.left, *(budget.left for budget in budgets)] == [sizes[0], sizes[1], sizes[1]]
