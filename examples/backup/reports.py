"""What a server tells of its longer works, and of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not what was stored.

    Attributes:
        where: The file, or the part of the catalogue, and where in it.
        what: What is wrong, for people.
        chunk: The id of the chunk that is lost by it; empty if none is.
        snapshot: The id of a snapshot that needs it; empty where the damage itself is told.
        name: That snapshot's name.
        path: The path in that snapshot that is hit; empty if it is not known, as with encrypted
            snapshots, or if it is the whole snapshot.
    """

    where: str
    what: str
    chunk: bytes = b""
    snapshot: str = ""
    name: str = ""
    path: bytes = b""


@dataclass(frozen=True, slots=True)
class Checked:
    """How far a `verify` is. All counts are from its beginning.

    Attributes:
        bytes: What was read of the packs, in bytes.
        total: How much there is to be read.
        chunks: Chunks that were read.
        pages: Pages of entries that were read.
        snapshots: Snapshots that were read.
        damage: What was found since the last report.
        finished: Whether this is the last one.
    """

    bytes: int = 0
    total: int = 0
    chunks: int = 0
    pages: int = 0
    snapshots: int = 0
    damage: tuple[Damage, ...] = ()
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Collected:
    """How far a `gc` is. All counts are from its beginning.

    Attributes:
        pages: Pages of entries that were removed.
        condemned: Chunks that were found to be needed by no snapshot.
        chunks: Chunks that were removed.
        held: Condemned chunks that running backups and restores may count on.
        freed: Bytes of files that were removed, less what was written anew.
        packs: Packs that were removed.
        finished: Whether this is the last one.
    """

    pages: int = 0
    condemned: int = 0
    chunks: int = 0
    held: int = 0
    freed: int = 0
    packs: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What is stored for a tenant, and what the server's process has taken.

    Attributes:
        snapshots: The number of snapshots.
        source_bytes: The size of all their files.
        references: The chunks of all their files, each counted as often as it occurs.
        chunks: The chunks that are stored.
        content_bytes: The size of these chunks' contents: what deduplication left.
        stored_bytes: The length of their records: what compression left.
        pack_bytes: What the packs take, with what is no longer needed.
        cpu_seconds: User and system time of the server's process; None if it has tenants, whom the
            work for others would tell what those have in common with them.
        peak_memory: Its largest resident size, in bytes; None likewise.
        seconds: For how long it has been serving.
        received_bytes: The content of all chunks that were put in that time: new ones and others.
        calls: Calls that the server has answered or is at; None with tenants, as are the next two.
        reply_frames: Frames of replies that it sent.
        calls_clubbed: Replies that shared such a frame with others.
    """

    snapshots: int
    source_bytes: int
    references: int
    chunks: int
    content_bytes: int
    stored_bytes: int
    pack_bytes: int
    cpu_seconds: float | None
    peak_memory: int | None
    seconds: float
    received_bytes: int = 0
    calls: int | None = None
    reply_frames: int | None = None
    calls_clubbed: int | None = None
