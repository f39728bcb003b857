"""Calls with a stream in one direction or both.

Each has a `Pipe`; only a bidirectional one needs a task of its own, in the client's nursery, that
sends while its caller receives.

*Made again.* A call that fails may be made again (`druvarpc.retries`) as long as nothing of it has
been handed over: none of its results to the caller, and no item of the caller's so that it couldn't
be sent once more. So the first messages are kept, by reference and up to a bound (`_Sending`). The
caller's iterable is never disturbed by this: whoever waits for its next item goes on waiting, while
another task makes the new call and sends what was kept.
"""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import suppress
from typing import Any, Final

import trio

from druvarpc.calls import Call, Options, note_metadata, note_reply
from druvarpc.endpoints import Endpoints
from druvarpc.errors import ConnectionLost, RpcError
from druvarpc.pipe import Pipe, closing
from druvarpc.retries import Attempts
from druvarpc.service import Method
from druvarpc.transports import Buffer

# What a stream counts for beside others: nobody knows how long it will be.
_WEIGHT: Final = 1024 * 1024
# Bytes of messages that are kept to be sent again. No more than a few windows, which is all that
# can have gone before the server has shown that it began the call; an empty message counts, too.
_MOST_KEPT: Final = 1024 * 1024
_MESSAGE_COST: Final = 64
# The same for all calls of a client together: streams can last for hours.
_MOST_KEPT_IN_ALL: Final = 64 * 1024 * 1024


async def upload(
    connections: Endpoints,
    method: Method,
    options: Options,
    payload: bytes,
    source: AsyncIterable[Any],
) -> Any:
    """Make a client-streaming call."""
    sending = _Sending(connections, method, options, payload, source)
    await sending.start()
    uploading = _Uploading(sending, connections.nursery)
    try:
        return method.decode_result(await uploading.run())
    finally:
        note_reply(sending.call)
        await uploading.close()


async def download(
    connections: Endpoints, method: Method, options: Options, payload: bytes
) -> AsyncGenerator[Any, None]:
    """Make a server-streaming call, which begins with the first item that is asked for."""
    attempts = Attempts(connections, options, idempotent=method.idempotent)
    while True:
        call, pipe = await _open(connections, method, options, payload, attempts)
        begun = False
        try:
            message = await pipe.receive()
            note_metadata(call)
            while message is not None:
                begun = True
                yield method.decode_response(message)
                message = await pipe.receive()
            await _check_end(call)
            return
        except RpcError as error:
            if begun:
                raise
            failed = _why(call, error)
        finally:
            call.calls.abandon(call)
        await attempts.pause(failed)


async def exchange(
    connections: Endpoints,
    method: Method,
    options: Options,
    payload: bytes,
    source: AsyncIterable[Any],
) -> AsyncGenerator[Any, None]:
    """Make a bidirectional call, which begins with the first item that is asked for."""
    sending = _Sending(connections, method, options, payload, source)
    await sending.start()
    stop, sent = trio.CancelScope(), trio.Event()
    connections.nursery.start_soon(_send_beside, sending, stop, sent)
    try:
        while True:
            begun = False
            try:
                message = await sending.pipe.receive()
                note_metadata(sending.call)
                while message is not None:
                    begun = True
                    sending.drop()
                    yield method.decode_response(message)
                    message = await sending.pipe.receive()
                await _check_end(sending.call)
                return
            except RpcError as error:
                failed = _why(sending.call, error)
                if begun or sending.kept is None:
                    raise failed from None
            await sending.again(failed)
    finally:
        sending.finish()
        sending.call.calls.abandon(sending.call)
        stop.cancel()
        with trio.CancelScope(shield=True):
            await sent.wait()


async def _open(
    connections: Endpoints, method: Method, options: Options, payload: bytes, attempts: Attempts
) -> tuple[Call, Pipe]:
    """Begin a call as soon as there is a connection for it."""
    while True:
        try:
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
            calls.submit(call)
        except RpcError as error:
            failed = error
        else:
            attempts.begun()
            return call, pipe
        await attempts.pause(failed)


def _why(call: Call, error: RpcError) -> RpcError:
    """Return why a call failed: itself, or what met it."""
    return call.error if isinstance(call.error, RpcError) else error


class _Sending:
    """A call that sends a stream, all its attempts together.

    Attributes:
        call: the present attempt.
        pipe: its data.
        kept: all messages so far, as long as they can be sent again; None afterwards.
    """

    def __init__(
        self,
        connections: Endpoints,
        method: Method,
        options: Options,
        payload: bytes,
        source: AsyncIterable[Any],
    ) -> None:
        self.call: Call
        self.pipe: Pipe
        self.kept: list[Buffer] | None = []
        self._connections = connections
        self._method = method
        self._options = options
        self._payload = payload
        self._source = source
        self._attempts = Attempts(connections, options, idempotent=method.idempotent)
        self._size = 0
        self._ended = False  # the caller's iterable has
        self._error: Exception | None = None  # of the caller's iterable
        self._over = False  # there will be no other attempt
        self._begun = trio.Event()  # another has begun, or won't

    async def start(self) -> None:
        """Begin the call, and send what is kept.

        Raises:
            RpcError: it can't be begun.
        """
        self.call, self.pipe = await _open(
            self._connections, self._method, self._options, self._payload, self._attempts
        )
        call, session = self.call, self.call.calls.session
        # All at once: to wait for room here could be to wait for what this task is to receive.
        for message in self.kept or ():
            session.core.send(call, message)
        if self._error is not None:
            self._fail(self._error)
        elif self._ended:
            session.core.end(call)
        session.flush()
        self._begun.set()
        self._begun = trio.Event()

    async def again(self, error: RpcError) -> None:
        """Begin the call again, after this error.

        Raises:
            RpcError: that can't be done.
        """
        try:
            await self._attempts.pause(error)
            await self.start()
        except BaseException:
            self.finish()
            raise

    def finish(self) -> None:
        """Note that there will be no other attempt."""
        self.drop()
        self._over = True
        self._begun.set()

    def drop(self) -> None:
        """Keep nothing any longer."""
        if self.kept is not None:
            self.kept = None
            self._connections.kept -= self._size

    async def send_all(self) -> None:
        """Send the caller's items, until the end of them or of the call.

        What the iterable raises fails the call, and is raised.
        """
        try:
            async with closing(self._source):
                items = self._source
                async for item in items if self.call.times is None else _Timed(items, self):
                    message = self._method.encode_request(item)
                    if self.kept is not None:
                        self._keep(message)
                    if not await self.pipe.send(message) and not await self._another():
                        return
        except Exception as error:
            self._fail(error)
            raise
        self._ended = True
        session = self.call.calls.session
        if session.core.can_send(self.call):
            session.core.end(self.call)
            session.flush()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self.call.calls.fail(self.call, error)
        self.call.calls.abandon(self.call)

    def _keep(self, message: Buffer) -> None:
        assert self.kept is not None
        size = len(message) + _MESSAGE_COST
        self.kept.append(message)
        self._size += size
        self._connections.kept += size
        begun = self.call.outgoing is not None and self.call.outgoing.granted
        if (
            self._size > _MOST_KEPT
            or self._connections.kept > _MOST_KEPT_IN_ALL
            or (begun and not self._method.idempotent)
        ):
            self.drop()

    async def _another(self) -> bool:
        """Wait for the next attempt, which has got all that is kept; False if there is none."""
        if self.kept is None or not self.call.failed:
            return False
        await self._begun.wait()
        return not self._over


class _Uploading:
    """The life of an upload: its caller's task sends, and then waits for the reply.

    A call that fails before all has been sent is made again by a task of its own.

    Args:
        sending: the call.
        nursery: where that task runs.
    """

    def __init__(self, sending: _Sending, nursery: trio.Nursery) -> None:
        self._sending = sending
        self._nursery = nursery
        self._stop = trio.CancelScope()  # the sending
        self._again = trio.CancelScope(deadline=trio.current_effective_deadline())
        self._done: trio.Event | None = None  # that task has ended
        self._result: bytes | Exception | None = None  # what it has learned

    async def run(self) -> bytes:
        """Send all, and return the payload of the reply."""
        sending = self._sending
        with self._stop:
            # A reply that comes early ends the sending.
            sending.call.on_done = self._end_early
            if sending.call.done:
                self._end_early()
            await sending.send_all()
        if self._done is None:
            sending.call.on_done = None
            return await self._reply()
        await self._done.wait()
        if self._result is None:
            await trio.lowlevel.checkpoint()  # the deadline's, or the end of the client
            raise ConnectionLost("the client is closed")
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    async def close(self) -> None:
        """Abandon the call if it hasn't ended."""
        self._sending.call.on_done = None
        self._sending.finish()
        self._again.cancel()
        if self._done is not None:
            with trio.CancelScope(shield=True):
                await self._done.wait()
        self._sending.call.calls.abandon(self._sending.call)

    def _end_early(self) -> None:
        sending = self._sending
        sending.call.on_done = None
        if sending.call.failed and sending.kept is not None:
            self._done = trio.Event()
            self._nursery.start_soon(self._make_again, self._done)
        else:
            self._stop.cancel()

    async def _make_again(self, done: trio.Event) -> None:
        try:
            with self._again:
                self._result = await self._reply()
        except Exception as error:
            # In a task that the caller can't see: it is raised there.
            self._result = error
        finally:
            self._sending.finish()
            self._stop.cancel()
            done.set()

    async def _reply(self) -> bytes:
        sending = self._sending
        while True:
            call = sending.call
            try:
                return await call.calls.result(call)
            except RpcError as error:
                if sending.kept is None:
                    raise
                failed = error
            await sending.again(failed)


class _Timed(AsyncIterator[Any]):
    """A source's items, and the time that they take."""

    def __init__(self, source: AsyncIterable[Any], sending: _Sending) -> None:
        self._items = aiter(source)
        self._sending = sending

    async def __anext__(self) -> Any:
        call = self._sending.call
        times, session = call.times, call.calls.session
        assert times is not None
        times.pause(session.now())
        try:
            return await anext(self._items)
        finally:
            times.resume(session.now())


async def _send_beside(sending: _Sending, stop: trio.CancelScope, sent: trio.Event) -> None:
    try:
        with stop, suppress(Exception):
            # What the caller's own iterator raised fails the call: it is raised where the call's
            # items are received.
            await sending.send_all()
    finally:
        sent.set()


async def _check_end(call: Call) -> None:
    await call.calls.wait(call)
    note_reply(call)
    await call.calls.check(call)
