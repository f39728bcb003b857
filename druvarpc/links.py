"""What `druvarpc.testing.Link` is made of: connections within the process that take their time.

Nothing runs in the background. Bytes that an end sends are cut into segments, and when a segment
has left, when it arrives, and when its sender learns of that, is known as soon as it is sent: the
wire is free from a known moment on, and carries segments in the order in which they were sent.
Who waits sleeps until such a moment; what changes one (a read, a close, a cut) brings the sleeper's
alarm forward. A stall only puts moments off, so that a sleeper wakes too early, sees that, and
sleeps again.

*Time.* There are two: trio's, and the link's, which stands still during stalls. Segments have the
link's. A moment of the link's is compared with now by `Clock.real`, never the other way round: who
sleeps until `real(moment)` then finds that it has come, whatever was lost in rounding.

*Room.* Three gauges say what one direction of a connection may send: bytes unsent (`queue`), bytes
unacknowledged (`window`), and bytes unread, as far as the sender knows.
"""

import math
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Final

import trio

from druvarpc.peers import Peer
from druvarpc.protocol.connection import WRITE_SIZE
from druvarpc.transports import Buffer

# A segment is what the wire carries in half a millisecond, so that fast links don't cost an event
# for each packet. At least the payload of a TCP segment on Ethernet; at most what leaves several
# in the smallest receive buffer.
SEGMENT_SECONDS: Final = 0.0005
MIN_SEGMENT: Final = 1448
MAX_SEGMENT: Final = 16 * 1024
# What is taken from a sender ahead of the wire. More makes urgent bytes wait behind others.
QUEUE_SECONDS: Final = 0.001
MIN_QUEUE: Final = 16 * 1024
# What a receiver holds unread, besides twice what is on the way: it shall not limit the rate.
RECEIVE_BUFFER: Final = 256 * 1024
# The same where infinitely much could be on the way: a large one of TCP's.
UNBOUNDED_BUFFER: Final = 16 * 1024 * 1024


class Clock:
    """The link's time, which stands still during stalls."""

    def __init__(self) -> None:
        self._stalls: list[tuple[float, float]] = []  # in trio's time, disjoint, in order

    def stall(self, start: float, end: float) -> None:
        """Stand still in this time, too."""
        apart: list[tuple[float, float]] = []
        for other in self._stalls:
            if other[1] < start or other[0] > end:
                apart.append(other)
            else:
                start, end = min(start, other[0]), max(end, other[1])
        self._stalls = sorted([*apart, (start, end)])

    def link(self, now: float) -> float:
        """Return the link's time at a moment of trio's."""
        stalled = 0.0
        for start, end in self._stalls:
            if now <= start:
                break
            stalled += min(now, end) - start
        return now - stalled

    def real(self, moment: float) -> float:
        """Return trio's time at a moment of the link's; when a stall begins: its end."""
        for start, end in self._stalls:
            if moment < start:
                break
            moment += end - start
        return moment


class Alarm:
    """One task's sleep, which others can cut short."""

    def __init__(self) -> None:
        self._scope = trio.CancelScope()

    async def sleep_until(self, at: float) -> None:
        """Sleep; a checkpoint in any case."""
        with trio.CancelScope(deadline=at) as self._scope:
            await trio.sleep_forever()

    def bring_forward(self, at: float) -> None:
        """Wake the task at this time, if it would sleep longer."""
        if at < self._scope.deadline:
            self._scope.deadline = at

    def wake(self) -> None:
        """Wake the task now."""
        self._scope.cancel()


class Gauge:
    """Bytes that count against a limit until a known moment.

    Args:
        clock: of the link whose moments they are.
        limit: bytes.
        step: who waits for room waits for this much, lest it wakes for every few bytes.
    """

    def __init__(self, clock: Clock, limit: int, step: int) -> None:
        self._clock = clock
        self._limit = limit
        self._step = max(1, min(step, limit // 2))
        self._level = 0
        self._releases: deque[tuple[float, int]] = deque()

    def take(self, size: int) -> None:
        """Count bytes from now on."""
        self._level += size

    def release(self, size: int, moment: float) -> None:
        """Count them no longer from that moment on, which isn't before that of the last release."""
        self._releases.append((moment, size))

    def room(self, now: float) -> int:
        """Return how many bytes are left to the limit."""
        releases = self._releases
        while releases and self._clock.real(releases[0][0]) <= now:
            self._level -= releases.popleft()[1]
        return self._limit - self._level

    def next_room(self) -> float:
        """Return the moment from which there is room; infinity if it isn't known yet."""
        surplus = self._level + self._step - self._limit
        if surplus <= 0:
            return -math.inf
        for moment, size in self._releases:
            surplus -= size
            if surplus <= 0:
                return moment
        return math.inf


class Wire:
    """One direction of the link, which carries one segment at a time."""

    def __init__(
        self, clock: Clock, rtt: float, bandwidth: float, queue: int | None, jitter: float
    ) -> None:
        self.clock = clock
        self.bandwidth = bandwidth
        self.delay = rtt / 2
        self.jitter = jitter
        self.carried = 0
        self.peak = 0
        self._free = -math.inf  # from this moment of the link's on
        if bandwidth == math.inf:
            self.segment = MAX_SEGMENT
            self.buffer = UNBOUNDED_BUFFER if rtt + jitter else RECEIVE_BUFFER
            self.queue = queue or self.buffer
        else:
            segment = int(min(MAX_SEGMENT, bandwidth * SEGMENT_SECONDS))
            self.segment = max(MIN_SEGMENT, segment)
            self.buffer = RECEIVE_BUFFER + int(2 * bandwidth * (rtt + jitter))
            self.queue = queue or max(MIN_QUEUE, int(bandwidth * QUEUE_SECONDS))

    def carry(self, size: int, moment: float) -> float:
        """Take a segment at a moment of the link's; return that at which all of it has left."""
        self.carried += size
        self._free = max(moment, self._free) + size / self.bandwidth
        if self.bandwidth < math.inf:
            self.peak = max(self.peak, round((self._free - moment) * self.bandwidth))
        return self._free


class Pipe:
    """One direction of a connection. Moments are the link's, `now` is trio's."""

    def __init__(self, wire: Wire, window: int | None, chance: Random) -> None:
        self.reader = Alarm()
        self.writer = Alarm()
        self.ended = False  # nothing more is sent
        self.unread = False  # the reader has closed
        self.write_size = min(WRITE_SIZE, max(wire.segment, wire.queue // 2))
        self._wire = wire
        self._clock = wire.clock
        self._chance = chance
        self._arriving: deque[tuple[float, bytes]] = deque()
        self._last = -math.inf  # when the last segment arrives
        self._end = math.inf  # when the end does
        self._refused = math.inf  # when the sender learns that nobody reads
        self._unsent = Gauge(self._clock, wire.queue, wire.queue)
        self._unread = Gauge(self._clock, wire.buffer, wire.segment)
        self._gauges = [self._unsent, self._unread]
        self._unacknowledged: Gauge | None = None
        if window is not None:
            self._unacknowledged = Gauge(self._clock, window, wire.segment)
            self._gauges.append(self._unacknowledged)

    # The sender's side.

    def refused(self, now: float) -> bool:
        """Return whether the sender knows that nobody reads."""
        return self._clock.real(self._refused) <= now

    def send(self, buffers: Sequence[Buffer], now: float) -> Sequence[Buffer]:
        """Take what there is room for, and return the rest."""
        room = min([gauge.room(now) for gauge in self._gauges])
        taken, rest = _split(buffers, room)
        data = b"".join(taken)
        moment = self._clock.link(now)
        for start in range(0, len(data), self._wire.segment):
            self._put(data[start : start + self._wire.segment], moment)
        if data and not self.unread:
            self.reader.bring_forward(self.next_arrival())
        return rest

    def _put(self, segment: bytes, moment: float) -> None:
        size = len(segment)
        left = self._wire.carry(size, moment)
        late = self._chance.uniform(0, self._wire.jitter) if self._wire.jitter else 0.0
        self._last = max(self._last, left + self._wire.delay + late)
        for gauge in self._gauges:
            gauge.take(size)
        self._unsent.release(size, left)
        if self._unacknowledged is not None:
            self._unacknowledged.release(size, self._last + self._wire.delay)
        if self.unread:
            self._refused = min(self._refused, self._last + self._wire.delay)
        else:
            self._arriving.append((self._last, segment))

    def next_room(self, now: float) -> float:
        """Return when, in trio's time, there is room, or the sender learns that there won't be."""
        if self.ended:
            return now
        room = max([gauge.next_room() for gauge in self._gauges])
        return self._clock.real(min(room, self._refused))

    def finish(self, now: float) -> None:
        """Let the end follow what has been sent."""
        if not self.ended:
            self.ended = True
            self._end = max(self._last, self._clock.link(now) + self._wire.delay)
            self.reader.bring_forward(self.next_arrival())

    # The reader's side.

    def next_arrival(self) -> float:
        """Return when, in trio's time, bytes or the end arrive; infinity if that isn't known."""
        return self._clock.real(self._arriving[0][0] if self._arriving else self._end)

    def take(self, now: float) -> bytes:
        """Return what has arrived, which may be nothing."""
        arriving, real = self._arriving, self._clock.real
        segments: list[bytes] = []
        while arriving and real(arriving[0][0]) <= now:
            segments.append(arriving.popleft()[1])
        data = b"".join(segments)
        if data:
            self._unread.release(len(data), self._clock.link(now) + self._wire.delay)
            self.writer.bring_forward(self.next_room(now))
        return data

    def abandon(self, now: float) -> None:
        """Read no more. The sender learns of it when something that it sent has come to nothing."""
        self.unread = True
        if self._arriving:
            arrived = max(self._arriving[0][0], self._clock.link(now))
            self._refused = arrived + self._wire.delay
            self._arriving.clear()
            self.writer.bring_forward(self.next_room(now))


class Connection:
    """What the two ends have in common."""

    def __init__(self, up: Pipe, down: Pipe, broken_at: float) -> None:
        self.broken_at = broken_at  # in trio's time
        self._pipes = up, down

    def break_at(self, at: float) -> None:
        """Break at that time, if not before."""
        self.broken_at = min(self.broken_at, at)
        for pipe in self._pipes:
            pipe.reader.bring_forward(self.broken_at)
            pipe.writer.bring_forward(self.broken_at)

    def over(self, now: float) -> bool:
        """Return whether it broke, or was closed at both ends."""
        return self.broken_at <= now or all(pipe.unread for pipe in self._pipes)


class End:
    """One end of a connection over a link: a transport."""

    peer = "link"
    who = Peer("link")

    def __init__(self, connection: Connection, incoming: Pipe, outgoing: Pipe) -> None:
        self._connection = connection
        self._incoming = incoming
        self._outgoing = outgoing

    @property
    def write_size(self) -> int:
        """See `Transport`."""
        return self._outgoing.write_size

    def hold_back(self, gentle: bool) -> None:
        """See `Transport`."""

    async def receive(self) -> bytes:
        """See `Transport`."""
        pipe = self._incoming
        while True:
            arrival = min(pipe.next_arrival(), self._connection.broken_at)
            if pipe.unread or arrival <= trio.current_time():
                await trio.lowlevel.checkpoint()
            else:
                await pipe.reader.sleep_until(arrival)
            now = self._check()
            if pipe.next_arrival() <= now:
                return pipe.take(now)

    def send_nowait(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """See `Transport`."""
        now = self._check()
        if self._outgoing.ended:
            raise trio.BrokenResourceError("this end has sent its end")
        if self._outgoing.refused(now):
            raise trio.BrokenResourceError("the other end was closed")
        return self._outgoing.send(buffers, now)

    def has_room(self) -> bool:
        """See `Transport`."""
        return False  # `wait_writable` knows

    async def wait_writable(self) -> None:
        """See `Transport`."""
        pipe = self._outgoing
        slept = False
        while not self._incoming.unread:
            now = trio.current_time()
            room = min(pipe.next_room(now), self._connection.broken_at)
            if room <= now:
                break
            await pipe.writer.sleep_until(room)
            slept = True
        if not slept:
            await trio.lowlevel.checkpoint()

    def send_eof(self) -> None:
        """See `Transport`."""
        self._outgoing.finish(self._check())

    def close(self) -> None:
        """See `Transport`."""
        now = trio.current_time()
        if not self._incoming.unread:
            self._outgoing.finish(now)
            self._incoming.abandon(now)
            self._incoming.reader.wake()
            self._outgoing.writer.wake()

    def _check(self) -> float:
        """Return the time, if the connection is open at this end."""
        now = trio.current_time()
        if self._incoming.unread:
            raise trio.ClosedResourceError("this end was closed")
        if self._connection.broken_at <= now:
            raise trio.BrokenResourceError("the link was cut")
        return now


def _split(buffers: Sequence[Buffer], room: int) -> tuple[Sequence[Buffer], Sequence[Buffer]]:
    """Return the first `room` bytes, and the rest."""
    for index, buffer in enumerate(buffers):
        if len(buffer) > room:
            view = memoryview(buffer)
            return [*buffers[:index], view[:room]], [view[room:], *buffers[index + 1 :]]
        room -= len(buffer)
    return buffers, ()
