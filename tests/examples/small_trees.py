"""Trees of a few small files, put into a store and read from it without a client."""

from collections.abc import Iterator, Mapping

from examples.backup.chunks import Chunk, Codec, chunk_id
from examples.backup.errors import BackupError
from examples.backup.pages import Page, decode, encode
from examples.backup.snapshots import Snapshot
from examples.backup.store import Store
from examples.backup.tree import Entry, Kind

# Contents by path; one chunk each.
Tree = Mapping[bytes, bytes]

CODEC = Codec()


def chunk(content: bytes) -> Chunk:
    """Returns the chunk with this content."""
    return CODEC.encode(chunk_id(content), content)


def page(tree: Tree) -> Page:
    """Returns the page that has all of a tree: its root and its files."""
    files = (
        Entry(
            path,
            Kind.FILE,
            0o644,
            1,
            len(content),
            chunks=(chunk_id(content),),
            sizes=(len(content),),
        )
        for path, content in sorted(tree.items())
    )
    return encode([Entry(b"", Kind.DIRECTORY, 0o755, 1), *files])


def back_up(store: Store, name: str, tree: Tree) -> Snapshot:
    """Backs up a tree."""
    draft = store.begin(name)
    try:
        chunks = [chunk(content) for content in tree.values()]
        missing = store.missing([one.id for one in chunks])
        store.put_many([chunks[position] for position in missing])
        draft.add([page(tree)])
        return draft.commit()
    finally:
        draft.discard()


def read(store: Store, id: str) -> dict[bytes, bytes]:
    """Returns the tree that a snapshot is of.

    Raises:
        BackupError: Something of it is damaged.
    """
    return dict(reading(store, store.pages(id)))


def reading(store: Store, pages: Iterator[Page]) -> Iterator[tuple[bytes, bytes]]:
    """Yields the paths and contents of pages."""
    for one in pages:
        for entry in decode(one.data, one.chunks):
            if entry.kind is Kind.FILE:
                content = b"".join(map(CODEC.decode, store.read_chunks(entry.chunks)))
                if len(content) != entry.size:
                    raise BackupError("a file of another size")
                yield entry.path, content


def damage(store: Store) -> list[str]:
    """Returns what a verification of the store finds, in words."""
    reports = list(store.verify())
    assert reports[-1].finished
    return [f"{one.where}: {one.what}" for report in reports for one in report.damage]
