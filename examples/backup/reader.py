"""A tree, read for a backup: its pages, and the content of chunks that may have to be sent.

Everything comes in batches, which are what memory is counted in: a batch is let go when the server
has acknowledged it. Only the ids of recent chunks are remembered, so that a chunk is offered once
where it occurs several times. One that was forgotten is offered again, and the server will say that
it has it.

Reading, cutting and hashing are done by several threads: small files some at a time, of large ones
the hashing. One thread goes ahead of them, takes what they have read in the order of the tree, and
makes pages and batches of it.

What is as it was in the last snapshot (see `cache`) is not opened. The server has its chunks: it
keeps the last snapshot, as the new one's base, until the new one is there.
"""

import os
import stat
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from . import tree
from .cache import Known, LastSnapshot, NextCache, Stat, facts
from .chunks import BLOCK_SIZE, Codec, split
from .crypt import Box
from .links import Links
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

# Files up to this size, in bytes, are read some at a time, so many that they have that size
# together, or this number.
SMALL = 1024 * 1024
SMALL_FILES = 64

# Work that is under way beside what each thread is doing: enough that none waits for more.
AHEAD = 2

A = TypeVar("A")
T = TypeVar("T")

Content = bytes | memoryview


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
    contents: dict[bytes, Content] = field(default_factory=dict)
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


class _Piece(NamedTuple):
    """A chunk or a hole of a file."""

    id: bytes
    size: int
    content: Content = b""


class _Read(NamedTuple):
    """What was read of a small file, or why it was not."""

    told: Stat
    entry: Entry
    status: os.stat_result
    after: os.stat_result
    pieces: list[_Piece]
    notes: list[str]


class _Small:
    """Small files that are read together."""

    def __init__(self) -> None:
        self.files: list[Found] = []
        self.size = 0
        self.read: Future[list[_Read | OSError]] | None = None

    def add(self, found: Found) -> int:
        """Adds a file; returns its position."""
        self.files.append(found)
        self.size += found.status.st_size
        return len(self.files) - 1

    @property
    def full(self) -> bool:
        return self.size >= SMALL or len(self.files) >= SMALL_FILES


class _Next(NamedTuple):
    """What comes next in the tree."""

    found: Found | Skipped
    known: list[Known]
    small: _Small | None = None
    position: int = 0


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
        threads: How many read.
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
        threads: int = 1,
    ) -> None:
        self._threads = threads
        self._most_reading = threads + AHEAD
        self._root = root
        self._name = name
        self._sums = Sums()
        self._deliver = deliver
        self._id = codec.id
        self._box = box
        self._last = last
        self._cache = cache
        self._excluded = excluded
        self._links = Links()
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
        with ThreadPoolExecutor(self._threads, "reader") as self._pool:
            try:
                for following in self._scan_ahead():
                    self._take(following)
            finally:
                self._pool.shutdown(cancel_futures=True)
        self._next_page()
        if self._box is not None:
            self._batch.pages.append(manifest(self._name, self._sums, self._box))
        self._next_batch()

    def _scan_ahead(self) -> Iterator[_Next]:
        """Yields all that is found, while small files that come later are read."""
        waiting = deque[_Next]()
        small, reading = _Small(), 0
        for found in tree.scan(self._root, self._excluded, self._links):
            known = [] if isinstance(found, Skipped) else self._last.find(found)
            if known or isinstance(found, Skipped) or not _is_small(found):
                waiting.append(_Next(found, known))
            else:
                waiting.append(_Next(found, known, small, small.add(found)))
            # What others are links of depends on what is read of it.
            linked = isinstance(found, Found) and _is_linked(found)
            if small.full or (linked and small.files):
                small.read = self._pool.submit(self._read_small, small.files)
                small, reading = _Small(), reading + 1
            while waiting and (linked or waiting[0].small is None or reading > self._most_reading):
                yield (following := waiting.popleft())
                if following.small and following.position == len(following.small.files) - 1:
                    reading -= 1
        if small.files:
            small.read = self._pool.submit(self._read_small, small.files)
        yield from waiting

    def _take(self, following: _Next) -> None:
        found = following.found
        if isinstance(found, Skipped):
            self._batch.skipped.append(found)
            return
        if abs(found.status.st_mtime_ns) > MAX_TIME:
            self._skip(found.path, "a time that is out of range: the nearest one is stored")
        if following.known:
            self._known(found, following.known)
        elif following.small is not None:
            assert following.small.read is not None
            self._small(found, following.small.read.result()[following.position])
        elif stat.S_ISREG(found.status.st_mode) and not found.link:
            self._large(found)
        else:
            self._other(found)

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

    def _read_small(self, files: list[Found]) -> list[_Read | OSError]:
        """Reads files, in one of the threads."""
        return [self._read_file(found) for found in files]

    def _read_file(self, found: Found) -> _Read | OSError:
        told = self._cache.stat(found)
        notes: list[str] = []
        try:
            with tree.opened(self._root, found.path) as (fd, entry, status):
                pieces = list(_pieces(fd, entry.size, status, self._data, notes.append))
                return _Read(told, entry, status, os.fstat(fd), pieces, notes)
        except OSError as error:
            return error

    def _small(self, found: Found, read: _Read | OSError) -> None:
        if isinstance(read, OSError):
            self._unread(found, read)
            return
        for note in read.notes:
            self._skip(found.path, note)
        parts = self._parts(read.told, read.entry, read.pieces)
        self._file(found, read.told, parts, read.status, read.after)

    def _large(self, found: Found) -> None:
        told = self._cache.stat(found)
        try:
            with tree.opened(self._root, found.path) as (fd, entry, status):

                def note(text: str) -> None:
                    self._skip(found.path, text)

                pieces = _pieces(fd, entry.size, status, self._data_ahead, note)
                parts = self._parts(told, entry, pieces)
                after = os.fstat(fd)
        except OSError as error:
            self._unread(found, error)
            return
        self._file(found, told, parts, status, after)

    def _unread(self, found: Found, error: OSError) -> None:
        self._links.withdraw(found.status)
        self._skip(found.path, error.strerror or str(error))

    def _parts(self, told: Stat, entry: Entry, pieces: Iterable[_Piece]) -> list[Entry]:
        """Offers the pieces; returns the entries of the file that are not in a page yet."""
        parts: list[Entry] = []
        for part in tree.parts(entry, self._offered(pieces)):
            parts.append(part)
            if not part.complete:
                parts = self._part(told, parts)
        return parts

    def _file(
        self,
        found: Found,
        told: Stat,
        parts: list[Entry],
        status: os.stat_result,
        after: os.stat_result,
    ) -> None:
        changed = (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns)
        if changed:
            self._skip(found.path, "changed while it was read")
        # What is not all of it, or was replaced before it was opened, is read again the next time,
        # whatever its times say then. One part that is not sure is enough: see `LastSnapshot.find`.
        whole = not changed and parts[-1].size == status.st_size
        if not whole or facts(status) != facts(found.status):
            told = told._replace(facts=())
            self._links.withdraw(found.status)
        self._entries.extend(parts)
        self._stats.append(told._replace(parts=len(parts)) if len(parts) > 1 else told)
        self._weight += sum(map(weight, parts))
        self._count(found.path, status.st_size)
        self._end(found.path)

    def _part(self, told: Stat, parts: list[Entry]) -> list[Entry]:
        """Ends the page after parts of a file if they fill it; returns those that are left."""
        size = sum(map(weight, parts))
        if self._weight + size < MAX_WEIGHT:
            return parts
        self._entries.extend(parts)
        self._stats.append(told._replace(parts=len(parts), more=True))
        self._next_page()
        return []

    def _data(self, fd: int, size: int) -> Iterator[_Piece]:
        for content in split(fd, size):
            yield _Piece(self._id(content), len(content), content)

    def _data_ahead(self, fd: int, size: int) -> Iterator[_Piece]:
        """The same, hashed by the threads."""
        for pieces in self._ahead(self._hash, _grouped(split(fd, size))):
            yield from pieces

    def _hash(self, contents: list[Content]) -> list[_Piece]:
        return [_Piece(self._id(content), len(content), content) for content in contents]

    def _ahead(self, function: Callable[[A], T], items: Iterator[A]) -> Iterator[T]:
        """Yields function(item) for each of the items, in their order, done by the threads.

        If the items end with an error, it is raised after what came before.
        """
        pending = deque[Future[T]]()
        failed: OSError | None = None
        while True:
            try:
                pending.append(self._pool.submit(function, next(items)))
            except StopIteration:
                break
            except OSError as error:
                failed = error
                break
            if len(pending) > self._most_reading:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failed is not None:
            raise failed

    def _offered(self, pieces: Iterable[_Piece]) -> Iterator[tuple[bytes, int]]:
        for id, size, content in pieces:
            if id != HOLE:
                self._offer(id, content)
            yield id, size

    def _offer(self, id: bytes, content: Content) -> None:
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
            # More of this one may come.
            self._last.forget(number - 1)
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


def _is_small(found: Found) -> bool:
    status = found.status
    return stat.S_ISREG(status.st_mode) and not found.link and status.st_size <= SMALL


def _is_linked(found: Found) -> bool:
    return stat.S_ISREG(found.status.st_mode) and found.status.st_nlink > 1


def _pieces(
    fd: int,
    size: int,
    status: os.stat_result,
    data: Callable[[int, int], Iterator[_Piece]],
    note: Callable[[str], None],
) -> Iterator[_Piece]:
    """Yields the chunks and holes of an open file; `data` yields the chunks of a part of it."""
    done = 0
    try:
        if status.st_blocks * STAT_BLOCK < size:
            for length, hole in tree.extents(fd, size):
                for piece in [_Piece(HOLE, length)] if hole else data(fd, length):
                    yield piece
                    done += piece.size
        else:
            for piece in data(fd, size):
                yield piece
                done += piece.size
    except OSError as error:
        if not done:
            raise
        # What was read may be on its way to the server: the file has to end somehow.
        note(f"read only up to byte {done}: {error.strerror}")


def _grouped(chunks: Iterator[Content]) -> Iterator[list[Content]]:
    """Yields chunks together that have the size of a block."""
    group: list[Content] = []
    size = 0
    for content in chunks:
        group.append(content)
        size += len(content)
        if size >= BLOCK_SIZE:
            yield group
            group, size = [], 0
    if group:
        yield group
