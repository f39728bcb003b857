"""Many calls of one method in flight at a time, from an iterable of arguments.

No task for each call: calls are submitted from the generator's own task while there is room in the
window, and it sleeps until one that it needs is done. Only a source that is asynchronous needs a
task of its own, in the client's nursery, since it must be able to wait while results are yielded.

A window that isn't fixed is tuned by `druvarpc.protocol.concurrency`. All that a call costs for
that is a token in a list, which is taken out when it is done; once in a round trip one is timed.
"""

import sys
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
from functools import partial
from typing import Any, Final, TypeVar

import trio

from druvarpc.calls import Call
from druvarpc.errors import ConnectionLost
from druvarpc.pipe import closing
from druvarpc.protocol.concurrency import LEAST, ConcurrencyLimit
from druvarpc.stubs import UnaryMethod, unary_method

A = TypeVar("A")
T = TypeVar("T")

# With `window=None`: bytes of arguments and results that calls may take in this process at once. At
# 1 Gbit/s and 80 ms 10 MB are on their way; twice that, as in calls, and some more. It isn't tuned:
# what it bounds is memory, and how much of it is on its way the connection sees to.
_MOST_BYTES: Final = 24 * 1024 * 1024
# With `window=None`: as many again as may be in flight may wait to be taken. So a call that takes
# long doesn't keep those behind it from starting, nor a consumer that does let them pile up.
_SLOTS: Final = 2
# Beyond what a server takes at once: calls that are ready to go when it takes more.
_MARGIN: Final = 1 / 8
# Calls that start before what they are is written: the server shall not wait for a whole window.
_PORTION: Final = 256

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

    With `window=None` the number of calls in flight follows the model of BBR (Cardwell, Cheng,
    Gunn, Yeganeh and Jacobson, "BBR: congestion-based congestion control", 2016): twice the
    greatest rate of late at which calls ended, in calls a second, times their least mean latency,
    in seconds. It begins with 1,024 calls, doubles with each round trip while the rate follows, and
    stays between 16 and what the server takes at once (`Limits.max_calls`) with an eighth more.
    Results that wait to be taken are beside that as many again at most, and arguments and results
    together some 24 MiB, or 16 calls if those are more.

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
    if not isinstance(arguments, AsyncIterable):
        arguments = iter(arguments)
    return _results(flight, arguments)


async def _results(
    flight: "_Flight", arguments: Iterator[Any] | AsyncIterable[Any]
) -> AsyncGenerator[Any, None]:
    feeding, fed = trio.CancelScope(), trio.Event()
    source: Iterator[Any] | None = None
    if isinstance(arguments, AsyncIterable):
        flight.stub.connections.nursery.start_soon(_feed, flight, arguments, feeding, fed)
    else:
        source = arguments
        fed.set()
    try:
        while True:
            if source is not None and flight.has_room:
                if not flight.fill(source):
                    source = None
                elif flight.has_room:
                    await trio.lowlevel.checkpoint()
            elif flight.ready:
                yield await flight.take()
            elif flight.calls or not fed.is_set():
                await flight.changed()
            else:
                break
        if flight.error is not None:
            raise flight.error
    finally:
        if not fed.is_set():
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
    complete = False
    try:
        with feeding:
            async with closing(arguments):
                async for argument in arguments:
                    while not flight.has_room:
                        await flight.changed()
                    flight.add(argument)
                    if not flight.started % _PORTION:
                        await trio.lowlevel.checkpoint()
            complete = True
    except Exception as error:
        # The source failed, in a task that its owner can't see: it is raised where the results are.
        flight.error = error
    finally:
        if not complete and flight.error is None:
            # The client's block has been left: nobody may take what has come for all.
            flight.error = ConnectionLost("the client is closed", not_started=True)
        fed.set()
        flight.wake()


class _Flight:
    """The calls of one window.

    Attributes:
        calls: those whose results haven't been taken, and the bytes that each is charged for.
        started: how many calls there have been.
        error: why the source of arguments failed.
    """

    def __init__(self, stub: UnaryMethod, window: int | None, *, ordered: bool) -> None:
        self.stub = stub
        self.calls: dict[Call, int] = {}
        self.started = 0
        self.error: Exception | None = None
        self._ordered = ordered
        self._turns: deque[Call] = deque()  # whose results are taken next: all, or those done
        self._changed = trio.lowlevel.ParkingLot()
        self._waiting = 0
        self._bytes = 0
        self._tuned = window is None
        self._tuner: ConcurrencyLimit | None = None  # made with the first call
        self._timeless = True  # no call is being timed
        # A token for each call that isn't done, if that is to be known. To take one out is all that
        # most calls do when they are done, and no Python code runs for it.
        self._undone: list[None] = []
        self._pop = self._undone.pop
        self._expected = 0  # bytes of a result
        if window is None:
            # Until the first call has told what its server takes.
            self._most_undone, self._most_calls = 1, LEAST
            self._most_bytes = _MOST_BYTES
        else:
            self._most_undone, self._most_calls, self._most_bytes = 1, window, sys.maxsize

    @property
    def has_room(self) -> bool:
        """Whether one more call may start."""
        return (
            len(self._undone) < self._most_undone
            and len(self.calls) < self._most_calls
            and self._bytes < self._most_bytes
        )

    @property
    def ready(self) -> bool:
        """Whether the result whose turn it is can be taken."""
        turns = self._turns
        return bool(turns) and turns[0].done

    def fill(self, source: Iterator[Any]) -> bool:
        """Start one call, and more until there is no room or a portion is full.

        Returns:
            whether there may be more arguments.
        """
        try:
            self.add(next(source))
            while self.started % _PORTION and self.has_room:
                self.add(next(source))
        except StopIteration:
            return False
        except Exception as error:
            # The source failed, or what it gave can't be sent: raised in its turn.
            self.error = error
            return False
        return True

    def add(self, argument: Any) -> None:
        """Start the call for one more argument."""
        payload, _ = self.stub.method.encode_call((argument,), _NO_KEYWORDS)
        call = self.stub.begin(payload)
        size = len(payload)
        if self._expected:
            # At most so much that there is always room for `LEAST` results.
            size += min(self._expected, _MOST_BYTES // LEAST)
        self.calls[call] = size
        self._bytes += size
        self.started += 1
        if self._ordered:
            self._turns.append(call)
        else:
            call.on_done = partial(self._note, call)
        if self._tuned:
            self._undone.append(None)
            if self._ordered:
                call.on_done = self._pop
            if self._timeless and len(self._undone) >= self._most_undone:
                self._time(call)
        if self._waiting:
            self.wake()

    async def take(self) -> Any:
        """Return the result that is `ready`."""
        call = self._turns.popleft()
        if call.plain:
            await trio.lowlevel.checkpoint_if_cancelled()
            result = self.stub.decode(call)
        else:
            result = await self.stub.result(call)
        if self._tuned and call.result is not None:
            # An average of the latest that moves by an eighth.
            self._expected += len(call.result) - self._expected >> 3
        self._bytes -= self.calls.pop(call)
        if self._waiting:
            self.wake()
        return result

    async def changed(self) -> None:
        """Wait until there may be room, or a result to take."""
        if self._ordered and self._turns:
            first = self._turns[0]
            if first.on_done is None or first.on_done is self._pop:
                first.on_done = partial(self._first_done, first.on_done)
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
            call.calls.abandon(call)
        self.calls.clear()

    def _first_done(self, then: Callable[[], None] | None) -> None:
        if then is not None:
            then()
        self.wake()

    def _note(self, call: Call) -> None:
        call.on_done = None
        self._turns.append(call)
        if self._tuned:
            self._pop()
        if self._waiting:
            self.wake()

    # Tuning.

    def _time(self, call: Call) -> None:
        """Take the time of this call: the first, or one that fills the window."""
        then, now = call.on_done, trio.current_time()
        assert then is not None
        if self._tuner is None:
            self._tuner = ConcurrencyLimit(_most(call, self.stub.connections.number))
            self._set_most(self._tuner.limit)
            call.on_done = partial(self._end_first, self._tuner, call, now, then)
        else:
            self._timeless = False
            self._tuner.mark(now, len(self._undone), self.started - len(self._undone))
            call.on_done = partial(self._end_round, self._tuner, call, then)

    def _end_first(
        self, tuner: ConcurrencyLimit, call: Call, began: float, then: Callable[[], None]
    ) -> None:
        call.on_done = None
        then()
        tuner.first(trio.current_time() - began)
        self._expect(call)
        self.wake()

    def _end_round(self, tuner: ConcurrencyLimit, call: Call, then: Callable[[], None]) -> None:
        call.on_done = None
        then()
        self._timeless = True
        self._expect(call)
        ended = self.started - len(self._undone)
        tuner.end(trio.current_time(), ended, _most(call, self.stub.connections.number))
        self._set_most(tuner.limit)
        # Also if it is another call's turn, which may take long: there is room for more.
        self.wake()

    def _expect(self, call: Call) -> None:
        # At once, not by and by: before the first result is taken there may be room for many calls.
        if not self._expected and call.result is not None:
            self._expected = len(call.result)

    def _set_most(self, limit: int) -> None:
        self._most_undone, self._most_calls = limit, _SLOTS * limit


def _most(call: Call, connections: int) -> int:
    """Return how many calls are of use at most to the server that `call` is made to."""
    return int(connections * call.calls.session.core.peer.max_calls * (1 + _MARGIN))
