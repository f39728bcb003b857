"""How many connections a link rewards: pure policy, bytes and times in, a number out.

Hill climbing on the goodput. From one connection on, the number doubles as long as that pays, since
what makes several pay (loss under a congestion control that takes it for congestion, a kernel's
send buffer that is smaller than the bandwidth-delay product) makes each of them carry the same. A
trial that doesn't pay is undone. From time to time it is tried whether more would pay by now, or
whether as much gets through with fewer. None begins while the goodput rises by itself, as when a
transfer begins: what it added couldn't be told from that.
"""

from typing import Final

# A number is kept if the goodput rises by so much with it; what fewer connections lose less than is
# saved. Below this, rates vary by themselves.
_GAIN: Final = 0.05
# Round trips that a new connection's congestion window has to open, and that its rate is then
# measured over; from 14 KB to 4 MB are 8 doublings.
_SETTLE: Final = 9
_MEASURE: Final = 8
# Seconds until new connections must have got something to do: calls stay where they began.
_FILL_TIME: Final = 10.0
# Round trips shorter than this, in seconds, measure the scheduling of the processes.
_LEAST_RTT: Final = 0.03
# Seconds to the next trial after one that didn't pay; they double.
_PAUSE: Final = 10.0
_LONGEST_PAUSE: Final = 300.0
# With less than so many bytes a second, for so many seconds, one connection is enough.
_IDLE_RATE: Final = 64 * 1024
_IDLE_TIME: Final = 10.0


class ConnectionCount:
    """The number of connections that one client should have.

    Args:
        most: connections that it may have.
        now: the time in seconds, of any clock that doesn't go back.

    Attributes:
        target: how many it should have now.
        deadline: when `update` is to be called next.
    """

    __slots__ = (
        "_base",
        "_before",
        "_busy_at",
        "_carried",
        "_down",
        "_fill_until",
        "_most",
        "_pause",
        "_rate",
        "_settling",
        "_since",
        "_trial_at",
        "deadline",
        "target",
    )

    def __init__(self, most: int, now: float) -> None:
        self.target = 1
        self.deadline = now
        self._most = most
        self._before: int | None = None  # the number before the trial that is under way
        self._base = 0.0  # bytes a second before it
        self._settling = True
        self._fill_until = now
        self._since = now
        self._carried = 0
        self._rate = 0.0  # bytes a second, until then
        self._busy_at = now
        self._down = False  # what is tried next
        self._trial_at = now
        self._pause = _PAUSE

    def update(
        self, now: float, carried: int, rtt: float | None, *, spread: bool, idle: bool = False
    ) -> None:
        """Decide anew.

        Args:
            now: the time.
            carried: bytes sent and received so far by all connections.
            rtt: seconds of a round trip, if known.
            spread: there is enough to do at once for more connections than there are.
            idle: one of them has nothing to do yet.
        """
        if now < self.deadline:
            return
        step = max(rtt or 0.0, _LEAST_RTT)
        before, elapsed = self._rate, now - self._since
        rate = (carried - self._carried) / elapsed if elapsed > 0 else 0.0
        self._rate, self._carried, self._since = rate, carried, now
        self.deadline = now + _MEASURE * step
        if rate >= _IDLE_RATE:
            self._busy_at = now
        elif now - self._busy_at >= _IDLE_TIME:
            self._rest(now)
            return
        if self._settling:
            # What was measured until now is the time before the first trial, or of a change.
            self._settling = idle and now < self._fill_until
        elif self._before is not None:
            if self._judge(now, rate, step):
                self._try(now, rate, step, spread=spread)
        elif rate <= before * (1 + _GAIN):
            self._try(now, rate, step, spread=spread)

    def refuse(self, now: float, number: int) -> None:
        """Note that no more than `number` connections can be opened now."""
        self.target, self._before = max(1, min(number, self._most)), None
        self._settling = True
        self._wait(now)

    def _try(self, now: float, rate: float, step: float, *, spread: bool) -> None:
        """Begin a trial if it is time for one."""
        if now < self._trial_at or rate < _IDLE_RATE:
            return
        if self.target > 1 and (self._down or self.target == self._most or not spread):
            self._change(now, self.target // 2, rate, step)
        elif self.target < self._most and spread:
            self._change(now, min(2 * self.target, self._most), rate, step)

    def _change(self, now: float, target: int, rate: float, step: float) -> None:
        self._before, self._base = self.target, rate
        self.target = target
        self._settling = True
        self._fill_until = now + _FILL_TIME
        self.deadline = now + _SETTLE * step

    def _judge(self, now: float, rate: float, step: float) -> bool:
        """End a trial; return whether its number is kept."""
        before = self._before
        assert before is not None
        self._before = None
        grew = self.target > before
        self._down = not grew
        if rate >= self._base * (1 + _GAIN if grew else 1 - _GAIN):
            if grew:
                self._pause = _PAUSE
            self._trial_at = now if grew and self.target < self._most else now + _PAUSE
            return True
        self.target = before
        self._settling = True
        self.deadline = now + _SETTLE * step
        self._wait(now)
        self._down = grew
        return False

    def _wait(self, now: float) -> None:
        """Put the next trial off for longer each time."""
        self._trial_at = now + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _rest(self, now: float) -> None:
        self.target = 1
        self._before = None
        self._settling = True
        self._trial_at, self._pause, self._down = now, _PAUSE, False
