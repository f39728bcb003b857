"""grpclib: gRPC in Python on asyncio; a codec passes bytes through, records are protobuf."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from itertools import cycle
from typing import Any

from grpclib.client import (
    Channel,
    StreamStreamMethod,
    StreamUnaryMethod,
    UnaryStreamMethod,
    UnaryUnaryMethod,
)
from grpclib.const import Cardinality, Handler
from grpclib.encoding.proto import ProtoCodec
from grpclib.server import Server, Stream

from benchmarks.measure import (
    CONNECTIONS,
    Load,
    Measured,
    Stopwatch,
    asyncio_tasks,
    growth,
    in_asyncio,
    noise,
    pieces,
    until,
)
from benchmarks.peers.grpc_aio import record_type
from benchmarks.record import FIELDS, read_fields, revised

NAME = "grpclib"
PACKAGE = "grpclib"

SERVICE = "druvarpc.benchmarks.Bench"


class Codec(ProtoCodec):
    """Bytes as they are, other messages as protobuf."""

    def encode(self, message: Any, message_type: Any) -> bytes:
        return message if message_type is bytes else super().encode(message, message_type)

    def decode(self, data: bytes, message_type: Any) -> Any:
        return data if message_type is bytes else super().decode(data, message_type)


class Bench:
    """What grpclib's code generator would make of the service, and its implementation."""

    def __init__(self, record: Any) -> None:
        self._record = record

    async def echo(self, stream: Stream[bytes, bytes]) -> None:
        await stream.send_message(await stream.recv_message())

    async def revise(self, stream: Stream[Any, Any]) -> None:
        request = await stream.recv_message()
        await stream.send_message(self._record(**revised(request)))

    async def upload(self, stream: Stream[bytes, bytes]) -> None:
        total = 0
        async for piece in stream:
            total += len(piece)
        await stream.send_message(b"%d" % total)

    async def download(self, stream: Stream[bytes, bytes]) -> None:
        piece = noise(int(await stream.recv_message()))
        while True:
            await stream.send_message(piece)

    async def chat(self, stream: Stream[bytes, bytes]) -> None:
        async for message in stream:
            await stream.send_message(message)

    def __mapping__(self) -> dict[str, Handler]:
        raw, record = (bytes, bytes), (self._record, self._record)
        return {
            f"/{SERVICE}/Echo": Handler(self.echo, Cardinality.UNARY_UNARY, *raw),
            f"/{SERVICE}/Revise": Handler(self.revise, Cardinality.UNARY_UNARY, *record),
            f"/{SERVICE}/Upload": Handler(self.upload, Cardinality.STREAM_UNARY, *raw),
            f"/{SERVICE}/Download": Handler(self.download, Cardinality.UNARY_STREAM, *raw),
            f"/{SERVICE}/Chat": Handler(self.chat, Cardinality.STREAM_STREAM, *raw),
        }


def serve(announce: Callable[[int], None]) -> None:
    async def main() -> None:
        server = Server([Bench(record_type())], codec=Codec())
        await server.start("127.0.0.1", 0)
        # Server has no public way to tell the port that the system chose.
        announce(server._server.sockets[0].getsockname()[1])
        await server.wait_closed()

    asyncio.run(main())


def connect(load: Load) -> Channel:
    return Channel("127.0.0.1", load.port, codec=Codec())


def echo_of(channel: Channel) -> UnaryUnaryMethod[bytes, bytes]:
    return UnaryUnaryMethod(channel, f"/{SERVICE}/Echo", bytes, bytes)


async def echo(load: Load) -> Measured:
    async with connect(load) as channel:
        return await asyncio_tasks(load, [partial(echo_of(channel), load.payload)] * load.count)


async def revise(load: Load) -> Measured:
    record = record_type()
    async with connect(load) as channel:
        method = UnaryUnaryMethod(channel, f"/{SERVICE}/Revise", record, record)

        async def call() -> None:
            read_fields(await method(record(**FIELDS)))

        return await asyncio_tasks(load, [call] * load.count)


async def upload(load: Load) -> Measured:
    async with connect(load) as channel:
        method, piece = StreamUnaryMethod(channel, f"/{SERVICE}/Upload", bytes, bytes), load.payload

        async def phase(seconds: float) -> int:
            async with method.open() as stream:
                for one in pieces(piece, seconds):
                    await stream.send_message(one)
                await stream.end()
                return int(await stream.recv_message())

        await phase(load.warm_up)
        watch = Stopwatch(load)
        return watch.rate(await phase(load.seconds))


async def download(load: Load) -> Measured:
    async with connect(load) as channel:
        method = UnaryStreamMethod(channel, f"/{SERVICE}/Download", bytes, bytes)
        async with method.open() as stream:
            await stream.send_message(b"%d" % load.size, end=True)
            more = until(load.warm_up)
            while more():
                await stream.recv_message()
            total = 0
            watch, more = Stopwatch(load), until(load.seconds)
            while more():
                total += len(await stream.recv_message())
            measured = watch.rate(total)
            await stream.cancel()
        return measured


async def echo_connections(load: Load) -> Measured:
    payload = load.payload
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connect(load)) for _ in range(load.count)]
        calls = [partial(echo_of(channel), payload) for channel in channels]
        return await asyncio_tasks(load, calls)


async def connects(load: Load) -> Measured:
    payload = load.payload

    async def call() -> None:
        async with connect(load) as channel:
            await echo_of(channel)(payload)

    return await asyncio_tasks(load, [call] * load.count)


async def idle_connections(load: Load) -> Measured:
    payload = load.payload
    async with AsyncExitStack() as stack:

        async def open_one() -> None:
            channel = await stack.enter_async_context(connect(load))
            await echo_of(channel)(payload)

        return await growth(load, open_one)


async def open_streams(load: Load) -> Measured:
    payload = load.payload
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connect(load)) for _ in range(CONNECTIONS)]
        methods = cycle(
            [StreamStreamMethod(one, f"/{SERVICE}/Chat", bytes, bytes) for one in channels]
        )

        async def open_one() -> None:
            stream = await stack.enter_async_context(next(methods).open())
            stack.push_async_callback(stream.cancel)
            await stream.send_message(payload)
            await stream.recv_message()

        return await growth(load, open_one)


OPERATIONS = {
    "echo": in_asyncio(echo),
    "echo_tasks": in_asyncio(echo),
    "echo_connections": in_asyncio(echo_connections),
    "revise": in_asyncio(revise),
    "upload": in_asyncio(upload),
    "download": in_asyncio(download),
    "connects": in_asyncio(connects),
    "idle_connections": in_asyncio(idle_connections),
    "open_streams": in_asyncio(open_streams),
}
