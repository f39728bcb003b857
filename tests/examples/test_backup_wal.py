"""SQLite's log, made by hand: what is damaged in it, and what is as a crash leaves it."""

import sys
from pathlib import Path
from struct import pack, unpack

import pytest

from examples.backup.files import FILES
from examples.backup.wal import BLOCK, FRAME, HEADER, MARK, log_damage

SIZE = 512
SALT = b"saltsalt"


def checksum(order: str, data: bytes, sums: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Returns it as sqlite.org/fileformat2.html has it."""
    first, second = sums
    words = unpack(f"{order}{len(data) // 4}I", data)
    for one, other in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) % 2**32
        second = (second + other + first) % 2**32
    return first, second


def log(order: str, count: int) -> bytes:
    """Returns a log of so many frames, of which each is a transaction that waited for the disk."""
    header = pack(">IIII8s", 0x377F0682 | (order == ">"), 3007000, SIZE, 0, SALT)
    sums = checksum(order, header)
    made = header + pack(">II", *sums)
    for number in range(count):
        page = bytes([255 - number % 256, number // 256]) * (SIZE // 2)
        head = pack(">II", MARK, 1)
        sums = checksum(order, head + page, sums)
        made += head + SALT + pack(">II", *sums) + page
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "database"


def damage(path: Path, content: bytes) -> str:
    path.with_name("database-wal").write_bytes(content)
    return log_damage(path, SIZE, FILES)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("count", [0, 1, 3, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_a_sound_log_is_sound_wherever_it_ends(path: Path, order: str, count: int):
    made = log(order, count)
    for rest in (0, 1, FRAME.size, FRAME.size + SIZE - 1):
        assert damage(path, made[: len(made) - rest]) == ""
        assert damage(path, made + bytes(rest)) == ""


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("number", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 3])
def test_a_flipped_bit_before_what_is_durable_is_damage(path: Path, order: str, number: int):
    made = log(order, BLOCK + 6)
    begin = HEADER.size + (number - 1) * (FRAME.size + SIZE)
    for at in (0, 4, 8, 16, FRAME.size - 1, FRAME.size, FRAME.size + SIZE // 2):
        found = damage(path, flipped(made, begin + at))
        assert found == (
            f"database-wal: frame {number} is damaged, and what was committed after it"
        )
    last = len(made) - FRAME.size - SIZE
    assert damage(path, flipped(made, last)) == ""


def test_a_flipped_bit_in_the_header_is_damage(path: Path):
    # Which order it had can't be told then: it is taken to be this machine's.
    made = log("<" if sys.byteorder == "little" else ">", 3)
    for at in (0, 3, 5, 13, 20, 25, 31):
        found = damage(path, flipped(made, at))
        assert found.startswith("database-wal: its header is damaged")


def test_a_size_that_no_page_has_is_left_to_sqlite(path: Path):
    path.with_name("database-wal").write_bytes(flipped(log("<", 5), 600))
    assert [log_damage(path, size, FILES) for size in (0, 256, SIZE + 1, SIZE + 8)] == [""] * 4
