"""Where the time of a call goes, as far as one side can see: for calls that asked for it.

Each side notes three moments of such a call, in its own clock, and how long the call waited for
who is beyond that side. Only differences ever leave it, so the clocks of the two needn't agree.
"""

from collections.abc import Sequence


class Times:
    """The moments of one call on one side, and how long it was idle there.

    Args:
        start: see below.

    Attributes:
        start: on the client it was submitted; on the server it was there with all its arguments.
        begun: on the client its frame was made; on the server its handler was begun. None before.
        done: on the client the transport had taken the frame; on the server the reply was made.
            None before.
    """

    __slots__ = ("_idle", "_since", "_waits", "begun", "done", "start")

    def __init__(self, start: float) -> None:
        self.start = start
        self.begun: float | None = None
        self.done: float | None = None
        self._idle = 0.0
        self._waits = 0
        self._since = 0.0

    def pause(self, now: float) -> None:
        """Begin to wait: on the client for the caller's items, on the server for the peer's data.

        Of waits that overlap only what is covered by any of them counts.
        """
        if not self._waits:
            self._since = now
        self._waits += 1

    def resume(self, now: float) -> None:
        """End a wait that `pause` began."""
        self._waits -= 1
        if not self._waits:
            self._idle += now - self._since

    def idle(self, now: float) -> float:
        """Return the seconds in which it has waited so far."""
        return self._idle + (now - self._since if self._waits else 0.0)

    def served(self, now: float) -> tuple[float, float]:
        """Return, on the server, the seconds until the handler began, and those that it worked."""
        begun = now if self.begun is None else self.begun
        return begun - self.start, max(0.0, now - begun - self.idle(now))


def share(total: float, parts: Sequence[float]) -> tuple[list[float], float]:
    """Cut parts of a time so that they add up to no more than it; return them and what remains.

    Parts that overlap are counted in their order: the first has what it has, each other what those
    before it leave.
    """
    shares: list[float] = []
    for part in parts:
        got = part if part < total else total
        if got < 0:
            got = 0.0
        shares.append(got)
        total -= got
    return shares, total
