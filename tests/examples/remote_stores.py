"""A store across a wire, for tests: what clients do with it, without reading a tree."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest

from druvarpc import RpcError, Status
from examples.backup import pages
from examples.backup.reports import Checked, Collected
from examples.backup.service import BackupStore, Piece
from examples.backup.snapshots import Snapshot
from tests.examples.stores import ROOT, chunk, page_of


async def put(store: BackupStore, *seeds: int) -> None:
    await store.put([chunk(seed) for seed in seeds])


async def commit(store: BackupStore, name: str, *seeds: int) -> Snapshot:
    async def pieces() -> AsyncIterator[list[Piece]]:
        yield [Piece(page=pages.encode([ROOT])), Piece(page=page_of(*seeds))]

    async with aclosing(store.commit(name, "", pieces())) as answers:
        found = [answer async for answer in answers]
    assert found[0] is None
    assert found[1] is not None
    return found[1]


async def collected(store: BackupStore) -> Collected:
    async with aclosing(store.gc()) as reports:
        return [report async for report in reports][-1]


async def verified(store: BackupStore) -> list[Checked]:
    async with aclosing(store.verify()) as reports:
        return [report async for report in reports]


async def refused(status: Status, call: Callable[[], Awaitable[object]]) -> str:
    with pytest.raises(RpcError) as caught:
        await call()
    assert caught.value.status is status
    return caught.value.message
