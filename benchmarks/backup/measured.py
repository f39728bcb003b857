"""One program in one round: backed up, backed up again, restored; and what each of them took."""

import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.backup.places import Place
from benchmarks.backup.programs import PORT, Command, Program, Scene
from benchmarks.backup.trees import Tree, difference
from benchmarks.processes import MeasurementError
from benchmarks.wan.job import Figures
from benchmarks.wan.link import CLIENT, SERVER

FIRST, AGAIN, RESTORE = "first", "again", "restore"
# Seconds that a command may take.
PATIENCE = 300.0
# Seconds for a server to listen, and for what it has started for a client to end.
SETTLING = 15.0
TICKS = os.sysconf("SC_CLK_TCK")


def measured(program: Program, place: Place, tree: Tree, work: Path) -> Figures:
    """Return what the three acts took, each by its name.

    Args:
        program: Whose client and server run.
        place: Where they do.
        tree: What is backed up.
        work: A directory for all that is kept; emptied at the end.

    Raises:
        MeasurementError: One failed, or the restored tree is another one.
    """
    scene = Scene(place.host, tree.path, work)
    for folder in (scene.store, scene.cache, restored := work / "restored"):
        folder.mkdir(parents=True)
    try:
        with serving(program.serve(scene), place) as server:
            if (command := program.prepare(scene)) is not None:
                act(command, place, server)
            figures: Figures = {
                FIRST: act(program.back_up(scene, 1), place, server),
                AGAIN: act(program.back_up(scene, 2), place, server),
                RESTORE: act(program.restore(scene, restored), place, server),
            }
        if unlike := difference(tree.path, restored):
            raise MeasurementError(f"{program.name} restored another tree: {unlike}")
        figures["stored"] = sum(
            path.stat().st_size for path in scene.store.rglob("*") if path.is_file()
        )
        return figures
    finally:
        shutil.rmtree(work)


def act(command: Command, place: Place, server: int) -> Figures:
    """Run a client's command to its end; return seconds, bytes, and peak bytes of memory.

    The bytes are those of IP packets at the client's device. Over the loopback interface `sent` and
    `received` both count both ways.
    """
    # So that what was written before is no burden.
    os.sync()
    sent, received = place.counted()
    used = processor_seconds(server)
    began = time.monotonic()
    usage = finished(command, place)
    seconds = time.monotonic() - began
    settle(server)
    after = place.counted()
    return {
        "seconds": seconds,
        "client": usage.processor,
        "server": processor_seconds(server) - used,
        "memory": usage.memory,
        "sent": after[0] - sent,
        "received": after[1] - received,
    }


@dataclass(frozen=True)
class Usage:
    """Seconds of processor time, all threads and children together, and peak memory in bytes."""

    processor: float
    memory: int


def finished(command: Command, place: Place) -> Usage:
    """Run a client's command to its end."""
    with tempfile.TemporaryFile("w+") as said:
        child = started(command, place, CLIENT, said.fileno())
        descriptor = os.pidfd_open(child.pid)
        try:
            if not select.select([descriptor], [], [], PATIENCE)[0]:
                child.kill()
        finally:
            os.close(descriptor)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise MeasurementError(last_line(said, f"status {child.returncode}"))
    # getrusage(2): its ru_maxrss is in kilobytes.
    return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def last_line(said: IO[str], otherwise: str) -> str:
    """Return the last line that a command printed."""
    said.seek(0)
    return f"{(said.read().strip() or otherwise).splitlines()[-1]:.300}"


@contextmanager
def serving(command: Command, place: Place) -> Generator[int, None, None]:
    """Run a server for the time of a block; yield its process."""
    with tempfile.TemporaryFile("w+") as said:
        child = started(command, place, SERVER, said.fileno())
        try:
            listening = place.inside(SERVER, ["ss", "-Hltn", f"sport = :{PORT}"])
            until = time.monotonic() + SETTLING
            while not subprocess.run(listening, capture_output=True, check=True).stdout:
                if child.poll() is not None or time.monotonic() > until:
                    raise MeasurementError(last_line(said, "the server doesn't listen"))
                time.sleep(0.02)
            yield child.pid
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(SETTLING)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def started(command: Command, place: Place, side: str, said: int) -> subprocess.Popen[bytes]:
    """Start a command on one side, as it would be installed: with what Python has compiled."""
    environment = {**os.environ, **command.environment}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.Popen(
        place.inside(side, command.argv),
        cwd=command.cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
    )


def processor_seconds(process: int) -> float:
    """Return what a process and its children that have ended used, to a hundredth."""
    # proc(5): what follows the name in brackets begins with the third field; 14 to 17 are wanted.
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICKS


def settle(server: int) -> None:
    """Wait until what a server has started for a client has ended."""
    children = Path(f"/proc/{server}/task/{server}/children")
    until = time.monotonic() + SETTLING
    while children.read_text().strip() and time.monotonic() < until:
        time.sleep(0.01)
