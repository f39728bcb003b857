"""SQLite's log, read without SQLite: whether it is what was written.

SQLite takes of a log what comes before the first frame that is wrong, since a crash leaves such
ones at the end. A flipped bit in the middle looks the same to it, and what was committed after that
would be gone without a word. So the frames behind it are checked here: a frame's checksum begins
with that of the frame before, as it is stored there.

A crash of the machine, too, may leave whole frames behind a wrong one, where nothing waited for the
disk. So it is damage only if something was written after a later transaction that did wait: then
all before had been synced. Such a transaction is told by its having changed a page of its own.

The format: sqlite.org/fileformat2.html, "The Write-Ahead Log".
"""

import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct

from .files import Files

# Magic, version, page size, checkpoints, salt, checksum.
HEADER = Struct(">IIII8sII")
# Page number, pages after the commit or 0, salt, checksum.
FRAME = Struct(">II8sII")

# The first page after SQLite's own: that of the first table, as long as that one has a row.
MARK = 2

# Of a page's size, which is in the database's header.
SIZE_AT = 16

# Frames that are read and checked at a time: a MiB of usual ones. Checked alone, one would take
# twenty times as long.
BLOCK = 256


def page_size(path: Path) -> int:
    """Returns the size of a database's pages, in bytes; 0 if there is none.

    While this process has it open in SQLite, this must not be called: closing the file again
    releases SQLite's locks.
    """
    try:
        with path.open("rb") as database:
            size = int.from_bytes(database.read(SIZE_AT + 2)[SIZE_AT:])
    except FileNotFoundError:
        return 0
    return 65536 if size == 1 else size


def log_damage(path: Path, size: int, files: Files) -> str:
    """Returns what is wrong with a database's log, in words; nothing if it is as a crash leaves it.

    Args:
        path: The database.
        size: That of its pages, in bytes.
        files: What reads the log.
    """
    try:
        fd = files.open(path.with_name(path.name + "-wal"))
    except FileNotFoundError:
        return ""
    try:
        wrong = _wrong(fd, files, size)
    finally:
        os.close(fd)
    return f"{path.name}-wal: {wrong} is damaged, and what was committed after it" if wrong else ""


def _wrong(fd: int, files: Files, size: int) -> str:
    header = files.read(fd, HEADER.size, 0)
    if len(header) < HEADER.size or size < 512 or size & (size - 1):
        return ""  # No log, or the database's header is damaged: SQLite says so.
    *_, salt, first, second = HEADER.unpack(header)
    order, sums, wrong = ">" if header[3] & 1 else "<", (first, second), ""
    if _checksum(order, header[:24]) != sums:
        wrong, order = "its header", ">" if sys.byteorder == "big" else "<"
        # It is what all frames have; of these, at most one is wrong as well.
        other = files.read(fd, FRAME.size, HEADER.size + FRAME.size + size)
        if len(other) == FRAME.size:
            salt = FRAME.unpack(other)[2]
    marked, durable = False, False
    for number, (page, commit, good) in enumerate(_frames(fd, files, size, order, salt, sums), 1):
        if good and durable:
            return wrong
        durable = False
        marked = marked or page == MARK
        if not good:
            wrong = wrong or f"frame {number}"
        elif commit:
            durable, marked = marked and bool(wrong), False
    return ""


def _frames(
    fd: int, files: Files, size: int, order: str, salt: bytes, sums: tuple[int, int]
) -> Iterator[tuple[int, int, bool]]:
    """Yields of each frame its page, its pages after the commit, and whether it is right.

    Args:
        fd: The log.
        files: What reads it.
        size: A page's size, in bytes.
        order: Of the bytes of what is summed, as `struct` writes it.
        salt: What each frame has to have.
        sums: What the first frame's checksum begins with.
    """
    length, at = FRAME.size + size, HEADER.size
    while count := len(block := files.read(fd, BLOCK * length, at)) // length:
        heads = [FRAME.unpack_from(block, number * length) for number in range(count)]
        stored = [(first, second) for *_, first, second in heads]
        found = _checksums(order, block[: count * length], [sums, *stored[:-1]])
        for (page, commit, own, *_), right, is_there in zip(heads, found, stored, strict=True):
            yield page, commit, own == salt and right == is_there
        sums, at = stored[-1], at + count * length


def _checksums(
    order: str, frames: bytes, begun: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Returns the checksums of frames of the same length, each begun with sums of its own.

    They are added up side by side: the sums of all frames are one number, of which each frame has
    64 bits, the upper half for what is carried.
    """
    words = array("I", frames)
    if order == ">":
        words.byteswap()
    count, pairs = len(begun), memoryview(words).cast("B").cast("Q")
    length, lanes = len(pairs) // count, Struct(f"<{count}Q")
    lower = int.from_bytes(lanes.pack(*[0xFFFFFFFF] * count), "little")
    first, second = (
        int.from_bytes(lanes.pack(*numbers), "little") for numbers in zip(*begun, strict=True)
    )
    # The first eight bytes of a frame's header count, and its page.
    for at in (0, *range(FRAME.size // 8, length)):
        words_at = int.from_bytes(pairs[at::length].tobytes(), "little")
        first = (first + (words_at & lower) + second) & lower
        second = (second + (words_at >> 32 & lower) + first) & lower
    return zip(
        *(lanes.unpack(number.to_bytes(lanes.size, "little")) for number in (first, second)),
        strict=True,
    )


def _checksum(order: str, data: bytes) -> tuple[int, int]:
    """Returns the checksum of the log's header."""
    first = second = 0
    words = iter(Struct(f"{order}{len(data) // 4}I").unpack(data))
    for one, other in zip(words, words, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second
