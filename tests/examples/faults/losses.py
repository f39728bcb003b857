"""Power losses at any moment of a logged run: the disks that they may leave, looked at in turn."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.examples.faults.power import Kind, Power, operations
from tests.examples.faults.small_run import Promises, look

# What is made of the disk at a moment, by name.
DISKS: dict[str, Callable[[Power, Path, random.Random], None]] = {
    "all is kept": lambda power, into, _: power.whole(into),
    "only what is safe is kept": lambda power, into, _: power.least(into),
    "all names are kept, and what is safe": lambda power, into, _: power.emptied(into),
    "some is kept, some is torn": lambda power, into, chance: power.some(into, chance),
}


def moments(log: Path, root: Path) -> Iterator[tuple[int, Power, Promises]]:
    """Yields the disk before the first of the operations and after each, and what was promised."""
    power, promises = Power(str(root)), Promises()
    for number, operation in enumerate(operations(log)):
        if operation.kind is Kind.MARK:
            promises.told(operation.path)
            continue
        yield number, power, promises
        power.act(operation)
    yield number + 1, power, promises


def problems(log: Path, root: Path, work: Path, seed: int, every: int = 1) -> Iterator[str]:
    """Yields what is wrong with a disk, and when; nothing where all is well.

    Args:
        log: Of a run.
        root: The directory that it was in.
        work: A directory to make disks in.
        seed: Of what is kept by chance.
        every: Of how many moments one is looked at.
    """
    chance = random.Random(seed)
    for number, power, promises in moments(log, root):
        if number % every:
            continue
        for name, make in DISKS.items():
            disk = work / "disk"
            make(power, disk, chance)
            found = look(disk, promises)
            yield f"{number}, {name}: {found}" if found else ""
            shutil.rmtree(disk)
