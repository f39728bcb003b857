# Declarations have no bodies.
# mypy: disable-error-code="empty-body"
"""The services under test, and the ways to reach them.

`Vault` has a method of each cardinality, `MemoryVault` answers them as one would expect, and tests
override what they want to see behave otherwise. `Gate` is for whatever must be under way while
something else happens: who enters waits inside until the gate opens.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

import druvarpc
from druvarpc.testing import connected
from tests.io.certificates import Authority


@dataclass(frozen=True)
class Chunk:
    digest: bytes
    data: bytes


@dataclass(frozen=True)
class Session:
    id: int
    owner: str
    tags: list[str] = field(default_factory=list)
    last: Chunk | None = None


class Vault(druvarpc.Service):
    @druvarpc.rpc(idempotent=True)
    async def echo(self, data: bytes) -> bytes: ...

    @druvarpc.rpc
    async def add(self, a: int, b: int = 1) -> int: ...

    @druvarpc.rpc
    async def put(self, chunk: Chunk) -> int: ...

    @druvarpc.rpc
    async def begin(self, owner: str) -> Session: ...

    @druvarpc.rpc
    async def upload(self, pieces: AsyncIterator[bytes]) -> int: ...

    @druvarpc.rpc
    def download(self, sizes: list[int]) -> AsyncGenerator[bytes, None]: ...

    @druvarpc.rpc
    def sync(self, have: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]: ...

    @druvarpc.rpc
    async def total(self, chunks: AsyncIterator[Chunk]) -> int: ...

    @druvarpc.rpc
    def chunks(self, count: int) -> AsyncGenerator[Chunk, None]: ...

    @druvarpc.rpc
    def double(self, numbers: AsyncIterator[int]) -> AsyncGenerator[int, None]: ...

    @druvarpc.rpc
    async def missing(self) -> None:
        """Not implemented by anybody."""


class MemoryVault(Vault):
    async def echo(self, data: bytes) -> bytes:
        return data

    async def add(self, a: int, b: int = 1) -> int:
        return a + b

    async def put(self, chunk: Chunk) -> int:
        return len(chunk.data)

    async def begin(self, owner: str) -> Session:
        return Session(7, owner, ["first", "second"], Chunk(b"id", b"data"))

    async def upload(self, pieces: AsyncIterator[bytes]) -> int:
        return sum([len(piece) async for piece in pieces])

    async def download(self, sizes: list[int]) -> AsyncGenerator[bytes, None]:
        for size in sizes:
            yield bytes(size)

    async def sync(self, have: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for piece in have:
            yield piece.upper()

    async def total(self, chunks: AsyncIterator[Chunk]) -> int:
        return sum([len(chunk.data) async for chunk in chunks])

    async def chunks(self, count: int) -> AsyncGenerator[Chunk, None]:
        for number in range(count):
            yield Chunk(b"%d" % number, b"data")

    async def double(self, numbers: AsyncIterator[int]) -> AsyncGenerator[int, None]:
        async for number in numbers:
            yield 2 * number


class Gate(druvarpc.Service):
    @druvarpc.rpc
    async def enter(self, name: str = "") -> str: ...

    @druvarpc.rpc
    async def enter_after(self, other: str, name: str = "") -> str: ...

    @druvarpc.rpc
    def watch(self, name: str = "") -> AsyncGenerator[str, None]: ...

    @druvarpc.rpc
    async def enter_with(self, names: AsyncIterator[str]) -> str: ...


class ClosedGate(Gate):
    """Everybody waits inside until `opened` is set.

    Attributes:
        inside: who is in there now.
        entered: who ever came in, in that order.
        cancelled: who was thrown out.
    """

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.inside: list[str] = []
        self.entered: list[str] = []
        self.cancelled: list[str] = []
        self._changed = trio.lowlevel.ParkingLot()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until somebody's coming or going has made `condition` true."""
        while not condition():
            await self._changed.park()

    async def until_inside(self, count: int = 1) -> None:
        await self.until(lambda: len(self.inside) >= count)

    async def until_empty(self) -> None:
        await self.until(lambda: not self.inside)

    @asynccontextmanager
    async def _visit(self, name: str) -> AsyncGenerator[None, None]:
        self.inside.append(name)
        self.entered.append(name)
        self._changed.unpark_all()
        try:
            yield
        except trio.Cancelled:
            self.cancelled.append(name)
            raise
        finally:
            self.inside.remove(name)
            self._changed.unpark_all()

    async def enter(self, name: str = "") -> str:
        async with self._visit(name):
            await self.opened.wait()
        return name

    async def enter_after(self, other: str, name: str = "") -> str:
        async with self._visit(name):
            await self.opened.wait()
        return f"{name} after {other}"

    async def watch(self, name: str = "") -> AsyncGenerator[str, None]:
        async with self._visit(name):
            yield f"{name} is inside"
            await self.opened.wait()
            yield f"{name} leaves"

    async def enter_with(self, names: AsyncIterator[str]) -> str:
        together: list[str] = []
        async with self._visit("all"):
            async for name in names:
                together.append(name)
                self._changed.unpark_all()
        return " and ".join(together)


# `reach(services, **options)` of a fixture: an async context manager that yields a client.
Reach = Callable[..., AbstractAsyncContextManager[druvarpc.Client]]


@asynccontextmanager
async def served(
    services: Sequence[druvarpc.Service],
    address: str = "tcp://127.0.0.1:0",
    *,
    server_limits: druvarpc.Limits = druvarpc.Limits(),
    tls: druvarpc.TLS | None = None,
) -> AsyncGenerator[druvarpc.Server, None]:
    """Serve on a real socket for the time of a block."""
    async with trio.open_nursery() as nursery:
        server: druvarpc.Server = await nursery.start(
            lambda task_status: druvarpc.serve(
                services, address, limits=server_limits, tls=tls, task_status=task_status
            )
        )
        yield server
        nursery.cancel_scope.cancel()


def reach_by(kind: str, folder: Path, ca: Authority) -> Reach:
    """Return what connects to services in memory, by TCP, by a Unix socket, or by TLS."""
    if kind == "memory":
        return connected
    address = f"unix://{folder}/socket" if kind == "unix" else f"{kind}://127.0.0.1:0"
    server_tls, client_tls = (ca.server(), ca.client()) if kind == "tls" else (None, None)

    @asynccontextmanager
    async def reach(
        services: Sequence[druvarpc.Service],
        *,
        clubbing: druvarpc.Clubbing = druvarpc.Clubbing(),
        limits: druvarpc.Limits = druvarpc.Limits(),
        server_limits: druvarpc.Limits = druvarpc.Limits(),
    ) -> AsyncGenerator[druvarpc.Client, None]:
        async with (
            served(services, address, server_limits=server_limits, tls=server_tls) as server,
            druvarpc.connect(
                server.addresses[0], tls=client_tls, clubbing=clubbing, limits=limits
            ) as client,
        ):
            yield client

    return reach
