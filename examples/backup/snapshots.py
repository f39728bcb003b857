"""Snapshots: the trees that were backed up, each a stream of entries in the catalogue.

Entries are kept as pages: their MessagePack, one after the other, compressed, with a checksum. A
snapshot begins as a *draft*, which takes entries and is visible to nobody; committing it makes it a
snapshot, whole, in one transaction. Drafts that a crash left behind are deleted at the next start.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from blake3 import blake3

from .catalogue import Catalogue
from .errors import (
    BackupError,
    CatalogueError,
    InvalidEntry,
    UnknownBase,
    UnknownChunks,
    UnknownSnapshot,
)
from .pages import Page

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

    After an error it is discarded: it takes no more pages and cannot be committed.
    """

    def __init__(self, catalogue: Catalogue, name: str, base: str = "") -> None:
        self.id = secrets.token_hex(16)
        self.name = name
        self._catalogue = catalogue
        with catalogue.writing() as db:
            self._base = 0
            if base:
                row = db.execute(
                    "SELECT number FROM snapshots WHERE id = ? AND complete", (base,)
                ).fetchone()
                if row is None:
                    raise UnknownBase(f"no snapshot has the id {base}")
                (self._base,) = row
            cursor = db.execute("INSERT INTO snapshots (id, name) VALUES (?, ?)", (self.id, name))
            self._number = cursor.lastrowid
        self._open = True
        self._pages = 0

    def copy(self, first: int, count: int) -> None:
        """Takes over pages of the base."""
        with self._discarding_on_error(), self._catalogue.writing() as db:
            done = db.execute(
                "INSERT INTO pages SELECT ?, page + ?, digest, data, chunks, entries, files, size"
                " FROM pages WHERE snapshot = ? AND page >= ? AND page < ?",
                (self._number, self._pages - first, self._base, first, first + count),
            )
            if done.rowcount != count:
                raise InvalidEntry(b"", "the base has no such pages")
            self._pages += count

    def add(self, page: Page) -> None:
        """Adds the next page. Its chunks must be stored already.

        Raises:
            UnknownChunks: It names chunks that are not.
        """
        with self._discarding_on_error():
            ids = list(page.ids())
            if missing := self._catalogue.missing(ids):
                raise UnknownChunks([ids[position] for position in missing])
            with self._catalogue.writing() as db:
                db.execute(
                    "INSERT INTO pages VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (self._number, self._pages, _digest(page), *page),
                )
            self._pages += 1

    def commit(self) -> Snapshot:
        """Makes the draft a snapshot, durable and visible to all."""
        with self._discarding_on_error():
            now = time.time_ns()
            with self._catalogue.writing() as db:
                counts: tuple[int, int, int, int] = db.execute(
                    "SELECT coalesce(sum(entries), 0), coalesce(sum(files), 0),"
                    " coalesce(sum(size), 0), coalesce(sum(length(chunks) / 32), 0)"
                    " FROM pages WHERE snapshot = ?",
                    (self._number,),
                ).fetchone()
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


def _digest(page: Page) -> bytes:
    return blake3(page.data).update(page.chunks).digest()


class Snapshots:
    """The snapshots in a catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        with catalogue.writing() as db:
            db.execute("DELETE FROM snapshots WHERE NOT complete")

    def begin(self, name: str, base: str = "") -> Draft:
        """Returns a new draft."""
        return Draft(self._catalogue, name, base)

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

    def pages(self, id: str) -> Iterator[Page]:
        """Yields a snapshot's pages, one of them in memory.

        Raises:
            UnknownSnapshot: It is not, or no longer, there.
            CatalogueError: Its pages are damaged.
        """
        with self._catalogue.reading() as db:
            row: tuple[int, int] | None = db.execute(
                "SELECT number, pages FROM snapshots WHERE id = ? AND complete", (id,)
            ).fetchone()
        if row is None:
            raise UnknownSnapshot(f"no snapshot has the id {id}")
        number, pages = row
        for position in range(pages):
            with self._catalogue.reading() as db:
                found = db.execute(
                    "SELECT digest, data, chunks, entries, files, size FROM pages"
                    " WHERE snapshot = ? AND page = ?",
                    (number, position),
                ).fetchone()
            if found is None or _digest(page := Page(*found[1:])) != found[0]:
                raise CatalogueError(f"page {position} of snapshot {id} is missing or damaged")
            yield page

    def _select(self, condition: str, *values: str) -> list[Snapshot]:
        query = f"SELECT {_COLUMNS} FROM snapshots WHERE complete AND {condition}"
        with self._catalogue.reading() as db:
            return [Snapshot(*row) for row in db.execute(query, values)]
