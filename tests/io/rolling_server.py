"""A plain server that drains on SIGTERM, like that of docs/serving.md; says when it serves."""

import os
import signal
import sys

import trio

import druvarpc
from tests.io.peers import Workshop


class Numbered(Workshop):
    async def echo(self, data: bytes) -> bytes:
        return data + b" %d" % os.getpid()


async def main(address: str) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(druvarpc.serve, [Numbered()], address)
            print("serving", flush=True)
            async for _ in signals:
                await server.drain(timeout=30)
                break


trio.run(main, sys.argv[1])
