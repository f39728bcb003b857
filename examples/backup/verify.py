"""Verifying: reading all that is stored, and telling what of it is damaged, and whom that hits.

Every byte that counts has a checksum: a pack's records carry their own; pages and snapshots have
digests in the catalogue; and the catalogue's file has one for each of its pages (see `database`).
So a flipped bit anywhere is found, be it in a record that nothing needs any more.

While this reads, others put, forget and collect. So what looks wrong is looked up again before it
is told: it may have been moved or removed meanwhile.

A chunk that is lost is noted in the catalogue: it is missing from then on, until a client that has
it puts it again, in another place, which mends all snapshots that need it.

Of what is damaged, the snapshots that need it are found at the end, by their lists of chunks; and
the paths, by reading the pages concerned, unless they are encrypted.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from .errors import (
    BackupError,
    CatalogueError,
    PackError,
    PackMissing,
    PageError,
    UnknownSnapshot,
    display,
)
from .interfaces import CatalogueStore, PackStore, PackUse, Stored
from .pages import Page, decode
from .reports import Checked, Damage
from .snapshots import Snapshot
from .tree import Entry

# Chunks of a pack in memory at a time.
BATCH = 1024

# Bytes of packs, and pages, between two reports. One page in memory takes some KB.
REPORT = 16 * 1024 * 1024
PAGES = 64

# What reading a damaged catalogue may raise: SQLite gives rows of any types then.
_DAMAGED = (BackupError, TypeError, ValueError)


class Verifier:
    """One verification.

    Args:
        packs: Where the chunks are.
        catalogue: What knows where.
    """

    def __init__(self, packs: PackStore, catalogue: CatalogueStore) -> None:
        self._packs = packs
        self._catalogue = catalogue
        self._did = Checked()
        self._found: list[Damage] = []
        # What is lost, and how that was told.
        self._chunks: dict[bytes, Damage] = {}
        self._pages: dict[int, Damage] = {}

    def run(self) -> Generator[Checked, None, None]:
        """Yields how far it is, and the damage found since the last report."""
        for part in (self._check_catalogue, self._check_packs, self._check_pages, self._check_hits):
            try:
                for _ in part():
                    yield self._report()
            except _DAMAGED as error:
                self._tell(Damage("the catalogue", f"cannot be read: {error}"))
        yield replace(self._report(), finished=True)

    def _report(self) -> Checked:
        report = replace(self._did, damage=tuple(self._found))
        self._found.clear()
        return report

    def _tell(self, damage: Damage) -> None:
        self._found.append(damage)

    def _check_catalogue(self) -> Iterator[None]:
        for line in self._catalogue.check():
            self._tell(Damage("the catalogue", line))
        yield

    def _check_packs(self) -> Iterator[None]:
        there = self._packs.numbers()
        packs = self._catalogue.packs()
        self._did = replace(self._did, total=sum(pack.end for pack in packs))
        for pack in packs:
            yield from _Pack(self._packs, self._catalogue, pack, self._lost).check(self._advance)
        known = {pack.number for pack in packs}
        for number in sorted(set(there) & set(self._packs.numbers()) - known):
            self._tell(Damage(f"pack {number}", "the catalogue does not know it"))

    def _advance(self, length: int) -> bool:
        """Counts a record; returns whether it is time for a report."""
        before, after = self._did.bytes, self._did.bytes + length
        self._did = replace(self._did, bytes=after, chunks=self._did.chunks + 1)
        return before // REPORT != after // REPORT

    def _lost(self, damage: Damage) -> None:
        self._tell(damage)
        if damage.chunk:
            self._chunks[damage.chunk] = damage

    def _check_pages(self) -> Iterator[None]:
        used = self._catalogue.used_pages()
        keys = sorted(used | self._catalogue.unused_pages())
        for start in range(0, len(keys), PAGES):
            batch = keys[start : start + PAGES]
            for key in batch:
                page = self._page(key)
                if page is not None and key in used:
                    self._check_references(key, page)
            self._did = replace(self._did, pages=self._did.pages + len(batch))
            yield

    def _page(self, key: int) -> Page | None:
        try:
            (page,) = self._catalogue.pages([key])
            return page
        except _DAMAGED as error:
            if key in self._catalogue.used_pages() | self._catalogue.unused_pages():
                damage = Damage("the catalogue", f"{error}")
                self._pages[key] = damage
                self._tell(damage)
            return None

    def _check_references(self, key: int, page: Page) -> None:
        ids = list(page.ids())
        found = self._catalogue.find(ids)
        lacking = [id for id in ids if id not in found and id not in self._chunks]
        if lacking and key in self._catalogue.used_pages():
            for id in lacking:
                self._lost(Damage("the catalogue", f"chunk {id.hex()} is not in it", id))

    def _check_hits(self) -> Iterator[None]:
        """Reads all snapshots, and names those that need what is lost."""
        hits: dict[int, list[Damage]] = {}
        for snapshot in self._catalogue.snapshots():
            try:
                keys = self._catalogue.contents(snapshot.id)
            except UnknownSnapshot:
                continue  # Forgotten meanwhile.
            except _DAMAGED as error:
                where = Damage("the catalogue", str(error))
                self._tell(replace(where, snapshot=str(snapshot.id), name=str(snapshot.name)))
                continue
            if self._chunks or self._pages:
                yield from self._check_snapshot(snapshot, keys, hits)
            self._did = replace(self._did, snapshots=self._did.snapshots + 1)
        yield

    def _check_snapshot(
        self, snapshot: Snapshot, keys: Sequence[int], hits: dict[int, list[Damage]]
    ) -> Iterator[None]:
        for position, key in enumerate(keys):
            if key in self._pages:
                what = f"{self._pages[key].what}: the entries {self._between(keys, position)}"
                hit = replace(self._pages[key], what=what)
                self._tell(replace(hit, snapshot=snapshot.id, name=snapshot.name))
                continue
            if key not in hits:
                hits[key] = self._hits(key)
            for hit in hits[key]:
                self._tell(replace(hit, snapshot=snapshot.id, name=snapshot.name))
            if not position % PAGES:
                yield

    def _hits(self, key: int) -> list[Damage]:
        """Returns what a page's entries lose, without the names of snapshots."""
        (page,) = self._catalogue.pages([key])
        lost = page.ids() & self._chunks.keys()
        if not lost:
            return []
        if page.sealed:
            return [self._chunks[id] for id in sorted(lost)]
        return [
            replace(self._chunks[id], path=entry.path)
            for entry in decode(page.data, page.chunks)
            for id in sorted(lost.intersection(entry.chunks))
        ]

    def _between(self, keys: Sequence[int], position: int) -> str:
        """Says between which paths a page's entries are."""
        before = self._entries(keys[position - 1]) if position else []
        after = self._entries(keys[position + 1]) if position + 1 < len(keys) else []
        if not before and not after:
            return f"of part {position + 1} of {len(keys)}"  # Or its neighbours are encrypted.
        begin = f"after {display(before[-1].path)}" if before else "from the beginning"
        return f"{begin}, {f'before {display(after[0].path)}' if after else 'to the end'}"

    def _entries(self, key: int) -> list[Entry]:
        try:
            (page,) = self._catalogue.pages([key])
            return decode(page.data, page.chunks)
        except (CatalogueError, PageError):
            return []  # Damaged as well, or encrypted.


class _Pack:
    """The check of one pack: its records beside what the catalogue says of them."""

    def __init__(
        self,
        packs: PackStore,
        catalogue: CatalogueStore,
        use: PackUse,
        lost: Callable[[Damage], None],
    ) -> None:
        self._packs = packs
        self._catalogue = catalogue
        self._use = use
        self._lost = lost
        self._rows = self._all_rows()
        self._row = next(self._rows, None)
        self._at = packs.first

    def check(self, advance: Callable[[int], bool]) -> Iterator[None]:
        """Reads the pack, over what is damaged, up to where it ends in the catalogue."""
        yield from self._records(0, advance)
        while self._at < self._use.end or self._row is not None:
            # At this place there is no intact record. The next one that is known of is looked for.
            if self._row is not None and self._row.where.offset <= self._at:
                self._skip("is damaged")
            elif self._use.number in {pack.number for pack in self._catalogue.packs()}:
                place = f"pack {self._use.number} at byte {self._at}"
                self._lost(Damage(place, "a record that is not needed is damaged"))
            if self._row is None:
                return
            self._at = self._row.where.offset
            yield from self._records(self._at, advance)

    def _records(self, offset: int, advance: Callable[[int], bool]) -> Iterator[None]:
        number = self._use.number
        try:
            for where, chunk in self._packs.scan(number, offset):
                if where.offset >= self._use.end:
                    break  # Left over from a crash, and never acknowledged.
                while self._row is not None and self._row.where.offset < where.offset:
                    self._skip("is not where the catalogue says")
                if self._row is not None and self._row.where == where:
                    if (self._row.id, self._row.size) != (chunk.id, chunk.size):
                        self._skip("is another chunk than the catalogue says")
                    else:
                        if self._row.lost:
                            # It was a read that failed, and not what is stored.
                            self._note(self._row, lost=False)
                        self._row = next(self._rows, None)
                self._at = where.offset + where.length
                if advance(where.length):
                    yield
        except PackMissing:
            while self._row is not None:
                self._skip("is missing with the whole pack")
            self._at = self._use.end
        except PackError as error:
            # Where nothing of it counts, a crash tore it while it was begun.
            if self._use.end:
                self._lost(Damage(f"pack {number}", str(error)))

    def _skip(self, what: str) -> None:
        """Tells that the next chunk of the catalogue is lost, if it still ought to be there."""
        row = self._row
        assert row is not None
        self._row = next(self._rows, None)
        now = self._catalogue.find([row.id]).get(row.id)
        if now is not None and now.where == row.where:
            place = f"pack {row.where.pack} at byte {row.where.offset}"
            self._lost(Damage(place, f"chunk {row.id.hex()} {what}", row.id))
            if not row.lost:
                self._note(row, lost=True)

    def _note(self, stored: Stored, *, lost: bool) -> None:
        # On a full disk, telling it goes on.
        with suppress(CatalogueError):
            self._catalogue.set_lost(stored, lost)

    def _all_rows(self) -> Iterator[Stored]:
        offset = 0
        while batch := self._catalogue.in_pack(self._use.number, offset, BATCH):
            for stored in batch:
                # What was put since the pack's end was looked up lies beyond it, and is not read.
                if stored.where.offset >= self._use.end:
                    return
                yield stored
            offset = batch[-1].where.offset + 1
