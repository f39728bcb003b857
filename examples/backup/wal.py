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
    if len(header) < HEADER.size or size < 512:
        return ""
    *_, salt, first, second = HEADER.unpack(header)
    order, sums, wrong = ">" if header[3] & 1 else "<", (first, second), ""
    if _checksum(order, header[:24], (0, 0)) != sums:
        wrong, order = "its header", ">" if sys.byteorder == "big" else "<"
        # It is what all frames have; of these, at most one is wrong as well.
        other = files.read(fd, FRAME.size, HEADER.size + FRAME.size + size)
        if len(other) == FRAME.size:
            salt = FRAME.unpack(other)[2]
    number, marked, durable = 0, False, False
    while len(frame := files.read(fd, FRAME.size + size, _at(number, size))) == FRAME.size + size:
        page, commit, own, *stored = FRAME.unpack_from(frame)
        good = own == salt and _checksum(order, frame[:8] + frame[FRAME.size :], sums) == (*stored,)
        sums, number = (stored[0], stored[1]), number + 1
        if good and durable:
            return wrong
        durable = False
        marked = marked or page == MARK
        if not good:
            wrong = wrong or f"frame {number}"
        elif commit:
            durable, marked = marked and bool(wrong), False
    return ""


def _at(number: int, size: int) -> int:
    return HEADER.size + number * (FRAME.size + size)


def _checksum(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    words = iter(Struct(f"{order}{len(data) // 4}I").unpack(data))
    for one, other in zip(words, words, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second
