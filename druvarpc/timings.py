"""Where the time of calls goes: for each of them, and summed up by method.

A part is what one side measured in its own clock. The parts are cut so that they add up to the
whole, and what remains is the way. Some can overlap: an upload may lack credit while its handler
works. Then the handler has the time, for it is the cause, and so on: each part has what those leave
that come before it in `call_times`.
"""

import operator
from collections.abc import Callable
from dataclasses import astuple, dataclass

from druvarpc.protocol import Outcome, Stream, Times
from druvarpc.protocol.times import share


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Where the time of a call went, in seconds. The parts add up to `total`.

    Attributes:
        method: "Service.method".
        total: from when the call was made until its reply was there.
        club: until its frame was made: it gathered others, or had to wait for a place among the
            calls that the server takes at once, or for the socket.
        credit: its data lacked credit, on either side: they came faster than the other side
            consumed them, or than its windows allow for.
        socket: until the transport had taken the frame.
        way: what remains: on the link both ways, unsent or unread in the kernels, and all that a
            server that tells nothing needed.
        queue: in the server, until the handler was begun, also waiting for calls whose results it
            needs.
        handler: the handler worked. While it waits for the call's data, or for room for its own,
            it doesn't work.
        caller: the call waited for items from the caller's own iterable.
    """

    method: str
    total: float
    club: float
    credit: float
    socket: float
    way: float
    queue: float
    handler: float
    caller: float


@dataclass(frozen=True, slots=True)
class MethodTimes(CallTimes):
    """The same, all calls of a method together.

    Attributes:
        count: how many calls.
    """

    count: int

    @property
    def mean(self) -> CallTimes:
        """The times of a call on average."""
        method, *sums = astuple(self)[:-1]
        return CallTimes(method, *(one / self.count for one in sums))


# All parts of one call, or sums of them, in the order of the fields of `CallTimes`: to make one of
# those takes longer than to add these up.
Parts = tuple[float, float, float, float, float, float, float, float]

# Whether calls ask for their times, or what takes those of each.
Timings = bool | Callable[[CallTimes], object]


class TimesTotals:
    """Sums of times by method."""

    __slots__ = ("_sums",)

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, method: str, parts: Parts) -> None:
        """Add the times of one call."""
        sums = self._sums.get(method)
        if sums is None:
            self._sums[method] = [*parts, 1]  # and the count
        else:
            sums[:] = map(operator.add, sums, (*parts, 1))

    def update(self, other: "TimesTotals") -> None:
        """Add other sums."""
        for method, sums in other._sums.items():
            mine = self._sums.get(method)
            self._sums[method] = [*sums] if mine is None else [*map(operator.add, mine, sums)]

    def by_method(self) -> dict[str, MethodTimes]:
        """Return the sums."""
        found: dict[str, MethodTimes] = {}
        for method, sums in self._sums.items():
            total, club, credit, socket, way, queue, handler, caller, count = sums
            found[method] = MethodTimes(
                method, total, club, credit, socket, way, queue, handler, caller, int(count)
            )
        return found


def call_times(times: Times, outcome: Outcome | None, lacked: float, now: float) -> Parts:
    """Return the times of a client's call.

    Args:
        times: what the client noted.
        outcome: what the reply says, its timings in particular.
        lacked: seconds in which the client's data lacked credit.
        now: when the reply has come.
    """
    begun = now if times.begun is None else times.begun
    done = now if times.done is None else times.done
    told = None if outcome is None else outcome.timings
    queue, handler, credit = (0, 0, 0) if told is None else told
    total = now - times.start
    parts = (
        begun - times.start,
        queue / 1e6,
        handler / 1e6,
        done - begun,
        lacked + credit / 1e6,
        times.idle(now),
    )
    (club, in_queue, in_handler, socket, lacking, caller), way = share(total, parts)
    return total, club, lacking, socket, way, in_queue, in_handler, caller


def handler_times(call: Stream, times: Times, now: float) -> Parts:
    """Return the times of a call that a server replies to now: what it knows of them.

    The total counts from the arrival, and the way is what the call waited for the client's data, or
    until its own could be sent.
    """
    total = now - times.start
    lacked = 0.0 if call.outgoing is None else call.outgoing.lacked_credit(now)
    (queue, handler, credit), way = share(total, (*times.served(now), lacked))
    return total, 0.0, credit, 0.0, way, queue, handler, 0.0
