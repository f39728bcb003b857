"""What the core tells its owner."""

from dataclasses import dataclass, field

from druvarpc.errors import CloseCode, Status
from druvarpc.protocol.clubs import Outcome
from druvarpc.protocol.frames import Metadata, Settings
from druvarpc.protocol.streams import Stream


@dataclass(slots=True)
class SettingsReceived:
    """The handshake is complete; `settings` is what the peer accepts."""

    settings: Settings


@dataclass(slots=True)
class CallsReceived:
    """Calls are ready to run: those that came together and have all their arguments."""

    calls: list[Stream]


@dataclass(slots=True)
class RepliesReceived:
    """Calls have ended: each with its payload and, if the reply says more than OK, its outcome.

    A payload of None means that the result is the stream's last message, or that there is none.
    """

    replies: list[tuple[Stream, bytes | None, Outcome | None]]


@dataclass(slots=True)
class Readable:
    """A stream that `Connection.take` found empty has a message, has ended, or is too long."""

    stream: Stream


@dataclass(slots=True)
class Writable:
    """A stream for which `Connection.send` returned False has room again."""

    stream: Stream


@dataclass(slots=True)
class ResetReceived:
    """The caller has abandoned a call; the handler must be stopped and then the call replied to."""

    stream: Stream
    code: Status
    message: str


@dataclass(slots=True)
class MetadataReceived:
    """The server sent metadata ahead of its reply."""

    stream: Stream
    metadata: Metadata


@dataclass(slots=True)
class Stalled:
    """The peer gave a stream no credit for too long; the owner ends the call."""

    stream: Stream


@dataclass(slots=True)
class AuthReceived:
    """The client says who it is, for the calls that come after this: it is their `Stream.token`.

    Attributes:
        answer: the owner's own, what it makes of this; the core never looks at it.
    """

    token: str = field(repr=False)
    metadata: Metadata = field(repr=False)
    answer: object = field(default=None, compare=False, repr=False)


@dataclass(slots=True)
class PongReceived:
    """The PING that `Connection.ping` gave this id was answered after `rtt` seconds."""

    id: int
    rtt: float


@dataclass(slots=True)
class GoAwayReceived:
    """The peer ends the connection; `refused` are the calls that it has not and won't begin.

    With another code than NO_ERROR this end closes too.
    """

    code: CloseCode
    message: str
    refused: list[Stream]


Event = (
    SettingsReceived
    | CallsReceived
    | RepliesReceived
    | Readable
    | Writable
    | ResetReceived
    | MetadataReceived
    | Stalled
    | AuthReceived
    | PongReceived
    | GoAwayReceived
)
