"""The operating system's files, as far as packs and checksums need them: one place to make it fail.

Tests take it by another that tears writes, loses them, or runs out of space. An offset is always
given, and a write is whole or raises.
"""

import os
from pathlib import Path


class Files:
    """Files as they are. Every method raises OSError; what it did by then is not known."""

    def create(self, path: Path) -> int:
        """Makes a file, which must not exist; returns a descriptor to write it."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open(self, path: Path) -> int:
        """Returns a descriptor to read a file."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, fd: int, length: int, offset: int) -> bytes:
        """Returns so many bytes, or fewer where the file ends."""
        return os.pread(fd, length, offset)

    def write(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        """Writes all of it."""
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(fd, view[done:], offset + done)

    def cut(self, fd: int, size: int) -> None:
        """Lets a file end there."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """Returns when what was written is durable."""
        os.fsync(fd)

    def sync_directory(self, path: Path) -> None:
        """Makes the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, path: Path, data: bytes) -> None:
        """Puts a file in another one's place, durably: whoever looks finds the one or the other."""
        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        fd = self.create(fresh)
        try:
            self.write(fd, data, 0)
            self.sync(fd)
        finally:
            os.close(fd)
        fresh.rename(path)
        self.sync_directory(path.parent)

    def remove(self, path: Path) -> None:
        """Removes a file, durably, if it is there. Those who have it open go on reading."""
        path.unlink(missing_ok=True)
        self.sync_directory(path.parent)


FILES = Files()
