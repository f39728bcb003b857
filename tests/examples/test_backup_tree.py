"""Scanning a directory tree."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.backup.tree import (
    PART_CHUNKS,
    Entry,
    Kind,
    Skipped,
    opened,
    order,
    parts,
    scan,
)


def names(root: Path) -> list[bytes]:
    return [found.path for found in scan(os.fsencode(root))]


def entry_of(root: Path, path: bytes) -> Entry:
    (entry,) = (found for found in scan(os.fsencode(root)) if found.path == path)
    assert isinstance(entry, Entry)
    return entry


def test_directories_come_before_what_is_in_them_and_names_by_their_bytes(tmp_path):
    for name in ("b/z", "b/a", "b-c", "a", "B", "b.d/x"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert names(tmp_path) == [
        *(b"", b"B", b"a", b"b", b"b/a", b"b/z"),
        *(b"b-c", b"b.d", b"b.d/x"),
    ]


def test_scanning_again_gives_the_same_in_ascending_order(tmp_path):
    for number in range(50):
        (tmp_path / f"{number % 7}").mkdir(exist_ok=True)
        (tmp_path / f"{number % 7}" / f"{number}").touch()
        (tmp_path / f"{number % 7}-{number}").touch()
    first = list(scan(os.fsencode(tmp_path)))
    assert first == list(scan(os.fsencode(tmp_path)))
    keys = [order(found.path) for found in first]
    assert keys == sorted(keys)


def test_entries_say_what_is_there(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "file").chmod(0o4750)
    os.utime(tmp_path / "file", ns=(1, 1_234_567_890_123_456_789))
    (tmp_path / "directory").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("nowhere/at all")
    root, directory, file, link = scan(os.fsencode(tmp_path))
    assert (root.path, root.kind) == (b"", Kind.DIRECTORY)
    assert (directory.kind, directory.mode, directory.size) == (Kind.DIRECTORY, 0o700, 0)
    assert file == Entry(b"file", Kind.FILE, 0o4750, 1_234_567_890_123_456_789, 5)
    assert (link.kind, link.target, link.size) == (Kind.SYMLINK, b"nowhere/at all", 0)


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"a\nb", b" ", b"-rf", b"\\", "ü".encode(), b"x" * 255]
)
def test_any_name_survives(tmp_path, name):
    root = os.fsencode(tmp_path)
    os.mkdir(root + b"/" + name)
    with open(root + b"/" + name + b"/" + name, "wb") as file:
        file.write(b"content")
    assert names(tmp_path) == [b"", name, name + b"/" + name]
    with opened(root, entry_of(tmp_path, name + b"/" + name)) as (fd, _):
        assert os.read(fd, 100) == b"content"


def test_links_to_directories_are_not_followed(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names(tmp_path) == [b"", b"loop"]


def test_other_kinds_are_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        found = list(scan(b"."))
    assert Skipped(b"fifo", "a FIFO") in found
    assert Skipped(b"socket", "a socket") in found
    assert [item.path for item in found] == [b"", b"fifo", b"file", b"socket"]


def test_what_vanishes_meanwhile_is_reported_and_the_rest_goes_on(tmp_path):
    for name in "abc":
        (tmp_path / name).touch()
    stream = scan(os.fsencode(tmp_path))
    assert next(stream).path == b""
    (tmp_path / "b").unlink()
    a, b, c = stream
    assert isinstance(a, Entry)
    assert b == Skipped(b"b", "No such file or directory")
    assert isinstance(c, Entry)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_directory_is_reported_and_the_rest_goes_on(tmp_path):
    (tmp_path / "a").mkdir(mode=0)
    (tmp_path / "b").touch()
    found = list(scan(os.fsencode(tmp_path)))
    assert [item.path for item in found] == [b"", b"a", b"a", b"b"]
    assert found[2] == Skipped(b"a", "Permission denied")


def test_a_root_that_is_no_directory_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        next(scan(os.fsencode(tmp_path / "file")))
    with pytest.raises(FileNotFoundError):
        next(scan(os.fsencode(tmp_path / "nothing")))


def test_an_opened_file_is_described_as_it_now_is(tmp_path):
    (tmp_path / "file").touch()
    before = entry_of(tmp_path, b"file")
    (tmp_path / "file").write_bytes(b"grown")
    with opened(os.fsencode(tmp_path), before) as (fd, entry):
        assert os.read(fd, 100) == b"grown"
    assert (before.size, entry.size) == (0, 5)


def test_what_is_no_file_any_more_is_not_opened(tmp_path):
    path = tmp_path / "file"
    path.touch()
    entry = entry_of(tmp_path, b"file")
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="symbolic links"), opened(os.fsencode(tmp_path), entry):
        pass
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no longer"), opened(os.fsencode(tmp_path), entry):
        pass


@given(st.lists(st.integers(1, 9), max_size=3 * PART_CHUNKS), st.integers(0, 5))
def test_parts_follow_each_other_and_the_last_is_complete(sizes, shrunk_by):
    entry = Entry(b"file", Kind.FILE, 0o644, 0, sum(sizes) + shrunk_by)
    chunks = [(bytes([size]) * 32, size) for size in sizes]
    *most, last = parts(entry, chunks)
    end = 0
    for part in [*most, last]:
        assert part.offset == end
        assert len(part.chunks) == len(part.sizes) <= PART_CHUNKS
        end = part.end
    assert all(part.end < part.size for part in most)
    assert last.end == last.size == sum(sizes)
    assert [
        pair for part in [*most, last] for pair in zip(part.chunks, part.sizes, strict=True)
    ] == chunks


def test_parts_of_a_very_large_file():
    chunks = ((bytes(32), 1) for _ in range(2 * PART_CHUNKS))
    first, second = parts(Entry(b"file", Kind.FILE, 0o644, 0, 2 * PART_CHUNKS), chunks)
    assert (first.end, second.offset, second.end) == (1024, 1024, 2048)
