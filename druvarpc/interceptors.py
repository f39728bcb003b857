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

C = TypeVar("C", bound="InterceptedCall")


class InterceptedCall:
    """What interceptors of both sides know of a call.

    Attributes:
        method: "Service.method".
        cardinality: which of its sides send streams.
        idempotent: two such calls do no more than one.
        deadline: in trio's clock; infinite without one.
    """

    def __init__(self, method: Method, deadline: float) -> None:
        self.method: str = method.name
        self.cardinality: Cardinality = method.cardinality
        self.idempotent: bool = method.idempotent
        self.deadline = deadline
        self._request_wrappers: list[Wrapper] = []
        self._response_wrappers: list[Wrapper] = []

    def wrap_requests(self, wrapper: Wrapper) -> None:
        """Change the stream of the client, in the attempts that this interceptor proceeds to.

        Args:
            wrapper: takes an async iterator of items and returns an async iterable, such as an
                async generator function.
        """
        self._request_wrappers.append(wrapper)

    def wrap_responses(self, wrapper: Wrapper) -> None:
        """Change the stream of the server likewise; see `wrap_requests`."""
        self._response_wrappers.append(wrapper)

    @asynccontextmanager
    async def requests(self, items: AsyncIterable[Any]) -> AsyncGenerator[AsyncIterable[Any], None]:
        """Give the client's stream as all wrappers change it, and close them."""
        # From where it begins it meets the outermost interceptor first, on either side.
        async with _wrapped(items, self._request_wrappers) as changed:
            yield changed

    @asynccontextmanager
    async def responses(
        self, items: AsyncIterable[Any]
    ) -> AsyncGenerator[AsyncIterable[Any], None]:
        """Give the server's stream as all wrappers change it, and close them."""
        async with _wrapped(items, self._response_wrappers[::-1]) as changed:
            yield changed

    async def run(
        self, interceptor: Callable[["C", Proceed], Awaitable[Any]], inner: Proceed
    ) -> Any:
        """Run an interceptor of this call around `inner`."""
        requests, responses = len(self._request_wrappers), len(self._response_wrappers)
        try:
            return await interceptor(self, inner)  # type: ignore[arg-type]  # C is this class
        finally:
            # It may be run again, by one around it that makes a second attempt.
            del self._request_wrappers[requests:], self._response_wrappers[responses:]


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
