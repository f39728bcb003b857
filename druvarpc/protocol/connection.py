"""One connection's protocol, without I/O: bytes in, events out, bytes to send out, time passed in.

How it works. The owner feeds what it reads to `receive_data` and takes events from `next_event`
until that returns None; it submits work by the other methods; and while `wants_to_send` is true it
writes what `data_to_send` returns. Scheduling happens there: ids, numbers of methods and credit are
given out when bytes are asked for, so that what is urgent overtakes what was submitted before it.
When the clock reaches `next_deadline`, the owner calls `handle_timer`.

A call is a `Stream`: the client makes it and submits it, the server gets one by `CallsReceived`,
and all that concerns the call refers to that object. The parts: `FrameBuffer` cuts the input, the
tables below say what each frame does, `Caller` or `Callee` is the half of this role, `Inflow` and
`Outflow` hold the data and the credit of both directions, `Liveness` the clocks; `Wire` is what
they share.

After an error nothing more is read, `data_to_send` returns a last GOAWAY, and then `closed` is
true.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from druvarpc.errors import CloseCode, LocalProtocolError, RemoteProtocolError, Status
from druvarpc.protocol import frames
from druvarpc.protocol.buffer import Frame, FrameBuffer
from druvarpc.protocol.callee import Callee
from druvarpc.protocol.caller import Caller
from druvarpc.protocol.clubs import Clubbing, Outcome
from druvarpc.protocol.compression import Algorithm, Compressed
from druvarpc.protocol.events import (
    Event,
    GoAwayReceived,
    PongReceived,
    SettingsReceived,
    Stalled,
)
from druvarpc.protocol.frames import Buffer, Metadata, Role, Settings
from druvarpc.protocol.limits import Limits
from druvarpc.protocol.liveness import Liveness
from druvarpc.protocol.streams import Incoming, State, Stream
from druvarpc.protocol.windows import Budget
from druvarpc.protocol.wire import Wire

# One write: large enough that a system call costs little, small enough that lanes decide late.
WRITE_SIZE: Final = 256 * 1024
# Seconds after a small call overtook bulk in which others are expected.
SHARED_TIME: Final = 1.0
# PONGs that wait for a peer that doesn't read.
MAX_PONGS: Final = 256


class Connection:
    """One end of one connection.

    Args:
        role: which end, "client" or "server".
        now: the time, in seconds of any clock that doesn't go back, as in all methods.
        limits: what this end accepts.
        clubbing: how calls gather; the client's.
        budget: memory that this connection shares with others; see `release`.
        compression: the algorithms by which this end may be sent what is compressed, and sends it;
            the best first.

    Attributes:
        role: which end.
        limits: what this end accepts.
        closed: all has been sent and nothing more is read: the transport is to be closed.
    """

    __slots__ = (
        "_closing",
        "_draining",
        "_error",
        "_farewell",
        "_frames",
        "_half",
        "_liveness",
        "_pongs",
        "_told",
        "_wire",
        "closed",
        "limits",
        "role",
    )

    def __init__(
        self,
        role: Role | str,
        *,
        now: float,
        limits: Limits | None = None,
        clubbing: Clubbing | None = None,
        budget: Budget | None = None,
        compression: Sequence[Algorithm] = (),
    ) -> None:
        self.role = Role(role)
        self.closed = False
        limits = limits or Limits()
        self.limits = limits
        self._wire = wire = Wire(self.role, limits, now, budget, compression)
        self._liveness = Liveness(limits, now)
        self._closing = False
        self._draining = False  # GOAWAY is still to be sent
        self._farewell: list[Buffer] = []  # what is sent when closing
        self._error: RemoteProtocolError | None = None
        self._pongs = 0
        self._told: list[Event] = []  # events in the order from last to first
        self._half: Caller | Callee
        if self.role is Role.CLIENT:
            self._half = Caller(wire, clubbing or Clubbing())
            sender = Role.SERVER
        else:
            self._half = Callee(wire)
            sender = Role.CLIENT
        wire.outflow.clubs = self._half
        self._frames = FrameBuffer(sender, limits.max_frame, compressed=bool(compression))

    def __repr__(self) -> str:
        state = "closed" if self.closed else "closing" if self._closing else "open"
        return f"<Connection {self.role} {state}, {self.open_calls} calls>"

    # What the owner may look at.

    @property
    def peer(self) -> Settings:
        """What the other end accepts: the defaults until `SettingsReceived`."""
        return self._wire.peer

    @property
    def settled(self) -> bool:
        """Whether the peer's settings have come."""
        return self._liveness.settled

    @property
    def accepts_calls(self) -> bool:
        """Whether a client may submit calls."""
        return not self._closing and self._wire.sent_goaway is None is self._wire.got_goaway

    @property
    def drained(self) -> bool:
        """Whether one of the ends drains, and every call has ended and been sent."""
        wire = self._wire
        draining = wire.sent_goaway is not None or wire.got_goaway is not None
        return draining and not (wire.streams or self._half.waiting)

    @property
    def open_calls(self) -> int:
        """Calls that have been sent or received and aren't CLOSED."""
        return len(self._wire.streams)

    @property
    def rtt(self) -> float | None:
        """Seconds of a round trip, the least of the latest measurements; None before the first."""
        return self._liveness.rtt

    @property
    def send_window(self) -> int:
        """Bytes that the peer's credit for the connection still allows."""
        return self._wire.outflow.window.available

    @property
    def receive_window(self) -> int:
        """Bytes of the window that this end gives the connection."""
        return self._wire.inflow.window.size

    @property
    def saved_sent(self) -> int:
        """Bytes that needn't be sent, since payloads and messages were compressed."""
        compressor = self._wire.compressor
        return 0 if compressor is None else compressor.saved

    @property
    def saved_received(self) -> int:
        """Bytes that the peer needn't send, likewise, of what has been taken."""
        return self._wire.decompressor.saved

    @property
    def clubs_sent(self) -> int:
        """Frames of calls or replies sent."""
        return self._wire.clubs_sent

    @property
    def calls_clubbed(self) -> int:
        """Calls or replies that went out in a frame with others."""
        return self._wire.calls_clubbed

    @property
    def clubs(self) -> Mapping[str | frozenset[str], Sequence[int]]:
        """Frames of calls sent and the calls in them, by the methods that rode together.

        The key of a call that rode alone is its method; without a method is counted what came after
        `MAX_COMBINATIONS` others.
        """
        return self._wire.clubs

    def yields(self, now: float) -> bool:
        """Whether what waits to be sent should leave the link to others.

        It is bulk alone; or a club has gone ahead of data of a less urgent lane within
        `SHARED_TIME`.
        """
        outflow = self._wire.outflow
        return outflow.lanes.only_bulk or now - outflow.overtaken < SHARED_TIME

    @property
    def has_events(self) -> bool:
        """Whether `next_event` has something to tell, an error included."""
        return bool(self._told or self._wire.events) or self._error is not None

    def next_event(self) -> Event | None:
        """Return the next event, or None if there is none yet.

        Raises:
            RemoteProtocolError: the peer broke the protocol; all events before that were returned.
        """
        if not self._told and self._wire.events:
            # Turned round: off the end of a list, each is taken at once.
            self._told = self._wire.events[::-1]
            self._wire.events.clear()
        if self._told:
            return self._told.pop()
        if self._error is not None:
            # Each time without the traces of the times before, which would pile up.
            raise self._error.with_traceback(None)
        return None

    # Bytes and time.

    def receive_data(self, data: Buffer, now: float) -> None:
        """Take in bytes of the peer's; `next_event` tells what they mean.

        They must not change after this: what is large is kept as it lies there.
        """
        if self._closing or not data:
            return
        completed = False
        try:
            for frame in self._frames.feed(data):
                completed = True
                if not self._half.handle(frame, now):
                    self._handle(frame, now)
                if self._closing:  # the peer said that it closes; nothing after that counts
                    return
        except RemoteProtocolError as error:
            self._fail(error)
            return
        in_frame = self._frames.in_frame
        if self._liveness.heard(now, in_frame=in_frame, completed=completed):
            self.ping(now)

    @property
    def wants_to_send(self) -> bool:
        """Whether `data_to_send` has something to return."""
        if self._closing:
            return not self.closed
        wire = self._wire
        if wire.control or wire.outflow.lanes.waiting or wire.inflow.due:
            return True
        return self._draining and self._goaway_due

    def data_to_send(self, now: float, most: int = WRITE_SIZE) -> list[Buffer]:
        """Return buffers, about `most` bytes in all, to be written next and in their order."""
        wire = self._wire
        out: list[Buffer] = []
        if wire.framed:
            wire.framed.clear()
        if self._closing:
            self.closed = True
            out, self._farewell = self._farewell, out
            return out
        if self._draining and self._goaway_due:
            self._draining = False
            wire.goaway(CloseCode.NO_ERROR, "draining", self._last_accepted())
        if wire.control:
            out, wire.control = wire.control, out
            self._pongs = 0
        if wire.inflow.due:
            credits = wire.inflow.credits()
            for start in range(0, len(credits), frames.MAX_CREDITS):
                out.append(frames.encode_credits(credits[start : start + frames.MAX_CREDITS]))
        wire.outflow.send(out, most, now)
        return out

    @property
    def timed(self) -> bool:
        """Whether calls that ask for their times are in what `data_to_send` last returned."""
        return bool(self._wire.framed)

    def written(self, now: float) -> None:
        """Note, for calls that ask for their times, that the transport has taken all of it."""
        for times in self._wire.framed:
            times.done = now
        self._wire.framed.clear()

    def next_deadline(self) -> float | None:
        """Return when `handle_timer` is to be called; None if the connection is over."""
        if self._closing:
            return None
        deadline = self._liveness.deadline
        outflow, due = self._wire.outflow, self._half.deadline
        if outflow.stalled:
            deadline = min(deadline, outflow.stalled_since + self.limits.stall_timeout)
        return deadline if due is None else min(deadline, due)

    def handle_timer(self, now: float) -> None:
        """Do what is due at `now`."""
        if self._closing:
            return
        try:
            if self._liveness.expire(now):
                self.ping(now)
        except RemoteProtocolError as error:
            self._fail(error)
            return
        self._half.expire(now)
        for stream in self._wire.outflow.expire(now, self.limits.stall_timeout):
            if stream.final is None:
                self._wire.events.append(Stalled(stream))
            else:  # the handler has ended, so that the owner has nothing to end
                self._callee.give_up(stream)

    # The connection as a whole.

    def ping(self, now: float) -> int:
        """Ask for a sign of life; `PongReceived` tells of the answer to the id returned."""
        id = self._liveness.ping(now)
        self._wire.control.append(frames.frame(frames.PING, id=id))
        return id

    def drain(self) -> None:
        """Begin the end: no call after those that this end knows is made or accepted.

        `drained` tells when the others have ended.
        """
        if self._wire.sent_goaway is None and not self._closing:
            self._wire.sent_goaway = self._last_accepted()
            self._draining = True

    @property
    def _goaway_due(self) -> bool:
        # CALLS must not come after it: a client's waits for the calls that were submitted before.
        return self.role is Role.SERVER or not self._half.waiting

    def close(self, code: CloseCode = CloseCode.NO_ERROR, message: str = "") -> None:
        """End at once: GOAWAY is the last that is sent, all that waits is dropped."""
        if not self._closing:
            self._closing = True
            self._wire.goaway(code, message, self._last_accepted())
            self._farewell, self._wire.control = self._wire.control, []

    def _fail(self, error: RemoteProtocolError) -> None:
        """End since the peer broke the protocol, if this hasn't ended already."""
        if not self._closing:
            self._error = error
            self.close(error.code, str(error))

    def release(self) -> None:
        """Give the shared budget back what this connection took; for when its transport is gone."""
        self._wire.inflow.part()

    def _last_accepted(self) -> int:
        return 0 if self.role is Role.CLIENT else self._wire.last_id

    # The client's part.

    def call(self, stream: Stream, now: float) -> None:
        """Submit a call; it goes out with others as soon as there is room for it.

        Raises:
            LocalProtocolError: the connection takes no calls, or this one can't be sent.
        """
        self._caller.call(stream, now)

    def club(self, calls: Sequence[Stream], now: float) -> None:
        """Submit calls that go out in one frame and may refer to results of one another.

        Raises:
            LocalProtocolError: they can't be sent in one frame.
        """
        self._caller.club(calls, now)

    def reset(
        self, stream: Stream, now: float, code: int = Status.CANCELLED, message: str = ""
    ) -> None:
        """Abandon a call, wherever it stands: no reply will be told, what has come is dropped."""
        self._caller.reset(stream, code, message, now)

    def end(self, stream: Stream) -> None:
        """End what the client sends in a call that was made with `more`.

        Raises:
            LocalProtocolError: the stream has been ended, or nothing can be sent in it.
        """
        caller = self._caller
        self._check_sending(stream)
        caller.end(stream)

    def authenticate(self, token: str, metadata: Metadata = ()) -> None:
        """Say who the client is, for the calls that go out after this.

        Raises:
            LocalProtocolError: the token or the metadata are too large.
        """
        wire = self._caller.wire
        frames.check_outgoing_metadata(metadata, wire.peer.max_metadata)
        if len(token.encode()) > frames.MAX_TOKEN:
            raise LocalProtocolError(f"a token of more than {frames.MAX_TOKEN} bytes")
        wire.control.append(frames.encode_auth(token, metadata))

    # The server's part.

    def reply(
        self,
        stream: Stream,
        now: float,
        payload: bytes | None = None,
        outcome: Outcome | None = None,
        *,
        after_data: bool = False,
    ) -> None:
        """End a call: with a payload, or with an outcome that says more than OK.

        What waits to be sent in the stream goes first. If the call failed it is dropped instead,
        except with `after_data`. A call that was reset is answered CANCELLED, whatever is given
        here.

        Raises:
            LocalProtocolError: it has been replied to, or the outcome can't be sent.
        """
        callee = self._callee
        if self._closing:
            return  # nothing is sent, and no call that waited for this one may begin
        callee.reply(stream, payload, outcome, now, after_data=after_data)

    def send_metadata(self, stream: Stream, metadata: Metadata) -> None:
        """Send metadata ahead of the reply and of all data.

        Raises:
            LocalProtocolError: it is too late for that, or the metadata are too large.
        """
        self._callee.send_metadata(stream, metadata)

    # Data, both ways.

    def can_send(self, stream: Stream) -> bool:
        """Whether messages can still be queued in a stream."""
        ended = stream.outgoing is not None and stream.outgoing.ending
        if self._closing or ended or stream.final is not None or stream.abandoned:
            return False
        if self.role is Role.CLIENT:
            return stream.more and stream.state in (State.IDLE, State.OPEN)
        return stream.state in (State.OPEN, State.CALLED)

    def send(self, stream: Stream, message: Buffer) -> bool:
        """Queue one message. It isn't copied and must not change after this.

        Returns:
            whether there is room for more; if not, `Writable` tells when there is again.

        Raises:
            LocalProtocolError: nothing can be sent in this stream (any more).
        """
        self._check_sending(stream)
        outflow, compressor = self._wire.outflow, self._wire.compressor
        if compressor is not None and stream.compress:
            packed = compressor.compress(stream.method, message)
            message = message if packed is None else Compressed(packed)
        has_room = outflow.push(stream, message)
        if stream.id:
            outflow.offer(stream)
        return has_room

    def has_room(self, stream: Stream) -> bool:
        """Whether `send` would not return False for what is queued already."""
        return stream.outgoing is None or not stream.outgoing.congested

    def take(self, stream: Stream, now: float) -> bytes | None:
        """Take the next message of a stream; credit for it goes back to the peer.

        Returns:
            the message; or None, and then `Readable` or the reply tells when to ask again, unless
            `incoming` says that no more will come.

        Raises:
            RemoteProtocolError: the message is compressed wrongly, which ends the connection.
        """
        try:
            return self._wire.inflow.take(stream, now)
        except RemoteProtocolError as error:
            self._fail(error)
            raise

    def incoming(self, stream: Stream) -> Incoming:
        """Return what has come in a stream and hasn't been taken."""
        return self._wire.inflow.open(stream)

    def has_ended(self, stream: Stream) -> bool:
        """Whether nothing will come in a stream but what can be taken now."""
        if stream.incoming is not None and stream.incoming.ended:
            return True
        if self.role is Role.CLIENT:
            return stream.state in (State.RESET, State.CLOSED)
        return stream.state is not State.OPEN

    def _check_sending(self, stream: Stream) -> None:
        if not self.can_send(stream):
            raise LocalProtocolError(f"nothing can be sent in {stream!r}")

    @property
    def _caller(self) -> Caller:
        if not isinstance(self._half, Caller):
            raise LocalProtocolError("only a client can do this")
        return self._half

    @property
    def _callee(self) -> Callee:
        if not isinstance(self._half, Callee):
            raise LocalProtocolError("only a server can do this")
        return self._half

    # Frames that both roles receive; `Caller` and `Callee` have those that only one does.

    def _handle(self, frame: Frame, now: float) -> None:
        match frame.kind:
            case frames.CREDIT:
                self._wire.receive_credit(frame, now)
            case frames.PING:
                self._on_ping(frame, now)
            case frames.PONG:
                self._on_pong(frame, now)
            case frames.SETTINGS:
                self._on_settings(frame, now)
            case frames.GOAWAY:
                self._on_goaway(frame, now)
            case _:  # of the types that are ignored; others didn't get so far
                self._wire.patience.charge(now)

    def _on_settings(self, frame: Frame, now: float) -> None:
        wire = self._wire
        wire.settle(frames.decode_settings(frame.body))
        self._liveness.settled = True
        if self.role is Role.CLIENT:
            self._caller.offer()
        wire.events.append(SettingsReceived(wire.peer))
        self.ping(now)

    def _on_ping(self, frame: Frame, now: float) -> None:
        self._wire.patience.charge(now)
        self._pongs += 1
        if self._pongs > MAX_PONGS:
            raise RemoteProtocolError("PINGs without end, and no PONG is read", CloseCode.ABUSE)
        self._wire.control.append(frames.frame(frames.PONG, id=frame.id))

    def _on_pong(self, frame: Frame, now: float) -> None:
        sample = self._liveness.pong(frame.id, now)
        assert self._liveness.rtt is not None
        self._wire.inflow.measured(self._liveness.rtt)
        self._wire.events.append(PongReceived(frame.id, sample))

    def _on_goaway(self, frame: Frame, now: float) -> None:
        wire = self._wire
        number, message = frames.decode_reason(frame.body, "GOAWAY")
        code = CloseCode(number) if number <= max(CloseCode) else CloseCode.INTERNAL_ERROR
        wire.patience.charge(now)
        most = 0
        if self.role is Role.CLIENT:
            most = wire.last_id if wire.got_goaway is None else wire.got_goaway
        if frame.id > most:
            raise RemoteProtocolError(f"GOAWAY after call {frame.id}, which it can't know")
        wire.got_goaway = frame.id
        refused = self._caller.give_up(frame.id, now) if self.role is Role.CLIENT else []
        wire.events.append(GoAwayReceived(code, message, refused))
        if code != CloseCode.NO_ERROR:
            self.close()
