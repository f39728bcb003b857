"""How many calls are in flight: a simulated server, and what the limit makes of it."""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from druvarpc.protocol.concurrency import LEAST, START, ConcurrencyLimit


class Path:
    """A server at the end of a link, and a client that always has calls to make.

    Args:
        rtt: seconds on the link, there and back.
        capacity: calls a second that the server can take.
        workers: handlers that run at once.
        handler: tells how long the next one takes, in seconds.
        burst: replies arrive together, every so many seconds.
        most: what the limit may be at most.
    """

    def __init__(
        self,
        *,
        rtt: float = 0.04,
        capacity: float = 1e6,
        workers: int = 1_000_000,
        handler: Callable[[], float] = lambda: 0.0,
        burst: float = 0.0,
        most: int = 4608,
    ) -> None:
        self.rtt, self.capacity, self.workers, self.handler = rtt, capacity, workers, handler
        self.burst, self.most = burst, most
        self.limit = ConcurrencyLimit(most)
        self.has_calls = True
        self.now = 0.0
        self.in_flight = self.started = 0
        self.ends: list[tuple[float, float]] = []  # when, and after how long
        self._marked: int | None = None
        self._free_at = 0.0
        self._running = 0
        self._waiting: deque[tuple[int, float]] = deque()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def run(self, seconds: float) -> tuple[float, float]:
        """Return the calls that ended in a second, and how long they took in the mean."""
        start, end = self.now, self.now + seconds
        self.start()
        while self._events and self._events[0][0] <= end:
            self.now = self._events[0][0]
            while self._events and self._events[0][0] == self.now:
                heapq.heappop(self._events)[2]()
            self.start()
        self.now = end
        times = [time for when, time in self.ends if when > start]
        return len(times) / seconds, sum(times) / max(1, len(times))

    def start(self, most: float = math.inf) -> None:
        """Start calls while there is room, at most until so many are in flight."""
        while self.has_calls and self.in_flight < min(most, self.limit.limit):
            self.in_flight += 1
            self.started += 1
            call = self.started, self.now
            if self.in_flight == self.limit.limit and self._marked is None:
                self._marked = self.started
                self.limit.mark(self.now, self.in_flight, self.started - self.in_flight)
            self._at(self.now + self.rtt / 2, lambda call=call: self._arrive(call))

    def _at(self, time: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, act))

    def _arrive(self, call: tuple[int, float]) -> None:
        self._free_at = max(self._free_at, self.now) + 1 / self.capacity
        self._at(self._free_at, lambda: self._admit(call))

    def _admit(self, call: tuple[int, float]) -> None:
        self._waiting.append(call)
        self._work()

    def _work(self) -> None:
        if self._running < self.workers and self._waiting:
            self._running += 1
            call = self._waiting.popleft()
            self._at(self.now + self.handler(), lambda: self._reply(call))

    def _reply(self, call: tuple[int, float]) -> None:
        self._running -= 1
        self._work()
        time = self.now + self.rtt / 2
        if self.burst:
            time = (time // self.burst + 1) * self.burst
        self._at(time, lambda: self._end(call))

    def _end(self, call: tuple[int, float]) -> None:
        number, began = call
        self.in_flight -= 1
        self.ends.append((self.now, self.now - began))
        if number == 1:
            self.limit.first(self.now - began)
        if number == self._marked:
            self._marked = None
            self.limit.end(self.now, self.started - self.in_flight, self.most)


def test_it_starts_with_what_the_server_takes() -> None:
    assert ConcurrencyLimit(100_000).limit == START
    assert ConcurrencyLimit(72).limit == 72
    assert ConcurrencyLimit(1).limit == 1


def test_start_up_doubles_each_round() -> None:
    path = Path(capacity=100_000)
    path.run(0.06)
    assert path.limit.limit == 2 * START
    path.run(0.06)
    assert path.limit.limit >= 3.9 * START
    rate, _ = path.run(0.12)
    assert rate > 60_000


def test_ten_thousand_calls_take_four_round_trips_and_their_work() -> None:
    path = Path(capacity=100_000)
    path.run(0.25)
    assert len(path.ends) >= 10_000


@pytest.mark.parametrize("rtt", [0.005, 0.04, 0.1])
@pytest.mark.parametrize("capacity", [1000, 4000])
def test_the_rate_is_the_path_s_and_the_latency_little_more(rtt: float, capacity: int) -> None:
    path = Path(rtt=rtt, capacity=capacity)
    path.run(4)
    rate, latency = path.run(2)
    assert rate > 0.95 * capacity
    assert path.limit.limit < 3 * max(LEAST, capacity * rtt)
    assert latency < 3 * max(rtt, LEAST / capacity)


@pytest.mark.parametrize("workers", [8, 64])
def test_slow_handlers_of_which_few_run_at_once(workers: int) -> None:
    path = Path(workers=workers, handler=lambda: 0.1)
    path.run(2 * START * 0.1 / workers + 2)  # the first window, and what filled it up again
    rate, latency = path.run(10)
    assert rate > 0.95 * workers / 0.1
    assert latency < 3 * max(0.14, LEAST * 0.1 / workers)


def test_slow_handlers_that_all_run_at_once() -> None:
    path = Path(handler=lambda: 0.5)
    path.run(6)
    rate, latency = path.run(4)
    assert rate > 0.9 * path.most / 0.54
    assert latency == pytest.approx(0.54, rel=0.01)


def test_handlers_of_one_processor() -> None:
    numbers = random.Random(1)
    path = Path(workers=4, handler=lambda: numbers.expovariate(500))
    path.run(5)
    rate, latency = path.run(10)
    assert rate > 0.95 * 2000
    assert latency < 3 * 0.042


def test_calls_that_vary_a_hundredfold() -> None:
    numbers = random.Random(2)
    path = Path(handler=lambda: 1.0 if numbers.random() < 0.1 else 0.01)
    path.run(3)
    rate, _ = path.run(5)
    # The mean is 0.149 s; what counts is that the quick ones don't make the limit fall.
    assert rate > 0.4 * path.most / 0.149


def test_replies_that_come_in_bursts() -> None:
    path = Path(capacity=5000, burst=0.02)
    path.run(3)
    rate, _ = path.run(6)
    assert rate > 0.95 * 5000
    assert path.limit.limit < 3 * 5000 * 0.06


@pytest.mark.parametrize("factor", [0.1, 0.3, 3, 10])
def test_a_capacity_that_changes(factor: float) -> None:
    path = Path(capacity=2000)
    path.run(4)
    path.capacity *= factor
    path.run(6)
    rate, latency = path.run(6)
    assert rate > 0.95 * path.capacity
    assert latency < 3 * max(0.04, LEAST / path.capacity)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.5, 2.2, 3, 4, 8])
def test_a_round_trip_that_changes(factor: float) -> None:
    path = Path(capacity=2000)
    path.run(4)
    path.rtt *= factor
    path.run(10)
    rate, latency = path.run(10)
    assert rate > 0.93 * 2000
    assert latency < 3 * path.rtt


def test_a_source_that_gives_too_few_calls_changes_nothing() -> None:
    path = Path(capacity=2000)
    path.run(3)
    path.has_calls = False
    path.run(1)
    limit = path.limit.limit
    # Nine in ten of what the window has room for, and then nothing for as long as a minute.
    for pause in [0.01, 0.1, 1, 60] * 5:
        path.has_calls = True
        path.start(limit * 9 // 10)
        path.has_calls = False
        path.run(pause)
        assert path.limit.limit == limit


def test_a_marked_call_that_overtakes_the_others_ends_no_round() -> None:
    limit = ConcurrencyLimit(4608)
    limit.mark(0.0, START, 0)
    limit.end(0.01, 10, 4608)
    assert limit.limit == START
    limit.mark(0.01, START, 10)
    limit.end(0.05, START, 4608)
    assert limit.limit == 2 * START


def test_the_server_may_take_less_from_now_on() -> None:
    limit = ConcurrencyLimit(4608)
    limit.mark(0.0, START, 0)
    limit.end(0.04, START, 100)
    assert limit.limit == 100


def test_the_first_call_counts_before_the_first_round_only() -> None:
    early, late = ConcurrencyLimit(4608), ConcurrencyLimit(4608)
    for limit in early, late:
        limit.mark(0.0, START, 0)
    early.first(0.04)
    for limit in early, late:
        limit.end(1.04, START, 4608)
    late.first(0.04)
    # A first round that takes 25 times as long has filled queues: these are emptied first.
    assert early.limit == LEAST + 3
    assert late.limit == 2 * START


def test_the_slow_start_of_a_new_connection_is_no_queue() -> None:
    """TCP takes four round trips for the first calls; then the rate grows."""
    limit = ConcurrencyLimit(4608)
    limit.mark(0.0, START, 0)
    limit.first(0.04)
    limit.end(0.16, START, 4608)
    assert limit.limit == START
    limit.mark(0.16, START, START)
    limit.end(0.21, 2 * START, 4608)
    assert limit.limit > 1.5 * START


@given(
    st.integers(1, 5000),
    st.lists(
        st.tuples(
            st.floats(0, 100), st.integers(1, 5000), st.integers(0, 10_000), st.integers(1, 5000)
        )
    ),
    st.none() | st.floats(0, 1e6),
)
def test_the_limit_stays_within_its_bounds(
    most: int, rounds: list[tuple[float, int, int, int]], first: float | None
) -> None:
    limit = ConcurrencyLimit(most)
    now, ended = 0.0, 0
    for seconds, in_flight, count, bound in rounds:
        limit.mark(now, in_flight, ended)
        if first is not None:
            limit.first(first)
        now += seconds
        ended += count
        limit.end(now, ended, bound)
        most = bound
        assert 1 <= limit.limit <= most


@settings(max_examples=20)
@given(st.floats(0.001, 0.1), st.floats(200, 2000))
def test_any_path_is_used(rtt: float, capacity: float) -> None:
    path = Path(rtt=rtt, capacity=capacity)
    path.run(1 + START / capacity * 2)
    rate, latency = path.run(1)
    assert rate > 0.9 * capacity
    assert latency < 3 * max(rtt, LEAST / capacity)
