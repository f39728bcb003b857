"""`python -m examples.hello.client [URL]`."""

import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import TypeVar

import trio

import druvarpc

from .service import ADDRESS, Hello

T = TypeVar("T")


async def stream(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item


async def main(address: str) -> None:
    async with druvarpc.connect(address) as client:
        hello = client.stub(Hello)
        print(await hello.greet("world"))
        print(await hello.total(stream([1, 2, 3])))
        async with aclosing(hello.countdown(3)) as numbers:
            print([number async for number in numbers])
        async with aclosing(hello.shout(stream(["every", "word"]))) as words:
            print([word async for word in words])


if __name__ == "__main__":
    trio.run(main, (*sys.argv[1:], ADDRESS)[0])
