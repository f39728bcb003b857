"""Hard links in a tree that is being read, and may change meanwhile."""

import os
from typing import NamedTuple


class _First(NamedTuple):
    """A file that was found, and has more names."""

    path: bytes
    others: int
    size: int
    mtime_ns: int


class Links:
    """Which files were found before under other names, and are as they were then."""

    def __init__(self) -> None:
        # By device and inode.
        self._found: dict[tuple[int, int], _First] = {}

    def first(self, path: bytes, status: os.stat_result) -> bytes:
        """Returns the path of the file that this one is a hard link of; empty if there is none."""
        key, now = (status.st_dev, status.st_ino), (status.st_size, status.st_mtime_ns)
        first = self._found.pop(key, None) or _First(b"", status.st_nlink, 0, 0)
        # What has changed since is a file of its own, which further names may be links of.
        same = first.path and (first.size, first.mtime_ns) == now
        if first.others > 1:
            named = first.path if same else path
            self._found[key] = _First(named, first.others - 1, *now)
        return first.path if same else b""

    def withdraw(self, status: os.stat_result) -> None:
        """Takes back a file that was found: what was read of it is not what it was, if any."""
        key = status.st_dev, status.st_ino
        if key in self._found:
            self._found[key] = self._found[key]._replace(path=b"")
