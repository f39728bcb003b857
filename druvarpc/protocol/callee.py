"""The server's half of a connection: calls that arrive in clubs, run, and are replied to.

A call is told to the owner when it can run: when its arguments are complete and the results that
it refers to have come. Until then it is held here, and this half replies by itself if that can't
happen any more. Replies wait in the queue of their call's lane; a call's place under `max_calls`
is free again when its reply has been given to `data_to_send`'s caller, so that a peer that doesn't
read can't make replies pile up.
"""

from collections import defaultdict

from druvarpc.errors import LocalProtocolError, RemoteProtocolError, RpcError, Status
from druvarpc.protocol import frames
from druvarpc.protocol.buffer import Frame
from druvarpc.protocol.clubs import (
    CALL_OVERHEAD,
    MethodNames,
    Outcome,
    decode_calls,
    encode_replies,
    reply_item,
    resolve,
)
from druvarpc.protocol.compression import LEAST_SIZE, Compressed
from druvarpc.protocol.events import AuthReceived, CallsReceived, Readable, ResetReceived
from druvarpc.protocol.frames import Buffer, Metadata
from druvarpc.protocol.lanes import Priority
from druvarpc.protocol.streams import Club, Input, State, Stream
from druvarpc.protocol.times import Times
from druvarpc.protocol.wire import MAX_CLUB, Wire, data_cost


class Callee:
    """Answers calls.

    Args:
        wire: what the connection's parts share.
    """

    __slots__ = ("_auth", "_ended", "_held", "_names", "_queues", "_unsent", "_wire")

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._auth: AuthReceived | None = None
        self._names = MethodNames()
        self._queues: dict[Priority, list[tuple[int, list[object]]]] = defaultdict(list)
        self._unsent = 0
        self._held: dict[Stream, None] = {}
        # Calls of clubs that have ended, with their results, until those waiting for them know.
        self._ended: list[tuple[Stream, bytes | None]] = []

    @property
    def waiting(self) -> bool:
        """Whether replies wait to be sent."""
        return self._unsent > 0

    @property
    def deadline(self) -> float | None:
        """The earliest deadline of a call that is held."""
        if not self._held:
            return None
        return min(
            (call.deadline for call in self._held if call.deadline is not None), default=None
        )

    def expire(self, now: float) -> None:
        """Answer the calls that are held and whose deadline has passed."""
        for call in list(self._held):
            # One that was refused a moment ago may have taken others with it.
            if call in self._held and call.deadline is not None and call.deadline <= now:
                self._refuse(call, Status.DEADLINE_EXCEEDED, "the deadline passed", now)

    def reply(
        self,
        stream: Stream,
        payload: bytes | None,
        outcome: Outcome | None,
        now: float,
        *,
        after_data: bool = False,
    ) -> None:
        """End a call."""
        if (
            outcome is None
            and stream.state is State.CALLED
            and payload is not None
            and len(payload) <= self._wire.peer.max_inline
            and stream.incoming is None
            and stream.outgoing is None
            and stream.club is None
            and stream.times is None
            and (self._wire.compressor is None or len(payload) < LEAST_SIZE)
        ):
            # What follows, for a call without data.
            stream.final = [stream.id, payload]
            stream.state = State.CLOSED
            del self._wire.streams[stream.id]
            self._queue(stream, CALL_OVERHEAD + len(payload))
        else:
            self._reply(stream, payload, outcome, now, after_data=after_data)

    def _reply(
        self,
        stream: Stream,
        payload: bytes | None,
        outcome: Outcome | None,
        now: float,
        *,
        after_data: bool,
    ) -> None:
        if stream.final is not None or stream.state not in (State.OPEN, State.CALLED, State.RESET):
            raise LocalProtocolError(f"{stream!r} can't be replied to")
        if stream.state is State.RESET:
            payload, outcome = None, Outcome(Status.CANCELLED)
        failed = outcome is not None and outcome.status != Status.OK
        if outcome is not None:
            self._check(outcome, failed=failed, payload=payload)
        self._held.pop(stream, None)
        if stream.times is not None:
            stream.times.done = now
        outflow = self._wire.outflow
        if not failed:
            stream.final = self._reply_with(stream, payload, outcome)
        else:
            stream.final = reply_item(stream.id, None, outcome)
            if not after_data:
                outflow.close(stream)
        if stream.outgoing is not None and stream.outgoing.messages:
            outflow.offer(stream)
        else:
            self.sent(stream, ended=False)
        self._wire.inflow.close(stream, now)
        if stream.club is not None:
            self._ended.append((stream, None if failed else payload))
            if len(self._ended) == 1:
                # A call that is refused here adds itself: a chain of calls that each need the one
                # before can be as long as a club, too long for a function that calls itself.
                for ended, result in self._ended:
                    self._settle(ended, result, now)
                self._ended.clear()

    def _reply_with(
        self, stream: Stream, payload: bytes | None, outcome: Outcome | None
    ) -> list[object]:
        """Return the reply with a result; one that is too large for it goes ahead as a message."""
        if payload is None:
            return reply_item(stream.id, None, outcome)
        wire, packed = self._wire, None
        if wire.compressor is not None:
            packed = wire.compressor.compress(stream.method, payload)
        if len(payload) > wire.peer.max_inline:
            wire.outflow.push(stream, payload if packed is None else Compressed(packed))
            return reply_item(stream.id, None, outcome)
        if packed is None:
            return reply_item(stream.id, payload, outcome)
        return reply_item(stream.id, packed, outcome, compressed=True)

    def give_up(self, stream: Stream) -> None:
        """Put a failure in the place of a reply whose data the peer doesn't take."""
        self._wire.outflow.close(stream)
        stream.final = reply_item(
            stream.id, None, Outcome(Status.ABORTED, "the caller didn't take the result")
        )
        self.sent(stream, ended=False)

    def send_metadata(self, stream: Stream, metadata: Metadata) -> None:
        """Send metadata ahead of the reply."""
        outgoing = self._wire.outflow.open(stream)
        if outgoing.started or stream.state not in (State.OPEN, State.CALLED) or stream.final:
            raise LocalProtocolError(f"{stream!r}: too late for metadata")
        frames.check_outgoing_metadata(metadata, self._wire.peer.max_metadata)
        outgoing.started = True
        self._wire.control.append(frames.encode_metadata(stream.id, metadata))

    # ClubSource

    def send_club(self, lane: Priority, out: list[Buffer], now: float) -> tuple[int, bool]:
        """Send the replies at the head of a lane's queue."""
        queue, left, count = self._queues[lane], MAX_CLUB, 0
        for size, _ in queue:
            left -= size
            if count and left < 0:
                break
            count += 1
        frame = encode_replies([item for _, item in queue[:count]])
        del queue[:count]
        out.append(frame)
        self._unsent -= count
        self._wire.clubs_sent += 1
        self._wire.calls_clubbed += count if count > 1 else 0
        return len(frame), bool(queue)

    def sent(self, stream: Stream, *, ended: bool) -> None:
        """Queue the reply that waited for a stream's data, if there is one."""
        item = stream.final
        if item is None:
            return
        payload = item[1]
        size = CALL_OVERHEAD + (len(payload) if isinstance(payload, bytes) else 0)
        if stream.times is not None:
            _add_timings(item, stream, stream.times)
        if len(item) > 2:
            size = len(frames.pack(item))
        self._wire.moved(stream, Input.REPLY_DOWN)
        self._queue(stream, size)

    def _queue(self, stream: Stream, size: int) -> None:
        """Queue a reply that is complete, and takes so many bytes or a few less."""
        assert stream.final is not None
        self._queues[stream.lane].append((size, stream.final))
        self._unsent += 1
        self._wire.outflow.offer_club(stream.lane)

    def _holds(self, places: int) -> bool:
        """Whether as many calls are open: not CLOSED, or their reply hasn't been sent."""
        streams = self._wire.streams
        if len(streams) + self._unsent < places:
            return False
        # A call whose caller hasn't ended its direction can be both.
        unsent = (item[0] for queue in self._queues.values() for _, item in queue)
        return len(streams) + sum(id not in streams for id in unsent) >= places

    def _check(self, outcome: Outcome, *, failed: bool, payload: bytes | None) -> None:
        peer = self._wire.peer
        frames.check_outgoing_metadata(outcome.trailers, peer.max_metadata)
        if len(outcome.details or b"") > peer.max_inline:
            raise LocalProtocolError(f"error details of more than {peer.max_inline} bytes")
        if (failed and payload is not None) or (outcome.not_started and not failed):
            raise LocalProtocolError("a failure has no payload, and only a failure is NOT_STARTED")

    def _refuse(self, stream: Stream, status: Status, message: str, now: float) -> None:
        self.reply(stream, None, Outcome(status, message, not_started=True), now)

    # Clubs.

    def _settle(self, ended: Stream, payload: bytes | None, now: float) -> None:
        """Go on with the calls that waited for one that has ended: run them or refuse them."""
        club = ended.club
        assert club is not None
        index = ended.id - club.first
        waiting = club.waiting.pop(index, ())
        if payload is not None and waiting:
            club.results[index] = payload
        ready: list[Stream] = []
        for call in waiting:
            if call.final is not None or call.state not in (State.OPEN, State.CALLED):
                continue
            if payload is None:
                self._refuse(
                    call,
                    Status.FAILED_PRECONDITION,
                    f"call {index} of the club, which this one needs, has no result",
                    now,
                )
            elif self._runnable(call, now):
                ready.append(call)
        if ready:
            self._wire.events.append(CallsReceived(ready))

    def _runnable(self, call: Stream, now: float) -> bool:
        """Tell whether a call can run now, with its references resolved; hold it otherwise."""
        club = call.club
        if call.payload is None or (
            club is not None and any(one.call not in club.results for one in call.references)
        ):
            self._held[call] = None
            return False
        if club is not None and call.references:
            values = [(one, club.results[one.call]) for one in call.references]
            most = min(club.allowance, self._wire.limits.max_message)
            # All of a result is decoded, however little of it the path leads to.
            club.allowance -= min(club.allowance, sum(len(result) for _, result in values))
            try:
                resolved = resolve(call.payload, values, most)
            except RpcError as error:
                self.reply(
                    call,
                    None,
                    Outcome(error.status, error.message, not_started=True),
                    now,
                )
                return False
            call.payload = resolved
        self._held.pop(call, None)
        if call.incoming is not None:
            call.incoming.unread = False
        return True

    # Frames from the client.

    def handle(self, frame: Frame, now: float) -> bool:
        """Do what a frame demands that only a server receives; return whether it is one."""
        match frame.kind:
            case frames.CALLS:
                self._on_calls(frame, now)
            case frames.DATA:
                self._on_data(frame, now)
            case frames.RESET:
                self._on_reset(frame, now)
            case frames.AUTH:
                self._on_auth(frame, now)
            case _:
                return False
        return True

    def _on_calls(self, frame: Frame, now: float) -> None:
        """Accept the calls of a club."""
        wire = self._wire
        if frame.id != wire.last_id + 1:
            raise RemoteProtocolError(f"call {frame.id} after call {wire.last_id}")
        if wire.got_goaway is not None:
            raise RemoteProtocolError("CALLS after GOAWAY")
        calls = decode_calls(frame.body, self._names, wire.accepted, wire.decompressor, now)
        first = frame.id
        wire.last_id += len(calls)
        if wire.sent_goaway is not None:
            wire.patience.charge(now)
            return
        if self._holds(wire.accepted.max_calls - len(calls) + 1):
            raise RemoteProtocolError(f"more than {wire.accepted.max_calls} calls open")
        club = None
        ready: list[Stream] = []
        for id, call in enumerate(calls, first):
            call.id = id
            call.state = State.OPEN if call.more else State.CALLED
            wire.streams[id] = call
            if call.timings:
                call.times = Times(now)
            if call.references and club is None:
                club = Club(first, calls, wire.limits.max_message)
            if call.payload is None or call.references:
                self._held[call] = None
            else:
                ready.append(call)
        if self._auth is not None:
            # Noted here: a call that is held now may be told of after the next AUTH.
            for call in calls:
                call.token = self._auth
        if ready:
            wire.events.append(CallsReceived(ready))

    def _on_data(self, frame: Frame, now: float) -> None:
        """Keep data of a call."""
        wire = self._wire
        stream = wire.streams.get(frame.id)
        if stream is None:
            if wire.sent_goaway is None or not wire.sent_goaway < frame.id <= wire.last_id:
                raise RemoteProtocolError(f"DATA for call {frame.id}, which isn't open")
            cost = data_cost(frame)
            wire.inflow.window.receive(cost)
            wire.inflow.discard(cost, now)
            wire.patience.charge(now)
            return
        if stream.incoming is None:
            # Of a call that has its arguments nobody waits for more yet.
            wire.inflow.open(stream).wanted = stream.payload is None
        wire.inflow.open(stream).unread = stream in self._held
        ends = frame.flags & frames.END_STREAM
        what = Input.END_UP if ends else Input.DATA_UP
        readable = wire.receive_data(stream, frame, what, now)
        if stream.payload is not None or stream not in self._held:
            if readable:
                wire.events.append(Readable(stream))
            return
        stream.payload = wire.inflow.take(stream, now) if readable else None
        if wire.inflow.open(stream).too_long:
            most = wire.limits.max_message
            self._refuse(
                stream, Status.RESOURCE_EXHAUSTED, f"arguments of more than {most} bytes", now
            )
            return
        if stream.payload is not None:
            if stream.times is not None:
                stream.times.start = now
            if self._runnable(stream, now):
                wire.events.append(CallsReceived([stream]))
        elif ends:
            raise RemoteProtocolError(f"END of call {frame.id} before its arguments")

    def _on_reset(self, frame: Frame, now: float) -> None:
        """Stop a call that its caller has abandoned."""
        wire = self._wire
        code, message = frames.decode_reason(frame.body, "RESET")
        stream = wire.streams.get(frame.id)
        if stream is None or stream.state is not State.REPLIED:  # then it's what the client must do
            wire.patience.charge(now)
        if stream is None:
            if frame.id > wire.last_id:
                raise RemoteProtocolError(f"RESET of call {frame.id}, which was never opened")
            return
        wire.move(stream, Input.RESET_UP)
        if stream.state is State.CLOSED:
            return
        wire.outflow.close(stream)
        wire.inflow.close(stream, now)
        if stream.final is not None:
            stream.final = reply_item(stream.id, None, Outcome(Status.CANCELLED))
            self.sent(stream, ended=False)
        elif stream in self._held:
            self.reply(stream, None, None, now)
        else:
            status = Status(code) if code <= max(Status) else Status.UNKNOWN
            wire.events.append(ResetReceived(stream, status, message))

    def _on_auth(self, frame: Frame, now: float) -> None:
        """Tell who the client says it is."""
        self._wire.patience.charge(now)
        token, metadata = frames.decode_auth(frame.body, self._wire.accepted.max_metadata)
        self._auth = AuthReceived(token, metadata)
        self._wire.events.append(self._auth)


def _add_timings(item: list[object], stream: Stream, times: Times) -> None:
    """Add position 7 to a reply, if its handler hasn't."""
    item += [None] * (8 - len(item))
    if item[7] is not None:
        return
    done = times.done
    assert done is not None, "the reply has been made"
    lacked = 0.0 if stream.outgoing is None else stream.outgoing.lacked_credit(done)
    item[7] = [round(one * 1e6) for one in (*times.served(done), lacked)]
