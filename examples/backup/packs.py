"""Pack files: many chunks in one file, appended to and never changed.

A pack begins with its format's magic. Each record is a header, fixed in size, and the encoded
chunk. The header has all that the catalogue says of a chunk, so the catalogue can be made again
from the packs; and a checksum of both, so that damage is found without decoding.

Each process that appends starts a pack of its own. What a crash left half-written at the end of an
older one stays there, unnamed by the catalogue, and reading the pack from its beginning stops
there. After a write that failed, the next one goes to the same place.

One thread at a time may append and sync; any number may read meanwhile.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from blake3 import blake3

from .chunks import ID_SIZE, LIMIT, MAX_OVERHEAD, Chunk
from .errors import PackError

MAGIC = b"drvpack\1"
RECORD_MAGIC = b"chnk"

# magic, length of the encoded chunk, size of its content, id, checksum of all these and the chunk
HEADER = Struct(f">4sII{ID_SIZE}s16s")
CHECKED = HEADER.size - 16

# See chunks.MAX_OVERHEAD.
RECORD_LIMIT = HEADER.size + MAX_OVERHEAD + LIMIT

# A pack is the unit that is copied, checked and one day collected: 256 MiB leaves 4,000 files for
# a terabyte, and rewriting one takes a second or two.
PACK_LIMIT = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record is.

    Attributes:
        pack: The pack's number.
        offset: Where in it the record begins, in bytes.
        length: The whole record's length in bytes, with its header.
    """

    pack: int
    offset: int
    length: int


class Packs:
    """A directory of packs.

    Args:
        directory: Made if it does not exist.
        limit: At how many bytes a new pack is begun.
    """

    def __init__(self, directory: Path, limit: int = PACK_LIMIT) -> None:
        self._directory = directory
        self._limit = limit
        directory.mkdir(exist_ok=True)
        fsync_directory(directory.parent)
        self._number = max(self.numbers(), default=0)
        self._fd = -1
        self._end = 0
        self._full: list[int] = []
        self._broken = False

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
        _write(self._fd, buffer, self._end)
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
                    os.fsync(fd)
        except OSError:
            self._broken = True
            raise
        for fd in self._full:
            os.close(fd)
        self._full.clear()

    def read(self, locations: Iterable[Location]) -> Iterator[Chunk]:
        """Yields the chunks at these locations, in this order; fastest for those near each other.

        Raises:
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
                record = os.pread(fd, min(location.length, RECORD_LIMIT), location.offset)
                chunk = _parse(record)
                if chunk is None or len(record) != location.length:
                    raise PackError(
                        f"{self._path(number).name} is damaged at byte {location.offset}"
                    )
                yield chunk
        finally:
            if fd >= 0:
                os.close(fd)

    def scan(self, number: int) -> Iterator[tuple[Location, Chunk]]:
        """Yields a pack's records from its beginning, up to its end or to what is not a record.

        Raises:
            PackError: It is not a pack.
        """
        fd = self._open(number)
        try:
            magic = os.pread(fd, len(MAGIC), 0)
            if MAGIC.startswith(magic) or not any(magic):
                # Whole, or begun at the moment of a crash: then no record follows.
                offset = len(MAGIC)
            else:
                raise PackError(f"{self._path(number).name} is not a pack that this version reads")
            while len(header := os.pread(fd, HEADER.size, offset)) == HEADER.size:
                length = min(HEADER.size + HEADER.unpack(header)[1], RECORD_LIMIT)
                chunk = _parse(os.pread(fd, length, offset))
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

    def _begin(self) -> None:
        path = self._path(self._number + 1)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write(fd, MAGIC, 0)
            fsync_directory(self._directory)
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
            return os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise PackError(f"{self._path(number).name} is missing") from error

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08}.pack"


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


def _write(fd: int, data: bytes | bytearray, offset: int) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)
