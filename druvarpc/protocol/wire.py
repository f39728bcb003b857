"""What both halves of a connection stand on: streams, data, credit, control frames.

`Caller` (the client's half) and `Callee` (the server's) each hold a `Wire` and know nothing of the
other; `Connection` holds all three.
"""

from collections.abc import Sequence
from typing import Final

from druvarpc.errors import CloseCode, RemoteProtocolError
from druvarpc.protocol import frames
from druvarpc.protocol.buffer import Frame
from druvarpc.protocol.compression import Algorithm, Compressor, Decompressor, best_of
from druvarpc.protocol.events import Event
from druvarpc.protocol.frames import END_MESSAGE, END_STREAM, FRAME_COST, Buffer, Role, Settings
from druvarpc.protocol.inflow import Inflow
from druvarpc.protocol.limits import Limits, Patience
from druvarpc.protocol.outflow import Outflow
from druvarpc.protocol.streams import Input, State, Stream
from druvarpc.protocol.times import Times
from druvarpc.protocol.windows import Budget

# Where a side may still send, and so has a use for credit, and where it may receive.
_DIRECTIONS: Final = {
    Role.CLIENT: (
        frozenset({State.OPEN}),
        frozenset({State.IDLE, State.OPEN, State.CALLED}),
    ),
    Role.SERVER: (frozenset({State.OPEN, State.CALLED}), frozenset({State.OPEN})),
}
# A club stays below the least `max_frame`, with room for the head of the array.
MAX_CLUB: Final = 64 * 1024 - 16


class Wire:
    """The state that both halves share.

    Attributes:
        limits: what this end accepts.
        accepted: the same as the peer was told it.
        peer: what the other end accepts: the defaults until its SETTINGS have come.
        events: for the owner.
        control: frames that go out before everything else.
        streams: calls that the wire knows of and that aren't CLOSED, by id.
        last_id: the last id that was used.
        sent_goaway: the id in the GOAWAY that this end sent, None before that.
        got_goaway: the id in the one that has come, None before that.
        clubs_sent: CALLS or REPLIES frames sent.
        calls_clubbed: calls or replies that went out in a frame with others.
        clubs: CALLS frames sent and the calls in them, by the methods in the frame: a name for one
            call alone, and no method for all that came after `MAX_COMBINATIONS`.
        framed: the times of calls whose frames the last `data_to_send` returned.
        compressor: for what this end sends; None as long as the peer hasn't said that it takes it.
        decompressor: for what it receives.
    """

    __slots__ = (
        "_algorithms",
        "_crossed",
        "_sending",
        "accepted",
        "calls_clubbed",
        "clubs",
        "clubs_sent",
        "compressor",
        "control",
        "decompressor",
        "events",
        "framed",
        "got_goaway",
        "inflow",
        "last_id",
        "limits",
        "outflow",
        "patience",
        "peer",
        "sent_goaway",
        "streams",
    )

    def __init__(
        self,
        role: Role,
        limits: Limits,
        now: float,
        budget: Budget | None,
        algorithms: Sequence[Algorithm],
    ) -> None:
        self._sending, receiving = _DIRECTIONS[role]
        self.limits = limits
        self._algorithms = algorithms
        self.compressor: Compressor | None = None
        self.decompressor = Decompressor(algorithms)
        self.accepted = limits.settings(self.decompressor.accepts)
        self.peer = Settings()
        self.events: list[Event] = []
        self.control: list[Buffer] = [frames.PREFACE, frames.encode_settings(self.accepted)]
        self.streams: dict[int, Stream] = {}
        self.last_id = 0
        self.sent_goaway: int | None = None
        self.got_goaway: int | None = None
        self.clubs_sent = 0
        self.calls_clubbed = 0
        self.clubs: dict[str | frozenset[str], list[int]] = {}
        self.framed: list[Times] = []
        self._crossed = 0
        self.patience = Patience(now)
        self.inflow = Inflow(limits, receiving, budget, self.decompressor)
        self.outflow = Outflow(self.peer.connection_window, self.events)

    def settle(self, peer: Settings) -> None:
        """Note what the other end accepts."""
        before, self.peer = self.peer, peer
        self.compressor = best_of(self._algorithms, peer.compression)
        self.outflow.settle(
            peer.connection_window - before.connection_window,
            peer.stream_window,
            self.streams.values(),
        )

    def compress(self, call: Stream) -> None:
        """Compress the payload of a call that is submitted, if that is worth it."""
        payload = call.payload
        if self.compressor is not None and payload is not None and call.compress:
            call.packed = self.compressor.compress(call.method, payload)

    def move(self, stream: Stream, what: Input) -> None:
        """Move a stream by what the peer sent; forget it when it is CLOSED."""
        before = stream.state
        if not stream.move(what):
            raise RemoteProtocolError(f"{what.name} for call {stream.id}, which is {before.name}")
        if stream.state is State.CLOSED:
            self.streams.pop(stream.id, None)

    def moved(self, stream: Stream, what: Input) -> None:
        """Move a stream by what this side sent; forget it when it is CLOSED."""
        allowed = stream.move(what)
        assert allowed, f"this side sent {what.name} in {stream.state.name}"
        if stream.state is State.CLOSED:
            self.streams.pop(stream.id, None)

    def goaway(self, code: int, message: str, last: int) -> None:
        """Send GOAWAY."""
        if self.sent_goaway is None:
            self.sent_goaway = last
        self.control.append(frames.encode_reason(frames.GOAWAY, code, message, id=self.sent_goaway))

    def receive_data(self, stream: Stream, frame: Frame, what: Input, now: float) -> bool:
        """Count and keep a DATA frame of a stream.

        Returns:
            whether the application, waiting for a message, has something to look at now.
        """
        flags = frame.flags & (END_MESSAGE | END_STREAM)
        # A reply that waits behind data has closed this direction as one that has gone.
        discarding = stream.state in (State.REPLIED, State.RESET) or stream.final is not None
        self.move(stream, what)
        if not frame.size and not flags:
            raise RemoteProtocolError(f"DATA for call {frame.id}: nothing in it")
        cost = data_cost(frame)
        self.inflow.window.receive(cost)
        incoming = self.inflow.open(stream)
        incoming.window.receive(cost)
        incoming.started = True
        if discarding:
            self.inflow.discard(cost, now)
            return False
        readable = bool(cost) and self.inflow.receive(stream, frame, cost, now)
        if flags & END_STREAM:
            if incoming.unfinished:
                raise RemoteProtocolError(f"END of call {frame.id} within a message")
            readable = readable or incoming.wanted
            self.inflow.end(stream, now)
        return readable

    def receive_credit(self, frame: Frame, now: float) -> None:
        """Add what a CREDIT gives."""
        for id, size in frames.decode_credits(frame.body):
            if size < 1024:
                self.patience.charge(now)
            if not id:
                self.outflow.grant(None, size)
                continue
            if id > self.last_id:
                raise RemoteProtocolError(
                    f"CREDIT for call {id}, which was never opened", CloseCode.FLOW_CONTROL_ERROR
                )
            stream = self.streams.get(id)
            if stream is not None and stream.state in self._sending:
                self.outflow.grant(stream, size)
            elif size >= 1024:
                # It may have crossed our last DATA: of such there are no more than DATA frames.
                self._crossed += 1
                if self._crossed > self.outflow.frames_sent:
                    self.patience.charge(now)


def data_cost(frame: Frame) -> int:
    """Return the credit that a DATA frame takes."""
    if frame.size or frame.flags & END_MESSAGE:
        return frame.size + FRAME_COST
    return 0
