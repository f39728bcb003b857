"""Bare trio TCP, no RPC: what the event loop and the kernel leave room for.

The first byte of a connection says what it is for: P, echo what comes; U, count what comes and send
the count at the end; D, send pieces of the size that follows until the client goes.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial

import trio

from benchmarks.measure import (
    Load,
    Measured,
    Stopwatch,
    growth,
    noise,
    pieces,
    trio_tasks,
    until,
)

NAME = "bare trio TCP"
PACKAGE = "trio"

RECEIVE = 256 * 1024


async def accepted(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        purpose = await stream.receive_some(1)
        if purpose == b"P":
            while data := await stream.receive_some(RECEIVE):
                await stream.send_all(data)
        elif purpose == b"U":
            total = await drain(stream, bytearray(RECEIVE))
            await stream.send_all(b"%d" % total)
        elif purpose == b"D":
            piece = noise(int(await stream.receive_some(16)))
            while True:
                await stream.send_all(piece)


async def drain(stream: trio.SocketStream, buffer: bytearray) -> int:
    total = 0
    while count := await stream.socket.recv_into(buffer):
        total += count
    return total


def serve(announce: Callable[[int], None]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            serving = partial(trio.serve_tcp, accepted, 0, host="127.0.0.1")
            listeners = await nursery.start(serving)
            announce(listeners[0].socket.getsockname()[1])

    trio.run(main)


async def connect(load: Load, purpose: bytes) -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", load.port)
    await stream.send_all(purpose)
    return stream


async def ping(stream: trio.SocketStream, payload: bytes) -> None:
    await stream.send_all(payload)
    left = len(payload)
    while left:
        left -= len(await stream.receive_some(RECEIVE))


async def echo(load: Load) -> Measured:
    async with await connect(load, b"P") as stream:
        return await trio_tasks(load, [partial(ping, stream, load.payload)])


async def upload(load: Load) -> Measured:
    piece = load.payload

    async def phase(seconds: float) -> int:
        async with await connect(load, b"U") as stream:
            for one in pieces(piece, seconds):
                await stream.send_all(one)
            await stream.send_eof()
            return int(await stream.receive_some(32))

    await phase(load.warm_up)
    watch = Stopwatch(load)
    return watch.rate(await phase(load.seconds))


async def download(load: Load) -> Measured:
    async with await connect(load, b"D%d" % load.size) as stream:
        buffer = bytearray(RECEIVE)
        more = until(load.warm_up)
        while more():
            await stream.socket.recv_into(buffer)
        total = 0
        watch, more = Stopwatch(load), until(load.seconds)
        while more():
            total += await stream.socket.recv_into(buffer)
        return watch.rate(total)


async def echo_connections(load: Load) -> Measured:
    payload = load.payload
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(await connect(load, b"P")) for _ in range(load.count)
        ]
        return await trio_tasks(load, [partial(ping, stream, payload) for stream in streams])


async def connects(load: Load) -> Measured:
    payload = load.payload

    async def call() -> None:
        async with await connect(load, b"P") as stream:
            await ping(stream, payload)

    return await trio_tasks(load, [call] * load.count)


async def idle_connections(load: Load) -> Measured:
    payload = load.payload
    async with AsyncExitStack() as stack:

        async def open_one() -> None:
            stream = await stack.enter_async_context(await connect(load, b"P"))
            await ping(stream, payload)

        return await growth(load, open_one)


OPERATIONS = {
    "echo": partial(trio.run, echo),
    "echo_connections": partial(trio.run, echo_connections),
    "upload": partial(trio.run, upload),
    "download": partial(trio.run, download),
    "connects": partial(trio.run, connects),
    "idle_connections": partial(trio.run, idle_connections),
}
