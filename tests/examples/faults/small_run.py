"""A small run of a store, for disks that fail: back up, forget, collect, back up again.

`python -m tests.examples.faults.small_run WORK` runs with the shim. First it makes the run on a
sound disk, keeping a log of what is written, with marks where something was acknowledged. Then it
makes the run anew for every write and sync that it has, and for each kind of fault, which that one
meets; after each it looks at what the disk has, as a process that starts later does. Prints JSON.
"""

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from examples.backup.directory import Directory
from examples.backup.errors import BackupError
from examples.backup.store import Store
from tests.examples.faults.shim import Disk, Fault
from tests.examples.small_trees import Tree, back_up, damage, read

CHANCE = random.Random(1)
CONTENTS = [CHANCE.randbytes(100 + 50 * number) for number in range(4)]
# By the names of their snapshots. What the first has alone is garbage later, and comes again.
TREES: dict[str, Tree] = {
    "one": {b"a": CONTENTS[0], b"b": CONTENTS[1]},
    "two": {b"a": CONTENTS[2], b"b": CONTENTS[1]},
    "three": {b"a": CONTENTS[0], b"c": CONTENTS[3]},
}
# Two chunks.
PACK_LIMIT = 400


def opened(path: Path) -> Store:
    return Store(Directory(path, pack_limit=PACK_LIMIT))


class Promises:
    """What a run was told.

    Attributes:
        made: by id, the names of snapshots that were acknowledged.
        going: ids of those whose removal has begun.
        gone: ids of those whose removal was acknowledged.
    """

    def __init__(self, mark: Callable[[str], None] = lambda _: None) -> None:
        self.made: dict[str, str] = {}
        self.going: set[str] = set()
        self.gone: set[str] = set()
        self._mark = mark

    def told(self, words: str) -> None:
        """Takes note of one of: made ID NAME, going ID, gone ID."""
        self._mark(words)
        what, id, *name = words.split()
        if what == "made":
            self.made[id] = name[0]
        elif what == "going":
            self.going.add(id)
        else:
            self.gone.add(id)


def run(path: Path, promises: Promises) -> int:
    """Makes the run; returns how many of its steps failed. Later ones are tried nevertheless."""
    failed = 0

    def step(act: Callable[[], object]) -> None:
        nonlocal failed
        try:
            act()
        except (BackupError, OSError):
            failed += 1

    def made(name: str) -> None:
        promises.told(f"made {back_up(store, name, TREES[name]).id} {name}")

    def forget() -> None:
        id = store.find("one").id
        promises.told(f"going {id}")
        store.forget([id])
        promises.told(f"gone {id}")

    try:
        store = opened(path)
    except (BackupError, OSError):
        return 1
    for act in (lambda: made("one"), lambda: made("two"), forget):
        step(act)
    step(lambda: list(store.collect()))
    step(lambda: made("three"))
    step(store.close)
    return failed


def look(path: Path, promises: Promises) -> str:
    """Says what is wrong with what a disk has, given what was promised; nothing if all is well."""
    try:
        with opened(path) as store:
            if found := damage(store):
                return f"damaged: {found[0]}"
            there = {snapshot.id: snapshot.name for snapshot in store.snapshots()}
            for id, name in there.items():
                if read(store, id) != TREES[name]:
                    return f"{name} is another tree"
            if lost := promises.made.keys() - promises.going - there.keys():
                return f"{promises.made[lost.pop()]} is lost"
            if promises.gone & there.keys():
                return "a snapshot is back that was removed"
            # It goes on as if nothing had been.
            again = back_up(store, "one", TREES["one"]).id
            list(store.collect())
            if read(store, again) != TREES["one"]:
                return "a backup after it is another tree"
            if found := damage(store):
                return f"damaged by a backup after it: {found[0]}"
    except (BackupError, OSError) as error:
        return f"cannot be used: {error}"
    return ""


def wrong_bytes(path: Path) -> str:
    """Says which snapshot of a disk that lied can be restored, and is not what it was."""
    try:
        with opened(path) as store:
            for snapshot in store.snapshots():
                try:
                    if read(store, snapshot.id) != TREES[snapshot.name]:
                        return f"{snapshot.name} is another tree"
                except (BackupError, OSError):
                    continue
    except (BackupError, OSError):
        return ""
    return ""


def main() -> None:
    work, disk = Path(sys.argv[1]), Disk()
    path = work / "store"
    path.mkdir()
    disk.watch(path, work / "log")
    if run(path, Promises(disk.mark)):
        raise SystemExit("the run fails on a sound disk")
    count = disk.counted
    disk.watch(path)
    told: dict[str, list[str]] = {}
    outcomes: dict[str, Counter[str]] = {}
    for fault in list(Fault)[1:]:
        outcome = outcomes[fault.name] = Counter()
        for n in range(count):
            shutil.rmtree(path)
            path.mkdir()
            promises = Promises()
            disk.watch(path)
            disk.arm(fault, n)
            failed = run(path, promises)
            disk.arm(Fault.NONE, 0)
            lying = fault in (Fault.DROP, Fault.DROP_ALL)
            problem = wrong_bytes(path) if lying else look(path, promises)
            outcome["steps failed" if failed else "nothing noticed"] += 1
            if problem:
                told.setdefault(fault.name, []).append(f"{n}: {problem}")
    print(json.dumps({"operations": count, "problems": told, "outcomes": outcomes}))


if __name__ == "__main__":
    main()
