"""The catalogue: where each chunk is, in SQLite, and the connections that snapshots use as well.

What a transaction here has committed is durable, and may name nothing that is not: packs are synced
first.

There are two connections, each behind a lock, so any thread may call anything. In WAL mode neither
waits for the other: questions are answered while a commit waits for the disk, and see whatever was
committed before they were asked. No transaction spans calls.
"""

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from .chunks import Chunk
from .errors import CatalogueError, UnknownChunks
from .packs import Location

VERSION = 2
SCHEMA = (
    """
    CREATE TABLE chunks (
        id BLOB PRIMARY KEY,
        pack INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        length INTEGER NOT NULL,
        size INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE snapshots (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        created_ns INTEGER NOT NULL DEFAULT 0,
        entries INTEGER NOT NULL DEFAULT 0,
        files INTEGER NOT NULL DEFAULT 0,
        size INTEGER NOT NULL DEFAULT 0,
        chunks INTEGER NOT NULL DEFAULT 0,
        pages INTEGER NOT NULL DEFAULT 0,
        complete INTEGER NOT NULL DEFAULT 0
    )
    """,
    "CREATE INDEX snapshots_by_name ON snapshots (name, created_ns)",
    """
    CREATE TABLE pages (
        snapshot INTEGER NOT NULL REFERENCES snapshots ON DELETE CASCADE,
        page INTEGER NOT NULL,
        digest BLOB NOT NULL,
        data BLOB NOT NULL,
        chunks BLOB NOT NULL,
        entries INTEGER NOT NULL,
        files INTEGER NOT NULL,
        size INTEGER NOT NULL,
        PRIMARY KEY (snapshot, page)
    )
    """,
)

# Nobody else has the database open, apart from a person looking at it.
BUSY_TIMEOUT = 10.0

# Ids in one question. SQLite takes 999 parameters in its older builds; more was no faster here.
BATCH = 500


class Catalogue:
    """The database of a store.

    Args:
        path: Its file, made if it does not exist.

    Raises:
        CatalogueError: It cannot be opened, is no catalogue, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        with ExitStack() as undo:
            with _translated():
                self._write = undo.enter_context(closing(_connect(path)))
                self._read = undo.enter_context(closing(_connect(path)))
                for db in (self._write, self._read):
                    _configure(db)
            self._create()
            undo.pop_all()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: durable when the block has ended, undone if it raises."""
        with self._write_lock, _translated():
            self._write.execute("BEGIN IMMEDIATE")
            try:
                yield self._write
                self._write.execute("COMMIT")
            finally:
                if self._write.in_transaction:
                    self._write.execute("ROLLBACK")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to ask questions; cursors are not to outlive the block."""
        with self._read_lock, _translated():
            yield self._read

    def missing(self, ids: Sequence[bytes]) -> list[int]:
        """Returns the positions, in ascending order, of those ids that are not in the catalogue."""
        known = set()
        for batch in _batches(ids):
            with self.reading() as db:
                known.update(db.execute(_select("id", len(batch)), batch).fetchall())
        return [position for position, id in enumerate(ids) if (id,) not in known]

    def sizes(self, ids: Sequence[bytes]) -> dict[bytes, int]:
        """Returns the content sizes of those chunks that are in the catalogue."""
        sizes: dict[bytes, int] = {}
        for batch in _batches(ids):
            with self.reading() as db:
                sizes.update(db.execute(_select("id, size", len(batch)), batch).fetchall())
        return sizes

    def locate(self, ids: Sequence[bytes]) -> list[Location]:
        """Returns where these chunks are.

        Raises:
            UnknownChunks: Some are not in the catalogue.
        """
        found: dict[bytes, Location] = {}
        for batch in _batches(ids):
            with self.reading() as db:
                rows: list[tuple[bytes, int, int, int]] = db.execute(
                    _select("id, pack, offset, length", len(batch)), batch
                ).fetchall()
            found.update((id, Location(*where)) for id, *where in rows)
        if unknown := [id for id in ids if id not in found]:
            raise UnknownChunks(unknown)
        return [found[id] for id in ids]

    def add(self, chunks: Iterable[tuple[Chunk, Location]]) -> None:
        """Adds chunks and where they are, all or none. One that is known already stays as it is."""
        rows = [
            (chunk.id, where.pack, where.offset, where.length, chunk.size)
            for chunk, where in chunks
        ]
        with self.writing() as db:
            db.executemany(
                "INSERT INTO chunks VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING", rows
            )

    def close(self) -> None:
        """Closes both connections, after what they are doing."""
        with self._write_lock, self._read_lock:
            self._read.close()
            self._write.close()

    def _create(self) -> None:
        with self.writing() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise CatalogueError(f"the catalogue has version {version}, not {VERSION}")


def _connect(path: Path) -> sqlite3.Connection:
    # The locks take the place of sqlite3's own check of threads.
    return sqlite3.connect(
        path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
    )


def _configure(db: sqlite3.Connection) -> None:
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise CatalogueError(f"SQLite cannot use a write-ahead log here, only {mode}")
    # NORMAL would not wait for the disk at the end of a transaction.
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")


def _batches(ids: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]


def _select(columns: str, count: int) -> str:
    return f"SELECT {columns} FROM chunks WHERE id IN ({', '.join('?' * count)})"


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise CatalogueError(f"the catalogue: {error}") from error
