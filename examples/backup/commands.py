"""The commands `backup` and `restore`: what they do, and what they print."""

import json
import os
import resource
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import trio

import druvarpc

from . import client as backups
from . import restore as restores
from .access import Access, keys, run
from .cache import cache_file
from .chunks import compression_of
from .crypt import Keys
from .excludes import excluding
from .output import Rules
from .progress import Reporter, size
from .service import BackupStore
from .tree import measure

T = TypeVar("T")

# Backups and restores are begun anew so often after the connection broke: for some 4 seconds.
ATTEMPTS = 5


@dataclass(frozen=True)
class BackupRequest:
    """What `backup` was asked for; see its options."""

    path: bytes
    name: str
    exclude: tuple[str, ...]
    exclude_from: tuple[Path, ...]
    compression: str
    encrypt: bool
    use_cache: bool


@dataclass(frozen=True)
class RestoreRequest:
    """What `restore` was asked for; see its options."""

    snapshot: str
    destination: bytes
    paths: tuple[bytes, ...]
    check_contents: bool
    owner: bool | None
    setuid: bool
    devices: bool


def backup(access: Access, request: BackupRequest, as_json: bool) -> int:
    """Backs up, and prints what was done; returns how much was skipped."""
    # Before anything is sent, and with the system's own words.
    os.listdir(request.path)
    compression = compression_of(request.compression)
    excluded = excluding(request.exclude, request.exclude_from)
    access.check(encrypt=request.encrypt)
    reporter = Reporter("backup", as_json=as_json)

    async def act(client: druvarpc.Client) -> backups.Backup:
        tenant_keys = await keys(access, client, create=request.encrypt)
        options = backups.Options(
            _cache_file(access, request, tenant_keys),
            compression,
            tenant_keys,
            excluded,
            attempts=ATTEMPTS,
        )

        async def total() -> None:
            reporter.expect(*await trio.to_thread.run_sync(measure, request.path, excluded))

        work = backups.back_up(client, request.path, request.name, options, reporter.watch)
        return await _reported(reporter, total, work)

    begin = time.perf_counter()
    did = run(access, act)
    seconds = time.perf_counter() - begin
    made = did.snapshot
    cpu = cpu_seconds()
    if as_json:
        figures = {
            "snapshot": made.id,
            "name": made.name,
            "files": made.files,
            "unchanged": did.unchanged,
            "source_bytes": made.size,
            "chunks": made.chunks,
            "new_chunks": did.new_chunks,
            "new_bytes": did.new_bytes,
            "stored_bytes": did.stored_bytes,
            "calls": did.calls,
            "round_trips": did.round_trips,
            "wire_bytes": did.wire_bytes,
            "skipped": did.skipped,
            "cpu_seconds": round(cpu, 4),
            "seconds": round(seconds, 4),
        }
        print(json.dumps(figures))
    else:
        print(f"snapshot {made.id} of {made.name}")
        print(
            f"{made.files:,} files, {size(made.size)}, in {seconds:.1f} s;"
            f" {did.unchanged:,} files were as before"
        )
        print(
            f"{made.chunks:,} chunks, {did.new_chunks:,} of them new ({size(did.new_bytes)},"
            f" compressed {size(did.stored_bytes)}); {size(did.wire_bytes)} over the network,"
            f" {did.calls:,} calls in {did.round_trips:,} frames"
        )
        print(f"{cpu:.2f} s of CPU: {per_core(made.size, cpu)}")
    return did.skipped


def restore(access: Access, request: RestoreRequest, as_json: bool) -> int:
    """Restores, and prints what was done; returns how much was not restored as it was."""
    reporter = Reporter("restore", as_json=as_json)
    owner = os.geteuid() == 0 if request.owner is None else request.owner

    async def act(client: druvarpc.Client) -> restores.Restored:
        options = restores.Options(
            request.paths,
            await keys(access, client),
            Rules(owner, request.setuid, request.devices),
            request.check_contents,
            attempts=ATTEMPTS,
        )

        async def total() -> None:
            if not request.paths:
                for snapshot in await client.stub(BackupStore).snapshots():
                    if request.snapshot in (snapshot.id, snapshot.name):
                        reporter.expect(snapshot.files, snapshot.size)

        work = restores.restore(
            client, request.snapshot, request.destination, options, reporter.watch
        )
        return await _reported(reporter, total, work)

    begin = time.perf_counter()
    did = run(access, act)
    seconds = time.perf_counter() - begin
    cpu = cpu_seconds()
    if as_json:
        print(
            json.dumps({**asdict(did), "cpu_seconds": round(cpu, 4), "seconds": round(seconds, 4)})
        )
    else:
        print(
            f"{did.files:,} files, {size(did.bytes)}, in {seconds:.1f} s;"
            f" {did.unchanged:,} files were there"
        )
        print(
            f"{size(did.wire_bytes)} over the network, {did.calls:,} calls in"
            f" {did.round_trips:,} frames; {cpu:.2f} s of CPU: {per_core(did.bytes, cpu)}"
        )
    return did.reported


def cpu_seconds() -> float:
    """Returns what this process has used of processors, in seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def per_core(count: int, seconds: float) -> str:
    """Returns bytes and seconds of CPU as GB per hour and core."""
    return f"{count / 1e9 / (seconds / 3600):,.0f} GB per hour and core" if seconds else ""


def _cache_file(access: Access, request: BackupRequest, found: Keys | None) -> Path | None:
    if not request.use_cache:
        return None
    fingerprint = found.fingerprint if found else b""
    root = os.path.realpath(request.path)
    identity = (access.server, access.token() or "", request.name, root, fingerprint)
    return cache_file(access.cache_directory(), *identity)


async def _reported(
    reporter: Reporter, total: Callable[[], Awaitable[None]], work: Awaitable[T]
) -> T:
    """Awaits the work, and reports meanwhile how far it is."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reporter.run)
        if reporter.wants_total:
            nursery.start_soon(total)
        result = await work
        nursery.cancel_scope.cancel()
    return result
