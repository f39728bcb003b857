"""What runs in a client's process: repeat an operation for some seconds, and say how fast it went.

Every measurement warms up first, by the same work. The rate is what was done divided by the time
until the last of it had ended.
"""

import asyncio
import os
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Load:
    """What a client is to do.

    Attributes:
        port: the server's, on the loopback interface.
        server: the server's process.
        warm_up: seconds before the measurement.
        seconds: of the measurement.
        size: bytes of a payload or piece.
        count: calls in flight, connections, or streams.
    """

    port: int
    server: int
    warm_up: float
    seconds: float
    size: int = 64
    count: int = 1

    @property
    def payload(self) -> bytes:
        """What to send."""
        return noise(self.size)


@dataclass(frozen=True)
class Measured:
    """A measurement: the figure that counts, and how busy each process was (1: one core)."""

    value: float
    client_busy: float | None = None
    server_busy: float | None = None


def folder(process: int) -> Path:
    """Return where a server may keep files; who measures it removes them."""
    return Path(tempfile.gettempdir(), f"druvarpc-bench-{process}")


def noise(size: int) -> bytes:
    """Return bytes that don't compress: rpyc compresses by default."""
    return os.urandom(size)


class Stopwatch:
    """Time and processor time of both processes, from its making on."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._server = processor_seconds(load.server)
        self._client = time.process_time()
        self._start = time.perf_counter()

    def rate(self, count: int) -> Measured:
        """Return the rate of something that was done `count` times."""
        seconds = time.perf_counter() - self._start
        client = time.process_time() - self._client
        server = processor_seconds(self._load.server) - self._server
        return Measured(count / seconds, client / seconds, server / seconds)


def until(seconds: float) -> Callable[[], bool]:
    """Return a function that says whether the time is not over yet."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end


def pieces(piece: bytes, seconds: float) -> Iterator[bytes]:
    """Yield the same bytes again and again for some seconds."""
    more = until(seconds)
    while more():
        yield piece


# Tasks that each call again and again.


async def asyncio_tasks(load: Load, calls: Sequence[Call]) -> Measured:
    """Measure calls per second of one asyncio task for each of `calls`."""

    async def phase(seconds: float) -> int:
        more = until(seconds)
        return sum(await asyncio.gather(*(repeat(call, more) for call in calls)))

    await phase(load.warm_up)
    watch = Stopwatch(load)
    return watch.rate(await phase(load.seconds))


async def trio_tasks(load: Load, calls: Sequence[Call]) -> Measured:
    """Measure calls per second of one trio task for each of `calls`."""

    async def phase(seconds: float) -> int:
        more = until(seconds)
        counts: list[int] = []

        async def worker(call: Call) -> None:
            counts.append(await repeat(call, more))

        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(worker, call)
        return sum(counts)

    await phase(load.warm_up)
    watch = Stopwatch(load)
    return watch.rate(await phase(load.seconds))


def in_asyncio(
    operation: Callable[[Load], Coroutine[Any, Any, Measured]],
) -> Callable[[Load], Measured]:
    """Return the operation as a function that runs an event loop for it."""
    return lambda load: asyncio.run(operation(load))


async def repeat(call: Call, more: Callable[[], bool]) -> int:
    """Call until the time is over; return how often."""
    count = 0
    while more():
        await call()
        count += 1
    return count


# One task that keeps several calls in flight.


async def pipelined(load: Load, start: Call, window: int, worth: int = 1) -> Measured:
    """Measure one task that keeps `window` calls in flight, and awaits them in order.

    Each call is worth so many of what is counted: 1, or the bytes that it brings.
    """
    await _pipeline(load.warm_up, start, window)
    watch = Stopwatch(load)
    return watch.rate(await _pipeline(load.seconds, start, window) * worth)


async def _pipeline(seconds: float, start: Call, window: int) -> int:
    more, count = until(seconds), 0
    flying: deque[Awaitable[object]] = deque()
    while more():
        while len(flying) < window:
            flying.append(start())
        await flying.popleft()
        count += 1
    for reply in flying:
        await reply
    return count + len(flying)


# The server's process, seen from outside.

# Connections that open streams are spread over: 100 streams each is what HTTP/2 peers take.
CONNECTIONS = 60
# Part that is opened before the memory is measured, so that what the first ones cost isn't counted.
FIRST = 0.1
# Seconds until a server has done what opening things left for later.
SETTLING = 0.5


async def growth(load: Load, open_one: Call) -> Measured:
    """Measure the bytes that the server grows by for each of `load.count` that are opened."""
    for _ in range(int(load.count * FIRST)):
        await open_one()
    before = settled_bytes(load.server)
    for _ in range(load.count):
        await open_one()
    return Measured((settled_bytes(load.server) - before) / load.count)


def settled_bytes(process: int) -> int:
    """Return the memory of a process a moment later."""
    time.sleep(SETTLING)
    return resident_bytes(process)


def processor_seconds(process: int) -> float:
    """Return the processor time that a process has used."""
    # Behind the name, which is in brackets and may hold anything: fields 14 and 15 of proc(5).
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(process: int) -> int:
    """Return the memory of a process that is resident."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
