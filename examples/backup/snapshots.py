"""Snapshots: what is known of a tree that was backed up, without reading its entries."""

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UnknownSnapshot

# A prefix of an id shorter than this is more likely a mistyped name.
MIN_PREFIX = 4


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known of a snapshot without reading its entries.

    Attributes:
        id: 32 hexadecimal digits, chosen at random.
        name: The name it was given.
        created_ns: When it was committed, in nanoseconds since 1970.
        entries: The number of its directories, files and links.
        files: The number of its files.
        size: The sum of the files' sizes, in bytes.
        chunks: The number of chunks that the files are made of, each counted as often as it occurs.
    """

    id: str
    name: str
    created_ns: int
    entries: int
    files: int
    size: int
    chunks: int


def resolve(reference: str, snapshots: Sequence[Snapshot]) -> Snapshot:
    """Returns the snapshot with this id, else the newest of this name, else by id prefix.

    Args:
        reference: What a person calls it.
        snapshots: The oldest first.

    Raises:
        UnknownSnapshot: There is none, or the prefix fits several.
    """
    named = None
    starting = []
    for snapshot in snapshots:
        if snapshot.id == reference:
            return snapshot
        if snapshot.name == reference:
            named = snapshot
        if len(reference) >= MIN_PREFIX and snapshot.id.startswith(reference):
            starting.append(snapshot)
    if named:
        return named
    if len(starting) == 1:
        return starting[0]
    if starting:
        raise UnknownSnapshot(f"the ids of {len(starting)} snapshots begin with {reference}")
    raise UnknownSnapshot(f"no snapshot has the name or id {reference}")
