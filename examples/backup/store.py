"""What the server keeps: chunks in packs, and a catalogue of chunks and snapshots.

The order of writes is what makes it safe to kill at any moment: chunks are in a pack and the pack
is synced, before the catalogue says so; the catalogue's transaction is durable, before a put is
acknowledged; a snapshot becomes visible after everything it names. A crash between two of these
leaves bytes in a pack that nobody names, and nothing else.

Waiting for the disk is what a put costs, so puts share it. Each queues its chunks and waits for its
turn; whoever has the turn stores all that is queued, with one sync and one transaction, and those
behind it find their chunks stored. As turns exclude each other, a chunk that is put several times
at once is stored once.
"""

import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .catalogue import Catalogue
from .chunks import SEALED, Chunk, Codec
from .errors import BackupError, PackError, StoreFailed, StoreLocked
from .packs import PACK_LIMIT, Location, Packs, fsync_directory
from .pages import Page
from .snapshots import Draft, Snapshot, Snapshots


@dataclass
class _Put:
    """Chunks that wait to be stored; then how many were new, or why they are not stored."""

    chunks: list[Chunk]
    settled: bool = False
    stored: int | None = None
    error: OSError | BackupError | None = None


class Store:
    """A server's store, for any number of threads and one process.

    Args:
        path: Its directory, made if it does not exist.
        pack_limit: At how many bytes a new pack is begun.

    Raises:
        StoreLocked: Another process has it open.
        CatalogueError: Its catalogue cannot be used.
        OSError: The directory cannot be used.
    """

    def __init__(self, path: Path, *, pack_limit: int = PACK_LIMIT) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._key = path / "key"
        with ExitStack() as stack:
            stack.enter_context(_locked(path / "lock"))
            self._packs = Packs(path / "packs", pack_limit)
            stack.callback(self._packs.close)
            self._catalogue = Catalogue(path / "catalogue.sqlite")
            stack.callback(self._catalogue.close)
            self._snapshots = Snapshots(self._catalogue)
            fsync_directory(path)
            fsync_directory(path.parent)
            self._resources = stack.pop_all()
        self._codec = Codec()
        self._queue_lock = threading.Lock()
        self._queue: list[_Put] = []
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def missing(self, ids: Sequence[bytes]) -> list[int]:
        """Returns the positions, in ascending order, of those ids that the store does not have."""
        return self._catalogue.missing(ids)

    def put_many(self, chunks: Sequence[Chunk]) -> int:
        """Stores chunks; returns, once all are durable, how many the store did not have yet.

        Raises:
            ChunkError: One is not what it says. None is stored.
            StoreFailed: They could not be written. Trying again is safe.
        """
        new = [chunks[position] for position in self.missing([chunk.id for chunk in chunks])]
        for chunk in new:
            if chunk.data[:1] != SEALED:
                self._codec.decode(chunk)
        if not new:
            return 0
        put = _Put(new)
        with self._queue_lock:
            self._queue.append(put)
        with self._turn:
            if not put.settled:
                self._store_queued()
        if put.stored is None:
            raise StoreFailed(f"cannot store: {put.error}") from put.error
        return put.stored

    def read_chunks(self, ids: Sequence[bytes]) -> Iterator[Chunk]:
        """Returns the chunks with these ids, in this order, one in memory at a time.

        Raises:
            UnknownChunks: The store does not have them all. Raised at once.
            PackError: One is damaged. Raised when it is its turn.
        """
        return self._read(ids, self._catalogue.locate(ids))

    def begin(self, name: str, base: str = "") -> Draft:
        """Returns a new snapshot's draft, to be filled and committed, or else discarded."""
        return self._snapshots.begin(name, base)

    def snapshots(self) -> list[Snapshot]:
        """Returns all snapshots, the oldest first."""
        return self._snapshots.all()

    def find(self, reference: str) -> Snapshot:
        """Returns the snapshot with this id, else the newest of this name, else by id prefix.

        Raises:
            UnknownSnapshot: There is none, or the prefix fits several.
        """
        return self._snapshots.find(reference)

    def pages(self, id: str) -> Iterator[Page]:
        """Yields the pages of the snapshot with this id.

        Raises:
            UnknownSnapshot: It is not there.
            CatalogueError: Its pages are damaged.
        """
        return self._snapshots.pages(id)

    def key(self) -> bytes:
        try:
            return self._key.read_bytes()
        except FileNotFoundError:
            return b""

    def set_key(self, wrapped: bytes) -> None:
        with self._key.open("xb") as file:
            file.write(wrapped)

    def close(self) -> None:
        """Closes the store after the put that has the turn. A second call does nothing."""
        with self._turn:
            self._resources.close()

    def _store_queued(self) -> None:
        with self._queue_lock:
            puts, self._queue = self._queue, []
        try:
            chunks = {chunk.id: chunk for put in puts for chunk in put.chunks}
            ids = list(chunks)
            new = {ids[position] for position in self.missing(ids)}
            fresh = [chunk for id, chunk in chunks.items() if id in new]
            if fresh:
                locations = self._packs.append(fresh)
                self._packs.sync()
                self._catalogue.add(zip(fresh, locations, strict=True))
        except (OSError, BackupError) as error:
            for put in puts:
                put.error = error
        else:
            for put in puts:
                mine = new.intersection(chunk.id for chunk in put.chunks)
                new -= mine
                put.stored = len(mine)
        finally:
            for put in puts:
                put.settled = True

    def _read(self, ids: Sequence[bytes], locations: list[Location]) -> Iterator[Chunk]:
        for id, chunk in zip(ids, self._packs.read(locations), strict=True):
            if chunk.id != id:
                raise PackError(f"another chunk is where {id.hex()} should be")
            yield chunk


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreLocked(f"{path.parent} is used by another process") from error
        yield
    finally:
        os.close(fd)
