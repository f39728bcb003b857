"""The data of one stream as tasks see it: `send` and `receive` that wait."""

from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from trio.lowlevel import Abort, RaiseCancelT, Task

from druvarpc.errors import RemoteProtocolError, RpcError, Status
from druvarpc.protocol import Stream, Times
from druvarpc.session import Session
from druvarpc.transports import Buffer


@asynccontextmanager
async def closing(items: AsyncIterable[Any]) -> AsyncGenerator[None, None]:
    """Close a generator that somebody else wrote; other iterables are left as they are.

    It differs from `contextlib.aclosing` for one that waits at a `yield` inside of a nursery's
    block: it ends with GeneratorExit in a group, which neither Python nor a cancel scope takes for
    a good end.
    """
    try:
        yield
    finally:
        if isinstance(items, AsyncGenerator):
            try:
                await items.aclose()
            except BaseExceptionGroup as group:
                rest = group.split(GeneratorExit)[1]
                if rest is not None:
                    raise rest from None


# Messages that can be taken one after the other without giving up the task's turn: a window full of
# small ones would keep all other tasks waiting.
_TURN: Final = 64


class Pipe:
    """The messages of one stream; one task may send and one receive at a time.

    Args:
        session: the connection.
        stream: the stream.
        times: where to note how long tasks wait for data or for room, None for nowhere.
    """

    __slots__ = ("_reader", "_session", "_stream", "_taken", "_times", "_writer")

    def __init__(self, session: Session, stream: Stream, times: Times | None = None) -> None:
        self._session = session
        self._stream = stream
        self._times = times
        self._reader: Task | None = None
        self._taken = 0
        self._writer: Task | None = None

    async def send(self, message: Buffer) -> bool:
        """Send one message, which must not change after this; wait until there is room for more.

        Cancelled, it leaves open whether the message goes out.

        Returns:
            False if nothing can be sent any more, since the call has ended.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        session = self._session
        if session.ended or not session.core.can_send(self._stream):
            return False
        if session.core.send(self._stream, message):
            session.flush()
            return True
        # Enough for a write. Most often the transport takes it all, and there is room again.
        session.write()
        if session.core.has_room(self._stream):
            await trio.lowlevel.checkpoint()
            return True
        if self._writer is not None:
            raise trio.BusyResourceError("another task is sending in this stream")
        self._writer = trio.lowlevel.current_task()
        await self._wait(self._stop_writing)
        return True

    async def receive(self) -> bytes | None:
        """Return the next message, or None after the last. Cancelled, it leaves the message there.

        Raises:
            RpcError: a message is longer than the limit.
            ConnectionLost: the connection ended before the stream did.
        """
        self._taken += 1
        if self._taken % _TURN:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
        session, stream = self._session, self._stream
        while True:
            try:
                message = session.core.take(stream, session.now())
            except RemoteProtocolError:
                session.handle_events()
                raise session.lost() from None
            if message is not None:
                if session.core.wants_to_send:
                    session.flush()
                return message
            if session.core.incoming(stream).too_long:
                most = session.core.limits.max_message
                raise RpcError(
                    Status.RESOURCE_EXHAUSTED,
                    f"{stream.method}: a message of more than {most} bytes",
                )
            if session.core.has_ended(stream):
                return None
            if session.ended:
                raise session.lost()
            if session.core.wants_to_send:
                session.flush()
            if self._reader is not None:
                raise trio.BusyResourceError("another task is receiving from this stream")
            self._reader = trio.lowlevel.current_task()
            await self._wait(self._stop_reading)

    async def _wait(self, stop: Callable[[RaiseCancelT], Abort]) -> None:
        times = self._times
        if times is None:
            await trio.lowlevel.wait_task_rescheduled(stop)
            return
        times.pause(self._session.now())
        try:
            await trio.lowlevel.wait_task_rescheduled(stop)
        finally:
            times.resume(self._session.now())

    def readable(self) -> None:
        """Wake the task that receives."""
        if self._reader is not None:
            trio.lowlevel.reschedule(self._reader)
            self._reader = None

    def writable(self) -> None:
        """Wake the task that sends."""
        if self._writer is not None:
            trio.lowlevel.reschedule(self._writer)
            self._writer = None

    def _stop_reading(self, _: RaiseCancelT) -> Abort:
        self._reader = None
        return Abort.SUCCEEDED

    def _stop_writing(self, _: RaiseCancelT) -> Abort:
        self._writer = None
        return Abort.SUCCEEDED
