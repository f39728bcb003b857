"""What can go wrong with a backup, apart from what the operating system reports."""

from collections.abc import Sequence


def display(path: bytes) -> str:
    """Returns a path for people: on one line, whatever bytes it has."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class BackupError(Exception):
    """The base of all errors of this package."""


class BadAddress(BackupError):
    """What was given as a server's URL is none."""


class Interrupted(BackupError):
    """A signal told the process to stop."""


class ChunkError(BackupError):
    """A chunk is not what its id and its size say."""


class PageError(BackupError):
    """A page of a snapshot is damaged, or encrypted with another key."""


class CacheDamaged(BackupError):
    """What the client remembers of the last backup contradicts itself."""


class KeyRefused(BackupError):
    """There is no key, another one is there, or the passphrase is not the key's."""


class PackError(BackupError):
    """A pack file does not hold what the catalogue says it does."""


class PackMissing(PackError):
    """A pack is not there. Chunks that it had may have been moved to another one."""


class CatalogueError(BackupError):
    """The catalogue is damaged, or was made by a version of this program that is newer."""


class KeyExists(BackupError):
    """The tenant has a key already, or backups that are not encrypted."""


class Busy(BackupError):
    """Another call is doing the same."""


class TenantsError(BackupError):
    """The file of tenants cannot be used, or a tenant's name is none."""


class StoreLocked(BackupError):
    """Another process uses the store."""


class StoreFailed(BackupError):
    """The store could not write. What was being put is not stored."""


class UnknownChunks(BackupError):
    """Chunks were named that the store does not have.

    Attributes:
        ids: The ids of these chunks.
    """

    def __init__(self, ids: Sequence[bytes]) -> None:
        super().__init__(f"{len(ids)} chunks are not in the store, {ids[0].hex()} first")
        self.ids = ids


class UnknownBase(BackupError):
    """The snapshot that a new one is to be based on is not there."""


class UnknownSnapshot(BackupError):
    """No snapshot, or more than one, goes by that name or id."""


class InvalidEntry(BackupError):
    """An entry of a tree contradicts itself, those before it, or the chunks it names.

    Attributes:
        path: The entry's path.
        reason: What is wrong with it.
    """

    def __init__(self, path: bytes, reason: str) -> None:
        super().__init__(f"{display(path)}: {reason}")
        self.path = path
        self.reason = reason


class RestoreError(BackupError):
    """An entry could not be restored.

    Attributes:
        path: The entry's path.
        reason: Why.
    """

    def __init__(self, path: bytes, reason: str) -> None:
        super().__init__(f"{display(path)}: {reason}")
        self.path = path
        self.reason = reason


class UnsafePath(RestoreError):
    """An entry's path does not name a place inside the destination."""
