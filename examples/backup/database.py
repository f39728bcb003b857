"""The SQLite file that a catalogue is kept in: its connections, its checkpoints, its checksums.

There are two connections, each behind a lock, so any thread may call anything. In WAL mode neither
waits for the other: questions are answered while a commit waits for the disk, and see whatever was
committed before they were asked. No transaction spans calls.

SQLite checks the frames of its log, and nothing of its file: a flipped bit there may go unseen for
years. So a file beside it has a checksum of each of its pages. Pages change at checkpoints alone,
and those are made here, in an order that a crash may interrupt anywhere:

0. The pages of the file that the log has anew are checked: what was written over a damaged page was
   made from it, and its checksum must not hide that.
1. SQLite copies the log's pages into the file, and syncs it. The log is still whole.
2. The checksums of the pages that the log has are taken from the file, and saved.
3. SQLite cuts the log.

Before the first, the log is checked (see `wal`): one that is damaged is brought nowhere, nothing
more is written, and the next opening is refused, so that nothing that it has is thrown away.

If 3 has not happened, the next opening finds the log, and does all three again. While the log has a
page, the log's own checksums hold for it, and that of the file is not looked at.
"""

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from blake3 import blake3

from .errors import CatalogueError
from .files import FILES, Files
from .wal import FRAME, HEADER, log_damage, page_size

# Nobody else has the database open, apart from a person looking at it.
BUSY_TIMEOUT = 10.0

# At how many bytes of log a checkpoint is made: what a crash leaves to be read again at the start.
LOG_LIMIT = 8 * 1024 * 1024

SUMS_MAGIC = b"drvsums\1"
SUM_SIZE = 8


class Database:
    """A database file.

    Args:
        path: The file, made if it does not exist.
        files: What reads it for checksums, and writes them.

    Raises:
        CatalogueError: It cannot be opened, is no database, or its log is damaged.
    """

    def __init__(self, path: Path, files: Files = FILES) -> None:
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        # Before SQLite sees it, which would write over what is behind the damage.
        if damage := log_damage(path, page_size(path), files):
            raise CatalogueError(f"{damage}: nothing is written as long as this file is there")
        with ExitStack() as undo:
            with _translated():
                self._write = undo.enter_context(closing(_connect(path)))
                self._read = undo.enter_context(closing(_connect(path)))
                for db in (self._write, self._read):
                    _configure(db)
                _mark(self._write)
                self._checkpoints = _Checkpoints(path, self._write, files)
                undo.callback(self._checkpoints.close)
                self._checkpoints.make(checked=True)
            undo.pop_all()
        # Without it a program that forgets to close would let SQLite make a checkpoint of its own.
        self._close = weakref.finalize(self, _shut, self._checkpoints, self._read, self._write)

    @contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction: durable when the block has ended, undone if it raises.

        Args:
            durable: If not, it is when the next one is: the log's end may be lost in a crash of the
                machine, though not in one of the process.
        """
        with self._write_lock, _translated():
            self.refuse_if_damaged()
            # NORMAL does not wait for the disk at the end of a transaction.
            self._write.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._write.execute("BEGIN IMMEDIATE")
            before = self._write.total_changes
            try:
                yield self._write
                if durable and self._write.total_changes != before:
                    self._write.execute("UPDATE marks SET count = count + 1")
                self._write.execute("COMMIT")
            finally:
                if self._write.in_transaction:
                    self._write.execute("ROLLBACK")
            if self._checkpoints.due:
                with self._read_lock:
                    self._checkpoints.make()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to ask questions; cursors are not to outlive the block."""
        with self._read_lock, _translated():
            yield self._read

    def refuse_if_damaged(self) -> None:
        """Raises CatalogueError if the log is known to be damaged, so that nothing is written."""
        if self._checkpoints.damage:
            raise CatalogueError(self._checkpoints.damage)

    def check(self) -> list[str]:
        """Returns what is damaged of the file, and of its checksums: one line each."""
        with self._write_lock, self._read_lock, _translated():
            return self._checkpoints.check()

    def close(self) -> None:
        """Closes all of it, after what other threads are doing. A second call does nothing."""
        with self._write_lock, self._read_lock:
            self._close()


class _Checkpoints:
    """Makes checkpoints, and keeps the checksums. Whoever calls has both connections' locks."""

    def __init__(self, path: Path, db: sqlite3.Connection, files: Files) -> None:
        self._path = path
        self._log = path.with_name(path.name + "-wal")
        self._sums_path = path.with_name(path.name + ".sums")
        self._db = db
        self._files = files
        self._page_size: int
        (self._page_size,) = db.execute("PRAGMA page_size").fetchone()
        # Kept open: closing it would release the locks that SQLite has on the file.
        self._fd = files.open(path)
        self._sums, self._damaged_sums = self._load()
        self._kept = b""
        # Whether the file's pages are as the checksums say, and no checkpoint was interrupted.
        self._settled = not self._logged()
        # What is wrong with the log, if anything is.
        self.damage = ""

    @property
    def due(self) -> bool:
        try:
            return os.stat(self._log).st_size > LOG_LIMIT
        except FileNotFoundError:
            return False

    def make(self, *, checked: bool = False) -> None:
        """Makes a checkpoint of what the log has, unless that is damaged.

        Args:
            checked: Whether it was found not to be.
        """
        logged = self._logged()
        if not logged and self._sums is not None:
            return
        if not checked:
            self.damage = self.damage or log_damage(self._path, self._page_size, self._files)
        if self.damage:
            return
        spoiled = self._spoiled(logged) if self._settled else set[int]()
        self._settled = False
        try:
            if self._db.execute("PRAGMA wal_checkpoint(FULL)").fetchone()[0]:
                return  # Somebody else looks at it. The log stays whole.
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                return  # The log stays whole, and all can be read: so that a gc can make space.
            raise
        if self._take(logged, spoiled):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._settled = True

    def check(self) -> list[str]:
        self.make()
        found = [*self._damaged_sums, *filter(None, [self.damage])]
        logged = self._logged()
        for number in range(1, self._count() + 1):
            if number in logged or self._sums is None:
                continue
            if self._known(number) != self._sum(number):
                found.append(f"{self._path.name}: page {number} is damaged")
        if self._sums is not None and len(self._sums) > self._count() * SUM_SIZE:
            found.append(f"{self._path.name}: its end is missing")
        return found

    def leave(self) -> None:
        """Comes before the connections' end, at which SQLite makes a checkpoint of what is left."""
        if self.damage:
            self._kept = self._log.read_bytes()
        if self._logged():
            self._forget()

    def close(self) -> None:
        """Comes after the connections' end."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._kept:
            self._files.replace(self._log, self._kept)

    def _spoiled(self, logged: set[int]) -> set[int]:
        """Returns those of these pages that are damaged in the file, and were so when written anew.

        What is in the log was made from what was in the file.
        """
        if self._sums is None:
            return set()
        known = len(self._sums) // SUM_SIZE
        return {
            number
            for number in logged
            if number <= known and self._known(number) != self._sum(number)
        }

    def _take(self, changed: set[int], spoiled: set[int]) -> bool:
        """Saves checksums, of these pages or, if none were known, of all; tells if it did.

        Those of spoiled pages are made wrong, so that their damage stays known.
        """
        count = self._count()
        if self._sums is None:
            self._sums, changed = bytearray(), set(range(1, count + 1))
        self._sums.extend(bytes(max(0, count * SUM_SIZE - len(self._sums))))
        for number in changed:
            if number <= count:
                fresh = self._sum(number)
                if number in spoiled:
                    fresh = bytes(byte ^ 255 for byte in fresh)
                self._sums[(number - 1) * SUM_SIZE : number * SUM_SIZE] = fresh
        content = SUMS_MAGIC + self._sums
        try:
            self._files.replace(self._sums_path, content + blake3(content).digest(16))
        except OSError:
            # Nothing else is lost by that: it is no reason to fail what has just been committed.
            self._forget()
            return False
        return True

    def _forget(self) -> None:
        """Removes checksums that are of an older state. Without any, they are taken anew."""
        self._sums = None
        self._files.remove(self._sums_path)

    def _load(self) -> tuple[bytearray | None, list[str]]:
        try:
            content = self._sums_path.read_bytes()
        except FileNotFoundError:
            return None, []
        body = content[:-16]
        if not body.startswith(SUMS_MAGIC) or blake3(body).digest(16) != content[-16:]:
            return None, [f"{self._sums_path.name} is damaged"]
        return bytearray(body[len(SUMS_MAGIC) :]), []

    def _logged(self) -> set[int]:
        """Returns the numbers of the pages that the log has."""
        try:
            fd = self._files.open(self._log)
        except FileNotFoundError:
            return set()
        try:
            header, found = self._files.read(fd, HEADER.size, 0), set[int]()
            if len(header) < HEADER.size:
                return found
            salt, offset = HEADER.unpack(header)[4], HEADER.size
            while len(frame := self._files.read(fd, FRAME.size, offset)) == FRAME.size:
                number, _, own, *_ = FRAME.unpack(frame)
                if own != salt:
                    break  # Left over from before the log was begun anew.
                found.add(number)
                offset += FRAME.size + self._page_size
            return found
        finally:
            os.close(fd)

    def _count(self) -> int:
        return os.fstat(self._fd).st_size // self._page_size

    def _known(self, number: int) -> bytes:
        assert self._sums is not None
        return bytes(self._sums[(number - 1) * SUM_SIZE : number * SUM_SIZE])

    def _sum(self, number: int) -> bytes:
        page = self._files.read(self._fd, self._page_size, (number - 1) * self._page_size)
        return blake3(page).digest(SUM_SIZE)


def _shut(checkpoints: _Checkpoints, read: sqlite3.Connection, write: sqlite3.Connection) -> None:
    with ExitStack() as stack:
        stack.callback(checkpoints.close)
        stack.callback(write.close)
        stack.callback(read.close)
        with _translated():
            try:
                checkpoints.make()
            finally:
                checkpoints.leave()


def _connect(path: Path) -> sqlite3.Connection:
    # The locks take the place of sqlite3's own check of threads.
    return sqlite3.connect(
        path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
    )


def _configure(db: sqlite3.Connection) -> None:
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise CatalogueError(f"SQLite cannot use a write-ahead log here, only {mode}")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA wal_autocheckpoint = 0")


def _mark(db: sqlite3.Connection) -> None:
    """Makes, in a new database, the table whose page tells which transactions are durable."""
    if db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE marks (count INTEGER NOT NULL)")
        db.execute("INSERT INTO marks VALUES (0)")
        db.execute("COMMIT")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise CatalogueError(f"the catalogue: {error}") from error
