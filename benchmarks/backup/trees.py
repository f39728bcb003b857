"""The tree that is backed up: files of a Python installation; and what makes two trees equal.

No file is read at once: a child's peak memory, as the kernel counts it, is at least the peak of
this process when the child began.
"""

import filecmp
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SIZE = 300_000_000
# Of every directory of the tree: copying would leave the time at which it was done.
MADE_NS = 1_700_000_000 * 10**9


@dataclass(frozen=True)
class Tree:
    """What was backed up.

    Attributes:
        path: of its root.
        files: their number; nothing but regular files and directories is there.
        size: their bytes.
        digest: of all names and contents, so that two results can be known to be of the same tree.
    """

    path: Path
    files: int
    size: int
    digest: str


def installation() -> Path:
    """Return the libraries that come nearest to SIZE of this Python and those installed beside it.

    Of the installations that a version manager keeps, each has another size.
    """
    own = Path(sys.base_prefix)
    found = {
        home / "lib"
        for home in (own, *own.parent.iterdir())
        if any(home.glob("lib/python3*/os.py"))
    }
    return min(sorted(found), key=lambda lib: abs(SIZE - sum(size for _, size in regular(lib))))


def build(source: Path, into: Path, most: int = SIZE) -> Tree:
    """Copy regular files, in the order of their paths, until there are `most` bytes."""
    files = size = 0
    digest = hashlib.sha256()
    for path, length in regular(source):
        if size + length > most:
            continue
        target = into / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
        files, size = files + 1, size + length
        digest.update(f"{path.relative_to(source)}\n".encode())
        with target.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for folder, _, _ in os.walk(into, topdown=False):
        os.utime(folder, ns=(MADE_NS, MADE_NS))
    return Tree(into, files, size, digest.hexdigest()[:16])


def regular(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the regular files below a directory and their sizes, in a fixed order."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield path, status.st_size


def difference(left: Path, right: Path) -> str:
    """Return the first thing in which two trees differ, or nothing."""
    names = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (left, right)
    ]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))
        return f"{odd[0]} is in one of them alone"
    for name in names[0]:
        one, other = (left / name).lstat(), (right / name).lstat()
        if (one.st_mode, one.st_mtime_ns) != (other.st_mode, other.st_mtime_ns):
            return f"{name} has another mode or time"
        if stat.S_ISREG(one.st_mode) and not filecmp.cmp(left / name, right / name, shallow=False):
            return f"{name} has other content"
    return ""
