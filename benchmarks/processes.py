"""What a peer can do, and a measurement of it: a new server process, a new client, one figure."""

import functools
import json
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.measure import Load, Measured, folder

ROOT = Path(__file__).parent.parent
# Seconds beyond those of the measurement, for imports, connections, and a slow machine.
PATIENCE = 60.0


class MeasurementError(Exception):
    """A peer's server or client gave no figure; the message says why, in one line."""


@dataclass(frozen=True)
class Description:
    """A peer as it is installed here.

    Attributes:
        name: what the tables call it.
        version: the distribution and its version.
        operations: what it can do.
        failure: why it can do nothing.
    """

    name: str
    version: str = ""
    operations: tuple[str, ...] = ()
    failure: str = ""


@functools.cache
def describe(peer: str) -> Description:
    """Return what is known of a peer; if it can't be imported, why."""
    try:
        with first_line(_peer("describe", peer), patience=PATIENCE) as (line, _):
            name, version, operations = json.loads(line)
    except MeasurementError as error:
        return Description(peer, failure=str(error))
    return Description(name, version, tuple(operations))


def measure(peer: str, operation: str, load: Load) -> Measured:
    """Return what one run of a peer's operation measured.

    Args:
        peer: its module.
        operation: of its OPERATIONS.
        load: its port and server are filled in here.

    Raises:
        MeasurementError: there was no figure.
    """
    with first_line(_peer("serve", peer), patience=PATIENCE) as (port, server):
        there = json.dumps(asdict(replace(load, port=json.loads(port), server=server)))
        patience = PATIENCE + load.warm_up + load.seconds
        client = _peer("measure", peer, operation, there)
        try:
            with first_line(client, patience=patience) as (figures, _):
                return Measured(**json.loads(figures))
        finally:
            shutil.rmtree(folder(server), ignore_errors=True)


def _peer(command: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", "benchmarks.peers", command, *arguments


@contextmanager
def first_line(command: Sequence[str], patience: float) -> Iterator[tuple[str, int]]:
    """Yield the first line that a child process prints, and its id; end it after that.

    Raises:
        MeasurementError: it ended without a line, or printed none in time.
    """
    with tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
        try:
            assert child.stdout is not None
            ready, _, _ = select.select([child.stdout], [], [], patience)
            if not ready:
                raise MeasurementError(f"{_which(command)}: nothing within {patience:g} s")
            line = child.stdout.readline()
            if not line:
                complaints.seek(0)
                last = (complaints.read().strip() or "it ended without a word").splitlines()[-1]
                raise MeasurementError(f"{_which(command)}: {last:.200}")
            yield line, child.pid
        finally:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def _which(command: Sequence[str]) -> str:
    """Return what a child was to do: what follows its module."""
    return command[command.index("-m") + 2] if "-m" in command else command[0]
