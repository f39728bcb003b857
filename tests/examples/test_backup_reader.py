"""Reading a tree: while it changes, where it may not be read, and in how much memory."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from examples.backup import pages, tree
from examples.backup.cache import LastSnapshot, NextCache
from examples.backup.chunks import BLOCK_SIZE, Codec
from examples.backup.reader import BATCH_BLOCKS, BATCH_PAGES, BATCH_SIZE, Batch, Reader
from examples.backup.service import MAX_IDS
from examples.backup.tree import HOLE, MAX_TIME, Entry, Skipped, check_last, check_next


def new_block() -> bytearray:
    return bytearray(BLOCK_SIZE)


def read(
    root: Path,
    deliver: Callable[[Batch], None],
    block: Callable[[], bytearray] = new_block,
    threads: int = 2,
) -> list[Batch]:
    batches: list[Batch] = []

    def take(batch: Batch) -> None:
        batches.append(batch)
        deliver(batch)

    codec = Codec()
    last, following = LastSnapshot(None), NextCache(None)
    path = os.fsencode(root)
    Reader(path, take, codec, None, last, following, block=block, threads=threads).run()
    return batches


def entries(batches: list[Batch]) -> list[Entry]:
    found: list[Entry] = []
    for batch in batches:
        for page in batch.pages:
            assert not isinstance(page, int)
            found.extend(pages.decode(page.data, page.chunks))
    last = None
    for entry in found:
        check_next(last, entry)
        last = entry
    check_last(last)
    return found


def skipped(batches: list[Batch]) -> list[Skipped]:
    return [item for batch in batches for item in batch.skipped]


def once(act: Callable[[], object]) -> Callable[[Batch], None]:
    acts = [act]
    return lambda _: acts.pop()() if acts else None


# Of each file: more than is read ahead of what is delivered.
SIZE = 2 * BATCH_SIZE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / name).write_bytes(os.urandom(SIZE))
    return tmp_path


def test_every_chunk_comes_with_or_before_the_pages_that_name_it(root):
    (root / "again").write_bytes((root / "a").read_bytes())
    known: set[bytes] = set()
    for batch in read(root, lambda _: None):
        assert not known & set(batch.contents)
        known.update(batch.contents)
        assert batch.size < BATCH_SIZE + 1_000_000
        for page in batch.pages:
            assert not isinstance(page, int)
            assert known >= page.ids()


def test_a_file_that_grows_while_it_is_read_is_reported_and_kept_as_it_was(root):
    def grow() -> None:
        with (root / "a").open("ab") as file:
            file.write(b"more")

    size = (root / "a").stat().st_size
    batches = read(root, once(grow))
    assert skipped(batches) == [Skipped(b"a", "changed while it was read")]
    found = {entry.path: entry.size for entry in entries(batches)}
    assert found == {b"": 0, b"a": size, b"b": size, b"c": size}


def test_a_file_that_shrinks_while_it_is_read_ends_where_it_ended(root):
    batches = read(root, once(lambda: os.truncate(root / "a", 1000)))
    assert skipped(batches) == [Skipped(b"a", "changed while it was read")]
    size = next(entry.size for entry in entries(batches) if entry.path == b"a")
    assert BATCH_SIZE <= size < SIZE


def test_a_file_that_vanishes_is_reported_and_the_rest_goes_on(root):
    batches = read(root, once((root / "b").unlink))
    assert skipped(batches) == [Skipped(b"b", "No such file or directory")]
    assert [entry.path for entry in entries(batches)] == [b"", b"a", b"c"]


def test_a_file_that_becomes_something_else_is_reported_and_the_rest_goes_on(root):
    def replace() -> None:
        (root / "b").unlink()
        os.mkfifo(root / "b")

    batches = read(root, once(replace))
    # It was either seen before, as a file, or after.
    assert [item.path for item in skipped(batches)] in ([b"b"], [])
    assert {b"", b"a", b"c"} <= {entry.path for entry in entries(batches)}


@contextmanager
def as_nobody() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def before_it_is_opened(
    patching: pytest.MonkeyPatch, path: bytes, act: Callable[[], object]
) -> None:
    opened = tree.opened

    def acting(root: bytes, found: bytes) -> AbstractContextManager[object]:
        if found == path:
            act()
        return opened(root, found)

    patching.setattr(tree, "opened", acting)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    root = tmp_path / "linked"
    root.mkdir()
    (root / "a").write_bytes(b"content")
    for name in "cd":
        os.link(root / "a", root / name)
    (root / "b").write_bytes(b"another")
    return root


def links(batches: list[Batch]) -> dict[bytes, tuple[int, bytes]]:
    return {entry.path: (entry.size, entry.link) for entry in entries(batches)[1:]}


def test_a_file_that_grew_is_no_link_of_what_it_was(linked, monkeypatch):
    def grow() -> None:
        with (linked / "a").open("ab") as file:
            file.write(b"more")

    os.link(linked / "b", linked / "e")  # so that nothing is looked at ahead of it
    before_it_is_opened(monkeypatch, b"b", grow)
    found = links(read(linked, lambda _: None))
    assert found.pop(b"e") == (7, b"b")
    assert found == {b"a": (7, b""), b"b": (7, b""), b"c": (11, b""), b"d": (11, b"c")}


def test_of_a_file_whose_first_name_vanished_the_next_one_has_the_content(linked, monkeypatch):
    before_it_is_opened(monkeypatch, b"a", (linked / "a").unlink)
    batches = read(linked, lambda _: None)
    assert skipped(batches) == [Skipped(b"a", "No such file or directory")]
    assert links(batches) == {b"b": (7, b""), b"c": (7, b""), b"d": (7, b"c")}


def test_names_are_no_links_of_what_took_the_first_ones_place(linked, monkeypatch):
    def replace() -> None:
        (linked.parent / "new").write_bytes(b"new")
        (linked.parent / "new").rename(linked / "a")

    before_it_is_opened(monkeypatch, b"a", replace)
    batches = read(linked, lambda _: None)
    assert links(batches) == {b"a": (3, b""), b"b": (7, b""), b"c": (7, b""), b"d": (7, b"c")}


def test_what_may_not_be_read_is_reported_and_the_rest_goes_on(tmp_path):
    root = tmp_path / "root"
    (root / "shut").mkdir(parents=True)
    for name in ("a", "b", "shut/c", "z"):
        (root / name).write_text("content")
    for parent in (*tmp_path.parents, tmp_path):
        if parent.stat().st_uid == os.getuid() and "pytest" in parent.name:
            parent.chmod(0o755)
    tmp_path.chmod(0o755)
    (root / "b").chmod(0)
    (root / "shut").chmod(0)
    try:
        with as_nobody():
            batches = read(root, lambda _: None)
    finally:
        (root / "shut").chmod(0o755)
    assert {(item.path, item.reason) for item in skipped(batches)} == {
        (b"b", "Permission denied"),
        (b"shut", "Permission denied"),
    }
    # The directory itself is known.
    assert [entry.path for entry in entries(batches)] == [b"", b"a", b"shut", b"z"]


def test_a_directory_whose_attributes_cannot_be_read_has_what_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir(mode=0o750)
    (tmp_path / "d" / "file").write_bytes(b"content")
    listed = os.listxattr

    def failing(file: bytes | int, *, follow_symlinks: bool = True) -> list[str]:
        if file == os.fsencode(tmp_path / "d"):
            raise OSError(errno.EIO, "Input/output error")
        return listed(file, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "listxattr", failing)
    batches = read(tmp_path, lambda _: None)
    assert skipped(batches) == [Skipped(b"d", "Input/output error")]
    found = {entry.path: entry for entry in entries(batches)}
    assert [*found] == [b"", b"d", b"d/file"]
    assert (found[b"d"].mode, found[b"d"].xattrs) == (0o750, ())


def test_many_small_files_are_delivered_before_they_are_all_read(tmp_path):
    for number in range(5000):
        (tmp_path / f"{number}").touch()
    batches = read(tmp_path, lambda _: None)
    assert len(entries(batches)) == 5001
    assert all(len(batch.pages) <= BATCH_PAGES for batch in batches)
    assert len(batches) > 5


def test_entries_without_content_are_delivered_though_a_small_file_came_first(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    for number in range(3000):
        (tmp_path / f"link{number}").symlink_to("a")
    batches = read(tmp_path, lambda _: None)
    assert len(entries(batches)) == 3002
    assert all(len(batch.pages) <= BATCH_PAGES for batch in batches)


def test_a_small_file_that_has_grown_is_read_into_blocks(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_bytes(b"content")

    def grow() -> None:
        (tmp_path / "b").write_bytes(b"content" + os.urandom(3 * BATCH_SIZE))

    before_it_is_opened(monkeypatch, b"b", grow)
    batches = read(tmp_path, lambda _: None)
    found = {entry.path: entry.size for entry in entries(batches) if entry.path}
    assert found == {b"a": 7, b"b": 7 + 3 * BATCH_SIZE, b"c": 7}
    assert max(batch.size for batch in batches) <= BATCH_SIZE
    assert sum(len(batch.blocks) for batch in batches) > 3 * BATCH_BLOCKS


def test_no_batch_of_a_sparse_file_has_more_chunks_than_one_question_may(tmp_path, monkeypatch):
    with (tmp_path / "sparse").open("wb") as file:
        for number in range(2 * MAX_IDS):
            file.seek(number * 8192)
            file.write(number.to_bytes(4, "big"))

    def extents(fd: int, size: int) -> Iterator[tuple[int, bool]]:
        """Those of a file system with blocks of 1 KiB."""
        for start in range(0, size, 8192):
            os.lseek(fd, start, os.SEEK_SET)
            yield min(1024, size - start), False
            if start + 1024 < size:
                yield 7168, True

    monkeypatch.setattr(tree, "extents", extents)
    batches = read(tmp_path, lambda _: None)
    assert max(len(batch.contents) for batch in batches) == MAX_IDS
    assert sum(len(batch.contents) for batch in batches) == 2 * MAX_IDS


def test_no_batch_has_more_chunks_than_one_question_may(tmp_path):
    # Names that end no page, so that a batch has as many entries as it can.
    names = (name for number in count() if not pages.is_last(name := b"%d" % number))
    for name in islice(names, MAX_IDS + 10):
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    batches = read(tmp_path, lambda _: None)
    assert max(len(batch.contents) for batch in batches) <= MAX_IDS
    assert len(entries(batches)) == MAX_IDS + 11


@pytest.fixture
def any_time() -> Iterator[Path]:
    """A directory on a file system that takes any time."""
    try:
        with TemporaryDirectory(dir="/dev/shm") as place:
            os.utime(place, ns=(0, 2**38 * 10**9))
            if os.stat(place).st_mtime_ns != 2**38 * 10**9:
                pytest.skip("times are cut here")
            yield Path(place)
    except OSError as error:
        pytest.skip(f"no /dev/shm: {error.strerror}")


def test_times_that_no_entry_can_have_are_reported_and_the_nearest_one_kept(any_time):
    for name in ("a", "b"):
        (any_time / name).write_text("content")
    (any_time / "d").mkdir()
    for name, seconds in {"": 2**38, "a": -(2**38), "b": 2**33, "d": 2**38}.items():
        os.utime(any_time / name, ns=(0, seconds * 10**9))
    batches = read(any_time, lambda _: None)
    assert [item.path for item in skipped(batches)] == [b"", b"a", b"d"]
    found = {entry.path: entry.mtime_ns for entry in entries(batches)}
    assert found == {b"": MAX_TIME, b"a": -MAX_TIME, b"b": 2**33 * 10**9, b"d": MAX_TIME}


def test_memory_is_bounded_by_whoever_takes_the_batches(root):
    waiting, go = threading.Event(), threading.Semaphore(0)
    taken: list[int] = []

    def deliver(batch: Batch) -> None:
        taken.append(batch.size)
        waiting.set()
        go.acquire()

    reader = threading.Thread(target=read, args=(root, deliver))
    reader.start()
    waiting.wait()
    assert len(taken) == 1
    for _ in range(100):
        go.release()
    reader.join()
    assert sum(taken) == 3 * SIZE


def test_no_more_is_read_than_there_are_blocks_for(tmp_path):
    """A block is used again when its batch was taken, whatever the files are like."""
    for number in range(300):
        (tmp_path / f"small{number}").write_bytes(os.urandom(9000))
    for name in ("large", "larger"):
        (tmp_path / name).write_bytes(os.urandom(17 * BLOCK_SIZE + 1))
    with (tmp_path / "sparse").open("wb") as file:
        for number in range(600):
            file.seek(number * 16384)
            file.write(number.to_bytes(4, "big"))
    free = threading.Semaphore(20)
    blocks: list[bytearray] = []

    def block() -> bytearray:
        assert free.acquire(timeout=10)
        return blocks.pop() if blocks else bytearray(BLOCK_SIZE)

    chunks: dict[bytes, bytes] = {}

    def deliver(batch: Batch) -> None:
        chunks.update((id, bytes(content)) for id, content in batch.contents.items())
        for memory in batch.blocks:
            memory[:] = bytes(len(memory))  # used for something else
            blocks.append(memory)
            free.release()

    found = entries(read(tmp_path, deliver, block, threads=3))
    contents: dict[bytes, bytes] = {}
    for entry in found[1:]:
        parts = zip(entry.chunks, entry.sizes, strict=True)
        content = b"".join(bytes(size) if id == HOLE else chunks[id] for id, size in parts)
        contents[entry.path] = contents.get(entry.path, b"") + content
    for path, content in contents.items():
        assert content == (tmp_path / os.fsdecode(path)).read_bytes()
    assert len(contents) == 303
    assert all(free.acquire(blocking=False) for _ in range(20))  # all came back
