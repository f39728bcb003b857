"""The call that a handler runs for, as the handler and the server's interceptors see it."""

import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from druvarpc.errors import LocalProtocolError
from druvarpc.interceptors import InterceptedCall
from druvarpc.protocol import State, Stream
from druvarpc.service import Method
from druvarpc.session import Session

__all__ = ["CurrentCall", "Place", "Served", "current", "current_call"]


class CurrentCall(InterceptedCall):
    """The call that a handler runs for.

    Attributes:
        identity: who the caller is, as `authenticate` of `serve` said; None without that.
        deadline: in trio's clock; infinite without one.
    """

    __slots__ = ("_arguments", "_session", "_stream", "_trailers", "identity")

    def __init__(self, stream: Stream, method: Method, identity: object, session: Session) -> None:
        super().__init__(method, math.inf if stream.deadline is None else stream.deadline)
        self.identity = identity
        self._stream = stream
        self._session = session
        self._arguments: tuple[Any, ...] | None = None
        self._trailers: dict[str, str | bytes] | None = None

    @property
    def peer(self) -> str:
        """The caller's address."""
        return self._session.transport.peer

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """What the caller sent along; of equal keys, the last."""
        return dict(self._stream.metadata)

    @property
    def metadata_pairs(self) -> Sequence[tuple[str, str | bytes]]:
        """The same, with equal keys."""
        return tuple(self._stream.metadata)

    @property
    def trailers(self) -> dict[str, str | bytes]:
        """Metadata that go with the reply, whatever the call's status; set what you like."""
        if self._trailers is None:
            self._trailers = {}
        return self._trailers

    @property
    def has_trailers(self) -> bool:
        """Whether there are any, so far."""
        return bool(self._trailers)

    def __repr__(self) -> str:
        return f"<CurrentCall {self.method} of {self.peer}>"

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments without the stream and without those left out, decoded when asked for.

        Raises:
            RpcError: INVALID_ARGUMENT, they don't fit their annotations.
            RuntimeError: no interceptor has asked for them, and the handler has taken them.
        """
        if self._arguments is None:
            payload = self._stream.payload
            if payload is None:
                raise RuntimeError(f"the handler of {self.method} has the arguments")
            self._arguments = tuple(self._method.decode_call(payload))
            self._stream.payload = None
        return self._arguments

    def send_metadata(self, metadata: Mapping[str, str | bytes]) -> None:
        """Send metadata ahead of the reply, and of all items: at most once.

        If the caller has gone away nothing is sent.

        Raises:
            LocalProtocolError: something has been sent in this call already, or the call has ended,
                or the metadata are more than the client takes.
        """
        session, stream = self._session, self._stream
        if session.ended or stream.state is State.RESET:
            return
        try:
            session.core.send_metadata(stream, tuple(metadata.items()))
        except LocalProtocolError as error:
            raise LocalProtocolError(f"{self.method}: {error}") from None
        session.flush()


class Served:
    """What the calls of one connection share.

    Args:
        session: the connection.

    Attributes:
        session: the connection.
        calls: those that somebody has asked for by `current_call`, until they end.
    """

    __slots__ = ("calls", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.calls: dict[Stream, CurrentCall] = {}

    def current(self, stream: Stream, method: Method, identity: object) -> CurrentCall:
        """Return the one `CurrentCall` of a call, for as long as the call lasts."""
        call = self.calls.get(stream)
        if call is None:
            call = CurrentCall(stream, method, identity, self.session)
            # A task may outlive the call that it was started for.
            if stream.token is not None:
                self.calls[stream] = call
        return call


# What `current_call` needs: little, for most handlers never ask.
Place = tuple[Served, Stream, Method, object]

current: ContextVar[Place] = ContextVar("druvarpc_current_call")


def current_call() -> CurrentCall:
    """Return the call that the running handler, or a task that it started, works for.

    Raises:
        LookupError: there is none.
    """
    try:
        served, stream, method, identity = current.get()
    except LookupError:
        raise LookupError("no handler of a call is running here") from None
    return served.current(stream, method, identity)
