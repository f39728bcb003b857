"""A restore, as a pipeline from a snapshot to a directory.

    pages ─ plan (a thread) ─ loads ─ fetch, in any order ─ decode, check and write (threads)

The loads (see `loads`) are fetched by one call each, many of them on their way. Whichever comes
first is decoded, checked and written first. A load that borrows contents from an earlier one waits
until that is decoded: as all wait for earlier ones only, none waits for ever.

The server is not trusted: see `plan` and `target`; and a chunk's content is checked against its id
and its size before it is written.
"""

import os
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial

import trio

import druvarpc

from .attempts import attempted
from .chunks import Chunk, Codec
from .crypt import Keys, page_box
from .errors import ChunkError
from .loads import Load
from .manifest import Contents
from .output import Rules
from .pages import Page, decode
from .plan import Plan, Restoring, Selection, write
from .service import BackupStore
from .spool import Spool
from .target import Target
from .tree import Entry, Skipped

# Loads in memory: 40 MiB of content, which fill 1 Gbit/s over 80 ms at any usual compression.
LOADS = 40


@dataclass(frozen=True, slots=True)
class Options:
    """How a restore is made.

    Attributes:
        paths: What is restored, with all below; everything if there are none.
        keys: A tenant's keys, if it encrypts.
        rules: What may be restored of what needs asking.
        check_contents: Whether files that are there are read, to see if they are equal.
        attempts: How often it is tried if the connection breaks: files that are there are left
            alone then.
    """

    paths: Sequence[bytes] = ()
    keys: Keys | None = None
    rules: Rules = field(default_factory=Rules)
    check_contents: bool = False
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did.

    Attributes:
        files: Files that are now as they should be.
        bytes: Their content, in bytes.
        unchanged: How many of them were so before.
        calls: Calls made.
        round_trips: Frames of calls sent; see `client.Backup`.
        wire_bytes: Bytes sent and received, protocol included.
        reported: What could not be restored as it was.
    """

    files: int
    bytes: int
    unchanged: int
    calls: int
    round_trips: int
    wire_bytes: int
    reported: int


async def restore(
    client: druvarpc.Client,
    snapshot: str,
    destination: bytes,
    options: Options | None = None,
    watch: Callable[[Restoring | Skipped], None] = lambda _: None,
) -> Restored:
    """Restores a snapshot into a directory, which is made if it does not exist.

    Files that are there and equal are left alone; others that are in the way are replaced.
    Cancelled or failed, it leaves what was written so far.

    Args:
        client: Connected to a server with a `BackupStore`. The figures count all it ever did.
        snapshot: Its id or the beginning of it, or a name for the newest of that name.
        destination: The directory's path.
        options: How to restore.
        watch: Told, in any thread, of what is not restored as it was; and first of an object that
            always says how far it is.

    Raises:
        BackupError: What the server sent is refused, or something cannot be restored.
        RpcError: The server refused, failed or went away.
        OSError: The destination cannot be made.
    """
    options = options or Options()
    run = _Run(client, options, watch)

    async def attempt() -> Restoring:
        nonlocal run
        run = _Run(client, options, watch)
        return await run.run(snapshot, destination)

    progress = await attempted(attempt, options.attempts)
    did = client.statistics()
    return Restored(
        progress.files,
        progress.size,
        progress.unchanged,
        calls=did.calls_started,
        round_trips=did.clubs_sent,
        wire_bytes=did.bytes_sent + did.bytes_received,
        reported=run.reported,
    )


class _Run:
    """One restore's stages."""

    def __init__(
        self,
        client: druvarpc.Client,
        options: Options,
        watch: Callable[[Restoring | Skipped], None],
    ) -> None:
        self._store = client.stub(BackupStore)
        self._options = options
        self._watch = watch
        self._codec = Codec(keys=options.keys)
        self._box = page_box(options.keys)
        self._free = trio.Semaphore(LOADS)
        self._threads = trio.CapacityLimiter(os.cpu_count() or 1)
        self._lock = threading.Lock()
        # Loads that are under way, and whether their contents are there.
        self._decoded: dict[Load, trio.Event] = {}
        self.reported = 0

    async def run(self, snapshot: str, destination: bytes) -> Restoring:
        async with AsyncExitStack() as stack:
            pages = await stack.enter_async_context(aclosing(self._store.pages(snapshot)))
            hold = await stack.enter_async_context(aclosing(self._store.hold()))
            # Before anything is made: there may be no such snapshot.
            first = await anext(pages, None)
            await anext(hold)
            rules = self._options.rules
            target = stack.enter_context(
                await trio.to_thread.run_sync(Target, destination, rules, self._report)
            )
            plan = Plan(
                target,
                Selection(self._options.paths),
                self._codec,
                check_contents=self._options.check_contents,
            )
            stack.callback(plan.close)
            self._watch(plan.progress)
            # What is in the channel is bounded by the free loads, so it never needs to be full.
            wanted, to_fetch = trio.open_memory_channel[Load](LOADS)
            async with trio.open_nursery() as nursery:

                def work(load: Load, chunks: list[Chunk]) -> None:
                    nursery.start_soon(self._work, plan.progress, target, load, chunks)

                nursery.start_soon(self._fetch, to_fetch, work)
                send = partial(self._send, wanted, work)
                async with wanted:
                    contents = Contents(snapshot, self._box)
                    await self._plan(plan, contents, first, pages, send)
            await trio.to_thread.run_sync(target.finish)
        return plan.progress

    async def _plan(
        self,
        plan: Plan,
        contents: Contents,
        first: Page | None,
        pages: AsyncIterator[Page],
        send: Callable[[Load], Awaitable[None]],
    ) -> None:
        # Seen again only if hard links are restored without the file they are links of.
        seen = Spool[Page](Page)
        with seen:
            page = first
            while page is not None:
                if self._options.paths and not page.ends_snapshot:
                    await trio.to_thread.run_sync(seen.append, page)
                for load in await self._in_thread(plan.add, contents.decode, page):
                    await send(load)
                page = await anext(pages, None)
            contents.end()
            if plan.end():
                for page in seen:
                    for load in await self._in_thread(plan.adopt, self._decode_page, page):
                        await send(load)
        await send(plan.finish())

    def _decode_page(self, page: Page) -> list[Entry]:
        return decode(page.data, page.chunks, self._box)

    async def _in_thread(
        self,
        act: Callable[[Sequence[Entry]], list[Load]],
        decode: Callable[[Page], list[Entry]],
        page: Page,
    ) -> list[Load]:
        return await trio.to_thread.run_sync(lambda: act(decode(page)), limiter=self._threads)

    async def _send(
        self,
        wanted: trio.MemorySendChannel[Load],
        work: Callable[[Load, list[Chunk]], None],
        load: Load,
    ) -> None:
        await self._free.acquire()
        self._decoded[load] = trio.Event()
        if load.wanted:
            await wanted.send(load)
        else:
            work(load, [])

    async def _fetch(
        self,
        source: trio.MemoryReceiveChannel[Load],
        work: Callable[[Load, list[Chunk]], None],
    ) -> None:
        # By what they want. Two that want the same, one of them after the other's was let go, are
        # served alike.
        asked: defaultdict[tuple[tuple[bytes, int], ...], list[Load]] = defaultdict(list)

        async def questions() -> AsyncIterator[list[bytes]]:
            async for load in source:
                asked[tuple(load.wanted.items())].append(load)
                yield list(load.wanted)

        answers = druvarpc.windowed(self._store.fetch, questions(), ordered=False)
        async with aclosing(answers):
            async for chunks in answers:
                key = tuple((chunk.id, chunk.size) for chunk in chunks)
                if key not in asked:
                    raise ChunkError("the server sent other chunks than it was asked for")
                loads = asked[key]
                work(loads.pop(), chunks)
                if not loads:
                    del asked[key]

    async def _work(
        self, progress: Restoring, target: Target, load: Load, chunks: list[Chunk]
    ) -> None:
        decoded = self._decoded[load]
        if load.borrowed:
            await trio.to_thread.run_sync(self._decode, load, chunks, limiter=self._threads)
            decoded.set()
            for lender in set(load.borrowed.values()):
                # Those that are not under way any more are decoded too.
                if lender in self._decoded:
                    await self._decoded[lender].wait()
            await trio.to_thread.run_sync(
                write, load, target, progress, self._lock, limiter=self._threads
            )
        else:
            await trio.to_thread.run_sync(
                self._decode_and_write, load, chunks, progress, target, limiter=self._threads
            )
            decoded.set()
        del self._decoded[load]
        self._free.release()

    def _decode(self, load: Load, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            load.contents[chunk.id] = self._codec.decode(chunk)
        chunks.clear()

    def _decode_and_write(
        self, load: Load, chunks: list[Chunk], progress: Restoring, target: Target
    ) -> None:
        self._decode(load, chunks)
        write(load, target, progress, self._lock)

    def _report(self, skipped: Skipped) -> None:
        with self._lock:
            self.reported += 1
            self._watch(skipped)
