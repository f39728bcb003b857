"""Disks that fail, tear, lose and lie, at every write and sync of a small run; and power losses.

A shim below Python and SQLite makes them so: see `faults`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.examples.faults.losses import DISKS, problems
from tests.examples.faults.shim import compiled, environment

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="the shim is written for Linux"),
]

ROOT = Path(__file__).parents[2]
# Of the moments of a power loss one in so many is looked at; all take some 5 s in memory.
EVERY = int(os.environ.get("DRUVARPC_LOSSES_EVERY", "1"))


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """A directory in memory, where there is one: real disks have no part in this."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def outcome(work: Path) -> Any:
    """What the small run came to, with each fault at each of its operations."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.examples.faults.small_run", str(work)],
        cwd=ROOT,
        env=environment(compiled(work)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_whatever_fails_nothing_acknowledged_is_lost(outcome: Any) -> None:
    """Where nothing lies: all that was acknowledged is there, and the store is sound, and goes on.

    Where writes or syncs are said to be done and aren't, no restore returns wrong bytes.
    """
    assert outcome["problems"] == {}
    # That many writes and syncs were put to the test.
    assert outcome["operations"] > 100
    print(outcome["operations"], "operations:", outcome["outcomes"])


def test_what_fails_is_noticed(outcome: Any) -> None:
    outcomes = outcome["outcomes"]
    # A write of half is gone on with.
    assert outcomes["SHORT"] == {"nothing noticed": outcome["operations"]}
    # From a disk that is gone on, something has to fail.
    assert outcomes["TEAR"] == {"steps failed": outcome["operations"]}
    # What is not noticed is a checksum file that could not be written: they are taken anew.
    assert outcomes["FAIL"]["nothing noticed"] < outcome["operations"] / 10


def test_after_a_power_loss_all_that_was_acknowledged_is_there(outcome: Any, work: Path) -> None:
    """Whatever of the last writes and names the disk has kept."""
    (work / "losses").mkdir()
    found = Counter(problems(work / "log", work / "store", work / "losses", seed=1, every=EVERY))
    looked = found.pop("")
    assert found == Counter()
    assert looked > 100
    print(f"{looked} disks after power losses, each of these: {', '.join(DISKS)}")
