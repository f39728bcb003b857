"""What is in a snapshot, and what differs between two: entries side by side."""

import os
import stat
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import NamedTuple

import druvarpc

from .chunks import chunk_id
from .crypt import Box
from .errors import display
from .manifest import Contents
from .service import BackupStore
from .tree import Entry, Kind, order


class Item(NamedTuple):
    """An entry with the chunks of all its parts named by the sum of their ids.

    Attributes:
        entry: The entry's last part.
        content: What tells if a file has the same content.
    """

    entry: Entry
    content: tuple[bytes, ...]


class Difference(NamedTuple):
    """What became of a path.

    Attributes:
        path: The path.
        change: "added", "removed", "content", "kind" or "attributes".
        before: The entry in the first snapshot; None if it was added.
        after: The entry in the second; None if it was removed.
    """

    path: bytes
    change: str
    before: Entry | None
    after: Entry | None


async def items(
    client: druvarpc.Client, snapshot: str, box: Box | None = None
) -> AsyncGenerator[Item, None]:
    """Yields what is in a snapshot, one page of it in memory; of a file, one item.

    Raises:
        BackupError: A page is damaged, missing, or encrypted with another key.
        RpcError: There is no such snapshot; or the server failed or went away.
    """
    # Of a very large file the ids are hashed as they come, so that memory holds one part.
    digest, begun = b"", False
    contents = Contents(snapshot, box)
    async with aclosing(client.stub(BackupStore).pages(snapshot)) as pages:
        async for page in pages:
            for entry in contents.decode(page):
                if entry.complete and not begun:
                    yield Item(entry, entry.chunks)
                    continue
                digest = chunk_id(digest + b"".join(entry.chunks))
                begun = not entry.complete
                if not begun:
                    yield Item(entry, (digest,))
                    digest = b""
    contents.end()


async def differences(
    client: druvarpc.Client, before: str, after: str, box: Box | None = None
) -> AsyncGenerator[Difference, None]:
    """Yields what differs between two snapshots, in the order of paths."""
    async with (
        aclosing(items(client, before, box)) as left_items,
        aclosing(items(client, after, box)) as right_items,
    ):
        left, right = await anext(left_items, None), await anext(right_items, None)
        while left is not None or right is not None:
            if right is None or (left is not None and _precedes(left, right)):
                assert left is not None
                yield Difference(left.entry.path, "removed", left.entry, None)
                left = await anext(left_items, None)
            elif left is None or _precedes(right, left):
                yield Difference(right.entry.path, "added", None, right.entry)
                right = await anext(right_items, None)
            else:
                if change := _change(left, right):
                    yield Difference(left.entry.path, change, left.entry, right.entry)
                left, right = await anext(left_items, None), await anext(right_items, None)


def _precedes(left: Item, right: Item) -> bool:
    return order(left.entry.path) < order(right.entry.path)


def _change(left: Item, right: Item) -> str:
    """Returns in what two items differ; empty if they do not."""
    before, after = left.entry, right.entry
    if before.kind is not after.kind:
        return "kind"
    if (before.target, before.size) != (after.target, after.size):
        return "content"
    # Where the cuts are depends on the content alone, so equal contents have equal chunks.
    if left.content != right.content and not (before.link or after.link):
        return "content"
    return "" if _attributes(before) == _attributes(after) else "attributes"


def _attributes(entry: Entry) -> Entry:
    # A directory's time says that something in it was added or removed, which is told anyway.
    mtime_ns = 0 if entry.kind is Kind.DIRECTORY else entry.mtime_ns
    return entry._replace(mtime_ns=mtime_ns, offset=0, chunks=(), sizes=())


_TYPES = {
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
    Kind.CHARACTER_DEVICE: stat.S_IFCHR,
}


def listed(entry: Entry) -> str:
    """Returns an entry as `ls -l` shows it, without its path."""
    mode = stat.filemode(_TYPES[entry.kind] | entry.mode)
    # Names come from a server, and must not do anything to a terminal.
    names = (os.fsencode(name) for name in (entry.user, entry.group))
    user, group = map(display, names)
    owner = f"{user or entry.uid} {group or entry.gid}"
    seconds = entry.mtime_ns // 1_000_000_000
    try:
        time = f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        time = f"@{seconds}"  # in a year that has not four digits
    return f"{mode} {owner:<16} {entry.size:>14,} {time:<19}"
