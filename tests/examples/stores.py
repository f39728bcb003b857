"""Chunks, entries and snapshots for tests of a store."""

import random
from collections.abc import Iterable
from functools import cache

from examples.backup import pages
from examples.backup.chunks import Chunk, Codec, chunk_id
from examples.backup.snapshots import Snapshot
from examples.backup.store import Store
from examples.backup.tree import Entry, Kind

CODEC = Codec()
ROOT = Entry(b"", Kind.DIRECTORY, 0o755, 7)


@cache
def chunk(seed: int, size: int = 1000) -> Chunk:
    content = random.Random(seed).randbytes(size)
    return CODEC.encode(chunk_id(content), content)


def ids(*seeds: int) -> list[bytes]:
    return [chunk(seed).id for seed in seeds]


def file(path: bytes, *seeds: int, offset: int = 0, size: int | None = None) -> Entry:
    """Returns a file's entry, or that of its part, made of these chunks."""
    sizes = tuple(chunk(seed).size for seed in seeds)
    total = offset + sum(sizes) if size is None else size
    return Entry(path, Kind.FILE, 0o644, 7, total, b"", offset, tuple(ids(*seeds)), sizes)


def page_of(*seeds: int, prefix: bytes = b"") -> pages.Page:
    """Returns a page with one file for each chunk, in the order of the seeds."""
    return pages.encode(file(b"%s%06d" % (prefix, seed), seed) for seed in sorted(seeds))


def put(store: Store, seeds: Iterable[int]) -> None:
    store.put_many([chunk(seed) for seed in seeds])


def commit(store: Store, name: str, seeds: Iterable[int]) -> Snapshot:
    """Makes a snapshot of these chunks, which are stored already: one file for each."""
    draft = store.begin(name)
    draft.add([pages.encode([ROOT]), *([page_of(*wanted)] if (wanted := list(seeds)) else [])])
    return draft.commit()


def there(store: Store, seeds: Iterable[int]) -> list[int]:
    """Returns those of these chunks that the store says it has."""
    wanted = list(seeds)
    missing = set(store.missing(ids(*wanted)))
    return [seed for position, seed in enumerate(wanted) if position not in missing]
