"""Connections that break while a backup or a restore goes over them."""

import os
import random
from pathlib import Path

import pytest

from druvarpc.testing import Link, connected
from examples.backup import client as backups
from examples.backup import restore as restores
from examples.backup.chunks import Chunk
from examples.backup.server import StoreService
from examples.backup.store import Store
from tests.examples.trees import described


class Cutting(StoreService):
    """Serves a store, over a link that breaks after some of the calls.

    Args:
        store: The store.
        link: What is cut.
    """

    def __init__(self, store: Store, link: Link) -> None:
        super().__init__(store)
        self._link = link
        self.puts = 0
        self.fetches = 0

    async def put(self, chunks: list[Chunk]) -> None:
        await super().put(chunks)
        self.puts += 1
        if self.puts in (3, 4, 9):
            self._link.cut()

    async def fetch(self, ids: list[bytes]) -> list[Chunk]:
        chunks = await super().fetch(ids)
        self.fetches += 1
        if self.fetches in (2, 7):
            self._link.cut()
        return chunks


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number}").write_bytes(random.Random(number).randbytes(500_000))
    return source


async def test_what_was_done_before_the_connection_broke_is_not_done_again(tmp_path, source):
    link = Link(rtt=0.001, bandwidth=1e9)
    with Store(tmp_path / "store") as store:
        service = Cutting(store, link)
        async with connected([service], link=link) as client:
            options = backups.Options(attempts=9)
            did = await backups.back_up(client, os.fsencode(source), "name", options)
            assert did.snapshot.files == 20
            # Of the last attempt: three puts at least were there, of a MiB each.
            assert did.new_bytes < 10_000_000 - 2_000_000
            assert service.puts > 9
            place = os.fsencode(tmp_path / "restored")
            done = await restores.restore(client, "name", place, restores.Options(attempts=9))
            assert done.files == 20
            assert service.fetches > 7
        assert [snapshot.id for snapshot in store.snapshots()] == [did.snapshot.id]
    assert described(tmp_path / "restored") == described(source)
