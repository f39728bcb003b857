"""`python -m examples.hello.server [URL]`."""

import sys
from collections.abc import AsyncGenerator, AsyncIterator

import trio

import druvarpc

from .service import ADDRESS, Hello


class HelloServer(Hello):
    async def greet(self, name: str) -> str:
        return f"Hello, {name}!"

    async def total(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    async def countdown(self, start: int) -> AsyncGenerator[int, None]:
        for number in range(start, 0, -1):
            yield number

    async def shout(self, words: AsyncIterator[str]) -> AsyncGenerator[str, None]:
        async for word in words:
            yield word.upper()


async def main(address: str) -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [HelloServer()], address)
        print("listening on", *server.addresses, flush=True)


if __name__ == "__main__":
    trio.run(main, (*sys.argv[1:], ADDRESS)[0])
