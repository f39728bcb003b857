"""Clients that call without a pause, and what they see, second by second."""

import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import trio

import druvarpc

from .service import Depot

PIECES = 16
SIZE = 16 * 1024
HEAD = "  time  calls/s    calls  streams  p50 ms  p99 ms  failed  workers"


class Load:
    """What all clients together have seen.

    Args:
        address: the server's.
        clients: how many, each with a connection of its own.
        tasks: that make one small call after the other, in each client.
    """

    def __init__(self, address: str, clients: int, tasks: int) -> None:
        self.calls = 0
        self.streams = 0
        self.retried = 0
        self.reconnects = 0
        self.failures: list[str] = []
        self.pids: set[int] = set()  # of those that answered in this second
        self._address = address
        self._clients = clients
        self._tasks = tasks
        self._times: list[float] = []  # of this second's calls
        self._over = False

    async def run(self) -> None:
        """Call until `stop`; then let the calls that have begun end."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._clients):
                nursery.start_soon(self._be_a_client)

    def stop(self) -> None:
        """Begin no more calls."""
        self._over = True

    def line(self, time: float, since: float, calls: int) -> str:
        """Return what was seen in the seconds since the last line, when so many had been made."""
        times, self._times = sorted(self._times), []
        pids, self.pids = sorted(self.pids), set()
        rate = (self.calls - calls) / (time - since)
        return (
            f"{time:6.1f} {rate:8.0f} {self.calls:8} {self.streams:8} "
            f"{_percentile(times, 0.5):7.2f} {_percentile(times, 0.99):7.2f} "
            f"{len(self.failures):7}  {' '.join(map(str, pids))}"
        )

    async def _be_a_client(self) -> None:
        async with druvarpc.connect(self._address) as client:
            depot = client.stub(Depot)
            bulk = client.stub(Depot, priority=druvarpc.Priority.BULK)
            async with trio.open_nursery() as nursery:
                for _ in range(self._tasks):
                    nursery.start_soon(self._repeat, self._add, depot)
                nursery.start_soon(self._repeat, self._store, bulk)
                nursery.start_soon(self._repeat, self._fetch, bulk)
            seen = client.statistics()
            self.retried += seen.calls_retried
            self.reconnects += seen.reconnects

    async def _repeat(self, call: Callable[[Depot], Awaitable[None]], depot: Depot) -> None:
        while not self._over:
            try:
                await call(depot)
            except druvarpc.RpcError as error:
                self.failures.append(f"{error}")
                await trio.sleep(0.01)  # what can't be reached isn't called all the time

    async def _add(self, depot: Depot) -> None:
        number, start = self.calls, trio.current_time()
        total, pid = await depot.add(number, 1)
        if total != number + 1:
            self.failures.append(f"{number} + 1 was {total}")
        self._times.append(trio.current_time() - start)
        self.calls += 1
        self.pids.add(pid)

    async def _store(self, depot: Depot) -> None:
        self._note_stream(await depot.store(_pieces()))

    async def _fetch(self, depot: Depot) -> None:
        async with aclosing(depot.fetch(PIECES, SIZE)) as pieces:
            self._note_stream(sum([len(piece) async for piece in pieces]))

    def _note_stream(self, size: int) -> None:
        if size != PIECES * SIZE:
            self.failures.append(f"{size} bytes instead of {PIECES * SIZE}")
        self.streams += 1


async def _pieces() -> AsyncGenerator[bytes, None]:
    for _ in range(PIECES):
        yield bytes(SIZE)


def _percentile(times: list[float], part: float) -> float:
    """Return a percentile in milliseconds."""
    return times[int(part * (len(times) - 1))] * 1000 if times else math.nan
