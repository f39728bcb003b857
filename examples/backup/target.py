"""A directory that is being restored: entries go in, and nothing ends up outside it.

Snapshots come from a server that may be hostile, and others may change the directory meanwhile.
So paths are checked, and every step down goes from one open directory to the next without
following symbolic links. Links are made last: no path of the snapshot can lead through them.
Modes and times of directories are set at the very end, since writing into them changes both.
"""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from .errors import RestoreError, UnsafePath
from .tree import Entry, Kind

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# O_EXCL: a new file, never one that somebody put there, nor what a symbolic link points at.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# Restored permissions leave out setuid, setgid and sticky: the snapshot's author does not get to
# say which programs run with the restoring user's rights.
_PERMISSIONS = 0o777


def components(path: bytes) -> list[bytes]:
    """Returns the names that make up an entry's path; none for the root.

    Raises:
        UnsafePath: It does not lead to a place below the root.
    """
    names = path.split(b"/") if path else []
    if b"\0" in path or not {b"", b".", b".."}.isdisjoint(names):
        raise UnsafePath(path, "not a path inside the destination")
    return names


class Target:
    """A destination directory, made if it does not exist.

    Directories must be added before what is in them. What exists at a file's or a link's path is
    replaced unless it is a directory; everything else is left alone. Methods may be called from
    any thread.

    Raises:
        OSError: The destination cannot be made or opened.
    """

    def __init__(self, path: bytes) -> None:
        with suppress(FileExistsError):
            os.mkdir(path)
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._directories: list[Entry] = []
        self._links: list[Entry] = []
        # Where the last entry went: the next one most likely goes there too.
        self._parent: tuple[list[bytes], int] = ([], os.dup(self._root))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, entry: Entry) -> None:
        """Makes a directory, or remembers a symbolic link.

        Raises:
            RestoreError: It cannot be made.
        """
        names = components(entry.path)
        if entry.kind is Kind.SYMLINK and names:
            self._links.append(entry)
            return
        if entry.kind is not Kind.DIRECTORY:
            raise RestoreError(entry.path, "not a directory or a symbolic link")
        with self._lock, _naming(entry.path):
            if names:
                parent = self._open_parent(names)
                with suppress(FileExistsError):
                    os.mkdir(names[-1], 0o700, dir_fd=parent)
                fd = os.open(names[-1], _DIRECTORY, dir_fd=parent)
            else:
                fd = os.dup(self._root)
            try:
                # One that was there already may not be writable.
                os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | stat.S_IRWXU)
            finally:
                os.close(fd)
            self._directories.append(entry)

    def open(self, entry: Entry) -> "Output":
        """Makes a regular file, empty, to be written at any offsets and then finished.

        Raises:
            RestoreError: It cannot be made.
        """
        names = components(entry.path)
        if entry.kind is not Kind.FILE or not names:
            raise RestoreError(entry.path, "not a file")
        with self._lock, _naming(entry.path):
            parent = self._open_parent(names)
            try:
                fd = os.open(names[-1], _NEW_FILE, 0o600, dir_fd=parent)
            except FileExistsError:
                os.unlink(names[-1], dir_fd=parent)
                fd = os.open(names[-1], _NEW_FILE, 0o600, dir_fd=parent)
        return Output(fd, entry)

    def finish(self) -> None:
        """Makes the symbolic links, then sets the modes and times of directories.

        To be called once, after all files are finished.

        Raises:
            RestoreError: One of them failed. Those after it are left undone.
        """
        for entry in self._links:
            names = components(entry.path)
            with self._lock, _naming(entry.path):
                self._link(entry, names[-1], self._open_parent(names))
        # Children first: a parent's mode may shut the way to them.
        for entry in reversed(self._directories):
            names = components(entry.path)
            with self._lock, _naming(entry.path):
                fd = os.open(
                    names[-1] if names else b".", _DIRECTORY, dir_fd=self._open_parent(names)
                )
                try:
                    _set_attributes(fd, entry)
                finally:
                    os.close(fd)

    def close(self) -> None:
        """Releases the destination. A second call does nothing."""
        with self._lock:
            if self._root >= 0:
                os.close(self._root)
                os.close(self._parent[1])
                self._root, self._parent = -1, ([], -1)

    def _open_parent(self, names: list[bytes]) -> int:
        """Returns the directory of an entry; it stays open until the next call."""
        parents = names[:-1]
        known, fd = self._parent
        if parents == known:
            return fd
        fd = os.dup(self._root)
        for name in parents:
            try:
                below = os.open(name, _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        os.close(self._parent[1])
        self._parent = parents, fd
        return fd

    def _link(self, entry: Entry, name: bytes, parent: int) -> None:
        try:
            os.symlink(entry.target, name, dir_fd=parent)
        except FileExistsError:
            os.unlink(name, dir_fd=parent)
            os.symlink(entry.target, name, dir_fd=parent)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)


class Output:
    """A file that is being restored.

    Args:
        fd: Its descriptor, which this object closes.
        entry: The file's entry, or that of its first part.
    """

    def __init__(self, fd: int, entry: Entry) -> None:
        self._fd = fd
        self._entry = entry
        self._lock = threading.Lock()
        self._written = 0

    def write(self, offset: int, content: bytes | memoryview) -> None:
        """Writes a piece, in any order and from any thread.

        Raises:
            RestoreError: It does not fit into the file, or cannot be written.
        """
        path = self._entry.path
        if offset < 0 or offset + len(content) > self._entry.size:
            raise RestoreError(path, "a piece lies outside the file")
        with _naming(path):
            view = memoryview(content)
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
        with self._lock:
            self._written += len(content)

    def finish(self, last: Entry | None = None) -> None:
        """Checks that the file is whole, sets its mode and time, and closes it.

        Args:
            last: The entry of the file's last part, if it has several: its size is the file's.

        Raises:
            RestoreError: Something is missing or in excess, or an attribute cannot be set.
        """
        entry = last or self._entry
        try:
            with _naming(entry.path):
                length = os.fstat(self._fd).st_size
                # Length alone would not show a hole.
                if length != entry.size or self._written != entry.size:
                    raise RestoreError(
                        entry.path,
                        f"{self._written} bytes written, up to {length}; it has {entry.size}",
                    )
                _set_attributes(self._fd, entry)
        finally:
            self.close()

    def close(self) -> None:
        """Leaves the file as it is. Does nothing after `finish` or a call before."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _set_attributes(fd: int, entry: Entry) -> None:
    os.fchmod(fd, entry.mode & _PERMISSIONS)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


@contextmanager
def _naming(path: bytes) -> Iterator[None]:
    """Makes errors name the path. Values that no system takes are errors of the snapshot too."""
    try:
        yield
    except OSError as error:
        raise RestoreError(path, error.strerror or str(error)) from error
    except (ValueError, OverflowError) as error:
        raise RestoreError(path, str(error)) from error
