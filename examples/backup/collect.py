"""Collecting: removing what no snapshot needs, while backups and restores run.

`leases` says why nothing is removed that anyone counts on. This module takes the steps, each short,
with all others free to run between them:

1. Pages that no snapshot and no draft has are removed.
2. Chunks that no page names are condemned. Which those are is found by reading all pages; for a
   large store a part of the ids at a time, so that memory stays bounded.
3. Of each pack, the condemned chunks are removed from the catalogue that no lease counts on.
4. A pack of which a quarter or more is not needed is written anew: what is needed goes to the
   pack that is appended to, and is synced, before one transaction says where it is now.
5. A pack without chunks is removed, and then forgotten.

So at any moment the catalogue names nothing that is not there. A crash leaves chunks in two packs,
or a pack that nobody names, and the next collection removes them. Readers who looked a chunk up
before it moved find its old pack as long as they have it open, and else look again.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from threading import Lock

from .errors import PackError
from .interfaces import CatalogueStore, PackStore, PackUse, Stored
from .leases import Leases
from .reports import Collected

# How much of a pack may be garbage before it is written anew. At a quarter, freeing a byte costs
# reading and writing three.
GARBAGE = 0.25

# Chunks in one step.
BATCH = 4096

# Pages in memory at a time: some MB.
PAGES = 64

# Ids of needed chunks in memory at a time: some 100 MB.
NEEDED = 1_000_000

# What is moved in one step, in bytes: puts wait for so much.
MOVE_SIZE = 4 * 1024 * 1024


class Collector:
    """One collection.

    Args:
        packs: Where the chunks are.
        catalogue: What knows where.
        leases: Those of the catalogue.
        turn: Whoever has it appends to the packs.
    """

    def __init__(
        self, packs: PackStore, catalogue: CatalogueStore, leases: Leases, turn: Lock
    ) -> None:
        self._packs = packs
        self._catalogue = catalogue
        self._leases = leases
        self._turn = turn
        self._did = Collected()

    def run(self) -> Iterator[Collected]:
        """Yields how far it is, after each step. Left early, it leaves the rest undone.

        Raises:
            CatalogueError: The catalogue is damaged. What is needed cannot be told, so nothing
                more is removed.
            OSError: Something cannot be written or removed.
        """
        for step in (self._pages, self._condemn, self._sweep, self._rewrite):
            for _ in step():
                yield self._did
        yield replace(self._did, held=self._catalogue.condemned(), finished=True)

    def _pages(self) -> Iterator[None]:
        removed = self._leases.pages_to_remove()
        for start in range(0, len(removed), BATCH):
            keys = removed[start : start + BATCH]
            self._catalogue.remove_pages(keys)
            self._did = replace(self._did, pages=self._did.pages + len(keys))
            yield

    def _condemn(self) -> Iterator[None]:
        with self._leases.condemning() as generation:
            pages = self._leases.needed_pages()
            parts = 1 + sum(pack.chunks for pack in self._catalogue.packs()) // NEEDED
            bounds = [(part * 65536 // parts).to_bytes(3) for part in range(parts + 1)]
            for low, high in pairwise(bounds):
                needed: set[bytes] = set()
                for start in range(0, len(pages), PAGES):
                    for page in self._catalogue.pages(pages[start : start + PAGES]):
                        needed.update(id for id in page.ids() if low <= b"\0" + id < high)
                    yield
                yield from self._condemn_between(low[1:], high, needed, generation)

    def _condemn_between(
        self, low: bytes, high: bytes, needed: set[bytes], generation: int
    ) -> Iterator[None]:
        after = low
        while chunks := self._catalogue.chunks(after, BATCH):
            after = chunks[-1].id
            unneeded = [
                chunk.id
                for chunk in chunks
                if b"\0" + chunk.id < high and not chunk.condemned and chunk.id not in needed
            ]
            if unneeded:
                count = self._leases.condemn(unneeded, generation)
                self._did = replace(self._did, condemned=self._did.condemned + count)
            yield
            if b"\0" + after >= high:
                return

    def _sweep(self) -> Iterator[None]:
        for pack in self._catalogue.packs():
            count, _ = self._leases.sweep(pack.number)
            self._did = replace(self._did, chunks=self._did.chunks + count)
            yield

    def _rewrite(self) -> Iterator[None]:
        for pack in self._catalogue.packs():
            if pack.end and pack.used >= (1 - GARBAGE) * pack.end:
                continue
            with self._turn:
                if pack.number == self._packs.current:
                    self._packs.seal()
            try:
                yield from self._empty(pack)
            except PackError:
                continue  # Damaged. It stays as it is: `verify` says more, and nothing is lost.
            self._remove(pack)
            yield

    def _empty(self, pack: PackUse) -> Iterator[None]:
        """Moves what is needed of a pack."""
        offset = 0
        while chunks := self._catalogue.in_pack(pack.number, offset, BATCH):
            offset = chunks[-1].where.offset + 1
            for portion in _portions(chunks):
                moved = list(self._packs.read([stored.where for stored in portion]))
                if [chunk.id for chunk in moved] != [stored.id for stored in portion]:
                    raise PackError(f"pack {pack.number} has other chunks than it should")
                with self._turn:
                    where = self._packs.append(moved)
                    self._packs.sync()
                    self._catalogue.move(list(zip(portion, where, strict=True)))
                size = sum(stored.where.length for stored in portion)
                self._did = replace(self._did, freed=self._did.freed - size)
                yield

    def _remove(self, pack: PackUse) -> None:
        # A put cannot have added to it since: it was sealed.
        with self._turn:
            if not self._catalogue.in_pack(pack.number, 0, 1):
                self._packs.remove(pack.number)
                self._catalogue.end_pack(pack.number)
                did = self._did
                self._did = replace(did, packs=did.packs + 1, freed=did.freed + pack.end)


def _portions(chunks: list[Stored]) -> Iterator[list[Stored]]:
    portion: list[Stored] = []
    size = 0
    for chunk in chunks:
        if portion and size + chunk.where.length > MOVE_SIZE:
            yield portion
            portion, size = [], 0
        portion.append(chunk)
        size += chunk.where.length
    if portion:
        yield portion
