"""Going on after a connection broke."""

from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import trio

import druvarpc

T = TypeVar("T")

# Seconds before the second attempt; twice as long before each further one. The client reconnects
# meanwhile, and what was done before need not be done again.
FIRST_DELAY = 0.25


async def attempted(act: Callable[[], Awaitable[T]], attempts: int) -> T:
    """Returns act(), called again as long as all it raises is that the connection was lost.

    Args:
        act: Called at most this often.
        attempts: At least 1.
    """
    delay = FIRST_DELAY
    while True:
        attempts -= 1
        try:
            return await act()
        except (druvarpc.ConnectionLost, BaseExceptionGroup) as error:
            lost = all(isinstance(cause, druvarpc.ConnectionLost) for cause in causes(error))
            if not lost or attempts <= 0:
                raise
        await trio.sleep(delay)
        delay *= 2


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields what a group of errors consists of."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from causes(inner)
    else:
        yield error
