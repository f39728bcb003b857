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
from contextvars import Token
from typing import Any, Protocol

import trio

from druvarpc.errors import ConnectionLost, RpcError, Status, cancelled_part
from druvarpc.interceptors import InterceptedCall, Once, Proceed, chain
from druvarpc.pipe import closing
from druvarpc.replies import NOTHING, Collector, Pairs, collecting
from druvarpc.service import Method

__all__ = ["Around", "ClientInterceptor", "OutgoingCall"]


class OutgoingCall(InterceptedCall):
    """A call that a client makes, as its interceptors see it.

    Attributes:
        deadline: in trio's clock; infinite without one.
        arguments: the arguments without the stream; may be replaced before an attempt.
        metadata: what goes with the call; may be changed before an attempt.
        attempt: how many attempts there have been.
        reply_metadata: what the server sent ahead of the last reply.
        trailers: what it sent with it.
    """

    __slots__ = (
        "_collector",
        "arguments",
        "attempt",
        "metadata",
        "reply_metadata",
        "trailers",
    )

    def __init__(
        self, method: Method, arguments: tuple[Any, ...], metadata: Mapping[str, str | bytes]
    ) -> None:
        super().__init__(method, trio.current_effective_deadline())
        self.arguments = arguments
        self.metadata = dict(metadata)
        self.attempt = 0
        self.reply_metadata: Mapping[str, str | bytes] = NOTHING
        self.trailers: Mapping[str, str | bytes] = NOTHING
        self._collector: Collector | None = None

    def note(self, metadata: Pairs, trailers: Pairs = ()) -> None:
        """Take what came with a reply."""
        self.reply_metadata = dict(metadata) if metadata else NOTHING
        self.trailers = dict(trailers) if trailers else NOTHING
        if self._collector is not None:
            self._collector.note(metadata, trailers)

    def begin_attempt(self) -> "Token[Collector | None]":
        """Count an attempt, and be told of its reply."""
        self.attempt += 1
        self.reply_metadata = self.trailers = NOTHING
        self._collector = collecting.get()
        return collecting.set(self)

    def __repr__(self) -> str:
        return f"<OutgoingCall {self.method}, attempt {self.attempt}>"


ClientInterceptor = Callable[[OutgoingCall, Proceed], Awaitable[Any]]


class Opened(Protocol):
    """A client's connections, as far as they matter here."""

    @property
    def nursery(self) -> trio.Nursery:
        """Where the client's tasks run."""
        ...

    def check_open(self) -> None:
        """Raise ConnectionLost if no calls can be made."""
        ...


class Around:
    """How the calls of a stub's method are made within its interceptors.

    Args:
        method: what is called.
        interceptors: the first is the outermost.
        pairs: the metadata of the stub's calls.
        make: returns the stub's method without interceptors, whose calls have these metadata.

    Attributes:
        method: what is called.
        interceptors: the first is the outermost.
        metadata: what the stub's calls have.
    """

    __slots__ = ("_make", "_pairs", "_unchanged", "interceptors", "metadata", "method")

    def __init__(
        self,
        method: Method,
        interceptors: Sequence[ClientInterceptor],
        pairs: Pairs,
        make: Callable[[Pairs], Callable[..., Any]],
    ) -> None:
        self.method = method
        self.interceptors = interceptors
        self.metadata = dict(pairs)
        self._pairs = pairs
        self._make = make
        self._unchanged = make(pairs)

    def pairs(self, metadata: Mapping[str, str | bytes]) -> Pairs:
        """Return what goes with a call, of which interceptors left `metadata`."""
        before = self.metadata
        if metadata == before:
            return self._pairs
        # Of equal keys they have seen one.
        same = [pair for pair in self._pairs if metadata.get(pair[0]) == before[pair[0]]]
        new = [(key, value) for key, value in metadata.items() if before.get(key) != value]
        return (*same, *new)

    def plain(self, metadata: Mapping[str, str | bytes]) -> Callable[..., Any]:
        """Return the method without interceptors, which left `metadata`."""
        pairs = self.pairs(metadata)
        return self._unchanged if pairs is self._pairs else self._make(pairs)

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
        token = self._call.begin_attempt()
        try:
            return await self._attempt()
        except Exception as error:
            self._failure = error
            raise
        finally:
            collecting.reset(token)

    async def _attempt(self) -> Any:
        call, position = self._call, self._around.method.stream_position
        arguments = call.arguments
        if self._deliver is None and position is None:
            return await self._around.plain(call.metadata)(*arguments)
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
