"""The programs in docs/ print what the pages say that they print."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / page).read_text())


@pytest.mark.parametrize("page", ["where-time-goes.md", "resilience.md"])
def test_program(page: str, tmp_path: Path) -> None:
    """The program is the page's first block; its output is another block, as a whole."""
    (kind, program), *others = blocks(page)
    assert kind == "python"
    (tmp_path / "where.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, "where.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() in [text.strip() for _, text in others]


def test_transports(tmp_path: Path) -> None:
    """Likewise: the page's first block, and the second."""
    (kind, program), (_, output), *_ = blocks("transports.md")
    assert kind == "python"
    (tmp_path / "secure.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, "secure.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == output


def test_compression(tmp_path: Path) -> None:
    """The page's first block is a program, and the second is its output."""
    (kind, program), (_, output), *_ = blocks("compression.md")
    assert kind == "python"
    (tmp_path / "logs.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, "logs.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    # zlib's versions differ in how well they compress.
    figure = re.compile(r"\d+")
    assert figure.sub("N", ran.stdout) == figure.sub("N", output)
    sent, saved = (int(number) for number in figure.findall(ran.stdout))
    assert saved > 5 * sent


def test_testing(tmp_path: Path) -> None:
    """The page's blocks are one file of tests."""
    tests = "\n\n".join(text for kind, text in blocks("testing.md") if kind == "python")
    (tmp_path / "test_page.py").write_text(tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert f"{tests.count('async def test_')} passed" in ran.stdout


@pytest.mark.parametrize("page", ["interceptors.md", "metadata.md", "identity.md"])
def test_programs(page: str, tmp_path: Path) -> None:
    """Each program of the page is followed by a block that is its output."""
    pairs = [(first[1], then[1]) for first, then in pairwise(blocks(page)) if first[0] == "python"]
    assert pairs
    for number, (program, output) in enumerate(pairs):
        name = f"program_{number}.py"
        (tmp_path / name).write_text(program)
        ran = subprocess.run(
            [sys.executable, name], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ran.stdout == output, ran.stderr
