"""A restore's work in portions: what is written, and what has to be fetched for it.

A *load* is a piece of the tree whose chunks are fetched by one call. The planner cuts a stream of
entries into loads; they may be fetched and written in any order, at any offsets, by several
threads. What occurs again soon is fetched once: a load may *borrow* contents of earlier ones, which
are kept for as long as the planner remembers them or a load has borrowed them.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import WeakSet

from .chunks import LIMIT
from .errors import InvalidEntry
from .output import Output
from .service import MAX_IDS
from .target import Target
from .tree import HOLE, Entry

# Content that is fetched by one call: see `service.MAX_FETCH`.
FETCH_SIZE = 1024 * 1024

# Entries of one load: only empty files come so many to a fetch.
LOAD_ENTRIES = 1000

# Content that is kept, in bytes, to be written again where it occurs again nearby: in a tree of
# Python's, of 57 MB that occur again, 54 do so within this distance.
KEPT = 32 * 1024 * 1024

# What remembering a chunk takes besides its content, in bytes: a server may send very small ones.
REMEMBERING = 256


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of the chunks of a file's entry, or an empty file.

    Attributes:
        entry: The entry.
        start: The index of the first chunk.
        stop: The index after the last.
        offset: Where in the file the first chunk begins, in bytes.
        spread: The file, if it is not all in this slice.
    """

    entry: Entry
    start: int
    stop: int
    offset: int
    spread: "Spread | None" = None


class Spread:
    """A file whose content is in several slices, which any threads write in any order.

    Args:
        entry: The file's first part.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._lock = threading.Lock()
        self._output: Output | None = None
        self._last: Entry | None = None
        self._written = 0
        self._failed = False

    def end(self, last: Entry) -> None:
        """Takes the file's last part, before the last slice is written."""
        self._last = last

    def output(self, target: Target) -> Output | None:
        """Returns the file, made by whoever comes first; None if it failed: it is told once.

        Raises:
            RestoreError: It cannot be made.
        """
        with self._lock:
            if self._failed:
                return None
            if self._output is None:
                self._failed = True
                self._output = target.open(self.entry)
                self._failed = False
            return self._output

    def fail(self) -> None:
        """Lets the slices that are left be skipped."""
        self._failed = True

    def written(self, size: int) -> Entry | None:
        """Counts what was written; finishes the file and returns its entry if that was all."""
        with self._lock:
            self._written += size
            last = self._last
            if last is None or self._output is None or self._written < last.size:
                return None
            self._output.finish(last)
            return last

    def close(self) -> None:
        """Leaves the file as it is, if it is not finished."""
        with self._lock:
            if self._output is not None:
                self._output.close()


@dataclass(eq=False)
class Load:
    """A piece of the tree, and what has to be fetched for it.

    Attributes:
        slices: What is to be written.
        wanted: The ids and sizes of the chunks to be fetched.
        borrowed: Of the others, in which earlier load each is.
        size: The content to be fetched, in bytes.
        contents: What was fetched and checked, by ids.
    """

    slices: list[Slice] = field(default_factory=list)
    wanted: dict[bytes, int] = field(default_factory=dict)
    borrowed: dict[bytes, "Load"] = field(default_factory=dict)
    size: int = 0
    contents: dict[bytes, bytes] = field(default_factory=dict)

    def is_full(self, size: int) -> bool:
        """Whether a chunk of this size is too much: of bytes, or of chunks for one call."""
        too_large = self.size > 0 and self.size + size > FETCH_SIZE
        return too_large or len(self.wanted) + len(self.borrowed) >= MAX_IDS

    def content(self, id: bytes) -> bytes:
        """Returns the content of a chunk that is needed here."""
        found = self.contents.get(id)
        return self.borrowed[id].contents[id] if found is None else found


class Planner:
    """Cuts a stream of files into loads, and remembers which chunks were fetched lately."""

    def __init__(self) -> None:
        self._load = Load()
        self._spread: Spread | None = None
        self._spreads: WeakSet[Spread] = WeakSet()
        self._kept: OrderedDict[bytes, tuple[int, Load]] = OrderedDict()
        self._kept_size = 0

    def add(self, entry: Entry) -> Iterator[Load]:
        """Takes the next file, or part of one; yields the loads that it completes.

        Raises:
            InvalidEntry: A chunk is too large, or has another size than before.
        """
        if entry.offset == 0:
            self._spread = None if entry.complete else self._new_spread(entry)
        start, begin = 0, entry.offset
        end = begin
        for index, (id, size) in enumerate(zip(entry.chunks, entry.sizes, strict=True)):
            if id != HOLE:
                if size > LIMIT:
                    raise InvalidEntry(entry.path, f"a chunk of more than {LIMIT} bytes")
                if self._load.is_full(size):
                    if index > start:
                        self._spread = self._spread or self._new_spread(entry)
                        self._slice(entry, start, index, begin)
                    yield self._next_load()
                    start, begin = index, end
                self._want(entry, id, size)
            end += size
        if entry.complete and self._spread:
            self._spread.end(entry)
        self._slice(entry, start, len(entry.chunks), begin)
        if len(self._load.slices) >= LOAD_ENTRIES:
            yield self._next_load()

    def close(self) -> None:
        """Closes files that were begun and not finished."""
        for spread in self._spreads:
            spread.close()

    def _new_spread(self, entry: Entry) -> Spread:
        spread = Spread(entry)
        self._spreads.add(spread)
        return spread

    def _slice(self, entry: Entry, start: int, stop: int, offset: int) -> None:
        self._load.slices.append(Slice(entry, start, stop, offset, self._spread))

    def finish(self) -> Load:
        """Returns the last load, which may be empty."""
        return self._next_load()

    def _want(self, entry: Entry, id: bytes, size: int) -> None:
        known = self._kept.get(id)
        if known is None:
            self._kept[id] = size, self._load
            self._kept_size += size + REMEMBERING
            self._load.wanted[id] = size
            self._load.size += size
        elif known[0] != size:
            raise InvalidEntry(entry.path, "a chunk has another size than before")
        elif known[1] is not self._load:
            self._load.borrowed[id] = known[1]

    def _next_load(self) -> Load:
        load, self._load = self._load, Load()
        while self._kept_size > KEPT:
            _, (size, _) = self._kept.popitem(last=False)
            self._kept_size -= size + REMEMBERING
        return load
