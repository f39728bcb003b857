"""Which source sends next: lanes by urgency, round robin within a lane, none starved.

A source is whatever waits to send: a stream with data, or a lane's clubs. The scheduler knows
nothing of them but their lanes, and how many bytes each lane was passed over by.
"""

from enum import IntEnum
from typing import Final, Generic, TypeVar

Source = TypeVar("Source")


class Priority(IntEnum):
    """A call's lane, numbered as on the wire."""

    NORMAL = 0
    INTERACTIVE = 1
    BULK = 2


# By number: quicker than to make one.
LANES: Final = tuple(Priority)
# Most urgent first.
ORDER: Final = (Priority.INTERACTIVE, Priority.NORMAL, Priority.BULK)

# For each byte that a waiting lane sends, more urgent ones may send so many: the least urgent lane
# keeps at least a tenth of the link, a ninth beside one other.
_SHARE: Final = 8
# What more urgent lanes may send before a waiting lane is served: `_SHARE` quanta of 64 KiB, since
# less would let it interrupt them more often than its share demands.
PATIENCE: Final = _SHARE * 64 * 1024


class Lanes(Generic[Source]):
    """The sources that wait to send, by lane.

    Attributes:
        waiting: how many there are.
    """

    __slots__ = ("_passed", "_rings", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        # Lists: there are seldom more than a few sources, and an empty deque takes 760 bytes.
        self._rings: tuple[list[Source], ...] = tuple([] for _ in ORDER)
        self._passed = [0] * len(ORDER)

    def add(self, source: Source, lane: Priority) -> None:
        """Put a source at the end of its lane's round."""
        self.waiting += 1
        self._rings[lane].append(source)

    def add_first(self, source: Source, lane: Priority) -> None:
        """Put a source at the front of its lane's round."""
        self.waiting += 1
        self._rings[lane].insert(0, source)

    def remove(self, source: Source, lane: Priority) -> None:
        """Take a source out of its lane's round."""
        self._rings[lane].remove(source)
        self.waiting -= 1

    def next(self) -> tuple[Source, Priority] | None:
        """Take out and return the source whose turn it is."""
        if not self.waiting:
            return None
        self.waiting -= 1
        chosen: Priority | None = None
        for lane in ORDER:
            if self._rings[lane]:
                if self._passed[lane] >= PATIENCE:
                    chosen = lane
                    break
                if chosen is None:
                    chosen = lane
        assert chosen is not None, "some source waits in one of the lanes"
        return self._rings[chosen].pop(0), chosen

    @property
    def only_bulk(self) -> bool:
        """Whether all that waits is in the least urgent lane."""
        return len(self._rings[Priority.BULK]) == self.waiting > 0

    def waits_behind(self, lane: Priority) -> bool:
        """Whether something waits in a less urgent lane."""
        rings = self._rings
        return bool(
            rings[Priority.BULK] or (lane is Priority.INTERACTIVE and rings[Priority.NORMAL])
        )

    def sent(self, lane: Priority, size: int) -> None:
        """Count bytes sent from a lane, which the lanes that wait were passed over by."""
        # In bytes, not in turns: a lane of small messages stays overdue until it had its share.
        passed = self._passed
        for other in ORDER:
            if other is lane:
                passed[other] = max(0, passed[other] - _SHARE * size)
            else:
                passed[other] = passed[other] + size if self._rings[other] else 0
