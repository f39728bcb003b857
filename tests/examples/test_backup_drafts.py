"""Drafts and the snapshots that come of them, in files and in memory."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.backup import pages
from examples.backup.errors import (
    BackupError,
    InvalidEntry,
    PageError,
    UnknownBase,
    UnknownChunks,
    UnknownSnapshot,
)
from examples.backup.memory import Memory
from examples.backup.pages import Page
from examples.backup.snapshots import Snapshot
from examples.backup.store import Store
from examples.backup.tree import HOLE, Entry, Kind, order
from tests.examples.stores import ROOT, chunk, commit, file, ids, page_of, put

SIZE = 1000


@pytest.fixture(params=["files", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path if request.param == "files" else Memory()) as store:
        put(store, range(1, 10))
        yield store


def directory(path: bytes) -> Entry:
    return ROOT._replace(path=path)


def committed(store: Store, name: str, *batches: list[Entry]) -> Snapshot:
    draft = store.begin(name)
    for batch in batches:
        draft.add([pages.encode(batch)])
    return draft.commit()


def entries(store: Store, snapshot: Snapshot) -> list[Entry]:
    found = store.pages(snapshot.id)
    return [entry for page in found for entry in pages.decode(page.data, page.chunks)]


def test_a_snapshot_counts_what_it_has(store):
    sparse = file(b"d", 6)._replace(
        size=2 * SIZE + 5, chunks=(chunk(6).id, HOLE), sizes=(SIZE, SIZE + 5)
    )
    snapshot = committed(
        store,
        "name",
        [ROOT, file(b"a", 1, 2)],
        [file(b"b", 3, size=3 * SIZE), file(b"b", 4, 5, offset=SIZE)],
        [
            Entry(b"c", Kind.FILE, 0o644, 7, 2 * SIZE, link=b"a"),
            sparse,
            file(b"empty"),
            Entry(b"link", Kind.SYMLINK, 0o777, 7, target=b"a"),
        ],
    )
    assert (snapshot.entries, snapshot.files) == (7, 5)
    assert (snapshot.size, snapshot.chunks) == (9 * SIZE + 5, 6)
    assert store.snapshots() == [snapshot]


def test_a_draft_is_invisible_until_it_is_committed(store):
    draft = store.begin("name")
    draft.add([pages.encode([ROOT])])
    assert store.snapshots() == []
    for reference in ("name", draft.id, draft.id[:8]):
        with pytest.raises(UnknownSnapshot):
            store.find(reference)
    with pytest.raises(UnknownSnapshot):
        next(store.pages(draft.id))
    snapshot = draft.commit()
    assert store.find("name") == snapshot
    assert snapshot.id == draft.id


def test_drafts_are_gone_after_a_restart(tmp_path):
    with Store(tmp_path) as store:
        put(store, [1])
        store.begin("name").add([page_of(1)])
    with Store(tmp_path) as store:
        assert store.snapshots() == []
        *_, did = store.collect()
        assert (did.pages, did.chunks) == (1, 1)


def test_a_draft_is_committed_or_discarded_once(store):
    draft = store.begin("name")
    draft.commit()
    draft.discard()
    assert len(store.snapshots()) == 1
    for act in (draft.commit, lambda: draft.add([])):
        with pytest.raises(BackupError, match="committed or discarded"):
            act()
    other = store.begin("name")
    other.discard()
    with pytest.raises(BackupError, match="committed or discarded"):
        other.commit()
    assert len(store.snapshots()) == 1


def test_a_snapshot_names_no_chunk_that_is_not_stored(store):
    draft = store.begin("name")
    with pytest.raises(UnknownChunks) as caught:
        draft.add([page_of(1), page_of(2, 77)])
    assert caught.value.ids == ids(77)
    with pytest.raises(BackupError, match="committed or discarded"):
        draft.commit()
    assert store.snapshots() == []


CONTRADICTIONS = [
    [file(b"b"), file(b"a")],
    [file(b"a"), file(b"a")],
    [file(b"a/b"), directory(b"a")],
    [directory(b"a-b"), directory(b"a"), file(b"a/b")],
    [directory(b"a")._replace(size=1)],
    [file(b"a", 1)._replace(kind=Kind.DIRECTORY)],
    [file(b"a", 1)._replace(kind=Kind.SYMLINK, size=0)],
    [file(b"a", 1)._replace(size=9)],
    [file(b"a", 1)._replace(sizes=(SIZE + 1,), size=SIZE + 1)],
    [file(b"a")._replace(size=5)],
    [file(b"a")._replace(size=-5)],
    [file(b"a", 1, offset=SIZE)],
    [file(b"a", 1, size=3 * SIZE), file(b"a", 1, offset=2 * SIZE)],
    [file(b"a", 1, size=3 * SIZE), file(b"b", 1, offset=SIZE)],
    [file(b"a", 1, size=3 * SIZE), file(b"a", 1, 2, 3)],
    [file(b"a", 1, size=3 * SIZE), directory(b"b")],
    [file(b"a", 1, size=3 * SIZE)],
    [file(b"a", 1, size=3 * SIZE), file(b"a", 2, offset=SIZE, size=3 * SIZE)],
]


@pytest.mark.parametrize("apart", [False, True], ids=["in one page", "in pages"])
@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_entries_that_contradict_each_other_are_refused(store, contradiction, apart):
    batches = [[entry] for entry in contradiction] if apart else [contradiction]
    with pytest.raises(InvalidEntry):
        committed(store, "name", *batches)
    assert store.snapshots() == []


@pytest.mark.parametrize(
    "page",
    [
        page_of(1)._replace(files=2),
        page_of(1)._replace(size=5),
        page_of(1)._replace(entries=0),
        page_of(1)._replace(entries=1 << 70),
        page_of(1)._replace(chunks=chunk(1).id[:-1]),
        page_of(1)._replace(data=page_of(1).data + bytes(2 * pages.LIMIT)),
        page_of(1)._replace(chunks=chunk(1).id + chunk(2).id),
        page_of(1)._replace(data=b"\1nonsense"),
        page_of(1)._replace(data=b""),
        page_of(1)._replace(data=b"\2" + bytes(50)),
        Page(pages.encode([]).data, b"", 0, 0, 0),
    ],
)
def test_what_is_no_page_is_refused(store, page):
    draft = store.begin("name")
    with pytest.raises(PageError):
        draft.add([page])
    assert store.snapshots() == []


@pytest.mark.parametrize(
    "page",
    [
        page_of(1),
        Page(b"\2sealed", chunk(1).id, 1, 1, -1),
        Page(b"\2sealed", chunk(1).id, 1, 2, 0),
        Page(b"\2sealed", chunk(1).id, 1, 1, 1 << 63),
        Page(b"\2sealed", chunk(1).id[1:], 1, 1, 1),
        Page(b"\2" + bytes(2 * pages.LIMIT), b"", 1, 1, 1),
    ],
)
def test_what_cannot_be_an_encrypted_page_is_refused(page):
    with Store(Memory()) as store:
        store.set_key(b"wrapped")
        sealed = chunk(1)._replace(data=b"\4" + bytes(40))
        store.put_many([sealed])
        draft = store.begin("name")
        draft.add([Page(b"\2sealed", chunk(1).id, 1, 1, 1 << 61)])
        with pytest.raises(PageError):
            draft.add([page])
        draft = store.begin("name")
        draft.add([Page(b"\2sealed", chunk(1).id, 1, 1, 1 << 61)])
        with pytest.raises(PageError, match="counts what cannot be"):
            draft.add([Page(b"\2sealed", chunk(1).id, 1, 1, 1 << 61)])


def test_pages_of_the_base_are_taken_over(store):
    batches = [[ROOT, file(b"a", 1)], [file(b"b", 2)], [file(b"c", 3)], [file(b"d", 4)]]
    base = committed(store, "name", *batches)
    same = store.begin("name", base.id)
    same.copy(0, 4)
    again = same.commit()
    assert entries(store, again) == entries(store, base)
    assert again == Snapshot(
        again.id, "name", again.created_ns, base.entries, base.files, base.size, base.chunks
    )
    draft = store.begin("name", base.id)
    draft.copy(0, 1)
    draft.add([pages.encode([file(b"b", 5), file(b"bb", 6)])])
    draft.copy(2, 2)
    changed = draft.commit()
    assert [entry.path for entry in entries(store, changed)] == [b"", b"a", b"b", b"bb", b"c", b"d"]
    assert (changed.files, changed.chunks) == (5, 5)


def test_a_base_that_is_not_there_is_refused(store):
    with pytest.raises(UnknownBase):
        store.begin("name", "0" * 32)


@pytest.mark.parametrize(
    ("first", "count"), [(0, 3), (2, 1), (-1, 1), (0, 0), (1, -1), (0, 1 << 70)]
)
def test_pages_that_the_base_does_not_have_are_refused(store, first, count):
    base = committed(store, "name", [ROOT], [file(b"a", 1)])
    draft = store.begin("name", base.id)
    with pytest.raises(InvalidEntry):
        draft.copy(first, count)
    assert store.snapshots() == [base]


def test_pages_of_the_base_have_to_fit_to_what_is_there(store):
    large = [[file(b"c", 1, size=3 * SIZE)], [file(b"c", 2, 3, offset=SIZE)]]
    base = committed(store, "name", [ROOT], [file(b"b", 1)], *large)
    for taken in ([(1, 1), (0, 1)], [(1, 1), (1, 1)], [(0, 2), (3, 1)], [(0, 3)], [(3, 1)]):
        draft = store.begin("name", base.id)
        with pytest.raises(InvalidEntry):
            _copy_and_commit(draft, taken)
    draft = store.begin("name", base.id)
    draft.add([pages.encode([file(b"z", 1)])])
    with pytest.raises(InvalidEntry):
        draft.copy(1, 1)
    draft = store.begin("name", base.id)
    draft.copy(0, 3)
    draft.add([pages.encode([file(b"c", 4, 5, offset=SIZE)])])
    draft.commit()
    assert len(store.snapshots()) == 2


def _copy_and_commit(draft, taken):
    for first, count in taken:
        draft.copy(first, count)
    draft.commit()


def test_a_damaged_page_of_the_base_is_not_inherited(tmp_path):
    with Store(tmp_path) as store:
        put(store, [1, 2])
        base = committed(store, "name", [ROOT], [file(b"a", 1)])
        with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as db, db:
            db.execute("UPDATE pages SET data = zeroblob(9) WHERE number = 2")
        draft = store.begin("name", base.id)
        with pytest.raises(UnknownBase, match="damaged"):
            draft.copy(0, 2)
        with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as db, db:
            db.execute("UPDATE snapshots SET files = 9")
        with pytest.raises(UnknownBase, match="damaged"):
            store.begin("name", base.id)


def test_a_name_stands_for_its_newest_snapshot(store):
    old = commit(store, "laptop", [1])
    commit(store, "server", [1])
    new = commit(store, "laptop", [1])
    assert store.find("laptop") == new
    assert store.find(old.id) == old
    assert [snapshot.name for snapshot in store.snapshots()] == ["laptop", "server", "laptop"]


def test_a_prefix_of_an_id_stands_for_it_if_it_fits_no_other():
    parts = Memory()
    for id, name in (("abcd1", "a"), ("abcd2", "b"), ("ef012", "c")):
        parts.catalogue.commit(Snapshot(id, name, 1, 0, 0, 0, 0), [])
    with Store(parts) as store:
        assert store.find("ef01").name == "c"
        assert store.find("abcd2").name == "b"
        with pytest.raises(UnknownSnapshot, match="2 snapshots begin with abcd"):
            store.find("abcd")
        for reference in ("ef0", "", "abcd_", "abcd%", "abcd*"):
            with pytest.raises(UnknownSnapshot, match="no snapshot"):
                store.find(reference)


def test_a_large_snapshot_is_streamed(store):
    wanted = [file(b"%07d" % number, number % 9 + 1) for number in range(20_000)]
    batches = [wanted[start : start + 1000] for start in range(0, len(wanted), 1000)]
    snapshot = committed(store, "name", *batches)
    assert snapshot.files == 20_000
    assert entries(store, snapshot) == wanted


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
    st.lists(st.integers(1, 9), max_size=5).map(lambda seeds: file(b"", *seeds)),
)
trees = st.dictionaries(st.lists(names, min_size=1, max_size=3).map(b"/".join), any_entry)


@given(trees, st.integers(1, 5))
def test_entries_come_back_as_they_were(tree, at_once):
    wanted = [tree[path]._replace(path=path) for path in sorted(tree, key=order)]
    with Store(Memory()) as store:
        put(store, range(1, 10))
        batches = [wanted[start : start + at_once] for start in range(0, len(wanted), at_once)]
        assert entries(store, committed(store, "name", *batches)) == wanted
