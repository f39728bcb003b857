"""The exceptions of druvarpc and the status codes that calls end with.

Two families: `RpcError` is how one call failed, `ProtocolError` is how a connection failed. What
the peer did wrong (`RemoteProtocolError`) is told apart from what the caller of this library did
wrong (`LocalProtocolError`).
"""

import math
from collections.abc import Mapping
from enum import IntEnum, unique
from typing import Final, TypeVar, cast

import msgspec

__all__ = [
    "RETRY_AFTER",
    "CircuitOpen",
    "CloseCode",
    "ConnectionLost",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "RpcError",
    "Status",
]

# The key of an error's details that says how many seconds its caller is asked to wait.
RETRY_AFTER: Final = "retry_after"

T = TypeVar("T")


@unique
class Status(IntEnum):
    """How a call ended: gRPC's canonical codes, names and numbers."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


@unique
class CloseCode(IntEnum):
    """Why a connection ends; travels in GOAWAY (docs/protocol.md, "Codes")."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 2
    FRAME_TOO_LARGE = 3
    ABUSE = 4
    TIMEOUT = 5
    INTERNAL_ERROR = 6
    VERSION_MISMATCH = 7
    UNAUTHENTICATED = 8


class RpcError(Exception):
    """A call that failed. A handler raises it to send exactly this to its caller.

    Args:
        status: why; never `Status.OK`.
        message: one line for people.
        details: a value that MessagePack can carry, for programs; `details_as` types it.
        trailers: metadata that go with the error.

    Attributes:
        not_started: the server is known not to have begun the call, so that any call, idempotent
            or not, may be sent again.
    """

    def __init__(
        self,
        status: Status,
        message: str = "",
        details: object = None,
        *,
        not_started: bool = False,
        trailers: Mapping[str, str | bytes] | None = None,
    ) -> None:
        if status == Status.OK:
            raise ValueError("an RpcError can't have the status OK")
        message = str(message)  # of an exception, say, which is soon given here by mistake
        super().__init__(status, message, details)
        self.status = Status(status)
        self.message = message
        self.details = details
        self.not_started = not_started
        self.trailers: dict[str, str | bytes] = dict(trailers or {})

    def details_as(self, kind: type[T]) -> T:
        """Return the details as a value of a type: a dataclass, a list of them, an enum...

        What has come from a server is made of builtins; here it is checked and converted, as
        arguments and results are.

        Raises:
            ValueError: the details are no such value.
            TypeError: `kind` is no type that details can have.
        """
        if type(self.details) is kind:
            return self.details
        try:
            return msgspec.convert(self.details, kind)
        except msgspec.ValidationError as error:
            raise ValueError(f"the details of {self!s}: {error}") from None

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to be left alone: `details["retry_after"]`, None without.

        A handler asks for it by `details={"retry_after": seconds}`. What is no such number, or
        negative, is ignored.
        """
        details = self.details
        if not isinstance(details, Mapping):
            return None
        seconds = cast("Mapping[object, object]", details).get(RETRY_AFTER)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            return None
        try:
            seconds = float(seconds)
        except OverflowError:  # an int that no float is as large as
            return None
        return seconds if 0 <= seconds < math.inf else None

    def __str__(self) -> str:
        return f"{self.status.name}: {self.message}" if self.message else self.status.name


def rpc_error_in(error: BaseException) -> RpcError | None:
    """Return the RpcError that `error` is, or is alone in: nurseries wrap what they let through."""
    while isinstance(error, BaseExceptionGroup):
        first, *others = cast("BaseExceptionGroup[BaseException]", error).exceptions
        if others:
            return None
        error = first
    return error if isinstance(error, RpcError) else None


def cancelled_part(group: BaseExceptionGroup) -> BaseException:
    """Return what of a group is no Exception: mostly Cancelled, in a task that others left behind.

    What its own tasks raised beside that nobody waits for any more.
    """
    rest = group.split(Exception)[1]
    assert rest is not None, "a group of Exceptions alone is one itself"
    return rest


class ConnectionLost(RpcError):
    """The connection went away before the call had ended; its status is UNAVAILABLE."""

    def __init__(self, message: str = "connection lost", *, not_started: bool = False) -> None:
        super().__init__(Status.UNAVAILABLE, message, not_started=not_started)


class CircuitOpen(RpcError):
    """Calls to the server fail, so this one wasn't made (`Breaker`); its status is UNAVAILABLE.

    Its `retry_after` says when it is tried again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(Status.UNAVAILABLE, message, {RETRY_AFTER: retry_after}, not_started=True)


class ProtocolError(Exception):
    """The rules of the protocol were broken."""


class LocalProtocolError(ProtocolError):
    """This side asked the protocol core for something that its state doesn't allow."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol; the connection is over.

    Attributes:
        code: what is told to the peer in GOAWAY.
    """

    def __init__(self, message: str, code: CloseCode = CloseCode.PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code
