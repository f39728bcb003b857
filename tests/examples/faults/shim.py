"""Programs that run with `shim.c` between them and libc; and, inside of them, its functions."""

import ctypes
import enum
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("shim.c")


class Fault(enum.IntEnum):
    """What the n-th operation meets, and those after it. As in shim.c."""

    NONE = 0
    FAIL = 1  # EIO, and nothing done
    FULL = 2  # of a write: ENOSPC, and nothing done; of a sync: EIO
    SHORT = 3  # of a write: half of it done, and said so
    TEAR = 4  # half of it done; then nothing works any more, as if the disk were gone
    DROP = 5  # said to be done, and not done
    DROP_ALL = 6  # all from there on is said to be done, and is not


@cache
def compiled(folder: Path) -> Path:
    """Compiles the shim; skips the test if there is no compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("a failing disk needs gcc")
    library = folder / "shim.so"
    command = ["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """Returns the environment of a process that is to have the shim."""
    return {**os.environ, "LD_PRELOAD": str(library)}


class Disk:
    """The shim's functions, in a process that has it."""

    def __init__(self) -> None:
        self._shim = ctypes.CDLL(None)
        self._shim.faults_counted.restype = ctypes.c_long
        self._shim.faults_arm.argtypes = [ctypes.c_int, ctypes.c_long]

    def watch(self, directory: Path, log: Path | None = None) -> None:
        """Begins to act on what happens below a directory, and to log it."""
        self._shim.faults_watch(os.fsencode(directory), os.fsencode(log) if log else None)

    def arm(self, fault: Fault, n: int) -> None:
        """Lets the n-th operation from now on meet a fault."""
        self._shim.faults_arm(fault, n)

    @property
    def counted(self) -> int:
        """The writes and syncs since the last call of the two above."""
        return int(self._shim.faults_counted())

    def mark(self, word: str) -> None:
        """Puts a word into the log."""
        self._shim.faults_mark(word.encode())
