"""Interceptors of a client: stubs' methods that run them around each call.

Within them, each attempt is a call of a plain stub's method with the metadata that the interceptors
left. Around a call with a single result they run in the caller's own task. Around one that returns
a stream they need a task beside the caller's, in the client's nursery: what they have open between
two items, such as a cancel scope, must not be open in the caller's. The task has a copy of the
caller's context and its deadline, hands over item by item, and has ended when the caller's loop
has.
"""

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from druvarpc.errors import ConnectionLost, RpcError, Status, cancelled_part
from druvarpc.interceptors import InterceptedCall, Once, Proceed, chain
from druvarpc.pipe import closing
from druvarpc.replies import ReplyMetadata, collecting
from druvarpc.service import Method

__all__ = ["Around", "ClientInterceptor", "OutgoingCall"]


class OutgoingCall(InterceptedCall):
    """A call that a client makes, as its interceptors see it.

    Attributes:
        arguments: the arguments without the stream; may be replaced before an attempt.
        metadata: what goes with the call; may be changed before an attempt.
        attempt: how many attempts there have been.
        reply_metadata: what the server sent ahead of the last reply.
        trailers: what it sent with it.
    """

    def __init__(
        self,
        method: Method,
        arguments: tuple[Any, ...],
        metadata: Sequence[tuple[str, str | bytes]],
    ) -> None:
        super().__init__(method, trio.current_effective_deadline())
        self.arguments = arguments
        self.metadata: dict[str, str | bytes] = dict(metadata)
        self.attempt = 0
        self.reply_metadata: Mapping[str, str | bytes] = {}
        self.trailers: Mapping[str, str | bytes] = {}

    def __repr__(self) -> str:
        return f"<OutgoingCall {self.method}, attempt {self.attempt}>"


ClientInterceptor = Callable[[OutgoingCall, Proceed], Awaitable[Any]]
# Returns a stub's method without interceptors, whose calls have the metadata.
Plain = Callable[[Mapping[str, str | bytes]], Callable[..., Any]]


class Opened(Protocol):
    """A client's connections, as far as they matter here."""

    @property
    def nursery(self) -> trio.Nursery:
        """Where the client's tasks run."""
        ...

    def check_open(self) -> None:
        """Raise ConnectionLost if no calls can be made."""
        ...


@dataclass(frozen=True, slots=True)
class Around:
    """How the calls of a stub's method are made within its interceptors.

    Attributes:
        method: what is called.
        interceptors: the first is the outermost.
        metadata: what the stub's calls have.
        plain: makes the calls.
    """

    method: Method
    interceptors: Sequence[ClientInterceptor]
    metadata: Sequence[tuple[str, str | bytes]]
    plain: Plain

    async def result(
        self, arguments: tuple[Any, ...], source: AsyncIterable[Any] | None = None
    ) -> Any:
        """Make a call that has a single result."""
        call = OutgoingCall(self.method, arguments, self.metadata)
        if source is None:
            attempts = _Attempts(self, call, None)
            return await chain(call, self.interceptors, attempts.proceed)()
        async with closing(source):
            attempts = _Attempts(self, call, Once(source))
            return await chain(call, self.interceptors, attempts.proceed)()

    async def stream(
        self,
        connections: Opened,
        arguments: tuple[Any, ...],
        source: AsyncIterable[Any] | None,
    ) -> AsyncGenerator[Any, None]:
        """Make a call that returns a stream, which begins with the first item asked for."""
        flow = _Flow(self, OutgoingCall(self.method, arguments, self.metadata), source)
        connections.check_open()
        connections.nursery.start_soon(flow.run)
        try:
            async for item in flow.items:
                yield item
            if flow.failure is not None:
                raise flow.failure
        finally:
            flow.scope.cancel()
            with trio.CancelScope(shield=True):
                await flow.ended.wait()


class _Attempts:
    """The attempts of one call.

    Args:
        around: how it is made.
        call: the call.
        source: the caller's stream, if there is one.
        deliver: takes the items of a stream.
    """

    def __init__(
        self,
        around: Around,
        call: OutgoingCall,
        source: Once | None,
        deliver: Callable[[Any], Awaitable[None]] | None = None,
    ) -> None:
        self._around = around
        self._call = call
        self._source = source
        self._deliver = deliver
        self._delivered = False
        self._failure: Exception | None = None

    async def proceed(self) -> Any:
        """Make the call; return its result, None if it is a stream, which has been delivered.

        What has been taken from the caller's stream can't be had once more, nor what has been
        delivered be taken back: an attempt after that raises what the one before did.
        """
        begun = self._delivered or (self._source is not None and self._source.begun)
        if self._failure is not None and begun:
            raise self._failure
        call = self._call
        call.attempt += 1
        found = ReplyMetadata(collecting.get())
        token = collecting.set(found)
        try:
            return await self._attempt()
        except Exception as error:
            self._failure = error
            raise
        finally:
            collecting.reset(token)
            call.reply_metadata, call.trailers = found.metadata, found.trailers

    async def _attempt(self) -> Any:
        call, position = self._call, self._around.method.stream_position
        arguments = call.arguments
        async with AsyncExitStack() as stack:
            if position is not None:
                assert self._source is not None
                requests = await stack.enter_async_context(call.requests(self._source))
                arguments = (*arguments[:position], requests, *arguments[position:])
            made = self._around.plain(call.metadata)(*arguments)
            if self._deliver is None:
                return await made
            async for item in await stack.enter_async_context(call.responses(made)):
                self._delivered = True
                await self._deliver(item)
        return None


class _Flow:
    """The task of a call that returns a stream.

    Attributes:
        scope: what it runs in.
        ended: it has ended.
        items: what the interceptors let through.
        failure: why there are no more, if it isn't for their end.
    """

    def __init__(
        self, around: Around, call: OutgoingCall, source: AsyncIterable[Any] | None
    ) -> None:
        self.scope = trio.CancelScope(deadline=call.deadline)
        self.ended = trio.Event()
        self.failure: BaseException | None = ConnectionLost(
            "the client is closed", not_started=True
        )
        # Without room: an item that is out of the task's hands is in the caller's.
        self._sender, self.items = trio.open_memory_channel[Any](0)
        self._source = source
        once = None if source is None else Once(source)
        attempts = _Attempts(around, call, once, self._sender.send)
        self._run = chain(call, around.interceptors, attempts.proceed)

    async def run(self) -> None:
        """Run the interceptors; they raise in the caller's task."""
        try:
            with self.scope:
                async with AsyncExitStack() as stack:
                    if self._source is not None:
                        await stack.enter_async_context(closing(self._source))
                    await self._run()
                self.failure = None
            if self.scope.cancelled_caught:
                # If not by the caller, who then has gone and doesn't hear this.
                self.failure = RpcError(Status.DEADLINE_EXCEEDED, "the deadline passed")
        except Exception as error:
            self.failure = error
        except BaseExceptionGroup as group:
            raise cancelled_part(group) from None
        finally:
            self._sender.close()
            self.ended.set()
