"""A backup, as a pipeline from a tree to a snapshot.

    read (threads) ── batches ─┬─ ask which chunks are missing ─ compress (threads) ─ put ─┐
                               └───────────────── pages, in order ◄──── acknowledged ──────┘

All of it runs at once. A batch's chunks are asked for in one question, many of them on their way.
Only what is missing is compressed and put, many puts on their way. Its pages follow once all
its chunks are acknowledged, in one stream that the server commits when it ends: so the snapshot
appears whole, or not at all. As long as that stream is open, the server removes nothing that the
backup counts on; so nothing is asked before it is.

What is known from the last backup is not read, and of pages that are as they were only the numbers
are sent (see `cache`). If the server does not have the last snapshot any more, or the connection
breaks, all begins anew: what the server acknowledged is there and is not sent again.

Memory is bounded by the blocks that content is read into, until it is known to be there or has been
compressed: the reader waits for a free one. Every stage hands on to the next one and waits until it
was taken.
"""

import os
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import trio

import druvarpc
from druvarpc import Status

from .attempts import attempted, causes
from .cache import LastSnapshot, NextCache
from .chunks import AUTO, BLOCK_SIZE, Chunk, Codec, Compression, Content
from .crypt import Keys, page_box
from .errors import BackupError, CacheDamaged, KeyRefused
from .reader import Batch, Progress, Reader
from .service import BackupStore, Piece
from .snapshots import Snapshot
from .stages import in_order
from .tree import Skipped

# Blocks in memory, of 1 MiB each. At a round trip of 80 ms, which a block waits for, they let 300
# MB/s be read.
BLOCKS = 32

# Content that is compressed and put together. It becomes 0.2 to 1 MiB: small enough that several
# are on their way, large enough that a call's cost does not matter.
PUT_SIZE = 1024 * 1024

# Pages that are sent together, in bytes.
PIECES_SIZE = 1024 * 1024

# Batches that wait for their turn to be committed: pages, without content.
BATCHES = 256

# Threads that read: more would wait for the one that makes pages.
MAX_READERS = 8


@dataclass(frozen=True, slots=True)
class Options:
    """How a backup is made.

    Attributes:
        cache: The file that says what is known from the last backup; None for none.
        compression: How chunks are compressed.
        keys: A tenant's keys, if it encrypts.
        excluded: Told a path and whether it is a directory; says if it is left out.
        attempts: How often it is tried if the connection breaks.
        clock: Tells the time for the cache, in nanoseconds since 1970.
    """

    cache: Path | None = None
    compression: Compression = AUTO
    keys: Keys | None = None
    excluded: Callable[[bytes, bool], bool] | None = None
    attempts: int = 1
    clock: Callable[[], int] = time.time_ns


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup did.

    Attributes:
        snapshot: What the server has now.
        unchanged: Files that were not read, since they were as in the last backup.
        new_chunks: Chunks that the server did not have.
        new_bytes: Their content, in bytes.
        stored_bytes: What they became, compressed.
        calls: Calls made.
        round_trips: Frames of calls sent: calls that start together share one. As many are on their
            way at a time, it was less often than this that anything waited for the network.
        wire_bytes: Bytes sent and received, protocol included.
        skipped: What could not be read.
    """

    snapshot: Snapshot
    unchanged: int
    new_chunks: int
    new_bytes: int
    stored_bytes: int
    calls: int
    round_trips: int
    wire_bytes: int
    skipped: int


@dataclass
class _Sending:
    """A batch on its way to the server."""

    batch: Batch
    unsent: int = 0
    is_done: bool = False  # its contents are
    acknowledged: trio.Event = field(default_factory=trio.Event)


@dataclass
class _Put:
    """A part of a batch's missing chunks: their content, and then the chunks to be sent."""

    origin: _Sending
    contents: list[tuple[bytes, Content]]
    chunks: list[Chunk] = field(default_factory=list)
    is_last: bool = False


async def back_up(
    client: druvarpc.Client,
    root: bytes,
    name: str,
    options: Options | None = None,
    watch: Callable[[Progress | Skipped], None] = lambda _: None,
) -> Backup:
    """Backs up a directory.

    Cancelling it leaves no snapshot; the chunks that were sent stay, so that the next backup does
    not send them again.

    Args:
        client: Connected to a server with a `BackupStore`. The figures count all it ever did.
        root: The directory's path.
        name: What the snapshot will be called.
        options: How to make it.
        watch: Told of what cannot be read, while the rest goes on; and first, once for each
            attempt, of an object that always says how far it is.

    Raises:
        OSError: The root is no directory, or cannot be read.
        KeyRefused: There are no keys, and the tenant's backups are encrypted. Nothing was sent.
        BackupError: The server's answers make no sense.
        RpcError: The server refused, failed or went away.
    """
    options = options or Options()
    run = _Run(client, options, watch)

    async def attempt() -> Snapshot:
        nonlocal run
        run = _Run(client, options, watch)
        try:
            return await run.run(root, name, use_cache=True)
        except (BackupError, druvarpc.RpcError, BaseExceptionGroup) as error:
            if not run.based or not all(map(_is_stale, causes(error))):
                raise
        run = _Run(client, options, watch)
        return await run.run(root, name, use_cache=False)

    snapshot = await attempted(attempt, options.attempts)
    did = client.statistics()
    return Backup(
        snapshot,
        run.unchanged,
        run.new_chunks,
        run.new_bytes,
        run.stored_bytes,
        calls=did.calls_started,
        round_trips=did.clubs_sent,
        wire_bytes=did.bytes_sent + did.bytes_received,
        skipped=run.skipped,
    )


class _Run:
    """One attempt's stages, and what they count."""

    def __init__(
        self,
        client: druvarpc.Client,
        options: Options,
        watch: Callable[[Progress | Skipped], None],
    ) -> None:
        self._store = client.stub(BackupStore)
        # Questions and entries are small, and must not wait behind the chunks.
        self._bulk = client.stub(BackupStore, priority=druvarpc.Priority.BULK)
        self._options = options
        self._watch = watch
        self._codec = Codec(options.compression, options.keys)
        self._free = trio.Semaphore(BLOCKS)
        self._blocks: list[bytearray] = []
        self._delivered: deque[_Sending] = deque()  # their blocks are in use, or those before them
        self._begun = trio.Event()
        self._allowed = trio.Event()
        self.based = False
        self.unchanged = 0
        self.new_chunks = 0
        self.new_bytes = 0
        self.stored_bytes = 0
        self.skipped = 0

    async def run(self, root: bytes, name: str, *, use_cache: bool) -> Snapshot:
        cache, box = self._options.cache, page_box(self._options.keys)
        with (
            LastSnapshot(cache if use_cache else None, box) as last,
            NextCache(cache, self._options.clock) as following,
        ):
            self.based = bool(last.snapshot)
            snapshot = await self._stages(root, name, last, following)
            following.keep(snapshot.id)
            if following.error is not None:
                reason = f"the cache cannot be written: {following.error.strerror}"
                self._watch(Skipped(os.fsencode(cache or ""), reason))
        return snapshot

    async def _stages(
        self, root: bytes, name: str, last: LastSnapshot, following: NextCache
    ) -> Snapshot:
        # What is offered is bounded by the free blocks, so that channel never is full.
        batches, to_commit = trio.open_memory_channel[_Sending](BATCHES)
        offers, to_ask = trio.open_memory_channel[_Sending](BLOCKS)
        missing, to_encode = trio.open_memory_channel[_Put](0)
        encoded, to_put = trio.open_memory_channel[_Put](0)
        options = self._options
        reader = Reader(
            root,
            lambda batch: trio.from_thread.run(self._deliver, batch, batches, offers),
            self._codec,
            page_box(options.keys),
            last,
            following,
            options.excluded,
            name,
            lambda: trio.from_thread.run(self._block),
            min(os.cpu_count() or 1, MAX_READERS),
        )
        self._watch(reader.progress)
        async with batches, trio.open_nursery() as nursery:
            nursery.start_soon(self._read, reader, batches, offers)
            nursery.start_soon(self._check_key)
            nursery.start_soon(self._ask, to_ask, missing)
            workers = os.cpu_count() or 1
            nursery.start_soon(in_order, self._encode, to_encode, encoded, workers)
            nursery.start_soon(self._put, to_put)
            snapshot = await self._commit(name, last.snapshot, self._pieces(to_commit))
        self.unchanged = reader.progress.unchanged
        return snapshot

    async def _check_key(self) -> None:
        """Lets what tells of the tree be sent, unless it would not be encrypted and has to be."""
        # Asked together with the commit, whose first answer is waited for anyway.
        if self._options.keys is None and await self._store.key():
            raise KeyRefused("these backups are encrypted: give --passphrase-file")
        self._allowed.set()

    async def _read(
        self,
        reader: Reader,
        batches: trio.MemorySendChannel[_Sending],
        offers: trio.MemorySendChannel[_Sending],
    ) -> None:
        # The end of the batches makes the snapshot: it must not come if the reader failed.
        async with offers:
            await trio.to_thread.run_sync(reader.run)
            await batches.aclose()

    async def _block(self) -> bytearray:
        await self._free.acquire()
        return self._blocks.pop() if self._blocks else bytearray(BLOCK_SIZE)

    def _done(self, sending: _Sending) -> None:
        """Lets the batch's blocks be used again, after those of the batches before."""
        sending.batch.contents.clear()
        sending.is_done = True
        while self._delivered and self._delivered[0].is_done:
            for block in self._delivered.popleft().batch.blocks:
                self._blocks.append(block)
                self._free.release()

    async def _deliver(
        self,
        batch: Batch,
        batches: trio.MemorySendChannel[_Sending],
        offers: trio.MemorySendChannel[_Sending],
    ) -> None:
        sending = _Sending(batch)
        self._delivered.append(sending)
        await batches.send(sending)
        if batch.contents:
            await offers.send(sending)
        else:
            self._done(sending)
            sending.acknowledged.set()

    async def _commit(
        self, name: str, base: str, pieces: AsyncGenerator[list[Piece], None]
    ) -> Snapshot:
        made: Snapshot | None = None
        async with aclosing(self._store.commit(name, base, pieces)) as answers:
            async for answer in answers:
                made = answer
                self._begun.set()
        if made is None:
            raise BackupError("the server made no snapshot")
        return made

    async def _ask(
        self,
        source: trio.MemoryReceiveChannel[_Sending],
        sink: trio.MemorySendChannel[_Put],
    ) -> None:
        asked: deque[_Sending] = deque()

        async def questions() -> AsyncIterator[list[bytes]]:
            await self._begun.wait()
            await self._allowed.wait()
            async for sending in source:
                asked.append(sending)
                yield list(sending.batch.contents)

        async with sink, aclosing(druvarpc.windowed(self._store.missing, questions())) as answers:
            async for positions in answers:
                sending = asked.popleft()
                puts = list(_cut(sending, positions))
                sending.unsent = len(puts)
                if not puts:
                    self._done(sending)
                    sending.acknowledged.set()
                for put in puts:
                    self.new_chunks += len(put.contents)
                    self.new_bytes += sum(len(content) for _, content in put.contents)
                    put.is_last = put is puts[-1]
                    await sink.send(put)

    def _encode(self, put: _Put) -> _Put:
        put.chunks = self._codec.encode_all(put.contents)
        put.contents.clear()
        return put

    async def _put(self, source: trio.MemoryReceiveChannel[_Put]) -> None:
        sent: deque[_Sending] = deque()

        async def puts() -> AsyncIterator[list[Chunk]]:
            async for put in source:
                if put.is_last:
                    self._done(put.origin)
                sent.append(put.origin)
                self.stored_bytes += sum(len(chunk.data) for chunk in put.chunks)
                yield put.chunks

        async with aclosing(druvarpc.windowed(self._bulk.put, puts())) as receipts:
            async for _ in receipts:
                sending = sent.popleft()
                sending.unsent -= 1
                if not sending.unsent:
                    sending.acknowledged.set()

    async def _pieces(
        self, source: trio.MemoryReceiveChannel[_Sending]
    ) -> AsyncGenerator[list[Piece], None]:
        copied: list[int] = []
        async for sending in source:
            await sending.acknowledged.wait()
            for skipped in sending.batch.skipped:
                self.skipped += 1
                self._watch(skipped)
            pieces: list[Piece] = []
            size = 0
            for page in sending.batch.pages:
                if isinstance(page, int):
                    if copied and page != copied[-1] + 1:
                        pieces.append(Piece(copied[0], len(copied)))
                        copied.clear()
                    copied.append(page)
                else:
                    await self._allowed.wait()
                    pieces.append(Piece(copied[0] if copied else 0, len(copied), page))
                    copied.clear()
                    size += len(page.data) + len(page.chunks)
                    if size >= PIECES_SIZE:
                        yield pieces
                        pieces, size = [], 0
            if pieces:
                yield pieces
        if copied:
            yield [Piece(copied[0], len(copied))]


def _is_stale(error: BaseException) -> bool:
    """Whether what was thought to be there is not: somebody removed it, or the cache is damaged."""
    if isinstance(error, druvarpc.RpcError):
        return error.status is Status.FAILED_PRECONDITION
    return isinstance(error, CacheDamaged)


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
