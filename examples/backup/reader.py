"""A tree, read for a backup: its pages, and the content of chunks that may have to be sent.

Everything comes in batches, which are what memory is counted in: a batch is let go when the server
has acknowledged it. Only the ids of recent chunks are remembered, so that a chunk is offered once
where it occurs several times. One that was forgotten is offered again, and the server will say that
it has it.

What is as it was in the last snapshot (see `cache`) is not opened. The server has its chunks: it
keeps the last snapshot, as the new one's base, until the new one is there.
"""

import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from . import tree
from .cache import Known, LastSnapshot, NextCache, Stat, facts
from .chunks import Codec, split
from .crypt import Box
from .manifest import Sums, manifest
from .pages import MAX_ENTRIES, MAX_WEIGHT, Page, encode, is_last, weight
from .service import MAX_IDS
from .tree import HOLE, MAX_TIME, Entry, Found, Kind, Skipped

# Bytes of files in one batch: some hundred chunks, so many ids in one question. As chunks keep the
# blocks alive that they were cut from, those that are not offered count as well.
BATCH_SIZE = 8 * 1024 * 1024

# Pages of one batch, should its files be empty or known.
BATCH_PAGES = 8

# 40 MB of ids: chunks of 20 GB.
REMEMBERED = 256 * 1024

# A file's blocks are counted in this unit, whatever the file system's (stat(2)).
STAT_BLOCK = 512


@dataclass
class Batch:
    """A piece of a tree.

    Attributes:
        pages: In order; a number stands for that page of the last snapshot. The chunks they name
            are in this or earlier batches.
        contents: The content of chunks that were not in earlier batches, by their ids.
        skipped: What could not be read.
        size: How much was read for it, in bytes.
    """

    pages: list[Page | int] = field(default_factory=list)
    contents: dict[bytes, bytes | memoryview] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    size: int = 0


@dataclass
class Progress:
    """How far it is. Read by others while it changes.

    Attributes:
        files: Files that were read or found to be as before.
        size: Their size, in bytes.
        unchanged: How many of the files were as before.
        path: The last one.
    """

    files: int = 0
    size: int = 0
    unchanged: int = 0
    path: bytes = b""


class Reader:
    """Reads a tree, once.

    Args:
        root: The tree's root.
        deliver: Takes the batches, in order. It may block.
        codec: Names the chunks.
        box: Seals the pages, if there is one.
        last: The last snapshot.
        cache: Takes what is to be known of this one.
        excluded: See `tree.scan`.
        name: What the snapshot will be called.
    """

    def __init__(
        self,
        root: bytes,
        deliver: Callable[[Batch], None],
        codec: Codec,
        box: Box | None,
        last: LastSnapshot,
        cache: NextCache,
        excluded: Callable[[bytes, bool], bool] | None = None,
        name: str = "",
    ) -> None:
        self._root = root
        self._name = name
        self._sums = Sums()
        self._deliver = deliver
        self._id = codec.id
        self._box = box
        self._last = last
        self._cache = cache
        self._excluded = excluded
        self._links = tree.Links()
        self._batch = Batch()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        # The page that is being filled.
        self._entries: list[Entry | Known] = []
        self._stats: list[Stat] = []
        self._weight = 0
        # Which page of the last snapshot the known ones among them are of.
        self._page: int | None = None
        self.progress = Progress()

    def run(self) -> None:
        """Reads all of it.

        Raises:
            OSError: The root is no directory, or cannot be read.
            CacheDamaged: The last snapshot's.
        """
        for found in tree.scan(self._root, self._excluded, self._links):
            if isinstance(found, Skipped):
                self._batch.skipped.append(found)
                continue
            if abs(found.status.st_mtime_ns) > MAX_TIME:
                self._skip(found.path, "a time that is out of range: the nearest one is stored")
            if known := self._last.find(found):
                self._known(found, known)
            elif stat.S_ISREG(found.status.st_mode) and not found.link:
                self._file(found)
            else:
                self._other(found)
        self._next_page()
        if self._box is not None:
            self._batch.pages.append(manifest(self._name, self._sums, self._box))
        self._next_batch()

    def _known(self, found: Found, pieces: list[Known]) -> None:
        for known in pieces:
            # Pages end where they did, so that they are as they were.
            if self._page not in (None, known.page):
                self._next_page()
            self._page = known.page
            self._entries.append(known)
            self._stats.append(known.stat)
        if stat.S_ISREG(found.status.st_mode):
            self.progress.unchanged += 1
            self._count(found.path, found.status.st_size)
        self._end(found.path)

    def _other(self, found: Found) -> None:
        try:
            entry = tree.describe(self._root, found)
        except OSError as error:
            self._skip(found.path, error.strerror or str(error))
            return
        self._entries.append(entry)
        self._stats.append(self._cache.stat(found))
        self._weight += weight(entry)
        if entry.kind is Kind.FILE:
            self._count(found.path, entry.size)
        self._end(found.path)

    def _file(self, found: Found) -> None:
        path = found.path
        told = self._cache.stat(found)
        parts: list[Entry] = []
        try:
            with tree.opened(self._root, path) as (fd, entry, status):
                for part in tree.parts(entry, self._chunks(fd, entry, status)):
                    parts.append(part)
                    if not part.complete:
                        parts = self._part(told, parts)
                after = os.fstat(fd)
        except OSError as error:
            self._links.withdraw(found.status)
            self._skip(path, error.strerror or str(error))
            return
        changed = (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns)
        if changed:
            self._skip(path, "changed while it was read")
        # What is not all of it, or was replaced before it was opened, is read again the next time,
        # whatever its times say then. One part that is not sure is enough: see `LastSnapshot.find`.
        whole = not changed and parts[-1].size == status.st_size
        if not whole or facts(status) != facts(found.status):
            told = told._replace(facts=())
            self._links.withdraw(found.status)
        self._entries.extend(parts)
        self._stats.append(told._replace(parts=len(parts)))
        self._weight += sum(map(weight, parts))
        self._count(path, entry.size)
        self._end(path)

    def _part(self, told: Stat, parts: list[Entry]) -> list[Entry]:
        """Ends the page after parts of a file if they fill it; returns those that are left."""
        size = sum(map(weight, parts))
        if self._weight + size < MAX_WEIGHT:
            return parts
        self._entries.extend(parts)
        self._stats.append(told._replace(parts=len(parts), more=True))
        self._next_page()
        return []

    def _chunks(self, fd: int, entry: Entry, status: os.stat_result) -> Iterator[tuple[bytes, int]]:
        size = 0
        try:
            if status.st_blocks * STAT_BLOCK < entry.size:
                for length, hole in tree.extents(fd, entry.size):
                    if hole:
                        yield HOLE, length
                        size += length
                    else:
                        for chunk in self._data(fd, length):
                            yield chunk
                            size += chunk[1]
            else:
                for chunk in self._data(fd, entry.size):
                    yield chunk
                    size += chunk[1]
        except OSError as error:
            if not size:
                raise
            # What was read may be on its way to the server: the file has to end somehow.
            self._skip(entry.path, f"read only up to byte {size}: {error.strerror}")

    def _data(self, fd: int, size: int) -> Iterator[tuple[bytes, int]]:
        for content in split(fd, size):
            id = self._id(content)
            self._offer(id, content)
            yield id, len(content)

    def _offer(self, id: bytes, content: bytes | memoryview) -> None:
        if id not in self._seen:
            self._seen[id] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            self._batch.contents[id] = content
        self._batch.size += len(content)
        if self._batch.size >= BATCH_SIZE or len(self._batch.contents) >= MAX_IDS:
            self._next_batch()

    def _skip(self, path: bytes, reason: str) -> None:
        self._batch.skipped.append(Skipped(path, reason))

    def _count(self, path: bytes, size: int) -> None:
        self.progress.files += 1
        self.progress.size += size
        self.progress.path = path

    def _end(self, path: bytes) -> None:
        """Ends the page after the entries of a path, if they fill it or it is time."""
        full = self._weight >= MAX_WEIGHT or len(self._entries) >= MAX_ENTRIES
        if full or is_last(path):
            self._next_page()

    def _next_page(self) -> None:
        if not self._entries:
            return
        number = self._page
        if number is not None and self._last.is_whole(number, self._entries):
            page = self._last.page(number)
            self._batch.pages.append(number)
            self._cache.copy(self._last.raw(number))
        else:
            page = encode(self._decoded(), self._box)
            self._batch.pages.append(page)
            self._cache.add(self._stats, page)
        if self._box is not None:
            self._sums.add(page)
        if number is not None:
            self._last.forget(number)
        self._entries, self._stats, self._weight, self._page = [], [], 0, None
        if len(self._batch.pages) >= BATCH_PAGES:
            self._next_batch()

    def _decoded(self) -> Iterator[Entry]:
        for entry in self._entries:
            if isinstance(entry, Known):
                yield from self._last.entries(entry)
            else:
                yield entry

    def _next_batch(self) -> None:
        batch, self._batch = self._batch, Batch()
        self._deliver(batch)
