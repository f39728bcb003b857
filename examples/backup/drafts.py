"""Drafts: snapshots in the making.

A draft takes pages and is visible to nobody; committing it makes it a snapshot, whole, in one
transaction. Its pages are in the catalogue as they come, and kept there by the draft's lease; those
of a draft that was discarded, or of a process that died, are removed by the next `gc`.

The server reads pages that are not encrypted, and refuses what is no tree. Of encrypted pages it
can check no more than that their chunks are there: that they make sense is for their readers to
find out, who trust no server in any case.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from .chunks import ID_SIZE, MAX_OVERHEAD
from .errors import (
    BackupError,
    CatalogueError,
    InvalidEntry,
    PageError,
    UnknownBase,
    UnknownChunks,
    UnknownSnapshot,
)
from .interfaces import CatalogueStore
from .leases import Lease, Leases
from .pages import LIMIT, Page, decode, sums
from .snapshots import Snapshot
from .tree import Entry, check_last, check_next

# Pages of a base in memory at a time.
PAGES = 64

# The catalogue's numbers have 63 bits. It is more than a file system can hold.
MAX_COUNT = 1 << 62


class Draft:
    """A snapshot in the making, for one thread at a time.

    After an error it is discarded: it takes no more pages and cannot be committed.

    Args:
        catalogue: Where its pages go.
        leases: Those of the catalogue.
        name: What the snapshot will be called.
        base: The id of the snapshot whose pages can be taken over; empty for none.

    Raises:
        UnknownBase: There is no such snapshot, or it is damaged.
    """

    def __init__(
        self, catalogue: CatalogueStore, leases: Leases, name: str, base: str = ""
    ) -> None:
        self.id = secrets.token_hex(16)
        self.name = name
        self._catalogue = catalogue
        self._leases = leases
        self._sealed = bool(catalogue.key())
        self._lease: Lease
        self._base: list[int]
        try:
            self._lease, self._base = leases.begin_with(base) if base else (leases.begin(), [])
        except (UnknownSnapshot, CatalogueError) as error:
            raise UnknownBase(str(error)) from error
        self._lost = catalogue.lost()
        self._open = True
        self._keys: list[int] = []
        self._last: Entry | None = None
        # The position of that page of the base that comes after what is there, as it did there.
        self._follows = 0
        self._totals = [0, 0, 0, 0]

    def copy(self, first: int, count: int) -> None:
        """Takes over pages of the base.

        Raises:
            InvalidEntry: There are no such pages, or they do not come after what is there.
            UnknownBase: They, or chunks that they name, are damaged. They are read, so that damage
                is not inherited: the client begins anew, and puts again what is lost.
        """
        with self._discarding_on_error():
            if not 0 <= first < first + count <= len(self._base):
                raise InvalidEntry(b"", "the base has no such pages")
            keys = self._base[first : first + count]
            if first != self._follows and not self._sealed:
                check_next(self._previous(), self._entries(keys[0])[0])
            for start in range(0, count, PAGES):
                pages = self._read(keys[start : start + PAGES])
                if self._lost and any(self._lost & page.ids() for page in pages):
                    raise UnknownBase("chunks of the base are damaged")
                self._count(pages)
            self._keys += keys
            self._follows = first + count
            self._last = None

    def add(self, pages: Sequence[Page]) -> None:
        """Adds the next pages. Their chunks must be stored already.

        Raises:
            UnknownChunks: They name chunks that are not, or are lost.
            InvalidEntry: An entry is out of order, incomplete, or contradicts itself or its chunks.
            PageError: One is no page; or it is encrypted and ought not to be, or the reverse.
        """
        with self._discarding_on_error():
            for page in pages:
                self._check_form(page)
            self._check_lost(pages)
            if not self._sealed:
                self._check(pages)
            self._count(pages)
            self._keys += self._leases.add_pages(self._lease, pages)
            self._follows = -1

    def commit(self) -> Snapshot:
        """Makes the draft a snapshot, durable and visible to all.

        Raises:
            InvalidEntry: The last file is incomplete.
        """
        with self._discarding_on_error():
            if not self._sealed and self._follows != len(self._base):
                check_last(self._previous())
            snapshot = Snapshot(self.id, self.name, time.time_ns(), *self._totals)
            self._leases.commit(self._lease, snapshot, self._keys)
        self._open = False
        return snapshot

    def discard(self) -> None:
        """Gives the draft up. Does nothing once it is committed or discarded."""
        if self._open:
            self._open = False
            self._leases.end(self._lease)

    @contextmanager
    def _discarding_on_error(self) -> Iterator[None]:
        if not self._open:
            raise BackupError(f"the draft of {self.name} is committed or discarded")
        with ExitStack() as undo:
            undo.callback(self.discard)
            yield
            undo.pop_all()

    def _check_form(self, page: Page) -> None:
        """Checks what can be told of any page, encrypted or not."""
        if page.sealed and not self._sealed:
            raise PageError("a page that is encrypted, where none may be")
        if self._sealed and not page.sealed:
            raise PageError("a page that is not encrypted, where all have to be")
        if len(page.data) > LIMIT + MAX_OVERHEAD or len(page.chunks) % ID_SIZE:
            raise PageError("a page of too many bytes, or with half a chunk's id")

    def _check_lost(self, pages: Sequence[Page]) -> None:
        """Checks that pages name nothing that was lost when the draft began, and still is."""
        if self._lost:
            named = {id for page in pages for id in page.ids() & self._lost}
            found = self._catalogue.find(list(named))
            if lost := [id for id, stored in found.items() if stored.lost]:
                raise UnknownChunks(lost)

    def _check(self, pages: Sequence[Page]) -> None:
        last = self._previous()
        ids = list({id for page in pages for id in page.ids()})
        known = {id: stored.size for id, stored in self._catalogue.find(ids).items()}
        if unknown := [id for id in ids if id not in known]:
            raise UnknownChunks(unknown)
        for page in pages:
            entries = decode(page.data, page.chunks)
            if not entries or (page.entries, page.files, page.size) != sums(entries):
                raise PageError("a page that counts other entries than it has")
            for entry in entries:
                check_next(last, entry)
                # A hole is as large as it says.
                if entry.sizes != tuple(map(known.get, entry.chunks, entry.sizes)):
                    raise InvalidEntry(entry.path, "the chunks have other sizes")
                last = entry
        self._last = last

    def _previous(self) -> Entry | None:
        """Returns the last entry that is there."""
        if self._last is None and self._keys:
            self._last = self._entries(self._keys[-1])[-1]
        return self._last

    def _entries(self, key: int) -> list[Entry]:
        (page,) = self._read([key])
        return decode(page.data, page.chunks)

    def _read(self, keys: Sequence[int]) -> list[Page]:
        try:
            return self._catalogue.pages(keys)
        except CatalogueError as error:
            raise UnknownBase("pages of the base are damaged") from error

    def _count(self, pages: Sequence[Page]) -> None:
        for page in pages:
            counts = (page.entries, page.files, page.size, page.references)
            self._totals = [a + b for a, b in zip(self._totals, counts, strict=True)]
            if min(counts) < 0 or page.files > page.entries or max(self._totals) >= MAX_COUNT:
                raise PageError("a page that counts what cannot be")
