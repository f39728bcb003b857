"""What the server keeps: chunks in packs, and a catalogue of chunks and snapshots.

The order of writes is what makes it safe to kill at any moment: a pack is in the catalogue before
it is made; chunks are in a pack, and the pack is synced, before the catalogue says so and a put is
acknowledged; a snapshot becomes visible after everything it names. Removing goes the other way: see
`collect`. The catalogue gathers in memory the chunks that it takes in, and does not wait for the
disk with them, since their records have all that it says of them: what a kill or a crash of the
machine has undone is read again from the ends of the packs when the store is opened. A crash leaves
bytes in a pack that nobody names, and nothing else.

Waiting for the disk is what a put costs, so puts share it. Each queues its chunks and waits for its
turn; whoever has the turn stores all that is queued, with one sync, and those behind it find their
chunks stored. As turns exclude each other, a chunk that is put several times at once is stored
once.
"""

import resource
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from .chunks import ID_SIZE, LIMIT, MAX_OVERHEAD, SEALED, Chunk, Codec
from .collect import Collector
from .directory import Directory
from .drafts import Draft
from .errors import (
    BackupError,
    Busy,
    ChunkError,
    PackError,
    PackMissing,
    StoreFailed,
    UnknownChunks,
)
from .interfaces import CatalogueStore, Location, PackStore
from .leases import Leases
from .pages import Page
from .reports import Checked, Collected, Usage
from .retention import Rule, Verdict, judge
from .snapshots import Snapshot, resolve
from .verify import Verifier

# Chunks in memory while a store is opened after a crash: their data, some MB.
RECOVERED = 64

# Pages in memory while a snapshot is read, for each reader: some hundred KB.
PAGES = 16


class Parts(Protocol):
    """What a store is made of, and released with."""

    @property
    def packs(self) -> PackStore:
        """Where chunks are."""
        ...

    @property
    def catalogue(self) -> CatalogueStore:
        """What is where."""
        ...

    def close(self) -> None:
        """Releases both. A second call does nothing."""
        ...


@dataclass
class _Put:
    """Chunks that wait to be stored; then how many were new, or why they are not stored."""

    chunks: Sequence[Chunk]
    settled: bool = False
    stored: int | None = None
    error: OSError | BackupError | None = None


class Store:
    """A server's store, for any number of threads and one process.

    Args:
        place: Its directory, made if it does not exist; or what it is made of.

    Raises:
        StoreLocked: Another process has it open.
        CatalogueError: Its catalogue cannot be used.
        OSError: The directory cannot be used.
    """

    def __init__(self, place: Path | Parts) -> None:
        self._parts: Parts = Directory(place) if isinstance(place, Path) else place
        self._packs = self._parts.packs
        self._catalogue = self._parts.catalogue
        self._leases = Leases(self._catalogue)
        self._codec = Codec()
        self._sealed = bool(self._catalogue.key())
        self._queue_lock = threading.Lock()
        self._queue: list[_Put] = []
        self._turn = threading.Lock()
        self._collecting = threading.Lock()
        self._began = time.monotonic()
        self._received = 0
        self._recover()

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
        """Returns the positions, in ascending order, of those ids that the store does not have.

        What `verify` found to be damaged is missing as well, until it is put again.
        Those that are there stay there for the drafts that were begun before.
        """
        found = self._catalogue.find(ids)
        return [
            position
            for position, id in enumerate(ids)
            if (stored := found.get(id)) is None or stored.condemned or stored.lost
        ]

    def put_many(self, chunks: Sequence[Chunk]) -> int:
        """Stores chunks; returns, once all are durable, how many the store did not have yet.

        Raises:
            ChunkError: One is not what it says. None is stored.
            StoreFailed: They could not be written. Trying again is safe.
        """
        with self._queue_lock:
            self._received += sum(chunk.size for chunk in chunks)
        for chunk in chunks:
            self._check(chunk)
        put = _Put(chunks)
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
        return self._read(ids, self._locate(ids))

    def begin(self, name: str, base: str = "") -> Draft:
        """Returns a new snapshot's draft, to be filled and committed, or else discarded.

        Args:
            name: The snapshot's name.
            base: The id of the snapshot whose pages can be taken over; empty for none.

        Raises:
            UnknownBase: There is no such snapshot.
        """
        return Draft(self._catalogue, self._leases, name, base)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """While in this block, chunks that are there now stay there."""
        lease = self._leases.begin()
        try:
            yield
        finally:
            self._leases.end(lease)

    def snapshots(self) -> list[Snapshot]:
        """Returns all snapshots, the oldest first."""
        return self._catalogue.snapshots()

    def find(self, reference: str) -> Snapshot:
        """Returns the snapshot with this id, else the newest of this name, else by id prefix.

        Raises:
            UnknownSnapshot: There is none, or the prefix fits several.
        """
        return resolve(reference, self.snapshots())

    def pages(self, id: str) -> Generator[Page, None, None]:
        """Yields the pages of the snapshot with this id, even if it is forgotten meanwhile.

        Raises:
            UnknownSnapshot: It is not there.
            CatalogueError: What the catalogue says of it, or a page, is damaged.
        """
        lease, keys = self._leases.begin_with(id)
        try:
            for start in range(0, len(keys), PAGES):
                yield from self._catalogue.pages(keys[start : start + PAGES])
        finally:
            self._leases.end(lease)

    def forget(self, references: Sequence[str]) -> list[Snapshot]:
        """Removes snapshots, all or none, and returns them. What only they need stays until gc.

        Raises:
            UnknownSnapshot: One is not there.
        """
        known = self.snapshots()
        found = [resolve(reference, known) for reference in references]
        self._catalogue.remove_snapshots([snapshot.id for snapshot in found])
        return found

    def forget_by_rule(self, rule: Rule, name: str = "", dry_run: bool = False) -> list[Verdict]:
        """Removes the snapshots that a rule does not keep; returns what it says of each.

        Args:
            rule: What to keep.
            name: Of which snapshots; empty for all names.
            dry_run: Whether to remove none.
        """
        verdicts = judge((one for one in self.snapshots() if name in ("", one.name)), rule)
        if not dry_run:
            forgotten = [verdict.snapshot.id for verdict in verdicts if not verdict.reasons]
            self._catalogue.remove_snapshots(forgotten)
        return verdicts

    def collect(self) -> Generator[Collected, None, None]:
        """Removes what no snapshot needs, while others back up and restore; yields how far it is.

        Raises:
            Busy: Another collection is running.
            CatalogueError: The catalogue is damaged: then nothing more is removed.
            StoreFailed: Something could not be written or removed.
        """
        if not self._collecting.acquire(blocking=False):
            raise Busy("another gc is running")
        try:
            yield from Collector(self._packs, self._catalogue, self._leases, self._turn).run()
        except OSError as error:
            raise StoreFailed(f"cannot collect: {error}") from error
        finally:
            self._collecting.release()

    def verify(self) -> Generator[Checked, None, None]:
        """Reads all that is stored; yields how far it is, and the damage found since the last."""
        return Verifier(self._packs, self._catalogue).run()

    def usage(self) -> Usage:
        """Returns what is stored, and what this process has taken for it."""
        snapshots, packs = self.snapshots(), self._catalogue.packs()
        used = resource.getrusage(resource.RUSAGE_SELF)
        return Usage(
            snapshots=len(snapshots),
            source_bytes=sum(snapshot.size for snapshot in snapshots),
            references=sum(snapshot.chunks for snapshot in snapshots),
            chunks=sum(pack.chunks for pack in packs),
            content_bytes=sum(pack.content for pack in packs),
            stored_bytes=sum(pack.used for pack in packs),
            pack_bytes=sum(pack.end for pack in packs),
            cpu_seconds=used.ru_utime + used.ru_stime,
            # Linux counts it in KiB, macOS in bytes.
            peak_memory=used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            seconds=time.monotonic() - self._began,
            received_bytes=self._received,
        )

    def key(self) -> bytes:
        """Returns the tenant's wrapped key; empty if it has none."""
        return self._catalogue.key()

    def set_key(self, wrapped: bytes) -> None:
        """Keeps the tenant's wrapped key. From now on all that is stored has to be encrypted.

        Raises:
            KeyExists: There is one; or there are backups, which are not encrypted.
        """
        with self._turn:
            self._catalogue.set_key(wrapped)
            self._sealed = True

    def close(self) -> None:
        """Closes the store after the put that has the turn. A second call does nothing."""
        with self._turn:
            self._parts.close()

    def _recover(self) -> None:
        """Takes in what packs have beyond what the catalogue knows of them: intact records only."""
        for pack in self._catalogue.packs():
            try:
                found = self._packs.scan(pack.number, pack.end)
                while records := list(islice(found, RECOVERED)):
                    self._catalogue.add((chunk, where) for where, chunk in records)
            except PackError:
                continue  # Missing, or no pack: that is for `verify` to tell.

    def _check(self, chunk: Chunk) -> None:
        """Checks that a chunk is what it says, as far as can be told without the tenant's keys."""
        if not self._sealed:
            self._codec.decode(chunk)
        elif chunk.data[:1] != SEALED:
            raise ChunkError(f"chunk {chunk.id.hex()} is not encrypted, as all have to be")
        elif len(chunk.id) != ID_SIZE or not 0 < chunk.size <= LIMIT:
            raise ChunkError(f"chunk {chunk.id.hex()} has no id, or {chunk.size} bytes")
        elif len(chunk.data) > chunk.size + MAX_OVERHEAD:
            raise ChunkError(f"chunk {chunk.id.hex()} is encoded in more bytes than it has")

    def _store_queued(self) -> None:
        with self._queue_lock:
            puts, self._queue = self._queue, []
        try:
            chunks = {chunk.id: chunk for put in puts for chunk in put.chunks}
            known = self._leases.revive(list(chunks))
            fresh = [chunk for id, chunk in chunks.items() if id not in known]
            if fresh:
                locations = self._packs.append(fresh)
                self._packs.sync()
                self._catalogue.add(zip(fresh, locations, strict=True))
        except (OSError, BackupError) as error:
            for put in puts:
                put.error = error
        else:
            new = {chunk.id for chunk in fresh}
            for put in puts:
                mine = new.intersection(chunk.id for chunk in put.chunks)
                new -= mine
                put.stored = len(mine)
        finally:
            for put in puts:
                put.settled = True

    def _locate(self, ids: Sequence[bytes]) -> list[Location]:
        found = self._catalogue.find(ids)
        if unknown := [id for id in ids if id not in found]:
            raise UnknownChunks(unknown)
        return [found[id].where for id in ids]

    def _read(self, ids: Sequence[bytes], locations: list[Location]) -> Iterator[Chunk]:
        done = 0
        while done < len(ids):
            began = done
            try:
                for chunk in self._packs.read(locations[done:]):
                    if chunk.id != ids[done]:
                        raise PackError(f"another chunk is where {ids[done].hex()} should be")
                    yield chunk
                    done += 1
            except PackMissing:
                # A collection may have moved them since they were located.
                moved = self._locate(ids[done:])
                if done == began and moved == locations[done:]:
                    raise
                locations[done:] = moved
