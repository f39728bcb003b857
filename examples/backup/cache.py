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
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
from blake3 import blake3

from .crypt import Box
from .errors import PageError
from .pages import Page, decode
from .tree import Entry, Found, order

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
        parts: The number of entries that it has.
        link: What it is a hard link of.
        facts: Of `lstat`; none if they do not tell.
    """

    path: bytes
    parts: int
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
        index: Its number in the page.
        stat: What told if it was the same.
    """

    page: int
    index: int
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
        self._stream = self._read() if self.snapshot else iter(())
        self._next = next(self._stream, None)
        self._order = order(self._next.stat.path) if self._next else []
        # Pages that entries may still be asked of: the one being walked through.
        self._records: dict[int, tuple[bytes, Record]] = {}
        self._entries: tuple[int, list[Entry]] = -1, []

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

    def find(self, found: Found) -> Known | None:
        """Returns what is known of what was found if that is the same; else None.

        Args:
            found: Later in the order of entries than those asked for before.
        """
        known = self._next
        if known is None:
            return None
        if known.stat.path != found.path:
            wanted = order(found.path)
            while known is not None and self._order < wanted:
                known = self._advance()
            if known is None or known.stat.path != found.path:
                return None
        self._advance()
        same = known.stat.facts == facts(found.status) and known.stat.link == found.link
        return known if same else None
