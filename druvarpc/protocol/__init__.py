"""The protocol without I/O: bytes in, events out, bytes to send out, time passed in."""

from druvarpc.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from druvarpc.protocol.clubs import Clubbing, Outcome
from druvarpc.protocol.compression import Algorithm
from druvarpc.protocol.connection import Connection
from druvarpc.protocol.events import (
    AuthReceived,
    CallsReceived,
    Event,
    GoAwayReceived,
    MetadataReceived,
    PongReceived,
    Readable,
    RepliesReceived,
    ResetReceived,
    SettingsReceived,
    Stalled,
    Writable,
)
from druvarpc.protocol.frames import Role, Settings
from druvarpc.protocol.lanes import Priority
from druvarpc.protocol.limits import Limits
from druvarpc.protocol.streams import Incoming, Reference, State, Stream
from druvarpc.protocol.times import Times
from druvarpc.protocol.windows import Budget

__all__ = [
    "Algorithm",
    "AuthReceived",
    "Budget",
    "CallsReceived",
    "Clubbing",
    "Connection",
    "Event",
    "GoAwayReceived",
    "Incoming",
    "Limits",
    "LocalProtocolError",
    "MetadataReceived",
    "Outcome",
    "PongReceived",
    "Priority",
    "ProtocolError",
    "Readable",
    "Reference",
    "RemoteProtocolError",
    "RepliesReceived",
    "ResetReceived",
    "Role",
    "Settings",
    "SettingsReceived",
    "Stalled",
    "State",
    "Stream",
    "Times",
    "Writable",
]
