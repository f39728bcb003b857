"""Packs and a catalogue in memory: for tests, and the shortest account of what both have to do.

See `interfaces`. Nothing of it outlives the process, and nothing of it can be torn.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from .chunks import Chunk
from .errors import (
    CatalogueError,
    KeyExists,
    PackError,
    PackMissing,
    UnknownChunks,
    UnknownSnapshot,
)
from .interfaces import Location, PackUse, Stored
from .pages import Page
from .snapshots import Snapshot


class MemoryPacks:
    """Packs as lists.

    Args:
        catalogue: Told of each pack before it is made.
        limit: At how many chunks a new pack is begun.
    """

    def __init__(self, catalogue: "MemoryCatalogue", limit: int = 100) -> None:
        self._catalogue = catalogue
        self._limit = limit
        self._packs: dict[int, list[Chunk]] = {}
        self.current = 0

    @property
    def first(self) -> int:
        """Where a pack's first record begins."""
        return 0

    def numbers(self) -> list[int]:
        return sorted(self._packs)

    def append(self, chunks: Sequence[Chunk]) -> list[Location]:
        if not self.current or len(self._packs[self.current]) >= self._limit:
            self.current = self._catalogue.last_pack() + 1
            self._catalogue.begin_pack(self.current)
            self._packs[self.current] = []
        pack = self._packs[self.current]
        first = len(pack)
        pack.extend(chunks)
        return [Location(self.current, first + position, 1) for position in range(len(chunks))]

    def sync(self) -> None:
        pass

    def seal(self) -> None:
        self.current = 0

    def remove(self, number: int) -> None:
        self._packs.pop(number, None)

    def read(self, locations: Iterable[Location]) -> Iterator[Chunk]:
        for location in locations:
            pack = self._pack(location.pack)
            if location.length != 1 or not 0 <= location.offset < len(pack):
                raise PackError(f"pack {location.pack} has no chunk at {location.offset}")
            yield pack[location.offset]

    def scan(self, number: int, offset: int = 0) -> Iterator[tuple[Location, Chunk]]:
        for at, chunk in enumerate(self._pack(number)[offset:], offset):
            yield Location(number, at, 1), chunk

    def close(self) -> None:
        pass

    def _pack(self, number: int) -> list[Chunk]:
        if number not in self._packs:
            raise PackMissing(f"pack {number} is missing")
        return self._packs[number]


class MemoryCatalogue:
    """A catalogue as dictionaries, behind one lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._chunks: dict[bytes, Stored] = {}
        self._packs: dict[int, int] = {}
        self._last_pack = 0
        self._pages: dict[int, Page] = {}
        self._last_page = 0
        self._snapshots: dict[str, tuple[Snapshot, list[int]]] = {}
        self._generation = 1
        self._key = b""

    def find(self, ids: Sequence[bytes]) -> dict[bytes, Stored]:
        with self._lock:
            return {id: self._chunks[id] for id in ids if id in self._chunks}

    def add(self, chunks: Iterable[tuple[Chunk, Location]]) -> None:
        with self._lock:
            for chunk, where in chunks:
                end = max(self._packs.get(where.pack, 0), where.offset + where.length)
                self._packs[where.pack] = end
                known = self._chunks.get(chunk.id)
                if known is None or known.lost:
                    self._chunks[chunk.id] = Stored(chunk.id, where, chunk.size)

    def chunks(self, after: bytes, limit: int) -> list[Stored]:
        with self._lock:
            ids = sorted(id for id in self._chunks if id > after)
            return [self._chunks[id] for id in ids[:limit]]

    def condemn(self, ids: Sequence[bytes], generation: int) -> None:
        with self._lock:
            for id, stored in self.find(ids).items():
                if not stored.condemned:
                    self._chunks[id] = replace(stored, condemned=generation)

    def revive(self, ids: Sequence[bytes]) -> None:
        with self._lock:
            for id, stored in self.find(ids).items():
                self._chunks[id] = replace(stored, condemned=0)

    def condemned(self) -> int:
        with self._lock:
            return sum(stored.condemned > 0 for stored in self._chunks.values())

    def lost(self) -> set[bytes]:
        with self._lock:
            return {id for id, stored in self._chunks.items() if stored.lost}

    def set_lost(self, stored: Stored, lost: bool) -> None:
        with self._lock:
            now = self._chunks.get(stored.id)
            if now is not None and now.where == stored.where:
                self._chunks[stored.id] = replace(now, lost=lost)

    def begin_pack(self, number: int) -> None:
        with self._lock:
            self._packs.setdefault(number, 0)
            self._last_pack = max(self._last_pack, number)

    def last_pack(self) -> int:
        return max(self._last_pack, *self._packs, 0)

    def packs(self) -> list[PackUse]:
        with self._lock:
            return [
                PackUse(
                    number,
                    end,
                    sum(stored.where.length for stored in self._in(number)),
                    len(self._in(number)),
                    sum(stored.size for stored in self._in(number)),
                )
                for number, end in sorted(self._packs.items())
            ]

    def in_pack(self, number: int, offset: int, limit: int) -> list[Stored]:
        with self._lock:
            found = [stored for stored in self._in(number) if stored.where.offset >= offset]
            return sorted(found, key=lambda stored: stored.where.offset)[:limit]

    def sweep(self, number: int, generation: int) -> tuple[int, int]:
        with self._lock:
            swept = [one for one in self._in(number) if 0 < one.condemned <= generation]
            for stored in swept:
                del self._chunks[stored.id]
            return len(swept), sum(stored.where.length for stored in swept)

    def move(self, moves: Sequence[tuple[Stored, Location]]) -> None:
        with self._lock:
            for stored, to in moves:
                self._packs[to.pack] = max(self._packs.get(to.pack, 0), to.offset + to.length)
                now = self._chunks.get(stored.id)
                if now is not None and now.where == stored.where:
                    self._chunks[stored.id] = replace(now, where=to)

    def end_pack(self, number: int) -> None:
        with self._lock:
            if not self._in(number):
                self._packs.pop(number, None)

    def add_pages(self, pages: Sequence[Page]) -> list[int]:
        with self._lock:
            ids = list({id for page in pages for id in page.ids()})
            if unknown := [id for id in ids if id not in self._chunks]:
                raise UnknownChunks(unknown)
            self.revive(ids)
            keys = range(self._last_page + 1, self._last_page + 1 + len(pages))
            self._pages.update(zip(keys, pages, strict=True))
            self._last_page += len(pages)
            return list(keys)

    def pages(self, keys: Sequence[int]) -> list[Page]:
        with self._lock:
            if missing := [key for key in keys if key not in self._pages]:
                raise CatalogueError(f"page {missing[0]} of the catalogue is missing")
            return [self._pages[key] for key in keys]

    def used_pages(self) -> set[int]:
        with self._lock:
            return {key for _, keys in self._snapshots.values() for key in keys}

    def unused_pages(self) -> set[int]:
        with self._lock:
            return set(self._pages) - self.used_pages()

    def remove_pages(self, keys: Sequence[int]) -> None:
        with self._lock:
            for key in keys:
                self._pages.pop(key, None)

    def commit(self, snapshot: Snapshot, pages: Sequence[int]) -> None:
        with self._lock:
            self._snapshots[snapshot.id] = snapshot, list(pages)

    def snapshots(self) -> list[Snapshot]:
        with self._lock:
            found = [snapshot for snapshot, _ in self._snapshots.values()]
        return sorted(found, key=lambda snapshot: snapshot.created_ns)

    def contents(self, id: str) -> list[int]:
        with self._lock:
            if id not in self._snapshots:
                raise UnknownSnapshot(f"no snapshot has the id {id}")
            return list(self._snapshots[id][1])

    def remove_snapshots(self, ids: Sequence[str]) -> None:
        with self._lock:
            for id in ids:
                self._snapshots.pop(id, None)

    def generation(self) -> int:
        return self._generation

    def set_generation(self, generation: int) -> None:
        self._generation = generation

    def key(self) -> bytes:
        return self._key

    def set_key(self, wrapped: bytes) -> None:
        with self._lock:
            if self._key:
                raise KeyExists("there is a key already")
            if self._chunks or self._pages:
                raise KeyExists("there are backups already, and they are not encrypted")
            self._key = wrapped

    def check(self) -> list[str]:
        return []

    def close(self) -> None:
        pass

    def _in(self, number: int) -> list[Stored]:
        return [stored for stored in self._chunks.values() if stored.where.pack == number]


class Memory:
    """What a store in memory is made of."""

    def __init__(self) -> None:
        self.catalogue = MemoryCatalogue()
        self.packs = MemoryPacks(self.catalogue)

    def close(self) -> None:
        """Does nothing."""
