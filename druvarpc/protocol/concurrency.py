"""How many calls to keep in flight: as many as the way to the server and back can hold.

Pure policy, as in `druvarpc.protocol.windows`: counts and times in, one number out.

The model is that of BBR (Cardwell, Cheng, Gunn, Yeganeh and Jacobson, "BBR: congestion-based
congestion control", ACM Queue 14, 2016). A path has a greatest delivery rate and a least latency,
which can't be seen at the same time: with less in flight than their product the rate is less than
possible, with more the latency is. So the limit is

    GAIN x the greatest rate of the last rounds x the least latency

in calls. With a gain of 2 that is twice what was in flight as long as the rate follows: start-up
doubles the limit with each round, and needs no mode of its own. When the rate no longer follows,
half of what is in flight waits somewhere, which is room for a rate that rises, and for a latency
that does. To see the latency, the limit is cut to half the product for a round from time to time, a
*probe*.

What differs from BBR is due to calls not being packets. There is no pacing. And the latency is the
mean of a round's calls (by Little's law: those in flight, by the rate), not the least of any one:
handlers take as long as they like, and were the quickest the measure, the limit of a method whose
calls vary by more than the gain would fall with each round.
"""

import math
from collections import deque
from typing import Final

# What a round may leave in flight when it starts: enough that 40 ms x 100,000 calls/s take two
# rounds to fill, and the least `max_calls` that a server of this library sets by itself.
START: Final = 1024
# Fewer would make a pause of the scheduler's on either side cost throughput.
LEAST: Final = 16
GAIN: Final = 2.0
# A shorter latency is that of the scheduling of two processes, and so few calls as it allows would
# share their system calls with too few others: 2 ms are 512 calls at 128,000/s.
_LEAST_LATENCY: Final = 0.002
# The rate is the greatest of so many rounds: one that was disturbed doesn't count, and a rate that
# has fallen is believed after as many.
_ROUNDS: Final = 5
# A rate that is higher by this factor still grows, as in BBR.
_GROWTH: Final = 1.25

# A first round that takes so many times as long as the first call may be due to TCP's slow start:
# in a new connection it sends 14 KB in the first round trip and twice as much in each that follows,
# so that 1,024 small calls take four.
_SLOW_START: Final = 6

# A probe's limit, as a part of rate x latency: low enough to empty the queues, and a round at half
# the rate is all that it costs.
_PROBE: Final = 0.5
# With these intervals, in seconds and in latencies, that is at most 2 % of the throughput.
_PROBE_EVERY: Final = 5.0
_PROBE_EVERY_LATENCIES: Final = 50
# A limit that falls below this part of its greatest is due to a rate that has fallen, or to a
# latency that has risen and lets the rate seem to fall, which ends at the least limit if nobody
# looks. A probe tells which it is; not more often than this many rounds, for its cost.
_FALL: Final = 0.75
_ROUNDS_APART: Final = 20
# A latency that is different by this factor, to either side, is another one.
_DIFFERENT: Final = 1.3


class ConcurrencyLimit:
    """The number of calls to have in flight.

    Its owner counts calls that start and end. One that starts and makes `limit` calls in flight is
    the marked one (`mark`) until it has ended (`end`); only then may another be. In between lies a
    round. So a round begins with a full window: while the owner has too few calls to start, or no
    room for their results, nothing is measured, and the limit stays (BBR's rule for times when the
    application limits the rate).

    Args:
        most: calls that the limit never exceeds, at least 1.

    Attributes:
        limit: calls in flight at most.
    """

    __slots__ = (
        "_began",
        "_ended",
        "_in_flight",
        "_latency",
        "_peak",
        "_probe_at",
        "_probes",
        "_rates",
        "_rounds",
        "limit",
    )

    def __init__(self, most: int) -> None:
        self.limit = min(START, most)
        # The round: when it began, with how many in flight, after how many that had ended.
        self._began = 0.0
        self._in_flight = 0
        self._ended = 0
        # The path, in calls a second and seconds.
        self._rates: deque[float] = deque(maxlen=_ROUNDS)
        self._latency = math.inf
        # Due at once, that is when the rate has stopped growing: what start-up measured the latency
        # with may have been more than the path can hold.
        self._probe_at = -math.inf
        # What was known before the probe under way, and each of its rounds: rate and latency.
        self._probes: list[tuple[float, float]] = []
        self._rounds = 0  # since the last probe
        self._peak = 0.0  # of the limit, since then

    def first(self, latency: float) -> None:
        """Note how long the very first call took, in seconds, which had no others before it."""
        # Of one call it is no measure for all; but where the first round takes much longer, it is
        # better to look before the limit is doubled.
        if not self._rates:
            self._latency = max(latency, _LEAST_LATENCY)

    def mark(self, now: float, in_flight: int, ended: int) -> None:
        """Note that the call which has just started is the marked one.

        Args:
            now: seconds on any clock that doesn't go back.
            in_flight: calls in flight, this one among them.
            ended: calls that have ended so far.
        """
        if not self._in_flight:
            self._began, self._in_flight, self._ended = now, in_flight, ended

    def end(self, now: float, ended: int, most: int) -> None:
        """Note that the marked call has ended, and set the limit.

        Args:
            now: seconds, as for `mark`.
            ended: calls that have ended so far, this one among them.
            most: calls that the limit must not exceed from now on, at least 1.
        """
        count, in_flight = ended - self._ended, self._in_flight
        if 2 * count < in_flight:
            # It overtook too many others to tell of them: the round goes on.
            self.limit = min(self.limit, most)
            return
        self._in_flight = 0
        elapsed = max(now - self._began, _LEAST_LATENCY)
        rate, latency = count / elapsed, max(in_flight * elapsed / count, _LEAST_LATENCY)
        if self._probes:
            limit = self._end_probe(now, in_flight, rate, latency)
        else:
            limit = self._end_round(now, rate, latency)
        self.limit = max(1, min(most, max(LEAST, int(limit))))

    def _end_round(self, now: float, rate: float, latency: float) -> float:
        if self._rates:
            grew = rate >= _GROWTH * max(self._rates)
            self._latency = min(self._latency, latency)
        elif latency <= GAIN * self._latency:
            grew = True
            self._latency = latency
        else:
            grew = False
            if latency <= _SLOW_START * self._latency:
                self._rates.append(rate)
                return self.limit  # the next round tells
        self._rates.append(rate)
        self._rounds += 1
        product = max(self._rates) * self._latency
        self._peak = max(self._peak, product)
        fell = product < _FALL * self._peak and self._rounds >= _ROUNDS_APART
        if fell or (now >= self._probe_at and not grew):
            self._probes.append((0.0, self._latency))
            return _PROBE * product
        return GAIN * product

    def _end_probe(self, now: float, in_flight: int, rate: float, latency: float) -> float:
        """Go deeper as long as that changes the latency."""
        probes = self._probes
        _, before = probes[-1]
        probes.append((rate, latency))
        fell = latency * _DIFFERENT < before
        if len(probes) > 2 and fell:
            # Then even the probe before this one had calls in queues: its rate is the path's.
            self._rates.clear()
            self._rates.append(max(rate for rate, _ in probes))
        # The first finding may be a rise, which deeper ones tell from a queue that is still there.
        rose = len(probes) == 2 and latency > _DIFFERENT * before
        if (fell or rose) and latency > _LEAST_LATENCY and in_flight >= 2 * LEAST:
            return in_flight / 2
        # Also if it is more than before: then the path has become longer.
        self._latency = min(latency for _, latency in probes[1:])
        self._probes = []
        self._probe_at = now + max(_PROBE_EVERY, _PROBE_EVERY_LATENCIES * self._latency)
        self._rounds, self._peak = 0, 0.0
        return GAIN * max(self._rates) * self._latency
