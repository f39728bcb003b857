"""The commands that look after a store: `verify`, `forget`, `gc`."""

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace

import druvarpc

from .access import Access, keys, run
from .crypt import Keys
from .errors import BackupError, display
from .pages import decode
from .progress import size
from .reports import Checked, Collected, Damage
from .retention import Rule
from .service import BackupStore


def verify(access: Access, as_json: bool) -> int:
    """Reads all that is stored; prints what is damaged, and returns how much is."""

    async def act(client: druvarpc.Client) -> tuple[Checked, int]:
        store = client.stub(BackupStore)
        last, found = Checked(), 0
        # Of encrypted snapshots the server cannot tell the paths.
        hidden: dict[str, dict[bytes, Damage]] = {}
        async with aclosing(store.verify()) as reports:
            async for last in reports:
                found += len(last.damage)
                for damage in last.damage:
                    tell(damage)
                    if damage.snapshot and damage.chunk and not damage.path:
                        hidden.setdefault(damage.snapshot, {})[damage.chunk] = damage
        if not last.finished:
            raise BackupError("the server did not verify to the end")
        if hidden and (tenant_keys := await keys(access, client)):
            for snapshot, lost in hidden.items():
                async for damage in _paths(store, snapshot, lost, tenant_keys):
                    tell(damage)
        return last, found

    def tell(damage: Damage) -> None:
        print(json.dumps(_facts(damage)) if as_json else _line(damage))

    last, found = run(access, act)
    if as_json:
        figures = asdict(last)
        del figures["damage"], figures["finished"]
        print(json.dumps({**figures, "damaged": found, "ok": not found}))
    else:
        print(
            f"{size(last.bytes)} read: {last.chunks:,} chunks, {last.pages:,} pages,"
            f" {last.snapshots:,} snapshots; " + (f"{found:,} damaged" if found else "all intact")
        )
    return found


async def _paths(
    store: BackupStore, snapshot: str, lost: dict[bytes, Damage], tenant_keys: Keys
) -> AsyncGenerator[Damage, None]:
    """Yields the damage again, for each path that it hits."""
    async with aclosing(store.pages(snapshot)) as found:
        async for page in found:
            if page.ids().isdisjoint(lost):
                continue
            for entry in decode(page.data, page.chunks, tenant_keys.pages):
                for chunk in sorted(lost.keys() & set(entry.chunks)):
                    yield replace(lost[chunk], path=entry.path)


def forget(access: Access, snapshots: Sequence[str], as_json: bool) -> None:
    """Forgets snapshots; prints which."""
    gone = run(access, lambda client: client.stub(BackupStore).forget(list(snapshots)))
    if as_json:
        print(json.dumps({"forgotten": [snapshot.id for snapshot in gone]}))
    else:
        for snapshot in gone:
            print(f"forgot {snapshot.id} of {display(snapshot.name.encode())}")


def forget_by_rule(
    access: Access, keep: tuple[int, int, int, int, int], name: str, dry_run: bool, as_json: bool
) -> None:
    """Forgets what a rule does not keep; prints what it says of each snapshot."""
    rule = Rule(*keep)
    verdicts = run(
        access, lambda client: client.stub(BackupStore).forget_by_rule(rule, name, dry_run)
    )
    if as_json:
        print(
            json.dumps(
                {
                    "kept": [v.snapshot.id for v in verdicts if v.reasons],
                    "forgotten": [v.snapshot.id for v in verdicts if not v.reasons],
                    "dry_run": dry_run,
                }
            )
        )
        return
    for verdict in verdicts:
        what = "would forget" if dry_run else "forgot"
        says = f"kept ({', '.join(verdict.reasons)})" if verdict.reasons else what
        print(f"{says} {verdict.snapshot.id} of {display(verdict.snapshot.name.encode())}")


def collect(access: Access, as_json: bool) -> None:
    """Removes what no snapshot needs; prints how much that was."""

    async def act(client: druvarpc.Client) -> Collected:
        last = Collected()
        async with aclosing(client.stub(BackupStore).gc()) as reports:
            async for report in reports:
                last = report
        if not last.finished:
            raise BackupError("the server did not collect to the end")
        return last

    did = run(access, act)
    if as_json:
        figures = asdict(did)
        del figures["finished"]
        print(json.dumps(figures))
    else:
        print(f"{did.chunks:,} chunks and {did.packs:,} packs removed, {size(did.freed)} freed")
        if did.held:
            print(f"{did.held:,} chunks stay until those that may need them have ended")


def _facts(damage: Damage) -> dict[str, object]:
    return {
        "damage": damage.what,
        "where": damage.where,
        "chunk": damage.chunk.hex(),
        "snapshot": damage.snapshot,
        "name": damage.name,
        "path": display(damage.path),
    }


def _line(damage: Damage) -> str:
    line = f"{damage.where}: {damage.what}"
    if damage.snapshot:
        line += f": snapshot {damage.snapshot} of {damage.name}"
    if damage.path:
        line += f": {display(damage.path)}"
    return display(line.encode())
