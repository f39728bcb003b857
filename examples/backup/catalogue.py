"""The catalogue in SQLite: where each chunk is, the pages of entries, the snapshots made of them.

What a transaction here has committed names nothing that is not durable: packs are synced first. It
is durable itself, but for `add`, which is with the next of the others. `interfaces.CatalogueStore`
says what each method promises, `database` how the file is kept.

A chunk's id has its row at a random place, so that adding a few chunks writes about as many pages
of the file, and adding many does not write many more. So additions can be gathered: `find` and
`add_pages` find them in memory, all else that has to do with chunks or packs writes them first. The
end of a pack is written with them: of those that a kill loses, the next opening finds the records
beyond it.

Pages are shared: a snapshot names the pages that it took over from its base, so an unchanged tree
costs a few integers. Pages, snapshots, packs and facts have a digest of their own, so that damage
is found where it is read or by `check`, whatever SQLite makes of it; a chunk's row is compared with
its record. Facts, of which the tenant's key is one, are kept twice.
"""

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from blake3 import blake3

from .chunks import Chunk
from .database import Database
from .errors import CatalogueError, KeyExists, UnknownChunks, UnknownSnapshot
from .files import FILES, Files
from .interfaces import Location, PackUse, Stored
from .pages import Page
from .schema import SCHEMA, VERSION
from .snapshots import Snapshot

# Ids in one question. SQLite takes 999 parameters in its older builds; more was no faster here.
BATCH = 500

# How often each fact is kept.
COPIES = 2

# A chunk's row as it is added: id, pack, offset, length, size.
_Row = tuple[bytes, int, int, int, int]

_STORED = "id, pack, offset, length, size, condemned, lost"
_SNAPSHOT = "id, name, created_ns, entries, files, size, chunks"
_USE = "number, ends, used, chunks, content"
_PAGE = "number, digest, data, chunks, entries, files, size"


class Catalogue:
    """A catalogue in a SQLite file.

    Args:
        path: The file, made if it does not exist.
        files: What reads and writes its checksums.
        gather: How many additions may wait in memory to be written.

    Raises:
        CatalogueError: It cannot be opened, is no catalogue, or one of another version.
    """

    def __init__(self, path: Path, files: Files = FILES, *, gather: int = 0) -> None:
        self._database = Database(path, files)
        self._gather = gather
        # Held while additions are gathered or written. It comes before the database's own locks.
        self._adding = threading.Lock()
        self._waiting: list[_Row] = []
        # The same by id, the first of each: read without the lock, so made anew to be emptied.
        self._gathered: dict[bytes, _Row] = {}
        try:
            self._create()
        except BaseException:
            self._database.close()
            raise

    def find(self, ids: Sequence[bytes]) -> dict[bytes, Stored]:
        found: dict[bytes, Stored] = {}
        # Before the database is asked: what is written meanwhile is found in one of both.
        gathered = self._gathered
        waiting = [gathered[id] for id in ids if id in gathered]
        for batch in _batches(ids):
            with self._database.reading() as db:
                rows = db.execute(
                    f"SELECT {_STORED} FROM chunks WHERE id IN ({_marks(batch)})", batch
                ).fetchall()
            found.update((row[0], _stored(row)) for row in rows)
        for row in waiting:
            if row[0] not in found or found[row[0]].lost:
                found[row[0]] = _stored((*row, 0, 0))
        return found

    def add(self, chunks: Iterable[tuple[Chunk, Location]]) -> None:
        rows: list[_Row] = [
            (chunk.id, where.pack, where.offset, where.length, chunk.size)
            for chunk, where in chunks
        ]
        with self._adding:
            if len(self._waiting) + len(rows) > self._gather:
                self._write([*self._waiting, *rows])
                return
            self._database.refuse_if_damaged()
            self._waiting += rows
            for row in rows:
                self._gathered.setdefault(row[0], row)

    def chunks(self, after: bytes, limit: int) -> list[Stored]:
        with self._reading() as db:
            return [
                _stored(row)
                for row in db.execute(
                    f"SELECT {_STORED} FROM chunks WHERE id > ? ORDER BY id LIMIT ?", (after, limit)
                )
            ]

    def condemn(self, ids: Sequence[bytes], generation: int) -> None:
        with self._writing() as db:
            db.executemany(
                "UPDATE chunks SET condemned = ? WHERE id = ? AND NOT condemned",
                [(generation, id) for id in ids],
            )

    def revive(self, ids: Sequence[bytes]) -> None:
        with self._writing() as db:
            db.executemany("UPDATE chunks SET condemned = 0 WHERE id = ?", [(id,) for id in ids])

    def condemned(self) -> int:
        with self._reading() as db:
            count: int
            (count,) = db.execute("SELECT count(*) FROM chunks WHERE condemned > 0").fetchone()
        return count

    def lost(self) -> set[bytes]:
        with self._reading() as db:
            return {id for (id,) in db.execute("SELECT id FROM chunks WHERE lost")}

    def set_lost(self, stored: Stored, lost: bool) -> None:
        where = stored.where
        with self._writing() as db:
            db.execute(
                "UPDATE chunks SET lost = ? WHERE id = ? AND pack = ? AND offset = ?",
                (lost, stored.id, where.pack, where.offset),
            )

    def begin_pack(self, number: int) -> None:
        with self._writing() as db:
            _begin_pack(db, number)
            _set_fact(db, "last pack", number)

    def last_pack(self) -> int:
        return max(int(self._fact("last pack") or 0), *(use.number for use in self.packs()), 0)

    def packs(self) -> list[PackUse]:
        with self._reading() as db:
            rows = db.execute(f"SELECT {_USE} FROM packs ORDER BY number")
            return [PackUse(*row) for row in rows]

    def in_pack(self, number: int, offset: int, limit: int) -> list[Stored]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {_STORED} FROM chunks WHERE pack = ? AND offset >= ?"
                " ORDER BY offset LIMIT ?",
                (number, offset, limit),
            )
            return [_stored(row) for row in rows]

    def sweep(self, number: int, generation: int) -> tuple[int, int]:
        which = "FROM chunks WHERE pack = ? AND condemned > 0 AND condemned <= ?"
        with self._writing() as db:
            count: int
            length: int
            count, length, content = db.execute(
                f"SELECT count(*), coalesce(sum(length), 0), coalesce(sum(size), 0) {which}",
                (number, generation),
            ).fetchone()
            if count:
                db.execute(f"DELETE {which}", (number, generation))
                _use(db, number, -length, -count, -content)
        return count, length

    def move(self, moves: Sequence[tuple[Stored, Location]]) -> None:
        with self._writing() as db:
            for stored, to in moves:
                old = stored.where
                moved = db.execute(
                    "UPDATE chunks SET pack = ?, offset = ?, length = ?"
                    " WHERE id = ? AND pack = ? AND offset = ?",
                    (to.pack, to.offset, to.length, stored.id, old.pack, old.offset),
                )
                _use(db, to.pack, end=to.offset + to.length)
                if moved.rowcount:
                    _use(db, to.pack, to.length, 1, stored.size)
                    _use(db, old.pack, -old.length, -1, -stored.size)

    def end_pack(self, number: int) -> None:
        with self._writing() as db:
            db.execute(
                "DELETE FROM packs WHERE number = ?"
                " AND NOT EXISTS (SELECT 1 FROM chunks WHERE pack = number)",
                (number,),
            )

    def add_pages(self, pages: Sequence[Page]) -> list[int]:
        named = {id for page in pages for id in page.ids()}
        numbers = []
        # It need not be written first: without a snapshot, these pages are garbage after a crash.
        with self._database.writing() as db:
            # What waits is not condemned, and stays so, as nobody else writes now.
            gathered = self._gathered
            ids = [id for id in named if id not in gathered]
            known: dict[bytes, int] = {}
            for batch in _batches(ids):
                known.update(
                    db.execute(
                        f"SELECT id, condemned FROM chunks WHERE id IN ({_marks(batch)})", batch
                    ).fetchall()
                )
            if unknown := [id for id in ids if id not in known]:
                raise UnknownChunks(unknown)
            condemned = [(id,) for id, generation in known.items() if generation]
            db.executemany("UPDATE chunks SET condemned = 0 WHERE id = ?", condemned)
            for page in pages:
                added = db.execute(
                    "INSERT INTO pages (digest, data, chunks, entries, files, size)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (page_digest(page), *page),
                )
                numbers.append(added.lastrowid or 0)
        return numbers

    def pages(self, keys: Sequence[int]) -> list[Page]:
        found: dict[int, Page] = {}
        for batch in _batches(keys):
            with self._database.reading() as db:
                rows = db.execute(
                    f"SELECT {_PAGE} FROM pages WHERE number IN ({_marks(batch)})", batch
                ).fetchall()
            for number, digest, *columns in rows:
                page = Page(*columns)
                if page_digest(page) == digest:
                    found[number] = page
        if missing := [key for key in keys if key not in found]:
            raise CatalogueError(f"page {missing[0]} of the catalogue is missing or damaged")
        return [found[key] for key in keys]

    def used_pages(self) -> set[int]:
        with self._database.reading() as db:
            return {page for (page,) in db.execute("SELECT DISTINCT page FROM contents")}

    def unused_pages(self) -> set[int]:
        with self._database.reading() as db:
            rows = db.execute(
                "SELECT number FROM pages"
                " WHERE NOT EXISTS (SELECT 1 FROM contents WHERE page = pages.number)"
            )
            return {number for (number,) in rows}

    def remove_pages(self, keys: Sequence[int]) -> None:
        with self._writing() as db:
            db.executemany("DELETE FROM pages WHERE number = ?", [(key,) for key in keys])

    def commit(self, snapshot: Snapshot, pages: Sequence[int]) -> None:
        with self._writing() as db:
            row = _values(snapshot)
            added = db.execute(
                f"INSERT INTO snapshots (digest, {_SNAPSHOT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (snapshot_digest(snapshot, pages), *row),
            )
            db.executemany(
                "INSERT INTO contents VALUES (?, ?, ?)",
                [(added.lastrowid, position, page) for position, page in enumerate(pages)],
            )

    def snapshots(self) -> list[Snapshot]:
        with self._database.reading() as db:
            rows = db.execute(f"SELECT {_SNAPSHOT} FROM snapshots ORDER BY created_ns, number")
            return [Snapshot(*row) for row in rows]

    def contents(self, id: str) -> list[int]:
        with self._database.reading() as db:
            row = db.execute(
                f"SELECT number, digest, {_SNAPSHOT} FROM snapshots WHERE id = ?", (id,)
            ).fetchone()
            if row is None:
                raise UnknownSnapshot(f"no snapshot has the id {id}")
            number, digest, *columns = row
            rows = db.execute(
                "SELECT page FROM contents WHERE snapshot = ? ORDER BY position", (number,)
            ).fetchall()
        pages = [page for (page,) in rows]
        if snapshot_digest(Snapshot(*columns), pages) != digest:
            raise CatalogueError(f"what the catalogue says of snapshot {id} is damaged")
        return pages

    def remove_snapshots(self, ids: Sequence[str]) -> None:
        with self._writing() as db:
            db.executemany("DELETE FROM snapshots WHERE id = ?", [(id,) for id in ids])

    def generation(self) -> int:
        return int(self._fact("generation") or 1)

    def set_generation(self, generation: int) -> None:
        with self._writing() as db:
            _set_fact(db, "generation", generation)

    def key(self) -> bytes:
        return bytes(self._fact("key") or b"")

    def set_key(self, wrapped: bytes) -> None:
        with self._writing() as db:
            if _facts(db, "key"):
                raise KeyExists("there is a key already")
            if db.execute("SELECT 1 FROM chunks UNION ALL SELECT 1 FROM pages LIMIT 1").fetchone():
                raise KeyExists("there are backups already, and they are not encrypted")
            _set_fact(db, "key", wrapped)

    def check(self) -> list[str]:
        # On a full disk, too, damage is told of.
        with suppress(CatalogueError):
            self._settle()
        found = self._database.check()
        with self._database.reading() as db:
            for number, ends, used, count, content, digest in db.execute(
                f"SELECT {_USE}, digest FROM packs ORDER BY number"
            ):
                if _digest(number, ends, used, count, content) != digest:
                    found.append(f"what it says of pack {number} is damaged")
            for name, copy, value, digest in db.execute("SELECT * FROM facts"):
                if _digest(name, copy, value) != digest:
                    found.append(f"what it says of the {name} is damaged")
        return found

    def close(self) -> None:
        # What cannot be written is found in the packs, as after a crash.
        with suppress(CatalogueError):
            self._settle()
        self._database.close()

    def _settle(self) -> None:
        """Writes the additions that wait."""
        with self._adding:
            if self._waiting:
                self._write(self._waiting)

    def _write(self, added: list[_Row]) -> None:
        """Writes additions, all that wait among them, which then no longer do."""
        rows: dict[bytes, _Row] = {}
        ends: dict[int, int] = {}
        for row in added:
            id, pack, offset, length, _ = row
            rows.setdefault(id, row)
            ends[pack] = max(ends.get(pack, 0), offset + length)
        with self._database.writing(durable=False) as db:
            for batch in _batches(list(rows)):
                known = f"SELECT {_STORED} FROM chunks WHERE id IN ({_marks(batch)})"
                for stored in map(_stored, db.execute(known, batch).fetchall()):
                    if stored.lost:
                        db.execute("DELETE FROM chunks WHERE id = ?", (stored.id,))
                        where = stored.where
                        _use(db, where.pack, -where.length, -1, -stored.size)
                    else:
                        del rows[stored.id]
            db.executemany(
                "INSERT INTO chunks (id, pack, offset, length, size) VALUES (?, ?, ?, ?, ?)",
                rows.values(),
            )
            for pack, end in ends.items():
                mine = [row for row in rows.values() if row[1] == pack]
                used, content = sum(row[3] for row in mine), sum(row[4] for row in mine)
                _begin_pack(db, pack)
                _use(db, pack, used, len(mine), content, end)
        self._waiting, self._gathered = [], {}

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """For questions about chunks and packs."""
        self._settle()
        with self._database.reading() as db:
            yield db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """For all changes but additions, which are durable with this."""
        self._settle()
        with self._database.writing() as db:
            yield db

    def _fact(self, name: str) -> int | bytes | None:
        with self._database.reading() as db:
            copies = _facts(db, name)
        for copy, value, digest in copies:
            if _digest(name, copy, value) == digest:
                return value
        if copies:
            raise CatalogueError(f"what the catalogue says of the {name} is damaged")
        return None

    def _create(self) -> None:
        with self._database.reading() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise CatalogueError(
                f"the store has format version {version}; this program reads {VERSION}"
            )
        if version == 0:
            with self._database.writing() as db:
                for statement in SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")


def page_digest(page: Page) -> bytes:
    """Returns what tells whether a page is what was kept."""
    sums = msgspec.msgpack.encode((len(page.data), page.entries, page.files, page.size))
    return blake3(sums).update(page.data).update(page.chunks).digest()


def snapshot_digest(snapshot: Snapshot, pages: Sequence[int]) -> bytes:
    """Returns what tells whether a snapshot and its pages are what was committed."""
    return blake3(msgspec.msgpack.encode((_values(snapshot), pages))).digest()


def _digest(*columns: int | str | bytes) -> bytes:
    return blake3(msgspec.msgpack.encode(columns)).digest(16)


def _facts(db: sqlite3.Connection, name: str) -> list[tuple[int, int | bytes, bytes]]:
    return db.execute("SELECT copy, value, digest FROM facts WHERE name = ?", (name,)).fetchall()


def _set_fact(db: sqlite3.Connection, name: str, value: int | bytes) -> None:
    rows = [(name, copy, value, _digest(name, copy, value)) for copy in range(COPIES)]
    db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", rows)


def _begin_pack(db: sqlite3.Connection, number: int) -> None:
    db.execute(
        "INSERT INTO packs (number, digest) VALUES (?, ?) ON CONFLICT DO NOTHING",
        (number, _digest(number, 0, 0, 0, 0)),
    )


def _use(
    db: sqlite3.Connection,
    pack: int,
    used: int = 0,
    chunks: int = 0,
    content: int = 0,
    end: int = 0,
) -> None:
    """Adds to what is counted of a pack. What was damaged stays known as damaged."""
    row = db.execute(f"SELECT {_USE}, digest FROM packs WHERE number = ?", (pack,)).fetchone()
    if row is None:
        return
    *old, digest = row
    new = (pack, max(old[1], end), old[2] + used, old[3] + chunks, old[4] + content)
    if _digest(*old) == digest:
        digest = _digest(*new)
    db.execute(
        "UPDATE packs SET ends = ?, used = ?, chunks = ?, content = ?, digest = ? WHERE number = ?",
        (*new[1:], digest, pack),
    )


def _values(snapshot: Snapshot) -> tuple[str, str, int, int, int, int, int]:
    return (
        snapshot.id,
        snapshot.name,
        snapshot.created_ns,
        snapshot.entries,
        snapshot.files,
        snapshot.size,
        snapshot.chunks,
    )


def _stored(row: tuple[bytes, int, int, int, int, int, int]) -> Stored:
    id, pack, offset, length, size, condemned, lost = row
    return Stored(id, Location(pack, offset, length), size, condemned, bool(lost))


def _batches(values: Sequence[object]) -> Iterator[Sequence[object]]:
    for start in range(0, len(values), BATCH):
        yield values[start : start + BATCH]


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))
