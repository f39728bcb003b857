"""Scanning a directory tree."""

import os
import pwd
import random
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.backup.errors import InvalidEntry
from examples.backup.excludes import excluding
from examples.backup.tree import (
    DEVICES,
    HOLE,
    MAX_XATTRS,
    PART_CHUNKS,
    Entry,
    Found,
    Kind,
    Skipped,
    check_next,
    describe,
    extents,
    measure,
    opened,
    order,
    parts,
    scan,
)


def names(root: Path) -> list[bytes]:
    return [found.path for found in scan(os.fsencode(root))]


def entry_of(root: Path, path: bytes) -> Entry:
    (found,) = (found for found in scan(os.fsencode(root)) if found.path == path)
    assert isinstance(found, Found)
    return describe(os.fsencode(root), found)


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
    assert names(tmp_path) == [found.path for found in first]
    keys = [order(found.path) for found in first]
    assert keys == sorted(keys)


def test_entries_say_what_is_there(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "file").chmod(0o4750)
    os.utime(tmp_path / "file", ns=(1, 1_234_567_890_123_456_789))
    (tmp_path / "directory").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("nowhere/at all")
    root, directory, file, link = (entry_of(tmp_path, path) for path in names(tmp_path))
    assert (root.path, root.kind) == (b"", Kind.DIRECTORY)
    assert (directory.kind, directory.mode, directory.size) == (Kind.DIRECTORY, 0o700, 0)
    assert file[:5] == (b"file", Kind.FILE, 0o4750, 1_234_567_890_123_456_789, 5)
    assert (file.uid, file.gid, file.link) == (os.geteuid(), os.getegid(), b"")
    assert file.user == pwd.getpwuid(os.geteuid()).pw_name
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
    with opened(root, name + b"/" + name) as (fd, _, _):
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
    assert Skipped(b"socket", "a socket") in found
    assert [item.path for item in found] == [b"", b"fifo", b"file", b"socket"]


def test_what_vanishes_meanwhile_is_reported_and_the_rest_goes_on(tmp_path):
    for name in "abc":
        (tmp_path / name).touch()
    stream = scan(os.fsencode(tmp_path))
    assert next(stream).path == b""
    (tmp_path / "b").unlink()
    a, b, c = stream
    assert isinstance(a, Found)
    assert b == Skipped(b"b", "No such file or directory")
    assert isinstance(c, Found)


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
    with opened(os.fsencode(tmp_path), b"file") as (fd, entry, _):
        assert os.read(fd, 100) == b"grown"
    assert (before.size, entry.size) == (0, 5)


def test_what_is_no_file_any_more_is_not_opened(tmp_path):
    path = tmp_path / "file"
    path.touch()
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="symbolic links"), opened(os.fsencode(tmp_path), b"file"):
        pass
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no longer"), opened(os.fsencode(tmp_path), b"file"):
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


def test_fifos_and_devices_are_entries(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o640)
    assert entry_of(tmp_path, b"fifo")[1:3] == (Kind.FIFO, 0o640)
    if os.geteuid() == 0:
        os.mknod(tmp_path / "null", 0o020600, os.makedev(1, 3))
        null = entry_of(tmp_path, b"null")
        assert (null.kind, null.device) == (Kind.CHARACTER_DEVICE, os.makedev(1, 3))
        assert null.kind in DEVICES


def test_hard_links_name_the_first_of_them(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "b").write_text("content")
    os.link(tmp_path / "b", tmp_path / "d/c")
    os.link(tmp_path / "b", tmp_path / "z")
    (tmp_path / "other").touch()
    links = {path: entry_of(tmp_path, path).link for path in names(tmp_path)}
    assert links == {b"": b"", b"b": b"", b"d": b"", b"d/c": b"b", b"z": b"b", b"other": b""}


def test_extended_attributes_are_in_the_order_of_their_names(tmp_path):
    (tmp_path / "file").touch()
    for name, value in (("user.b", b"\0binary"), ("user.a", b"")):
        os.setxattr(tmp_path / "file", name, value)
    os.setxattr(tmp_path, "user.root", b"1")
    assert entry_of(tmp_path, b"file").xattrs == ((b"user.a", b""), (b"user.b", b"\0binary"))
    assert entry_of(tmp_path, b"").xattrs == ((b"user.root", b"1"),)
    with opened(os.fsencode(tmp_path), b"file") as (_, entry, _):
        assert entry.xattrs == entry_of(tmp_path, b"file").xattrs


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=8))
def test_the_extents_of_a_sparse_file_add_up_and_holes_are_zeros(pieces):
    with tempfile.TemporaryFile() as file:
        end = 0
        for hole, blocks in pieces:
            if not hole:
                os.pwrite(file.fileno(), random.Random(end).randbytes(4096 * blocks), end)
            end += 4096 * blocks
        file.truncate(end)
        at = 0
        for length, hole in extents(file.fileno(), end):
            if hole:
                assert not any(os.pread(file.fileno(), length, at))
            else:
                assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == at
            at += length
        assert at == end


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["*.o"], ["", "a", "a/keep", "b", "b/sub", "keep"]),
        (["/a"], ["", "b", "b/sub", "b/sub/x.o", "keep", "x.o"]),
        (["sub/"], ["", "a", "a/keep", "a/x.o", "b", "keep", "x.o"]),
        (["*.o", "!/x.o"], ["", "a", "a/keep", "b", "b/sub", "keep", "x.o"]),
    ],
)
def test_excludes_are_those_of_gitignore(tmp_path, patterns, left):
    for name in ("a/keep", "a/x.o", "b/sub/x.o", "keep", "x.o"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("12345")
    found = list(scan(os.fsencode(tmp_path), excluding(patterns)))
    assert [os.fsdecode(item.path) for item in found] == left
    files = sum((tmp_path / name).is_file() for name in left)
    assert measure(os.fsencode(tmp_path), excluding(patterns)) == (files, 5 * files)


def test_patterns_come_from_files_too_and_later_ones_override(tmp_path):
    (tmp_path / "patterns").write_bytes(b"# a comment\n*.o\n\xff\n")
    excluded = excluding(["!keep.o"], [tmp_path / "patterns"])
    assert excluded is not None
    assert excluded(b"x/a.o", False)
    assert excluded(b"\xff", True)
    assert not excluded(b"x/keep.o", False)
    assert excluding([]) is None


FIRST = Entry(b"b", Kind.FILE, 0o644, 0, 5, chunks=(b"1" * 32,), sizes=(5,))


@pytest.mark.parametrize(
    "entry",
    [
        FIRST._replace(path=b"c", link=b"b"),
        FIRST._replace(path=b"c", link=b"d", chunks=(), sizes=()),
        FIRST._replace(path=b"c", link=b"c", chunks=(), sizes=()),
        Entry(b"c", Kind.SYMLINK, 0, 0, link=b"b"),
        FIRST._replace(path=b"c", xattrs=((b"user.x", bytes(MAX_XATTRS)),)),
        FIRST._replace(path=b"c", chunks=(HOLE,), sizes=(0,)),
    ],
)
def test_entries_that_contradict_themselves_are_refused(entry):
    check_next(FIRST, FIRST._replace(path=b"c", link=b"b", chunks=(), sizes=()))
    check_next(FIRST, FIRST._replace(path=b"c", size=1 << 40, chunks=(HOLE,), sizes=(1 << 40,)))
    with pytest.raises(InvalidEntry):
        check_next(FIRST, entry)
