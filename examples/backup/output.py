"""Files that are being restored, and the attributes that entries get."""

import grp
import os
import pwd
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from .errors import RestoreError
from .tree import Entry, Skipped

_SPECIAL = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_CAPABILITY = b"security.capability"
_OURS = (b"user.", b"trusted.", b"system.posix_acl_", _CAPABILITY)

Report = Callable[[Skipped], None]


@dataclass(frozen=True)
class Rules:
    """What of a snapshot may be restored.

    Attributes:
        owner: Owners and groups: by name if there is one of that name here, else by number.
        special: Setuid, setgid and sticky bits, and capabilities.
        devices: Device nodes.
    """

    owner: bool = field(default_factory=lambda: os.geteuid() == 0)
    special: bool = False
    devices: bool = False

    def owner_of(self, entry: Entry) -> tuple[int, int]:
        """Returns the numbers that an entry's owner and group have here."""
        return _uid(entry.user, entry.uid), _gid(entry.group, entry.gid)


class Output:
    """A file that is being restored.

    Args:
        fd: Its descriptor, which this object closes.
        entry: The file's entry, or that of its first part.
        rules: What may be restored.
        report: Told of what is not as it was.
    """

    def __init__(self, fd: int, entry: Entry, rules: Rules, report: Report) -> None:
        self._fd = fd
        self._entry = entry
        self._rules = rules
        self._report = report
        self._lock = threading.Lock()
        self._written = 0
        self._end = 0
        self._length = 0  # of what was written, holes aside

    def write(self, offset: int, content: bytes | memoryview) -> None:
        """Writes a piece, in any order and from any thread.

        Raises:
            RestoreError: It does not fit into the file, or cannot be written.
        """
        path = self._entry.path
        if offset < 0 or offset + len(content) > self._entry.size:
            raise RestoreError(path, "a piece lies outside the file")
        count = len(content)
        try:
            done = os.pwrite(self._fd, content, offset)
            while done < count:
                done += os.pwrite(self._fd, memoryview(content)[done:], offset + done)
        except OSError as error:
            raise RestoreError(path, error.strerror or str(error)) from error
        with self._lock:
            self._length = max(self._length, offset + count)
            self._count(offset, count)

    def skip(self, offset: int, size: int) -> None:
        """Leaves a hole, as a piece.

        Raises:
            RestoreError: It does not fit into the file.
        """
        if offset < 0 or size < 0 or offset + size > self._entry.size:
            raise RestoreError(self._entry.path, "a piece lies outside the file")
        with self._lock:
            self._count(offset, size)

    def finish(self, last: Entry | None = None) -> None:
        """Checks that the file is whole, sets its attributes, and closes it.

        Args:
            last: The entry of the file's last part, if it has several: its size is the file's.

        Raises:
            RestoreError: Something is missing or in excess, or an attribute cannot be set.
        """
        size = (last or self._entry).size
        entry = (last or self._entry)._replace(xattrs=self._entry.xattrs)
        try:
            # The length alone would not show what is missing.
            if self._written != size or self._end != size:
                raise RestoreError(
                    entry.path,
                    f"{self._written} bytes written, up to {self._end}; it has {size}",
                )
            if self._length < size:  # it ends with a hole
                os.ftruncate(self._fd, size)
            set_attributes(self._fd, entry, self._rules, self._report)
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RestoreError(entry.path, reason) from error
        finally:
            self.close()

    def close(self) -> None:
        """Leaves the file as it is. Does nothing after `finish` or a call before."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _count(self, offset: int, size: int) -> None:
        self._written += size
        self._end = max(self._end, offset + size)


def has_attributes(file: int, entry: Entry, rules: Rules) -> bool:
    """Whether `set_attributes` would change nothing but times.

    Raises:
        OSError: The file cannot be asked.
    """
    found = os.fstat(file)
    if rules.owner and (found.st_uid, found.st_gid) != rules.owner_of(entry):
        return False
    here = _xattrs(file)
    wanted = {name: value for name, value in entry.xattrs if _may_set(name, rules)}
    if not wanted.keys() <= here or _removable(here) - wanted.keys():
        return False
    if any(os.getxattr(file, name) != value for name, value in wanted.items()):
        return False
    return stat.S_IMODE(found.st_mode) == _mode(entry, rules)


def set_attributes(file: int | str, entry: Entry, rules: Rules, report: Report) -> None:
    """Sets owner, extended attributes, mode and times; reports what may not be set.

    Args:
        file: A descriptor, or a path that leads to what it shall be.
        entry: What to set.
        rules: What may be set.
        report: Told of what was not.

    Raises:
        OSError: A mode or a time cannot be set.
        OverflowError: The system has no such values.
    """
    # The owner first: changing it clears setuid and capabilities. What is here belongs to who
    # restores, or else in a directory with the setgid bit, or if it was here before.
    if rules.owner:
        found, owner = os.stat(file), rules.owner_of(entry)
        if (found.st_uid, found.st_gid) != owner:
            try:
                os.chown(file, *owner)
            except OSError as error:
                report(Skipped(entry.path, f"its owner: {error.strerror}"))
    set_xattrs(file, entry, rules, report)
    mode = _mode(entry, rules)
    if mode != entry.mode & 0o7777:
        report(Skipped(entry.path, "setuid, setgid and sticky bits are restored only if asked for"))
    os.chmod(file, mode)
    os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))


def set_xattrs(
    file: int | str | bytes, entry: Entry, rules: Rules, report: Report, *, follow: bool = True
) -> None:
    """Sets the extended attributes, and removes others; reports what may not be set.

    Args:
        file: A descriptor, or a path.
        entry: What to set.
        rules: What may be set.
        report: Told of what was not.
        follow: Whether a symbolic link at the path is followed.
    """
    for name in _removable(_xattrs(file, follow=follow)) - {name for name, _ in entry.xattrs}:
        try:
            os.removexattr(file, name, follow_symlinks=follow)
        except OSError as error:
            text = os.fsdecode(name)
            report(Skipped(entry.path, f"its attribute {text}, not removed: {error.strerror}"))
    for name, value in entry.xattrs:
        if not _may_set(name, rules):
            report(Skipped(entry.path, "capabilities are restored only if asked for"))
            continue
        try:
            os.setxattr(file, name, value, follow_symlinks=follow)
        except OSError as error:
            text = os.fsdecode(name)
            report(Skipped(entry.path, f"its attribute {text}: {error.strerror}"))


def _mode(entry: Entry, rules: Rules) -> int:
    return entry.mode & (0o7777 if rules.special else 0o7777 & ~_SPECIAL)


def _may_set(name: bytes, rules: Rules) -> bool:
    return name != _CAPABILITY or rules.special


def _xattrs(file: int | str | bytes, *, follow: bool = True) -> set[bytes]:
    try:
        return set(map(os.fsencode, os.listxattr(file, follow_symlinks=follow)))
    except OSError:
        return set()  # none here


def _removable(names: set[bytes]) -> set[bytes]:
    """Returns those that a backup would have had; others are the system's, as SELinux's labels."""
    return {name for name in names if name.startswith(_OURS)}


@lru_cache(maxsize=4096)
def _uid(name: str, number: int) -> int:
    if name:
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            pass
    return number


@lru_cache(maxsize=4096)
def _gid(name: str, number: int) -> int:
    if name:
        try:
            return grp.getgrnam(name).gr_gid
        except KeyError:
            pass
    return number
