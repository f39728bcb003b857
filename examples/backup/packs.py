"""Pack files: many chunks in one file, appended to and never changed.

A pack begins with its format's magic. Each record is a header, fixed in size, and the encoded
chunk. The header has all that the catalogue says of a chunk, so the catalogue can be made again
from the packs; and a checksum of both, so that damage is found without decoding.

Each process that appends starts a pack of its own. What a crash left half-written at the end of an
older one stays there, unnamed by the catalogue, and reading the pack from its beginning stops
there. After a write that failed, the next one goes to the same place.

A pack that is removed vanishes for those who open it next; those who read it read on.

One thread at a time may append, sync, seal and remove; any number may read meanwhile.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from struct import Struct

from blake3 import blake3

from .chunks import ID_SIZE, LIMIT, MAX_OVERHEAD, Chunk
from .errors import PackError, PackMissing
from .files import FILES, Files
from .interfaces import Location

MAGIC = b"drvpack\1"
RECORD_MAGIC = b"chnk"

# magic, length of the encoded chunk, size of its content, id, checksum of all these and the chunk
HEADER = Struct(f">4sII{ID_SIZE}s16s")
CHECKED = HEADER.size - 16

RECORD_LIMIT = HEADER.size + LIMIT + MAX_OVERHEAD

# A pack is the unit that is copied, checked and collected: 256 MiB leaves 4,000 files for a
# terabyte, and rewriting one takes a second or two.
PACK_LIMIT = 256 * 1024 * 1024


class Packs:
    """A directory of packs.

    Args:
        directory: Made if it does not exist.
        limit: At how many bytes a new pack is begun.
        last: The highest number that a pack ever had; those of the directory count as well.
        register: Told a pack's number before it is made.
        files: What reads and writes.
    """

    def __init__(
        self,
        directory: Path,
        limit: int = PACK_LIMIT,
        *,
        last: int = 0,
        register: Callable[[int], None] = lambda _: None,
        files: Files = FILES,
    ) -> None:
        self._directory = directory
        self._limit = limit
        self._register = register
        self._files = files
        directory.mkdir(exist_ok=True)
        files.sync_directory(directory.parent)
        self._number = max(self.numbers(), default=0)
        self._number = max(self._number, last)
        self._fd = -1
        self._end = 0
        self._full: list[int] = []
        self._broken = False

    @property
    def first(self) -> int:
        """Where a pack's first record begins."""
        return len(MAGIC)

    @property
    def current(self) -> int:
        """The number of the pack that is appended to; 0 if none is."""
        return self._number if self._fd >= 0 else 0

    def numbers(self) -> list[int]:
        """Returns the numbers of all packs, in the order in which they were begun."""
        return sorted(int(path.stem) for path in self._directory.glob("*.pack"))

    def append(self, chunks: Sequence[Chunk]) -> list[Location]:
        """Writes chunks and returns their locations. They are durable after the next `sync`.

        Raises:
            OSError: They could not be written. Nothing of them counts; another try is safe.
            PackError: An earlier `sync` failed.
        """
        if self._broken:
            raise PackError("an earlier write may be lost: the packs take no more until reopened")
        if self._fd < 0 or self._end >= self._limit:
            self._begin()
        buffer = bytearray()
        locations = []
        for chunk in chunks:
            record = _header(chunk)
            location = Location(
                self._number, self._end + len(buffer), len(record) + len(chunk.data)
            )
            locations.append(location)
            buffer += record
            buffer += chunk.data
        try:
            self._files.write(self._fd, buffer, self._end)
        except OSError:
            # On a full disk, what was written of it is the space that a collection needs.
            with suppress(OSError):
                self._files.cut(self._fd, self._end)
            raise
        self._end += len(buffer)
        return locations

    def sync(self) -> None:
        """Returns when all that was appended is durable.

        Raises:
            OSError: It may not be. The kernel forgets such an error, and a second fsync would
                succeed without having written: so from now on nothing can be appended.
        """
        try:
            for fd in [*self._full, self._fd]:
                if fd >= 0:
                    self._files.sync(fd)
        except OSError:
            self._broken = True
            raise
        for fd in self._full:
            os.close(fd)
        self._full.clear()

    def seal(self) -> None:
        """Lets the next chunk begin a new pack."""
        if self._fd >= 0:
            self._full.append(self._fd)
            self._fd = -1

    def remove(self, number: int) -> None:
        """Removes a pack, if it is there.

        Raises:
            OSError: It cannot be removed.
        """
        self._files.remove(self._path(number))

    def read(self, locations: Iterable[Location]) -> Iterator[Chunk]:
        """Yields the chunks at these locations, in this order; fastest for those near each other.

        Raises:
            PackMissing: The pack is not there, maybe not any more.
            PackError: What is there is not an intact record.
        """
        fd, number = -1, -1
        try:
            for location in locations:
                if location.pack != number:
                    if fd >= 0:
                        os.close(fd)
                    fd, number = -1, location.pack
                    fd = self._open(number)
                length = min(location.length, RECORD_LIMIT)
                record = self._files.read(fd, length, location.offset)
                chunk = _parse(record)
                if chunk is None or len(record) != location.length:
                    raise PackError(
                        f"{self._path(number).name} is damaged at byte {location.offset}"
                    )
                yield chunk
        finally:
            if fd >= 0:
                os.close(fd)

    def scan(self, number: int, offset: int = 0) -> Iterator[tuple[Location, Chunk]]:
        """Yields a pack's records, up to its end or to what is not a record.

        Args:
            number: The pack's number.
            offset: Where a record begins, in bytes; 0 for the pack's beginning.

        Raises:
            PackMissing: The pack is not there.
            PackError: It is not a pack. Not raised if reading begins in the middle.
        """
        fd = self._open(number)
        try:
            if not offset:
                offset = self._begins(fd, number)
            while len(header := self._files.read(fd, HEADER.size, offset)) == HEADER.size:
                length = min(HEADER.size + HEADER.unpack(header)[1], RECORD_LIMIT)
                chunk = _parse(self._files.read(fd, length, offset))
                if chunk is None:
                    return
                yield Location(number, offset, length), chunk
                offset += length
        finally:
            os.close(fd)

    def close(self) -> None:
        """Closes the pack that is appended to. What was not synced may be lost."""
        for fd in [*self._full, self._fd]:
            if fd >= 0:
                os.close(fd)
        self._full.clear()
        self._fd = -1

    def _begins(self, fd: int, number: int) -> int:
        magic = self._files.read(fd, len(MAGIC), 0)
        # Whole, or begun at the moment of a crash: then no record follows.
        if MAGIC.startswith(magic) or not any(magic):
            return len(MAGIC)
        raise PackError(f"{self._path(number).name} is not a pack that this version reads")

    def _begin(self) -> None:
        self._register(self._number + 1)
        path = self._path(self._number + 1)
        fd = self._files.create(path)
        try:
            self._files.write(fd, MAGIC, 0)
            self._files.sync_directory(self._directory)
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        if self._fd >= 0:
            self._full.append(self._fd)
        self._fd, self._end = fd, len(MAGIC)
        self._number += 1

    def _open(self, number: int) -> int:
        try:
            return self._files.open(self._path(number))
        except FileNotFoundError as error:
            raise PackMissing(f"{self._path(number).name} is missing") from error

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08}.pack"


def _header(chunk: Chunk) -> bytes:
    unchecked = HEADER.pack(RECORD_MAGIC, len(chunk.data), chunk.size, chunk.id, b"")[:CHECKED]
    return unchecked + blake3(unchecked).update(chunk.data).digest(16)


def _parse(record: bytes) -> Chunk | None:
    """Returns the chunk of an intact record of exactly this length, or None."""
    if len(record) < HEADER.size:
        return None
    magic, length, size, id, checksum = HEADER.unpack_from(record)
    view = memoryview(record)
    data = view[HEADER.size :]
    if magic != RECORD_MAGIC or length != len(data):
        return None
    if blake3(view[:CHECKED]).update(data).digest(16) != checksum:
        return None
    return Chunk(id, size, bytes(data))
