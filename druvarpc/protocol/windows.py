"""Flow control: what may still be sent, and what is given back (docs/protocol.md, section 7).

Pure policy: numbers in, numbers out. A `SendWindow` is the credit that the peer gave; a
`ReceiveWindow` is the credit that this side gave, and how it grows. For each receive window

    credit the peer has + bytes held by the application + bytes owed = size

holds at every moment. The memory that windows grow by, and that unfinished messages take beyond
their windows, comes out of one `Budget`.
"""

from typing import Final

from druvarpc.errors import CloseCode, RemoteProtocolError
from druvarpc.protocol.frames import MAX_WINDOW

# Credit is given back in parts of a quarter window: often enough that the sender never runs dry
# within a round trip that fills the window, seldom enough that CREDIT frames cost nothing.
_PART: Final = 4
# A round trip shorter than this measures the scheduling of two processes, not the link.
_LEAST_RTT: Final = 0.001


class Budget:
    """Bytes that several users share; what one has taken, the others can't."""

    __slots__ = ("left", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.left = size

    def take(self, size: int) -> bool:
        """Take `size` bytes if they are left."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def overdraw(self, size: int) -> None:
        """Take `size` bytes, left or not."""
        self.left -= size

    def give(self, size: int) -> None:
        """Give back what was taken."""
        self.left += size
        assert self.left <= self.size, "no more is given back than was taken"


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

    It grows to twice what the application consumes in a round trip, as TCP's receive buffers do
    (dynamic right-sizing, Fisk and Feng, 2001), while the budget lasts.

    Attributes:
        size: bytes that may be on the way or held at once.
        available: bytes that the peer may still send.
    """

    __slots__ = (
        "_budget",
        "_consumed",
        "_greatest",
        "_since",
        "_start",
        "available",
        "owed",
        "size",
    )

    def __init__(self, size: int, greatest: int, budget: Budget) -> None:
        self.size = size
        self.available = size
        self.owed = 0
        self._start = size
        self._greatest = min(greatest, MAX_WINDOW)
        self._budget = budget
        self._since: float | None = None
        self._consumed = 0

    def receive(self, size: int) -> None:
        """Count a DATA frame that cost `size` bytes."""
        if size > self.available:
            raise RemoteProtocolError(
                f"DATA of {size} bytes with a credit of {self.available}",
                CloseCode.FLOW_CONTROL_ERROR,
            )
        self.available -= size

    def consume(self, size: int, now: float, rtt: float | None) -> None:
        """Count bytes that the application has taken."""
        self.owed += size
        if rtt is None:
            return
        rtt = max(rtt, _LEAST_RTT)
        if self._since is None or now - self._since > 4 * rtt:
            self._since, self._consumed = now, size
            return
        self._consumed += size
        elapsed = now - self._since
        if elapsed >= rtt:
            self._grow(int(2 * self._consumed * rtt / elapsed))
            self._since, self._consumed = now, 0

    def _grow(self, size: int) -> None:
        size = min(size, self._greatest, 2 * self.size)
        if size > self.size and self._budget.take(size - self.size):
            self.owed += size - self.size
            self.size = size

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
        self.size = self._start
