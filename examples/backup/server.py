"""The server: a store's methods as handlers, and a process that serves them until told to stop.

The store blocks, so its methods run in threads. Puts have threads of their own, of which most wait
for the disk: the store writes whatever is queued with one sync, so the more of them wait, the more
share it. They are not gathered before they reach the store, because each is checked alone: one
client's false chunk must not fail another client's put. Long works go step by step in threads of
their own, and end between two steps when their caller leaves.
"""

import errno
import signal
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

import druvarpc
from druvarpc import RpcError, Status

from .chunks import Chunk
from .drafts import Draft
from .errors import (
    BackupError,
    Busy,
    CatalogueError,
    ChunkError,
    InvalidEntry,
    KeyExists,
    PackError,
    PageError,
    StoreFailed,
    TenantsError,
    UnknownBase,
    UnknownChunks,
    UnknownSnapshot,
)
from .pages import Page
from .reports import Checked, Collected, Usage
from .retention import Rule, Verdict
from .service import MAX_FETCH, MAX_IDS, MAX_KEY, MAX_NAME, BackupStore, Piece
from .snapshots import Snapshot
from .store import Store
from .tenancy import Tenancy
from .tenants import ANYBODY, Device, Role, Tenants

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Puts that wait for one sync together. At half a MiB each, more would hold memory for nothing.
PUT_THREADS = 16

# Questions and reads, which seldom wait: a few more than cores.
READ_THREADS = 8

# Long works, which would keep the others waiting.
WORK_THREADS = 2

# Seconds that running calls have to end once the server was told to stop. New ones are refused, so
# backups break off; the chunks they sent stay, and the next one need not send them again.
DRAIN_TIMEOUT = 10.0

# Seconds after which the file of tenants is looked at again for a connection: how long a token that
# was taken out of it still works.
IDENTITY_LIFE = 60.0

STATUSES: dict[type[BackupError], Status] = {
    ChunkError: Status.INVALID_ARGUMENT,
    InvalidEntry: Status.INVALID_ARGUMENT,
    PageError: Status.INVALID_ARGUMENT,
    UnknownBase: Status.FAILED_PRECONDITION,
    UnknownChunks: Status.FAILED_PRECONDITION,
    Busy: Status.FAILED_PRECONDITION,
    UnknownSnapshot: Status.NOT_FOUND,
    KeyExists: Status.ALREADY_EXISTS,
    PackError: Status.DATA_LOSS,
    CatalogueError: Status.DATA_LOSS,
}


class StoreService(BackupStore):
    """Serves a store, or for each tenant one.

    Args:
        stores: What is served; open for as long as this serves.
    """

    def __init__(self, stores: Store | Tenancy) -> None:
        self._tenancy = stores if isinstance(stores, Tenancy) else Tenancy.of(stores)
        self._server: druvarpc.Server | None = None
        self._puts = trio.CapacityLimiter(PUT_THREADS)
        self._reads = trio.CapacityLimiter(READ_THREADS)
        self._works = trio.CapacityLimiter(WORK_THREADS)

    def watch(self, server: druvarpc.Server) -> None:
        """Lets `usage` tell what this server did."""
        self._server = server

    async def missing(self, ids: list[bytes]) -> list[int]:
        _check_count(ids)
        async with self._opened() as store:
            return await _in_thread(store.missing, ids, limiter=self._reads)

    async def put(self, chunks: list[Chunk]) -> None:
        async with self._opened() as store:
            await _in_thread(store.put_many, chunks, limiter=self._puts)

    async def commit(
        self, name: str, base: str, pieces: AsyncIterator[list[Piece]]
    ) -> AsyncGenerator[Snapshot | None, None]:
        if not 0 < len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME:
            raise RpcError(Status.INVALID_ARGUMENT, f"a name has 1 to {MAX_NAME} bytes")
        async with self._opened() as store:
            draft = await _in_thread(store.begin, name, base, limiter=self._puts)
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
        async with self._opened() as store:
            return await _in_thread(store.snapshots, limiter=self._reads)

    async def pages(self, snapshot: str) -> AsyncGenerator[Page, None]:
        async with self._opened() as store:
            found = await _in_thread(store.find, snapshot, limiter=self._reads)
            async with aclosing(_stepped(store.pages(found.id), self._reads)) as steps:
                async for page in steps:
                    yield page

    async def hold(self) -> AsyncGenerator[None, None]:
        async with self._opened() as store:
            with ExitStack() as stack:
                await _in_thread(stack.enter_context, store.hold(), limiter=self._reads)
                try:
                    yield None
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await _in_thread(stack.close, limiter=self._reads)

    async def fetch(self, ids: list[bytes]) -> list[Chunk]:
        _check_count(ids)
        async with self._opened() as store:
            return await _in_thread(_fetch, store, ids, limiter=self._reads)

    async def key(self) -> bytes:
        async with self._opened() as store:
            return await _in_thread(store.key, limiter=self._reads)

    async def set_key(self, wrapped: bytes) -> None:
        if not 0 < len(wrapped) <= MAX_KEY:
            raise RpcError(Status.INVALID_ARGUMENT, f"a wrapped key has 1 to {MAX_KEY} bytes")
        async with self._opened() as store:
            await _in_thread(store.set_key, wrapped, limiter=self._puts)

    async def verify(self) -> AsyncGenerator[Checked, None]:
        async with (
            self._opened() as store,
            aclosing(_stepped(store.verify(), self._works)) as steps,
        ):
            async for checked in steps:
                yield checked

    async def forget(self, snapshots: list[str]) -> list[Snapshot]:
        async with self._opened(Role.FULL) as store:
            return await _in_thread(store.forget, snapshots, limiter=self._reads)

    async def forget_by_rule(self, rule: Rule, name: str, dry_run: bool) -> list[Verdict]:
        async with self._opened(Role.FULL) as store:
            return await _in_thread(store.forget_by_rule, rule, name, dry_run, limiter=self._reads)

    async def gc(self) -> AsyncGenerator[Collected, None]:
        async with (
            self._opened(Role.FULL) as store,
            aclosing(_stepped(store.collect(), self._works)) as steps,
        ):
            async for collected in steps:
                yield collected

    async def usage(self) -> Usage:
        async with self._opened() as store:
            found = await _in_thread(store.usage, limiter=self._reads)
        if self._tenancy.tenants:
            return replace(found, cpu_seconds=None, peak_memory=None)
        if self._server is None:
            return found
        did = self._server.statistics()
        return replace(
            found,
            calls=did.calls_started,
            reply_frames=did.clubs_sent,
            calls_clubbed=did.calls_clubbed,
        )

    def _opened(self, role: Role = Role.APPEND_ONLY) -> AbstractAsyncContextManager[Store]:
        """Returns the caller's store; refuses a caller whose token allows less than this."""
        device = druvarpc.current_call().identity
        if not isinstance(device, Device):
            if self._tenancy.tenants:
                raise RpcError(Status.UNAUTHENTICATED, "there is no such token")
            device = ANYBODY
        if role is Role.FULL and device.role is not Role.FULL:
            raise RpcError(Status.PERMISSION_DENIED, "this token may only back up and restore")
        return self._tenancy.opened(device)


def _fetch(store: Store, ids: list[bytes]) -> list[Chunk]:
    chunks = []
    length = 0
    for chunk in store.read_chunks(ids):
        length += len(chunk.data)
        if length > MAX_FETCH:
            raise RpcError(Status.RESOURCE_EXHAUSTED, f"more than {MAX_FETCH} bytes in one fetch")
        chunks.append(chunk)
    return chunks


def _add(draft: Draft, pieces: list[Piece]) -> None:
    pages: list[Page] = []
    for piece in pieces:
        if piece.copied:
            if pages:
                draft.add(pages)
                pages = []
            draft.copy(piece.first, piece.copied)
        if piece.page is not None:
            pages.append(piece.page)
    if pages:
        draft.add(pages)


def authenticator(tenants: Tenants) -> Callable[[druvarpc.Caller], Awaitable[druvarpc.Identity]]:
    """Returns what tells by a token whose device calls."""

    async def authenticate(caller: druvarpc.Caller) -> druvarpc.Identity:
        try:
            device = await trio.to_thread.run_sync(tenants.device, caller.token)
        except TenantsError as error:
            raise RpcError(Status.UNAVAILABLE, "the tenants cannot be read") from error
        if device is None:
            raise RpcError(Status.UNAUTHENTICATED, "there is no such token")
        return druvarpc.Identity(device, expires_in=IDENTITY_LIFE)

    return authenticate


async def serve_store(
    path: Path,
    address: str,
    *,
    tenants: Path | None = None,
    tls: druvarpc.TLS | None = None,
    task_status: trio.TaskStatus[druvarpc.Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Opens a store and serves it, until SIGTERM or SIGINT; then drains, and returns.

    Args:
        path: The store's directory; with tenants, that of all their stores.
        address: Where to listen.
        tenants: The file of tenants. Without one, everybody is the same tenant and needs no token.
        tls: How to encrypt, at a tls address.
        task_status: Told the server once it listens.

    Raises:
        BackupError: The store or the file of tenants cannot be used, or the address is none.
        OSError: The directory, or the address, cannot be used.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with Tenancy.at(path, tenants) as tenancy, trio.open_nursery() as nursery:
            authenticate = authenticator(tenancy.tenants) if tenancy.tenants else None
            serve = partial(druvarpc.serve, tls=tls, authenticate=authenticate)
            service = StoreService(tenancy)
            try:
                server = await nursery.start(serve, [service], address)
            except ValueError as error:
                raise BackupError(str(error)) from error
            service.watch(server)
            task_status.started(server)
            await anext(aiter(signals))
            await server.drain(timeout=DRAIN_TIMEOUT)
            nursery.cancel_scope.cancel()


async def _in_thread(function: Callable[[*Ts], T], *args: *Ts, limiter: trio.CapacityLimiter) -> T:
    """Runs a function in a thread. It is never abandoned: what it began, it ends."""
    with _translated():
        return await trio.to_thread.run_sync(function, *args, limiter=limiter)


async def _stepped(
    steps: Generator[T, None, None], limiter: trio.CapacityLimiter
) -> AsyncGenerator[T, None]:
    """Yields what an iterator does, each step in a thread; closes it however this ends."""
    try:
        while (found := await _in_thread(next, steps, None, limiter=limiter)) is not None:
            yield found
    finally:
        with trio.CancelScope(shield=True):
            await _in_thread(steps.close, limiter=limiter)


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
