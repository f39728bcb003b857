"""Calls with a stream in one direction or both.

Each has a `Pipe`; only a bidirectional one needs a task of its own, in the client's nursery, that
sends while its caller receives.
"""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from typing import Any, Final

import trio

from druvarpc.calls import Call, Options
from druvarpc.connections import Connections
from druvarpc.errors import ConnectionLost
from druvarpc.pipe import Pipe, closing
from druvarpc.protocol import Times
from druvarpc.service import Method
from druvarpc.session import Session

# What a stream counts for beside others: nobody knows how long it will be.
_WEIGHT: Final = 1024 * 1024


async def upload(
    connections: Connections,
    method: Method,
    options: Options,
    payload: bytes,
    source: AsyncIterable[Any],
) -> Any:
    """Make a client-streaming call."""
    call, pipe = await _open(connections, method, options, payload)
    try:
        with trio.CancelScope() as sending:
            # A reply that comes early ends the sending; it is the caller's own task that sends.
            call.on_done = sending.cancel
            await _send_all(call, pipe, method, source)
        call.on_done = None
        return method.decode_result(await call.calls.result(call))
    finally:
        call.on_done = None
        call.calls.abandon(call)


async def download(
    connections: Connections, method: Method, options: Options, payload: bytes
) -> AsyncGenerator[Any, None]:
    """Make a server-streaming call, which begins with the first item that is asked for."""
    call, pipe = await _open(connections, method, options, payload)
    try:
        while (message := await pipe.receive()) is not None:
            yield method.decode_response(message)
        await _check_end(call)
    finally:
        call.calls.abandon(call)


async def exchange(
    connections: Connections,
    method: Method,
    options: Options,
    payload: bytes,
    source: AsyncIterable[Any],
) -> AsyncGenerator[Any, None]:
    """Make a bidirectional call, which begins with the first item that is asked for."""
    call, pipe = await _open(connections, method, options, payload)
    sending, sent = trio.CancelScope(), trio.Event()
    connections.nursery.start_soon(_send_beside, call, pipe, method, source, sending, sent)
    try:
        while (message := await pipe.receive()) is not None:
            yield method.decode_response(message)
        await _check_end(call)
    finally:
        call.calls.abandon(call)
        sending.cancel()
        with trio.CancelScope(shield=True):
            await sent.wait()


async def _open(
    connections: Connections, method: Method, options: Options, payload: bytes
) -> tuple[Call, Pipe]:
    calls = connections.only or connections.roomiest()
    call = Call(
        calls,
        method.name,
        payload,
        more=method.cardinality.client_streaming,
        single=not method.cardinality.server_streaming,
        lane=options.lane,
        metadata=options.metadata,
    )
    call.weight = _WEIGHT
    call.pipe = pipe = Pipe(calls.session, call)
    if options.special:
        options.apply(call)
    try:
        calls.submit(call)
    except ConnectionLost:
        # Maybe since what cancels this task has ended the connection a moment before.
        await trio.lowlevel.checkpoint_if_cancelled()
        raise
    return call, pipe


async def _send_all(call: Call, pipe: Pipe, method: Method, source: AsyncIterable[Any]) -> None:
    session, times = call.calls.session, call.times
    async with closing(source):
        async for item in source if times is None else _Timed(source, times, session):
            if not await pipe.send(method.encode_request(item)):
                return
    if session.core.can_send(call):
        session.core.end(call)
        session.flush()


class _Timed(AsyncIterator[Any]):
    """A source's items, and the time that they take."""

    def __init__(self, source: AsyncIterable[Any], times: Times, session: Session) -> None:
        self._items = aiter(source)
        self._times = times
        self._session = session

    async def __anext__(self) -> Any:
        self._times.pause(self._session.now())
        try:
            return await anext(self._items)
        finally:
            self._times.resume(self._session.now())


async def _send_beside(
    call: Call,
    pipe: Pipe,
    method: Method,
    source: AsyncIterable[Any],
    sending: trio.CancelScope,
    sent: trio.Event,
) -> None:
    try:
        with sending:
            await _send_all(call, pipe, method, source)
    except Exception as error:
        # The caller's own iterator failed, in a task that the caller can't see: it is raised where
        # the call's items are received.
        call.calls.fail(call, error)
        call.calls.abandon(call)
    finally:
        sent.set()


async def _check_end(call: Call) -> None:
    await call.calls.wait(call)
    await call.calls.check(call)
