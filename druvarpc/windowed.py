"""Many calls of one method in flight at a time, from an iterable of arguments.

No task for each call: calls are submitted from the generator's own task while there is room in the
window, and it sleeps until one that it needs is done. Only a source that is asynchronous needs a
task of its own, in the client's nursery, since it must be able to wait while results are yielded.
"""

import math
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from typing import Any, Final, TypeVar

import trio

from druvarpc.calls import Call
from druvarpc.pipe import closing
from druvarpc.stubs import UnaryMethod, unary_method

A = TypeVar("A")
T = TypeVar("T")

# With `window=None`: calls that keep a link of 100 ms busy, and bytes of arguments that may wait in
# this process at once.
_MOST_CALLS: Final = 512
_MOST_BYTES: Final = 8 * 1024 * 1024

_NO_KEYWORDS: Final[Mapping[str, Any]] = {}


def windowed(
    method: Callable[[A], Awaitable[T]],
    arguments: Iterable[A] | AsyncIterable[A],
    *,
    window: int | None = None,
    ordered: bool = True,
) -> AsyncGenerator[T, None]:
    """Call a stub's unary method for each of `arguments`, many at a time, and yield the results.

    The arguments are taken no further ahead than the window allows. The first call that fails
    raises in its turn, and so does what the iterable of arguments raises. Leaving the generator
    early (use `contextlib.aclosing`) or being cancelled abandons the calls in flight; an async
    generator of arguments is closed.

    Args:
        method: a unary method of a stub.
        arguments: one for each call.
        window: calls in flight, those whose results wait to be taken included; None lets the
            library choose.
        ordered: yield in the order of the arguments; else as calls end.

    Raises:
        TypeError: `method` is no unary method of a stub, or `arguments` can't be iterated.
        ValueError: the window isn't positive.
        RpcError: the first call that failed.
    """
    stub = unary_method(method, "window")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} calls")
    flight = _Flight(stub, window, ordered=ordered)
    if isinstance(arguments, AsyncIterable):
        return _from_async(flight, arguments)
    return _from_sync(flight, iter(arguments))


async def _from_sync(flight: "_Flight", source: Iterator[Any]) -> AsyncGenerator[Any, None]:
    exhausted = False
    try:
        while True:
            while not exhausted and flight.has_room:
                try:
                    flight.add(next(source))
                except StopIteration:
                    exhausted = True
                except Exception as error:
                    # The source failed, or what it gave can't be sent: raised in its turn.
                    flight.error = error
                    exhausted = True
            if not flight.calls:
                break
            yield await flight.take()
        if flight.error is not None:
            raise flight.error
    finally:
        flight.abandon()


async def _from_async(
    flight: "_Flight", arguments: AsyncIterable[Any]
) -> AsyncGenerator[Any, None]:
    flight.stub.calls.check_open()
    feeding, fed = trio.CancelScope(), trio.Event()
    flight.stub.calls.nursery.start_soon(_feed, flight, arguments, feeding, fed)
    try:
        while True:
            while not flight.calls and not fed.is_set():
                await flight.changed()
            if not flight.calls:
                break
            yield await flight.take()
        if flight.error is not None:
            raise flight.error
    finally:
        feeding.cancel()
        with trio.CancelScope(shield=True):
            await fed.wait()
        flight.abandon()


async def _feed(
    flight: "_Flight",
    arguments: AsyncIterable[Any],
    feeding: trio.CancelScope,
    fed: trio.Event,
) -> None:
    """Take arguments while there is room for their calls."""
    try:
        with feeding:
            async with closing(arguments):
                async for argument in arguments:
                    while not flight.has_room:
                        await flight.changed()
                    flight.add(argument)
    except Exception as error:
        # The source failed, in a task that its owner can't see: it is raised where the results are.
        flight.error = error
    finally:
        fed.set()
        flight.wake()


class _Flight:
    """The calls of one window.

    Attributes:
        calls: in the order of their arguments, as long as their results haven't been taken.
        error: why the source of arguments failed.
    """

    def __init__(self, stub: UnaryMethod, window: int | None, *, ordered: bool) -> None:
        self.stub = stub
        self.calls: dict[Call, int] = {}
        self.error: Exception | None = None
        self._most_calls = window or _MOST_CALLS
        self._most_bytes = math.inf if window else _MOST_BYTES
        self._bytes = 0
        self._ordered = ordered
        self._done: deque[Call] = deque()
        self._changed = trio.lowlevel.ParkingLot()
        self._waiting = 0

    @property
    def has_room(self) -> bool:
        """Whether one more call may start."""
        return len(self.calls) < self._most_calls and self._bytes < self._most_bytes

    def add(self, argument: Any) -> None:
        """Start the call for one more argument."""
        payload, _ = self.stub.method.encode_call((argument,), _NO_KEYWORDS)
        call = self.stub.begin(payload)
        if not self._ordered:
            call.on_done = lambda: self._note(call)
        size = len(payload)
        self.calls[call] = size
        self._bytes += size
        if self._waiting:
            self.wake()

    async def take(self) -> Any:
        """Wait for the result whose turn it is, and return it."""
        call = next(iter(self.calls)) if self._ordered else await self._next_done()
        if call.plain:
            await trio.lowlevel.checkpoint_if_cancelled()
            result = self.stub.decode(call)
        else:
            result = await self.stub.result(call)
        self._bytes -= self.calls.pop(call)
        if self._waiting:
            self.wake()
        return result

    async def _next_done(self) -> Call:
        while not self._done:
            await self.changed()
        return self._done.popleft()

    def _note(self, call: Call) -> None:
        call.on_done = None
        self._done.append(call)
        self.wake()

    async def changed(self) -> None:
        """Wait until a call was added, taken or, if that matters, has ended."""
        self._waiting += 1
        try:
            await self._changed.park()
        finally:
            self._waiting -= 1

    def wake(self) -> None:
        """Wake who waits for a change."""
        self._changed.unpark_all()

    def abandon(self) -> None:
        """Abandon what is in flight."""
        for call in self.calls:
            call.on_done = None
            self.stub.calls.abandon(call)
        self.calls.clear()
