"""Restoring into a directory, whatever the snapshot says."""

import errno
import os
import pwd
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.backup.errors import RestoreError, UnsafePath
from examples.backup.output import Rules
from examples.backup.target import OPEN_PARENTS, Target, components
from examples.backup.tree import Entry, Kind, Skipped

TIME = 1_234_567_890_123_456_789


def directory(path: bytes, mode: int = 0o755) -> Entry:
    return Entry(path, Kind.DIRECTORY, mode, TIME)


def file(path: bytes, size: int = 0, mode: int = 0o644) -> Entry:
    return Entry(path, Kind.FILE, mode, TIME, size)


def link(path: bytes, target: bytes) -> Entry:
    return Entry(path, Kind.SYMLINK, 0o777, TIME, target=target)


def write(target: Target, path: bytes, content: bytes, mode: int = 0o644) -> None:
    output = target.open(file(path, len(content), mode))
    try:
        output.write(0, content)
        output.finish()
    finally:
        output.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "destination"


@pytest.fixture
def reports() -> list[Skipped]:
    return []


@pytest.fixture
def target(place: Path, reports: list[Skipped]):
    with Target(os.fsencode(place), report=reports.append) as target:
        yield target


def test_a_tree_is_restored_with_modes_and_times(place, target):
    target.add(directory(b"", 0o750))
    target.add(directory(b"d", 0o500))
    target.add(link(b"d/link", b"../e"))
    write(target, b"d/file", b"content", 0o604)
    write(target, b"empty", b"")
    target.finish()
    assert (place / "d/file").read_bytes() == b"content"
    assert os.readlink(place / "d/link") == "../e"
    for name, mode in {"": 0o750, "d": 0o500, "d/file": 0o604, "empty": 0o644}.items():
        status = (place / name).stat()
        assert (status.st_mode & 0o7777, status.st_mtime_ns) == (mode, TIME)
    assert (place / "d/link").lstat().st_mtime_ns == TIME


def test_pieces_may_come_in_any_order(place, target):
    output = target.open(file(b"file", 6))
    output.write(4, b"ef")
    output.write(0, memoryview(b"abcd"))
    output.finish()
    assert (place / "file").read_bytes() == b"abcdef"


def test_the_last_part_says_how_large_the_file_is(place, target):
    first = file(b"file", 10)
    output = target.open(first)
    output.write(0, b"abcd")
    output.finish(first._replace(size=4, mtime_ns=5))
    assert (place / "file").stat().st_mtime_ns == 5


UNSAFE = [
    b"..",
    b"../x",
    b"a/../../x",
    b"/etc/passwd",
    b"a//b",
    b"a/",
    b"./a",
    b"a/.",
    b"a\0b",
    b"/",
]


@pytest.mark.parametrize("path", UNSAFE)
def test_paths_that_lead_outside_are_refused(tmp_path, place, target, path):
    target.add(directory(b"a"))
    with pytest.raises(UnsafePath) as caught:
        target.open(file(path))
    assert caught.value.path == path
    with pytest.raises(UnsafePath):
        target.add(directory(path))
    with pytest.raises(UnsafePath):
        target.add(link(path, b"x"))
    assert list(tmp_path.iterdir()) == [place]
    assert list(place.rglob("*")) == [place / "a"]


@given(st.lists(st.sampled_from([b"", b".", b"..", b"a", b"..a", b"\xff", b"\0"])))
def test_accepted_paths_stay_inside(names):
    path = b"/".join(names)
    try:
        accepted = components(path)
    except UnsafePath:
        assert {b"", b".", b"..", b"\0"} & set(names)
    else:
        assert b"/".join(accepted) == path
        assert os.path.normpath(b"/base/" + path) == (b"/base/" + path).rstrip(b"/")


def test_a_planted_link_is_not_followed(tmp_path, place, target):
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o711)
    (outside / "file").write_bytes(b"precious")
    (place / "d").symlink_to(outside)
    (place / "file").symlink_to(outside / "file")
    with pytest.raises(RestoreError, match=r"d/x: "):
        target.open(file(b"d/x"))
    with pytest.raises(RestoreError, match=r"d: "):
        target.add(directory(b"d"))
    with pytest.raises(RestoreError, match=r"d/e: "):
        target.add(directory(b"d/e"))
    write(target, b"file", b"mine")
    assert (place / "file").read_bytes() == b"mine"
    assert not (place / "file").is_symlink()
    assert [(path.name, path.read_bytes()) for path in outside.iterdir()] == [("file", b"precious")]
    assert outside.stat().st_mode & 0o777 == 0o711


def test_a_link_planted_after_the_directory_was_made_is_not_followed(
    tmp_path, place, target, reports
):
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o711)
    target.add(directory(b"d", 0o777))
    (place / "d").rmdir()
    (place / "d").symlink_to(outside)
    with pytest.raises(RestoreError):
        target.open(file(b"d/x"))
    target.finish()
    assert [report.path for report in reports] == [b"d"]
    assert list(outside.iterdir()) == []
    assert outside.stat().st_mode & 0o777 == 0o711


def test_links_of_the_snapshot_do_not_redirect_its_files(tmp_path, place, target, reports):
    target.add(directory(b"d"))
    target.add(link(b"d", os.fsencode(tmp_path)))
    write(target, b"d/file", b"inside")
    target.finish()
    assert [report.path for report in reports] == [b"d"]
    assert (place / "d/file").read_bytes() == b"inside"
    assert not (tmp_path / "file").exists()


def test_hard_links_are_not_written_through(tmp_path, place, target):
    (tmp_path / "other").write_bytes(b"precious")
    os.link(tmp_path / "other", place / "file")
    write(target, b"file", b"mine")
    assert (tmp_path / "other").read_bytes() == b"precious"
    assert (place / "file").read_bytes() == b"mine"


def test_what_exists_is_replaced_unless_it_is_a_directory(place, target):
    (place / "link").symlink_to("old")
    (place / "d").mkdir()
    target.add(link(b"link", b"new"))
    with pytest.raises(RestoreError, match=r"d: "):
        target.open(file(b"d"))
    target.finish()
    assert os.readlink(place / "link") == "new"


def test_special_permissions_are_left_out(place, target):
    target.add(directory(b"d", 0o7755))
    write(target, b"d/program", b"", 0o6755)
    target.finish()
    assert (place / "d").stat().st_mode & 0o7777 == 0o755
    assert (place / "d/program").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    ("offset", "content"), [(-1, b"x"), (0, b"12345"), (4, b"x"), (1 << 70, b"x"), (4, b"")]
)
def test_a_file_grows_no_larger_than_declared(target, offset, content):
    output = target.open(file(b"file", 4))
    if content or offset > 4:
        with pytest.raises(RestoreError, match="outside"):
            output.write(offset, content)
    with pytest.raises(RestoreError, match="0 bytes written"):
        output.finish()


@pytest.mark.parametrize("pieces", [[], [(0, b"abc")], [(2, b"cd")], [(0, b"ab"), (0, b"ab")]])
def test_an_incomplete_file_is_an_error(target, pieces):
    output = target.open(file(b"file", 4))
    for offset, content in pieces:
        output.write(offset, content)
    with pytest.raises(RestoreError, match="bytes written"):
        output.finish()


@pytest.mark.parametrize(
    "entry",
    [
        file(b""),
        directory(b"d"),
        file(b"missing/file"),
        file(b"x" * 256),
    ],
)
def test_what_cannot_be_opened_is_named(target, entry):
    with pytest.raises(RestoreError) as caught:
        target.open(entry)
    assert caught.value.path == entry.path


@pytest.mark.parametrize(
    "entry",
    [
        link(b"link", b""),
        link(b"link", b"a\0b"),
        link(b"missing/link", b"x"),
        directory(b"d")._replace(mtime_ns=1 << 100),
    ],
)
def test_what_cannot_be_finished_is_named_and_the_rest_goes_on(place, target, reports, entry):
    target.add(directory(b"", 0o750))
    with target.going_on():
        target.add(entry)
    target.add(link(b"z", b"x"))
    target.finish()
    assert [report.path for report in reports] == [entry.path]
    assert os.readlink(place / "z") == "x"
    assert place.stat().st_mode & 0o777 == 0o750


def test_what_would_hit_all_others_as_well_ends_it(target, reports):
    for cause in (OSError(errno.ENOSPC, "No space left on device"), None):
        with pytest.raises(RestoreError, match=r"f: "), target.going_on():
            raise RestoreError(b"f", "it failed") from cause
    assert reports == []


def test_files_and_the_root_as_links_are_refused(target):
    for entry in (file(b"file"), link(b"", b"x")):
        with pytest.raises(RestoreError):
            target.add(entry)


def test_an_error_shows_odd_names_on_one_line(target):
    with pytest.raises(RestoreError, match=r"^missing/\\n\\x1b\\xff: No such"):
        target.open(file(b"missing/\n\x1b\xff"))


def test_nothing_is_done_after_close(target):
    target.close()
    target.close()
    with pytest.raises(RestoreError):
        target.open(file(b"file"))
    with pytest.raises(RestoreError):
        target.add(directory(b"d/e"))


def test_the_destination_may_exist_and_its_parent_must(tmp_path):
    (tmp_path / "there").mkdir()
    Target(os.fsencode(tmp_path / "there")).close()
    with pytest.raises(FileNotFoundError):
        Target(os.fsencode(tmp_path / "not/there"))


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may")


def test_hard_links_are_made_last_and_only_of_files_inside(place, target):
    write(target, b"a", b"content")
    target.add(directory(b"d"))
    target.add(file(b"d/b", 7)._replace(link=b"a"))
    target.finish()
    assert (place / "a").stat().st_ino == (place / "d/b").stat().st_ino
    with pytest.raises(UnsafePath):
        target.add(file(b"d/c")._replace(link=b"../a"))


@pytest.mark.parametrize("planted", ["a link", "another file", "nothing"])
def test_what_somebody_put_in_the_place_of_a_links_file_is_refused(
    tmp_path, place, target, reports, planted
):
    (tmp_path / "secret").write_text("a secret")
    write(target, b"a", b"content")
    target.add(file(b"b", 7)._replace(link=b"a"))
    (place / "a").unlink()
    if planted == "a link":
        (place / "a").symlink_to(tmp_path / "secret")
    elif planted == "another file":
        os.link(tmp_path / "secret", place / "a")
    target.add(link(b"c", b"x"))
    target.finish()
    assert [report.path for report in reports] == [b"b"]
    assert os.readlink(place / "c") == "x"


def test_holes_take_no_space_and_may_end_a_file(place, target):
    size = 1 << 30
    output = target.open(file(b"sparse", size))
    output.skip(0, size - 8192)
    output.write(size - 8192, b"x" * 4096)
    output.skip(size - 4096, 4096)
    output.finish()
    status = (place / "sparse").stat()
    assert status.st_size == size
    assert status.st_blocks * 512 < 1_000_000
    for offset, length in ((-1, 5), (0, size + 1), (size, 1), (5, -1)):
        again = target.open(file(b"other", size))
        with pytest.raises(RestoreError, match="outside"):
            again.skip(offset, length)
        again.close()


def test_extended_attributes_are_set_and_those_that_cannot_be_are_reported(place, reports):
    xattrs = ((b"nonsense", b"x"), (b"security.capability", b"x"), (b"user.a", b"1"))
    with Target(os.fsencode(place), report=reports.append) as target:
        target.add(directory(b"", 0o755)._replace(xattrs=xattrs[2:]))
        output = target.open(file(b"f")._replace(xattrs=xattrs))
        output.finish()
        target.finish()
    assert os.getxattr(place / "f", "user.a") == os.getxattr(place, "user.a") == b"1"
    assert os.listxattr(place / "f") == ["user.a"]
    assert [report.path for report in reports] == [b"f", b"f"]
    assert "nonsense" in reports[0].reason
    assert "only if asked" in reports[1].reason


def test_special_permissions_are_restored_if_asked_for_and_else_reported(tmp_path, reports):
    for special in (False, True):
        place = tmp_path / f"{special}"
        rules = Rules(owner=False, special=special)
        with Target(os.fsencode(place), rules, reports.append) as target:
            target.add(directory(b"d", 0o1777))
            write(target, b"d/program", b"", 0o4755)
            target.finish()
        mode = (place / "d/program").stat().st_mode & 0o7777
        assert mode == (0o4755 if special else 0o755)
    assert [report.path for report in reports] == [b"d/program", b"d"]


@root_only
def test_owners_are_restored_by_name_or_else_by_number(tmp_path):
    for owner in (True, False):
        place = tmp_path / f"{owner}"
        with Target(os.fsencode(place), Rules(owner=owner)) as target:
            numbered = file(b"f")._replace(uid=12345, gid=54321, user="no such user")
            target.open(numbered).finish()
            target.open(file(b"g")._replace(uid=777, user="daemon", group="daemon")).finish()
            target.add(link(b"l", b"x")._replace(uid=12345, gid=54321))
            target.finish()
        found = {p.name: (p.lstat().st_uid, p.lstat().st_gid) for p in place.iterdir()}
        daemon = pwd.getpwnam("daemon")
        if owner:
            theirs = (12345, 54321)
            assert found == {"f": theirs, "g": (daemon.pw_uid, daemon.pw_gid), "l": theirs}
        else:
            assert set(found.values()) == {(os.geteuid(), os.getegid())}


@root_only
def test_the_owner_is_set_whatever_the_place_gives_a_new_file(place, target):
    os.chown(place, 0, 12345)
    place.chmod(0o2755)
    target.add(directory(b"d"))
    for path in (b"d/f", b"g"):
        write(target, path, b"")
    target.add(link(b"l", b"x"))
    target.finish()
    mine = (os.geteuid(), os.getegid())
    for path in ("d", "d/f", "g", "l"):
        status = (place / path).lstat()
        assert (status.st_uid, status.st_gid) == mine, path


@root_only
def test_the_owner_of_what_is_there_is_set_to_the_restoring_users(place, target):
    for name in ("d", "e"):
        (place / name).mkdir()
        os.chown(place / name, 12345, 12345)
    target.add(directory(b"d"))
    target.finish()
    assert (place / "d").stat().st_uid == os.geteuid()
    assert (place / "e").stat().st_uid == 12345


def test_attributes_that_are_there_and_should_not_be_are_removed(place, target):
    (place / "f").write_text("12345")
    for name in ("user.old", "user.kept"):
        os.setxattr(place / "f", name, b"1")
    entry = file(b"f", 5)._replace(xattrs=((b"user.kept", b"2"), (b"user.new", b"3")))
    with target.existing(entry) as fd:
        assert fd is not None
        assert target.refresh(fd, entry)
    found = {name: os.getxattr(place / "f", name) for name in os.listxattr(place / "f")}
    assert found == {"user.kept": b"2", "user.new": b"3"}


@pytest.mark.parametrize("other", ["nothing", "its mode", "its time", "an attribute", "an extra"])
def test_a_file_with_other_names_is_left_alone_or_else_written_anew(place, target, other):
    xattrs = ((b"user.a", b"1"),)
    entry = file(b"f", 5)._replace(xattrs=() if other == "an extra" else xattrs)
    (place / "f").write_text("12345")
    os.setxattr(place / "f", "user.a", b"2" if other == "an attribute" else b"1")
    (place / "f").chmod(0o600 if other == "its mode" else 0o644)
    os.utime(place / "f", ns=(1, 1 if other == "its time" else TIME))
    os.link(place / "f", place / "mine")
    before = (place / "mine").stat()
    with target.existing(entry) as fd:
        assert fd is not None
        assert target.refresh(fd, entry) == (other == "nothing")
    assert (place / "mine").stat() == before


@root_only
def test_links_have_attributes_too(place, target, reports):
    target.add(link(b"l", b"x")._replace(xattrs=((b"trusted.a", b"1"),)))
    target.finish()
    if reports:  # a container, for instance
        pytest.skip(reports[0].reason)
    assert os.getxattr(place / "l", "trusted.a", follow_symlinks=False) == b"1"


def test_an_owner_that_may_not_be_set_is_reported(place, reports, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    with Target(os.fsencode(place), Rules(owner=True), reports.append) as target:
        write(target, b"f", b"")
        theirs = {"uid": 12345, "gid": 12345}
        target.add(directory(b"d")._replace(**theirs))
        target.add(link(b"l", b"x")._replace(**theirs))
        target.finish()
    assert [(report.path, report.reason) for report in reports] == [
        (b"l", "its owner: Operation not permitted"),
        (b"d", "its owner: Operation not permitted"),
    ]


def test_fifos_are_restored_and_devices_if_asked_for(place, reports):
    null = Entry(b"null", Kind.CHARACTER_DEVICE, 0o666, TIME, device=os.makedev(1, 3))
    with Target(os.fsencode(place), report=reports.append) as target:
        target.add(Entry(b"fifo", Kind.FIFO, 0o640, TIME))
        target.add(null)
    status = (place / "fifo").stat()
    assert stat.S_ISFIFO(status.st_mode)
    assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o640, TIME)
    assert not (place / "null").exists()
    assert [report.path for report in reports] == [b"null"]
    if os.geteuid() == 0:
        with Target(os.fsencode(place), Rules(devices=True)) as target:
            target.add(null)
        assert (place / "null").stat().st_rdev == os.makedev(1, 3)
        assert (place / "null").stat().st_mode & 0o777 == 0o666


def test_only_regular_files_of_the_same_size_are_candidates_for_equal(tmp_path, place, target):
    (place / "f").write_text("12345")
    (place / "link").symlink_to("f")
    os.mkfifo(place / "fifo")
    for path, size, there in (
        (b"f", 5, True),
        (b"f", 4, False),
        (b"link", 5, False),
        (b"fifo", 0, False),
        (b"nothing", 0, False),
    ):
        with target.existing(file(path, size)) as fd:
            assert (fd is not None) == there
    for path in (b"", b"../" + os.fsencode(tmp_path.name)):
        with pytest.raises(UnsafePath), target.existing(file(path)):
            pass


def test_more_directories_than_are_kept_open(place, target):
    wide = [b"%d" % number for number in range(2 * OPEN_PARENTS)]
    for name in wide:
        target.add(directory(name))
        target.add(directory(name + b"/below"))
    for name in [*wide, *reversed(wide)]:
        write(target, name + b"/below/file", name)
    before = len(os.listdir("/proc/self/fd"))
    target.finish()
    target.close()
    assert len(os.listdir("/proc/self/fd")) < before
    assert all((place / os.fsdecode(n) / "below/file").read_bytes() == n for n in wide)


def test_many_threads_write_files_at_the_same_time(place, target):
    def put(number: int) -> None:
        write(target, b"%d/f%d" % (number % 7, number), b"%d" % number)

    for number in range(7):
        target.add(directory(b"%d" % number))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(300)))
    target.finish()
    assert sorted(int(path.read_bytes()) for path in place.rglob("f*")) == list(range(300))
