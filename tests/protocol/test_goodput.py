"""How many connections there are, on model links."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.protocol.goodput import ConnectionCount

RTT = 0.08
MOST = 8
STEP = 8 * RTT  # between two looks


class Path:
    """A link of so many bytes a second, of which each connection gets so much at most.

    Args:
        capacity: bytes a second of all connections together.
        each: bytes a second of one.
        noise: the part by which rates vary.
        delay: seconds until a change of the number shows.
        seed: of the noise.
    """

    def __init__(
        self,
        capacity: float,
        each: float,
        *,
        noise: float = 0.0,
        delay: float = 4 * RTT,
        most: int = MOST,
        seed: int = 0,
    ) -> None:
        self.capacity, self.each, self.noise, self.delay = capacity, each, noise, delay
        self.spread = True
        self.idle = False  # new connections wait for something to do
        self.count = ConnectionCount(most, 0.0)
        self.now = 0.0
        self.carried = 0
        self.targets: list[int] = []  # one for each round trip
        self._random = random.Random(seed)
        self._working = 1
        self._changed = 0.0

    @property
    def target(self) -> int:
        return self.count.target

    def run(self, seconds: float) -> None:
        """Let the clock run, and look when it is time to."""
        end = self.now + seconds
        while self.now < end:
            target = self.target
            step = min(RTT, max(self.count.deadline - self.now, 0.001))
            self.now += step
            if target == self._working:
                self._changed = self.now
            elif self.now - self._changed >= self.delay or target < self._working:
                self._working, self._changed = target, self.now
            rate = min(self.capacity, self._working * self.each)
            self.carried += int(rate * step)
            told = self.carried
            if self.noise:
                told += int(self._random.uniform(-self.noise, self.noise) * rate * STEP / 2)
            idle = self.idle and target > self._working
            self.count.update(self.now, told, RTT, spread=self.spread, idle=idle)
            assert 1 <= self.target <= MOST
            assert self.count.deadline > self.now
            self.targets.append(self.target)

    def share(self, number: int) -> float:
        """Return the part of the time in which the target was so many."""
        return self.targets.count(number) / len(self.targets)


@pytest.mark.parametrize(
    ("each", "best"), [(20e6, 1), (12.5e6, 1), (6.25e6, 2), (3.125e6, 4), (1.5625e6, 8), (1e5, 8)]
)
def test_finds_the_number_that_the_link_rewards(each: float, best: int) -> None:
    path = Path(12.5e6, each)
    path.run(12)
    assert path.target == best
    path.run(1800)
    # Trials of more and of fewer take what is left.
    assert path.share(best) >= 0.95


def test_grows_within_seconds() -> None:
    path = Path(100e6, 1e6)
    path.run(7)
    assert path.target == MOST
    path.run(5)
    assert set(path.targets) == {1, 2, 4, 8}
    assert path.targets == sorted(path.targets), "nothing is tried at once when all are there"


def test_the_pauses_double() -> None:
    path = Path(12.5e6, 12.5e6)
    starts = []
    before = 1
    for _ in range(18_000):
        path.run(RTT)
        if path.target > before:
            starts.append(path.now)
        before = path.target
    pauses = [round(later - earlier) for earlier, later in pairwise(starts)]
    assert len(pauses) >= 8
    for pause, expected in zip(pauses, [10, 20, 40, 80, 160, 300, 300], strict=False):
        assert expected <= pause <= expected + 4


def test_follows_a_link_that_changes() -> None:
    path = Path(12.5e6, 1.5e6)
    path.run(30)
    assert path.target == 8
    path.each = 12.5e6
    path.run(1200)
    assert path.target == 1
    path.each = 1.5e6
    path.run(700)
    assert path.target == 8


def test_falls_by_halves_without_loss_of_rate() -> None:
    path = Path(12.5e6, 1.5e6)
    path.run(30)
    path.each = 3.2e6
    path.run(1200)
    assert path.target == 4
    assert path.targets.count(1) < 20 / RTT


def test_without_work_one_is_enough() -> None:
    path = Path(12.5e6, 1e6)
    path.run(30)
    assert path.target == 8
    path.each = 1000
    path.run(9)
    assert path.target > 1
    path.run(3)
    assert path.target == 1
    path.targets.clear()
    path.run(600)
    assert set(path.targets) == {1}, "too little to be worth a trial"
    path.each = 1e6
    path.run(8)
    assert path.target == 8, "what was learned before doesn't hold it up"


def test_a_pause_for_breath_changes_nothing() -> None:
    path = Path(12.5e6, 1e6)
    path.run(8)
    path.each, path.spread = 0, False
    path.run(8)
    path.each, path.spread = 1e6, True
    path.run(8)
    assert path.target == 8


def test_no_trial_begins_while_the_rate_rises_by_itself() -> None:
    """As it does when one connection begins; what more of them added couldn't be told from that."""
    path = Path(1e6, 1e6)
    for _ in range(100):
        path.run(RTT)
        path.capacity = path.each = 1.03 * path.each
    assert set(path.targets) == {1}
    path.run(60)
    assert path.target == 1


@pytest.mark.parametrize("quiet", [0.0, 0.35, 0.9, 5.0, 40.0])
def test_the_first_trial_is_not_deceived_by_what_was_before_the_transfer(quiet: float) -> None:
    path = Path(12.5e6, 12.5e6)
    path.each = 0
    path.run(quiet)
    path.each = 12.5e6
    path.run(9)
    assert path.target == 1
    assert max(path.targets) <= 2
    assert path.share(1) > 0.5


@pytest.mark.parametrize(("each", "best"), [(12.5e6, 1), (6.25e6, 2), (3.125e6, 4), (1.5625e6, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_noise_does_not_make_it_wander(each: float, best: int, seed: int) -> None:
    path = Path(12.5e6, each, noise=0.03, seed=seed)
    path.run(20)
    path.targets.clear()
    path.run(1800)
    assert path.share(best) >= 0.85


def test_without_enough_to_do_there_are_no_more() -> None:
    path = Path(100e6, 1e6)
    path.spread = False
    path.run(60)
    assert set(path.targets) == {1}
    path.spread = True
    path.run(10)
    assert path.target == 8
    path.spread = False
    path.each = 100e6  # what is left to do goes as well over one
    path.run(120)
    assert path.target == 1


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_never_more_than_the_most(most: int) -> None:
    path = Path(1e9, 1e6, most=most)
    path.run(300)
    assert max(path.targets) == most


def test_what_is_refused_is_not_asked_for_again_soon() -> None:
    path = Path(100e6, 1e6)
    while path.target == 1:
        path.run(RTT)
    pauses = []
    for _ in range(7):
        path.count.refuse(path.now, 1)
        assert path.target == 1
        refused = path.now
        while path.target == 1:
            path.run(RTT)
        pauses.append(round(path.now - refused))
    for pause, expected in zip(pauses, [10, 20, 40, 80, 160, 300, 300], strict=True):
        assert expected <= pause <= expected + 1
    path.run(60)
    assert path.target == 8


def test_a_number_that_was_refused_is_built_on() -> None:
    path = Path(100e6, 1e6)
    path.run(7)
    path.count.refuse(path.now, 5)
    assert path.target == 5
    path.run(15)
    assert path.target == 8
    path.count.refuse(path.now, 0)
    assert path.target == 1


def test_round_trips_too_short_to_tell_anything() -> None:
    count = ConnectionCount(MOST, 0.0)
    count.update(0.0, 0, None, spread=True)
    assert count.deadline == pytest.approx(0.24)
    count.update(1.0, 0, 0.0001, spread=True)
    assert count.deadline == pytest.approx(1.24)
    count.update(1.1, 10**9, 0.0001, spread=True)
    assert count.deadline == pytest.approx(1.24), "it isn't time yet"
    count.update(2.0, 10**9, 1.0, spread=True)
    assert count.deadline == pytest.approx(10.0)


@given(
    most=st.integers(1, 16),
    steps=st.lists(
        st.tuples(
            st.floats(0, 1000),
            st.one_of(st.integers(0, 2**20), st.integers(0, 2**50)),
            st.one_of(st.none(), st.floats(0, 100)),
            st.booleans(),
            st.one_of(st.none(), st.integers(0, 20)),
        ),
        max_size=60,
    ),
)
def test_bounds(most: int, steps: list[tuple[float, int, float | None, bool, int | None]]) -> None:
    now, carried = 0.0, 0
    count = ConnectionCount(most, now)
    for seconds, size, rtt, spread, refused in steps:
        # As often when it is time to look as at any other time.
        now = max(now, count.deadline) if seconds > 500 else now + seconds
        carried += size
        before = count.target
        count.update(now, carried, rtt, spread=spread)
        assert 1 <= count.target <= most
        assert count.target in (1, before, before // 2, 2 * before, most) or before in (
            2 * count.target,
            2 * count.target + 1,
            count.target // 2,
        )
        assert count.deadline > now
        if refused is not None:
            count.refuse(now, refused)
            assert 1 <= count.target <= most


@pytest.mark.parametrize("fill", [0.0, 2.0, 9.0, 100.0])
def test_new_connections_are_not_judged_before_they_have_something_to_do(fill: float) -> None:
    path = Path(2e6, 1e6, delay=fill)
    path.idle = True
    path.run(13)
    path.targets.clear()
    path.run(9)
    assert (path.share(1) < 0.5) == (fill < 10)
