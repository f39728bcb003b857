"""Pages: runs of a tree's entries, as they are sent and stored.

A page is made and read by clients; a server keeps it as it is. All that the server has to know of
it stands beside it: the ids of the chunks that its entries name, and a few sums. So the entries
can be sealed with a key that the server does not have.

Where a page ends depends on the path of its last entry: in a tree that has changed a little, most
pages end where they did before, and those whose entries are all the same need not be sent again.
"""

from collections.abc import Iterable
from typing import NamedTuple
from zlib import crc32

import msgspec
import zstandard

from .chunks import ID_SIZE
from .crypt import Box
from .errors import PageError
from .tree import HOLE, Entry, Kind

# Entries on average (64), and at most. Larger pages compress better; smaller ones are less to send
# where little has changed: some 4 KB for each file that did.
CUT_MASK = 0x3F
MAX_ENTRIES = 1000

# Entries of one page, roughly, in bytes: paths, chunk ids, attributes. An entry has at most 110 KB.
MAX_WEIGHT = 256 * 1024

# What a client allocates for a page, at most. Twice what the largest one needs.
LIMIT = 1024 * 1024

_COMPRESSED, _SEALED = b"\1", b"\2"

# What begins the page that ends an encrypted snapshot: see `manifest`.
MANIFEST = b"\3"


class _Row(NamedTuple):
    """An entry, without its chunks' ids."""

    path: bytes
    kind: Kind
    mode: int
    mtime_ns: int
    size: int
    target: bytes
    offset: int
    sizes: tuple[int, ...]
    uid: int
    gid: int
    user: str
    group: str
    link: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    device: int


_decode_rows = msgspec.msgpack.Decoder(list[_Row]).decode
_encode_rows = msgspec.msgpack.Encoder().encode


class Page(NamedTuple):
    """A run of entries.

    Attributes:
        data: The entries, encoded, without the ids of their chunks.
        chunks: These ids, in the order in which the entries name them, 32 bytes each. Zeros stand
            for a hole.
        entries: How many directories, files, links and others end here: of a file in several parts,
            the last one counts.
        files: How many of them are files.
        size: The sum of these files' sizes, in bytes.
    """

    data: bytes
    chunks: bytes
    entries: int
    files: int
    size: int

    def ids(self) -> set[bytes]:
        """Returns the ids of the chunks that the page's entries name."""
        chunks = self.chunks
        ids = {chunks[at : at + ID_SIZE] for at in range(0, len(chunks), ID_SIZE)}
        ids.discard(HOLE)
        return ids

    @property
    def references(self) -> int:
        """How many chunks the entries are made of, each counted as often as it occurs."""
        chunks = self.chunks
        ids = (chunks[at : at + ID_SIZE] for at in range(0, len(chunks), ID_SIZE))
        return sum(id != HOLE for id in ids)

    @property
    def sealed(self) -> bool:
        """Whether it says that it is encrypted."""
        return self.data[:1] in (_SEALED, MANIFEST)

    @property
    def ends_snapshot(self) -> bool:
        """Whether it says that it is a manifest: see `manifest`."""
        return self.data[:1] == MANIFEST


def weight(entry: Entry) -> int:
    """Returns about how many bytes an entry takes."""
    xattrs = sum(len(name) + len(value) for name, value in entry.xattrs)
    return len(entry.path) + len(entry.target) + len(entry.link) + 36 * len(entry.chunks) + xattrs


def is_last(path: bytes) -> bool:
    """Whether a page ends with the entry of this path."""
    return not crc32(path) & CUT_MASK


def encode(entries: Iterable[Entry], box: Box | None = None) -> Page:
    """Makes a page.

    Args:
        entries: The entries, in order.
        box: Seals the page, if there is one.
    """
    entries = list(entries)
    rows = [entry[:7] + entry[8:] for entry in entries]
    chunks = b"".join(id for entry in entries for id in entry.chunks)
    data = zstandard.ZstdCompressor(level=3).compress(_encode_rows(rows))
    sealed = _COMPRESSED + data if box is None else _SEALED + box.seal(data, chunks)
    return Page(sealed, chunks, *sums(entries))


def sums(entries: Iterable[Entry]) -> tuple[int, int, int]:
    """Returns what a page of these entries says of them: how many, how many files, their size."""
    count = files = size = 0
    for entry in entries:
        if entry.complete:
            count += 1
            files += entry.kind is Kind.FILE
            size += entry.size
    return count, files, size


def decode(data: bytes, chunks: bytes, box: Box | None = None) -> list[Entry]:
    """Returns a page's entries. They may still contradict each other: see `tree.check_next`.

    Raises:
        PageError: It is no page, damaged, or sealed with another key.
    """
    if len(chunks) > LIMIT:
        raise PageError("a page of too many chunks")
    tag, payload = data[:1], data[1:]
    if tag == _SEALED:
        if box is None:
            raise PageError("the snapshot is encrypted")
        payload = box.open(payload, chunks)
    elif tag != _COMPRESSED or box is not None:
        # Not accepted beside a key: who stores pages could make some up.
        raise PageError("a page that is not encrypted" if box else "not a page")
    try:
        if not 0 <= zstandard.get_frame_parameters(payload).content_size <= LIMIT:
            raise PageError("a page of too many bytes")
        rows = _decode_rows(
            zstandard.ZstdDecompressor(max_window_size=LIMIT).decompress(
                payload, allow_extra_data=False
            )
        )
    except (zstandard.ZstdError, msgspec.MsgspecError) as error:
        raise PageError(f"a damaged page: {error}") from error
    entries: list[Entry] = []
    at = 0
    for row in rows:
        end = at + len(row.sizes) * ID_SIZE
        ids = tuple(chunks[i : i + ID_SIZE] for i in range(at, end, ID_SIZE))
        entries.append(Entry._make((*row[:7], ids, *row[7:])))
        at = end
    if at != len(chunks):
        raise PageError("a page with other chunks than its entries name")
    return entries
