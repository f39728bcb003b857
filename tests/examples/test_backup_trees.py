"""Any tree, backed up and restored: as it was, and as it became, with and without a cache."""

import errno
import os
import subprocess
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import druvarpc
from druvarpc.testing import connected
from examples.backup import cache as caches
from examples.backup import chunks, reader
from examples.backup.cache import Known, LastSnapshot
from examples.backup.chunks import MAX_SIZE
from examples.backup.client import Backup, Options, back_up
from examples.backup.crypt import Keys
from examples.backup.restore import Options as RestoreOptions
from examples.backup.restore import restore
from examples.backup.server import StoreService
from examples.backup.store import Store
from examples.backup.tree import PART_CHUNKS, Found
from tests.examples.trees import described, names, plant, trees


@asynccontextmanager
async def served(place: Path) -> AsyncGenerator[druvarpc.Client, None]:
    with Store(place) as store:
        async with connected([StoreService(store)]) as client:
            yield client


def later() -> int:
    """Some time after all that the test has written."""
    return time.time_ns() + 10 * caches.SETTLED


class Place:
    """A source, a store, and a cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = path / "source"
        self.cache = path / "cache/one"
        self._restored = 0

    async def back_up(
        self, client: druvarpc.Client, *, cache: bool = True, keys: Keys | None = None
    ) -> Backup:
        options = Options(self.cache if cache else None, keys=keys, clock=later)
        return await back_up(client, os.fsencode(self.source), "name", options)

    async def restored(
        self, client: druvarpc.Client, snapshot: str = "name", keys: Keys | None = None
    ) -> list[tuple[object, bytes]]:
        self._restored += 1
        place = self.path / f"restored-{self._restored}"
        await restore(client, snapshot, os.fsencode(place), RestoreOptions(keys=keys))
        return described(place)


def change(root: bytes, path: bytes, how: str) -> None:
    full = os.path.join(root, path)
    if how == "remove" and not os.path.isdir(full):
        os.unlink(full)
    elif how == "rename":
        os.rename(full, full + b"-renamed")
    elif how == "append" and os.path.isfile(full) and not os.path.islink(full):
        with open(full, "ab") as file:
            file.write(b"more")
    elif how == "chmod" and not os.path.islink(full):
        os.chmod(full, 0o751)
    elif how == "replace" and os.path.isfile(full) and not os.path.islink(full):
        status = os.stat(full)
        content = bytes(byte ^ 1 for byte in Path(os.fsdecode(full)).read_bytes())
        Path(os.fsdecode(full)).write_bytes(content)
        # As it was, if one believes sizes and times of modification.
        os.utime(full, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit(source: Path, edits: list[tuple[int, str]], added: dict[bytes, bytes]) -> None:
    root = os.fsencode(source)
    for number, how in edits:
        paths = [entry.path for entry, _ in described(source)][1:]
        if paths:
            change(root, paths[number % len(paths)], how)
    for name, content in added.items():
        path = os.path.join(root, name)
        if not os.path.lexists(path):
            Path(os.fsdecode(path)).write_bytes(content)


changes = st.lists(
    st.tuples(
        st.integers(0, 99), st.sampled_from(["remove", "rename", "append", "chmod", "replace"])
    ),
    max_size=4,
)


@settings(max_examples=15)
@given(trees, changes, st.dictionaries(names, st.binary(max_size=5), max_size=2), st.booleans())
async def test_any_tree_comes_back_and_so_does_what_becomes_of_it(tree, edits, added, encrypted):
    keys = Keys(bytes(32)) if encrypted else None
    with TemporaryDirectory() as name:
        place = Place(Path(name))
        plant(os.fsencode(place.source), tree)
        async with served(place.path / "store") as client:
            if encrypted:
                await client.stub(StoreService).set_key(b"wrapped")
            first = await place.back_up(client, keys=keys)
            before = described(place.source)
            again = await place.back_up(client, keys=keys)
            assert again.unchanged == again.snapshot.files
            edit(place.source, edits, added)
            cached = await place.back_up(client, keys=keys)
            event(f"unchanged: {cached.unchanged > 0}")
            after = described(place.source)
            assert await place.restored(client, keys=keys) == after
            assert await place.restored(client, again.snapshot.id, keys) == before
            assert await place.restored(client, first.snapshot.id, keys) == before


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    (place.source / "d").mkdir(parents=True)
    for number in range(1500):
        (place.source / f"d/{number}").write_text(f"{number}\n" * 50)
    (place.source / "large").write_bytes(os.urandom(3 * MAX_SIZE))
    return place


async def test_of_an_unchanged_tree_nothing_is_read_and_almost_nothing_sent(place):
    async with served(place.path / "store") as client:
        await place.back_up(client)
        for path in place.source.rglob("*"):
            path.chmod(0o000 if path.is_file() else 0o755)
        await place.back_up(client)
        before = client.statistics()
        again = await place.back_up(client)
        after = client.statistics()
        assert again.unchanged == again.snapshot.files == 1501
        # Together: whether there is a key, and the commit.
        assert after.calls_started - before.calls_started == 2
        assert after.bytes_sent - before.bytes_sent < 300
        assert again.new_chunks == 0


async def test_of_a_tree_with_one_change_one_page_is_sent(place):
    async with served(place.path / "store") as client:
        await place.back_up(client)
        (place.source / "d/777").write_text("changed")
        before = client.statistics()
        changed = await place.back_up(client)
        after = client.statistics()
        assert (changed.unchanged, changed.new_chunks) == (1500, 1)
        assert after.bytes_sent - before.bytes_sent < 60_000
        assert await place.restored(client) == described(place.source)


async def test_a_file_that_was_just_written_is_read_again(place):
    latest = place.source / "d/777"
    latest.write_text("6" * 200)
    # No later than a coarse clock tells apart.
    options = Options(place.cache, clock=lambda: latest.stat().st_ctime_ns + caches.SETTLED)
    async with served(place.path / "store") as client:
        await back_up(client, os.fsencode(place.source), "name", options)
        status = latest.stat()
        again = await back_up(client, os.fsencode(place.source), "name", options)
        assert 0 < again.unchanged < 1501
        assert status == latest.stat()
        assert again.new_chunks == 0


@pytest.mark.parametrize("good", [1, 40])
async def test_a_file_that_could_not_be_read_to_its_end_is_read_again(place, monkeypatch, good):
    # With many small chunks, its first parts are in pages of their own by then.
    large = place.source / "large"
    with large.open("wb") as file:
        for number in range(8 * PART_CHUNKS):
            file.seek(number * 8192)
            file.write(number.to_bytes(4, "big"))
    blocks = large.stat().st_blocks
    cut, bad = chunks.split, iter([False] * (good * 200) + [True])

    def failing(fd: int, size: int, take: Callable[[int], memoryview]) -> Iterator[chunks.Content]:
        if os.fstat(fd).st_blocks == blocks and next(bad, False):
            raise OSError(errno.EIO, "Input/output error")
        yield from cut(fd, size, take)

    async with served(place.path / "store") as client:
        with monkeypatch.context() as patching:
            patching.setattr(reader, "split", failing)
            assert (await place.back_up(client)).skipped == 1
        assert (await place.back_up(client)).unchanged == 1500
        assert await place.restored(client) == described(place.source)
        assert (await place.back_up(client)).unchanged == 1501


@pytest.mark.parametrize("damage", ["none", "a bit", "half", "empty", "another"])
async def test_a_cache_that_is_lost_or_damaged_costs_time_only(place, damage):
    async with served(place.path / "store") as client:
        await place.back_up(client)
        content = bytearray(place.cache.read_bytes())
        if damage == "a bit":
            content[len(content) // 2] ^= 1
        elif damage == "half":
            del content[len(content) // 2 :]
        elif damage == "another":
            content[8:24] = os.urandom(16)
        place.cache.write_bytes(b"" if damage == "empty" else content)
        if damage == "none":
            place.cache.unlink()
        (place.source / "d/777").write_text("changed")
        did = await place.back_up(client)
        assert did.snapshot.files == 1501
        assert (did.unchanged > 0) == (damage in ("a bit", "half"))
        assert await place.restored(client) == described(place.source)


async def test_a_cache_that_cannot_be_written_is_told_and_done_without(place):
    place.cache.parent.write_text("a file where a directory should be")
    told: list[object] = []
    async with served(place.path / "store") as client:
        options = Options(place.cache)
        did = await back_up(client, os.fsencode(place.source), "name", options, told.append)
    assert (did.snapshot.files, did.skipped) == (1501, 0)
    assert str(told[-1]).count("the cache cannot be written") == 1


def test_what_killed_processes_left_of_their_caches_is_removed(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        pass
    names = {f"a.cache.{dead.pid}.new", "a.cache", "b.cache.new", f"b.cache.{os.getppid()}.new"}
    for name in names:
        (tmp_path / name).touch()
    with caches.NextCache(tmp_path / "b.cache"):
        left = set(os.listdir(tmp_path))
    assert left == names - {f"a.cache.{dead.pid}.new"} | {f"b.cache.{os.getpid()}.new"}


async def test_a_base_that_was_forgotten_is_done_without(place):
    async with served(place.path / "store") as client:
        first = await place.back_up(client)
        store = client.stub(StoreService)
        await store.forget([first.snapshot.id])
        async for _ in store.gc():
            pass
        did = await place.back_up(client)
        assert (did.unchanged, did.snapshot.files) == (0, 1501)
        assert await place.restored(client) == described(place.source)
        assert (await place.back_up(client)).unchanged == 1501


async def test_a_file_of_many_pages(tmp_path):
    place = Place(tmp_path)
    place.source.mkdir()
    # Chunks of the smallest size, in more parts than fit a page: found by cutting at holes.
    with (place.source / "sparse").open("wb") as file:
        for number in range(8 * PART_CHUNKS):
            file.seek(number * 8192)
            file.write(number.to_bytes(4, "big"))
    (place.source / "z").write_text("after it")
    async with served(place.path / "store") as client:
        first = await place.back_up(client)
        assert first.snapshot.chunks > 8 * PART_CHUNKS
        assert await place.restored(client) == described(place.source)
        before = client.statistics().bytes_sent
        again = await place.back_up(client)
        assert again.unchanged == 2
        assert client.statistics().bytes_sent - before < 300
        (place.source / "z").write_text("changed")
        changed = await place.back_up(client)
        assert (changed.unchanged, changed.new_chunks) == (1, 1)
        with (place.source / "sparse").open("r+b") as file:
            file.write(b"changed")
        assert (await place.back_up(client)).new_chunks == 1
        assert await place.restored(client) == described(place.source)


async def test_of_a_cache_whose_entries_all_changed_little_is_in_memory(place, monkeypatch):
    for number in range(2000):
        (place.source / f"other{number}").write_bytes(b"content")
    most, find = 0, LastSnapshot.find

    def watched(last: LastSnapshot, found: Found) -> list[Known]:
        nonlocal most
        most = max(most, len(last._records))
        return find(last, found)

    async with served(place.path / "store") as client:
        await place.back_up(client)
        with LastSnapshot(place.cache) as last:
            pages = 1 + max(known.page for known in last._stream)
        monkeypatch.setattr(LastSnapshot, "find", watched)
        for path in place.source.rglob("*"):
            os.utime(path, ns=(0, 0), follow_symlinks=False)
        assert (await place.back_up(client)).unchanged == 0
    assert 0 < most < pages / 2
