"""Which source sends next: lanes by urgency, round robin within a lane, none starved.

A source is whatever waits to send: a stream with data, or a lane's clubs. The scheduler knows
nothing of them but their lanes, and how many bytes each lane was passed over by.
"""

from collections import deque
from enum import IntEnum
from typing import Final, Generic, TypeVar

Source = TypeVar("Source")


class Priority(IntEnum):
    """A call's lane, numbered as on the wire."""

    NORMAL = 0
    INTERACTIVE = 1
    BULK = 2


# Most urgent first.
ORDER: Final = (Priority.INTERACTIVE, Priority.NORMAL, Priority.BULK)

# For each byte that a waiting lane sends, more urgent ones may send so many: the least urgent lane
# keeps at least a tenth of the link, a ninth beside one other.
_SHARE: Final = 8
# What more urgent lanes may send before a waiting lane is served: `_SHARE` quanta of 64 KiB, since
# less would let it interrupt them more often than its share demands.
PATIENCE: Final = _SHARE * 64 * 1024


class Lanes(Generic[Source]):
    """The sources that wait to send, by lane."""

    def __init__(self) -> None:
        self._rings: tuple[deque[Source], ...] = tuple(deque() for _ in ORDER)
        self._passed = [0] * len(ORDER)

    def __bool__(self) -> bool:
        return any(self._rings)

    def add(self, source: Source, lane: Priority) -> None:
        """Put a source at the end of its lane's round."""
        self._rings[lane].append(source)

    def add_first(self, source: Source, lane: Priority) -> None:
        """Put a source at the front of its lane's round."""
        self._rings[lane].appendleft(source)

    def remove(self, source: Source, lane: Priority) -> None:
        """Take a source out of its lane's round."""
        self._rings[lane].remove(source)

    def next(self) -> tuple[Source, Priority] | None:
        """Take out and return the source whose turn it is."""
        waiting = [lane for lane in ORDER if self._rings[lane]]
        if not waiting:
            return None
        overdue = [lane for lane in waiting if self._passed[lane] >= PATIENCE]
        lane = (overdue or waiting)[0]
        return self._rings[lane].popleft(), lane

    def sent(self, lane: Priority, size: int) -> None:
        """Count bytes sent from a lane, which the lanes that wait were passed over by."""
        # In bytes, not in turns: a lane of small messages stays overdue until it had its share.
        self._passed[lane] = max(0, self._passed[lane] - _SHARE * size)
        for other in ORDER:
            if other is not lane:
                self._passed[other] = self._passed[other] + size if self._rings[other] else 0
