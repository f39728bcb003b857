"""A tree, read for a backup: its entries, and the content of chunks that may have to be sent.

Everything comes in batches, which are what memory is counted in: a batch is let go when the server
has acknowledged it. Only the ids of recent chunks are remembered, so that a chunk is offered once
where it occurs several times. One that was forgotten is offered again, and the server will say that
it has it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from . import tree
from .chunks import chunk_id, split
from .tree import PART_CHUNKS, Entry, Kind, Skipped

# Bytes of files in one batch: some hundred chunks, so many ids in one question. As chunks keep the
# blocks alive that they were cut from, those that are not offered count as well.
BATCH_SIZE = 8 * 1024 * 1024

# Empty files, directories and links have no bytes; their entries have to be sent as well.
BATCH_ENTRIES = 1000

# 40 MB of ids: chunks of 20 GB.
REMEMBERED = 256 * 1024


@dataclass
class Batch:
    """A piece of a tree.

    Attributes:
        entries: In the order of `tree.scan`. The chunks they name are in this or earlier batches.
        contents: The content of chunks that were not in earlier batches, by their ids.
        skipped: What could not be read.
        size: How much was read for it, in bytes.
    """

    entries: list[Entry] = field(default_factory=list)
    contents: dict[bytes, bytes | memoryview] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    size: int = 0


class Reader:
    """Reads a tree, once.

    Args:
        root: The tree's root.
        deliver: Takes the batches, in order. It may block.
    """

    def __init__(self, root: bytes, deliver: Callable[[Batch], None]) -> None:
        self._root = root
        self._deliver = deliver
        self._batch = Batch()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def run(self) -> None:
        """Reads all of it.

        Raises:
            OSError: The root is no directory, or cannot be read.
        """
        for found in tree.scan(self._root):
            if isinstance(found, Skipped):
                self._batch.skipped.append(found)
            elif found.kind is Kind.FILE:
                self._file(found)
            else:
                self._batch.entries.append(found)
            if len(self._batch.entries) + len(self._batch.skipped) >= BATCH_ENTRIES:
                self._next_batch()
        self._next_batch()

    def _file(self, found: Entry) -> None:
        try:
            with tree.opened(self._root, found) as (fd, entry):
                for part in tree.parts(entry, self._chunks(fd, entry)):
                    self._batch.entries.append(part)
        except OSError as error:
            self._skip(found, error.strerror or str(error))

    def _chunks(self, fd: int, entry: Entry) -> Iterator[tuple[bytes, int]]:
        count = size = 0
        try:
            for content in split(fd, entry.size):
                id = chunk_id(content)
                self._offer(id, content)
                yield id, len(content)
                count += 1
                size += len(content)
        except OSError as error:
            if count <= PART_CHUNKS:
                raise
            # A part of the file is on its way to the server: it has to end somehow.
            self._skip(entry, f"read only up to byte {size}: {error.strerror}")

    def _offer(self, id: bytes, content: bytes | memoryview) -> None:
        if id not in self._seen:
            self._seen[id] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            self._batch.contents[id] = content
        self._batch.size += len(content)
        if self._batch.size >= BATCH_SIZE:
            self._next_batch()

    def _skip(self, entry: Entry, reason: str) -> None:
        self._batch.skipped.append(Skipped(entry.path, reason))

    def _next_batch(self) -> None:
        batch, self._batch = self._batch, Batch()
        self._deliver(batch)
