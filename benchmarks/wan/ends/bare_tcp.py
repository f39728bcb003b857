"""Bare TCP at both ends of a long link: the floor under what any protocol can do."""

from collections.abc import Callable

import trio

from benchmarks.wan.job import Figures, Job, now

# What a protocol adds to each payload, about.
OVERHEAD = 8
BLOCK = 64 * 1024


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


def serve(address: str, announce: Callable[[int], None]) -> None:
    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host=address)
        announce(int(listeners[0].socket.getsockname()[1]))
        await trio.serve_listeners(echo, listeners)

    trio.run(main)


async def echoed(job: Job) -> Figures:
    """Seconds until as many bytes as `calls` calls have are back, over a used connection."""
    async with await trio.open_tcp_stream(job.host, job.port) as stream:
        await stream.send_all(b"x")
        await stream.receive_some(1)
        size = job.calls * (job.size + OVERHEAD)
        start = now()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(size))
            left = size
            while left:
                left -= len(await stream.receive_some(BLOCK))
        return {"seconds": now() - start}


OPERATIONS: dict[str, Callable[[Job], Figures]] = {"echoed": lambda job: trio.run(echoed, job)}
