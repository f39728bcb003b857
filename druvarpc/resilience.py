"""When to try again, and when to leave a server alone: rules that others act on.

Pure: time and chance come in. Where calls are counted nothing is added for this: what a rule must
know of calls that went well it takes from counters, when it is asked something.

*Pauses* grow exponentially and are of random length from nothing up ("full jitter": Brooker,
"Exponential backoff and jitter", AWS Architecture Blog, 2015), so that clients that lost the same
server don't come back together.

*The retry budget* keeps retries from multiplying the load of a server that fails under it. It is
that of Finagle ("RetryBudget", twitter.github.io/finagle/guide/Clients.html): each call deposits a
part of a retry, which is forgotten after some time. Here it is forgotten exponentially, which needs
two numbers instead of a queue.

*The circuit* of a server opens when too many calls fail there, and then half opens for one call
that tries it (Nygard, "Release It!", 2007). Ejection of outliers, where there are several servers,
is the same with another rule: failures are held against those of the others, and no more than a
part of the servers is out (Envoy's "Outlier detection"; gRFC A50).
"""

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

# Seconds after which a call's deposit has lost most of its worth: Finagle's.
BUDGET_SECONDS: Final = 10.0


class Balance(Enum):
    """How calls are divided between several servers."""

    PICK_FIRST = auto()
    ROUND_ROBIN = auto()


@dataclass(frozen=True, slots=True)
class Retry:
    """Which calls are made again. See docs/resilience.md for what is retried when.

    All calls of a client with the same of these share one budget.

    Attributes:
        attempts: calls in all, the first included.
        first_pause: seconds, at most, before the second; doubled for each that follows.
        longest_pause: seconds that a pause takes at most, also one that the server asks for.
        budget: retries for each call, all calls of the last ten seconds together.
        least: retries a second that are allowed beyond those.

    Raises:
        ValueError: one of them is out of range.
    """

    attempts: int = 4
    first_pause: float = 0.05
    longest_pause: float = 10.0
    budget: float = 0.2
    least: float = 10.0

    def __post_init__(self) -> None:
        _require("attempts", self.attempts >= 1, "1 or more")
        _require("first_pause", 0 <= self.first_pause < math.inf, "0 or more seconds")
        _require("longest_pause", 0 <= self.longest_pause < math.inf, "0 or more seconds")
        _require("budget", 0 <= self.budget <= 1, "from 0 to 1")
        _require("least", 0 <= self.least < math.inf, "0 or more a second")

    def pause(self, failed: int, chance: float, asked: float | None) -> float | None:
        """Return the seconds until the next attempt, None if there is to be none.

        Args:
            failed: attempts so far.
            chance: from 0 to 1.
            asked: seconds that the server asks for.
        """
        if failed >= self.attempts or (asked is not None and asked > self.longest_pause):
            return None
        # Beyond what a server asks for, too: it has told the same to others.
        return (asked or 0.0) + chance * _grown(self.first_pause, failed - 1, self.longest_pause)


@dataclass(frozen=True, slots=True)
class Hedge:
    """Unary calls that are made once more if no reply comes in time; the first success counts.

    From Dean and Barroso, "The tail at scale", 2013. Each copy is charged to the retry budget.

    Attributes:
        delay: seconds until a copy is sent.
        attempts: calls at once, at most.

    Raises:
        ValueError: one of them is out of range.
    """

    delay: float
    attempts: int = 2

    def __post_init__(self) -> None:
        _require("delay", 0 <= self.delay < math.inf, "0 or more seconds")
        _require("attempts", self.attempts >= 2, "2 or more")


@dataclass(frozen=True, slots=True)
class Breaker:
    """When no more calls are made to a server for some time, since they fail there.

    UNAVAILABLE, DEADLINE_EXCEEDED and INTERNAL count as failures, and so does a lost connection,
    once. What else a call may end with is the application's.

    Attributes:
        failures: so many without a success between them open the circuit.
        rate: so does this part of the calls within `window`.
        window: seconds.
        least_calls: calls within `window` from which on their rate counts.
        pause: seconds until one call tries the server again; two times that after the second such
            failure in a row, and so on.
        longest_pause: seconds that a pause takes at most.

    Raises:
        ValueError: one of them is out of range.
    """

    failures: int = 5
    rate: float = 0.5
    window: float = 10.0
    least_calls: int = 20
    pause: float = 5.0
    longest_pause: float = 60.0

    def __post_init__(self) -> None:
        _require("failures", self.failures >= 1, "1 or more")
        _require("rate", 0 < self.rate <= 1, "above 0, up to 1")
        _require("window", 0 < self.window < math.inf, "more than 0 seconds")
        _require("least_calls", self.least_calls >= 1, "1 or more")
        _require("pause", 0 < self.pause < math.inf, "more than 0 seconds")
        _require("longest_pause", self.longest_pause >= self.pause, "at least `pause`")


@dataclass(frozen=True, slots=True)
class Outliers(Breaker):
    """When one of several servers gets no more calls for some time, since more of them fail there.

    As with a `Breaker`, but the rate of failures must also be twice that of the other servers.

    Attributes:
        most: the part of the servers that may be out at a time.
    """

    pause: float = 30.0
    longest_pause: float = 300.0
    most: float = 0.5

    def __post_init__(self) -> None:
        # Not by super(): a dataclass with slots is another class than the one that is defined here.
        Breaker.__post_init__(self)
        _require("most", 0 <= self.most <= 1, "from 0 to 1")


class Backoff:
    """When a server that was lost is dialed.

    Args:
        first: seconds of the first pause, at most; doubled for each attempt that fails, or whose
            connection doesn't hold longer than the pause.
        longest: seconds of any pause, at most.

    Attributes:
        at: from when on.
        pause: seconds of the next pause, at most.
    """

    def __init__(self, first: float, longest: float) -> None:
        self.at = -math.inf
        self.pause = first
        self._first = first
        self._longest = longest

    def attempt(self, now: float, chance: float) -> None:
        """Note that an attempt begins."""
        if now > self.at + self.pause:
            self.pause = self._first  # what was opened last has held
        self.at = now + chance * self.pause
        self.pause = min(2 * self.pause, self._longest)


class RetryBudget:
    """How many retries a client may make.

    Args:
        ratio: retries for each call.
        least: retries a second beyond those.
        now: the time.
    """

    def __init__(self, ratio: float, least: float, now: float) -> None:
        self._ratio = ratio
        self._least = least
        self._at = now
        self._calls = 0
        self._balance = least * BUDGET_SECONDS

    def balance(self, calls: int, now: float) -> float:
        """Return how many may be made now.

        Args:
            calls: how many have been made so far, without retries. That they came evenly since the
                last time is assumed.
            now: the time.
        """
        elapsed, deposit = now - self._at, self._ratio * (calls - self._calls)
        self._at, self._calls = now, calls
        lost = -math.expm1(-elapsed / BUDGET_SECONDS)  # of what was there before
        # What is left now of deposits that came evenly; of those that came at once, all.
        left = BUDGET_SECONDS * lost / elapsed if elapsed > 1e-6 else 1.0
        self._balance += (deposit + self._least * elapsed) * left - self._balance * lost
        return self._balance

    def take(self, retries: int, calls: int, now: float) -> bool:
        """Take so many retries, if they are left; see `balance`."""
        if self.balance(calls, now) < retries:
            return False
        self._balance -= retries
        return True


class Circuit:
    """Whether calls may be made to one server.

    Counters are passed in: `good` counts the calls that went well, `given_up` those of which that
    isn't known, since the beginning.

    Args:
        rule: when it opens, and for how long.

    Attributes:
        until: when it half opens; None while it is closed.
    """

    def __init__(self, rule: Breaker) -> None:
        self.until: float | None = None
        self._rule = rule
        self._times = 0  # it has opened in a row
        self._since = -math.inf  # this window's begin, and what was counted by then
        self._good_before = 0
        self._failures = 0
        self._good = 0  # at the last failure
        self._in_a_row = 0
        # The counters when one call was let through, and until when another isn't.
        self._probe: tuple[int, int, float] | None = None

    def rate(self, good: int, now: float) -> float:
        """Return the part of the calls of this window that failed."""
        if not self._failures or now - self._since >= self._rule.window:
            return 0.0
        return self._failures / (self._failures + good - self._good_before)

    def fail(self, good: int, now: float, others: float = 0.0) -> bool:
        """Note a failure; return whether the circuit should open.

        Args:
            good: see above.
            now: the time.
            others: the rate of failures elsewhere.
        """
        rule = self._rule
        if now - self._since >= rule.window:
            self._since, self._good_before, self._failures = now, good, 0
        self._failures += 1
        self._in_a_row = 1 if good > self._good else self._in_a_row + 1
        self._good = good
        if self.until is not None:
            return now >= self.until  # the call that tried it, most likely
        enough = self._failures + good - self._good_before >= rule.least_calls
        rate = self.rate(good, now)
        return self._in_a_row >= rule.failures or (
            enough and rate >= rule.rate and rate >= 2 * others
        )

    def open(self, now: float) -> None:
        """Let no calls through until the pause is over."""
        self._times += 1
        self.until = now + min(self._times * self._rule.pause, self._rule.longest_pause)
        self._probe = None

    def admits(self, good: int, given_up: int, now: float) -> bool:
        """Whether a call may be made; half open, one is until it is known how that went."""
        if self.until is None:
            return True
        if now < self.until:
            return False
        if self._probe is None:
            return True
        good_before, given_up_before, patience = self._probe
        if good > good_before:
            self._close(now)
            return True
        return given_up > given_up_before or now >= patience

    def let_through(self, good: int, given_up: int, now: float) -> None:
        """Note that a call is made, or was to be: if nothing is heard of it, another is tried."""
        if self.until is not None and now >= self.until:
            self._probe = good, given_up, now + self._rule.pause

    def _close(self, now: float) -> None:
        self.until = self._probe = None
        self._times = 0
        self._in_a_row = self._failures = 0
        self._since = now


def _grown(first: float, times: int, longest: float) -> float:
    """Return a pause that has been doubled so many times."""
    # Beyond that many it is the longest in any case, and a float would overflow.
    return min(first * 2.0 ** min(times, 64), longest)


def _require(name: str, valid: bool, what: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {what}")
