"""Verifying finds what is damaged, wherever it is, and says whom that hits."""

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from examples.backup import pages, verify
from examples.backup.crypt import Keys
from examples.backup.directory import Directory
from examples.backup.errors import (
    BackupError,
    CatalogueError,
    PackError,
    UnknownBase,
    UnknownChunks,
)
from examples.backup.memory import Memory
from examples.backup.reports import Checked, Damage
from examples.backup.store import Store
from tests.examples.stores import ROOT, chunk, commit, file, ids, page_of, put


def found(store: Store) -> list[Damage]:
    reports = list(store.verify())
    assert [report.finished for report in reports] == [False] * (len(reports) - 1) + [True]
    return [damage for report in reports for damage in report.damage]


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


@pytest.fixture(params=["files", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path if request.param == "files" else Memory()) as store:
        yield store


def test_an_intact_store_is_read_to_the_end(store, monkeypatch):
    monkeypatch.setattr(verify, "REPORT", 3)
    assert list(store.verify())[-1] == Checked(finished=True)
    put(store, range(20))
    commit(store, "a", range(10))
    commit(store, "b", range(5, 15))
    reports = list(store.verify())
    assert found(store) == []
    last = reports[-1]
    assert (last.chunks, last.pages, last.snapshots, last.finished) == (20, 4, 2, True)
    assert [report.bytes for report in reports] == sorted(report.bytes for report in reports)
    assert len({report.bytes for report in reports}) >= 6
    assert last.total >= last.bytes > 0


def test_what_is_put_meanwhile_is_not_called_damaged(store, monkeypatch):
    monkeypatch.setattr(verify, "REPORT", 3)
    put(store, range(5))
    damages = []
    for number, report in enumerate(store.verify()):
        damages.extend(report.damage)
        put(store, [100 + number])
    assert damages == []
    assert found(store) == []


def test_a_damaged_chunk_hits_the_paths_that_need_it(tmp_path):
    with Store(tmp_path) as store:
        put(store, range(4))
        first = commit(store, "first", [0, 1])
        draft = store.begin("second")
        draft.add([pages.encode([ROOT, file(b"a", 2, 1, 2), file(b"b", 0), file(b"c", 1)])])
        second = draft.commit()
        (pack,) = (tmp_path / "packs").iterdir()
        flip(pack, pack.read_bytes().index(chunk(1).data) + 500)
        damages = found(store)
        assert damages[0].what == f"chunk {chunk(1).id.hex()} is damaged"
        assert damages[0].where.startswith("pack 1 at byte ")
        assert [(one.snapshot, one.name, one.path) for one in damages] == [
            ("", "", b""),
            (first.id, "first", b"000001"),
            (second.id, "second", b"a"),
            (second.id, "second", b"c"),
        ]
        assert {one.chunk for one in damages} == {chunk(1).id}


def test_a_chunk_found_damaged_is_missing_until_it_is_put_again(tmp_path):
    with Store(tmp_path) as store:
        put(store, range(40))
        first = commit(store, "first", range(40))
        (pack,) = (tmp_path / "packs").iterdir()
        flip(pack, pack.read_bytes().index(chunk(1).data) + 500)
        assert store.missing(ids(*range(4))) == []
        assert [one.snapshot for one in found(store)] == ["", first.id]
        assert store.missing(ids(*range(4))) == [1]
    with Store(tmp_path) as store:
        assert store.missing(ids(*range(4))) == [1]
        # What is lost is not taken over, so that a client reads it again.
        draft = store.begin("second", first.id)
        with pytest.raises(UnknownBase, match="chunks of the base are damaged"):
            draft.copy(0, 2)
        with pytest.raises(UnknownChunks):
            store.begin("second").add([page_of(1)])
        draft = store.begin("second")
        assert store.put_many([chunk(1), chunk(2)]) == 1
        assert store.missing(ids(*range(4))) == []
        draft.add([page_of(1)])
        draft.commit()
        assert list(store.read_chunks(ids(1))) == [chunk(1)]
        # The first snapshot is mended by that; of the old place nobody needs anything.
        assert [(one.snapshot, one.what) for one in found(store)] == [
            ("", "a record that is not needed is damaged")
        ]


def test_a_read_that_failed_once_leaves_nothing_lost(tmp_path):
    with Store(tmp_path) as store:
        put(store, range(4))
        (pack,) = (tmp_path / "packs").iterdir()
        at = pack.read_bytes().index(chunk(1).data) + 500
        flip(pack, at)
        assert len(found(store)) == 1
        flip(pack, at)
        assert found(store) == []
        assert store.missing(ids(*range(4))) == []


def test_of_an_encrypted_snapshot_the_chunk_is_named(tmp_path):
    keys = Keys(bytes(32))
    with Store(tmp_path) as store:
        store.set_key(b"wrapped")
        sealed = chunk(1)._replace(data=b"\4" + bytes(40))
        store.put_many([sealed])
        draft = store.begin("name")
        draft.add([pages.encode([file(b"secret", 1)], keys.pages)])
        snapshot = draft.commit()
        (pack,) = (tmp_path / "packs").iterdir()
        flip(pack, len(pack.read_bytes()) - 1)
        assert [(one.chunk, one.snapshot, one.path) for one in found(store)] == [
            (chunk(1).id, "", b""),
            (chunk(1).id, snapshot.id, b""),
        ]


def test_a_pack_that_is_missing_or_foreign_is_told(tmp_path):
    with Store(Directory(tmp_path, pack_limit=3_000)) as store:
        for seed in range(8):
            put(store, [seed])
        snapshot = commit(store, "name", range(8))
        (tmp_path / "packs/00000002.pack").rename(tmp_path / "packs/00000009.pack")
        damages = found(store)
    assert [one.chunk for one in damages[:2]] == ids(3, 4)
    assert damages[3].where == "pack 9"
    hits = [one for one in damages if one.snapshot]
    assert {(one.snapshot, one.path) for one in hits} == {
        (snapshot.id, b"%06d" % seed) for seed in (3, 4, 5)
    }


def test_a_pack_cut_off_is_told(tmp_path):
    with Store(tmp_path) as store:
        put(store, range(5))
        commit(store, "name", range(5))
        (pack,) = (tmp_path / "packs").iterdir()
        whole = pack.read_bytes()
        for length in (len(whole) - 1, len(whole) // 2, 8, 3, 0):
            pack.write_bytes(whole[:length])
            lost = {one.chunk for one in found(store) if one.chunk}
            intact = sum(whole[:length].count(chunk(seed).data) for seed in range(5))
            assert len(lost) == 5 - intact
        pack.write_bytes(whole + b"left over from a crash")
        assert found(store) == []


def test_a_pack_torn_while_it_was_begun_is_not_called_damaged(tmp_path):
    with closing(Directory(tmp_path)) as parts:
        parts.catalogue.begin_pack(1)
    (tmp_path / "packs/00000001.pack").write_bytes(b"drvp" + bytes(4) + b"a record")
    with Store(tmp_path) as store:
        assert found(store) == []
        put(store, [1])
        assert found(store) == []


def test_a_record_that_nobody_needs_is_checked_as_well(tmp_path):
    with Store(tmp_path) as store:
        put(store, range(40))
        commit(store, "name", range(36))
        *_, did = store.collect()
        assert did.chunks == 4
        (pack,) = (tmp_path / "packs").iterdir()
        whole = pack.read_bytes()
        for seed in range(36, 40):
            flip(pack, whole.index(chunk(seed).id))
            (damage,) = found(store)
            assert damage.what == "a record that is not needed is damaged"
            pack.write_bytes(whole)
        assert found(store) == []


@pytest.mark.parametrize(
    ("statement", "told", "hit"),
    [
        ("UPDATE chunks SET size = 7 WHERE offset = 8", "another chunk", b"000000"),
        ("UPDATE chunks SET offset = 9 WHERE offset = 8", "catalogue says", b"000000"),
        ("DELETE FROM chunks WHERE offset = 8", "is not in it", b"000000"),
        ("UPDATE pages SET data = x'00' WHERE number = 2", "page 2", b""),
        ("UPDATE pages SET chunks = NULL WHERE number = 2", "NOT NULL", None),
        ("UPDATE snapshots SET name = 'other'", "snapshot", b""),
        ("DELETE FROM contents WHERE position = 0", "snapshot", b""),
        ("UPDATE contents SET page = 2", "snapshot", b""),
    ],
)
def test_a_catalogue_that_says_something_else_is_told(tmp_path, statement, told, hit):
    with Store(tmp_path) as store:
        put(store, range(5))
        snapshot = commit(store, "name", range(5))
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as db, db:
        db.execute("PRAGMA foreign_keys = OFF")
        if hit is None:
            with pytest.raises(sqlite3.IntegrityError):
                db.execute(statement)
            return
        db.execute(statement)
    with Store(tmp_path) as store:
        damages = found(store)
    assert any(told in one.what for one in damages)
    assert (snapshot.id, hit) in {(one.snapshot, one.path) for one in damages}


def test_entries_that_are_lost_are_told_by_their_neighbours(tmp_path):
    with Store(tmp_path) as store:
        put(store, range(9))
        draft = store.begin("name")
        draft.add([page_of(0, 1, 2), page_of(3, 4, 5), page_of(6, 7, 8)])
        draft.commit()
        with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as db, db:
            db.execute("UPDATE pages SET data = x'00' WHERE number = 2")
        assert [one.what for one in found(store) if one.snapshot] == [
            "page 2 of the catalogue is missing or damaged: the entries after 000002, before 000006"
        ]


def test_any_flipped_bit_in_any_file_is_found(tmp_path):
    """And nothing that is read, be it chunks or pages, is other than it was."""
    with Store(Directory(tmp_path, pack_limit=20_000)) as store:
        for seed in range(0, 60, 6):
            put(store, range(seed, seed + 6))
        old = commit(store, "old", range(50))
        commit(store, "new", range(40, 60))
        store.forget([old.id])
        assert list(store.collect())[-1].packs
        put(store, range(100, 110))
        assert found(store) == []
    paths = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(paths) >= 4
    sound = {path: path.read_bytes() for path in paths}
    draw = random.Random(11)
    for path in paths * 12:
        whole = sound[path]
        at = draw.randrange(len(whole))
        flip(path, at, 1 << draw.randrange(8))
        try:
            with Store(tmp_path) as store:
                damages = found(store)
                for seed in range(40, 60):
                    try:
                        assert list(store.read_chunks(ids(seed))) == [chunk(seed)]
                    except PackError:
                        assert chunk(seed).id in {one.chunk for one in damages if one.path}
                    except BackupError:
                        pass
        except CatalogueError:
            damages = [Damage("", "cannot be opened")]
        assert damages, f"{path.name} at byte {at}"
        # All of them: what was found is noted in the catalogue.
        for each, content in sound.items():
            each.write_bytes(content)
    with Store(tmp_path) as store:
        assert found(store) == []


def test_it_goes_on_while_others_write_and_collect(tmp_path):
    with Store(Directory(tmp_path, pack_limit=5_000)) as store:
        for number in range(6):
            put(store, range(40))
            snapshot = commit(store, "name", range(number, 40, 3))
            running = store.verify()
            for step, report in enumerate(running):
                assert report.damage == ()
                if step == number:
                    store.forget([snapshot.id])
                    list(store.collect())
                    put(store, range(40 + number, 45))
