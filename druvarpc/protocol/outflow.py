"""The sending half: which frame goes next, and what credit it needs.

Two kinds of sources take turns in `Lanes`: streams with data, which go out one quantum at a time
under credit, and each lane's queue of calls (on the client) or replies (on the server), which go
out as clubs without credit. A stream that lacks credit leaves the lanes for `stalled` and comes
back with the next CREDIT; nothing else waits for it.
"""

import math
from collections.abc import Iterable
from typing import Final, Protocol

from druvarpc.protocol.events import Event, Writable
from druvarpc.protocol.frames import (
    END_STREAM,
    FRAME_COST,
    HEADER_SIZE,
    Buffer,
    data_header,
)
from druvarpc.protocol.lanes import ORDER, Lanes, Priority
from druvarpc.protocol.streams import Backlog, Outgoing, Stream
from druvarpc.protocol.windows import SendWindow

# Bounds the wait of a small call behind one piece of bulk: 64 KiB take 5 ms at 100 Mbit/s. Smaller
# quanta cost a header and a turn of the scheduler each.
QUANTUM: Final = 64 * 1024
# No piece below this is cut off for lack of credit (the silly window, RFC 1122, 4.2.3.4);
# as windows are at least 64 KiB and come back by quarters, the credit for one always arrives.
LEAST_CUT: Final = 8 * 1024
# Above the one, a sender is told to wait, below the other to go on.
HIGH_MARK: Final = 256 * 1024
# With so much in all streams together, each is told to wait whatever it has queued itself: a peer
# that gives no credit pins this and a message for each call, not a high mark for each.
ALL_HIGH_MARK: Final = 16 * 1024 * 1024
LOW_MARK: Final = 64 * 1024


class ClubSource(Protocol):
    """The half of a connection that sends clubs, and what it must know of data that were sent."""

    def send_club(self, lane: Priority, out: list[Buffer], now: float) -> tuple[int, bool]:
        """Add one club of a lane's queue to `out`; return its bytes, and whether more could go."""
        ...

    def sent(self, stream: Stream, *, ended: bool) -> None:
        """Note that the last message queued in a stream has gone, and whether END went with it."""


class Outflow:
    """What a connection has to send beside its control frames.

    Args:
        window: bytes of credit that the connection and each stream begin with.
        events: where to tell that a stream has room again.

    Attributes:
        clubs: where clubs come from; set once, before anything is sent.
        lanes: what could be sent now.
        stalled: streams that wait for credit.
        window: the connection's credit.
        frames_sent: DATA frames sent.
        overtaken: when a club last went ahead of data of a less urgent lane.
    """

    __slots__ = (
        "_backlog",
        "_events",
        "_has_club",
        "_stream_window",
        "clubs",
        "frames_sent",
        "lanes",
        "overtaken",
        "stalled",
        "window",
    )

    clubs: ClubSource

    def __init__(self, window: int, events: list[Event]) -> None:
        self.window = SendWindow(window)
        self.frames_sent = 0
        self.overtaken = -math.inf
        self._stream_window = window
        self._events = events
        self.lanes: Lanes[Stream | Priority] = Lanes()
        self._has_club = [False] * len(ORDER)
        self.stalled: dict[Stream, None] = {}
        self._backlog = Backlog()

    def offer_club(self, lane: Priority) -> None:
        """Let a lane's queue of calls or replies take its turn."""
        if not self._has_club[lane]:
            self._has_club[lane] = True
            # In front: what is small waits for no stream of its own lane either.
            self.lanes.add_first(lane, lane)

    def open(self, stream: Stream) -> Outgoing:
        """Return the outgoing direction of a stream, made when first needed."""
        if stream.outgoing is None:
            stream.outgoing = Outgoing(self._stream_window, self._backlog)
        return stream.outgoing

    def renew(self, stream: Stream) -> Outgoing:
        """Return the outgoing direction of a stream that is being opened, with its window."""
        outgoing = self.open(stream)
        outgoing.window = SendWindow(self._stream_window)
        return outgoing

    def offer(self, stream: Stream) -> None:
        """Let a stream take its turns, if it has anything to send and isn't waiting already."""
        outgoing = self.open(stream)
        if not outgoing.waiting and (outgoing.messages or outgoing.ending):
            outgoing.waiting = True
            self.lanes.add(stream, stream.lane)

    def push(self, stream: Stream, message: Buffer) -> bool:
        """Queue a message of a stream; return whether there is room for more."""
        outgoing = self.open(stream)
        outgoing.push(message)
        if outgoing.queued >= HIGH_MARK or self._backlog.queued >= ALL_HIGH_MARK:
            outgoing.congested = True
        return not outgoing.congested

    def close(self, stream: Stream) -> None:
        """Forget what a stream had to send."""
        outgoing = stream.outgoing
        if outgoing is not None:
            outgoing.drop()
            if outgoing.waiting:
                outgoing.waiting = False
                if stream in self.stalled:
                    del self.stalled[stream]
                else:
                    self.lanes.remove(stream, stream.lane)

    def grant(self, stream: Stream | None, size: int) -> None:
        """Add credit to a stream, or to the connection if it is None."""
        if stream is None:
            self.window.grant(size)
            stalled = list(self.stalled)
        else:
            outgoing = self.open(stream)
            outgoing.window.grant(size)
            outgoing.granted = True
            stalled = [stream] if stream in self.stalled else []
        for one in stalled:
            del self.stalled[one]
            self.lanes.add(one, one.lane)

    def settle(self, connection: int, stream: int, opened: Iterable[Stream]) -> None:
        """Add to all windows what the peer's SETTINGS grant above the defaults."""
        more = stream - self._stream_window
        self._stream_window = stream
        for one in opened:
            if more and one.outgoing is not None:
                self.grant(one, more)
        self.grant(None, connection)

    def expire(self, now: float, timeout: float) -> list[Stream]:
        """Return the streams that got no credit for `timeout` seconds, and begin to count anew."""
        expired = [stream for stream in self.stalled if _since(stream) + timeout <= now]
        for stream in expired:
            outgoing = self.open(stream)
            outgoing.unblock(now)
            outgoing.blocked = now
        return expired

    @property
    def stalled_since(self) -> float:
        """When that of the `stalled` which has waited longest began to."""
        return min(map(_since, self.stalled))

    def send(self, out: list[Buffer], most: int, now: float) -> None:
        """Add to `out` what goes next, about `most` bytes of it."""
        size = 0
        quantum = min(QUANTUM, max(most, LEAST_CUT))
        while size < most and (turn := self.lanes.next()) is not None:
            source, lane = turn
            if isinstance(source, Priority):
                if lane is not Priority.BULK and self.lanes.waits_behind(lane):
                    self.overtaken = now
                sent, more = self.clubs.send_club(lane, out, now)
                if more:
                    self.lanes.add(source, lane)
                else:
                    self._has_club[lane] = False
            else:
                sent = self._send_data(source, out, quantum, now)
            self.lanes.sent(lane, sent)
            size += sent

    def _send_data(self, stream: Stream, out: list[Buffer], quantum: int, now: float) -> int:
        outgoing = self.open(stream)
        if not outgoing.messages:
            outgoing.waiting = outgoing.ending = False
            out.append(data_header(0, END_STREAM, stream.id))
            self.clubs.sent(stream, ended=True)
            return HEADER_SIZE
        size = min(outgoing.first, quantum)
        credit = min(self.window.available, outgoing.window.available) - FRAME_COST
        if credit < min(size, LEAST_CUT):
            self.stalled[stream] = None
            if outgoing.blocked is None:
                outgoing.blocked = now
            return 0
        if outgoing.blocked is not None:
            outgoing.unblock(now)
        body, flags = outgoing.cut(min(size, credit))
        cost = len(body) + FRAME_COST
        self.window.spend(cost)
        outgoing.window.spend(cost)
        self.frames_sent += 1
        done = not outgoing.messages
        ends = done and outgoing.ending
        if ends:
            flags |= END_STREAM
        out += (data_header(len(body), flags, stream.id), body)
        if outgoing.congested and outgoing.queued <= LOW_MARK:
            outgoing.congested = False
            self._events.append(Writable(stream))
        # A turn is a quantum of bytes, whatever the size of the messages and of the write: what
        # goes beyond it counts for the next.
        left = outgoing.left - len(body) - HEADER_SIZE
        outgoing.left = left + QUANTUM if outgoing.left <= 0 else left
        if done:
            outgoing.left = 0
            outgoing.waiting = outgoing.ending = False
            self.clubs.sent(stream, ended=ends)
        elif outgoing.left > 0:
            self.lanes.add_first(stream, stream.lane)
        else:
            self.lanes.add(stream, stream.lane)
        return len(body) + HEADER_SIZE


def _since(stream: Stream) -> float:
    outgoing = stream.outgoing
    assert outgoing is not None
    assert outgoing.blocked is not None
    return outgoing.blocked
