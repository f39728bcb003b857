"""Directory trees with anything in them, for Hypothesis; planted, changed, and described."""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import strategies as st

from examples.backup import tree
from examples.backup.tree import Entry, Found, Kind

BLOCK = 4096


@dataclass(frozen=True)
class Node:
    """A file, directory, symbolic link, hard link of an earlier file, or FIFO."""

    kind: str
    content: bytes = b""
    # Of a sparse file: whether each stretch is a hole, and its length in blocks.
    stretches: tuple[tuple[bool, int], ...] = ()
    below: dict[bytes, "Node"] = field(default_factory=dict)
    mode: int = 0o644
    mtime_ns: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


names = st.binary(min_size=1, max_size=8).filter(
    lambda name: name not in (b".", b"..") and not set(name) & set(b"/\0")
)
contents = st.one_of(
    st.binary(max_size=50),
    st.builds(
        lambda seed, size: random.Random(seed).randbytes(size),
        st.integers(0, 3),
        st.integers(0, 300_000),
    ),
    st.builds(lambda byte, size: byte * size, st.sampled_from([b"\0", b"x"]), st.integers(0, 9999)),
)
modes = st.integers(0, 0o777)
times = st.integers(0, 1 << 60)
xattrs = st.dictionaries(
    st.sampled_from([b"user.a", b"user.b", b"user.\xff"]), st.binary(max_size=20), max_size=2
)
leaves = st.one_of(
    st.builds(Node, st.just("file"), contents, mode=modes, mtime_ns=times, xattrs=xattrs),
    st.builds(
        Node,
        st.just("sparse"),
        stretches=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=4).map(tuple),
        mtime_ns=times,
    ),
    st.builds(Node, st.just("symlink"), st.binary(min_size=1, max_size=9), mtime_ns=times).filter(
        lambda node: b"\0" not in node.content
    ),
    st.just(Node("hard link")),
    st.builds(Node, st.just("fifo"), mode=modes, mtime_ns=times),
)


def directories(below: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.builds(
        Node,
        st.just("directory"),
        below=st.dictionaries(names, below, max_size=4),
        # Hypothesis's own user has to get into them.
        mode=modes.map(lambda mode: mode | 0o700),
        mtime_ns=times,
        xattrs=xattrs,
    )


trees = directories(st.recursive(leaves, directories, max_leaves=12))


def plant(path: bytes, node: Node, files: list[bytes] | None = None) -> None:
    """Makes what a node says at a path where nothing is."""
    files = [] if files is None else files
    match node.kind:
        case "directory":
            os.mkdir(path)
            for name, below in node.below.items():
                plant(os.path.join(path, name), below, files)
        case "symlink":
            os.symlink(node.content, path)
            os.utime(path, ns=(0, node.mtime_ns), follow_symlinks=False)
            return
        case "hard link":
            if files:
                os.link(files[0], path)
            return
        case "fifo":
            os.mkfifo(path)
        case _:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.pwrite(fd, node.content, 0)
            end = len(node.content)
            for hole, blocks in node.stretches:
                if not hole:
                    os.pwrite(fd, random.Random(end).randbytes(blocks * BLOCK), end)
                end += blocks * BLOCK
            os.ftruncate(fd, end)
            os.close(fd)
            files.append(path)
    for name, value in node.xattrs.items():
        os.setxattr(path, name, value)
    os.chmod(path, node.mode)
    os.utime(path, ns=(0, node.mtime_ns))


def described(root: Path) -> list[tuple[Entry, bytes]]:
    """Returns all that a backup has to keep of a tree."""
    place = os.fsencode(root)
    found = []
    for item in tree.scan(place):
        assert isinstance(item, Found)
        entry = tree.describe(place, item)
        full = Path(os.fsdecode(os.path.join(place, entry.path)))
        found.append((entry, full.read_bytes() if entry.kind is Kind.FILE else b""))
    return found
