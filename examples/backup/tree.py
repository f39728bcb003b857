"""A directory tree as a stream of entries.

Entries come depth first, each directory before what is in it, names in the order of their bytes:
the same tree always gives the same stream, and two streams can be compared side by side. Paths are
bytes, relative to the tree's root, which itself is the entry with the empty path.

A file with very many chunks is spread over several entries, its *parts*: same path, each with
the chunks from its `offset` on. A part that reaches the file's size is the last.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from .errors import InvalidEntry

# Chunks of a file in one entry: bounds an entry to 38 KiB, and to 80 MB of a large file.
PART_CHUNKS = 1024

# Stands for a chunk where a sparse file has a hole. No BLAKE3 hash is known that gives it.
HOLE = bytes(32)

# All extended attributes of an entry, names and values, in bytes: what Linux allows one value.
MAX_XATTRS = 64 * 1024


class Kind(IntEnum):
    """What an entry is. The numbers are stored in snapshots."""

    DIRECTORY = 1
    FILE = 2
    SYMLINK = 3
    FIFO = 4
    BLOCK_DEVICE = 5
    CHARACTER_DEVICE = 6


class Entry(NamedTuple):
    """One directory, regular file (or part of it), symbolic link, FIFO or device.

    A named tuple, since these are sent as arrays: no names of fields with each of a million.

    Attributes:
        path: Relative to the root, components separated by slashes.
        kind: What it is.
        mode: The permission bits, with setuid, setgid and sticky: 12 bits.
        mtime_ns: When it was modified, in nanoseconds since 1970.
        size: A file's size in bytes, of all its parts; else 0.
        target: Where a symbolic link points.
        offset: Where in the file this part's chunks begin, in bytes.
        chunks: The ids of this part's chunks. `HOLE` is none: zeros that take no space, as many as
            its size says.
        sizes: The sizes of these chunks' contents, in bytes.
        uid: The owner's number.
        gid: The group's number.
        user: The owner's name; empty if it has none.
        group: The group's name; empty if it has none.
        link: The path of an earlier file that this one is a hard link of; empty if there is none.
            Such an entry has its own size, but no chunks.
        xattrs: Extended attributes, each a name and a value, in the order of the names. They include
            access control lists. A file's first part has them.
        device: A device's number, as `os.makedev` returns it.
    """

    path: bytes
    kind: Kind
    mode: int
    mtime_ns: int
    size: int = 0
    target: bytes = b""
    offset: int = 0
    chunks: tuple[bytes, ...] = ()
    sizes: tuple[int, ...] = ()
    uid: int = 0
    gid: int = 0
    user: str = ""
    group: str = ""
    link: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    device: int = 0

    @property
    def end(self) -> int:
        """Where in the file this part ends, in bytes. The last part's end is the file's size."""
        return self.offset + sum(self.sizes)

    @property
    def complete(self) -> bool:
        """Whether no part of the same file follows."""
        return bool(self.link) or self.end >= self.size


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that is not in the backup.

    Attributes:
        path: Its path, as an entry would have it.
        reason: Why not, for people.
    """

    path: bytes
    reason: str


def order(path: bytes) -> list[bytes]:
    """Returns a key that sorts paths as `scan` yields them."""
    return path.split(b"/") if path else []


def check_next(last: Entry | None, entry: Entry) -> None:
    """Checks that an entry may come after another one, or be the first, and its own sums.

    Raises:
        InvalidEntry: It may not.
    """
    if last is not None and not last.complete:
        if entry.path != last.path or entry.kind is not Kind.FILE or entry.offset != last.end:
            raise InvalidEntry(last.path, "the file's next part is missing")
    elif entry.offset != 0:
        raise InvalidEntry(entry.path, "the file's first part is missing")
    elif last is not None and order(entry.path) <= order(last.path):
        raise InvalidEntry(entry.path, "out of order")
    if entry.kind is not Kind.FILE and (entry.size or entry.chunks or entry.link):
        raise InvalidEntry(entry.path, "only files have content")
    if len(entry.chunks) != len(entry.sizes) or any(size <= 0 for size in entry.sizes):
        raise InvalidEntry(entry.path, "the chunks have other sizes")
    if entry.link:
        if entry.chunks or order(entry.link) >= order(entry.path):
            raise InvalidEntry(entry.path, "not a hard link of an earlier file")
    elif entry.end > entry.size or (entry.size and not entry.chunks):
        raise InvalidEntry(entry.path, "the chunks do not add up to the file's size")
    if sum(len(name) + len(value) for name, value in entry.xattrs) > MAX_XATTRS:
        raise InvalidEntry(entry.path, "too large extended attributes")


def check_last(last: Entry | None) -> None:
    """Checks that the stream of entries may end after this one.

    Raises:
        InvalidEntry: It is a file's part that others have to follow.
    """
    if last is not None and not last.complete:
        raise InvalidEntry(last.path, "the file's last part is missing")


def scan(root: bytes) -> Iterator[Entry | Skipped]:
    """Yields what is in a directory, files without their chunks.

    What cannot be read, vanished meanwhile or is no file, directory or symbolic link is yielded
    as Skipped; the rest goes on. Memory holds the names of the directories on the way down.

    Raises:
        OSError: The root is no directory, or cannot be read.
    """
    pending = [_names(root, b"")]
    yield _entry(b"", os.stat(root))
    while pending:
        if not pending[-1]:
            pending.pop()
            continue
        path = pending[-1].pop()
        found = _look(root, path)
        if isinstance(found, Entry) and found.kind is Kind.DIRECTORY:
            try:
                names = _names(root, path)
            except OSError as error:
                # The directory itself is known: it will be restored, empty.
                yield found
                yield Skipped(path, error.strerror or str(error))
                continue
            pending.append(names)
        yield found


@contextmanager
def opened(root: bytes, entry: Entry) -> Iterator[tuple[int, Entry]]:
    """Opens an entry's file; yields its descriptor and the entry as the file now is.

    Raises:
        OSError: It cannot be read, or is no regular file any more.
    """
    # Without O_NONBLOCK, a FIFO that has taken the file's place would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(os.path.join(root, entry.path), flags)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "no longer a regular file")
        yield fd, _entry(entry.path, status)
    finally:
        os.close(fd)


def parts(entry: Entry, chunks: Iterable[tuple[bytes, int]]) -> Iterator[Entry]:
    """Yields a file's entry with its chunks, as one part or several.

    Args:
        entry: The file's entry. If the chunks end before its size, the file has shrunk, and the
            last part says so.
        chunks: Each chunk's id and size.
    """
    ids: list[bytes] = []
    sizes: list[int] = []
    offset = end = 0
    for id, size in chunks:
        if len(ids) == PART_CHUNKS:
            yield entry._replace(offset=offset, chunks=tuple(ids), sizes=tuple(sizes))
            ids, sizes, offset = [], [], end
        ids.append(id)
        sizes.append(size)
        end += size
    yield entry._replace(size=end, offset=offset, chunks=tuple(ids), sizes=tuple(sizes))


def _names(root: bytes, path: bytes) -> list[bytes]:
    """Returns the paths of what is in a directory, the first one last."""
    prefix = path + b"/" if path else b""
    names = os.listdir(os.path.join(root, path))
    return [prefix + name for name in sorted(names, reverse=True)]


def _look(root: bytes, path: bytes) -> Entry | Skipped:
    full = os.path.join(root, path)
    try:
        status = os.lstat(full)
        match stat.S_IFMT(status.st_mode):
            case stat.S_IFREG | stat.S_IFDIR:
                return _entry(path, status)
            case stat.S_IFLNK:
                return _entry(path, status)._replace(target=os.readlink(full))
            case other:
                return Skipped(path, _OTHERS.get(other, "an unknown kind of file"))
    except OSError as error:
        return Skipped(path, error.strerror or str(error))


_OTHERS = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


def _entry(path: bytes, status: os.stat_result) -> Entry:
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    size = status.st_size if kind is Kind.FILE else 0
    return Entry(path, kind, stat.S_IMODE(status.st_mode), status.st_mtime_ns, size)


_KINDS = {stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFREG: Kind.FILE, stat.S_IFLNK: Kind.SYMLINK}
