"""Figures as text, tables as Markdown, and the blocks of files that hold them."""

from collections.abc import Sequence
from pathlib import Path

# Typography, spelt so that it can't be taken for a letter or a hyphen.
TIMES, DASH = "\u00d7", "\u2013"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count(value: float) -> str:
    """Return three digits of a number: 9.1, 912, 37,900."""
    if value < 100:
        return f"{value:.3g}"
    digits = len(str(int(value))) - 3
    return f"{round(value, -digits):,.0f}"


def ratio(value: float) -> str:
    """Return two or three digits of a ratio."""
    return f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f}"


def byte_rate(value: float) -> str:
    """Return bytes per second."""
    return f"{value / 1e9:.2f} GB/s" if value >= 1e9 else f"{value / 1e6:.3g} MB/s"


def kibibytes(value: float) -> str:
    """Return bytes of memory."""
    return f"{value / 1024:.1f} KiB"


def microseconds(value: float) -> str:
    """Return seconds as microseconds, without the unit."""
    return count(value * 1e6)


def milliseconds_per_gigabyte(value: float) -> str:
    """Return seconds per byte as milliseconds per gigabyte, without the unit."""
    return count(value * 1e12)


def replace_block(path: Path, name: str, text: str) -> bool:
    """Put `text` between the markers of that name in a file; return whether it has them."""
    if not path.exists():
        return False
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = path.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        return False
    path.write_text(f"{before}{first}\n\n{text}\n\n{last}{after}")
    return True
