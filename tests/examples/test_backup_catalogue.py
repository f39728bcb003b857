"""The catalogue's file: what SQLite makes of it, and what finds a flipped bit in it.

What every catalogue has to do is in test_backup_conformance.
"""

import gc
import random
import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from examples.backup.catalogue import Catalogue
from examples.backup.database import LOG_LIMIT, Database
from examples.backup.errors import CatalogueError, KeyExists, UnknownChunks
from examples.backup.interfaces import Location
from examples.backup.snapshots import Snapshot
from tests.examples.stores import chunk, ids, page_of


def add(catalogue: Catalogue, *seeds: int) -> None:
    catalogue.add((chunk(seed), Location(1, seed, 5)) for seed in seeds)


@contextmanager
def opened(path: Path) -> Iterator[Catalogue]:
    with closing(Catalogue(path)) as catalogue:
        yield catalogue


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite"


def test_everything_is_there_after_reopening(path):
    snapshot = Snapshot("id", "name", 1, 2, 3, 4, 5)
    with opened(path) as catalogue:
        add(catalogue, 1, 2)
        catalogue.condemn(ids(2), 2)
        catalogue.set_generation(2)
        keys = catalogue.add_pages([page_of(1)])
        catalogue.commit(snapshot, keys)
        before = catalogue.find(ids(1, 2)), catalogue.packs()
    with opened(path) as catalogue:
        assert (catalogue.find(ids(1, 2)), catalogue.packs()) == before
        assert catalogue.generation() == 2
        assert catalogue.snapshots() == [snapshot]
        assert catalogue.contents("id") == keys
        assert catalogue.pages(keys) == [page_of(1)]


def test_commits_wait_for_the_disk(path):
    with closing(Database(path)) as database, database.writing() as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_adding_is_all_or_nothing(path):
    with opened(path) as catalogue:
        with pytest.raises(CatalogueError, match="NOT NULL constraint"):
            catalogue.add([(chunk(1), Location(1, 1, 1)), (chunk(2), Location(None, 1, 1))])
        assert catalogue.find(ids(1, 2)) == {}
        add(catalogue, 1)
        assert list(catalogue.find(ids(1))) == ids(1)


@pytest.mark.parametrize("version", [2, 99])
def test_another_version_is_refused(path, version):
    with opened(path):
        pass
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(CatalogueError, match=f"format version {version}; this program reads 3"):
        Catalogue(path)


def test_what_is_no_catalogue_is_refused(path):
    path.write_bytes(b"certainly not a database" * 100)
    with pytest.raises(CatalogueError, match="not a database"):
        Catalogue(path)


def test_a_closed_catalogue_says_so(path):
    with opened(path) as catalogue:
        pass
    catalogue.close()
    with pytest.raises(CatalogueError, match="closed"):
        catalogue.find(ids(1))


def test_questions_are_answered_during_a_transaction(path):
    with closing(Database(path)) as database:
        with database.writing() as db:
            db.execute("CREATE TABLE numbers (number)")
        with database.writing() as db:
            db.execute("INSERT INTO numbers VALUES (1)")
            with database.reading() as other:
                assert other.execute("SELECT count(*) FROM numbers").fetchone() == (0,)
        with database.reading() as other:
            assert other.execute("SELECT count(*) FROM numbers").fetchone() == (1,)


def test_damaged_pages_and_snapshots_are_found_where_they_are_read(path):
    with opened(path) as catalogue:
        add(catalogue, 1)
        keys = catalogue.add_pages([page_of(1)])
        catalogue.commit(Snapshot("id", "name", 1, 2, 3, 4, 5), keys)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE snapshots SET files = 4")
        with pytest.raises(CatalogueError, match="snapshot id is damaged"):
            catalogue.contents("id")
        for column in ("data", "chunks"):
            with closing(sqlite3.connect(path)) as db, db:
                (content,) = db.execute(f"SELECT {column} FROM pages").fetchone()
                flipped = content[:-1] + bytes([content[-1] ^ 1])
                db.execute(f"UPDATE pages SET {column} = ?", (flipped,))
            with pytest.raises(CatalogueError, match="damaged"):
                catalogue.pages(keys)
            with closing(sqlite3.connect(path)) as db, db:
                db.execute(f"UPDATE pages SET {column} = ?", (content,))
        assert catalogue.pages(keys) == [page_of(1)]


def flip_first(path: Path, content: bytes, count: int) -> None:
    """Flips a bit in so many of the two places that have this content."""
    whole = path.read_bytes()
    assert whole.count(content) == 2
    flipped = content[:-1] + bytes([content[-1] ^ 4])
    path.write_bytes(whole.replace(content, flipped, count))


def test_a_damaged_copy_of_the_key_is_told_and_the_other_taken(path):
    with opened(path) as catalogue:
        catalogue.set_key(b"a wrapped key")
    flip_first(path, b"a wrapped key", 1)
    for generation in range(2, 5):
        with opened(path) as catalogue:
            assert catalogue.key() == b"a wrapped key"
            # The page is written anew, with the flipped bit.
            catalogue.set_generation(generation)
            assert "what it says of the key is damaged" in catalogue.check()


def test_a_key_of_which_both_copies_are_damaged_is_refused(path):
    with opened(path) as catalogue:
        catalogue.set_key(b"a wrapped key")
    flip_first(path, b"a wrapped key", 2)
    with opened(path) as catalogue:
        with pytest.raises(CatalogueError, match="what the catalogue says of the key is damaged"):
            catalogue.key()
        with pytest.raises(KeyExists):
            catalogue.set_key(b"another")


def test_what_is_damaged_of_a_pack_stays_known(path):
    with opened(path) as catalogue:
        add(catalogue, *range(3))
        assert catalogue.check() == []
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE packs SET used = used + 64")
        for seed in range(3, 5):
            assert "what it says of pack 1 is damaged" in catalogue.check()
            add(catalogue, seed)


def test_writing_over_a_damaged_page_does_not_hide_it(filled):
    """Whatever the bit was: free space, which no digest covers, has one here."""
    whole = filled.read_bytes()
    with closing(sqlite3.connect(filled)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'facts'").fetchone()
    at = (root - 1) * 4096 + 2000
    filled.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for generation in range(5, 8):
        with opened(filled) as catalogue:
            catalogue.set_generation(generation)
            assert catalogue.check() == [f"catalogue.sqlite: page {root} is damaged"]


def written(path: Path) -> int:
    """Returns how many chunks the file has, as another process sees it."""
    with closing(sqlite3.connect(path)) as db:
        (count,) = db.execute("SELECT count(*) FROM chunks").fetchone()
        return int(count)


def test_additions_are_gathered_up_to_a_bound_and_found_meanwhile(path):
    with closing(Catalogue(path, gather=10)) as catalogue:
        for seed in range(10):
            add(catalogue, seed)
            assert written(path) == 0
            assert list(catalogue.find(ids(99, *range(seed + 1)))) == ids(*range(seed + 1))
        add(catalogue, 10)
        assert written(path) == 11
        add(catalogue, *range(11, 21))
        assert written(path) == 11
        add(catalogue, *range(21, 41))
        assert written(path) == 41
        add(catalogue, 41)
        assert len(catalogue.find(ids(*range(50)))) == 42
    assert written(path) == 42


@pytest.mark.parametrize(
    "act",
    [
        lambda catalogue: catalogue.chunks(b"", 9),
        lambda catalogue: catalogue.condemn(ids(1), 1),
        lambda catalogue: catalogue.revive(ids(1)),
        lambda catalogue: catalogue.condemned(),
        lambda catalogue: catalogue.lost(),
        lambda catalogue: catalogue.set_lost(catalogue.find(ids(1))[ids(1)[0]], True),
        lambda catalogue: catalogue.begin_pack(2),
        lambda catalogue: catalogue.last_pack(),
        lambda catalogue: catalogue.packs(),
        lambda catalogue: catalogue.in_pack(1, 0, 9),
        lambda catalogue: catalogue.sweep(1, 1),
        lambda catalogue: catalogue.move([]),
        lambda catalogue: catalogue.end_pack(1),
        lambda catalogue: catalogue.commit(Snapshot("id", "name", 1, 2, 3, 4, 5), []),
        lambda catalogue: catalogue.set_generation(2),
        lambda catalogue: catalogue.check(),
        lambda catalogue: catalogue.close(),
    ],
)
def test_whatever_comes_after_additions_writes_them(path, act):
    with closing(Catalogue(path, gather=10)) as catalogue:
        add(catalogue, 1, 2)
        assert written(path) == 0
        act(catalogue)
        assert written(path) == 2


def test_pages_may_name_what_waits(path):
    with closing(Catalogue(path, gather=10)) as catalogue:
        add(catalogue, 1, 2)
        keys = catalogue.add_pages([page_of(1, 2)])
        with pytest.raises(UnknownChunks):
            catalogue.add_pages([page_of(1, 3)])
        assert written(path) == 0
        catalogue.commit(Snapshot("id", "name", 1, 2, 3, 4, 5), keys)
        assert written(path) == 2


def test_additions_that_cannot_be_written_wait_on(path):
    with closing(Catalogue(path, gather=2)) as catalogue:
        add(catalogue, 1, 2)
        with closing(sqlite3.connect(path)) as db, db:
            refuse = "CREATE TRIGGER refuse BEFORE INSERT ON chunks BEGIN"
            db.execute(f"{refuse} SELECT RAISE(ABORT, 'refused'); END")
        for act in (lambda: add(catalogue, 3), catalogue.packs, lambda: catalogue.begin_pack(2)):
            with pytest.raises(CatalogueError, match="refused"):
                act()
        # What failed is not there, and the rest still is.
        assert list(catalogue.find(ids(1, 2, 3))) == ids(1, 2)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("DROP TRIGGER refuse")
        assert [(use.number, use.chunks) for use in catalogue.packs()] == [(1, 2)]
        assert written(path) == 2


def test_threads_find_what_others_add_whenever_it_is_written(path):
    with closing(Catalogue(path, gather=20)) as catalogue, ThreadPoolExecutor(4) as pool:

        def fill(first: int) -> bool:
            for seed in range(first, 400, 4):
                add(catalogue, seed)
                if list(catalogue.find(ids(seed))) != ids(seed):
                    return False
                if seed % 7 == 0:
                    catalogue.add_pages([page_of(seed)])
                if seed % 31 == 0:
                    catalogue.packs()
            return True

        assert all(pool.map(fill, range(4)))
        assert len(catalogue.find(ids(*range(400)))) == 400
        assert [use.chunks for use in catalogue.packs()] == [400]


@pytest.fixture
def filled(path: Path) -> Path:
    with opened(path) as catalogue:
        add(catalogue, *range(300))
        catalogue.commit(
            Snapshot("id", "name", 1, 2, 3, 4, 5), catalogue.add_pages([page_of(*range(300))])
        )
        catalogue.condemn(ids(*range(100)), 1)
        catalogue.sweep(1, 1)
    return path


def test_a_flipped_bit_anywhere_in_the_file_is_found(filled):
    whole = filled.read_bytes()
    assert not filled.with_name("catalogue.sqlite-wal").exists()
    draw = random.Random(4)
    for _ in range(60):
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        filled.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            with opened(filled) as catalogue:
                found = catalogue.check()
        except CatalogueError:
            continue  # It is so bad that the catalogue cannot even be opened.
        assert found == [f"catalogue.sqlite: page {at // 4096 + 1} is damaged"]
    filled.write_bytes(whole)
    with opened(filled) as catalogue:
        assert catalogue.check() == []


def test_a_flipped_bit_among_the_checksums_is_found(filled):
    sums = filled.with_name("catalogue.sqlite.sums")
    whole = sums.read_bytes()
    for at in range(0, len(whole), 7):
        sums.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
        with opened(filled) as catalogue:
            assert catalogue.check() == ["catalogue.sqlite.sums is damaged"]


def test_a_file_cut_off_is_found(filled):
    whole = filled.read_bytes()
    filled.write_bytes(whole[: len(whole) - 4096])
    try:
        with opened(filled) as catalogue:
            assert catalogue.check()
    except CatalogueError:
        pass


def test_checksums_follow_what_is_written(path):
    with opened(path) as catalogue:
        for first in range(0, 300, 100):
            add(catalogue, *range(first, first + 100))
            assert catalogue.check() == []
        catalogue.condemn(ids(*range(150)), 1)
        catalogue.sweep(1, 1)
        assert catalogue.check() == []
    with opened(path) as catalogue:
        assert catalogue.check() == []


def test_a_long_log_is_brought_into_the_file(path):
    log = path.with_name("catalogue.sqlite-wal")
    with opened(path) as catalogue:
        catalogue.add((chunk(seed), Location(1, seed, 5)) for seed in range(100))
        large = page_of(1)._replace(data=bytes(1024 * 1024))
        for _ in range(2 * LOG_LIMIT // (1024 * 1024)):
            catalogue.add_pages([large])
            assert log.stat().st_size < LOG_LIMIT + 2 * 1024 * 1024
        assert path.stat().st_size > LOG_LIMIT
        assert catalogue.check() == []


def test_a_crash_at_any_step_of_a_checkpoint_leaves_the_checksums_right(path, tmp_path):
    """Copies of the files at the steps stand for what a crash leaves."""
    names = ("catalogue.sqlite", "catalogue.sqlite-wal", "catalogue.sqlite.sums")
    with opened(path) as catalogue:
        add(catalogue, *range(100))
        catalogue.check()
        old = {name: (tmp_path / name).read_bytes() for name in names}
        add(catalogue, *range(100, 200))
        logged = {name: (tmp_path / name).read_bytes() for name in names}
        assert len(logged["catalogue.sqlite-wal"]) > len(old["catalogue.sqlite-wal"])
        catalogue.check()
        new = {name: (tmp_path / name).read_bytes() for name in names}
    half = bytearray(new["catalogue.sqlite"])
    half[4096:8192] = old["catalogue.sqlite"][4096:8192]
    log, sums = logged["catalogue.sqlite-wal"], old["catalogue.sqlite.sums"]
    crashes = [
        (logged["catalogue.sqlite"], log, sums),
        (bytes(half), log, sums),
        (new["catalogue.sqlite"], log, sums),
        (new["catalogue.sqlite"], log, new["catalogue.sqlite.sums"]),
        (new["catalogue.sqlite"], b"", new["catalogue.sqlite.sums"]),
    ]
    for number, contents in enumerate(crashes):
        place = tmp_path / f"{number}"
        place.mkdir()
        for name, content in zip(names, contents, strict=True):
            (place / name).write_bytes(content)
        with opened(place / "catalogue.sqlite") as catalogue:
            assert catalogue.check() == []
            assert len(catalogue.find(ids(*range(200)))) == 200


def test_lost_checksums_are_taken_anew(filled):
    filled.with_name("catalogue.sqlite.sums").unlink()
    for _ in range(2):
        with opened(filled) as catalogue:
            assert catalogue.check() == []
    assert filled.with_name("catalogue.sqlite.sums").exists()


def test_a_catalogue_that_was_not_closed_is_as_good(path, tmp_path):
    catalogue = Catalogue(path)
    add(catalogue, *range(100))
    del catalogue
    gc.collect()
    with opened(path) as catalogue:
        assert len(catalogue.find(ids(*range(100)))) == 100
        assert catalogue.check() == []


def test_checksums_that_cannot_be_written_are_not_left_behind(path, tmp_path):
    with opened(path) as catalogue:
        add(catalogue, *range(100))
        (tmp_path / "catalogue.sqlite.sums.new").mkdir()
        assert catalogue.check() == []
        assert not path.with_name("catalogue.sqlite.sums").exists()
        shutil.rmtree(tmp_path / "catalogue.sqlite.sums.new")
        assert catalogue.check() == []
