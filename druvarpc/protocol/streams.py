"""The state of one call: a table of transitions, and what is queued in each direction.

`TRANSITIONS` is the table of docs/protocol.md, section 6, and holds on both sides: an input is what
travels, and by the side that sends it the same row is right or wrong for both.
"""

from collections import deque
from enum import Enum, auto
from typing import Final, NamedTuple

from druvarpc.protocol.compression import Compressed
from druvarpc.protocol.frames import COMPRESSED, END_MESSAGE, FRAME_COST, Buffer, Metadata
from druvarpc.protocol.lanes import Priority
from druvarpc.protocol.times import Times
from druvarpc.protocol.windows import ReceiveWindow, SendWindow


class State(Enum):
    """Where a call stands."""

    IDLE = auto()
    OPEN = auto()
    CALLED = auto()
    REPLIED = auto()
    RESET = auto()
    CLOSED = auto()

    # Enum's own hashes the name, in Python, and the table is looked up several times a call.
    __hash__ = object.__hash__


class Input(Enum):
    """What moves a call on; UP is sent by the client, DOWN by the server."""

    CALL = auto()
    CALL_MORE = auto()
    DATA_UP = auto()
    END_UP = auto()
    RESET_UP = auto()
    METADATA_DOWN = auto()
    DATA_DOWN = auto()
    REPLY_DOWN = auto()

    __hash__ = object.__hash__


# What is absent is illegal.
TRANSITIONS: Final = {
    (State.IDLE, Input.CALL): State.CALLED,
    (State.IDLE, Input.CALL_MORE): State.OPEN,
    (State.OPEN, Input.DATA_UP): State.OPEN,
    (State.OPEN, Input.END_UP): State.CALLED,
    (State.OPEN, Input.RESET_UP): State.RESET,
    (State.OPEN, Input.METADATA_DOWN): State.OPEN,
    (State.OPEN, Input.DATA_DOWN): State.OPEN,
    (State.OPEN, Input.REPLY_DOWN): State.REPLIED,
    (State.CALLED, Input.RESET_UP): State.RESET,
    (State.CALLED, Input.METADATA_DOWN): State.CALLED,
    (State.CALLED, Input.DATA_DOWN): State.CALLED,
    (State.CALLED, Input.REPLY_DOWN): State.CLOSED,
    (State.REPLIED, Input.DATA_UP): State.REPLIED,
    (State.REPLIED, Input.END_UP): State.CLOSED,
    (State.REPLIED, Input.RESET_UP): State.CLOSED,
    (State.RESET, Input.METADATA_DOWN): State.RESET,
    (State.RESET, Input.DATA_DOWN): State.RESET,
    (State.RESET, Input.REPLY_DOWN): State.CLOSED,
    (State.CLOSED, Input.RESET_UP): State.CLOSED,
}


class Backlog:
    """What the messages that wait in all streams of a connection take, in bytes."""

    __slots__ = ("queued",)

    def __init__(self) -> None:
        self.queued = 0


class Outgoing:
    """One direction of a stream, seen from its sender: messages that wait for their turn.

    Args:
        window: initial credit, in bytes.
        backlog: where to count what waits, too.

    Attributes:
        window: credit of the stream.
        queued: what the messages that wait take, in bytes; none is so small that it takes nothing.
        ending: nothing more will be queued; END goes out with or behind the last message.
        granted: credit has come: the peer consumes what was sent.
        blocked: when credit ran out, or when that was last complained of, or None.
        waiting: in the lanes, or kept out of them by lack of credit.
        congested: the owner was told to wait.
        left: bytes of this turn in the lane, below 0 what was taken beyond the last one.
        started: something was sent or queued, so that it's too late for METADATA.
    """

    __slots__ = (
        "_backlog",
        "_unblocked",
        "blocked",
        "congested",
        "ending",
        "granted",
        "left",
        "messages",
        "offset",
        "queued",
        "started",
        "waiting",
        "window",
    )

    def __init__(self, window: int, backlog: Backlog) -> None:
        self._backlog = backlog
        self.window = SendWindow(window)
        self.messages: deque[Buffer] = deque()
        self.offset = 0
        self.queued = 0
        self.ending = False
        self.granted = False
        self.blocked: float | None = None
        self._unblocked = 0.0  # seconds of the waits for credit that are over
        self.waiting = False
        self.congested = False
        self.left = 0
        self.started = False

    @property
    def first(self) -> int:
        """Bytes of the first message that are still to go."""
        return len(self.messages[0]) - self.offset

    def unblock(self, now: float) -> None:
        """End the wait for credit."""
        self._unblocked = self.lacked_credit(now)
        self.blocked = None

    def lacked_credit(self, now: float) -> float:
        """Return the seconds in which messages waited for credit."""
        return self._unblocked + (0.0 if self.blocked is None else max(0.0, now - self.blocked))

    def push(self, message: Buffer) -> None:
        """Queue one message."""
        self.messages.append(message)
        self._count(len(message) + FRAME_COST)
        self.started = True

    def push_first(self, message: Buffer) -> None:
        """Queue one message ahead of the others."""
        self.push(message)
        self.messages.rotate(1)

    def cut(self, most: int) -> tuple[Buffer, int]:
        """Take at most `most` bytes of the first message; return them and their frame's flags."""
        message = self.messages[0]
        start, size = self.offset, self.first
        if size <= most:
            self.messages.popleft()
            self.offset = 0
            self._count(-size - FRAME_COST)
            flags = END_MESSAGE if type(message) is not Compressed else END_MESSAGE | COMPRESSED
            return (memoryview(message)[start:] if start else message), flags
        self.offset += most
        self._count(-most)
        return memoryview(message)[start : self.offset], 0

    def drop(self) -> None:
        """Forget all that waits."""
        self.messages.clear()
        self._count(-self.queued)
        self.ending = False

    def _count(self, size: int) -> None:
        self.queued += size
        self._backlog.queued += size


class Incoming:
    """One direction of a stream, seen from its receiver: messages, and the one that is arriving.

    What a DATA frame costs is given back in two places, the connection's window and the stream's.
    Of the unfinished message, `cost` is what its frames cost, `returned` what the connection's
    window got back of it already, `advanced` what the stream's window got, out of the budget.

    Attributes:
        messages: complete ones with what is still to give back for them: to the connection, to the
            stream, to the budget; and whether they are compressed, which they stay until they are
            taken, so that they take no more memory than they cost credit.
        wanted: the application waits for the message that is arriving.
        too_long: the message that is arriving passed the limit; the rest of the stream is dropped.
        ended: no message comes after those that are queued.
        started: DATA or METADATA have come.
        unread: the call waits for others, so that nothing of this may keep the connection's window
            from them.
    """

    __slots__ = (
        "advanced",
        "cost",
        "ended",
        "messages",
        "parts",
        "returned",
        "size",
        "started",
        "too_long",
        "unread",
        "wanted",
        "window",
    )

    def __init__(self, window: ReceiveWindow) -> None:
        self.window = window
        self.messages: deque[tuple[bytes, int, int, int, bool]] = deque()
        self.parts: list[Buffer] = []
        self.size = 0
        self.cost = 0
        self.returned = 0
        self.advanced = 0
        self.wanted = True
        self.too_long = False
        self.ended = False
        self.started = False
        self.unread = False

    @property
    def unfinished(self) -> bool:
        """Whether a message has begun to arrive and isn't complete."""
        return self.cost > 0

    def finish(self, *, compressed: bool) -> None:
        """Make the message that has arrived one of the complete ones."""
        whole = bytes(self.parts[0]) if len(self.parts) == 1 else b"".join(self.parts)
        owed = self.cost - self.returned, self.cost - self.advanced, self.advanced
        self.messages.append((whole, *owed, compressed))
        self.parts = []
        self.size = self.cost = self.returned = self.advanced = 0
        self.wanted = False

    def drop_unfinished(self) -> tuple[int, int]:
        """Forget what arrives; return what the connection and the budget are owed for it."""
        owed = self.cost - self.returned, self.advanced
        self.parts = []
        self.size = self.cost = self.returned = self.advanced = 0
        return owed

    def drop(self) -> tuple[int, int]:
        """Forget complete messages; return what the connection and the budget are owed for them."""
        owed = sum(message[1] for message in self.messages), sum(m[3] for m in self.messages)
        self.messages.clear()
        return owed


class Reference(NamedTuple):
    """An argument that is the result of another call of the club, or a part of it.

    Attributes:
        position: the argument's index.
        call: the index of the other call in the club.
        path: the way into its result: keys of maps and indices of arrays.
    """

    position: int
    call: int
    path: tuple[str | int, ...] = ()


class Stream:
    """One call, on either side.

    The client makes one and submits it to its `Connection`; the server gets one by an event.

    Args:
        method: "Service.method".
        payload: the arguments, MessagePack; None on the server while they are still arriving.
        more: the client will send data, and end them.
        lane: the priority of both directions.
        deadline: when the caller stops waiting, in the clock of `now`; None for never.
        metadata: what goes with the call.
        timings: the caller asks where the call's time goes.
        compress: what is sent for it may be compressed.
        references: arguments that are results of other calls of the club.
        token: the owner's own; the core never looks at it. Of a call on the server it is at first
            the `AuthReceived` that the call came after, if there was one.

    Attributes:
        id: its number in the connection; 0 until the call has been sent.
        state: where it stands.
        packed: the compressed form in which the client sends the payload, None for as it is.
        times: once it is submitted or has come, if the caller asks for timings. The server's owner
            notes there when the handler begins and is idle, the client's when the caller is.
    """

    __slots__ = (
        "abandoned",
        "club",
        "compress",
        "deadline",
        "final",
        "id",
        "incoming",
        "inline",
        "lane",
        "metadata",
        "method",
        "more",
        "outgoing",
        "packed",
        "payload",
        "references",
        "state",
        "times",
        "timings",
        "token",
    )

    def __init__(
        self,
        method: str,
        payload: bytes | None,
        *,
        more: bool = False,
        lane: Priority = Priority.NORMAL,
        deadline: float | None = None,
        metadata: Metadata = (),
        timings: bool = False,
        compress: bool = True,
        references: tuple[Reference, ...] = (),
        token: object = None,
    ) -> None:
        self.id = 0
        self.state = State.IDLE
        self.method = method
        self.payload = payload
        self.more = more
        self.lane = lane
        self.deadline = deadline
        self.metadata = metadata
        self.timings = timings
        self.compress = compress
        self.packed: bytes | None = None
        self.times: Times | None = None
        self.references = references
        self.token = token
        self.outgoing: Outgoing | None = None
        self.incoming: Incoming | None = None
        # Client: the payload goes inside CALLS; reset before it was sent, but bound to a club.
        self.inline = True
        self.abandoned = False
        # Server: the reply, while data go before it; the club, if calls of it refer to others.
        self.final: list[object] | None = None
        self.club: Club | None = None

    def __repr__(self) -> str:
        return f"<Stream {self.id} {self.method} {self.state.name}>"

    def move(self, what: Input) -> bool:
        """Go on to the state that the table says; False if it says none."""
        state = TRANSITIONS.get((self.state, what))
        if state is None:
            return False
        self.state = state
        return True


class Club:
    """The calls of one frame on the server, as long as some wait for results of others.

    Attributes:
        first: the id of the first.
        results: those that were waited for and have come, by index.
        waiting: for each index, the calls that wait for its result.
        allowance: bytes of results that may still be decoded for arguments.
    """

    __slots__ = ("allowance", "first", "results", "waiting")

    def __init__(self, first: int, calls: list[Stream], allowance: int) -> None:
        self.first = first
        self.allowance = allowance
        self.results: dict[int, bytes] = {}
        self.waiting: dict[int, list[Stream]] = {}
        for call in calls:
            for index in {reference.call for reference in call.references}:
                self.waiting.setdefault(index, []).append(call)
                call.club = calls[index].club = self
