"""A directory tree as a stream of entries.

Entries come depth first, each directory before what is in it, names in the order of their bytes:
the same tree always gives the same stream, and two streams can be compared side by side. Paths are
bytes, relative to the tree's root, which itself is the entry with the empty path.

A file with very many chunks is spread over several entries, its *parts*: same path, each with
the chunks from its `offset` on. A part that reaches the file's size is the last.
"""

import errno
import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from .errors import InvalidEntry
from .links import Links

# Chunks of a file in one entry: bounds an entry to 38 KiB, and to 80 MB of a large file.
PART_CHUNKS = 1024

# Stands for a chunk where a sparse file has a hole. No BLAKE3 hash is known that gives it.
HOLE = bytes(32)

# All extended attributes of an entry, names and values, in bytes. Linux allows 64 KiB a value, and
# few file systems more for all of them.
MAX_XATTRS = 128 * 1024


# The latest time that an entry can have, and, negative, the earliest: the years 2262 and 1677, in
# nanoseconds since 1970. Some file systems know others.
MAX_TIME = (1 << 63) - 1


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
        xattrs: Extended attributes, each a name and a value, in the order of the names: access
            control lists as well. Of a file in several parts, the first one has them.
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
    """Something that is not in the backup, or not as it should be.

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


class Found(NamedTuple):
    """Something that a scan came by.

    Attributes:
        path: As an entry has it.
        status: What `lstat` says of it.
        link: The path of an earlier file that it is a hard link of; empty if there is none.
    """

    path: bytes
    status: os.stat_result
    link: bytes = b""


def scan(
    root: bytes,
    excluded: Callable[[bytes, bool], bool] | None = None,
    links: Links | None = None,
) -> Iterator[Found | Skipped]:
    """Yields what is in a directory, in the order of entries.

    What cannot be read or vanished meanwhile is yielded as Skipped; the rest goes on. Memory holds
    the names of the directories on the way down, and of hard links those whose others were not
    found yet.

    Args:
        root: The directory's path.
        excluded: Told a path and whether it is a directory; says if it is left out, with all in it.
        links: Told by the caller of files that others must not be links of.

    Raises:
        OSError: The root is no directory, or cannot be read.
    """
    links = links or Links()
    pending = [_names(root, b"")]
    yield Found(b"", os.stat(root))
    while pending:
        if not pending[-1]:
            pending.pop()
            continue
        path = pending[-1].pop()
        try:
            status = os.lstat(os.path.join(root, path))
        except OSError as error:
            yield Skipped(path, error.strerror or str(error))
            continue
        mode = status.st_mode
        if excluded and excluded(path, stat.S_ISDIR(mode)):
            continue
        if stat.S_ISREG(mode):
            yield Found(path, status, links.first(path, status) if status.st_nlink > 1 else b"")
        elif stat.S_ISDIR(mode):
            yield Found(path, status)
            try:
                pending.append(_names(root, path))
            except OSError as error:
                # The directory itself is known: it will be restored, empty.
                yield Skipped(path, error.strerror or str(error))
        elif stat.S_IFMT(mode) in _KINDS:
            yield Found(path, status)
        else:
            yield Skipped(path, "a socket" if stat.S_ISSOCK(mode) else "an unknown kind of file")


def describe(root: bytes, found: Found) -> Entry:
    """Returns the entry of what was found; of a file, without its chunks.

    Raises:
        OSError: It cannot be read, or vanished.
    """
    full = os.path.join(root, found.path)
    target = os.readlink(full) if stat.S_ISLNK(found.status.st_mode) else b""
    xattrs = () if found.link else _xattrs(full, follow=not found.path)
    return _entry(found.path, found.status, xattrs, target, found.link)


def without_attributes(found: Found) -> Entry:
    """Returns the entry of a directory whose extended attributes cannot be read."""
    return _entry(found.path, found.status, ())


@contextmanager
def opened(root: bytes, path: bytes) -> Iterator[tuple[int, Entry, os.stat_result]]:
    """Opens a file; yields its descriptor, its entry without its chunks, and its status.

    Raises:
        OSError: It cannot be read, or is no regular file (any more).
    """
    # Without O_NONBLOCK, a FIFO that has taken the file's place would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(os.path.join(root, path), flags)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "no longer a regular file")
        yield fd, _entry(path, status, _xattrs(fd)), status
    finally:
        os.close(fd)


def extents(fd: int, size: int) -> Iterator[tuple[int, bool]]:
    """Yields the lengths of a sparse file's pieces, and whether each is a hole."""
    at = 0
    while at < size:
        try:
            data = min(os.lseek(fd, at, os.SEEK_DATA), size)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no more data
                raise
            data = size
        if data > at:
            yield data - at, True
        if data < size:
            at = min(os.lseek(fd, data, os.SEEK_HOLE), size)
            os.lseek(fd, data, os.SEEK_SET)
            yield at - data, False
        else:
            at = size


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
            entry = entry._replace(xattrs=())
        ids.append(id)
        sizes.append(size)
        end += size
    # By position: this is done for every file, and `_replace` would take four times as long.
    yield Entry._make((*entry[:4], end, entry.target, offset, tuple(ids), tuple(sizes), *entry[9:]))


def _names(root: bytes, path: bytes) -> list[bytes]:
    """Returns the paths of what is in a directory, the first one last."""
    prefix = path + b"/" if path else b""
    names = os.listdir(os.path.join(root, path))
    return [prefix + name for name in sorted(names, reverse=True)]


def _xattrs(file: bytes | int, *, follow: bool = True) -> tuple[tuple[bytes, bytes], ...]:
    if not hasattr(os, "listxattr"):
        return ()
    try:
        names = os.listxattr(file, follow_symlinks=follow)
        if not names:
            return ()
        found = tuple(
            (os.fsencode(name), os.getxattr(file, name, follow_symlinks=follow))
            for name in sorted(names)
        )
        if sum(len(name) + len(value) for name, value in found) > MAX_XATTRS:
            raise OSError(errno.E2BIG, f"extended attributes of more than {MAX_XATTRS} bytes")
        return found
    except OSError as error:
        # None here; or one was removed meanwhile, which changes the file's ctime.
        if error.errno in (errno.ENOTSUP, errno.ENODATA):
            return ()
        raise


def _entry(
    path: bytes,
    status: os.stat_result,
    xattrs: tuple[tuple[bytes, bytes], ...],
    target: bytes = b"",
    link: bytes = b"",
) -> Entry:
    mode = status.st_mode
    kind = _KINDS[stat.S_IFMT(mode)]
    size = status.st_size if kind is Kind.FILE else 0
    uid, gid = status.st_uid, status.st_gid
    device = status.st_rdev if kind in DEVICES else 0
    # By position: this is made for every file, and keywords would take twice as long.
    owner = (uid, gid, user_name(uid), group_name(gid))
    time = status.st_mtime_ns
    if not -MAX_TIME <= time <= MAX_TIME:
        time = MAX_TIME if time > 0 else -MAX_TIME
    what = (path, kind, mode & 0o7777, time, size, target)
    return Entry._make((*what, 0, (), (), *owner, link, xattrs, device))


@lru_cache(maxsize=4096)
def user_name(uid: int) -> str:
    """Returns a user's name here; empty if there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


@lru_cache(maxsize=4096)
def group_name(gid: int) -> str:
    """Returns a group's name here; empty if there is none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""


DEVICES = (Kind.BLOCK_DEVICE, Kind.CHARACTER_DEVICE)

_KINDS = {
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFREG: Kind.FILE,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFBLK: Kind.BLOCK_DEVICE,
    stat.S_IFCHR: Kind.CHARACTER_DEVICE,
}


def measure(root: bytes, excluded: Callable[[bytes, bool], bool] | None = None) -> tuple[int, int]:
    """Returns how many files are in a directory, and their size in bytes, as far as can be seen."""
    files = size = 0
    for found in scan(root, excluded):
        if isinstance(found, Found) and stat.S_ISREG(found.status.st_mode):
            files += 1
            size += found.status.st_size
    return files, size
