"""grpc.aio: gRPC's C core; bytes go without a serialiser, records as protobuf."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from itertools import cycle
from typing import Any

import grpc

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
    pipelined,
    until,
)
from benchmarks.record import FIELDS, read_fields, revised

NAME = "grpc.aio"
PACKAGE = "grpcio"

SERVICE = "druvarpc.benchmarks.Bench"
# Channels to one address share a connection, unless they are told not to.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def record_type() -> Any:
    """Compile the message's definition; needs grpcio-tools."""
    return grpc.protos("benchmarks/peers/record.proto").Record


async def answer_echo(request: bytes, context: object) -> bytes:
    return request


async def answer_upload(requests: AsyncIterator[bytes], context: object) -> bytes:
    total = 0
    async for piece in requests:
        total += len(piece)
    return b"%d" % total


async def answer_download(request: bytes, context: object) -> AsyncIterator[bytes]:
    piece = noise(int(request))
    while True:
        yield piece


async def answer_chat(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for message in requests:
        yield message


def serve(announce: Callable[[int], None]) -> None:
    record = record_type()

    async def answer_revise(request: Any, context: object) -> Any:
        return record(**revised(request))

    async def main() -> None:
        server = grpc.aio.server()
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(answer_echo),
            "Revise": grpc.unary_unary_rpc_method_handler(
                answer_revise, record.FromString, record.SerializeToString
            ),
            "Upload": grpc.stream_unary_rpc_method_handler(answer_upload),
            "Download": grpc.unary_stream_rpc_method_handler(answer_download),
            "Chat": grpc.stream_stream_rpc_method_handler(answer_chat),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        server.add_generic_rpc_handlers((generic,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        announce(port)
        await server.wait_for_termination()

    asyncio.run(main())


def connect(load: Load) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{load.port}", OWN_CONNECTION)


def echo_of(channel: grpc.aio.Channel) -> grpc.aio.UnaryUnaryMultiCallable:
    return channel.unary_unary(f"/{SERVICE}/Echo")


async def echo(load: Load) -> Measured:
    async with connect(load) as channel:
        return await asyncio_tasks(load, [partial(echo_of(channel), load.payload)] * load.count)


async def echo_ahead(load: Load) -> Measured:
    async with connect(load) as channel:
        return await pipelined(load, partial(echo_of(channel), load.payload), load.count)


async def revise(load: Load) -> Measured:
    record = record_type()
    async with connect(load) as channel:
        method = channel.unary_unary(
            f"/{SERVICE}/Revise", record.SerializeToString, record.FromString
        )

        async def call() -> None:
            read_fields(await method(record(**FIELDS)))

        return await asyncio_tasks(load, [call] * load.count)


async def upload(load: Load) -> Measured:
    async with connect(load) as channel:
        method, piece = channel.stream_unary(f"/{SERVICE}/Upload"), load.payload

        async def phase(seconds: float) -> int:
            call = method()
            for one in pieces(piece, seconds):
                await call.write(one)
            await call.done_writing()
            return int(await call)

        await phase(load.warm_up)
        watch = Stopwatch(load)
        return watch.rate(await phase(load.seconds))


async def download(load: Load) -> Measured:
    async with connect(load) as channel:
        call = channel.unary_stream(f"/{SERVICE}/Download")(b"%d" % load.size)
        more = until(load.warm_up)
        while more():
            await call.read()
        total = 0
        watch, more = Stopwatch(load), until(load.seconds)
        while more():
            total += len(await call.read())
        measured = watch.rate(total)
        call.cancel()
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
        methods = cycle([channel.stream_stream(f"/{SERVICE}/Chat") for channel in channels])

        async def open_one() -> None:
            call = next(methods)()
            stack.callback(call.cancel)
            await call.write(payload)
            await call.read()

        return await growth(load, open_one)


OPERATIONS = {
    "echo": in_asyncio(echo),
    "echo_tasks": in_asyncio(echo),
    "echo_ahead": in_asyncio(echo_ahead),
    "echo_connections": in_asyncio(echo_connections),
    "revise": in_asyncio(revise),
    "upload": in_asyncio(upload),
    "download": in_asyncio(download),
    "connects": in_asyncio(connects),
    "idle_connections": in_asyncio(idle_connections),
    "open_streams": in_asyncio(open_streams),
}
