"""Servers and clients killed at random moments: what was acknowledged stays, the rest is not there.

DRUVARPC_CRASHES says how many kills; 20 by default, which take as many seconds.
"""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.examples.backup_commands import (
    Done,
    Serving,
    ended,
    here,
    run,
    same,
    serving,
    start,
    succeed,
)

pytestmark = pytest.mark.once

CRASHES = int(os.environ.get("DRUVARPC_CRASHES", "20"))
# Kills come at any time until a command would have ended, and a little later: as multiples of the
# seconds that an undisturbed backup takes on this machine.
LATEST = 1.3
# Snapshots that are kept at a time: those before are forgotten.
KEPT = 6


class Trial:
    """A store, the tree that is backed up to it, and what has been promised.

    Attributes:
        promised: by id, a copy of the tree as it was at each backup that was acknowledged.
        attempted: by name, the same for backups that were not.
        doubtful: ids whose removal was begun and not acknowledged: they may be there or not.
        usual: the seconds that an undisturbed backup takes.
    """

    def __init__(self, home: Path, seed: int) -> None:
        self.home = home
        self.store = home / "store"
        self.tree = home / "tree"
        self.chance = random.Random(seed)
        self.promised: dict[str, Path] = {}
        self.attempted: dict[str, Path] = {}
        self.doubtful: set[str] = set()
        self.number = 0
        self.usual = 0.0
        (self.tree / "below").mkdir(parents=True)
        for number in range(40):
            self.write(number)

    def write(self, number: int) -> None:
        """Writes one of the tree's files anew: half of its content compresses, half doesn't."""
        name = self.tree / ("below" if number % 2 else ".") / f"{number}"
        size = self.chance.choice((0, 100, 10_000, 300_000))
        name.write_bytes(self.chance.randbytes(size // 2) + bytes(size // 2))

    def change(self) -> Path:
        """Changes the tree; returns a copy of it."""
        for number in self.chance.sample(range(40), 8):
            self.write(number)
        self.number += 1
        copy = self.home / f"copy{self.number}"
        subprocess.run(["cp", "--archive", "--reflink=auto", self.tree, copy], check=True)
        return copy

    def undisturbed(self, server: Serving) -> None:
        """Makes a first backup, as a process, and takes its time."""
        copy = self.change()
        began = time.monotonic()
        there = ("--server", server.url, "--cache", self.home / "cache")
        done = run("backup", self.tree, *there, "--name", copy.name, "--json")
        self.usual = time.monotonic() - began
        self.promised[done.json["snapshot"]] = copy

    def disturbed(
        self, process: subprocess.Popen[str], victims: list[subprocess.Popen[str]]
    ) -> Done:
        """Lets a command run, and kills the victims at a random moment; returns what it did."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=self.chance.uniform(0.0, LATEST * self.usual))
        for victim in victims:
            victim.kill()
        done = ended(process)
        for victim in victims:
            victim.wait()
        return done

    def act(self, server: Serving) -> None:
        """Runs a command; kills it, the server, or both, at a random moment."""
        there = ("--server", server.url, "--cache", self.home / "cache")
        command = self.chance.choice(("backup", "backup", "backup", "gc", "forget", "restore"))
        if command in ("forget", "restore") and len(self.promised) < 2:
            command = "backup"
        copy, id = Path(), ""
        match command:
            case "backup":
                copy = self.change()
                name = f"copy{self.number}"
                process = start("backup", self.tree, *there, "--name", name, "--json")
            case "gc":
                process = start("gc", *there[:2])
            case "forget":
                id = next(iter(self.promised))
                process = start("forget", id, *there[:2])
            case _:
                id = self.chance.choice(list(self.promised))
                process = start("restore", id, self.home / "into", *there[:2])
        both = [process, server.process]
        done = self.disturbed(process, self.chance.choice(([process], [server.process], both)))
        if command == "backup" and done.status == 0:
            self.promised[done.json["snapshot"]] = copy
        elif command == "backup":
            self.attempted[copy.name] = copy
        elif command == "forget":
            self.doubtful.add(id)
            if done.status == 0:
                self.doubtful.discard(id)
                del self.promised[id]
        elif command == "restore":
            shutil.rmtree(self.home / "into", ignore_errors=True)

    def check(self, server: Serving, *, all_of_them: bool = False) -> None:
        """Checks that the store is sound, has what was promised, and nothing by half."""
        verified = here("verify", "--server", server.url)
        assert verified.status == 0, verified
        listed = succeed("snapshots", "--server", server.url)["snapshots"]
        names = {found["id"]: found["name"] for found in listed}
        for id in self.doubtful - names.keys():
            del self.promised[id]
        self.doubtful.clear()
        assert self.promised.keys() <= names.keys()
        # Made, though nobody was told: it has to be whole like any other.
        for id in names.keys() - self.promised.keys():
            self.promised[id] = self.attempted.pop(names[id])
            self.restores(server, id)
        if all_of_them or not self.promised:
            for id in self.promised:
                self.restores(server, id)
        else:
            self.restores(server, self.chance.choice(list(self.promised)))
        while len(self.promised) > KEPT:
            id = next(iter(self.promised))
            assert here("forget", id, "--server", server.url).status == 0
            shutil.rmtree(self.promised.pop(id))

    def restores(self, server: Serving, id: str) -> None:
        """Checks that a snapshot is the tree that it is to be."""
        into = self.home / "restored"
        succeed("restore", id, into, "--server", server.url)
        assert same(into, self.promised[id])
        shutil.rmtree(into)


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    return Trial(tmp_path, seed=int(os.environ.get("DRUVARPC_SEED", "1")))


def test_whatever_is_killed_nothing_acknowledged_is_lost(trial: Trial) -> None:
    with ExitStack() as running:
        server = running.enter_context(serving(trial.store))
        trial.undisturbed(server)
        for _ in range(CRASHES):
            trial.act(server)
            if server.process.poll() is not None:
                # Without repair: it starts as it would after a clean end.
                server = running.enter_context(serving(trial.store))
            trial.check(server)
        trial.check(server, all_of_them=True)
    assert trial.promised
    print(f"{CRASHES} kills; {len(trial.attempted)} backups broken off, {trial.number} begun")
