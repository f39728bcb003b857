"""Backups, restores, removals and collections at once, against a model of what they promise.

The steps of each are taken apart, and Hypothesis mixes them: backups and restores are open while
snapshots are forgotten, chunks condemned and swept, packs written anew; at times the process is
killed, in the middle of all of them.
"""

import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from examples.backup.directory import Directory
from examples.backup.drafts import Draft
from examples.backup.memory import Memory, MemoryPacks
from examples.backup.reports import Collected
from examples.backup.store import Parts, Store
from tests.examples.small_trees import chunk, damage, page, read, reading

# Few, so that trees have much in common, and chunks come and go and come again.
CONTENTS = [random.Random(number).randbytes(40 + 10 * number) for number in range(5)]
PATHS = [b"a", b"b", b"c"]
# Bytes, and chunks: some of them in a pack.
PACK_LIMIT, PACK_CHUNKS = 400, 3
# Backups, and restores, that are open at a time.
OPEN = 2

trees = st.dictionaries(
    st.sampled_from(PATHS), st.sampled_from(CONTENTS), min_size=1, max_size=len(PATHS)
)
which = st.integers(0, OPEN - 1)


@dataclass(eq=False)
class Backup:
    """A backup that is running: of which tree, and the chunks that it takes to be there."""

    draft: Draft
    tree: dict[bytes, bytes]
    counted_on: set[bytes] = field(default_factory=set[bytes])


@dataclass(eq=False)
class Restore:
    """A restore that is running: of which tree, what comes next, and what came."""

    tree: dict[bytes, bytes]
    entries: Iterator[tuple[bytes, bytes]]
    done: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])


class Place(Protocol):
    """Where a store is kept."""

    def parts(self) -> Parts:
        """Returns what is there."""
        ...

    def kill(self) -> None:
        """Lets what is there now be all that is left."""
        ...

    def remove(self) -> None:
        """Removes all of it."""
        ...


class OnDisk:
    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="druvarpc-model-"))
        self._lives = 0

    @property
    def _path(self) -> Path:
        return self._home / f"{self._lives}"

    def parts(self) -> Parts:
        return Directory(self._path, pack_limit=PACK_LIMIT)

    def kill(self) -> None:
        before = self._path
        self._lives += 1
        shutil.copytree(before, self._path)

    def remove(self) -> None:
        shutil.rmtree(self._home)


class InMemory:
    def __init__(self) -> None:
        self._parts = Memory()
        self._parts.packs = MemoryPacks(self._parts.catalogue, PACK_CHUNKS)

    def parts(self) -> Parts:
        return self._parts

    def kill(self) -> None:
        pass

    def remove(self) -> None:
        pass


class Trust(RuleBasedStateMachine):
    """What may happen to a store, and what has to hold whatever happens."""

    place: type[Place] = InMemory

    @initialize()
    def open(self) -> None:
        self.here = self.place()
        self.store = Store(self.here.parts())
        self.kept: dict[str, dict[bytes, bytes]] = {}
        self.backups: list[Backup] = []
        self.restores: list[Restore] = []
        self.collection: Iterator[Collected] | None = None

    # Backups.

    def backup(self, which: int, tree: dict[bytes, bytes]) -> Backup:
        """Returns one that is running, or begins one: rules that do nothing teach nothing."""
        if which >= len(self.backups):
            self.backups.append(Backup(self.store.begin("name"), tree))
        return self.backups[min(which, len(self.backups) - 1)]

    @rule(which=which, tree=trees, put=st.booleans())
    def ask(self, which: int, tree: dict[bytes, bytes], put: bool) -> None:
        """Asks which chunks are missing; puts them, or leaves them for later."""
        backup = self.backup(which, tree)
        chunks = [chunk(content) for content in backup.tree.values()]
        missing = set(self.store.missing([one.id for one in chunks]))
        if put:
            self.store.put_many([chunks[position] for position in missing])
        backup.counted_on |= {
            one.id for position, one in enumerate(chunks) if put or position not in missing
        }

    @rule(which=which, tree=trees)
    def commit(self, which: int, tree: dict[bytes, bytes]) -> None:
        """Sends the entries. What was once said to be there is not put again."""
        backup = self.backup(which, tree)
        chunks = [chunk(content) for content in backup.tree.values()]
        chunks = [one for one in chunks if one.id not in backup.counted_on]
        self.store.put_many([chunks[at] for at in self.store.missing([one.id for one in chunks])])
        backup.draft.add([page(backup.tree)])
        self.kept[backup.draft.commit().id] = backup.tree
        self.backups.remove(backup)

    @rule(which=which)
    def break_off(self, which: int) -> None:
        if which < len(self.backups):
            self.backups.pop(which).draft.discard()

    # Restores.

    @rule(which=which)
    def restore(self, which: int) -> None:
        """Reads one more file, of a snapshot that may have been forgotten by now."""
        if which < len(self.restores):
            restore = self.restores[which]
        elif self.kept:
            id = list(self.kept)[which % len(self.kept)]
            restore = Restore(self.kept[id], reading(self.store, self.store.pages(id)))
            self.restores.append(restore)
        else:
            return
        found = next(restore.entries, None)
        if found is None:
            assert restore.done == restore.tree
            self.restores.remove(restore)
        else:
            restore.done[found[0]] = found[1]

    # Removals.

    @rule(which=which)
    def forget(self, which: int) -> None:
        if self.kept:
            id = list(self.kept)[which % len(self.kept)]
            self.store.forget([id])
            del self.kept[id]

    @rule(steps=st.integers(1, 6))
    def collect_a_little(self, steps: int) -> None:
        """Begins a collection, or goes on with the one that runs."""
        if self.collection is None:
            self.collection = self.store.collect()
        for _ in range(steps):
            if next(self.collection, None) is None:
                self.collection = None
                return

    @rule()
    def collect(self) -> None:
        """Ends the collection that runs, and makes a whole one."""
        for _ in self.collection or ():
            pass
        self.collection = None
        for _ in self.store.collect():
            pass

    # Ends.

    @rule(how=st.sampled_from((*["go on"] * 4, "end", "kill")))
    def end(self, how: str) -> None:
        """Ends the process, or kills it, and starts it again; at times."""
        if how == "go on":
            return
        if how == "kill":
            self.here.kill()
        self.give_up()
        self.store.close()
        self.store = Store(self.here.parts())

    def give_up(self) -> None:
        for backup in self.backups:
            backup.draft.discard()
        self.backups.clear()
        self.restores.clear()
        if self.collection is not None:
            self.collection.close()
        self.collection = None

    # What always holds.

    @rule()
    def all_is_sound(self) -> None:
        assert damage(self.store) == []
        for id, tree in self.kept.items():
            assert read(self.store, id) == tree

    @invariant()
    def snapshots_are_those_that_were_acknowledged(self) -> None:
        assert [found.id for found in self.store.snapshots()] == list(self.kept)

    def teardown(self) -> None:
        self.give_up()
        for _ in self.store.collect():
            pass
        self.all_is_sound()
        # Nothing is left that nobody needs.
        needed = {content for tree in self.kept.values() for content in tree.values()}
        assert self.store.usage().chunks == len(needed)
        self.store.close()
        self.here.remove()


class TrustOnDisk(Trust):
    place = OnDisk


TestInMemory = Trust.TestCase
TestInMemory.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
TestOnDisk = TrustOnDisk.TestCase
TestOnDisk.settings = settings(max_examples=12, stateful_step_count=40, deadline=None)
