"""A server in a process of its own: prints its address, then what its handlers do."""

import sys

import trio

import druvarpc
from tests.io.peers import TCP, Workshop


async def main(address: str) -> None:
    workshop = Workshop()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [workshop], address)
        print(server.addresses[0], flush=True)
        while True:
            cancelled = workshop.cancelled
            await workshop.until(lambda: workshop.cancelled > cancelled)  # noqa: B023
            print(f"cancelled {workshop.cancelled}", flush=True)


trio.run(main, sys.argv[1] if len(sys.argv) > 1 else TCP)
