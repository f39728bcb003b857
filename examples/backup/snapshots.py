"""Snapshots: the trees that were backed up, each a stream of entries in the catalogue.

Entries are kept as pages: their MessagePack, one after the other, compressed, with a checksum. A
snapshot begins as a *draft*, which takes entries and is visible to nobody; committing it makes it a
snapshot, whole, in one transaction. Drafts that a crash left behind are deleted at the next start.
"""

import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import msgpack
import zstandard
from blake3 import blake3

from .catalogue import Catalogue
from .chunks import ID_SIZE
from .errors import BackupError, CatalogueError, InvalidEntry, UnknownChunks, UnknownSnapshot
from .tree import Entry, Kind, check_last, check_next

# What a draft holds in memory, and a reader for each snapshot it streams: 1 MiB is ten thousand
# small files. Smaller pages would compress worse and commit more often.
PAGE_SIZE = 1024 * 1024

# A prefix of an id shorter than this is more likely a mistyped name.
MIN_PREFIX = 4


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known of a snapshot without reading its entries.

    Attributes:
        id: 32 hexadecimal digits, chosen at random.
        name: The name it was given.
        created_ns: When it was committed, in nanoseconds since 1970.
        entries: The number of its directories, files and links.
        files: The number of its files.
        size: The sum of the files' sizes, in bytes.
        chunks: The number of chunks that the files are made of, each counted as often as it occurs.
    """

    id: str
    name: str
    created_ns: int
    entries: int
    files: int
    size: int
    chunks: int


_COLUMNS = "id, name, created_ns, entries, files, size, chunks"


class Draft:
    """A snapshot in the making, for one thread at a time.

    After an error it is discarded: it takes no more entries and cannot be committed.
    """

    def __init__(self, catalogue: Catalogue, name: str) -> None:
        self.id = secrets.token_hex(16)
        self.name = name
        self._catalogue = catalogue
        with catalogue.writing() as db:
            cursor = db.execute("INSERT INTO snapshots (id, name) VALUES (?, ?)", (self.id, name))
            self._number = cursor.lastrowid
        self._open = True
        self._last: Entry | None = None
        self._packer = msgpack.Packer(autoreset=False)
        self._pages = 0
        self._entries = self._files = self._size = self._chunks = 0

    def add(self, entries: Iterable[Entry]) -> None:
        """Adds the next entries, in the order of `scan`. Their chunks must be stored already.

        Raises:
            UnknownChunks: They name chunks that are not.
            InvalidEntry: One is out of order, incomplete, or contradicts itself or its chunks.
        """
        with self._discarding_on_error():
            batch = list(entries)
            # Once for the batch: a question for each file would take longer than all the rest.
            ids = list({id for entry in batch for id in entry.chunks})
            known = self._catalogue.sizes(ids)
            if unknown := [id for id in ids if id not in known]:
                raise UnknownChunks(unknown)
            for entry in batch:
                self._check(entry, known)
                self._take(entry)

    def commit(self) -> Snapshot:
        """Makes the draft a snapshot, durable and visible to all.

        Raises:
            InvalidEntry: The last file is incomplete.
        """
        with self._discarding_on_error():
            check_last(self._last)
            self._write_page()
            now = time.time_ns()
            counts = (self._entries, self._files, self._size, self._chunks)
            with self._catalogue.writing() as db:
                db.execute(
                    "UPDATE snapshots SET complete = 1, created_ns = ?, entries = ?, files = ?,"
                    " size = ?, chunks = ?, pages = ? WHERE number = ?",
                    (now, *counts, self._pages, self._number),
                )
        self._open = False
        return Snapshot(self.id, self.name, now, *counts)

    def discard(self) -> None:
        """Deletes the draft. Does nothing once it is committed or discarded."""
        if self._open:
            self._open = False
            with self._catalogue.writing() as db:
                db.execute("DELETE FROM snapshots WHERE number = ?", (self._number,))

    @contextmanager
    def _discarding_on_error(self) -> Iterator[None]:
        if not self._open:
            raise BackupError(f"the draft of {self.name} is committed or discarded")
        with ExitStack() as undo:
            undo.callback(self.discard)
            yield
            undo.pop_all()

    def _check(self, entry: Entry, known: dict[bytes, int]) -> None:
        check_next(self._last, entry)
        if entry.sizes != tuple(known[id] for id in entry.chunks):
            raise InvalidEntry(entry.path, "the chunks have other sizes")

    def _take(self, entry: Entry) -> None:
        self._packer.pack(
            (
                entry.path,
                entry.kind.value,
                entry.mode,
                entry.mtime_ns,
                entry.size,
                entry.target,
                entry.offset,
                b"".join(entry.chunks),
                entry.sizes,
            )
        )
        self._last = entry
        self._chunks += len(entry.chunks)
        if entry.end == entry.size:  # not a part that others follow
            self._entries += 1
            self._files += entry.kind is Kind.FILE
            self._size += entry.size
        if len(self._packer.getbuffer()) >= PAGE_SIZE:
            self._write_page()

    def _write_page(self) -> None:
        page = zstandard.compress(self._packer.bytes())
        self._packer.reset()
        with self._catalogue.writing() as db:
            db.execute(
                "INSERT INTO pages VALUES (?, ?, ?, ?)",
                (self._number, self._pages, blake3(page).digest(), page),
            )
        self._pages += 1


class Snapshots:
    """The snapshots in a catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        with catalogue.writing() as db:
            db.execute("DELETE FROM snapshots WHERE NOT complete")

    def begin(self, name: str) -> Draft:
        """Returns a new draft."""
        return Draft(self._catalogue, name)

    def all(self) -> list[Snapshot]:
        """Returns all snapshots, the oldest first."""
        return self._select("1 ORDER BY created_ns, number")

    def find(self, reference: str) -> Snapshot:
        """Returns the snapshot with this id, else the newest of this name, else by id prefix.

        Raises:
            UnknownSnapshot: There is none, or the prefix fits several.
        """
        if found := self._select("id = ?", reference):
            return found[0]
        if found := self._select("name = ? ORDER BY created_ns DESC, number DESC", reference):
            return found[0]
        if len(reference) >= MIN_PREFIX:
            found = self._select("instr(id, ?) = 1", reference)
        if len(found) == 1:
            return found[0]
        if found:
            raise UnknownSnapshot(f"the ids of {len(found)} snapshots begin with {reference}")
        raise UnknownSnapshot(f"no snapshot has the name or id {reference}")

    def entries(self, id: str) -> Iterator[Entry]:
        """Yields a snapshot's entries in the order of `scan`, one page of them in memory.

        Raises:
            UnknownSnapshot: It is not, or no longer, there.
            CatalogueError: Its entries are damaged.
        """
        with self._catalogue.reading() as db:
            row: tuple[int, int] | None = db.execute(
                "SELECT number, pages FROM snapshots WHERE id = ? AND complete", (id,)
            ).fetchone()
        if row is None:
            raise UnknownSnapshot(f"no snapshot has the id {id}")
        number, pages = row
        for page in range(pages):
            yield from self._page(id, number, page)

    def _page(self, id: str, number: int, page: int) -> Iterator[Entry]:
        with self._catalogue.reading() as db:
            row: tuple[bytes, bytes] | None = db.execute(
                "SELECT digest, entries FROM pages WHERE snapshot = ? AND page = ?", (number, page)
            ).fetchone()
        if row is None or blake3(row[1]).digest() != row[0]:
            raise CatalogueError(f"page {page} of snapshot {id} is missing or damaged")
        unpacker = msgpack.Unpacker()
        unpacker.feed(zstandard.decompress(row[1]))
        for path, kind, mode, mtime_ns, size, target, offset, chunks, sizes in unpacker:
            ids = tuple(chunks[at : at + ID_SIZE] for at in range(0, len(chunks), ID_SIZE))
            yield Entry(path, Kind(kind), mode, mtime_ns, size, target, offset, ids, tuple(sizes))

    def _select(self, condition: str, *values: str) -> list[Snapshot]:
        query = f"SELECT {_COLUMNS} FROM snapshots WHERE complete AND {condition}"
        with self._catalogue.reading() as db:
            return [Snapshot(*row) for row in db.execute(query, values)]
