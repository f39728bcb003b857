"""A client in a process of its own, with calls of all cardinalities in flight."""

import sys

import trio

import druvarpc
from tests.io.peers import Calls


async def main(address: str) -> None:
    async with druvarpc.connect(address) as client, trio.open_nursery() as nursery:
        Calls(client).start(nursery)
        await trio.sleep_forever()


trio.run(main, sys.argv[1])
