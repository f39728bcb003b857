"""Many calls of one method in flight at a time, from an iterable of arguments.

No task for each call: calls are submitted from the generator's own task while there is room in the
window (`druvarpc.flight`), and it sleeps until one that it needs is done. Only a source that is
asynchronous needs a task of its own, in the client's nursery, since it must be able to wait while
results are yielded.
"""

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

import trio

from druvarpc.errors import ConnectionLost
from druvarpc.flight import LATER, PORTION, Flight
from druvarpc.pipe import closing
from druvarpc.stubs import InterceptedUnary, unary_method
from druvarpc.windowed_within import windowed_within

A = TypeVar("A")
T = TypeVar("T")


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
    together some 24 MiB, or 16 calls if those are more. With a stub that has interceptors it is a
    window of 256 calls.

    A server that has too many calls may refuse some and name a time (`RpcError.retry_after`): they
    begin again then. That isn't charged to the retry budget, since from then on the window is no
    wider than what the server took; it widens again by one call for each window of calls that went
    well. It fails when a call has been refused `Retry.attempts` times while none went well.

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
    if isinstance(stub, InterceptedUnary):
        if not isinstance(arguments, AsyncIterable):
            arguments = iter(arguments)
        return windowed_within(stub.connections, stub, arguments, window, ordered=ordered)
    flight = Flight(stub, window, ordered=ordered)
    if not isinstance(arguments, AsyncIterable):
        arguments = iter(arguments)
    return _results(flight, arguments)


async def _results(
    flight: Flight, arguments: Iterator[Any] | AsyncIterable[Any]
) -> AsyncGenerator[Any, None]:
    feeding, fed = trio.CancelScope(), trio.Event()
    source: Iterator[Any] | None = None
    if isinstance(arguments, AsyncIterable):
        flight.stub.connections.check_open()
        flight.stub.connections.nursery.start_soon(_feed, flight, arguments, feeding, fed)
    else:
        source = arguments
        fed.set()
    try:
        while True:
            if flight.held is not None and not flight.ready:
                if not await flight.resume():
                    source = None
                    feeding.cancel()
            elif flight.later and flight.restart():
                await trio.lowlevel.checkpoint_if_cancelled()
            elif source is not None and flight.has_room:
                if not flight.fill(source):
                    source = None
                elif flight.has_room:
                    await trio.lowlevel.checkpoint()
            elif flight.ready:
                if (result := await flight.take()) is not LATER:
                    yield result
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
    flight: Flight,
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
                        # Calls are restarted by who takes the results, which may take its time.
                        await flight.changed(restarts=False)
                    flight.add(argument)
                    if not flight.started % PORTION:
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
