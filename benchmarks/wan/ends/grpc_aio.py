"""grpc.aio at both ends of a long link, at its defaults; bytes go without a serialiser.

The operations are those of `druvarpc.py`, as far as gRPC has such a thing, and do the same work in
the same order: connect, one call, then what is measured. An upload returns its meter as JSON.
"""

# grpc comes without types.
# mypy: disable-error-code="import-untyped"
# pyright: basic

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

import grpc

from benchmarks.wan.job import STALLED, Figures, Footprint, Job, Meter, now, quantiles

SERVICE = "druvarpc.benchmarks.Wan"


async def answer_echo(request: bytes, context: object) -> bytes:
    return request


async def answer_upload(requests: AsyncIterator[bytes], context: object) -> bytes:
    meter = Meter()
    async for piece in requests:
        meter.add(len(piece))
    return json.dumps(meter.slots).encode()


async def answer_download(request: bytes, context: object) -> AsyncIterator[bytes]:
    piece = Job(size=int(request)).payload
    while True:
        yield piece


async def answer_ignore(requests: AsyncIterator[bytes], context: object) -> bytes:
    await asyncio.Event().wait()
    return b""


def serve(address: str, announce: Callable[[int], None]) -> None:
    async def main() -> None:
        server = grpc.aio.server()
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(answer_echo),
            "Upload": grpc.stream_unary_rpc_method_handler(answer_upload),
            "Download": grpc.unary_stream_rpc_method_handler(answer_download),
            "Ignore": grpc.stream_unary_rpc_method_handler(answer_ignore),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        server.add_generic_rpc_handlers((generic,))
        port = server.add_insecure_port(f"{address}:0")
        await server.start()
        announce(port)
        await server.wait_for_termination()

    asyncio.run(main())


def connect(job: Job) -> Any:
    return grpc.aio.insecure_channel(f"{job.host}:{job.port}")


def method(channel: Any, kind: str, name: str) -> Any:
    return getattr(channel, kind)(f"/{SERVICE}/{name}")


# Small calls.


async def tasks(job: Job) -> Figures:
    """Each of `count` tasks calls and waits, again and again."""
    async with connect(job) as channel:
        echo, payload = method(channel, "unary_unary", "Echo"), job.payload
        await echo(payload)
        left = iter(range(job.calls))

        async def worker() -> None:
            for _ in left:
                await echo(payload)

        start = now()
        await asyncio.gather(*(worker() for _ in range(job.count)))
        return {"seconds": now() - start}


async def chain(job: Job) -> Figures:
    """Three calls, each with the result of the one before; seconds of each chain."""
    async with connect(job) as channel:
        echo, payload = method(channel, "unary_unary", "Echo"), job.payload
        await echo(payload)
        took: list[float] = []
        for _ in range(job.calls):
            start = now()
            assert await echo(await echo(await echo(payload))) == payload
            took.append(now() - start)
        return {"took": took}


# Bulk.


async def send(channel: Any, piece: bytes, until: float) -> dict[int, int]:
    call = method(channel, "stream_unary", "Upload")()
    while now() < until:
        await call.write(piece)
    await call.done_writing()
    counted: dict[str, int] = json.loads(await call)
    return {int(slot): size for slot, size in counted.items()}


async def receive(channel: Any, size: int, until: float) -> dict[int, int]:
    meter = Meter()
    call = method(channel, "unary_stream", "Download")(b"%d" % size)
    while now() < until:
        meter.add(len(await call.read()))
    call.cancel()
    return meter.slots


async def bulk(job: Job) -> Figures:
    """`count` streams one way for `omit + seconds`; the rate of the last `seconds`."""
    async with connect(job) as channel:
        await method(channel, "unary_unary", "Echo")(b"")
        start = now()
        end = start + job.omit + job.seconds
        if job.down:
            one = partial(receive, channel, job.size, end)
        else:
            one = partial(send, channel, job.payload, end)
        meters = await asyncio.gather(*(one() for _ in range(job.count)))
        return {"rate": Meter.total(meters).rate(start + job.omit, end)}


async def upload(channel: Any, job: Job) -> None:
    call = method(channel, "stream_unary", "Upload")()
    for piece in job.pieces():
        await call.write(piece)
    await call.done_writing()
    await call


async def transfer(job: Job) -> Figures:
    """Seconds for `amount` bytes upwards, the acknowledgement included, over a new connection."""
    async with connect(job) as channel:
        await method(channel, "unary_unary", "Echo")(b"")
        start = now()
        await upload(channel, job)
        return {"seconds": now() - start}


async def lanes(job: Job) -> Figures:
    """Small calls, one `every` so many seconds: alone, and then while bulk has the link."""
    async with connect(job) as channel:
        echo, payload = method(channel, "unary_unary", "Echo"), b"s" * 64
        await echo(payload)

        async def one() -> float:
            start = now()
            await echo(payload)
            return now() - start

        async def some(count: int) -> list[float]:
            begin, calls = now(), list[asyncio.Task[float]]()
            for number in range(count):
                await asyncio.sleep(begin + number * job.every - now())
                calls.append(asyncio.create_task(one()))
            return await asyncio.gather(*calls)

        idle = await some(job.calls // 4)
        start = now()
        alone, both = start + job.omit, start + job.omit + job.seconds
        end = both + job.calls * job.every
        way = receive(channel, job.size, end) if job.down else send(channel, job.payload, end)
        bulk = asyncio.create_task(way)
        await asyncio.sleep(both - now())
        loaded = await some(job.calls)
        done = now()
        whole = Meter(await bulk)
        rates = {"alone": whole.rate(alone, both), "together": whole.rate(both, end)}
        times = {"begin": both, "end": done}
        return {"idle": quantiles(idle), "loaded": quantiles(loaded)} | rates | times


# Memory.


async def memory(job: Job) -> Figures:
    """What both ends grow by while `amount` bytes go up."""
    async with connect(job) as channel:
        await method(channel, "unary_unary", "Echo")(b"")
        footprint = Footprint(job)
        await upload(channel, job)
        return footprint.growth()


async def stalled(job: Job) -> Figures:
    """What both ends grow by if the handler reads nothing of the `amount` that is to be sent."""
    async with connect(job) as channel:
        await method(channel, "unary_unary", "Echo")(b"")
        footprint, sent, last = Footprint(job), 0, now()
        call = method(channel, "stream_unary", "Ignore")()

        async def feed() -> None:
            nonlocal sent, last
            for piece in job.pieces():
                sent, last = sent + len(piece), now()
                await call.write(piece)

        feeding = asyncio.create_task(feed())
        while (rest := last + STALLED - now()) > 0:  # noqa: ASYNC110 - silence is no event
            await asyncio.sleep(rest)
        figures = footprint.growth() | {"sent": sent}
        feeding.cancel()
        call.cancel()
    return figures


def in_asyncio(
    operation: Callable[[Job], Coroutine[Any, Any, Figures]],
) -> Callable[[Job], Figures]:
    return lambda job: asyncio.run(operation(job))


OPERATIONS = {
    function.__name__: in_asyncio(function)
    for function in (tasks, chain, bulk, transfer, lanes, memory, stalled)
}
