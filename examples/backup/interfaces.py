"""What a store is made of: where chunks are kept, and the catalogue of what is where.

Both are small, so that they can be kept elsewhere than in files and SQLite: packs are objects that
are written once, read in ranges and removed; the catalogue is keys, values and transactions over a
few of them. `tests/examples` has one suite for each, which every implementation has to pass.

Methods block, and may be called from any thread unless they say otherwise.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .chunks import Chunk
from .pages import Page
from .snapshots import Snapshot


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record is.

    Attributes:
        pack: The pack's number.
        offset: Where in it the record begins, in bytes.
        length: The whole record's length in bytes, with its header.
    """

    pack: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Stored:
    """What the catalogue says of a chunk.

    Attributes:
        id: Its id.
        where: Where its record is.
        size: Its content's size, in bytes.
        condemned: The generation in which it was condemned; 0 if it was not. See `leases`.
        lost: Whether its record was found to be damaged, so that it has to be put again.
    """

    id: bytes
    where: Location
    size: int
    condemned: int = 0
    lost: bool = False


@dataclass(frozen=True, slots=True)
class PackUse:
    """What the catalogue says of a pack.

    Attributes:
        number: Its number.
        end: What of it counts, in bytes from its beginning. What may follow was never acknowledged.
        used: The length of the records that the catalogue names, in bytes.
        chunks: How many they are.
        content: The size of these chunks' contents, in bytes.
    """

    number: int
    end: int = 0
    used: int = 0
    chunks: int = 0
    content: int = 0


class PackStore(Protocol):
    """Where chunks are kept. See `packs.Packs` for what each method promises.

    One thread at a time appends, syncs, seals and removes.
    """

    @property
    def current(self) -> int:
        """The number of the pack that is appended to; 0 if none is."""
        ...

    @property
    def first(self) -> int:
        """Where a pack's first record begins."""
        ...

    def numbers(self) -> list[int]:
        """Returns the numbers of all packs, ascending."""
        ...

    def append(self, chunks: Sequence[Chunk]) -> list[Location]:
        """Writes chunks and returns their locations. They are durable after the next `sync`."""
        ...

    def sync(self) -> None:
        """Returns when all that was appended is durable."""
        ...

    def seal(self) -> None:
        """Lets the next chunk begin a new pack."""
        ...

    def remove(self, number: int) -> None:
        """Removes a pack, if it is there. A read that has begun may go on, or raise PackMissing."""
        ...

    def read(self, locations: Iterable[Location]) -> Iterator[Chunk]:
        """Yields the chunks at these locations, or raises PackMissing or PackError."""
        ...

    def scan(self, number: int, offset: int = 0) -> Iterator[tuple[Location, Chunk]]:
        """Yields a pack's records from this place on, up to its end or to what is no record."""
        ...

    def close(self) -> None:
        """Releases what it holds."""
        ...


class CatalogueStore(Protocol):
    """What is where. What a method has changed is durable when it returns, and whole or not at all.

    But for `add`, of which a kill or a crash of the machine may undo the last ones: whoever opens a
    store adds again what packs have beyond their ends. Every method may raise CatalogueError.
    """

    # Chunks.

    def find(self, ids: Sequence[bytes]) -> dict[bytes, Stored]:
        """Returns what is known of those of these chunks that are in the catalogue."""
        ...

    def add(self, chunks: Iterable[tuple[Chunk, Location]]) -> None:
        """Adds chunks and where they are. One that is known, and not lost, stays as it is.

        It is durable at the latest when the next change by another method is, but for `add_pages`.
        """
        ...

    def chunks(self, after: bytes, limit: int) -> list[Stored]:
        """Returns so many chunks with ids above this one, in the order of their ids."""
        ...

    def condemn(self, ids: Sequence[bytes], generation: int) -> None:
        """Condemns those of these chunks that are not condemned yet."""
        ...

    def revive(self, ids: Sequence[bytes]) -> None:
        """Undoes the condemnation of those of these chunks that are there."""
        ...

    def condemned(self) -> int:
        """Returns how many chunks are condemned."""
        ...

    def lost(self) -> set[bytes]:
        """Returns the ids of all chunks that are lost."""
        ...

    def set_lost(self, stored: Stored, lost: bool) -> None:
        """Says whether a chunk is lost, unless it is no longer where it was said to be."""
        ...

    # Packs.

    def begin_pack(self, number: int) -> None:
        """Notes that a pack is about to be made."""
        ...

    def last_pack(self) -> int:
        """Returns the highest number that a pack ever had; 0 if there was none."""
        ...

    def packs(self) -> list[PackUse]:
        """Returns all packs, by their numbers."""
        ...

    def in_pack(self, number: int, offset: int, limit: int) -> list[Stored]:
        """Returns so many of a pack's chunks from this offset on, in the order of the offsets."""
        ...

    def sweep(self, number: int, generation: int) -> tuple[int, int]:
        """Removes those of a pack's chunks that were condemned in this generation or before.

        Returns how many, and the length of their records.
        """
        ...

    def move(self, moves: Sequence[tuple[Stored, Location]]) -> None:
        """Says where chunks are now, unless they are no longer where they were said to be."""
        ...

    def end_pack(self, number: int) -> None:
        """Forgets a pack that has no chunks."""
        ...

    # Pages and snapshots.

    def add_pages(self, pages: Sequence[Page]) -> list[int]:
        """Keeps pages, and undoes the condemnation of all chunks that they name.

        Returns their keys, which no page before had.

        Raises:
            UnknownChunks: They name chunks that are not in the catalogue. Nothing is kept.
        """
        ...

    def pages(self, keys: Sequence[int]) -> list[Page]:
        """Returns pages. One that is damaged or missing raises CatalogueError."""
        ...

    def used_pages(self) -> set[int]:
        """Returns the keys of all pages that snapshots have."""
        ...

    def unused_pages(self) -> set[int]:
        """Returns the keys of all pages that no snapshot has."""
        ...

    def remove_pages(self, keys: Sequence[int]) -> None:
        """Removes pages."""
        ...

    def commit(self, snapshot: Snapshot, pages: Sequence[int]) -> None:
        """Adds a snapshot, made of these pages."""
        ...

    def snapshots(self) -> list[Snapshot]:
        """Returns all snapshots, the oldest first."""
        ...

    def contents(self, id: str) -> list[int]:
        """Returns the keys of a snapshot's pages, in order.

        Raises:
            UnknownSnapshot: There is none with this id.
            CatalogueError: What the catalogue has is not what was committed.
        """
        ...

    def remove_snapshots(self, ids: Sequence[str]) -> None:
        """Removes those of these snapshots that are there. Their pages stay."""
        ...

    # The rest.

    def generation(self) -> int:
        """Returns the generation; 1 at first. See `leases`."""
        ...

    def set_generation(self, generation: int) -> None:
        """Begins a generation."""
        ...

    def key(self) -> bytes:
        """Returns the tenant's wrapped key; empty if it has none."""
        ...

    def set_key(self, wrapped: bytes) -> None:
        """Keeps the tenant's wrapped key.

        Raises:
            KeyExists: It has one; or chunks, which are not encrypted.
        """
        ...

    def check(self) -> list[str]:
        """Returns what is damaged in what the catalogue is kept in: one line each, for people."""
        ...

    def close(self) -> None:
        """Releases what it holds, after what other threads are doing."""
        ...
