"""druvarpc: the public API, at its defaults."""

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import trio

import druvarpc
from benchmarks.measure import (
    CONNECTIONS,
    Load,
    Measured,
    Stopwatch,
    folder,
    growth,
    noise,
    pieces,
    trio_tasks,
    until,
)
from benchmarks.record import FIELDS, Record, read_fields, revised

NAME = "druvarpc"
PACKAGE = "druvarpc"
TOKEN = "a token"


@dataclass
class Way:
    """How client and server reach each other.

    Attributes:
        address: where the server listens; the client puts its port in the place of 0.
        tls: makes what the server encrypts with, in its folder.
        client: interceptors of the client.
        server: interceptors of the server.
        identity: the client has a token, and the server asks who may call what.
    """

    address: str = "tcp://127.0.0.1:0"
    tls: Callable[[Path], druvarpc.TLS] | None = None
    client: int = 0
    server: int = 0
    identity: bool = False


# A variant of this peer, in a process of its own, sets another one.
way = Way()


class Bench(druvarpc.Service):
    @druvarpc.rpc
    async def echo(self, data: bytes) -> bytes: ...

    @druvarpc.rpc
    async def revise(self, record: Record) -> Record: ...

    @druvarpc.rpc
    async def upload(self, pieces: AsyncIterator[bytes]) -> int: ...

    @druvarpc.rpc
    def download(self, size: int) -> AsyncGenerator[bytes, None]: ...

    @druvarpc.rpc
    def chat(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]: ...


class Server(Bench):
    async def echo(self, data: bytes) -> bytes:
        return data

    async def revise(self, record: Record) -> Record:
        return Record(**revised(record))

    async def upload(self, pieces: AsyncIterator[bytes]) -> int:
        total = 0
        async for piece in pieces:
            total += len(piece)
        return total

    async def download(self, size: int) -> AsyncGenerator[bytes, None]:
        piece = noise(size)
        while True:
            yield piece

    async def chat(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for message in messages:
            yield message


class GuardedServer(Server):
    @druvarpc.authorize(lambda call: call.identity == TOKEN)
    async def echo(self, data: bytes) -> bytes:
        return data


async def authenticate(caller: druvarpc.Caller) -> str | None:
    return caller.token


async def interceptor(_: druvarpc.InterceptedCall, proceed: druvarpc.Proceed) -> Any:
    return await proceed()


def serve(announce: Callable[[int], None]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            own = folder(os.getpid())
            own.mkdir()
            tls = None if way.tls is None else way.tls(own)
            start = partial(
                druvarpc.serve,
                [GuardedServer() if way.identity else Server()],
                way.address.format(folder=own),
                tls=tls,
                authenticate=authenticate if way.identity else None,
                interceptors=[interceptor] * way.server,
            )
            server = await nursery.start(start)
            port = server.addresses[0].rpartition(":")[2]
            announce(int(port) if port.isdecimal() else 0)

    trio.run(main)


def connect(load: Load) -> AbstractAsyncContextManager[druvarpc.Client]:
    theirs = folder(load.server)
    address = way.address.format(folder=theirs).replace(":0", f":{load.port}")
    tls = None if way.tls is None else druvarpc.TLS(authorities=theirs / "authority.pem")
    return druvarpc.connect(
        address,
        tls=tls,
        token=TOKEN if way.identity else None,
        interceptors=[interceptor] * way.client,
    )


async def echo(load: Load) -> Measured:
    async with connect(load) as client:
        stub, payload = client.stub(Bench), load.payload
        return await trio_tasks(load, [lambda: stub.echo(payload)] * load.count)


async def echo_ahead(load: Load) -> Measured:
    async with connect(load) as client:
        stub, payload = client.stub(Bench), load.payload

        async def phase(seconds: float) -> int:
            count = 0
            async with aclosing(druvarpc.windowed(stub.echo, pieces(payload, seconds))) as replies:
                async for _ in replies:
                    count += 1
            return count

        await phase(load.warm_up)
        watch = Stopwatch(load)
        return watch.rate(await phase(load.seconds))


async def revise(load: Load) -> Measured:
    async with connect(load) as client:
        stub = client.stub(Bench)

        async def call() -> None:
            read_fields(await stub.revise(Record(**FIELDS)))

        return await trio_tasks(load, [call] * load.count)


async def upload(load: Load) -> Measured:
    async with connect(load) as client:
        stub, piece = client.stub(Bench), load.payload

        async def source(seconds: float) -> AsyncIterator[bytes]:
            for one in pieces(piece, seconds):
                yield one

        await stub.upload(source(load.warm_up))
        watch = Stopwatch(load)
        return watch.rate(await stub.upload(source(load.seconds)))


async def download(load: Load) -> Measured:
    async with connect(load) as client:
        total = 0
        async with aclosing(client.stub(Bench).download(load.size)) as stream:
            more = until(load.warm_up)
            async for _ in stream:
                if not more():
                    break
            watch, more = Stopwatch(load), until(load.seconds)
            async for piece in stream:
                total += len(piece)
                if not more():
                    break
            return watch.rate(total)


async def echo_connections(load: Load) -> Measured:
    payload = load.payload
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(load)) for _ in range(load.count)]
        calls = [partial(client.stub(Bench).echo, payload) for client in clients]
        return await trio_tasks(load, calls)


async def connects(load: Load) -> Measured:
    payload = load.payload

    async def call() -> None:
        async with connect(load) as client:
            await client.stub(Bench).echo(payload)

    return await trio_tasks(load, [call] * load.count)


async def idle_connections(load: Load) -> Measured:
    payload = load.payload
    async with AsyncExitStack() as stack:

        async def open_one() -> None:
            client = await stack.enter_async_context(connect(load))
            await client.stub(Bench).echo(payload)

        return await growth(load, open_one)


async def open_streams(load: Load) -> Measured:
    payload = load.payload

    async def messages() -> AsyncIterator[bytes]:
        yield payload
        await trio.sleep_forever()

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(load)) for _ in range(CONNECTIONS)]
        stubs = cycle([client.stub(Bench) for client in clients])

        async def open_one() -> None:
            stream = await stack.enter_async_context(aclosing(next(stubs).chat(messages())))
            await anext(stream)

        return await growth(load, open_one)


OPERATIONS = {
    "echo": partial(trio.run, echo),
    "echo_tasks": partial(trio.run, echo),
    "echo_ahead": partial(trio.run, echo_ahead),
    "echo_connections": partial(trio.run, echo_connections),
    "revise": partial(trio.run, revise),
    "upload": partial(trio.run, upload),
    "download": partial(trio.run, download),
    "connects": partial(trio.run, connects),
    "idle_connections": partial(trio.run, idle_connections),
    "open_streams": partial(trio.run, open_streams),
}
