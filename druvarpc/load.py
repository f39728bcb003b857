"""How many handlers of a server run, and when those that came beyond that may come again.

Pure: time comes in.
"""

from typing import Final

# Seconds that a refused caller is asked to wait: long enough to be worth a round trip, and short
# enough that an estimate that has become wrong does no harm.
SHORTEST: Final = 0.01
LONGEST: Final = 5.0
# How much of the mean is the last handler's: that of a smoothed round trip (RFC 6298).
_WEIGHT: Final = 1 / 8
# Seconds that a handler is taken to last until one has ended.
_UNKNOWN: Final = 0.1


class Load:
    """The handlers of a server that have blocked: others take no time in which to count them.

    Refused callers are told when a place is free for them, each a little later than the one
    before: so they come back at the rate at which handlers end, not all at once. With a mean time
    of a handler `mean` and `most` at once, that is one every `mean / most` seconds (Little's law).
    The schedule of ATM's cells does this with a single number (GCRA, ITU-T I.371).

    Args:
        most: handlers at once.

    Attributes:
        full: no more may begin.
        running: those that run.
        refused: calls, since the beginning.
    """

    __slots__ = ("_free_at", "_mean", "_most", "full", "refused", "running")

    def __init__(self, most: int) -> None:
        self.full = False
        self.running = 0
        self.refused = 0
        self._most = most
        self._mean: float | None = None
        self._free_at = 0.0

    def enter(self) -> None:
        """Note that a handler runs on."""
        self.running += 1
        self.full = self.running >= self._most

    def leave(self, seconds: float) -> None:
        """Note that it has ended, after this time."""
        self.running -= 1
        self.full = self.running >= self._most
        mean = self._mean
        self._mean = seconds if mean is None else mean + (seconds - mean) * _WEIGHT

    def refuse(self, now: float) -> float:
        """Refuse a call; return the seconds after which its caller may try again."""
        self.refused += 1
        mean = _UNKNOWN if self._mean is None else self._mean
        free_at = max(self._free_at, now) + mean / self._most
        self._free_at = min(free_at, now + LONGEST)
        return max(self._free_at - now, SHORTEST)
