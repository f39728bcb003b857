"""`windowed` of a method with interceptors: tasks, as many as there are calls at a time.

They run in the client's nursery, below one that takes the arguments and gives them to tasks that
have nothing to do, or to new ones. Leaving the generator ends them.
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
# Calls that begin before others have their turn.
PORTION: Final = 64


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
        self._room = window  # for calls whose results haven't been taken
        self._turns: deque[_Call] = deque()  # all, or those done
        self._waiting: deque[tuple[_Call, Any]] = deque()  # for a task
        self._undone = 0
        self._complete = False  # no others will begin
        self._idle = trio.lowlevel.ParkingLot()
        self._taken = trio.lowlevel.ParkingLot()
        self._changed = trio.lowlevel.ParkingLot()

    async def next(self) -> _Call | None:
        """Return the next call whose turn it is, once it is done; None after the last."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not (self._turns and self._turns[0].done):
            if self._complete and not self._turns and not self._undone:
                return None
            await self._changed.park()
        self._room += 1
        self._taken.unpark()
        return self._turns.popleft()

    async def run(self) -> None:
        """Begin a call for each argument, and wait for all."""
        self.error = ConnectionLost("the client is closed", not_started=True)
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    self.error = await self._begin_all(nursery)
                    self._complete = True
                    while self._undone:
                        self._changed.unpark_all()
                        await self._taken.park()
                    nursery.cancel_scope.cancel()
            if self.scope.cancelled_caught:
                # If not by the caller, who then has gone and doesn't hear this.
                self.error = RpcError(Status.DEADLINE_EXCEEDED, "the deadline passed")
        finally:
            self._complete, self._undone = True, 0
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
        begun = 0
        while True:
            begun += 1
            if not begun % PORTION:
                await trio.lowlevel.checkpoint()
            while not self._room:
                await self._taken.park()
            try:
                argument = await anext(arguments)
            except StopAsyncIteration:
                return
            self._room -= 1
            call = _Call()
            self._undone += 1
            if self._ordered:
                self._turns.append(call)
            self._waiting.append((call, argument))
            if self._idle:
                self._idle.unpark()
            else:
                nursery.start_soon(self._work)

    async def _work(self) -> None:
        while True:
            while self._waiting:
                await self._make(*self._waiting.popleft())
            await self._idle.park()

    async def _make(self, call: _Call, argument: Any) -> None:
        try:
            call.result = await self._method(argument)
        # Interceptors are the user's: what they raise is raised where the results are taken.
        except Exception as error:
            call.error = error
        except BaseExceptionGroup as group:
            raise cancelled_part(group) from None
        call.done = True
        self._undone -= 1
        if not self._ordered:
            self._turns.append(call)
        self._changed.unpark()
        if self._complete and not self._undone:
            self._taken.unpark_all()


def _async(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterable[Any]:
    return items if isinstance(items, AsyncIterable) else _iterate(items)


async def _iterate(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item
