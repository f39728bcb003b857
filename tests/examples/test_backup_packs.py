"""Pack files, also after a crash."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.backup.chunks import LIMIT, Chunk
from examples.backup.errors import PackError
from examples.backup.interfaces import Location
from examples.backup.packs import HEADER, MAGIC, Packs


def chunk(number: int, size: int = 20) -> Chunk:
    return Chunk(number.to_bytes(32, "big"), size * 2, bytes([number % 256]) * size)


CHUNKS = [chunk(number, 10 * number) for number in range(1, 6)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "packs"


@contextmanager
def reopened(directory: Path, limit: int = LIMIT) -> Iterator[Packs]:
    packs = Packs(directory, limit)
    try:
        yield packs
    finally:
        packs.close()


def stored(directory: Path, chunks: list[Chunk], limit: int = LIMIT) -> list[Location]:
    with reopened(directory, limit) as packs:
        locations = packs.append(chunks)
        packs.sync()
        return locations


def test_what_is_appended_is_read_in_any_order(directory):
    with reopened(directory) as packs:
        first = packs.append(CHUNKS[:2])
        second = packs.append(CHUNKS[2:])
        packs.sync()
        assert list(packs.read(first + second)) == CHUNKS
        assert list(packs.read([second[0], first[1]])) == [CHUNKS[2], CHUNKS[1]]


def test_a_scan_finds_what_append_returned(directory):
    locations = stored(directory, CHUNKS)
    with reopened(directory) as packs:
        assert list(packs.scan(1)) == list(zip(locations, CHUNKS, strict=True))


def test_a_full_pack_is_followed_by_the_next(directory):
    with reopened(directory, limit=100) as packs:
        locations = [packs.append([chunk])[0] for chunk in CHUNKS]
        packs.sync()
        assert [location.pack for location in locations] == [1, 1, 2, 2, 3]
        assert packs.numbers() == [1, 2, 3]
        assert list(packs.read(locations)) == CHUNKS


def test_packs_of_earlier_runs_are_not_touched(directory):
    first = stored(directory, CHUNKS[:1])
    before = (directory / "00000001.pack").read_bytes()
    second = stored(directory, CHUNKS[1:])
    assert {location.pack for location in second} == {2}
    assert (directory / "00000001.pack").read_bytes() == before
    with reopened(directory) as packs:
        assert list(packs.read(first + second)) == CHUNKS


def test_opening_alone_makes_no_pack(directory):
    with reopened(directory) as packs:
        packs.sync()
        assert packs.numbers() == []


def test_a_tail_torn_at_any_byte_is_tolerated(directory):
    locations = stored(directory, CHUNKS)
    path = directory / "00000001.pack"
    whole = path.read_bytes()
    last = locations[-1]
    assert last.offset + last.length == len(whole)
    for end in range(last.offset, len(whole)):
        for tail in (b"", bytes(len(whole) - end), b"\xff" * 3):
            path.write_bytes(whole[:end] + tail)
            with reopened(directory) as packs:
                assert [found for found, _ in packs.scan(1)] == locations[:-1]
                assert list(packs.read(locations[:-1])) == CHUNKS[:-1]
                with pytest.raises(PackError, match="damaged at byte"):
                    list(packs.read(locations[-1:]))


def test_a_pack_torn_while_it_was_begun_is_empty(directory):
    stored(directory, [])
    path = directory / "00000001.pack"
    for content in [*(MAGIC[:end] for end in range(len(MAGIC) + 1)), bytes(100)]:
        path.write_bytes(content)
        with reopened(directory) as packs:
            assert list(packs.scan(1)) == []
            (location,) = packs.append(CHUNKS[:1])
            assert location.pack == 2
        (directory / "00000002.pack").unlink()


def test_a_change_of_any_byte_is_found(directory):
    locations = stored(directory, CHUNKS)
    path = directory / "00000001.pack"
    whole = path.read_bytes()
    second = locations[1]
    for at in range(second.offset, second.offset + second.length):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with reopened(directory) as packs:
            assert [found for found, _ in packs.scan(1)] == locations[:1]
            with pytest.raises(PackError):
                list(packs.read([second]))
            assert list(packs.read(locations[2:])) == CHUNKS[2:]


def test_a_location_that_is_none_is_refused(directory):
    (location,) = stored(directory, CHUNKS[:1])
    with reopened(directory) as packs:
        for wrong in (
            Location(1, location.offset + 1, location.length),
            Location(1, location.offset, location.length - 1),
            Location(1, location.offset, location.length + 1),
            Location(1, location.offset, 1 << 60),
            Location(1, 1 << 40, location.length),
            Location(1, location.offset, HEADER.size - 1),
            Location(2, location.offset, location.length),
        ):
            with pytest.raises(PackError):
                list(packs.read([wrong]))


def test_a_file_that_is_no_pack_is_refused(directory):
    stored(directory, CHUNKS)
    (directory / "00000001.pack").write_bytes(b"something else")
    with reopened(directory) as packs, pytest.raises(PackError, match="not a pack"):
        list(packs.scan(1))


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("allowed", [0, 5, 8, 60, 100, 200])
def test_after_a_failed_write_appending_goes_on(directory, allowed):
    with reopened(directory) as packs:
        with files_no_larger_than(allowed), pytest.raises(OSError, match="too large"):
            packs.append([chunk(9, 300)])
        locations = packs.append(CHUNKS)
        packs.sync()
        assert list(packs.read(locations)) == CHUNKS
        assert packs.numbers() == [1]
        assert [found for found, _ in packs.scan(1)] == locations


def test_a_write_that_failed_does_not_harm_those_before(directory):
    with reopened(directory) as packs:
        first = packs.append(CHUNKS[:3])
        limit = first[-1].offset + first[-1].length + 50
        with files_no_larger_than(limit), pytest.raises(OSError, match="too large"):
            packs.append(CHUNKS)
        second = packs.append(CHUNKS[3:])
        packs.sync()
        assert list(packs.read(first + second)) == CHUNKS


def test_packs_are_told_of_before_they_are_made(directory):
    told = []

    def register(number: int) -> None:
        assert not (directory / f"{number:08}.pack").exists()
        told.append(number)

    packs = Packs(directory, 100, register=register)
    try:
        for one in CHUNKS:
            packs.append([one])
    finally:
        packs.close()
    assert told == [1, 2, 3]


def test_the_number_of_a_pack_that_was_removed_is_known_from_elsewhere(directory):
    packs = Packs(directory, last=7)
    try:
        (location,) = packs.append(CHUNKS[:1])
    finally:
        packs.close()
    assert location.pack == 8
