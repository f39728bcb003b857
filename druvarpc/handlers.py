"""Handlers: where they are found, what they run in, and what their errors mean to the caller."""

import logging
import types
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import msgspec

from druvarpc.authorization import predicates_of, require
from druvarpc.current import CurrentCall, Place, current
from druvarpc.errors import RpcError, Status, rpc_error_in
from druvarpc.interceptors import Once, Proceed
from druvarpc.pipe import Pipe
from druvarpc.protocol import Outcome
from druvarpc.service import Cardinality, Method, Service, implementation_of, methods_of

logger = logging.getLogger("druvarpc")

ServerInterceptor = Callable[[CurrentCall, Proceed], Awaitable[Any]]

T = TypeVar("T")


class Run(Generic[T]):
    """A coroutine that runs in a context of its own, in which `current_call` finds its call.

    Its first step is taken without awaiting, so that a handler that doesn't block costs no more.
    """

    __slots__ = ("_context", "_coroutine", "_trap")

    def __init__(self, place: Place, coroutine: Coroutine[Any, Any, T]) -> None:
        self._context = copy_context()
        self._context.run(current.set, place)
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
    """What answers a method.

    Attributes:
        method: its row.
        handler: the bound function, None if it isn't implemented.
        interceptors: what runs around it, the outermost first.
    """

    method: Method
    handler: Callable[..., Any] | None
    interceptors: Sequence[ServerInterceptor] = ()


def dispatch_table(
    services: Sequence[Service], interceptors: Sequence[ServerInterceptor] = ()
) -> dict[str, Entry]:
    """Return the methods of services by their names on the wire.

    What `authorize` demands of a method is asked within the interceptors.

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
            around = list(interceptors)
            predicates = predicates_of(service, method.attribute)
            if predicates:
                around.append(require(predicates))
            table[method.name] = Entry(method, implementation_of(service, method), tuple(around))
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


class Attempts:
    """A call within interceptors, which may attempt it several times.

    Args:
        entry: what answers it.
        call: the call.
        pipe: returns its data, if it streams.
    """

    def __init__(self, entry: Entry, call: CurrentCall, pipe: Callable[[], Pipe]) -> None:
        self._entry = entry
        self._call = call
        self._pipe = pipe
        self._requests: Once | None = None
        self._sent = False
        self._failure: Exception | None = None

    async def proceed(self) -> Any:
        """Run the handler; return its result, None if it is a stream, which has been sent.

        What has gone to the caller can't be taken back, nor what has come from there be had once
        more: an attempt after that raises what the one before did.
        """
        begun = self._sent or (self._requests is not None and self._requests.begun)
        if self._failure is not None and begun:
            raise self._failure
        try:
            return await self._attempt()
        except Exception as error:
            self._failure = error
            raise

    async def _attempt(self) -> Any:
        method, call, handler = self._entry.method, self._call, self._entry.handler
        assert handler is not None
        if method.cardinality is Cardinality.UNARY_UNARY:
            return await handler(*call.arguments)
        arguments = list(call.arguments)
        async with AsyncExitStack() as stack:
            if method.stream_position is not None:
                self._requests = Once(Requests(method, self._pipe()))
                requests = await stack.enter_async_context(call.requests(self._requests))
                arguments.insert(method.stream_position, requests)
            if not method.cardinality.server_streaming:
                return await handler(*arguments)
            pipe = self._pipe()
            items = await stack.enter_async_context(call.responses(handler(*arguments)))
            async for item in items:
                self._sent = True
                if not await pipe.send(method.encode_response(item)):
                    break
        return None


def with_trailers(outcome: Outcome | None, trailers: Mapping[str, str | bytes]) -> Outcome:
    """Return an outcome with more trailers."""
    outcome = outcome or Outcome()
    return replace(outcome, trailers=tuple((dict(outcome.trailers) | dict(trailers)).items()))


def failure_of(method: str, error: Exception, max_details: int) -> Outcome:
    """Return what the caller is told of a handler's exception.

    Of one that is no `RpcError` the caller learns nothing; it is logged.
    """
    found = rpc_error_in(error)
    if found is not None:
        try:
            outcome = outcome_of(method, found, max_details)
            if outcome is not None:
                return outcome
        except Exception as malformed:
            error = malformed
    logger.error("%s: the handler failed", method, exc_info=error)
    return Outcome(Status.INTERNAL, "the server failed")


def outcome_of(method: str, error: RpcError, max_details: int) -> Outcome | None:
    """Return an `RpcError` as the caller is told of it, None if it says that all is well.

    That is as it is, except that a handler which ran can't have been "not started", whatever a
    call of its own says.

    Raises:
        Exception: a class derived from RpcError has left out what its base sets, or changed it.
    """
    status, message = Status(error.status), str(error.message)
    if status is Status.OK:
        return None
    details = _encode_details(method, error.details, max_details)
    trailers: Mapping[str, str | bytes] = getattr(error, "trailers", {})
    return Outcome(status, message, details, trailers=tuple(trailers.items()))


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
