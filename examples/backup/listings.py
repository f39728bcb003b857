"""The commands that show what is stored: `snapshots`, `ls`, `diff`, `stats`."""

import json
from contextlib import aclosing
from dataclasses import asdict
from datetime import datetime

import druvarpc

from . import compare
from .access import Access, keys, run
from .commands import per_core
from .crypt import page_box
from .errors import display
from .plan import Selection
from .progress import size
from .service import BackupStore
from .tree import Entry

SIGNS = {"added": "+", "removed": "-", "content": "M", "attributes": "U", "kind": "T"}


def snapshots(access: Access, as_json: bool) -> None:
    """Prints the snapshots, the oldest first."""
    found = run(access, lambda client: client.stub(BackupStore).snapshots())
    if as_json:
        print(json.dumps({"snapshots": [asdict(snapshot) for snapshot in found]}))
        return
    for snapshot in found:
        made = datetime.fromtimestamp(snapshot.created_ns / 1e9).astimezone()
        print(
            f"{snapshot.id}  {made:%Y-%m-%d %H:%M:%S}  {snapshot.files:>9,} files"
            f"  {size(snapshot.size):>9}  {display(snapshot.name.encode())}"
        )


def entries(access: Access, snapshot: str, paths: tuple[bytes, ...], as_json: bool) -> None:
    """Prints what is in a snapshot."""

    async def act(client: druvarpc.Client) -> None:
        found = await keys(access, client)
        selection = Selection(paths)
        count = 0
        async with aclosing(compare.items(client, snapshot, page_box(found))) as items:
            async for entry, _ in items:
                if selection.takes(entry.path):
                    count += 1
                    print(json.dumps(_facts(entry)) if as_json else _line(entry))
        selection.check()
        if as_json:
            print(json.dumps({"entries": count}))

    run(access, act)


def differences(access: Access, before: str, after: str, as_json: bool) -> None:
    """Prints what differs between two snapshots."""

    async def act(client: druvarpc.Client) -> None:
        found = await keys(access, client)
        box = page_box(found)
        counts = dict.fromkeys(SIGNS, 0)
        async with aclosing(compare.differences(client, before, after, box)) as changes:
            async for path, change, old, new in changes:
                counts[change] += 1
                if as_json:
                    sizes = {"before": old and old.size, "after": new and new.size}
                    print(json.dumps({"path": display(path), "change": change, **sizes}))
                else:
                    print(f"{SIGNS[change]} {display(path)}")
        if as_json:
            print(json.dumps(counts))

    run(access, act)


def usage(access: Access, as_json: bool) -> None:
    """Prints what is stored, and what it took."""
    found = run(access, lambda client: client.stub(BackupStore).usage())
    if as_json:
        print(json.dumps(asdict(found)))
        return
    print(f"{found.snapshots:,} snapshots of {size(found.source_bytes)}")
    print(
        f"deduplication left {found.chunks:,} of {found.references:,} chunks:"
        f" {size(found.content_bytes)}{_share(found.content_bytes, found.source_bytes)}"
    )
    print(
        f"compression left {size(found.stored_bytes)}"
        f"{_share(found.stored_bytes, found.content_bytes)};"
        f" {size(found.pack_bytes)} with what gc could remove"
    )
    if found.cpu_seconds is not None and found.peak_memory is not None:
        print(
            f"in the {found.seconds:,.0f} s since its start the server used"
            f" {found.cpu_seconds:.1f} s of CPU, and {size(found.peak_memory)} of memory at most;"
            f" it was sent {size(found.received_bytes)}:"
            f" {per_core(found.received_bytes, found.cpu_seconds)}"
        )
    if found.calls is not None and found.reply_frames is not None:
        print(
            f"clubbing: it answered {found.calls:,} calls with {found.reply_frames:,} frames;"
            f" {found.calls_clubbed or 0:,} replies shared one with others"
        )


def _share(part: int, whole: int) -> str:
    return f" ({part / whole:.1%})" if whole else ""


def _facts(entry: Entry) -> dict[str, object]:
    return {
        "path": display(entry.path),
        "kind": entry.kind.name.lower(),
        "mode": f"{entry.mode:04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "user": entry.user,
        "group": entry.group,
        "size": entry.size,
        "mtime_ns": entry.mtime_ns,
        "target": display(entry.target),
        "link": display(entry.link),
        "xattrs": [display(name) for name, _ in entry.xattrs],
    }


def _line(entry: Entry) -> str:
    arrow = f" -> {display(entry.target)}" if entry.target else ""
    other = f" = {display(entry.link)}" if entry.link else ""
    return f"{compare.listed(entry)} {display(entry.path) or '.'}{arrow}{other}"
