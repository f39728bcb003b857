"""The catalogue and its snapshots."""

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.backup.catalogue import BATCH, Catalogue
from examples.backup.chunks import Chunk
from examples.backup.errors import (
    BackupError,
    CatalogueError,
    InvalidEntry,
    UnknownChunks,
    UnknownSnapshot,
)
from examples.backup.packs import Location
from examples.backup.snapshots import Snapshots
from examples.backup.tree import Entry, Kind, order

SIZE = 10


def chunk(number: int) -> Chunk:
    return Chunk(number.to_bytes(32, "big"), SIZE, b"")


def add(catalogue: Catalogue, *numbers: int) -> None:
    catalogue.add((chunk(number), Location(1, number, 5)) for number in numbers)


def ids(*numbers: int) -> list[bytes]:
    return [chunk(number).id for number in numbers]


def file(path: bytes, *numbers: int, offset: int = 0, size: int | None = None) -> Entry:
    total = offset + SIZE * len(numbers) if size is None else size
    sizes = (SIZE,) * len(numbers)
    return Entry(path, Kind.FILE, 0o644, 7, total, b"", offset, tuple(ids(*numbers)), sizes)


def directory(path: bytes) -> Entry:
    return Entry(path, Kind.DIRECTORY, 0o755, 7)


@contextmanager
def opened(path: Path) -> Iterator[Catalogue]:
    with closing(Catalogue(path)) as catalogue:
        yield catalogue


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite"


@pytest.fixture
def catalogue(path: Path):
    with opened(path) as catalogue:
        add(catalogue, *range(1, 10))
        yield catalogue


@pytest.fixture
def snapshots(catalogue: Catalogue) -> Snapshots:
    return Snapshots(catalogue)


def commit(snapshots: Snapshots, name: str, *entries: Entry):
    draft = snapshots.begin(name)
    draft.add(entries)
    return draft.commit()


def test_missing_gives_positions(catalogue):
    assert catalogue.missing(ids(1, 20, 2, 21, 20)) == [1, 3, 4]
    assert catalogue.missing([]) == []
    assert catalogue.missing([b"", b"short", bytes(100)]) == [0, 1, 2]


@pytest.mark.parametrize("count", [BATCH - 1, BATCH, BATCH + 1, 7 * BATCH])
def test_missing_of_very_many(catalogue, count):
    add(catalogue, *range(1000, 1000 + 2 * count, 2))
    found = catalogue.missing(ids(*range(1000, 1000 + 2 * count)))
    assert found == list(range(1, 2 * count, 2))


def test_chunks_are_located(catalogue):
    assert catalogue.locate(ids(3, 1, 3)) == [Location(1, number, 5) for number in (3, 1, 3)]
    assert catalogue.sizes(ids(3, 99)) == {chunk(3).id: SIZE}
    with pytest.raises(UnknownChunks, match="2 chunks are not in the store") as caught:
        catalogue.locate(ids(1, 98, 99))
    assert caught.value.ids == ids(98, 99)


def test_a_chunk_that_is_known_stays_where_it_is(catalogue):
    catalogue.add([(chunk(1), Location(9, 9, 9)), (chunk(30), Location(9, 9, 9))])
    assert catalogue.locate(ids(1, 30)) == [Location(1, 1, 5), Location(9, 9, 9)]


def test_adding_is_all_or_nothing(catalogue):
    with pytest.raises(CatalogueError, match="NOT NULL constraint"):
        catalogue.add([(chunk(30), Location(1, 1, 1)), (chunk(31), Location(None, 1, 1))])
    assert catalogue.missing(ids(30, 31)) == [0, 1]
    add(catalogue, 30)
    assert catalogue.missing(ids(30)) == []


def test_everything_is_there_after_reopening(path):
    with opened(path) as catalogue:
        add(catalogue, 1)
        snapshot = commit(Snapshots(catalogue), "name", directory(b""), file(b"file", 1))
    with opened(path) as catalogue:
        assert catalogue.missing(ids(1)) == []
        assert Snapshots(catalogue).all() == [snapshot]
        assert list(Snapshots(catalogue).entries(snapshot.id)) == [directory(b""), file(b"file", 1)]


def test_commits_wait_for_the_disk(catalogue):
    with catalogue.writing() as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_another_version_is_refused(path):
    with opened(path) as catalogue, catalogue.writing() as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(CatalogueError, match="version 99"):
        Catalogue(path)


def test_what_is_no_catalogue_is_refused(path):
    path.write_bytes(b"certainly not a database" * 100)
    with pytest.raises(CatalogueError, match="not a database"):
        Catalogue(path)


def test_a_closed_catalogue_says_so(path):
    with opened(path) as catalogue:
        pass
    with pytest.raises(CatalogueError, match="closed"):
        catalogue.missing(ids(1))


def test_threads_share_a_catalogue(catalogue):
    def work(thread: int) -> bool:
        numbers = range(1000 * thread, 1000 * thread + 200)
        for number in numbers:
            add(catalogue, number)
            if catalogue.missing(ids(number)):
                return False
        return not catalogue.missing(ids(*numbers))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(1, 5)))


def test_questions_are_answered_during_a_transaction(catalogue):
    with catalogue.writing() as db:
        db.execute("INSERT INTO chunks VALUES (?, 1, 1, 1, 1)", (chunk(30).id,))
        assert catalogue.missing(ids(1, 30)) == [1]
    assert catalogue.missing(ids(1, 30)) == []


def test_a_snapshot_counts_what_it_has(snapshots):
    snapshot = commit(
        snapshots,
        "name",
        directory(b""),
        file(b"a", 1, 2),
        file(b"b", 3, size=30),
        file(b"b", 4, 5, offset=10),
        file(b"empty"),
        Entry(b"link", Kind.SYMLINK, 0o777, 7, target=b"a"),
    )
    assert (snapshot.entries, snapshot.files) == (5, 3)
    assert (snapshot.size, snapshot.chunks) == (50, 5)
    assert snapshots.all() == [snapshot]


def test_a_draft_is_invisible_until_it_is_committed(snapshots):
    draft = snapshots.begin("name")
    draft.add([directory(b"")])
    assert snapshots.all() == []
    for reference in ("name", draft.id, draft.id[:8]):
        with pytest.raises(UnknownSnapshot):
            snapshots.find(reference)
    with pytest.raises(UnknownSnapshot):
        next(snapshots.entries(draft.id))
    snapshot = draft.commit()
    assert snapshots.find("name") == snapshot
    assert snapshot.id == draft.id


def test_drafts_are_gone_after_a_restart(path):
    with opened(path) as catalogue:
        add(catalogue, 1)
        draft = Snapshots(catalogue).begin("name")
        draft.add(file(b"%06d" % number, 1) for number in range(20_000))
    with opened(path) as catalogue:
        assert Snapshots(catalogue).all() == []
        with catalogue.reading() as db:
            assert db.execute("SELECT count(*) FROM pages").fetchone() == (0,)


def test_a_draft_is_committed_or_discarded_once(snapshots):
    draft = snapshots.begin("name")
    draft.commit()
    draft.discard()
    assert len(snapshots.all()) == 1
    for act in (draft.commit, lambda: draft.add([])):
        with pytest.raises(BackupError, match="committed or discarded"):
            act()
    other = snapshots.begin("name")
    other.discard()
    with pytest.raises(BackupError, match="committed or discarded"):
        other.commit()
    assert len(snapshots.all()) == 1


def test_a_snapshot_names_no_chunk_that_is_not_stored(snapshots):
    draft = snapshots.begin("name")
    with pytest.raises(UnknownChunks) as caught:
        draft.add([file(b"a", 1), file(b"b", 1, 77)])
    assert caught.value.ids == ids(77)
    with pytest.raises(BackupError, match="committed or discarded"):
        draft.commit()
    assert snapshots.all() == []


@pytest.mark.parametrize(
    "entries",
    [
        [file(b"b"), file(b"a")],
        [file(b"a"), file(b"a")],
        [file(b"a/b"), directory(b"a")],
        [directory(b"a-b"), directory(b"a"), file(b"a/b")],
        [directory(b"a")._replace(size=1)],
        [file(b"a", 1)._replace(kind=Kind.DIRECTORY)],
        [file(b"a", 1)._replace(kind=Kind.SYMLINK, size=0)],
        [file(b"a", 1)._replace(size=9)],
        [file(b"a", 1)._replace(sizes=(11,), size=11)],
        [file(b"a", 1)._replace(sizes=())],
        [file(b"a", 1)._replace(sizes=(SIZE, SIZE))],
        [file(b"a")._replace(size=5)],
        [file(b"a")._replace(size=-5)],
        [file(b"a", 1, offset=10)],
        [file(b"a", 1, size=30), file(b"a", 1, offset=20)],
        [file(b"a", 1, size=30), file(b"b", 1, offset=10)],
        [file(b"a", 1, size=30), file(b"a", 1, 2, 3)],
        [file(b"a", 1, size=30), directory(b"b")],
        [file(b"a", 1, size=30)],
        [file(b"a", 1, size=30), file(b"a", 2, offset=10, size=30)],
    ],
)
def test_entries_that_contradict_each_other_are_refused(snapshots, entries):
    with pytest.raises(InvalidEntry):
        commit(snapshots, "name", *entries)
    assert snapshots.all() == []


def test_a_name_stands_for_its_newest_snapshot(snapshots):
    old = commit(snapshots, "laptop")
    commit(snapshots, "server")
    new = commit(snapshots, "laptop")
    assert snapshots.find("laptop") == new
    assert snapshots.find(old.id) == old
    assert [snapshot.name for snapshot in snapshots.all()] == ["laptop", "server", "laptop"]


def test_a_prefix_of_an_id_stands_for_it_if_it_fits_no_other(path, snapshots):
    one, other = commit(snapshots, "a"), commit(snapshots, "b")
    assert snapshots.find(one.id[:12]) == one
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE snapshots SET id = 'abcd1' WHERE id = ?", (one.id,))
        db.execute("UPDATE snapshots SET id = 'abcd2' WHERE id = ?", (other.id,))
    assert snapshots.find("abcd2").name == "b"
    with pytest.raises(UnknownSnapshot, match="2 snapshots begin with abcd"):
        snapshots.find("abcd")
    for reference in ("abc", "", "abcd_", "abcd%", "abcd*"):
        with pytest.raises(UnknownSnapshot, match="no snapshot"):
            snapshots.find(reference)


def test_a_damaged_page_is_found(path, snapshots):
    snapshot = commit(snapshots, "name", directory(b""))
    with closing(sqlite3.connect(path)) as db, db:
        (page,) = db.execute("SELECT entries FROM pages").fetchone()
        db.execute("UPDATE pages SET entries = ?", (page[:-1] + bytes([page[-1] ^ 1]),))
    with pytest.raises(CatalogueError, match="damaged"):
        list(snapshots.entries(snapshot.id))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM pages")
    with pytest.raises(CatalogueError, match="missing"):
        list(snapshots.entries(snapshot.id))


def test_a_large_snapshot_is_streamed(snapshots):
    entries = [file(b"%07d" % number, number % 9 + 1) for number in range(40_000)]
    draft = snapshots.begin("name")
    for start in range(0, len(entries), 1000):
        draft.add(entries[start : start + 1000])
    snapshot = draft.commit()
    assert snapshot.files == 40_000
    assert list(snapshots.entries(snapshot.id)) == entries


names = st.binary(min_size=1, max_size=5).filter(lambda name: b"/" not in name)
numbers = st.integers(-(1 << 63), (1 << 63) - 1)
any_entry = st.one_of(
    st.builds(
        lambda mode, mtime_ns, target: Entry(b"", Kind.SYMLINK, mode, mtime_ns, target=target),
        numbers,
        numbers,
        st.binary(max_size=9),
    ),
    st.builds(lambda mode, mtime_ns: Entry(b"", Kind.DIRECTORY, mode, mtime_ns), numbers, numbers),
    st.lists(st.integers(1, 9), max_size=5).map(lambda numbers: file(b"", *numbers)),
)


trees = st.dictionaries(st.lists(names, min_size=1, max_size=3).map(b"/".join), any_entry)


@given(trees)
def test_entries_come_back_as_they_were(tree):
    entries = [tree[path]._replace(path=path) for path in sorted(tree, key=order)]
    with TemporaryDirectory() as place, opened(Path(place) / "catalogue") as catalogue:
        add(catalogue, *range(1, 10))
        snapshots = Snapshots(catalogue)
        snapshot = commit(snapshots, "name", *entries)
        assert list(snapshots.entries(snapshot.id)) == entries
