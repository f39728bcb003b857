"""A restore's work in portions: what is written, and what has to be fetched for it.

A *load* is a piece of the tree whose chunks are fetched by one call. The planner cuts a stream of
entries into loads, the writer takes them in the same order and writes each file from its beginning
to its end, so that one file is open at a time. What occurs again soon is fetched once: both count
the same way which contents the writer still has.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from .chunks import LIMIT
from .errors import BackupError, InvalidEntry
from .target import Output, Target
from .tree import Entry, Kind, check_last, check_next

# Content that is fetched by one call: see `service.MAX_FETCH`.
FETCH_SIZE = 512 * 1024

# Entries of one load: only directories, links and empty files come so many to a fetch.
LOAD_ENTRIES = 1000

# Content that is kept, in bytes, to be written again where it occurs again nearby: in a tree of
# Python's, of 57 MB that occur again, 54 do so within this distance.
KEPT = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of the chunks of an entry, or an entry without any.

    Attributes:
        entry: The entry.
        start: The index of the first chunk.
        stop: The index after the last.
        offset: Where in the file the first chunk begins, in bytes.
    """

    entry: Entry
    start: int
    stop: int
    offset: int


@dataclass
class Load:
    """A piece of the tree, and what has to be fetched for it.

    Attributes:
        slices: What is to be written, in order.
        wanted: The ids and sizes of the chunks to be fetched. Others were in earlier loads.
        forgotten: Chunks that are not used after this load.
        size: The content to be fetched, in bytes.
        contents: What was fetched and checked, by ids.
    """

    slices: list[Slice] = field(default_factory=list)
    wanted: dict[bytes, int] = field(default_factory=dict)
    forgotten: list[bytes] = field(default_factory=list)
    size: int = 0
    contents: dict[bytes, bytes] = field(default_factory=dict)


class Planner:
    """Cuts a stream of entries into loads, and remembers which chunks the writer will have."""

    def __init__(self) -> None:
        self._last: Entry | None = None
        self._load = Load()
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._kept_size = 0

    def add(self, entry: Entry) -> Iterator[Load]:
        """Takes the next entry; yields the loads that it completes.

        Raises:
            InvalidEntry: The server sends what is no tree.
        """
        check_next(self._last, entry)
        self._last = entry
        if max(entry.sizes, default=0) > LIMIT:
            raise InvalidEntry(entry.path, f"a chunk of more than {LIMIT} bytes")
        start, begin = 0, entry.offset
        end = begin
        for index, (id, size) in enumerate(zip(entry.chunks, entry.sizes, strict=True)):
            if self._load.size + size > FETCH_SIZE and self._load.size:
                if index > start:
                    self._load.slices.append(Slice(entry, start, index, begin))
                yield self._next_load()
                start, begin = index, end
            self._want(entry, id, size)
            end += size
        self._load.slices.append(Slice(entry, start, len(entry.chunks), begin))
        if len(self._load.slices) >= LOAD_ENTRIES:
            yield self._next_load()

    def finish(self) -> Load:
        """Returns the last load, which may be empty.

        Raises:
            InvalidEntry: The last file is incomplete.
        """
        check_last(self._last)
        return self._next_load()

    def _want(self, entry: Entry, id: bytes, size: int) -> None:
        if id not in self._kept:
            self._kept[id] = size
            self._kept_size += size
            self._load.wanted[id] = size
            self._load.size += size
        elif self._kept[id] != size:
            raise InvalidEntry(entry.path, "a chunk has another size than before")

    def _next_load(self) -> Load:
        load, self._load = self._load, Load()
        while self._kept_size > KEPT:
            id, size = self._kept.popitem(last=False)
            self._kept_size -= size
            load.forgotten.append(id)
        return load


class Writer:
    """Writes loads, in order, into a directory that is made when the first one comes.

    Args:
        path: The directory's path.

    Raises:
        BackupError: It exists, and is not empty.
        OSError: It cannot be made or looked into.
    """

    def __init__(self, path: bytes) -> None:
        if os.path.lexists(path) and os.listdir(path):
            raise BackupError(f"{os.fsdecode(path)}: is not empty")
        self._path = path
        self._resources = ExitStack()
        self._target: Target | None = None
        self._output: Output | None = None
        self._contents: dict[bytes, bytes] = {}
        self.files = 0
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resources.close()
        if self._output is not None:
            self._output.close()

    def write(self, load: Load) -> None:
        """Writes a load.

        Raises:
            RestoreError: An entry cannot be restored.
            OSError: The directory cannot be made.
        """
        target = self._target
        if target is None:
            target = self._target = self._resources.enter_context(Target(self._path))
        self._contents.update(load.contents)
        for part in load.slices:
            if part.entry.kind is Kind.FILE:
                self._write_file(target, part)
            else:
                target.add(part.entry)
        for id in load.forgotten:
            del self._contents[id]

    def finish(self) -> None:
        """Makes links, and sets the modes and times of directories.

        Raises:
            RestoreError: One of them failed.
        """
        if self._target is not None:
            self._target.finish()

    def _write_file(self, target: Target, part: Slice) -> None:
        entry = part.entry
        if self._output is None:
            self._output = target.open(entry)
        offset = part.offset
        for id in entry.chunks[part.start : part.stop]:
            content = self._contents[id]
            self._output.write(offset, content)
            offset += len(content)
        if offset == entry.size:
            self._output.finish(entry)
            self._output = None
            self.files += 1
            self.bytes += entry.size
