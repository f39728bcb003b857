"""`windowed` of a method with interceptors: a task for each call.

They run in the client's nursery, in one task that takes the arguments and begins the calls. Leaving
the generator ends it.
"""

from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
)
from typing import Any, Final

import trio

from druvarpc.errors import ConnectionLost, RpcError, Status, cancelled_part
from druvarpc.outgoing import Opened
from druvarpc.pipe import closing

# With `window=None`. It isn't tuned: how long an interceptor takes says nothing of the link.
WINDOW: Final = 256


async def windowed_within(
    connections: Opened,
    method: Callable[[Any], Awaitable[Any]],
    arguments: Iterable[Any] | AsyncIterable[Any],
    window: int | None,
    *,
    ordered: bool,
) -> AsyncGenerator[Any, None]:
    """Call `method` for each of `arguments`; see `druvarpc.windowed`."""
    flight = _Flight(method, arguments, window or WINDOW, ordered=ordered)
    connections.check_open()
    connections.nursery.start_soon(flight.run)
    try:
        while (call := await flight.next()) is not None:
            if call.error is not None:
                raise call.error
            yield call.result
        if flight.error is not None:
            raise flight.error
    finally:
        flight.scope.cancel()
        with trio.CancelScope(shield=True):
            await flight.ended.wait()


class _Call:
    """A call, and how it ended."""

    __slots__ = ("done", "error", "result")

    def __init__(self) -> None:
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None


class _Flight:
    """The calls of one window.

    Attributes:
        scope: what they run in.
        ended: none runs any more.
        error: why the source of arguments failed.
    """

    def __init__(
        self,
        method: Callable[[Any], Awaitable[Any]],
        arguments: Iterable[Any] | AsyncIterable[Any],
        window: int,
        *,
        ordered: bool,
    ) -> None:
        self.scope = trio.CancelScope(deadline=trio.current_effective_deadline())
        self.ended = trio.Event()
        self.error: Exception | None = None
        self._method = method
        self._arguments = arguments
        self._ordered = ordered
        self._slots = trio.Semaphore(window)
        self._turns: deque[_Call] = deque()  # all, or those done
        self._complete = False  # there will be no more calls than those that are under way
        self._active = 0
        self._changed = trio.lowlevel.ParkingLot()

    async def next(self) -> _Call | None:
        """Return the next call whose turn it is, once it is done; None after the last."""
        while not (self._turns and self._turns[0].done):
            if self._complete and not self._turns and not self._active:
                return None
            await self._changed.park()
        await trio.lowlevel.checkpoint_if_cancelled()
        self._slots.release()
        return self._turns.popleft()

    async def run(self) -> None:
        """Begin a call for each argument, and wait for all."""
        self.error = ConnectionLost("the client is closed", not_started=True)
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    self.error = await self._begin_all(nursery)
                    self._complete = True
                    self._changed.unpark_all()
            if self.scope.cancelled_caught:
                # If not by the caller, who then has gone and doesn't hear this.
                self.error = RpcError(Status.DEADLINE_EXCEEDED, "the deadline passed")
        finally:
            self._complete, self._active = True, 0
            self._turns = deque(call for call in self._turns if call.done)
            self._changed.unpark_all()
            self.ended.set()

    async def _begin_all(self, nursery: trio.Nursery) -> Exception | None:
        """Begin the calls; return what the source of their arguments raised."""
        try:
            source = _async(self._arguments)
            async with closing(source):
                await self._begin_each(aiter(source), nursery)
        except Exception as error:
            return error
        return None

    async def _begin_each(self, arguments: AsyncIterator[Any], nursery: trio.Nursery) -> None:
        while True:
            await self._slots.acquire()
            try:
                argument = await anext(arguments)
            except StopAsyncIteration:
                return
            call = _Call()
            self._active += 1
            if self._ordered:
                self._turns.append(call)
            nursery.start_soon(self._make, call, argument)

    async def _make(self, call: _Call, argument: Any) -> None:
        try:
            call.result = await self._method(argument)
        # Interceptors are the user's: what they raise is raised where the results are taken.
        except Exception as error:
            call.error = error
        except BaseExceptionGroup as group:
            raise cancelled_part(group) from None
        call.done = True
        self._active -= 1
        if not self._ordered:
            self._turns.append(call)
        self._changed.unpark_all()


def _async(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterable[Any]:
    return items if isinstance(items, AsyncIterable) else _iterate(items)


async def _iterate(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item
