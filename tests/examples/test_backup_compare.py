"""How entries are listed."""

import pytest

from examples.backup.compare import listed
from examples.backup.tree import Entry, Kind


@pytest.mark.parametrize("year", [1600, 9999, 10_000, 100_000_000_000])
def test_any_time_can_be_listed(year):
    entry = Entry(b"f", Kind.FILE, 0o644, (year - 1970) * 31_556_952 * 10**9, 10)
    line = listed(entry)
    assert line.startswith("-rw-r--r-- 0 0 ")
    assert line.split()[-1].startswith("@") or len(line.split()) == 6


def test_names_of_owners_do_nothing_to_a_terminal():
    names = {"user": "\x1b[2J", "group": "a\nb"}
    line = listed(Entry(b"f", Kind.FILE, 0o644, 0)._replace(**names))
    assert line.startswith(r"-rw-r--r-- \x1b[2J a\nb ")
    assert line.isprintable()
