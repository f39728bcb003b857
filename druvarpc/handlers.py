"""Handlers: where they are found, what they run in, and what their errors mean to the caller."""

import logging
import math
import types
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Mapping,
    Sequence,
)
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import msgspec

from druvarpc.errors import RpcError, Status
from druvarpc.pipe import Pipe
from druvarpc.protocol import Outcome, Stream
from druvarpc.service import Method, Service, implementation_of, methods_of

logger = logging.getLogger("druvarpc")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CurrentCall:
    """The call that a handler runs for.

    Attributes:
        method: "Service.method".
        peer: the caller's address.
        identity: who the caller is; None without authentication.
        metadata: what the caller sent along; of equal keys, the last.
        deadline: in trio's clock; infinite without one.
    """

    method: str
    peer: str
    identity: object
    metadata: Mapping[str, str | bytes]
    deadline: float


_current: ContextVar[tuple[Stream, str]] = ContextVar("druvarpc_current_call")


def current_call() -> CurrentCall:
    """Return the call that the running handler, or a task that it started, works for.

    Raises:
        LookupError: there is none.
    """
    try:
        call, peer = _current.get()
    except LookupError:
        raise LookupError("no handler of a call is running here") from None
    return CurrentCall(
        method=call.method,
        peer=peer,
        identity=None,
        metadata=dict(call.metadata),
        deadline=math.inf if call.deadline is None else call.deadline,
    )


class Run(Generic[T]):
    """A coroutine that runs in a context of its own, in which `call` is the current call.

    Its first step is taken without awaiting, so that a handler that doesn't block costs no more.
    """

    __slots__ = ("_context", "_coroutine", "_trap")

    def __init__(self, call: Stream, peer: str, coroutine: Coroutine[Any, Any, T]) -> None:
        self._context = copy_context()
        self._context.run(_current.set, (call, peer))
        self._coroutine = coroutine

    def start(self) -> None:
        """Run until the coroutine blocks; the rest is done by `finish`, in the same task.

        Raises:
            StopIteration: it has ended, with this value.
        """
        self._trap = self._context.run(self._coroutine.send, None)

    @types.coroutine
    def finish(self) -> Generator[Any, Any, T]:
        """Await the rest of a coroutine that has blocked."""
        run, coroutine, trap = self._context.run, self._coroutine, self._trap
        try:
            while True:
                try:
                    value = yield trap
                except BaseException as error:
                    trap = run(coroutine.throw, error)
                else:
                    trap = run(coroutine.send, value)
        except StopIteration as stop:
            result: T = stop.value
            return result


@dataclass(frozen=True, slots=True)
class Entry:
    """What answers a method: its row, and the bound function, None if it isn't implemented."""

    method: Method
    handler: Callable[..., Any] | None


def dispatch_table(services: Sequence[Service]) -> dict[str, Entry]:
    """Return the methods of services by their names on the wire.

    Raises:
        TypeError: one of them is no service.
        ValueError: two have a method of the same name.
    """
    table: dict[str, Entry] = {}
    for service in services:
        kind: type = type(service)
        if not issubclass(kind, Service):
            raise TypeError(f"{service!r} is not a druvarpc.Service")
        for method in methods_of(kind).values():
            if method.name in table:
                raise ValueError(f"two services have the method {method.name}")
            table[method.name] = Entry(method, implementation_of(service, method))
    return table


class Requests(AsyncIterator[Any]):
    """The stream that a handler receives."""

    def __init__(self, method: Method, pipe: Pipe) -> None:
        self._method = method
        self._pipe = pipe

    async def __anext__(self) -> Any:
        message = await self._pipe.receive()
        if message is None:
            raise StopAsyncIteration
        return self._method.decode_request(message)


def failure_of(method: str, error: Exception, max_details: int) -> Outcome:
    """Return what the caller is told of a handler's exception.

    That is an `RpcError` as it is, except that a handler which ran can't have been "not started",
    whatever a call of its own says. Of any other exception the caller learns nothing; it is logged.
    """
    found = _rpc_error(error)
    if found is not None:
        try:
            # A class derived from RpcError may have left out what its base sets, or changed it.
            status, message = Status(found.status), str(found.message)
            if status is not Status.OK:
                return Outcome(status, message, _encode_details(method, found.details, max_details))
        except Exception as malformed:
            error = malformed
    logger.error("%s: the handler failed", method, exc_info=error)
    return Outcome(Status.INTERNAL, "the server failed")


def _rpc_error(error: BaseException) -> RpcError | None:
    """Return the RpcError that `error` is, or is alone in: nurseries wrap what they let through."""
    while isinstance(error, BaseExceptionGroup):
        first, *others = cast("BaseExceptionGroup[BaseException]", error).exceptions
        if others:
            return None
        error = first
    return error if isinstance(error, RpcError) else None


def _encode_details(method: str, details: object, most: int) -> bytes | None:
    """Return details as they travel; None, after a line in the log, for those that can't."""
    if details is None:
        return None
    try:
        encoded = msgspec.msgpack.encode(details)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        logger.error("%s: an error's details can't be sent: %s", method, error)  # noqa: TRY400 - likewise
        return None
    if len(encoded) > most:
        logger.error("%s: an error's details of more than %d bytes can't be sent", method, most)
        return None
    return encoded
