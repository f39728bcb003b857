"""Leases: what keeps running backups and restores from losing what they count on.

Removing takes two steps, and a count of *generations* orders them against the backups; no clock
does. `collect` takes the steps, this module has the rules.

1. *Condemn*: chunks that no snapshot and no draft needs are condemned, with the number of the next
   generation, which begins when all of them are. From then on `missing` calls them missing. Putting
   a condemned chunk revives it, without writing it again; so does a draft's page that names it.
2. *Sweep*: a condemned chunk is removed once no lease is left that began in a generation before the
   one of its condemnation.

A lease that began earlier may have been told that the chunk is there, so the chunk stays. One that
began later was told that it is missing, puts it again, and thereby revives it. A lease ends with
the call that took it, however that ends, and all leases end with the process: none of them is
stored, and none is ever waited for.

Condemning, sweeping, reviving and beginning exclude each other by one lock, each for one
transaction. Chunks that pages name while condemning goes on are noted, so that a list of what is
needed that was begun before does not lack them.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from .errors import UnknownSnapshot
from .interfaces import CatalogueStore
from .pages import Page
from .snapshots import Snapshot


class Lease:
    """A backup or a restore that is running.

    Attributes:
        generation: The one in which it began.
        pages: The keys of pages that it needs, whether or not a snapshot has them.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.pages: set[int] = set()


class Leases:
    """The leases on a catalogue, and what has to be in step with them."""

    def __init__(self, catalogue: CatalogueStore) -> None:
        self._catalogue = catalogue
        self._lock = threading.Lock()
        self._live: set[Lease] = set()
        self._noted: set[bytes] | None = None

    def begin(self) -> Lease:
        """Returns a new lease. It has to be ended."""
        with self._lock:
            return self._begin()

    def begin_with(self, snapshot: str) -> tuple[Lease, list[int]]:
        """Returns a lease that has a snapshot's pages, and their keys, in order.

        Args:
            snapshot: Its id.

        Raises:
            UnknownSnapshot: It is not there.
            CatalogueError: What the catalogue says of it is damaged.
        """
        with self._lock:
            pages = self._catalogue.contents(snapshot)
            lease = self._begin()
            lease.pages.update(pages)
            return lease, pages

    def end(self, lease: Lease) -> None:
        """Ends a lease. A second call does nothing."""
        with self._lock:
            self._live.discard(lease)

    def add_pages(self, lease: Lease, pages: Sequence[Page]) -> list[int]:
        """Adds pages to the catalogue and to a lease, and revives the chunks that they name.

        Raises:
            UnknownChunks: They name chunks that are not there.
        """
        with self._lock:
            keys = self._catalogue.add_pages(pages)
            lease.pages.update(keys)
            if self._noted is not None:
                for page in pages:
                    self._noted.update(page.ids())
            return keys

    def commit(self, lease: Lease, snapshot: Snapshot, pages: Sequence[int]) -> None:
        """Makes a snapshot of a lease's pages, and ends the lease."""
        with self._lock:
            self._catalogue.commit(snapshot, pages)
            self._live.discard(lease)

    def revive(self, ids: Sequence[bytes]) -> set[bytes]:
        """Returns those of these chunks that are there and intact as far as known.

        None of them is condemned any more.
        """
        with self._lock:
            found = self._catalogue.find(ids)
            if condemned := [id for id, stored in found.items() if stored.condemned]:
                self._catalogue.revive(condemned)
            return {id for id, stored in found.items() if not stored.lost}

    # What `collect` needs.

    @contextmanager
    def condemning(self) -> Iterator[int]:
        """Yields the generation to condemn with; it begins when the block ends without an error."""
        with self._lock:
            self._noted = set()
            generation = self._catalogue.generation() + 1
        try:
            yield generation
            with self._lock:
                self._catalogue.set_generation(generation)
        finally:
            self._noted = None

    def pages_to_remove(self) -> list[int]:
        """Returns the keys of pages that no snapshot and no lease has, nor ever will."""
        with self._lock:
            unused = self._catalogue.unused_pages()
            for lease in self._live:
                unused -= lease.pages
            return sorted(unused)

    def needed_pages(self) -> list[int]:
        """Returns the keys of pages that snapshots or leases have. Later ones are noted."""
        # Damaged lists are found, and end it, before anything is concluded from them.
        for snapshot in self._catalogue.snapshots():
            with suppress(UnknownSnapshot):  # Forgotten meanwhile.
                self._catalogue.contents(snapshot.id)
        with self._lock:
            needed = self._catalogue.used_pages()
            return sorted(needed.union(*(lease.pages for lease in self._live)))

    def condemn(self, ids: Sequence[bytes], generation: int) -> int:
        """Condemns chunks, but for those noted since; returns how many. Inside `condemning`."""
        with self._lock:
            assert self._noted is not None
            unneeded = [id for id in ids if id not in self._noted]
            self._catalogue.condemn(unneeded, generation)
            return len(unneeded)

    def sweep(self, pack: int) -> tuple[int, int]:
        """Removes those condemned chunks of a pack that no lease counts on.

        Returns how many, and the length of their records.
        """
        with self._lock:
            limit = self._catalogue.generation()
            limit = min((lease.generation for lease in self._live), default=limit)
            return self._catalogue.sweep(pack, limit)

    def _begin(self) -> Lease:
        lease = Lease(self._catalogue.generation())
        self._live.add(lease)
        return lease
