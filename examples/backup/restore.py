"""A restore, as a pipeline from a snapshot to a directory.

    entries ─ plan loads ─┬─ fetch ─┐
                          └─────────┴─ decode and check (threads) ─ write (a thread)

The loads (see `loads`) are fetched by one call each, many of them on their way, and written in
order.

The server is not trusted: entries must come in the order of a tree (so no path twice), sizes are
checked before anything is asked for, a chunk's content against its id and its size, and `target`
keeps everything inside the destination.
"""

import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

import druvarpc

from .chunks import Chunk, Codec
from .errors import ChunkError
from .loads import Load, Planner, Writer
from .service import BackupStore
from .stages import in_order

# Loads in memory: 64 MiB of content, which fill 1 Gbit/s over 80 ms at any usual compression.
LOADS = 128


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did.

    Attributes:
        files: Files written.
        bytes: Their content, in bytes.
        calls: Calls made.
        round_trips: Frames of calls sent; see `client.Backup`.
        wire_bytes: Bytes sent and received, protocol included.
    """

    files: int
    bytes: int
    calls: int
    round_trips: int
    wire_bytes: int


@dataclass
class _Fetching:
    """A load, the chunks that came for it, and whether they did."""

    load: Load
    chunks: list[Chunk] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)


async def restore(client: druvarpc.Client, snapshot: str, destination: bytes) -> Restored:
    """Restores a snapshot into a new or empty directory.

    Cancelled or failed, it leaves what was written so far.

    Args:
        client: Connected to a server with a `BackupStore`. The figures count all it ever did.
        snapshot: Its id or the beginning of it, or a name for the newest of that name.
        destination: The directory's path.

    Raises:
        BackupError: The destination is not empty; or what the server sent is refused.
        RpcError: The server refused, failed or went away.
        OSError: The destination cannot be made.
    """
    with Writer(destination) as writer:
        await _Run(client, writer).run(snapshot)
    did = client.statistics()
    return Restored(
        writer.files,
        writer.bytes,
        calls=did.calls_started,
        round_trips=did.clubs_sent,
        wire_bytes=did.bytes_sent + did.bytes_received,
    )


class _Run:
    """One restore's stages."""

    def __init__(self, client: druvarpc.Client, writer: Writer) -> None:
        self._store = client.stub(BackupStore)
        self._writer = writer
        self._codec = Codec()
        self._free = trio.Semaphore(LOADS)

    async def run(self, snapshot: str) -> None:
        # What is in the channels is bounded by the free loads, so they never need to be full.
        loads, to_decode = trio.open_memory_channel[_Fetching](LOADS)
        wanted, to_fetch = trio.open_memory_channel[_Fetching](LOADS)
        decoded, to_write = trio.open_memory_channel[_Fetching](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._plan, snapshot, loads, wanted)
            nursery.start_soon(self._fetch, to_fetch)
            workers = os.cpu_count() or 1
            nursery.start_soon(in_order, self._decode, _fetched(to_decode), decoded, workers)
            async for fetching in to_write:
                await trio.to_thread.run_sync(self._writer.write, fetching.load)
                self._free.release()
        await trio.to_thread.run_sync(self._writer.finish)

    async def _plan(
        self,
        snapshot: str,
        loads: trio.MemorySendChannel[_Fetching],
        wanted: trio.MemorySendChannel[_Fetching],
    ) -> None:
        planner = Planner()

        async def send(load: Load) -> None:
            await self._free.acquire()
            fetching = _Fetching(load)
            await loads.send(fetching)
            if load.wanted:
                await wanted.send(fetching)
            else:
                fetching.done.set()

        async with loads, wanted:
            async with aclosing(self._store.entries(snapshot)) as pages:
                async for page in pages:
                    for entry in page:
                        for load in planner.add(entry):
                            await send(load)
            await send(planner.finish())

    async def _fetch(self, source: trio.MemoryReceiveChannel[_Fetching]) -> None:
        asked: deque[_Fetching] = deque()

        async def questions() -> AsyncIterator[list[bytes]]:
            async for fetching in source:
                asked.append(fetching)
                yield list(fetching.load.wanted)

        async with aclosing(druvarpc.windowed(self._store.fetch, questions())) as answers:
            async for chunks in answers:
                fetching = asked.popleft()
                wanted = list(fetching.load.wanted.items())
                if [(chunk.id, chunk.size) for chunk in chunks] != wanted:
                    raise ChunkError("the server sent other chunks than it was asked for")
                fetching.chunks = chunks
                fetching.done.set()

    def _decode(self, fetching: _Fetching) -> _Fetching:
        for chunk in fetching.chunks:
            fetching.load.contents[chunk.id] = self._codec.decode(chunk)
        fetching.chunks.clear()
        return fetching


async def _fetched(source: trio.MemoryReceiveChannel[_Fetching]) -> AsyncIterator[_Fetching]:
    async for fetching in source:
        await fetching.done.wait()
        yield fetching
