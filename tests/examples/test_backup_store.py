"""A store: whole trees through it, many threads, and death at any moment."""

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.backup import chunks, tree
from examples.backup.catalogue import Catalogue
from examples.backup.chunks import Chunk, Codec, chunk_id
from examples.backup.errors import (
    BackupError,
    ChunkError,
    PackError,
    StoreFailed,
    StoreLocked,
    UnknownChunks,
)
from examples.backup.packs import Packs
from examples.backup.store import Store
from examples.backup.target import Target
from examples.backup.tree import Entry, Kind

CODEC = Codec()


def chunk(seed: int, size: int = 1000) -> Chunk:
    content = random.Random(seed).randbytes(size)
    return CODEC.encode(chunk_id(content), content)


def back_up(store: Store, root: Path, name: str):
    def entries():
        for found in tree.scan(os.fsencode(root)):
            assert isinstance(found, Entry)
            if found.kind is not Kind.FILE:
                yield found
                continue
            with tree.opened(os.fsencode(root), found) as (fd, entry):
                pieces = [(chunk_id(piece), piece) for piece in chunks.split(fd, entry.size)]
            store.put_many([CODEC.encode(id, piece) for id, piece in pieces])
            yield from tree.parts(entry, ((id, len(piece)) for id, piece in pieces))

    return store.commit_snapshot(name, entries())


def restore(store: Store, id: str, place: Path) -> None:
    with Target(os.fsencode(place)) as target:
        for entry in store.entries(id):
            if entry.kind is not Kind.FILE:
                target.add(entry)
                continue
            output, offset = target.open(entry), 0
            for found in store.read_chunks(entry.chunks):
                output.write(offset, CODEC.decode(found))
                offset += found.size
            output.finish()
        target.finish()


def described(root: Path) -> list[tuple[object, ...]]:
    found = []
    for entry in tree.scan(os.fsencode(root)):
        assert isinstance(entry, Entry)
        full = os.path.join(os.fsencode(root), entry.path)
        content = Path(os.fsdecode(full)).read_bytes() if entry.kind is Kind.FILE else b""
        found.append((entry, content))
    return found


def test_a_tree_comes_back_as_it_was(tmp_path):
    source = tmp_path / "source"
    (source / "d/e").mkdir(parents=True)
    (source / "d/large").write_bytes(random.Random(1).randbytes(3_000_000))
    (source / "d/e/empty").touch()
    (source / "d/e/text").write_text("words " * 10_000)
    (source / "link").symlink_to("d/large")
    (source / "d").chmod(0o750)
    with Store(tmp_path / "store") as store:
        first = back_up(store, source, "name")
        before = described(source)
        (source / "d/large").write_bytes(random.Random(1).randbytes(2_999_999) + b"!")
        second = back_up(store, source, "name")
    with Store(tmp_path / "store") as store:
        assert store.snapshots() == [first, second]
        assert store.find("name") == second
        restore(store, first.id, tmp_path / "first")
        restore(store, second.id, tmp_path / "second")
    assert described(tmp_path / "first") == before
    assert described(tmp_path / "second") == described(source)


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


def test_a_snapshot_whose_source_fails_is_not_kept(tmp_path):
    def entries():
        yield Entry(b"", Kind.DIRECTORY, 0o755, 0)
        raise OSError("the network is gone")

    with Store(tmp_path) as store:
        with pytest.raises(OSError, match="gone"):
            store.commit_snapshot("name", entries())
        assert store.snapshots() == []


def test_the_catalogue_can_be_made_again_from_the_packs(tmp_path):
    with Store(tmp_path, pack_limit=5000) as store:
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


WRITER = """
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.backup.chunks import Codec, chunk_id
from examples.backup.store import Store

store = Store(Path(sys.argv[1]), pack_limit=2_000)

def put(number):
    content = number.to_bytes(4, "big")
    store.put_many([Codec().encode(chunk_id(content), content)])
    os.write(1, b"%d\\n" % number)

with ThreadPoolExecutor(4) as pool:
    list(pool.map(put, range(int(sys.argv[2]), int(sys.argv[2]) + 10_000)))
"""


def test_what_was_acknowledged_survives_being_killed(tmp_path):
    acknowledged: list[bytes] = []
    for run in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(run * 10_000)],
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
