"""Where the tests of connections and of what becomes of calls find their servers."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio

import druvarpc
from druvarpc.client import Client, connect_to
from druvarpc.dialing import Target, Terms
from druvarpc.testing import Link
from druvarpc.transports import Transport, memory_transports

now = trio.current_time


class Network:
    """Where a client finds a server of its own at the end of each connection.

    Attributes:
        servers: one for each connection, in the order in which they were made.
        ends: of each connection, the client's first.
        dials: when the client tried to make one.
        answer: what becomes of an attempt.
    """

    def __init__(self, nursery: trio.Nursery, *services: Any, link: Link | None = None) -> None:
        self.servers: list[druvarpc.Server] = []
        self.ends: list[tuple[Transport, Transport]] = []
        self.dials: list[float] = []
        self.answer: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self._nursery = nursery
        self._services = services
        self._link = link

    async def dial(self) -> Transport:
        self.dials.append(now())
        await self.answer()
        near, far = self._link.connect() if self._link else memory_transports()
        server = druvarpc.Server(self._services, druvarpc.Limits())
        self.ends.append((near, far))
        self.servers.append(server)
        self._nursery.start_soon(server.serve_transport, far)
        return near

    def connect(
        self, number: Any = 1, timeout: float = 10, *, reconnect: bool = True, **options: Any
    ) -> AbstractAsyncContextManager[Client]:
        terms = Terms(number, timeout=timeout, reconnect=reconnect)
        return connect_to([Target("network", self.dial)], terms, **options)

    def lose(self, index: int) -> None:
        """End a connection at the server's end, without a word."""
        self.ends[index][1].close()

    @property
    def calls(self) -> list[int]:
        """Calls that each server has begun, in the order of connections."""
        return [server.statistics().calls_started for server in self.servers]

    @property
    def active(self) -> list[int]:
        return [server.statistics().calls_active for server in self.servers]


async def refuse() -> None:
    raise druvarpc.ConnectionLost("can't connect to network: refused", not_started=True)


class Outcomes:
    """What calls of other tasks came to."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.results: list[Any] = []
        self.errors: list[druvarpc.RpcError] = []
        self._nursery = nursery

    def start(self, call: Callable[..., Awaitable[Any]], *args: Any) -> None:
        self._nursery.start_soon(self._note, call, args)

    async def _note(self, call: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        try:
            self.results.append(await call(*args))
        except druvarpc.RpcError as error:
            self.errors.append(error)
