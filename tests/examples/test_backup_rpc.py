"""Backups and restores across a wire, in one process; also with peers that lie."""

import errno
import os
import random
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import count, islice
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import druvarpc
from druvarpc import RpcError, Status
from druvarpc.testing import connected
from examples.backup import pages, tree
from examples.backup import restore as restores
from examples.backup.chunks import LIMIT, RAW, Chunk, Codec, chunk_id
from examples.backup.client import Options, back_up
from examples.backup.compare import items
from examples.backup.crypt import Keys, new_key
from examples.backup.errors import (
    BackupError,
    ChunkError,
    InvalidEntry,
    KeyRefused,
    PageError,
    UnsafePath,
)
from examples.backup.loads import FETCH_SIZE, KEPT, LOAD_ENTRIES, Planner
from examples.backup.pages import Page
from examples.backup.restore import restore
from examples.backup.server import StoreService
from examples.backup.service import MAX_FETCH, MAX_IDS, BackupStore, Piece
from examples.backup.snapshots import Snapshot
from examples.backup.stages import in_order
from examples.backup.store import Store
from examples.backup.tree import Entry, Found, Kind, Skipped, check_next

CHECKOUT = Path(__file__).parents[2]
ROOT = Entry(b"", Kind.DIRECTORY, 0o755, 0)


@asynccontextmanager
async def served(place: Path) -> AsyncGenerator[druvarpc.Client, None]:
    with Store(place) as store:
        async with connected([StoreService(store)]) as client:
            yield client


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "d/e").mkdir(parents=True)
    (source / "d/large").write_bytes(random.Random(1).randbytes(20_000_000))
    (source / "d/e/empty").touch()
    (source / "d/e/text").write_text("words " * 100_000)
    (source / "d/e/same").write_text("words " * 100_000)
    for number in range(200):
        (source / f"small-{number}").write_text(f"{number} " * number)
    (source / os.fsdecode(b"not \xff UTF-8")).write_bytes(b"x")
    (source / "link").symlink_to("d/large")
    (source / "dangling").symlink_to("/nowhere")
    (source / "d").chmod(0o750)
    os.utime(source / "d/e/text", ns=(1, 1_234_567_890_123_456_789))
    return source


def described(root: Path) -> list[tuple[object, ...]]:
    found = []
    for item in tree.scan(os.fsencode(root)):
        assert isinstance(item, Found)
        entry = tree.describe(os.fsencode(root), item)
        full = Path(os.fsdecode(os.path.join(os.fsencode(root), entry.path)))
        found.append((entry, full.read_bytes() if entry.kind is Kind.FILE else b""))
    return found


def only(skipped: list[Skipped]) -> Callable[[object], None]:
    return lambda event: skipped.append(event) if isinstance(event, Skipped) else None


def encoded(content: bytes) -> Chunk:
    return Codec().encode(chunk_id(content), content)


def file(path: bytes, *chunks: Chunk) -> Entry:
    sizes = tuple(chunk.size for chunk in chunks)
    ids = tuple(chunk.id for chunk in chunks)
    return Entry(path, Kind.FILE, 0o644, 0, sum(sizes), chunks=ids, sizes=sizes)


async def test_a_tree_comes_back_as_it_was(tmp_path, source):
    async with served(tmp_path / "store") as client:
        did = await back_up(client, os.fsencode(source), "name")
        restored = await restore(client, "name", os.fsencode(tmp_path / "restored"))
    assert described(tmp_path / "restored") == described(source)
    assert did.snapshot.files == restored.files == 205
    assert did.snapshot.size == restored.bytes
    assert did.skipped == 0


async def test_only_what_is_new_is_sent(tmp_path, source):
    async with served(tmp_path / "store") as client:
        first = await back_up(client, os.fsencode(source), "name")
        assert first.new_bytes < first.snapshot.size
        before = client.statistics()
        again = await back_up(client, os.fsencode(source), "name")
        after = client.statistics()
        assert again.new_chunks == 0
        # A question for each batch of 8 blocks, whether there is a key, and the stream of pages.
        assert after.calls_started - before.calls_started == 6
        assert after.bytes_sent - before.bytes_sent < 100_000
        with (source / "d/large").open("r+b") as large:
            large.seek(10_000_000)
            large.write(b"changed")
        changed = await back_up(client, os.fsencode(source), "name")
        assert 1 <= changed.new_chunks <= 3
        for snapshot in (again.snapshot, changed.snapshot):
            await restore(client, snapshot.id, os.fsencode(tmp_path / snapshot.id))
    assert described(tmp_path / changed.snapshot.id) == described(source)
    assert described(tmp_path / again.snapshot.id) != described(source)


async def test_what_occurs_again_is_fetched_once(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    content = random.Random(2).randbytes(2_000_000)
    for number in range(10):
        (source / f"{number}").write_bytes(content)
    async with served(tmp_path / "store") as client:
        await back_up(client, os.fsencode(source), "name")
        before = client.statistics().bytes_received
        await restore(client, "name", os.fsencode(tmp_path / "restored"))
        assert client.statistics().bytes_received - before < 2_100_000
    assert described(tmp_path / "restored") == described(source)


async def test_what_cannot_be_read_is_reported_and_the_rest_backed_up(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("content")
    monkeypatch.chdir(source)  # a socket's path must be short
    skipped: list[Skipped] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        async with served(tmp_path / "store") as client:
            did = await back_up(client, os.fsencode(source), "name", watch=only(skipped))
    assert skipped == [Skipped(b"socket", "a socket")]
    assert (did.skipped, did.snapshot.files) == (1, 1)


async def test_a_root_that_is_no_directory_leaves_no_snapshot(tmp_path):
    (tmp_path / "file").touch()
    async with served(tmp_path / "store") as client:
        with pytest.RaisesGroup(NotADirectoryError, flatten_subgroups=True):
            await back_up(client, os.fsencode(tmp_path / "file"), "name")
        assert await client.stub(BackupStore).snapshots() == []


async def test_a_reading_that_fails_in_the_middle_leaves_no_snapshot(tmp_path, monkeypatch):
    scan = tree.scan

    def failing(*arguments: object) -> Iterator[Found | Skipped]:
        yield next(scan(*arguments))  # type: ignore[arg-type]
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tree, "scan", failing)
    async with served(tmp_path / "store") as client:
        for _ in range(20):  # whether it was the reader or the stream that ended first was chance
            with pytest.RaisesGroup(OSError, flatten_subgroups=True):
                await back_up(client, os.fsencode(tmp_path), "name")
        assert await client.stub(BackupStore).snapshots() == []


async def test_clients_share_what_they_have_in_common(tmp_path, source):
    made = []

    async def one(client: druvarpc.Client, name: str) -> None:
        made.append(await back_up(client, os.fsencode(source), name))

    with Store(tmp_path / "store") as store:
        service = StoreService(store)
        async with (
            connected([service]) as first,
            connected([service]) as second,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(one, first, "a")
            nursery.start_soon(one, second, "b")
        assert {snapshot.name for snapshot in store.snapshots()} == {"a", "b"}
        async with connected([service]) as client:
            for name in ("a", "b"):
                await restore(client, name, os.fsencode(tmp_path / name))
                assert described(tmp_path / name) == described(source)
    packed = sum(path.stat().st_size for path in (tmp_path / "store/packs").iterdir())
    assert packed < 20_500_000


async def test_without_the_passphrase_nothing_is_sent_to_who_has_encrypted(tmp_path, source):
    async with served(tmp_path / "store") as client:
        await client.stub(BackupStore).set_key(new_key(b"correct horse")[1])
        before = client.statistics()
        with pytest.RaisesGroup(
            pytest.RaisesExc(KeyRefused, match="give --passphrase-file"), flatten_subgroups=True
        ):
            await back_up(client, os.fsencode(source), "name")
        after = client.statistics()
        assert after.bytes_sent - before.bytes_sent < 300
        usage = await client.stub(BackupStore).usage()
    assert (usage.chunks, usage.snapshots) == (0, 0)


# What the server refuses.


async def test_refusals_say_what_is_wrong(tmp_path):
    place = tmp_path / "store"
    known, unknown = encoded(b"known"), encoded(b"unknown")
    false = Chunk(encoded(b"another").id, 3, RAW + b"abc")
    async with served(place) as client:
        store = client.stub(BackupStore)
        await store.put([known])
        assert await store.missing([unknown.id, known.id, b"no id"]) == [0, 2]

        async def refused(status: Status, call: Callable[[], object]) -> None:
            with pytest.raises(RpcError) as caught:
                await call()  # type: ignore[misc]
            assert caught.value.status is status
            assert caught.value.message
            assert str(place) not in caught.value.message

        await refused(Status.INVALID_ARGUMENT, lambda: store.put([unknown, false]))
        await refused(Status.FAILED_PRECONDITION, lambda: store.fetch([known.id, unknown.id]))
        await refused(Status.INVALID_ARGUMENT, lambda: store.fetch([known.id] * (MAX_IDS + 1)))
        await refused(Status.INVALID_ARGUMENT, lambda: store.missing([b""] * (MAX_IDS + 1)))
        await refused(Status.NOT_FOUND, lambda: anext(store.pages("nobody")))
        large = encoded(random.Random(3).randbytes(LIMIT))
        await store.put([large])
        await refused(Status.RESOURCE_EXHAUSTED, lambda: store.fetch([large.id] * 5))
        assert 5 * LIMIT > MAX_FETCH
        assert await store.missing([unknown.id]) == [0]
        for pack in (place / "packs").iterdir():
            content = bytearray(pack.read_bytes())
            content[70] ^= 1
            pack.write_bytes(content)
        await refused(Status.DATA_LOSS, lambda: store.fetch([known.id]))


async def test_pages_that_name_what_is_not_there_make_no_snapshot(tmp_path):
    async def sent() -> AsyncIterator[list[Piece]]:
        for entry in (ROOT, file(b"a", encoded(b"unknown"))):
            yield [Piece(page=pages.encode([entry]))]

    async with served(tmp_path) as client:
        store = client.stub(BackupStore)
        for base in ("", "0" * 32):
            with pytest.raises(RpcError) as caught:
                await drained(store.commit("name", base, sent()))
            assert caught.value.status is Status.FAILED_PRECONDITION
        assert await store.snapshots() == []


async def drained(answers: AsyncGenerator[Snapshot | None, None]) -> None:
    async with aclosing(answers):
        async for _ in answers:
            pass


async def test_a_store_that_cannot_be_written_fails_the_backup_and_names_no_path(tmp_path, source):
    place = tmp_path / "store"
    with Store(place) as store:
        (place / "packs").rmdir()
        async with connected([StoreService(store)]) as client:
            with pytest.RaisesGroup(
                pytest.RaisesExc(RpcError, match="cannot be written: No such file or directory$"),
                flatten_subgroups=True,
            ):
                await back_up(client, os.fsencode(source), "name")
        assert store.snapshots() == []


async def test_a_client_that_leaves_in_the_middle_leaves_nothing_visible(tmp_path):
    async def sent() -> AsyncIterator[list[Piece]]:
        yield [Piece(page=pages.encode([ROOT]))]
        started.set()
        await trio.sleep_forever()

    started = trio.Event()
    with Store(tmp_path) as store:
        service = StoreService(store)
        async with connected([service]) as client, trio.open_nursery() as nursery:
            nursery.start_soon(drained, client.stub(BackupStore).commit("name", "", sent()))
            await started.wait()
            nursery.cancel_scope.cancel()
        assert store.snapshots() == []
        async with connected([service]) as client:
            with pytest.raises(RpcError):
                await anext(client.stub(BackupStore).pages("name"))


# What clients refuse.


class Liar(BackupStore):
    """A server that answers what it was made with."""

    def __init__(
        self,
        entries: Sequence[Entry | Page] = (),
        chunks: list[Chunk] | None = None,
        missing: list[int] | None = None,
    ) -> None:
        self._entries = entries
        self._chunks = chunks or []
        self._missing = missing or []

    async def missing(self, ids: list[bytes]) -> list[int]:
        return self._missing

    async def commit(
        self, name: str, base: str, pieces: AsyncIterator[list[Piece]]
    ) -> AsyncGenerator[Snapshot | None, None]:
        yield None
        async for _ in pieces:
            pass

    async def key(self) -> bytes:
        return b""

    async def hold(self) -> AsyncGenerator[None, None]:
        yield None
        await trio.sleep_forever()

    async def pages(self, snapshot: str) -> AsyncGenerator[Page, None]:
        for entry in self._entries:
            yield entry if isinstance(entry, Page) else pages.encode([entry])

    async def fetch(self, ids: list[bytes]) -> list[Chunk]:
        return self._chunks


TRUE, OTHER = encoded(b"content"), encoded(b"another")
LIES = {
    "absolute": ([ROOT, file(b"/tmp/planted", TRUE)], [TRUE], UnsafePath),
    "upwards": ([ROOT, file(b"../planted", TRUE)], [TRUE], UnsafePath),
    "upwards below": (
        [ROOT, ROOT._replace(path=b"d"), file(b"d/../../planted", TRUE)],
        [TRUE],
        UnsafePath,
    ),
    "NUL": ([ROOT, file(b"a\0b", TRUE)], [TRUE], UnsafePath),
    "a file instead of the root": ([file(b"", TRUE)], [TRUE], BackupError),
    "a path twice": ([ROOT, file(b"a", TRUE), file(b"a", TRUE)], [TRUE], InvalidEntry),
    "a link, then a file there": (
        [ROOT, Entry(b"a", Kind.SYMLINK, 0o777, 0, target=b"../planted"), file(b"a", TRUE)],
        [TRUE],
        InvalidEntry,
    ),
    "wrong content": ([ROOT, file(b"a", TRUE)], [TRUE._replace(data=OTHER.data)], ChunkError),
    "another chunk": ([ROOT, file(b"a", TRUE)], [OTHER], ChunkError),
    "another size": ([ROOT, file(b"a", TRUE)], [TRUE._replace(size=8)], ChunkError),
    "no chunk": ([ROOT, file(b"a", TRUE)], [], ChunkError),
    "more chunks": ([ROOT, file(b"a", TRUE)], [TRUE, OTHER], ChunkError),
    "an oversized chunk": (
        [ROOT, file(b"a", TRUE)._replace(size=LIMIT + 1, sizes=(LIMIT + 1,))],
        [TRUE],
        InvalidEntry,
    ),
    "an oversized file": ([ROOT, file(b"a", TRUE)._replace(size=1 << 60)], [TRUE], InvalidEntry),
    "sizes that cancel out": (
        [ROOT, file(b"a", TRUE, OTHER)._replace(size=0, sizes=(7, -7))],
        [TRUE],
        InvalidEntry,
    ),
    "fewer sizes": (
        [ROOT, file(b"a", TRUE, OTHER)._replace(size=7, sizes=(7,))],
        [TRUE],
        PageError,
    ),
    "a page of very many chunks": (
        [ROOT, file(b"a", *([TRUE] * 40_000))],
        [TRUE],
        PageError,
    ),
    "nothing of a file's end": ([ROOT, file(b"a", TRUE)._replace(size=9)], [TRUE], InvalidEntry),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lying_server_is_refused_and_writes_nothing_outside(tmp_path, lie):
    entries, chunks, error = LIES[lie]
    async with connected([Liar(entries, chunks)]) as client:
        with pytest.RaisesGroup(error, flatten_subgroups=True, allow_unwrapped=True):
            await restore(client, "name", os.fsencode(tmp_path / "restored"))
    assert set(os.listdir(tmp_path)) <= {"restored"}
    assert "planted" not in os.listdir("/tmp")


class Forger(StoreService):
    """A server that keeps to the contract, but for the pages that it gives."""

    def __init__(
        self, store: Store, forged: Callable[[list[Page]], list[Page]], instead: str = ""
    ) -> None:
        super().__init__(store)
        self._forged = forged
        self._instead = instead

    async def pages(self, snapshot: str) -> AsyncGenerator[Page, None]:
        async with aclosing(super().pages(self._instead or snapshot)) as found:
            all_of_it = [page async for page in found]
        for page in self._forged(all_of_it):
            yield page


FORGED: dict[str, Callable[[list[Page]], list[Page]]] = {
    "without the end": lambda found: found[:-1],
    "without the last page of files": lambda found: [*found[:-2], found[-1]],
    "without a page in the middle": lambda found: [found[0], *found[2:]],
    "with more": lambda found: [*found, found[-1]],
    "nothing": lambda found: [],
}


@pytest.mark.parametrize("how", [*FORGED, "another name", "as it is"])
async def test_of_an_encrypted_snapshot_a_server_can_leave_nothing_out(tmp_path, how):
    source = tmp_path / "source"
    source.mkdir()
    names = (name for number in count() if pages.is_last(name := b"%d" % number))
    for name in islice(names, 6):
        (source / os.fsdecode(name)).write_bytes(name)
    keys = Keys(bytes(32))
    options = Options(tmp_path / "cache", keys=keys, clock=lambda: time.time_ns() + 10**11)
    with Store(tmp_path / "store") as store:
        store.set_key(b"wrapped")
        instead = "other" if how == "another name" else ""
        async with connected([Forger(store, FORGED.get(how, list), instead)]) as client:
            await back_up(client, os.fsencode(source), "other", Options(keys=keys))
            await back_up(client, os.fsencode(source), "name", options)
            (source / "new").write_text("new")
            # Most pages are copied from the first.
            made = await back_up(client, os.fsencode(source), "name", options)
            assert made.unchanged == 6
            place = os.fsencode(tmp_path / "restored")
            wanted = restores.Options(keys=keys)
            if how == "as it is":
                for asked in ("name", made.snapshot.id, made.snapshot.id[:6]):
                    assert (await restore(client, asked, place, wanted)).files == 7
                    found = [item async for item in items(client, asked, keys.pages)]
                    assert len(found) == 8
                return
            with pytest.RaisesGroup(PageError, flatten_subgroups=True, allow_unwrapped=True):
                await restore(client, "name", place, wanted)
            with pytest.raises(PageError):
                _ = [item async for item in items(client, "name", keys.pages)]


async def test_a_file_below_a_link_is_not_written_through_it(tmp_path):
    link = Entry(b"a", Kind.SYMLINK, 0o777, 0, target=b"..")
    skipped: list[Skipped] = []
    async with connected([Liar([ROOT, link, file(b"a/planted", TRUE)], [TRUE])]) as client:
        place = os.fsencode(tmp_path / "restored")
        did = await restore(client, "name", place, watch=only(skipped))
    assert (did.files, did.reported) == (0, 1)
    assert [found.path for found in skipped] == [b"a/planted"]
    assert os.listdir(tmp_path) == ["restored"]


@pytest.mark.parametrize("lie", ["upwards", "wrong content", "an oversized file"])
async def test_the_command_refuses_a_lying_server_in_one_line(tmp_path, lie, nursery):
    entries, chunks, _ = LIES[lie]
    server = await nursery.start(druvarpc.serve, [Liar(entries, chunks)], "tcp://127.0.0.1:0")
    arguments = ["restore", "name", tmp_path / "restored", "--server", server.addresses[0]]
    done = await trio.run_process(
        [sys.executable, "-m", "examples.backup", *arguments],
        cwd=CHECKOUT,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1
    assert set(os.listdir(tmp_path)) <= {"restored"}


async def test_equal_files_are_left_alone_and_others_replaced(tmp_path, source):
    place = tmp_path / "restored"
    async with served(tmp_path / "store") as client:
        await back_up(client, os.fsencode(source), "name")
        await restore(client, "name", os.fsencode(place))
        inodes = {path: path.lstat().st_ino for path in place.rglob("*")}
        (place / "mine").write_text("not in the snapshot")
        (place / "small-7").write_text("longer than it was")
        (place / "d/e/text").chmod(0o600)
        same_size = (place / "d/e/same").read_text().upper()
        time = (place / "d/e/same").stat().st_mtime_ns
        (place / "d/e/same").write_text(same_size)
        os.utime(place / "d/e/same", ns=(time, time))
        before = client.statistics().bytes_received
        did = await restore(client, "name", os.fsencode(place))
        assert client.statistics().bytes_received - before < 50_000
        assert (did.files, did.unchanged) == (205, 204)
        # The same size and time: only the contents tell.
        assert (place / "d/e/same").read_text() == same_size
        options = restores.Options(check_contents=True)
        did = await restore(client, "name", os.fsencode(place), options)
        assert (did.files, did.unchanged) == (205, 204)
    assert (place / "mine").read_text() == "not in the snapshot"
    (place / "mine").unlink()
    os.utime(place, ns=(1, source.stat().st_mtime_ns))
    assert described(place) == described(source)
    changed = [path for path, inode in inodes.items() if path.lstat().st_ino != inode]
    assert {path.name for path in changed} <= {"small-7", "same", "link", "dangling"}


async def test_what_has_no_place_is_named_and_the_rest_is_restored(tmp_path, source):
    place = tmp_path / "restored"
    for name in ("small-3", "d/large", "link"):
        (place / name / "mine").mkdir(parents=True)
    (place / "d/e").write_text("a file where a directory should be")
    skipped: list[Skipped] = []
    async with served(tmp_path / "store") as client:
        await back_up(client, os.fsencode(source), "name")
        did = await restore(client, "name", os.fsencode(place), watch=only(skipped))
    below = [b"d/e", b"d/e/empty", b"d/e/same", b"d/e/text"]
    assert sorted(found.path for found in skipped) == sorted(
        [*below, b"d/large", b"link", b"small-3"]
    )
    assert (did.files, did.reported) == (200, 7)
    assert os.readlink(place / "dangling") == "/nowhere"
    assert (place / "d").stat().st_mode & 0o777 == 0o750


async def test_some_paths_of_a_snapshot(tmp_path, source):
    os.link(source / "d/large", source / "z-linked")
    os.link(source / "d/large", source / "z-again")
    place = tmp_path / "restored"
    async with served(tmp_path / "store") as client:
        await back_up(client, os.fsencode(source), "name")
        options = restores.Options(paths=[b"d/e", b"small-3", b"z-linked", b"z-again"])
        did = await restore(client, "name", os.fsencode(place), options)
        assert did.files == 6
        nothing = restores.Options(paths=[b"d/e", b"nothing"])
        with pytest.RaisesGroup(
            pytest.RaisesExc(BackupError, match="nothing: not in"), flatten_subgroups=True
        ):
            await restore(client, "name", os.fsencode(tmp_path / "other"), nothing)
    found = {str(path.relative_to(place)) for path in place.rglob("*")}
    assert found == {
        *("d", "d/e", "d/e/empty", "d/e/same", "d/e/text", "small-3", "z-linked", "z-again")
    }
    # The file they are links of is not there: so one of them is it.
    assert (place / "z-linked").samefile(place / "z-again")
    assert (place / "z-linked").read_bytes() == (source / "d/large").read_bytes()
    assert (place / "d").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("positions", [[99], [-1], [0, 0]])
async def test_a_server_that_misses_what_was_not_offered_is_refused(tmp_path, positions):
    (tmp_path / "file").write_text("content")
    async with connected([Liar(missing=positions)]) as client:
        with pytest.RaisesGroup(BackupError, flatten_subgroups=True, allow_unwrapped=True):
            await back_up(client, os.fsencode(tmp_path), "name")


# The parts.


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, LIMIT)), max_size=30), max_size=30
    )
)
def test_loads_fetch_what_the_writer_lacks_and_no_more_at_once_than_allowed(files):
    sizes: dict[int, int] = {}
    entries = []
    for number, wanted in enumerate(files):
        found = [(id.to_bytes(32, "big"), sizes.setdefault(id, size)) for id, size in wanted]
        entries.extend(
            tree.parts(Entry(b"%03d" % number, Kind.FILE, 0, 0, sum(s for _, s in found)), found)
        )
    planner = Planner()
    loads = [load for entry in entries for load in planner.add(entry)] + [planner.finish()]
    ends: dict[bytes, int] = {}
    for number, load in enumerate(loads):
        assert load.size == sum(load.wanted.values())
        assert load.size <= FETCH_SIZE or len(load.wanted) == 1
        assert len(load.slices) <= LOAD_ENTRIES
        assert not set(load.wanted) & set(load.borrowed)
        for id, lender in load.borrowed.items():
            assert id in lender.wanted
            assert lender in loads[:number]
        needed = [*load.wanted, *load.borrowed]
        for part in load.slices:
            assert ends.get(part.entry.path, 0) == part.offset
            ends[part.entry.path] = part.offset + sum(part.entry.sizes[part.start : part.stop])
            assert set(needed).issuperset(part.entry.chunks[part.start : part.stop])
            whole = part.start == 0 and part.offset + sum(part.entry.sizes) == part.entry.size
            assert whole or part.spread is not None
    assert ends == {entry.path: entry.size for entry in entries}


def test_memory_is_bounded_however_small_a_servers_chunks_are():
    planner = Planner()
    names = (number.to_bytes(32, "big") for number in count(1))
    tracemalloc.start()
    try:
        for number in range(20):
            ids = tuple(islice(names, 10_000))
            entry = Entry(
                b"%02d" % number, Kind.FILE, 0, 0, 10_000, chunks=ids, sizes=(1,) * 10_000
            )
            for load in planner.add(entry):
                assert len(load.wanted) <= MAX_IDS
        assert tracemalloc.get_traced_memory()[0] < 1.5 * KEPT
    finally:
        tracemalloc.stop()


def test_what_is_borrowed_counts_for_a_load_as_well():
    ids = tuple(number.to_bytes(32, "big") for number in range(1, 3 * MAX_IDS))
    entry = Entry(b"a", Kind.FILE, 0, 0, len(ids), chunks=ids, sizes=(1,) * len(ids))
    planner = Planner()
    loads = [*planner.add(entry), *planner.add(entry._replace(path=b"b")), planner.finish()]
    assert max(len(load.wanted) + len(load.borrowed) for load in loads) == MAX_IDS
    assert sum(len(load.wanted) for load in loads) == len(ids)


def test_a_part_may_not_follow_what_it_does_not_continue():
    first = file(b"a", TRUE)._replace(size=20)
    check_next(first, first._replace(offset=7, size=14))
    for wrong in (first, first._replace(offset=8), first._replace(path=b"b", offset=7)):
        with pytest.raises(InvalidEntry):
            check_next(first, wrong)


async def test_work_in_threads_keeps_its_order_and_its_bound():
    release = threading.Event()
    busy: list[int] = []

    def work(number: int) -> int:
        busy.append(number)
        if number == 0:
            release.wait()
        else:
            release.set()
        return number

    async def numbers() -> AsyncIterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    taken: list[int] = []
    sink, results = trio.open_memory_channel[int](0)
    found = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_order, work, numbers(), sink, 2)
        async with aclosing(results):
            async for result in results:
                found.append(result)
                assert len(taken) <= len(found) + 3
    assert found == sorted(busy) == list(range(20))
