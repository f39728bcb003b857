"""A directory that is being restored: entries go in, and nothing ends up outside it.

Snapshots come from a server that may be hostile, and others may change the directory meanwhile.
So paths are checked, and every step down goes from one open directory to the next without
following symbolic links. Links are made last: no path of the snapshot can lead through them.
Modes and times of directories are set at the very end, since writing into them changes both. What
waits for the end is in a temporary file, not in memory.

What could not be restored as it was, but does not make the rest worthless, is *reported*: owners
that may not be set, attributes that the file system does not take, and what has to be asked for,
since the snapshot's author should not get to say which programs run with the restoring user's
rights: setuid, setgid and sticky bits, capabilities, and device nodes. So is an entry that cannot
be made, for instance since a directory that is not empty has its place.
"""

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from .errors import RestoreError, UnsafePath
from .output import Output, Rules, has_attributes, set_attributes, set_xattrs
from .spool import Spool
from .tree import DEVICES, Entry, Kind, Skipped

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# O_EXCL: a new file, never one that somebody put there, nor what a symbolic link points at.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# Without O_NONBLOCK, a FIFO that has taken a file's place would be waited for.
_OLD_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# What would hit the entries that follow as well.
_ENDS_ALL = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EBADF),
}

# Directories that each thread keeps open: the next entries most likely go to one of them.
OPEN_PARENTS = 16


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

    Args:
        path: The directory's path.
        rules: What may be restored.
        report: Told of what is not as it was.

    Attributes:
        is_new: Whether nothing was in it.

    Raises:
        OSError: The destination cannot be made or opened.
    """

    def __init__(
        self,
        path: bytes,
        rules: Rules | None = None,
        report: Callable[[Skipped], None] = lambda _: None,
    ) -> None:
        with suppress(FileExistsError):
            os.mkdir(path)
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.is_new = not os.listdir(self._root)
        self._rules = rules or Rules()
        self._report = report
        self._lock = threading.Lock()
        self._directories = Spool(Entry)
        self._links = Spool(Entry)
        self._local = threading.local()
        self._parents: list[_Parents] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Reports an entry that cannot be restored, and lets the rest go on.

        Raises:
            RestoreError: The snapshot contradicts itself, or the rest could not be restored either.
        """
        try:
            yield
        except RestoreError as error:
            cause = error.__cause__
            if cause is None or (isinstance(cause, OSError) and cause.errno in _ENDS_ALL):
                raise
            self._report(Skipped(error.path, error.reason))

    def add(self, entry: Entry) -> None:
        """Makes a directory, a FIFO or a device; or remembers a link, symbolic or hard.

        Raises:
            RestoreError: It cannot be made.
        """
        names = components(entry.path)
        if names and (entry.kind is Kind.SYMLINK or entry.link):
            components(entry.link)
            with self._lock, naming(entry.path):
                self._links.append(entry)
        elif names and (entry.kind is Kind.FIFO or entry.kind in DEVICES):
            self._make_special(entry, names)
        elif entry.kind is Kind.DIRECTORY:
            self._make_directory(entry, names)
        else:
            raise RestoreError(entry.path, "not a directory or a link")

    def open(self, entry: Entry) -> Output:
        """Makes a regular file, empty, to be written at any offsets and then finished.

        Raises:
            RestoreError: It cannot be made.
        """
        names = components(entry.path)
        if entry.kind is not Kind.FILE or not names:
            raise RestoreError(entry.path, "not a file")
        with naming(entry.path):
            parent = self._parent(names)
            try:
                fd = os.open(names[-1], _NEW_FILE, 0o600, dir_fd=parent)
            except FileExistsError:
                os.unlink(names[-1], dir_fd=parent)
                fd = os.open(names[-1], _NEW_FILE, 0o600, dir_fd=parent)
        return Output(fd, entry, self._rules, self._report)

    @contextmanager
    def existing(self, entry: Entry) -> Iterator[int | None]:
        """Opens what is at a file's path, to be read, if it is a regular file of this size.

        Yields its descriptor, or None; so it does if it cannot be read.

        Raises:
            UnsafePath: It does not lead to a place below the root.
        """
        names = components(entry.path)
        if not names:
            raise UnsafePath(entry.path, "not a file")
        fd = None
        with suppress(OSError):
            fd = os.open(names[-1], _OLD_FILE, dir_fd=self._parent(names))
        try:
            if fd is not None:
                found = os.fstat(fd)
                same = stat.S_ISREG(found.st_mode) and found.st_size == entry.size
                yield fd if same else None
            else:
                yield None
        finally:
            if fd is not None:
                os.close(fd)

    def refresh(self, fd: int, entry: Entry) -> bool:
        """Sets the attributes of a file whose content is as it should be, if it may.

        Returns whether it may: not if they are others, and the file has other names, which may lie
        outside. Then it has to be written anew.

        Raises:
            RestoreError: One cannot be set.
        """
        with naming(entry.path):
            if os.fstat(fd).st_nlink > 1:
                same = has_attributes(fd, entry, self._rules)
                return same and os.fstat(fd).st_mtime_ns == entry.mtime_ns
            set_attributes(fd, entry, self._rules, self._report)
            return True

    def finish(self) -> None:
        """Makes the links, then sets the attributes of directories.

        To be called once, after all files are finished. What fails is reported: see `going_on`.

        Raises:
            RestoreError: One of them failed, and those after it would too.
        """
        for entry in self._links:
            names = components(entry.path)
            with self.going_on(), naming(entry.path):
                self._link(entry, names[-1], self._parent(names))
        # Children first: a parent's mode may shut the way to them.
        for entry in reversed(self._directories):
            names = components(entry.path)
            with self.going_on(), naming(entry.path):
                fd = os.open(names[-1] if names else b".", _DIRECTORY, dir_fd=self._parent(names))
                try:
                    set_attributes(fd, entry, self._rules, self._report)
                finally:
                    os.close(fd)

    def close(self) -> None:
        """Releases the destination. A second call does nothing."""
        with self._lock:
            if self._root >= 0:
                os.close(self._root)
                self._root = -1
                for parents in self._parents:
                    parents.close()
                self._directories.close()
                self._links.close()

    def _make_directory(self, entry: Entry, names: list[bytes]) -> None:
        with naming(entry.path):
            if names:
                parent = self._parent(names)
                made = True
                try:
                    os.mkdir(names[-1], 0o700, dir_fd=parent)
                except FileExistsError:
                    made = False
                    fd = os.open(names[-1], _DIRECTORY, dir_fd=parent)
            else:
                made, fd = False, os.dup(self._root)
            if not made:
                try:
                    # One that was there already may not be writable.
                    os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | stat.S_IRWXU)
                finally:
                    os.close(fd)
        with self._lock, naming(entry.path):
            self._directories.append(entry)

    def _make_special(self, entry: Entry, names: list[bytes]) -> None:
        if entry.kind in DEVICES and not self._rules.devices:
            self._report(Skipped(entry.path, "a device is restored only if asked for"))
            return
        mode = {
            Kind.FIFO: stat.S_IFIFO,
            Kind.BLOCK_DEVICE: stat.S_IFBLK,
            Kind.CHARACTER_DEVICE: stat.S_IFCHR,
        }[entry.kind]
        name = names[-1]
        with naming(entry.path):
            parent = self._parent(names)
            try:
                os.mknod(name, mode | 0o600, entry.device, dir_fd=parent)
            except FileExistsError:
                os.unlink(name, dir_fd=parent)
                os.mknod(name, mode | 0o600, entry.device, dir_fd=parent)
            # O_PATH: opening a FIFO would wait, opening a device would do what the device does.
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                if stat.S_IFMT(os.fstat(fd).st_mode) != mode:
                    raise ValueError("replaced by something else meanwhile")
                set_attributes(f"/proc/self/fd/{fd}", entry, self._rules, self._report)
            finally:
                os.close(fd)

    def _link(self, entry: Entry, name: bytes, parent: int) -> None:
        if entry.link:
            names = components(entry.link)
            source = os.dup(self._parent(names))
            try:
                self._replacing(
                    name,
                    parent,
                    lambda: os.link(
                        names[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False
                    ),
                )
            finally:
                os.close(source)
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size:
                raise ValueError("a link of something else")
            return
        self._replacing(name, parent, lambda: os.symlink(entry.target, name, dir_fd=parent))
        times = (entry.mtime_ns, entry.mtime_ns)
        if self._rules.owner:
            try:
                os.chown(name, *self._rules.owner_of(entry), dir_fd=parent, follow_symlinks=False)
            except PermissionError as error:
                self._report(Skipped(entry.path, f"its owner: {error.strerror}"))
        path = b"/proc/self/fd/%d/%s" % (parent, name)
        set_xattrs(path, entry, self._rules, self._report, follow=False)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _replacing(self, name: bytes, parent: int, make: Callable[[], None]) -> None:
        try:
            make()
        except FileExistsError:
            os.unlink(name, dir_fd=parent)
            make()

    def _parent(self, names: list[bytes]) -> int:
        """Returns the directory of an entry; it stays open until this thread's next call."""
        parents: _Parents | None = getattr(self._local, "parents", None)
        if parents is None:
            parents = self._local.parents = _Parents()
            with self._lock:
                self._parents.append(parents)
        return parents.open(self._root, tuple(names[:-1]))


class _Parents:
    """Directories that one thread has open."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[bytes, ...], int] = OrderedDict()

    def open(self, root: int, names: tuple[bytes, ...]) -> int:
        """Returns a descriptor for a directory below the root, reached without following links."""
        found = self._open.get(names)
        if found is not None:
            self._open.move_to_end(names)
            return found
        fd, rest = root, names
        for depth in range(len(names) - 1, 0, -1):
            if names[:depth] in self._open:
                fd, rest = self._open[names[:depth]], names[depth:]
                break
        fd = os.dup(fd)
        for name in rest:
            try:
                below = os.open(name, _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        self._open[names] = fd
        if len(self._open) > OPEN_PARENTS:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


@contextmanager
def naming(path: bytes) -> Iterator[None]:
    """Makes errors name the path. Values that no system takes are errors of the snapshot too."""
    try:
        yield
    except OSError as error:
        raise RestoreError(path, error.strerror or str(error)) from error
    except (OverflowError, ValueError) as error:
        raise RestoreError(path, str(error)) from error
