"""A tree, read for a backup: its pages, and the content of chunks that may have to be sent.

Everything comes in batches. What memory is counted in are blocks: content is read into blocks, and
a block comes with the last batch that has content of it. Whoever takes the batches, in their order,
has the block then, and uses it again. Only the ids of recent chunks are remembered, so that a chunk
is offered once where it occurs several times. One that was forgotten is offered again, and the
server will say that it has it.

Reading, cutting and hashing are done by several threads: small files some at a time, of large ones
the hashing. One thread goes ahead of them, takes what they have read in the order of the tree, and
makes pages and batches of it.

What is as it was in the last snapshot (see `cache`) is not opened. The server has its chunks: it
keeps the last snapshot, as the new one's base, until the new one is there.
"""

import math
import os
import stat
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from . import tree
from .cache import Known, LastSnapshot, NextCache, Stat, facts
from .chunks import BLOCK_SIZE, Codec, Content, new_block, split
from .crypt import Box
from .links import Links
from .manifest import Sums, manifest
from .pages import MAX_ENTRIES, MAX_WEIGHT, Page, encode, is_last, weight
from .service import MAX_IDS
from .tree import HOLE, MAX_TIME, Entry, Found, Kind, Skipped

# Blocks of one batch: some hundred chunks, so many ids in one question.
BATCH_BLOCKS = 8
BATCH_SIZE = BATCH_BLOCKS * BLOCK_SIZE

# Pages of one batch, should its files be empty or known.
BATCH_PAGES = 8

# 40 MB of ids: chunks of 20 GB.
REMEMBERED = 256 * 1024

# A file's blocks are counted in this unit, whatever the file system's (stat(2)).
STAT_BLOCK = 512

# Small files are read together: as many as fit into a block, up to this number.
RUN_FILES = 128

# And up to this number of entries, with those between them that are not read.
RUN_ENTRIES = 256

# Work that is under way beside what each thread is doing: enough that none waits for more.
AHEAD = 2

A = TypeVar("A")
T = TypeVar("T")


@dataclass
class Batch:
    """A piece of a tree.

    Attributes:
        pages: In order; a number stands for that page of the last snapshot. The chunks they name
            are in this or earlier batches.
        contents: The content of chunks that were not in earlier batches, by their ids.
        skipped: What could not be read.
        size: How much was read for it, in bytes.
        blocks: What contents of this and earlier batches are in, and none of later ones.
    """

    pages: list[Page | int] = field(default_factory=list)
    contents: dict[bytes, Content] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    size: int = 0
    blocks: list[bytearray] = field(default_factory=list)


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
    content: Content


class _Read(NamedTuple):
    """What was read of a small file."""

    told: Stat
    entry: Entry
    before: os.stat_result
    after: os.stat_result
    pieces: list[_Piece]
    notes: list[str]


class _Block:
    """A block, and how much of it is taken."""

    def __init__(self, memory: bytearray) -> None:
        self.memory = memory
        self._free = memoryview(memory)

    def fits(self, size: int) -> bool:
        return size <= len(self._free)

    def take(self, size: int) -> memoryview:
        taken, self._free = self._free[:size], self._free[size:]
        return taken


class _Run:
    """Entries whose small files are read together, or that end with a large file."""

    def __init__(self) -> None:
        self.entries: list[tuple[Found | Skipped, list[Known]]] = []
        self.files: list[Found] = []
        self.size = 0
        self.block: _Block | None = None
        # Files that have grown are not in it: there is no room for them in the block.
        self.read: dict[bytes, _Read | OSError] = {}
        # The page of the last snapshot that what comes later may be known of, or a later one.
        self.reached = math.inf
        # Whether what comes later may be a link of the last one.
        self.is_linked = False

    @property
    def is_large(self) -> bool:
        return self.size > BLOCK_SIZE

    def add(self, found: Found | Skipped, known: list[Known]) -> bool:
        """Adds an entry, unless it would be too many."""
        if len(self.entries) >= RUN_ENTRIES:
            return False
        if isinstance(found, Found) and stat.S_ISREG(found.status.st_mode):
            if not known and not found.link:
                size = self.size + found.status.st_size
                if self.files and (size > BLOCK_SIZE or len(self.files) >= RUN_FILES):
                    return False
                self.size = size
                self.files.append(found)
            self.is_linked = found.status.st_nlink > 1
        self.entries.append((found, known))
        return True


class _Group(NamedTuple):
    """Chunks of a large file that are in one block, and holes: sizes, and contents if any."""

    block: _Block | None
    contents: list[tuple[int, Content | None]]


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
        block: Returns a block of BLOCK_SIZE, new or no longer used; it may block.
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
        block: Callable[[], bytearray] = lambda: bytearray(BLOCK_SIZE),
        threads: int = 1,
    ) -> None:
        self._new_block = block
        self._threads = threads
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
                for run in self._ahead(self._read_small, self._runs(), lambda run: run.is_linked):
                    self._take(run)
            finally:
                self._pool.shutdown(cancel_futures=True)
        self._next_page()
        if self._box is not None:
            self._batch.pages.append(manifest(self._name, self._sums, self._box))
        self._next_batch()

    def _ahead(
        self,
        function: Callable[[A], T],
        items: Iterator[A],
        pauses: Callable[[A], bool] = lambda _: False,
    ) -> Iterator[T]:
        """Yields function(item) for each of the items, in their order, done by the threads.

        Args:
            function: What is done.
            items: If they end with an error, it is raised after what came before.
            pauses: Says after which item the next is not asked for before this one was yielded.
        """
        pending = deque[Future[T]]()
        failed: OSError | None = None
        try:
            for item in items:
                pending.append(self._pool.submit(function, item))
                most = 0 if pauses(item) else self._threads + AHEAD
                while len(pending) > most:
                    yield pending.popleft().result()
        except OSError as error:
            failed = error
        while pending:
            yield pending.popleft().result()
        if failed is not None:
            raise failed

    def _runs(self) -> Iterator[_Run]:
        run = _Run()
        for found in tree.scan(self._root, self._excluded, self._links):
            known = [] if isinstance(found, Skipped) else self._last.find(found)
            if not run.add(found, known):
                yield self._ready(run)
                run = _Run()
                run.add(found, known)
            if run.is_large or run.is_linked:
                yield self._ready(run)
                run = _Run()
        yield self._ready(run)

    def _ready(self, run: _Run) -> _Run:
        run.reached = self._last.reached
        if run.size and not run.is_large:
            run.block = _Block(self._new_block())
        return run

    def _take(self, run: _Run) -> None:
        """Takes what the threads have read, and reads what is large."""
        for found, known in run.entries:
            if isinstance(found, Skipped):
                self._batch.skipped.append(found)
                continue
            if abs(found.status.st_mtime_ns) > MAX_TIME:
                self._skip(found.path, "a time that is out of range: the nearest one is stored")
            read = run.read.get(found.path)
            if known:
                self._known(found, known)
            elif isinstance(read, OSError):
                self._unread(found, read)
            elif read is not None:
                parts = self._parts(read.told, read.entry, read.pieces)
                self._file(found, read.told, parts, read.before, read.after, read.notes)
            elif stat.S_ISREG(found.status.st_mode) and not found.link:
                self._large(found)
            else:
                self._other(found)
        self._end_block(run.block)
        self._last.forget(min(run.reached, math.inf if self._page is None else self._page))

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
        told = self._cache.stat(found)
        try:
            entry = tree.describe(self._root, found)
        except OSError as error:
            self._skip(found.path, error.strerror or str(error))
            if not stat.S_ISDIR(found.status.st_mode):
                return
            # What is in it may be in the backup, and needs it.
            entry, told = tree.without_attributes(found), told._replace(facts=())
        self._entries.append(entry)
        self._stats.append(told)
        self._weight += weight(entry)
        if entry.kind is Kind.FILE:
            self._count(found.path, entry.size)
        self._end(found.path)

    def _read_small(self, run: _Run) -> _Run:
        """Reads the small files of a run, in one of the threads."""
        if not run.is_large:
            take = new_block if run.block is None else run.block.take
            for found in run.files:
                if (read := self._read_file(found, take)) is not None:
                    run.read[found.path] = read
        return run

    def _read_file(self, found: Found, take: Callable[[int], memoryview]) -> _Read | OSError | None:
        told = self._cache.stat(found)
        notes: list[str] = []
        try:
            with tree.opened(self._root, found.path) as (fd, entry, before):
                if before.st_size > found.status.st_size:
                    return None
                contents = _contents(fd, before, take)
                pieces = list(_as_far(map(self._piece, contents), notes))
                return _Read(told, entry, before, os.fstat(fd), pieces, notes)
        except OSError as error:
            return error

    def _large(self, found: Found) -> None:
        told = self._cache.stat(found)
        notes: list[str] = []
        try:
            with tree.opened(self._root, found.path) as (fd, entry, before):
                pieces = self._pieces(self._groups(fd, before))
                parts = self._parts(told, entry, _as_far(pieces, notes))
                after = os.fstat(fd)
        except OSError as error:
            self._unread(found, error)
            return
        self._file(found, told, parts, before, after, notes)

    def _pieces(self, groups: Iterator[_Group]) -> Iterator[_Piece]:
        """Yields the pieces of a large file, hashed by the threads."""

        def hashed(group: _Group) -> tuple[_Block | None, list[_Piece]]:
            return group.block, [self._piece(content) for content in group.contents]

        for block, pieces in self._ahead(hashed, groups):
            yield from pieces
            self._end_block(block)

    def _groups(self, fd: int, status: os.stat_result) -> Iterator[_Group]:
        """Reads a large file. If it cannot be read to its end, what could comes first."""
        failed: OSError | None = None
        groups = [_Group(None, [])]  # those that are not yielded yet: the last, and the one before

        def take(size: int) -> memoryview:
            block = groups[-1].block
            if block is None or not block.fits(size):
                block = _Block(self._new_block())
                groups.append(_Group(block, []))
            return block.take(size)

        try:
            for content in _contents(fd, status, take):
                # By now the rest of the block before has been copied into this one.
                while len(groups) > 1:
                    yield groups.pop(0)
                groups[0].contents.append(content)
        except OSError as error:
            failed = error
        yield from groups
        if failed is not None:
            raise failed

    def _piece(self, content: tuple[int, Content | None]) -> _Piece:
        size, data = content
        return _Piece(HOLE, size, b"") if data is None else _Piece(self._id(data), size, data)

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
        before: os.stat_result,
        after: os.stat_result,
        notes: list[str],
    ) -> None:
        for note in notes:
            self._skip(found.path, note)
        changed = (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns)
        if changed:
            self._skip(found.path, "changed while it was read")
        # What is not all of it, or was replaced before it was opened, is read again the next time,
        # whatever its times say then. One part that is not sure is enough: see `LastSnapshot.find`.
        whole = not changed and parts[-1].size == before.st_size
        if not whole or facts(before) != facts(found.status):
            told = told._replace(facts=())
            self._links.withdraw(found.status)
        self._entries.extend(parts)
        self._stats.append(told._replace(parts=len(parts)) if len(parts) > 1 else told)
        self._weight += sum(map(weight, parts))
        self._count(found.path, before.st_size)
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
            self._end_batch()
        self._batch.size += len(content)

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
        self._entries, self._stats, self._weight, self._page = [], [], 0, None
        self._end_batch()

    def _end_block(self, block: _Block | None) -> None:
        if block is not None:
            self._batch.blocks.append(block.memory)
            self._end_batch()

    def _end_batch(self) -> None:
        """Delivers the batch if it is full."""
        batch = self._batch
        full = len(batch.blocks) >= BATCH_BLOCKS or len(batch.contents) >= MAX_IDS
        if full or len(batch.pages) >= BATCH_PAGES:
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


def _contents(
    fd: int, status: os.stat_result, take: Callable[[int], memoryview]
) -> Iterator[tuple[int, Content | None]]:
    """Yields the chunks and holes of an open file: sizes, and contents."""
    size = status.st_size
    if status.st_blocks * STAT_BLOCK >= size:
        for content in split(fd, size, take):
            yield len(content), content
        return
    for length, hole in tree.extents(fd, size):
        if hole:
            yield length, None
        else:
            for content in split(fd, length, take):
                yield len(content), content


def _as_far(pieces: Iterable[_Piece], notes: list[str]) -> Iterator[_Piece]:
    """Yields pieces of a file until it can be read no further, which is noted.

    Raises:
        OSError: It cannot be read at all.
    """
    done = 0
    try:
        for piece in pieces:
            yield piece
            done += piece.size
    except OSError as error:
        if not done:
            raise
        # What was read may be on its way to the server: the file has to end somehow.
        notes.append(f"read only up to byte {done}: {error.strerror}")
