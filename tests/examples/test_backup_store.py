"""A store: chunks and snapshots through it, many threads, and death at any moment."""

import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.backup import pages
from examples.backup.catalogue import Catalogue
from examples.backup.chunks import LIMIT, MAX_OVERHEAD, SEALED, Chunk, chunk_id
from examples.backup.crypt import Keys
from examples.backup.directory import Directory
from examples.backup.errors import (
    BackupError,
    ChunkError,
    KeyExists,
    PackError,
    PageError,
    StoreFailed,
    StoreLocked,
    UnknownChunks,
)
from examples.backup.packs import Packs
from examples.backup.store import Store
from tests.examples.stores import ROOT, chunk, commit, ids, page_of, put, there


def test_snapshots_come_back_as_they_were(tmp_path):
    with Store(tmp_path) as store:
        put(store, range(10))
        first = commit(store, "name", range(8))
        second = commit(store, "name", range(5, 10))
    with Store(tmp_path) as store:
        assert store.snapshots() == [first, second]
        assert store.find("name") == second
        for snapshot, seeds in ((first, range(8)), (second, range(5, 10))):
            assert list(store.pages(snapshot.id)) == [pages.encode([ROOT]), page_of(*seeds)]
            assert list(store.read_chunks(ids(*seeds))) == [chunk(seed) for seed in seeds]


def test_only_new_chunks_are_stored(tmp_path):
    with Store(tmp_path) as store:
        assert store.put_many([chunk(1), chunk(2), chunk(1)]) == 2
        assert store.put_many([chunk(2), chunk(3)]) == 1
        assert store.put_many([chunk(1)]) == 0
        assert store.put_many([]) == 0
        assert store.missing([chunk(n).id for n in range(5)]) == [0, 4]
        ids = [chunk(n).id for n in (3, 1, 3)]
        assert list(store.read_chunks(ids)) == [chunk(3), chunk(1), chunk(3)]
        with pytest.raises(UnknownChunks):
            store.read_chunks([chunk(4).id])


def test_what_was_received_counts_from_the_start(tmp_path):
    with Store(tmp_path) as store:
        put(store, range(10))
        put(store, range(5))
        commit(store, "name", range(10))
        assert store.usage().received_bytes == 15_000
    with Store(tmp_path) as store:
        assert (store.usage().received_bytes, store.usage().source_bytes) == (0, 10_000)


def test_a_chunk_that_is_not_what_it_says_is_not_stored(tmp_path):
    false = Chunk(chunk(1).id, 1000, chunk(2).data)
    with Store(tmp_path) as store:
        with pytest.raises(ChunkError):
            store.put_many([chunk(3), false])
        assert store.missing([chunk(1).id, chunk(3).id]) == [0, 1]


def test_a_chunk_put_by_many_at_once_is_stored_once(tmp_path):
    seeds = [random.Random(thread).sample(range(100), 60) for thread in range(16)]
    with Store(tmp_path) as store, ThreadPoolExecutor(16) as pool:
        puts = [
            pool.submit(store.put_many, [chunk(n) for n in some[at : at + 3]])
            for some in seeds
            for at in range(0, 60, 3)
        ]
        new = sum(put.result() for put in puts)
        distinct = {n for some in seeds for n in some}
        assert new == len(distinct)
        assert store.missing([chunk(n).id for n in distinct]) == []
    packed = sum(path.stat().st_size for path in (tmp_path / "packs").iterdir())
    assert packed < (len(distinct) + 1) * (1000 + 1 + 60)


def test_a_store_serves_one_process(tmp_path):
    with Store(tmp_path), pytest.raises(StoreLocked, match="used by another process"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_a_store_that_cannot_be_opened_is_released(tmp_path):
    (tmp_path / "catalogue.sqlite").write_bytes(b"certainly not a database" * 100)
    for _ in range(2):
        with pytest.raises(BackupError, match="not a database"):
            Store(tmp_path)


def test_a_put_that_cannot_be_written_fails_and_can_be_repeated(tmp_path):
    with Store(tmp_path) as store:
        (tmp_path / "packs").rmdir()
        with pytest.raises(StoreFailed, match=r"cannot store: .*No such file"):
            store.put_many([chunk(1)])
        assert store.missing([chunk(1).id]) == [0]
        (tmp_path / "packs").mkdir()
        assert store.put_many([chunk(1)]) == 1


def test_nothing_is_put_into_a_closed_store(tmp_path):
    store = Store(tmp_path)
    store.close()
    store.close()
    with pytest.raises(BackupError):
        store.put_many([chunk(1)])
    assert list((tmp_path / "packs").iterdir()) == []


def test_damage_in_a_pack_is_found(tmp_path):
    with Store(tmp_path) as store:
        store.put_many([chunk(1), chunk(2)])
        (pack,) = (tmp_path / "packs").iterdir()
        content = bytearray(pack.read_bytes())
        content[100] ^= 1
        pack.write_bytes(content)
        assert list(store.read_chunks([chunk(2).id])) == [chunk(2)]
        with pytest.raises(PackError):
            list(store.read_chunks([chunk(1).id]))


def test_what_is_not_encrypted_is_refused_where_all_has_to_be(tmp_path):
    keys = Keys(bytes(32))
    sealed = Chunk(keys.id(b"content"), 7, SEALED + keys.chunks.seal(b"\0content", b"aad"))
    with Store(tmp_path) as store:
        with pytest.raises(ChunkError):
            store.put_many([sealed])
        assert store.key() == b""
        store.set_key(b"wrapped")
        with pytest.raises(KeyExists):
            store.set_key(b"another")
    with Store(tmp_path) as store:
        assert store.key() == b"wrapped"
        assert store.put_many([sealed]) == 1
        for wrong in (
            chunk(1),
            sealed._replace(id=b"short"),
            sealed._replace(id=chunk(1).id, size=0),
            sealed._replace(id=chunk(1).id, size=LIMIT + 1),
            sealed._replace(id=chunk(1).id, data=SEALED + bytes(7 + MAX_OVERHEAD)),
        ):
            with pytest.raises(ChunkError):
                store.put_many([wrong])
        with pytest.raises(PageError, match="not encrypted"):
            store.begin("name").add([page_of()])
        entry = ROOT._replace(path=b"secret")
        draft = store.begin("name")
        draft.add([pages.encode([entry], keys.pages)])
        snapshot = draft.commit()
        (page,) = store.pages(snapshot.id)
        assert pages.decode(page.data, page.chunks, keys.pages) == [entry]
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.glob("catalogue*"))


def test_the_catalogue_can_be_made_again_from_the_packs(tmp_path):
    with Store(Directory(tmp_path, pack_limit=5000)) as store:
        store.put_many([chunk(n) for n in range(3)])
        for n in range(3, 20):
            store.put_many([chunk(n)])
    for path in tmp_path.glob("catalogue.*"):
        path.unlink()
    catalogue, packs = Catalogue(tmp_path / "catalogue.sqlite"), Packs(tmp_path / "packs")
    for number in packs.numbers():
        catalogue.add((chunk, where) for where, chunk in packs.scan(number))
    packs.close()
    catalogue.close()
    with Store(tmp_path) as store:
        every = [chunk(n) for n in range(20)]
        assert list(store.read_chunks([one.id for one in every])) == every


def test_what_the_catalogue_lost_in_a_crash_of_the_machine_is_read_from_the_packs(tmp_path):
    """Puts wait for the packs to be durable, and not for the catalogue's log."""

    def catalogue() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.glob("catalogue.*[!m]")}

    with Store(Directory(tmp_path, pack_limit=3_000)) as store:
        put(store, [1])
        before = catalogue()
        for seed in range(2, 12):
            put(store, [seed])
    for path in tmp_path.glob("catalogue.*"):
        path.unlink()
    for path, content in before.items():
        path.write_bytes(content)
    # Of later packs the catalogue would know, since it waits for the disk before one is made.
    with Store(Directory(tmp_path, pack_limit=3_000)) as store:
        assert there(store, range(1, 12)) == [1, 2, 3]
        assert list(store.read_chunks(ids(1, 2, 3))) == [chunk(1), chunk(2), chunk(3)]
        put(store, range(1, 12))
        commit(store, "name", range(1, 12))
    with Store(tmp_path) as store:
        assert there(store, range(1, 12)) == list(range(1, 12))


def test_what_a_kill_kept_from_the_catalogue_is_read_from_the_packs(tmp_path):
    """Copies of the directory stand for what a kill leaves."""
    with Store(tmp_path / "living") as store:
        put(store, range(10))
        draft = store.begin("name")
        draft.add([pages.encode([ROOT]), page_of(*range(10))])
        put(store, range(10, 20))
        shutil.copytree(tmp_path / "living", tmp_path / "1")
        snapshot = draft.commit()
        put(store, range(20, 30))
        shutil.copytree(tmp_path / "living", tmp_path / "2")
    for number, kept, snapshots in (1, 20, []), (2, 30, [snapshot]):
        with closing(Catalogue(tmp_path / f"{number}" / "catalogue.sqlite")) as catalogue:
            assert len(catalogue.find(ids(*range(30)))) < kept
        with Store(tmp_path / f"{number}") as store:
            assert store.snapshots() == snapshots
            assert there(store, range(30)) == list(range(kept))
            assert [found.damage for found in store.verify() if found.damage] == []
            list(store.collect())
            put(store, range(10))
            commit(store, "again", range(10))
            assert list(store.read_chunks(ids(*range(10)))) == [chunk(n) for n in range(10)]


WRITER = """
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.backup.chunks import Codec, chunk_id
from examples.backup.directory import Directory
from examples.backup.store import Store

store = Store(Directory(Path(sys.argv[1]), pack_limit=int(sys.argv[3])))

def put(number):
    content = number.to_bytes(4, "big")
    store.put_many([Codec().encode(chunk_id(content), content)])
    os.write(1, b"%d\\n" % number)

with ThreadPoolExecutor(4) as pool:
    list(pool.map(put, range(int(sys.argv[2]), int(sys.argv[2]) + 10_000)))
"""


# With the smaller, packs are begun all the time; with the larger, additions wait to be written.
@pytest.mark.parametrize("pack_limit", [2_000, 1_000_000])
def test_what_was_acknowledged_survives_being_killed(tmp_path, pack_limit):
    acknowledged: list[bytes] = []
    for run in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(run * 10_000), str(pack_limit)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                acknowledged.append(chunk_id(int(line).to_bytes(4, "big")))
                if len(acknowledged) % 37 == 0:
                    process.kill()
                    break
        with Store(tmp_path) as store:
            assert [found.id for found in store.read_chunks(acknowledged)] == acknowledged
    assert len(acknowledged) == 5 * 37


@settings(max_examples=30)
@given(st.binary(max_size=200), st.integers(0, 3000))
def test_a_pack_with_anything_at_its_end_is_left_alone(tmp_path_factory, tail, size):
    place = tmp_path_factory.mktemp("store")
    with Store(place) as store:
        store.put_many([chunk(1)])
    with (place / "packs" / "00000001.pack").open("ab") as pack:
        pack.write(tail + bytes(size))
    with Store(place) as store:
        assert store.put_many([chunk(1), chunk(2)]) == 1
        assert list(store.read_chunks([chunk(1).id, chunk(2).id])) == [chunk(1), chunk(2)]
