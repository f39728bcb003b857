"""A backup, as a pipeline from a tree to a snapshot.

    read (a thread) ─ batches ─┬─ ask which chunks are missing ─ compress (threads) ─ put ─┐
                               └──────────────── entries, in order ◄──── acknowledged ─────┘

All of it runs at once. A batch's chunks are asked for in one question, several of them on their
way. Only what is missing is compressed and put, many puts on their way. Its entries follow once all
its chunks are acknowledged, in one stream that the server commits when it ends: so the snapshot
appears whole, or not at all.

Memory is bounded by the number of batches between their reading and their acknowledgement: the
reader waits for a free one. Every stage hands on to the next one and waits until it was taken.
"""

import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

import druvarpc

from .chunks import Chunk, Codec
from .errors import BackupError
from .reader import Batch, Reader
from .service import BackupStore
from .snapshots import Snapshot
from .stages import in_order
from .tree import Entry, Skipped

# Batches in memory, of 8 MiB each. At a round trip of 80 ms, 64 MiB let an unchanged tree be read
# at 800 MB/s, and 1 Gbit/s be filled with what compresses to a sixth.
BATCHES = 8

# Content that is compressed and put together. It becomes 0.2 to 1 MiB: small enough that several
# are on their way, large enough that a call's cost does not matter.
PUT_SIZE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup did.

    Attributes:
        snapshot: What the server has now.
        new_chunks: Chunks that the server did not have.
        new_bytes: Their content, in bytes.
        calls: Calls made.
        round_trips: Frames of calls sent: calls that start together share one. As many are on their
            way at a time, it was less often than this that anything waited for the network.
        wire_bytes: Bytes sent and received, protocol included.
        skipped: What could not be read.
    """

    snapshot: Snapshot
    new_chunks: int
    new_bytes: int
    calls: int
    round_trips: int
    wire_bytes: int
    skipped: int


@dataclass
class _Sending:
    """A batch on its way to the server."""

    batch: Batch
    unsent: int = 0
    acknowledged: trio.Event = field(default_factory=trio.Event)


@dataclass
class _Put:
    """A part of a batch's missing chunks: their content, and then the chunks to be sent."""

    origin: _Sending
    contents: list[tuple[bytes, bytes | memoryview]]
    chunks: list[Chunk] = field(default_factory=list)


async def back_up(
    client: druvarpc.Client,
    root: bytes,
    name: str,
    on_skipped: Callable[[Skipped], None] = lambda _: None,
) -> Backup:
    """Backs up a directory.

    Cancelling it leaves no snapshot; the chunks that were sent stay, so that the next backup does
    not send them again.

    Args:
        client: Connected to a server with a `BackupStore`. The figures count all it ever did.
        root: The directory's path.
        name: What the snapshot will be called.
        on_skipped: Told of what cannot be read. The rest goes on.

    Raises:
        OSError: The root is no directory, or cannot be read.
        BackupError: The server's answers make no sense.
        RpcError: The server refused, failed or went away.
    """
    run = _Run(client, on_skipped)
    snapshot = await run.run(root, name)
    did = client.statistics()
    return Backup(
        snapshot,
        run.new_chunks,
        run.new_bytes,
        calls=did.calls_started,
        round_trips=did.clubs_sent,
        wire_bytes=did.bytes_sent + did.bytes_received,
        skipped=run.skipped,
    )


class _Run:
    """One backup's stages, and what they count."""

    def __init__(self, client: druvarpc.Client, on_skipped: Callable[[Skipped], None]) -> None:
        self._store = client.stub(BackupStore)
        # Questions and entries are small, and must not wait behind the chunks.
        self._bulk = client.stub(BackupStore, priority=druvarpc.Priority.BULK)
        self._on_skipped = on_skipped
        self._codec = Codec()
        self._free = trio.Semaphore(BATCHES)
        self.new_chunks = 0
        self.new_bytes = 0
        self.skipped = 0

    async def run(self, root: bytes, name: str) -> Snapshot:
        # What is in the channels is bounded by the free batches, so they never need to be full.
        batches, to_commit = trio.open_memory_channel[_Sending](BATCHES)
        offers, to_ask = trio.open_memory_channel[_Sending](BATCHES)
        missing, to_encode = trio.open_memory_channel[_Put](0)
        encoded, to_put = trio.open_memory_channel[_Put](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, root, batches, offers)
            nursery.start_soon(self._ask, to_ask, missing)
            workers = os.cpu_count() or 1
            nursery.start_soon(in_order, self._encode, to_encode, encoded, workers)
            nursery.start_soon(self._put, to_put)
            return await self._store.commit(name, self._entries(to_commit))

    async def _read(
        self,
        root: bytes,
        batches: trio.MemorySendChannel[_Sending],
        offers: trio.MemorySendChannel[_Sending],
    ) -> None:
        async def deliver(batch: Batch) -> None:
            await self._free.acquire()
            sending = _Sending(batch)
            await batches.send(sending)
            if batch.contents:
                await offers.send(sending)
            else:
                sending.acknowledged.set()

        async with batches, offers:
            reader = Reader(root, lambda batch: trio.from_thread.run(deliver, batch))
            await trio.to_thread.run_sync(reader.run)

    async def _ask(
        self,
        source: trio.MemoryReceiveChannel[_Sending],
        sink: trio.MemorySendChannel[_Put],
    ) -> None:
        asked: deque[_Sending] = deque()

        async def questions() -> AsyncIterator[list[bytes]]:
            async for sending in source:
                asked.append(sending)
                yield list(sending.batch.contents)

        async with sink, aclosing(druvarpc.windowed(self._store.missing, questions())) as answers:
            async for positions in answers:
                sending = asked.popleft()
                puts = list(_cut(sending, positions))
                sending.batch.contents.clear()
                sending.unsent = len(puts)
                if not puts:
                    sending.acknowledged.set()
                for put in puts:
                    self.new_chunks += len(put.contents)
                    self.new_bytes += sum(len(content) for _, content in put.contents)
                    await sink.send(put)

    def _encode(self, put: _Put) -> _Put:
        put.chunks = [self._codec.encode(id, content) for id, content in put.contents]
        put.contents.clear()
        return put

    async def _put(self, source: trio.MemoryReceiveChannel[_Put]) -> None:
        sent: deque[_Sending] = deque()

        async def puts() -> AsyncIterator[list[Chunk]]:
            async for put in source:
                sent.append(put.origin)
                yield put.chunks

        async with aclosing(druvarpc.windowed(self._bulk.put, puts())) as receipts:
            async for _ in receipts:
                sending = sent.popleft()
                sending.unsent -= 1
                if not sending.unsent:
                    sending.acknowledged.set()

    async def _entries(
        self, source: trio.MemoryReceiveChannel[_Sending]
    ) -> AsyncGenerator[list[Entry], None]:
        async for sending in source:
            await sending.acknowledged.wait()
            self._free.release()
            for skipped in sending.batch.skipped:
                self.skipped += 1
                self._on_skipped(skipped)
            if sending.batch.entries:
                yield sending.batch.entries


def _cut(sending: _Sending, positions: list[int]) -> Iterator[_Put]:
    """Yields what the server misses of a batch, in portions."""
    offered = list(sending.batch.contents.items())
    if positions != sorted({p for p in positions if 0 <= p < len(offered)}):
        raise BackupError("the server misses chunks that it was not asked for")
    put, size = _Put(sending, []), 0
    for id, content in (offered[position] for position in positions):
        if size and size + len(content) > PUT_SIZE:
            yield put
            put, size = _Put(sending, []), 0
        put.contents.append((id, content))
        size += len(content)
    if size:
        yield put
