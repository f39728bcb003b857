"""The server: a store's methods as handlers, and a process that serves them until told to stop.

The store blocks, so its methods run in threads. Puts have threads of their own, of which most wait
for the disk: the store writes whatever is queued with one sync, so the more of them wait, the more
share it. They are not gathered before they reach the store, because each is checked alone: one
client's false chunk must not fail another client's put.
"""

import errno
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

import druvarpc
from druvarpc import RpcError, Status

from .chunks import Chunk
from .errors import (
    BackupError,
    CatalogueError,
    ChunkError,
    InvalidEntry,
    PackError,
    StoreFailed,
    UnknownBase,
    UnknownChunks,
    UnknownSnapshot,
)
from .pages import Page
from .service import MAX_FETCH, MAX_IDS, BackupStore, Piece
from .snapshots import Draft, Snapshot
from .store import Store

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Puts that wait for one sync together. At half a MiB each, more would hold memory for nothing.
PUT_THREADS = 16

# Questions and reads, which seldom wait: a few more than cores.
READ_THREADS = 8

# Seconds that running calls have to end once the server was told to stop. New ones are refused, so
# backups break off; the chunks they sent stay, and the next one need not send them again.
DRAIN_TIMEOUT = 10.0

STATUSES: dict[type[BackupError], Status] = {
    ChunkError: Status.INVALID_ARGUMENT,
    InvalidEntry: Status.INVALID_ARGUMENT,
    UnknownBase: Status.FAILED_PRECONDITION,
    UnknownChunks: Status.FAILED_PRECONDITION,
    UnknownSnapshot: Status.NOT_FOUND,
    PackError: Status.DATA_LOSS,
    CatalogueError: Status.DATA_LOSS,
}


class StoreService(BackupStore):
    """Serves a store.

    Args:
        store: Open for as long as this serves.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._puts = trio.CapacityLimiter(PUT_THREADS)
        self._reads = trio.CapacityLimiter(READ_THREADS)

    async def missing(self, ids: list[bytes]) -> list[int]:
        _check_count(ids)
        return await _in_thread(self._store.missing, ids, limiter=self._reads)

    async def put(self, chunks: list[Chunk]) -> None:
        await _in_thread(self._store.put_many, chunks, limiter=self._puts)

    async def commit(
        self, name: str, base: str, pieces: AsyncIterator[list[Piece]]
    ) -> AsyncGenerator[Snapshot | None, None]:
        draft = await _in_thread(self._store.begin, name, base, limiter=self._puts)
        try:
            yield None
            async for batch in pieces:
                await _in_thread(_add, draft, batch, limiter=self._puts)
            yield await _in_thread(draft.commit, limiter=self._puts)
        finally:
            # Whatever ends the call: an error, the client's cancellation, a lost connection.
            with trio.CancelScope(shield=True):
                await _in_thread(draft.discard, limiter=self._puts)

    async def snapshots(self) -> list[Snapshot]:
        return await _in_thread(self._store.snapshots, limiter=self._reads)

    async def pages(self, snapshot: str) -> AsyncGenerator[Page, None]:
        found = await _in_thread(self._store.find, snapshot, limiter=self._reads)
        remaining = self._store.pages(found.id)
        while page := await _in_thread(next, remaining, None, limiter=self._reads):
            yield page

    async def key(self) -> bytes:
        return await _in_thread(self._store.key, limiter=self._reads)

    async def set_key(self, wrapped: bytes) -> None:
        try:
            await _in_thread(self._store.set_key, wrapped, limiter=self._puts)
        except FileExistsError as error:
            raise RpcError(Status.ALREADY_EXISTS, "there is a key already") from error

    async def hold(self) -> AsyncGenerator[None, None]:
        yield None
        await trio.sleep_forever()

    async def fetch(self, ids: list[bytes]) -> list[Chunk]:
        _check_count(ids)
        return await _in_thread(self._fetch, ids, limiter=self._reads)

    def _fetch(self, ids: list[bytes]) -> list[Chunk]:
        chunks = []
        length = 0
        for chunk in self._store.read_chunks(ids):
            length += len(chunk.data)
            if length > MAX_FETCH:
                raise RpcError(
                    Status.RESOURCE_EXHAUSTED, f"more than {MAX_FETCH} bytes in one fetch"
                )
            chunks.append(chunk)
        return chunks


async def serve_store(
    path: Path,
    address: str,
    *,
    task_status: trio.TaskStatus[druvarpc.Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Opens a store and serves it, until SIGTERM or SIGINT; then drains, and returns.

    Raises:
        BackupError: The store cannot be opened, or the address is none.
        OSError: Its directory, or the address, cannot be used.
    """
    with (
        await trio.to_thread.run_sync(Store, path) as store,
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
    ):
        async with trio.open_nursery() as nursery:
            try:
                server = await nursery.start(druvarpc.serve, [StoreService(store)], address)
            except ValueError as error:
                raise BackupError(str(error)) from error
            task_status.started(server)
            await anext(aiter(signals))
            await server.drain(timeout=DRAIN_TIMEOUT)
            nursery.cancel_scope.cancel()


async def _in_thread(function: Callable[[*Ts], T], *args: *Ts, limiter: trio.CapacityLimiter) -> T:
    """Runs a function in a thread. It is never abandoned: what it began, it ends."""
    with _translated():
        return await trio.to_thread.run_sync(function, *args, limiter=limiter)


def _add(draft: Draft, pieces: list[Piece]) -> None:
    for piece in pieces:
        if piece.count:
            draft.copy(piece.first, piece.count)
        if piece.page is not None:
            draft.add(piece.page)


def _check_count(ids: Sequence[bytes]) -> None:
    if len(ids) > MAX_IDS:
        raise RpcError(Status.INVALID_ARGUMENT, f"{len(ids)} ids in one call, at most {MAX_IDS}")


@contextmanager
def _translated() -> Iterator[None]:
    """Turns the store's errors into what the client is told: never a path of this machine."""
    try:
        yield
    except StoreFailed as error:
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else None
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        raise RpcError(
            Status.RESOURCE_EXHAUSTED if full else Status.INTERNAL,
            f"the store cannot be written: {reason or 'see its log'}",
        ) from error
    except BackupError as error:
        raise RpcError(STATUSES.get(type(error), Status.INTERNAL), str(error)) from error
