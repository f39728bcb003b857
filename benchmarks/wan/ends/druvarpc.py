"""druvarpc at both ends of a long link: the public API, at its defaults unless a job says more.

One service has all that the server does. Each operation connects, makes one call, so that what
comes with a connection isn't measured, and then does its work. What arrives is counted where it is
received, by a `Meter`: the server's, which an upload returns at its end, or the client's own.
"""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import trio

import druvarpc
from benchmarks.wan.job import STALLED, Figures, Footprint, Job, Meter, burn, now, quantiles

LARGEST_CLUB = druvarpc.Limits().max_club


class Bench(druvarpc.Service):
    """What the server does; the stub has its types from here."""

    @druvarpc.rpc
    async def echo(self, data: bytes) -> bytes:
        return data

    @druvarpc.rpc
    async def work(self, busy: float, asleep: float) -> int:
        if busy:
            burn(busy)
        if asleep:
            await trio.sleep(asleep)
        return 0

    @druvarpc.rpc
    async def upload(self, pieces: AsyncIterator[bytes]) -> dict[int, int]:
        meter = Meter()
        async for piece in pieces:
            meter.add(len(piece))
        return meter.slots

    @druvarpc.rpc
    async def download(self, size: int) -> AsyncGenerator[bytes, None]:
        piece = Job(size=size).payload
        while True:
            yield piece

    @druvarpc.rpc
    async def ignore(self, pieces: AsyncIterator[bytes]) -> int:
        await trio.sleep_forever()
        return 0


def serve(address: str, announce: Callable[[int], None]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(druvarpc.serve, [Bench()], f"tcp://{address}:0")
            announce(int(server.addresses[0].rpartition(":")[2]))

    trio.run(main)


def connect(job: Job) -> AbstractAsyncContextManager[druvarpc.Client]:
    # Not typed, so that an option can be tried which this version of druvarpc hasn't.
    connecting: Callable[..., AbstractAsyncContextManager[druvarpc.Client]] = druvarpc.connect
    return connecting(f"tcp://{job.host}:{job.port}", **job.options)


# Small calls: seconds until the last of `calls` has been answered, over a connection that was used.


async def tasks(job: Job) -> Figures:
    """Each of `count` tasks calls and waits, again and again."""
    async with connect(job) as client:
        stub, payload = client.stub(Bench), job.payload
        await stub.echo(payload)
        left = iter(range(job.calls))

        async def worker() -> None:
            for _ in left:
                await stub.echo(payload)

        start = now()
        async with trio.open_nursery() as nursery:
            for _ in range(job.count):
                nursery.start_soon(worker)
        return {"seconds": now() - start}


async def windowed(job: Job) -> Figures:
    """One task, by `druvarpc.windowed`."""
    async with connect(job) as client:
        stub, payload = client.stub(Bench), job.payload
        await stub.echo(payload)
        start = now()
        calls = druvarpc.windowed(stub.echo, [payload] * job.calls)
        async with aclosing(calls) as replies:
            async for _ in replies:
                pass
        return {"seconds": now() - start}


async def clubs(job: Job) -> Figures:
    """Clubs as large as may be, all at once."""
    async with connect(job) as client:
        stub, payload = client.stub(Bench), job.payload
        await stub.echo(payload)

        async def one(size: int) -> None:
            async with client.club() as club:
                for _ in range(size):
                    club.call(stub.echo, payload)

        start = now()
        async with trio.open_nursery() as nursery:
            for first in range(0, job.calls, LARGEST_CLUB):
                nursery.start_soon(one, min(LARGEST_CLUB, job.calls - first))
        return {"seconds": now() - start}


async def chain(job: Job) -> Figures:
    """Three calls in one club, each with the result of the one before; seconds of each chain."""
    async with connect(job) as client:
        stub, payload = client.stub(Bench), job.payload
        await stub.echo(payload)
        took: list[float] = []
        for _ in range(job.calls):
            start = now()
            async with client.club() as club:
                first = club.call(stub.echo, payload)
                second = club.call(stub.echo, first)
                third = club.call(stub.echo, second)
            assert third.value == payload
            took.append(now() - start)
        return {"took": took}


async def club_sizes(job: Job) -> Figures:
    """Clubs one after the other, of each size and for each cost; calls and seconds of each."""
    async with connect(job) as client:
        stub = client.stub(Bench)
        found: list[Figures] = []
        for busy, asleep in job.costs:
            for size in job.sizes:
                await stub.work(0.0, 0.0)
                done, start = 0, now()
                # Two at least: a large club of costly calls takes longer than there is time.
                while done < 2 or now() - start < job.seconds:
                    async with client.club() as club:
                        for _ in range(size):
                            club.call(stub.work, busy, asleep)
                    done += 1
                took = now() - start
                point = {"size": size, "busy": busy, "asleep": asleep}
                found.append(point | {"calls": done * size, "clubs": done, "seconds": took})
        return {"points": found}


# Bulk: bytes per second that arrive at the receiver's application.


async def repeated(piece: bytes, until: float, each: float) -> AsyncIterator[bytes]:
    sent = 0
    while now() < until and sent < each:
        yield piece
        sent += len(piece)


async def send(stub: Bench, job: Job, until: float, meters: list[dict[int, int]]) -> None:
    piece = job.payload
    while now() < until:
        meters.append(await stub.upload(repeated(piece, until, job.each or math.inf)))


async def receive(stub: Bench, job: Job, until: float, meters: list[dict[int, int]]) -> None:
    meter = Meter()
    while now() < until:
        left = job.each or math.inf
        async with aclosing(stub.download(job.size)) as stream:
            async for piece in stream:
                meter.add(len(piece))
                left -= len(piece)
                if now() >= until or left <= 0:
                    break
    meters.append(meter.slots)


async def bulk(job: Job) -> Figures:
    """`count` streams one way for `omit + seconds`; the rate of the last `seconds`."""
    async with connect(job) as client:
        stub = client.stub(Bench)
        await stub.echo(b"")
        meters: list[dict[int, int]] = []
        start = now()
        end = start + job.omit + job.seconds
        async with trio.open_nursery() as nursery:
            for _ in range(job.count):
                nursery.start_soon(receive if job.down else send, stub, job, end, meters)
        figures = {"rate": Meter.total(meters).rate(start + job.omit, end)}
        return figures | {"connections": client.statistics().connections}


async def pieces(job: Job) -> AsyncIterator[bytes]:
    for piece in job.pieces():
        yield piece


async def transfer(job: Job) -> Figures:
    """Seconds for `amount` bytes upwards, the acknowledgement included, over a new connection."""

    async with connect(job) as client:
        stub = client.stub(Bench)
        await stub.echo(b"")
        start = now()
        await stub.upload(pieces(job))
        return {"seconds": now() - start}


async def lanes(job: Job) -> Figures:
    """Small calls, one `every` so many seconds: alone, and then while bulk has the link."""
    async with connect(job) as client:
        bulk, small = client.stub(Bench, priority=druvarpc.Priority.BULK), client.stub(Bench)
        payload = b"s" * 64
        await small.echo(payload)

        async def one(took: list[float]) -> None:
            start = now()
            await small.echo(payload)
            took.append(now() - start)

        async def some(count: int) -> list[float]:
            # Each at its time, whether or not the one before was answered: a call that waits must
            # not keep others from being measured while it does.
            took: list[float] = []
            async with trio.open_nursery() as nursery:
                begin = trio.current_time()
                for number in range(count):
                    await trio.sleep_until(begin + number * job.every)
                    nursery.start_soon(one, took)
            return took

        idle = await some(job.calls // 4)
        meters: list[dict[int, int]] = []
        start = now()
        alone, both = start + job.omit, start + job.omit + job.seconds
        end = both + job.calls * job.every
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive if job.down else send, bulk, job, end, meters)
            await trio.sleep(both - now())
            loaded = await some(job.calls)
            done = now()
        whole = Meter.total(meters)
        rates = {"alone": whole.rate(alone, both), "together": whole.rate(both, end)}
        times = {"begin": both, "end": done}
        return {"idle": quantiles(idle), "loaded": quantiles(loaded)} | rates | times


# Memory.


async def memory(job: Job) -> Figures:
    """What both ends grow by while `amount` bytes go up."""

    async with connect(job) as client:
        stub = client.stub(Bench)
        await stub.echo(b"")
        footprint = Footprint(job)
        await stub.upload(pieces(job))
        return footprint.growth()


async def stalled(job: Job) -> Figures:
    """What both ends grow by if the handler reads nothing of the `amount` that is to be sent."""
    sent, last = 0, now()

    def counted() -> Iterator[bytes]:
        nonlocal sent, last
        for piece in job.pieces():
            sent, last = sent + len(piece), now()
            yield piece

    async def source() -> AsyncIterator[bytes]:
        for piece in counted():
            yield piece

    async with connect(job) as client, trio.open_nursery() as nursery:
        stub = client.stub(Bench)
        await stub.echo(b"")
        footprint = Footprint(job)
        nursery.start_soon(stub.ignore, source())
        while (rest := last + STALLED - now()) > 0:  # noqa: ASYNC110 - silence is no event
            await trio.sleep(rest)
        figures = footprint.growth() | {"sent": sent}
        figures["send_window"] = client.statistics().send_window
        nursery.cancel_scope.cancel()
    return figures


def in_trio(
    operation: Callable[[Job], Coroutine[Any, Any, Figures]],
) -> Callable[[Job], Figures]:
    return lambda job: trio.run(operation, job)


OPERATIONS = {
    function.__name__: in_trio(function)
    for function in (
        tasks,
        windowed,
        clubs,
        chain,
        club_sizes,
        bulk,
        transfer,
        lanes,
        memory,
        stalled,
    )
}
