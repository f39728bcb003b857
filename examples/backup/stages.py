"""Work in threads between two channels."""

from collections.abc import AsyncIterable, Callable
from typing import TypeVar

import trio

A = TypeVar("A")
T = TypeVar("T")


async def in_order(
    function: Callable[[A], T],
    source: AsyncIterable[A],
    sink: trio.MemorySendChannel[T],
    workers: int,
) -> None:
    """Sends function(item) for each item of the source, in the order of the items; closes the sink.

    Args:
        function: Runs in threads.
        source: Taken no further ahead than there are workers.
        sink: Whoever reads it slowly stops the work.
        workers: How many items are worked on at a time, those included that wait for their turn.
    """
    free = trio.Semaphore(workers)

    async def work(item: A, turn: trio.Event, done: trio.Event) -> None:
        result = await trio.to_thread.run_sync(function, item)
        await turn.wait()
        await sink.send(result)
        done.set()
        free.release()

    turn = trio.Event()
    turn.set()
    async with sink, trio.open_nursery() as nursery:
        async for item in source:
            await free.acquire()
            done = trio.Event()
            nursery.start_soon(work, item, turn, done)
            turn = done
