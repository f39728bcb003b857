"""What a disk may hold after a power loss, from a log of all that was done to it.

A file's content is safe from its last fsync on, a name from the last fsync of its directory; what
came later may be there, or not, or half of a write. The names of a directory change in their order,
as journals keep it; writes don't, not even those to one file. This is the model of the ALICE paper
(Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014), without its finer points.
"""

import enum
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HEAD = struct.Struct("<BIIQ")


class Kind(enum.IntEnum):
    """What was done. As in shim.c."""

    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    SYNC = 4
    RENAME = 5
    REMOVE = 6
    MAKE_DIRECTORY = 7
    MARK = 8


@dataclass(frozen=True)
class Operation:
    """What was done, to which path; the data of a write, the new path of a renaming."""

    kind: Kind
    path: str
    data: bytes
    at: int


def operations(log: Path) -> Iterator[Operation]:
    """Yields what a log tells."""
    content = log.read_bytes()
    here = 0
    while here < len(content):
        kind, path_size, data_size, at = HEAD.unpack_from(content, here)
        path = here + HEAD.size
        data = path + path_size
        here = data + data_size
        yield Operation(Kind(kind), os.fsdecode(content[path:data]), content[data:here], at)


@dataclass(eq=False)
class Node:
    """A file or directory, whatever its name.

    Attributes:
        changes: of a file, its writes and truncations in their order.
        synced: how many of them are safe.
        directory: whether it is one.
    """

    directory: bool = False
    changes: list[Operation] = field(default_factory=list)
    synced: int = 0

    def content(self, kept: int, chance: random.Random | None = None) -> bytearray:
        """Returns the content with the first `kept` changes, and by chance some of the others."""
        content = bytearray()
        for number, change in enumerate(self.changes):
            data, at = change.data, change.at
            if number >= kept:
                fate = chance.choice(("lost", "torn", "kept")) if chance else "lost"
                if fate == "lost":
                    continue
                if fate == "torn":
                    data = data[: len(data) // 2]
            if change.kind is Kind.TRUNCATE:
                del content[at:]
                content.extend(bytes(at - len(content)))
            else:
                content.extend(bytes(max(0, at - len(content))))
                content[at : at + len(data)] = data
        return content


# What happens to names: each of these is told what, or None for nothing, at once.
Names = dict[str, Node | None]


class Power:
    """The disk as it is while the log goes on, and as it would be if the power were lost now.

    Args:
        root: The directory that the log is of. It was empty.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._names: dict[str, Node] = {root: Node(directory=True)}
        # By directory: the changes of its names that are not safe.
        self._pending: dict[str, list[Names]] = {}
        self._safe: dict[str, Node] = dict(self._names)

    def act(self, operation: Operation) -> None:
        """Does what was done."""
        path = operation.path
        match operation.kind:
            case Kind.CREATE:
                self._rename(path, {path: Node()})
            case Kind.MAKE_DIRECTORY:
                self._rename(path, {path: Node(directory=True)})
            case Kind.REMOVE:
                self._rename(path, {path: None})
            case Kind.RENAME:
                new = os.fsdecode(operation.data)
                self._rename(new, {path: None, new: self._names[path]})
            case Kind.WRITE | Kind.TRUNCATE if path in self._names:
                self._names[path].changes.append(operation)
            case Kind.SYNC if path in self._names:
                node = self._names[path]
                node.synced = len(node.changes)
                for change in self._pending.pop(path, []) if node.directory else []:
                    apply(self._safe, change)
            case _:
                pass

    def whole(self, into: Path) -> None:
        """Makes the disk of a process that was killed: nothing is lost."""
        self._make(into, self._names, lambda node: node.content(len(node.changes)))

    def least(self, into: Path) -> None:
        """Makes the disk on which only what is safe is left."""
        self._make(into, self._safe, lambda node: node.content(node.synced))

    def emptied(self, into: Path) -> None:
        """Makes the disk that has all names, and of the contents only what is safe."""
        self._make(into, self._names, lambda node: node.content(node.synced))

    def some(self, into: Path, chance: random.Random) -> None:
        """Makes a disk that has some of what is not safe, and some of it torn."""
        names = dict(self._safe)
        for changes in self._pending.values():
            for change in changes[: chance.randint(0, len(changes))]:
                apply(names, change)
        self._make(into, names, lambda node: node.content(node.synced, chance))

    def _rename(self, path: str, change: Names) -> None:
        apply(self._names, change)
        self._pending.setdefault(os.path.dirname(path), []).append(change)

    def _make(
        self, into: Path, names: dict[str, Node], content: Callable[[Node], bytearray]
    ) -> None:
        into.mkdir()
        for path, node in sorted(names.items()):
            if path == self._root or not self._reached(path, names):
                continue
            target = into / os.path.relpath(path, self._root)
            if node.directory:
                target.mkdir()
            else:
                target.write_bytes(content(node))

    def _reached(self, path: str, names: dict[str, Node]) -> bool:
        parent = os.path.dirname(path)
        return parent == self._root or (parent in names and self._reached(parent, names))


def apply(names: dict[str, Node], change: Names) -> None:
    """Changes names."""
    for path, node in change.items():
        if node is None:
            names.pop(path, None)
        else:
            names[path] = node
