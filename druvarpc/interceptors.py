"""Interceptors: functions that run around calls, of one shape on both sides.

`async def interceptor(call, proceed)`: it does what is to be done before the call, awaits
`proceed()`, which is the rest (the interceptors within it, then the call itself), and does what is
to be done after. `proceed()` returns the result of a method that has a single one; of a method that
returns a stream it returns None, once the stream has ended. What the interceptor returns takes that
result's place, what it raises fails the call, `proceed()` once more is a second attempt, and one
that doesn't proceed answers in the call's place.
"""

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from druvarpc.pipe import closing
from druvarpc.service import Cardinality, Method

__all__ = ["InterceptedCall", "Once", "Proceed", "Wrapper", "chain"]

# What a call returns is the method's business: here all are alike.
Proceed = Callable[[], Awaitable[Any]]
Wrapper = Callable[[AsyncIterator[Any]], AsyncIterable[Any]]

# Shared by all calls whose streams nobody changes; it is replaced, never changed.
NONE: list[tuple[bool, Wrapper]] = []

C = TypeVar("C", bound="InterceptedCall")


class InterceptedCall:
    """What interceptors of both sides know of a call.

    Attributes:
        deadline: in trio's clock; infinite without one.
    """

    # Nothing here is made before it is needed: one of these is made for each call.
    __slots__ = ("_method", "_wrappers", "deadline")

    def __init__(self, method: Method, deadline: float) -> None:
        self.deadline = deadline
        self._method = method
        # Of the client's stream (True) and of the server's.
        self._wrappers: list[tuple[bool, Wrapper]] = NONE

    @property
    def method(self) -> str:
        """Its name, "Service.method"."""
        return self._method.name

    @property
    def cardinality(self) -> Cardinality:
        """Which of its sides send streams."""
        return self._method.cardinality

    @property
    def idempotent(self) -> bool:
        """Whether two such calls do no more than one."""
        return self._method.idempotent

    def wrap_requests(self, wrapper: Wrapper) -> None:
        """Change the stream of the client, in the attempts that this interceptor proceeds to.

        Args:
            wrapper: takes an async iterator of items and returns an async iterable, such as an
                async generator function.
        """
        self._wrappers = [*self._wrappers, (True, wrapper)]

    def wrap_responses(self, wrapper: Wrapper) -> None:
        """Change the stream of the server likewise; see `wrap_requests`."""
        self._wrappers = [*self._wrappers, (False, wrapper)]

    @asynccontextmanager
    async def requests(self, items: AsyncIterable[Any]) -> AsyncGenerator[AsyncIterable[Any], None]:
        """Give the client's stream as all wrappers change it, and close them."""
        # From where it begins it meets the outermost interceptor first, on either side.
        wrappers = [wrapper for of_requests, wrapper in self._wrappers if of_requests]
        async with _wrapped(items, wrappers) as changed:
            yield changed

    @asynccontextmanager
    async def responses(
        self, items: AsyncIterable[Any]
    ) -> AsyncGenerator[AsyncIterable[Any], None]:
        """Give the server's stream as all wrappers change it, and close them."""
        wrappers = [wrapper for of_requests, wrapper in self._wrappers if not of_requests]
        async with _wrapped(items, wrappers[::-1]) as changed:
            yield changed

    async def run(
        self, interceptor: Callable[[Any, Proceed], Awaitable[Any]], inner: Proceed
    ) -> Any:
        """Run an interceptor of this call around `inner`."""
        wrappers = self._wrappers
        try:
            return await interceptor(self, inner)
        finally:
            # It may be run again, by one around it that makes a second attempt.
            self._wrappers = wrappers


def chain(
    call: C, interceptors: Sequence[Callable[[C, Proceed], Awaitable[Any]]], last: Proceed
) -> Proceed:
    """Return what runs interceptors around `last`, the first outermost."""
    for interceptor in reversed(interceptors):
        last = partial(call.run, interceptor, last)
    return last


@asynccontextmanager
async def _wrapped(
    items: AsyncIterable[Any], wrappers: Sequence[Wrapper]
) -> AsyncGenerator[AsyncIterable[Any], None]:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(closing(items))
        for wrapper in wrappers:
            items = wrapper(aiter(items))
            await stack.enter_async_context(closing(items))
        yield items


class Once(AsyncIterator[Any]):
    """A stream that notes whether anything has been asked of it, for it can't be had again.

    Attributes:
        begun: something has.
    """

    def __init__(self, items: AsyncIterable[Any]) -> None:
        self.begun = False
        self._items = aiter(items)

    async def __anext__(self) -> Any:
        self.begun = True
        return await anext(self._items)
