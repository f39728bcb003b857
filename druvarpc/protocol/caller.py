"""The client's half of a connection: calls that wait, go out in clubs, and are replied to.

A call waits in the queue of its lane until the lane's turn comes; only then does it get its id, so
that ids follow one another on the wire whatever overtook what. A queue that finds no room under the
server's `max_calls` takes no turn until a call has been CLOSED.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from operator import attrgetter
from typing import Final

from druvarpc.errors import LocalProtocolError, RemoteProtocolError, Status
from druvarpc.protocol import frames
from druvarpc.protocol.buffer import Frame
from druvarpc.protocol.clubs import (
    Clubbing,
    MethodNames,
    Outcome,
    call_size,
    cut_at,
    decode_replies,
    encode_calls,
    fits,
)
from druvarpc.protocol.compression import Compressed
from druvarpc.protocol.events import (
    MetadataReceived,
    Readable,
    RepliesReceived,
)
from druvarpc.protocol.frames import Buffer
from druvarpc.protocol.lanes import Priority
from druvarpc.protocol.streams import Input, State, Stream
from druvarpc.protocol.times import Times
from druvarpc.protocol.wire import MAX_CLUB, Wire

# Of methods in one frame, that are counted apart; with more, the rest is counted together.
MAX_COMBINATIONS: Final = 256

_METHOD_OF: Final = attrgetter("method")


class Caller:
    """Makes calls.

    Args:
        wire: what the connection's parts share.
        clubbing: how calls gather.

    Attributes:
        deadline: when calls that linger go out, None if none does.
        wire: what the connection's parts share.
    """

    __slots__ = (
        "_abandoned",
        "_clubbing",
        "_names",
        "_queues",
        "_timing",
        "deadline",
        "wire",
    )

    def __init__(self, wire: Wire, clubbing: Clubbing) -> None:
        self.deadline: float | None = None
        self.wire = wire
        self._clubbing = clubbing
        self._names = MethodNames()
        self._abandoned = 0
        self._timing = False  # a call has asked for its times
        # A list is an explicit club; it is cut only where there is no room for all of it.
        self._queues: dict[Priority, deque[Stream | list[Stream]]] = defaultdict(deque)

    @property
    def waiting(self) -> bool:
        """Whether calls wait to be sent."""
        return any(self._queues.values())

    def call(self, stream: Stream, now: float) -> None:
        """Queue a call."""
        self._check(stream)
        if stream.references:
            raise LocalProtocolError(f"{stream!r} refers to other calls outside a club")
        if stream.timings:
            self._time(stream, now)
        if self.wire.compressor is not None:
            self.wire.compress(stream)
        queue = self._queues[stream.lane]
        queue.append(stream)
        if not self._clubbing.linger or len(queue) >= self._clubbing.max_calls:
            self.wire.outflow.offer_club(stream.lane)
        elif self.deadline is None:
            self.deadline = now + self._clubbing.linger

    def club(self, calls: Sequence[Stream], now: float) -> None:
        """Queue calls that go out in one frame; arguments too large for it go as data."""
        if len({call.lane for call in calls}) != 1:
            raise LocalProtocolError("a club has at least one call, and all in one lane")
        most = min(self.wire.peer.max_club, self.wire.peer.max_calls)
        if len(calls) > most:
            raise LocalProtocolError(f"a club of {len(calls)} calls; the server takes {most}")
        for index, call in enumerate(calls):
            self._check(call)
            if not fits(calls, index):
                raise LocalProtocolError(f"{call.method}: references that a club can't have")
        if self.wire.compressor is not None:
            for call in calls:
                self.wire.compress(call)
        size = sum(map(call_size, calls))
        for call in sorted(calls, key=call_size, reverse=True):
            if size > MAX_CLUB:
                size -= call_size(call)
                call.inline = False
                size += call_size(call)
        if size > MAX_CLUB:
            raise LocalProtocolError(f"a club of {size} bytes without its arguments")
        for call in calls:
            if call.timings:
                self._time(call, now)
        lane = calls[0].lane
        self._queues[lane].append(list(calls))
        self.wire.outflow.offer_club(lane)

    def reset(self, stream: Stream, code: int, message: str, now: float) -> None:
        """Abandon a call; of one that is CLOSED drop what can still be read."""
        if stream.state is State.IDLE:
            self._abandon(stream)
        elif stream.state in (State.OPEN, State.CALLED):
            self._end(stream, code, message)
        self.wire.inflow.close(stream, now)

    def _abandon(self, stream: Stream) -> None:
        stream.abandoned = True
        self.wire.outflow.close(stream)
        self._abandoned += 1
        # A server that takes no more calls must not make those that gave up waiting pile up here;
        # to look for each in the queue would cost the square of their number.
        if 2 * self._abandoned > sum(map(len, self._queues.values())):
            self._abandoned = 0
            for queue in self._queues.values():
                kept = [entry for entry in queue if not _is_abandoned(entry)]
                queue.clear()
                queue.extend(kept)

    def end(self, stream: Stream) -> None:
        """End the client's direction of a call, after what waits to be sent."""
        self.wire.outflow.open(stream).ending = True
        if stream.id:
            self.wire.outflow.offer(stream)

    def expire(self, now: float) -> None:
        """Let calls go that have lingered long enough."""
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self.offer()

    def give_up(self, last: int, now: float) -> list[Stream]:
        """Forget the calls that the server hasn't begun: those not sent, and those after `last`.

        Returns:
            those of them that haven't been abandoned.
        """
        refused = [call for id, call in self.wire.streams.items() if id > last]
        for call in refused:
            del self.wire.streams[call.id]
            self.wire.inflow.close(call, now)
            call.abandoned = call.state is State.RESET
        for queue in self._queues.values():
            for entry in queue:
                refused += [entry] if isinstance(entry, Stream) else entry
            queue.clear()
        for call in refused:
            self.wire.outflow.close(call)
            call.state = State.CLOSED
        return [call for call in refused if not call.abandoned]

    # ClubSource

    def send_club(self, lane: Priority, out: list[Buffer], now: float) -> tuple[int, bool]:
        """Send the calls at the head of a lane's queue that there is room for."""
        wire, queue = self.wire, self._queues[lane]
        calls = self._next_club(queue, wire.peer.max_calls - len(wire.streams))
        if not calls:
            return 0, False
        first = id = wire.last_id + 1
        wire.last_id += len(calls)
        abandoned = False
        for call in calls:
            call.id = id
            wire.streams[id] = call
            id += 1
            if call.more or not call.inline:
                self._open(call)
            else:
                call.state = State.CALLED
            abandoned = abandoned or call.abandoned
        frame = encode_calls(calls, first, self._names, now)
        out.append(frame)
        wire.clubs_sent += 1
        wire.calls_clubbed += len(calls) if len(calls) > 1 else 0
        self._count(calls)
        if self._timing:
            for call in calls:
                if call.times is not None:
                    call.times.begun = now
                    wire.framed.append(call.times)
        if abandoned:
            for call in calls:
                if call.abandoned:
                    self._end(call, Status.CANCELLED, "")
        return len(frame), bool(queue)

    def _time(self, call: Stream, now: float) -> None:
        call.times = Times(now)
        self._timing = True

    def _count(self, calls: list[Stream]) -> None:
        methods = calls[0].method if len(calls) == 1 else frozenset(map(_METHOD_OF, calls))
        clubs = self.wire.clubs
        count = clubs.get(methods)
        if count is None:
            count = clubs.setdefault(
                methods if len(clubs) < MAX_COMBINATIONS else frozenset(), [0, 0]
            )
        count[0] += 1
        count[1] += len(calls)

    def sent(self, stream: Stream, *, ended: bool) -> None:
        """Note that END has gone, if it has."""
        if ended:
            self.wire.moved(stream, Input.END_UP)

    def _next_club(self, queue: deque[Stream | list[Stream]], room: int) -> list[Stream]:
        peer = self.wire.peer
        most = min(self._clubbing.max_calls, peer.max_club, room)
        left = min(self._clubbing.max_bytes, MAX_CLUB)
        inline = peer.max_inline
        calls: list[Stream] = []
        while queue:
            entry = queue[0]
            if _is_abandoned(entry):
                queue.popleft()
                continue
            if isinstance(entry, list):
                return calls or self._take_club(queue, entry, room)
            entry.inline = len(entry.payload or b"") <= inline
            left -= call_size(entry)
            if len(calls) == most or (calls and left < 0):
                break
            calls.append(entry)
            queue.popleft()
        return calls

    def _take_club(
        self, queue: deque[Stream | list[Stream]], entry: list[Stream], room: int
    ) -> list[Stream]:
        """Take an explicit club off a queue: all of it, or as much as there is room for."""
        size = cut_at(entry, room)
        calls, rest = entry[:size], entry[size:]
        if size:
            queue.popleft()
        if size and rest:
            for call in rest:
                call.references = tuple(
                    reference._replace(call=reference.call - size) for reference in call.references
                )
            queue.appendleft(rest)
        for call in calls:
            call.inline = call.inline and len(call.payload or b"") <= self.wire.peer.max_inline
        return calls

    def _open(self, call: Stream) -> None:
        """Give a call that sends data its window, and put arguments first that weren't inline."""
        call.state = State.OPEN
        outflow = self.wire.outflow
        outgoing = outflow.renew(call)
        if not call.inline:
            assert call.payload is not None
            packed = call.packed
            outgoing.push_first(call.payload if packed is None else Compressed(packed))
            outgoing.ending = outgoing.ending or not call.more
        outflow.offer(call)

    def offer(self) -> None:
        """Let every queue that has calls take a turn."""
        for lane, queue in self._queues.items():
            if queue:
                self.wire.outflow.offer_club(lane)

    def _end(self, stream: Stream, code: int, message: str) -> None:
        wire = self.wire
        wire.outflow.close(stream)
        wire.control.append(frames.encode_reason(frames.RESET, code, message, id=stream.id))
        wire.moved(stream, Input.RESET_UP)

    def _check(self, call: Stream) -> None:
        wire, names = self.wire, self._names
        if wire.sent_goaway is not None or wire.got_goaway is not None:
            raise LocalProtocolError("the connection takes no more calls")
        if call.state is not State.IDLE or call.payload is None:
            raise LocalProtocolError(f"{call!r} isn't a new call")
        if call.method not in names.reserved and not names.reserve(call.method):
            raise LocalProtocolError(f"{call.method!r:.80}: not a name, or one too many")
        if call.metadata:
            frames.check_outgoing_metadata(call.metadata, wire.peer.max_metadata)

    # Frames from the server.

    def handle(self, frame: Frame, now: float) -> bool:
        """Do what a frame demands that only a client receives; return whether it is one."""
        match frame.kind:
            case frames.REPLIES:
                self._on_replies(frame, now)
            case frames.DATA:
                self._on_data(frame, now)
            case frames.METADATA:
                self._on_metadata(frame, now)
            case _:
                return False
        return True

    def _on_replies(self, frame: Frame, now: float) -> None:
        """End the calls that a REPLIES frame answers."""
        wire = self.wire
        streams, replies = wire.streams, list[tuple[Stream, bytes | None, Outcome | None]]()
        try:
            for id, payload, outcome in decode_replies(
                frame.body, wire.accepted, wire.decompressor
            ):
                stream = streams.get(id)
                if stream is None:
                    raise RemoteProtocolError(f"a reply to call {id}, which isn't open")
                if stream.state is State.CALLED and stream.incoming is None:
                    # What follows, for a call without data.
                    stream.state = State.CLOSED
                    del streams[id]
                    replies.append((stream, payload, outcome))
                    continue
                incoming = wire.inflow.open(stream)
                failed = outcome is not None and outcome.status != Status.OK
                if incoming.unfinished and not failed:
                    raise RemoteProtocolError(f"a reply to call {id} within a message")
                was_reset = stream.state is State.RESET
                wire.move(stream, Input.REPLY_DOWN)
                if stream.state is State.REPLIED:
                    self._end(stream, Status.CANCELLED, "the reply has come")
                wire.inflow.end(stream, now)
                if not was_reset:
                    replies.append((stream, payload, outcome))
        finally:
            if replies:
                wire.events.append(RepliesReceived(replies))
        if self.deadline is None:
            self.offer()

    def _on_data(self, frame: Frame, now: float) -> None:
        """Keep data of a reply."""
        stream = self.wire.streams.get(frame.id)
        if stream is None:
            raise RemoteProtocolError(f"DATA for call {frame.id}, which isn't open")
        if frame.flags & frames.END_STREAM:
            raise RemoteProtocolError("END from the server")
        if self.wire.receive_data(stream, frame, Input.DATA_DOWN, now):
            self.wire.events.append(Readable(stream))

    def _on_metadata(self, frame: Frame, now: float) -> None:
        """Tell of metadata that came ahead of a reply."""
        wire = self.wire
        metadata = frames.decode_metadata(frame.body, wire.accepted.max_metadata)
        stream = wire.streams.get(frame.id)
        if stream is None:
            raise RemoteProtocolError(f"METADATA for call {frame.id}, which isn't open")
        incoming = wire.inflow.open(stream)
        if incoming.started:
            raise RemoteProtocolError(f"METADATA for call {frame.id} too late or twice")
        incoming.started = True
        wire.move(stream, Input.METADATA_DOWN)
        if stream.state is not State.RESET:
            wire.events.append(MetadataReceived(stream, metadata))


def _is_abandoned(entry: Stream | list[Stream]) -> bool:
    if isinstance(entry, Stream):
        return entry.abandoned
    return all(call.abandoned for call in entry)
