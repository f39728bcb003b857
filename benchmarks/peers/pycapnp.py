"""pycapnp: Cap'n Proto's C++ implementation on asyncio.

Bulk goes as calls of a piece each, several in flight: its `-> stream` calls were slower here. It
has no streams to hold open: a capability takes their place, which is not the same.
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import capnp

from benchmarks.measure import (
    Load,
    Measured,
    asyncio_tasks,
    growth,
    noise,
    pipelined,
)
from benchmarks.record import FIELDS, read_fields, revised

NAME = "pycapnp"
PACKAGE = "pycapnp"

schema = capnp.load(
    str(Path(__file__).with_name("bench.capnp")),
)

# Calls with a piece each in flight in a transfer.
AHEAD = 16


class Bench(schema.Bench.Server):
    def __init__(self) -> None:
        self._piece = b""

    async def echo(self, data: bytes, **_: Any) -> bytes:
        return data

    async def revise(self, record: Any, **_: Any) -> Any:
        return schema.Record.new_message(**revised(record))

    async def write(self, piece: bytes, **_: Any) -> int:
        return len(piece)

    async def read(self, size: int, **_: Any) -> bytes:
        if len(self._piece) != size:
            self._piece = noise(size)
        return self._piece


def serve(announce: Callable[[int], None]) -> None:
    async def accepted(stream: capnp.AsyncIoStream) -> None:
        await capnp.TwoPartyServer(stream, bootstrap=Bench()).on_disconnect()

    async def main() -> None:
        # With its protocol named, asyncio sets TCP_NODELAY on what it accepts.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.bind(("127.0.0.1", 0))
        server = await capnp.AsyncIoStream.create_server(accepted, sock=listening)
        announce(listening.getsockname()[1])
        async with server:
            await server.serve_forever()

    asyncio.run(capnp.run(main()))


class Client:
    """A connection; leaving it closes the connection."""

    def __init__(self, load: Load) -> None:
        self._load = load

    async def __aenter__(self) -> Any:
        stream = await capnp.AsyncIoStream.create_connection(host="127.0.0.1", port=self._load.port)
        self._client = capnp.TwoPartyClient(stream)
        return self._client.bootstrap().cast_as(schema.Bench)

    async def __aexit__(self, *_: object) -> None:
        self._client.close()


async def echo(load: Load) -> Measured:
    async with Client(load) as bench:
        return await asyncio_tasks(load, [partial(bench.echo, load.payload)] * load.count)


async def echo_ahead(load: Load) -> Measured:
    async with Client(load) as bench:
        return await pipelined(load, partial(bench.echo, load.payload), load.count)


async def revise(load: Load) -> Measured:
    async with Client(load) as bench:

        async def call() -> None:
            read_fields((await bench.revise(schema.Record.new_message(**FIELDS))).record)

        return await asyncio_tasks(load, [call] * load.count)


async def upload(load: Load) -> Measured:
    async with Client(load) as bench:
        return await pipelined(load, partial(bench.write, load.payload), AHEAD, load.size)


async def download(load: Load) -> Measured:
    async with Client(load) as bench:
        return await pipelined(load, partial(bench.read, load.size), AHEAD, load.size)


async def echo_connections(load: Load) -> Measured:
    payload = load.payload
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(load)) for _ in range(load.count)]
        return await asyncio_tasks(load, [partial(bench.echo, payload) for bench in clients])


async def connects(load: Load) -> Measured:
    payload = load.payload

    async def call() -> None:
        async with Client(load) as bench:
            await bench.echo(payload)

    return await asyncio_tasks(load, [call] * load.count)


async def idle_connections(load: Load) -> Measured:
    payload = load.payload
    async with AsyncExitStack() as stack:

        async def open_one() -> None:
            bench = await stack.enter_async_context(Client(load))
            await bench.echo(payload)

        return await growth(load, open_one)


def in_capnp(operation: Callable[[Load], Coroutine[Any, Any, Measured]]) -> Any:
    return lambda load: asyncio.run(capnp.run(operation(load)))


OPERATIONS = {
    "echo": in_capnp(echo),
    "echo_tasks": in_capnp(echo),
    "echo_ahead": in_capnp(echo_ahead),
    "echo_connections": in_capnp(echo_connections),
    "revise": in_capnp(revise),
    "upload": in_capnp(upload),
    "download": in_capnp(download),
    "connects": in_capnp(connects),
    "idle_connections": in_capnp(idle_connections),
}
