"""What a client remembers of a backup, so that the next one need not read what has not changed.

A cache file holds the pages of one snapshot, and for each entry what `lstat` said of it. The next
backup walks through it side by side with the tree, as both are in the same order: an entry whose
inode, times, owner, mode and size are the same is taken from here, without opening the file. A page
that consists of such entries only is not even decoded: the server has it in the last snapshot.

Times tell a change only if they had moved on when the file was read: a file that was modified less
than `SETTLED` before that is read again next time (git calls this racily clean).

The file is written beside its name and put in its place when the snapshot exists. It is never
trusted: a record that is damaged ends it, and whether the server still has the snapshot is for the
server to say. Losing it costs time, and nothing else.
"""

import hashlib
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
from blake3 import blake3

from .crypt import Box
from .errors import CacheDamaged, PageError
from .pages import Page, decode
from .tree import MAX_TIME, Entry, Found, order

MAGIC = b"drvcach2"
ID_SIZE = 16
_RECORD = Struct(">I16s")

# The largest record there can be is some 1.5 MB.
MAX_RECORD = 8 * 1024 * 1024

# The coarsest clock of a file system in use is FAT's, which counts 2 seconds. In nanoseconds.
SETTLED = 2_000_000_000


class Stat(NamedTuple):
    """What tells if an entry is the same.

    Attributes:
        path: The entry's path.
        parts: The number of entries that it has in this page.
        more: Whether it goes on in the next page.
        link: What it is a hard link of.
        facts: Of `lstat`; none if they do not tell.
    """

    path: bytes
    parts: int
    more: bool
    link: bytes
    facts: tuple[int, ...]


class Record(NamedTuple):
    """A page, with what tells if it is the same."""

    stats: tuple[Stat, ...]
    page: Page


_decode_record = msgspec.msgpack.Decoder(Record).decode
_encode_record = msgspec.msgpack.Encoder().encode


def facts(status: os.stat_result) -> tuple[int, ...]:
    """Returns what of a status changes whenever the entry does."""
    return (
        *(status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns),
        *(status.st_ctime_ns, status.st_ino, status.st_dev, status.st_rdev),
    )


def cache_file(directory: Path, *identity: str | bytes) -> Path:
    """Returns the name of the cache for backups that have all of this in common."""
    digest = hashlib.blake2b(digest_size=16)
    for part in identity:
        data = part if isinstance(part, bytes) else os.fsencode(part)
        digest.update(len(data).to_bytes(8, "big") + data)
    return directory / f"{digest.hexdigest()}.cache"


class Known(NamedTuple):
    """An entry of the last snapshot.

    Attributes:
        page: The number of its page.
        position: Its number in the page.
        stat: What told if it was the same.
    """

    page: int
    position: int
    stat: Stat


class LastSnapshot:
    """A cache file, read once from its beginning to its end.

    Args:
        path: The file. If there is none, or it is no cache, it is as if it was empty.
        box: Opens the pages, if they are sealed.

    Attributes:
        snapshot: The snapshot's id; empty if nothing is known.
    """

    def __init__(self, path: Path | None, box: Box | None = None) -> None:
        self._box = box
        self._file = None
        self.snapshot = ""
        if path is not None:
            with suppress(OSError):
                self._file = path.open("rb")
                head = self._file.read(len(MAGIC) + ID_SIZE)
                if head[: len(MAGIC)] == MAGIC and len(head) == len(MAGIC) + ID_SIZE:
                    self.snapshot = head[len(MAGIC) :].hex()
        # Pages that entries may still be asked of: the one being walked through.
        self._records: dict[int, tuple[bytes, Record]] = {}
        self._entries: tuple[int, list[Entry]] = -1, []
        self._stream = self._read() if self.snapshot else iter(())
        self._next = next(self._stream, None)
        self._order = order(self._next.stat.path) if self._next else []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def find(self, found: Found) -> list[Known]:
        """Returns what is known of what was found: nothing if it is not the same.

        Several if its entries are in several pages.

        Args:
            found: Later in the order of entries than those asked for before.
        """
        known = self._next
        if known is None:
            return []
        if known.stat.path != found.path:
            wanted = order(found.path)
            while known is not None and self._order < wanted:
                known = self._advance()
            if known is None or known.stat.path != found.path:
                return []
        now = facts(found.status)
        pieces = []
        while known is not None and known.stat.path == found.path:
            pieces.append(known)
            known = self._advance()
        same = all(p.stat.facts == now and p.stat.link == found.link for p in pieces)
        return pieces if same and not pieces[-1].stat.more else []

    def is_whole(self, page: int, entries: Sequence[Entry | Known]) -> bool:
        """Whether these are all the entries of a page."""
        # They are in ascending order, and what is known is of this page.
        return len(entries) == len(self._records[page][1].stats) and all(
            isinstance(entry, Known) for entry in entries
        )

    def raw(self, page: int) -> bytes:
        """Returns the record of a page, to be written to the next cache."""
        return self._records[page][0]

    def page(self, page: int) -> Page:
        """Returns a page of the last snapshot."""
        return self._records[page][1].page

    def entries(self, known: Known) -> list[Entry]:
        """Returns the entries of what is known in its page.

        Raises:
            CacheDamaged: The page is not what the cache says.
        """
        if self._entries[0] != known.page:
            page = self._records[known.page][1].page
            try:
                self._entries = known.page, decode(page.data, page.chunks, self._box)
            except PageError as error:
                raise CacheDamaged(str(error)) from error
        before = sum(stat.parts for stat in self._records[known.page][1].stats[: known.position])
        found = self._entries[1][before : before + known.stat.parts]
        if not found or any(entry.path != known.stat.path for entry in found):
            raise CacheDamaged("an entry is not where it should be")
        return found

    @property
    def reached(self) -> float:
        """The page of what comes next; infinite if nothing does."""
        return math.inf if self._next is None else self._next.page

    def forget(self, page: float) -> None:
        """Lets go of the pages before this one: nobody asks for what is in them any more."""
        for number in [number for number in self._records if number < page]:
            del self._records[number]

    def _advance(self) -> Known | None:
        self._next = next(self._stream, None)
        if self._next is not None:
            self._order = order(self._next.stat.path)
        return self._next

    def _read(self) -> Iterator[Known]:
        assert self._file is not None
        number = 0
        with suppress(OSError, msgspec.MsgspecError):
            while len(head := self._file.read(_RECORD.size)) == _RECORD.size:
                length, digest = _RECORD.unpack(head)
                if length > MAX_RECORD:
                    return
                data = self._file.read(length)
                if blake3(data).digest(16) != digest:
                    return
                record = _decode_record(data)
                self._records[number] = data, record
                for index, stat in enumerate(record.stats):
                    yield Known(number, index, stat)
                number += 1


class NextCache:
    """The cache that a backup leaves. If it cannot be written, the backup goes on without.

    Args:
        path: Where it will be; nothing is written if there is none.
        clock: Nanoseconds since 1970.

    Attributes:
        error: Why it could not be written, if so.
    """

    def __init__(self, path: Path | None, clock: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._clock = clock
        self._file: BufferedWriter | None = None
        self.error: OSError | None = None
        if path is not None:
            # One for each process, should several back up the same.
            self._new = path.with_name(f"{path.name}.{os.getpid()}.new")
            with self._enduring():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                _remove_leftovers(path.parent)
                fd = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                self._file = os.fdopen(fd, "wb")
                self._file.write(MAGIC + bytes(ID_SIZE))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drop()

    def stat(self, found: Found) -> Stat:
        """Returns what will tell if an entry is the same.

        Args:
            found: The entry, not opened yet. What changes it from now on changes its times.
        """
        status = found.status
        settled = max(status.st_ctime_ns, status.st_mtime_ns) < self._clock() - SETTLED
        # Nothing of a directory is read but this status.
        sure = settled or stat.S_ISDIR(status.st_mode)
        if abs(status.st_mtime_ns) > MAX_TIME:
            sure = False  # what the entry has is another time
        return Stat(found.path, 1, False, found.link, facts(status) if sure else ())

    def add(self, stats: list[Stat], page: Page) -> None:
        """Adds the next page."""
        if self._file is not None:
            self.copy(_encode_record((stats, page)))

    def copy(self, record: bytes) -> None:
        """Adds the next page, as a record of the last cache."""
        if self._file is not None:
            with self._enduring():
                self._file.write(_RECORD.pack(len(record), blake3(record).digest(16)) + record)

    def keep(self, snapshot: str) -> None:
        """Puts it in its place, as that of this snapshot."""
        if self._file is not None and self._path is not None:
            with self._enduring():
                self._file.seek(len(MAGIC))
                self._file.write(bytes.fromhex(snapshot))
                self._file.close()
                self._new.replace(self._path)
                self._file = None

    @contextmanager
    def _enduring(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            self._drop()

    def _drop(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                self._new.unlink()
            self._file = None


def _remove_leftovers(directory: Path) -> None:
    """Removes the unfinished caches of processes that were killed."""
    for path in directory.glob("*.new"):
        pid = path.suffixes[-2][1:] if len(path.suffixes) > 1 else ""
        # A number that another process has by now is left for another time.
        if pid.isdecimal() and not _runs(int(pid)):
            path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True
