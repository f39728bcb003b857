"""What a server does besides backups and restores, across a wire: upkeep and leases."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
import trio

from druvarpc import RpcError, Status
from druvarpc.testing import connected
from examples.backup.directory import Directory
from examples.backup.memory import Memory
from examples.backup.reports import Collected
from examples.backup.retention import Rule
from examples.backup.server import StoreService
from examples.backup.service import BackupStore, Piece
from examples.backup.snapshots import Snapshot
from examples.backup.store import Store
from tests.examples.remote_stores import collected, commit, put, refused, verified
from tests.examples.stores import chunk, ids, page_of


@asynccontextmanager
async def served() -> AsyncGenerator[BackupStore, None]:
    with Store(Memory()) as store:
        async with connected([StoreService(store)]) as client:
            yield client.stub(BackupStore)


async def collected_or_busy(store: BackupStore) -> bool:
    try:
        await collected(store)
    except RpcError as error:
        return error.status is Status.FAILED_PRECONDITION
    return False


async def test_upkeep(tmp_path):
    async with served() as store:
        await put(store, *range(10))
        first = await commit(store, "a", *range(6))
        await commit(store, "b", *range(4, 8))
        assert (await verified(store))[-1].chunks == 10
        assert await store.forget([first.id[:8]]) == [first]
        did = await collected(store)
        assert (did.chunks, did.finished) == (6, True)
        assert await store.missing(ids(*range(10))) == [0, 1, 2, 3, 8, 9]
        usage = await store.usage()
        assert (usage.snapshots, usage.chunks, usage.references) == (1, 4, 4)
        assert usage.content_bytes == usage.source_bytes == 4000
        assert usage.cpu_seconds is not None
        assert usage.cpu_seconds > 0
        assert usage.received_bytes == 10_000
        assert usage.peak_memory is not None
        assert usage.peak_memory > 1 << 20


async def test_what_cannot_be_forgotten(tmp_path):
    async with served() as store:
        await put(store, 1)
        snapshot = await commit(store, "a", 1)
        message = await refused(Status.NOT_FOUND, lambda: store.forget([snapshot.id, "nobody"]))
        assert "nobody" in message
        assert await store.snapshots() == [snapshot]


async def test_forgetting_by_rule(tmp_path):
    async with served() as store:
        await put(store, 1)
        made = [await commit(store, name, 1) for name in "aab"]
        for dry_run in (True, False):
            verdicts = await store.forget_by_rule(Rule(last=1), "", dry_run)
            assert [bool(verdict.reasons) for verdict in verdicts] == [False, True, True]
        assert await store.snapshots() == made[1:]


async def test_a_commit_is_a_lease_until_it_ends(tmp_path):
    begun, end = trio.Event(), trio.Event()

    async def pieces() -> AsyncIterator[list[Piece]]:
        begun.set()
        await end.wait()
        yield [Piece(page=page_of(1, 2))]

    async def back_up() -> None:
        async with aclosing(store.commit("name", "", pieces())) as answers:
            assert await anext(answers) is None
            has.set()
            made.append(await anext(answers))

    has, made = trio.Event(), list[Snapshot | None]()
    async with served() as store:
        await put(store, 1, 2, 3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(back_up)
            await has.wait()
            assert (await collected(store)).held == 3
            end.set()
        assert (await collected(store)).chunks == 1
        assert made == await store.snapshots()


async def test_a_commit_that_breaks_off_leaves_no_lease(tmp_path):
    async def pieces() -> AsyncIterator[list[Piece]]:
        yield [Piece(page=page_of(1))]
        await trio.sleep_forever()

    async with served() as store:
        await put(store, 1)
        async with aclosing(store.commit("name", "", pieces())) as answers:
            assert await anext(answers) is None
            assert (await collected(store)).chunks == 0
        did = Collected()
        # The server learns of the caller's leaving a moment later.
        while not did.chunks:
            did = await collected(store)
        assert (await verified(store))[-1].chunks == 0
        assert await store.snapshots() == []


async def test_who_holds_can_fetch_what_was_forgotten(tmp_path):
    async with served() as store:
        await put(store, 1, 2)
        snapshot = await commit(store, "name", 1, 2)
        async with aclosing(store.hold()) as holding:
            assert await anext(holding) is None
            await store.forget([snapshot.id])
            assert (await collected(store)).held == 2
            assert await store.fetch(ids(2, 1)) == [chunk(2), chunk(1)]
        did = Collected()
        while not did.chunks:
            did = await collected(store)
        assert await store.missing(ids(1, 2)) == [0, 1]


async def test_a_gc_whose_caller_leaves_ends_and_lets_the_next_one_begin(tmp_path):
    with Store(Directory(tmp_path, pack_limit=3_000)) as kept:
        async with connected([StoreService(kept)]) as client:
            store = client.stub(BackupStore)
            for seed in range(30):
                await put(store, seed)
            for _ in range(5):
                async with aclosing(store.gc()) as reports:
                    await anext(reports)
                # The server learns of it a moment later.
                while await collected_or_busy(store):
                    pass
            assert await store.missing(ids(*range(30))) == list(range(30))


async def test_one_key_and_only_before_all_backups(tmp_path):
    async with served() as store:
        assert await store.key() == b""
        await put(store, 1)
        await refused(Status.ALREADY_EXISTS, lambda: store.set_key(b"wrapped"))
    async with served() as store:
        await store.set_key(b"wrapped")
        assert await store.key() == b"wrapped"
        await refused(Status.ALREADY_EXISTS, lambda: store.set_key(b"another"))
        await refused(Status.INVALID_ARGUMENT, lambda: put(store, 1))


@pytest.mark.parametrize("name", ["", "x" * 256, "\u00e4" * 128])
async def test_a_name_has_a_size(name):
    async with served() as store:
        await put(store, 1)
        await refused(Status.INVALID_ARGUMENT, lambda: commit(store, name, 1))
        assert await store.snapshots() == []


async def test_a_key_has_a_size():
    async with served() as store:
        for wrapped in (b"", bytes(5000)):
            await refused(Status.INVALID_ARGUMENT, lambda key=wrapped: store.set_key(key))
        assert await store.key() == b""
