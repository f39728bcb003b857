"""Flow control: what may still be sent, and what is given back (docs/protocol.md, section 7).

Pure policy: numbers in, numbers out. A `SendWindow` is the credit that the peer gave; a
`ReceiveWindow` is the credit that this side gave, and how it grows and shrinks. For each receive
window

    credit the peer has + bytes held by the application + bytes owed = size

holds at every moment. The memory that windows grow by, and that unfinished messages take beyond
their windows, comes out of the connection's `Budget`, which is a part of the process's.

A window follows what the application consumes within one round trip. It grows in the middle of a
round trip, as soon as it must, and shrinks after many in which it was far too large, or as soon as
memory is short. Credit that the peer has can't be taken back, so shrinking means to keep what was
consumed instead of giving it back.
"""

import math
from typing import Final, Self

from druvarpc.errors import CloseCode, RemoteProtocolError
from druvarpc.protocol.frames import MAX_WINDOW

# Credit is given back in parts of a quarter window: often enough that the sender never runs dry
# within a round trip that fills the window, seldom enough that CREDIT frames cost nothing.
_PART: Final = 4
# A window is so many times what was consumed in a round trip. While TCP's slow start doubles its
# rate each round trip it needs twice that; but a quarter of it may be owed, and in the middle of a
# round trip the latest bytes are counted in part. Simulated (tests/protocol/tcp.py), 2 costs a
# transfer up to three round trips, 3 half of one, and 4 only takes more memory.
_AMPLE: Final = 3
# A window that is more than so many times what was consumed is too large.
_TOO_AMPLE: Final = 4
# A window shrinks, at most by half, when it was too large for so many round trips and seconds:
# pauses shorter than that are no change of the rate.
_SEASON_TRIPS: Final = 16
_SEASON: Final = 1.0
# A window may have grown by so many times what memory is free after it: a single one by two thirds
# of all, two by two fifths each. What is kept free lets newcomers begin.
_SHARE: Final = 2
# A round trip shorter than this measures the scheduling of two processes, not the link.
LEAST_RTT: Final = 0.001
# A longer one measures a queue, even by way of a satellite. One that isn't known may be as long.
MOST_RTT: Final = 4.0


class Budget:
    """Bytes that several users share; what one has taken, the others can't.

    Args:
        size: bytes in all.
        parent: a budget that this one is a part of: what is taken here is taken there too.

    Attributes:
        size: bytes in all.
        left: bytes that nobody has taken; below 0 while it is overdrawn.
    """

    __slots__ = ("_parent", "left", "size")

    def __init__(self, size: int, parent: Self | None = None) -> None:
        self.size = size
        self.left = size
        self._parent = parent

    @property
    def free(self) -> int:
        """Bytes that can be taken, here and from the parent."""
        parent = self._parent
        return self.left if parent is None else min(self.left, parent.free)

    def take(self, size: int) -> bool:
        """Take `size` bytes if they are free."""
        if size > self.free:
            return False
        self.overdraw(size)
        return True

    def overdraw(self, size: int) -> None:
        """Take `size` bytes, free or not."""
        self.left -= size
        if self._parent is not None:
            self._parent.overdraw(size)

    def give(self, size: int) -> None:
        """Give back what was taken."""
        self.left += size
        assert self.left <= self.size, "no more is given back than was taken"
        if self._parent is not None:
            self._parent.give(size)

    def part(self) -> None:
        """Give back to the parent all that this one took, and take no more from it."""
        if self._parent is not None:
            self._parent.give(self.size - self.left)
            self._parent = None


class SendWindow:
    """The bytes that may still be sent.

    Attributes:
        available: bytes of credit; below 0 only between a client's early data and the SETTINGS.
    """

    __slots__ = ("available",)

    def __init__(self, size: int) -> None:
        self.available = size

    def grant(self, size: int) -> None:
        """Add the credit of a CREDIT frame."""
        if self.available + size > MAX_WINDOW:
            raise RemoteProtocolError(
                f"credit rises to {self.available + size} bytes", CloseCode.FLOW_CONTROL_ERROR
            )
        self.available += size

    def spend(self, size: int) -> None:
        """Take the credit that a DATA frame costs."""
        assert size <= self.available, "nothing is sent beyond the credit"
        self.available -= size


class ReceiveWindow:
    """The bytes that the peer may still send, and those to give back.

    It follows what the application consumes in a round trip, as TCP's receive buffers do (dynamic
    right-sizing, Fisk and Feng, 2001), but in both directions. The bound on what it grows by is a
    dynamic threshold (Choudhury and Hahne, 1998), a multiple of the memory that is free: as that
    becomes less, the largest windows shrink first, and none has to know of the others.

    Args:
        size: bytes that it begins with, and never goes below.
        budget: what it grows out of.

    Attributes:
        size: bytes that may be on the way or held at once.
        available: bytes that the peer may still send.
        owed: bytes that were consumed and not given back.
    """

    __slots__ = (
        "_budget",
        "_consumed",
        "_goal",
        "_most",
        "_season",
        "_since",
        "_start",
        "available",
        "owed",
        "size",
    )

    def __init__(self, size: int, budget: Budget) -> None:
        self.size = size
        self.available = size
        self.owed = 0
        self._start = size
        self._budget = budget
        self._goal = size  # the size to shrink to; what it can't grow to isn't noted
        # Consumed since the round trip began, and the most in one since the season did.
        self._consumed = 0
        self._most = 0
        self._since = self._season = -math.inf

    def receive(self, size: int) -> None:
        """Count a DATA frame that cost `size` bytes."""
        if size > self.available:
            raise RemoteProtocolError(
                f"DATA of {size} bytes with a credit of {self.available}",
                CloseCode.FLOW_CONTROL_ERROR,
            )
        self.available -= size

    def consume(self, size: int, now: float, rtt: float) -> None:
        """Count bytes that the application has taken."""
        self.owed += size
        if now - self._since >= rtt:
            self._end_trip(now, rtt)
        self._consumed += size
        if self._consumed * _AMPLE > self._goal:
            self._grow()
        if self.size > self._goal:
            self._shrink()

    def due(self) -> int:
        """Return the bytes to give back now, 0 while they are too few to be worth a frame."""
        size = self.owed
        if size * _PART < self.size:
            return 0
        self.owed = 0
        self.available += size
        return size

    def close(self) -> None:
        """Give what the window grew by back to the budget."""
        self._budget.give(self.size - self._start)
        self.size = self._goal = self._start

    def _end_trip(self, now: float, rtt: float) -> None:
        # It ends with the first bytes after it, so all that was counted came within one, however
        # long the pause since then.
        goal = self._goal
        self._most = max(self._most, self._consumed)
        self._since, self._consumed = now, 0
        seasons = (now - self._season) / max(_SEASON_TRIPS * rtt, _SEASON)
        if seasons >= 1:
            # One has ended, and nothing came in those behind it.
            if self._most * _TOO_AMPLE < goal:
                goal = max(goal // 2, self._most * _AMPLE)
            goal >>= int(min(seasons, MAX_WINDOW.bit_length())) - 1
            self._season, self._most = now, 0
        self._goal = max(self._start, min(goal, self._limit))

    @property
    def _limit(self) -> int:
        grown = self.size - self._start
        most = (self._budget.free + grown) * _SHARE // (_SHARE + 1)
        return min(self._start + most, MAX_WINDOW)

    def _grow(self) -> None:
        self._goal = max(self._goal, min(self._consumed * _AMPLE, self._limit))
        more = self._goal - self.size
        if more > 0:
            taken = self._budget.take(more)
            assert taken, "the limit is below what is free"
            self.size = self._goal
            self.owed += more

    def _shrink(self) -> None:
        less = min(self.size - self._goal, self.owed)
        self.size -= less
        self.owed -= less
        self._budget.give(less)
