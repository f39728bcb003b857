"""What makes an encrypted snapshot whole: a last page that says what came before it.

Each page is sealed by itself, so a server could leave some out, or give those of another snapshot.
The client that makes a snapshot ends it with a *manifest*, sealed under the same key: the
snapshot's name, how many pages there are, and a hash of them in order. Whoever reads the snapshot
checks it. To the server it is a page like any other, that names no chunks and counts no entries.

What a server still can do is give an older snapshot of the same name, and all of it.
"""

import string
from typing import NamedTuple

import msgspec
from blake3 import blake3

from .crypt import Box
from .errors import PageError
from .pages import MANIFEST, Page, decode
from .snapshots import MIN_PREFIX
from .tree import Entry

# Not as long as any number of ids: no page of entries is taken for a manifest, nor the reverse.
_ASSOCIATED = b"druvarpc backup: manifest 1"


class _Manifest(NamedTuple):
    name: str
    pages: int
    digest: bytes


_decode = msgspec.msgpack.Decoder(_Manifest).decode


class Sums:
    """Of pages, in order: how many, and their hash."""

    def __init__(self) -> None:
        self.pages = 0
        self._hash = blake3()

    def add(self, page: Page) -> None:
        """Counts the next page."""
        self.pages += 1
        self._hash.update(blake3(page.data).digest() + blake3(page.chunks).digest())

    @property
    def digest(self) -> bytes:
        """The hash of all pages so far: 32 bytes."""
        return self._hash.digest()


def manifest(name: str, sums: Sums, box: Box) -> Page:
    """Returns the page that ends a snapshot of this name with these pages."""
    data = msgspec.msgpack.encode(_Manifest(name, sums.pages, sums.digest))
    return Page(MANIFEST + box.seal(data, _ASSOCIATED), b"", 0, 0, 0)


class Contents:
    """Decodes a snapshot's pages, and checks that they are all of it. For one thread at a time.

    Args:
        reference: What it was asked for by: a name, an id, or the beginning of one.
        box: Opens the pages, if they have to be sealed. Of others, no more than each is checked.
    """

    def __init__(self, reference: str, box: Box | None) -> None:
        self._reference = reference
        self._box = box
        self._sums = Sums()
        self._ended = False

    def decode(self, page: Page) -> list[Entry]:
        """Returns the next page's entries: none of a manifest.

        Raises:
            PageError: It is no page, damaged, sealed with another key, or not what has to follow.
        """
        if self._ended:
            raise PageError("pages after the end of the snapshot")
        if self._box is not None and page.ends_snapshot:
            self._check(self._box.open(page.data[1:], _ASSOCIATED))
            self._ended = True
            return []
        if self._box is not None:
            self._sums.add(page)
        return decode(page.data, page.chunks, self._box)

    def end(self) -> None:
        """Tells that there are no more pages.

        Raises:
            PageError: There should be.
        """
        if self._box is not None and not self._ended:
            raise PageError("pages are missing at the end of the snapshot")

    def _check(self, data: bytes) -> None:
        try:
            found = _decode(data)
        except msgspec.MsgspecError as error:
            raise PageError(f"a damaged page: {error}") from error
        if (found.pages, found.digest) != (self._sums.pages, self._sums.digest):
            raise PageError("not the pages that the snapshot was made of")
        if found.name != self._reference and not _may_be_id(self._reference):
            raise PageError("a snapshot of another name than was asked for")


def _may_be_id(reference: str) -> bool:
    return len(reference) >= MIN_PREFIX and set(reference) <= set(string.hexdigits)
