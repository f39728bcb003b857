"""Single bits flipped in stored files: `verify` finds each, and no restore returns wrong bytes."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from examples.backup.directory import Directory
from examples.backup.errors import BackupError, CatalogueError
from examples.backup.store import Store
from tests.examples.backup_commands import here, serving, succeed
from tests.examples.small_trees import Tree, back_up, chunk, damage, page, read

pytestmark = pytest.mark.once

# A flip takes some 20 ms.
FLIPS = int(os.environ.get("DRUVARPC_FLIPS", "150"))
SEED = int(os.environ.get("DRUVARPC_SEED", "1"))

CHANCE = random.Random(1)
CONTENTS = [CHANCE.randbytes(CHANCE.choice((10, 1_000, 9_000))) for _ in range(40)]
TREES: dict[str, Tree] = {
    "one": {f"{number}".encode(): content for number, content in enumerate(CONTENTS[:30])},
    "two": {f"{number}".encode(): content for number, content in enumerate(CONTENTS[10:])},
}


def opened(path: Path) -> Store:
    return Store(Directory(path, pack_limit=30_000))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two snapshots, and a third's garbage."""
    path = tmp_path_factory.mktemp("sound") / "store"
    with opened(path) as store:
        for name, tree in TREES.items():
            back_up(store, name, tree)
        back_up(store, "three", {b"a": CHANCE.randbytes(5_000)})
        store.forget(["three"])
        assert damage(store) == []
    return path


def files(store: Path) -> list[Path]:
    """Returns the files that hold something, relative to the store."""
    found = (path for path in store.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path.relative_to(store) for path in found)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_verify_finds_every_flipped_bit(sound: Path, tmp_path: Path) -> None:
    chance, stored = random.Random(SEED), files(sound)
    outcomes: Counter[str] = Counter()
    assert len(stored) >= 5
    for number in range(FLIPS):
        # Each file in turn, so that small ones have their share.
        name = stored[number % len(stored)]
        bit = chance.randrange((sound / name).stat().st_size * 8)
        store = tmp_path / "store"
        shutil.copytree(sound, store)
        flip(store / name, bit)
        try:
            outcome = looked_at(store)
        except (BackupError, OSError):
            # It can't even be opened, and says so.
            outcome = "not opened"
        assert outcome, f"bit {bit} of {name}: nothing found"
        outcomes[outcome] += 1
        shutil.rmtree(store)
    print(f"{FLIPS} flips in {len(stored)} files: {dict(outcomes)}")


def looked_at(path: Path) -> str:
    """Says how the damage of a store shows; nothing if it doesn't. Checks what is restored."""
    whole = 0
    with opened(path) as store:
        # First of all: what a restore returns must be right before anybody verifies.
        for name, tree in TREES.items():
            try:
                assert read(store, store.find(name).id) == tree
                whole += 1
            except BackupError:
                continue
        return f"found, {whole} of 2 restored" if damage(store) else ""


def test_a_flip_in_the_log_of_a_killed_store_loses_no_snapshot_silently(tmp_path: Path) -> None:
    """All of three snapshots were acknowledged, and their catalogue is in the log alone."""
    killed, store = tmp_path / "killed", tmp_path / "store"
    made = []
    with opened(tmp_path / "living") as living:
        for number, (name, tree) in enumerate({**TREES, "last": {b"a": b"last"}}.items()):
            made.append((back_up(living, name, tree), tree))
            if number == 1:
                acknowledged = (tmp_path / "living/catalogue.sqlite-wal").stat().st_size
        shutil.copytree(tmp_path / "living", killed)
    log = killed / "catalogue.sqlite-wal"
    draw = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    # Its header, and whatever was synced before the last backup.
    bits = [draw.randrange(32 * 8) for _ in range(8)]
    bits += [draw.randrange(acknowledged * 8) for _ in range(FLIPS // 5)]
    for bit in bits:
        shutil.copytree(killed, store)
        flip(store / log.name, bit)
        try:
            with opened(store) as reopened:
                # Of the header, only what nobody reads can be wrong.
                assert [one.id for one in reopened.snapshots()] == [one.id for one, _ in made]
                assert all(read(reopened, one.id) == tree for one, tree in made)
                outcomes["whole"] += 1
        except CatalogueError:
            # And nothing was written over: the bit flipped back, all is there.
            flip(store / log.name, bit)
            with opened(store) as mended:
                assert len(mended.snapshots()) == 3
                assert damage(mended) == []
            outcomes["refused"] += 1
        shutil.rmtree(store)
    print(f"{len(bits)} flips in the log: {dict(outcomes)}")
    assert outcomes["refused"] > len(bits) * 0.9


def test_a_log_as_a_crash_leaves_it_is_taken(tmp_path: Path) -> None:
    """A crash may lose frames for which nothing waited, though not some that come later."""
    killed = tmp_path / "killed"
    with Store(tmp_path / "living") as living:
        first = back_up(living, "one", TREES["one"])
        log = tmp_path / "living/catalogue.sqlite-wal"
        synced = log.stat().st_size
        for content in CONTENTS[30:]:
            living.put_many([chunk(content)])
        # This waits for the disk, and had not come back.
        draft = living.begin("two")
        draft.add([page(TREES["two"])])
        shutil.copytree(tmp_path / "living", killed)
        draft.discard()
    for at in range(synced, (killed / log.name).stat().st_size - 5000, 4120):
        store = tmp_path / "store"
        shutil.copytree(killed, store)
        flip(store / log.name, (at + 1000) * 8)
        with opened(store) as reopened:
            assert reopened.snapshots() == [first]
            assert damage(reopened) == []
        shutil.rmtree(store)


def test_a_flip_in_the_log_of_a_running_store_is_told_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with opened(path) as store:
        made = [back_up(store, name, tree) for name, tree in TREES.items()]
        log = path / "catalogue.sqlite-wal"
        flip(log, (32 + 4120 * 9 + 30) * 8)
        whole = log.read_bytes()
        assert any("catalogue.sqlite-wal: frame 10 is damaged" in line for line in damage(store))
        assert log.read_bytes() == whole
        with pytest.raises(BackupError, match="frame 10 is damaged"):
            store.forget([made[0].id])
    assert log.read_bytes() == whole
    with pytest.raises(CatalogueError, match="frame 10 is damaged"):
        opened(path)


def test_the_snapshots_and_paths_that_are_hit_are_named(tmp_path: Path) -> None:
    """Hits a chunk that one file alone has, which is in one snapshot alone; by the commands."""
    tree, content = tmp_path / "tree", random.Random(3).randbytes(50_000)
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "old").write_bytes(random.Random(2).randbytes(50_000))
    store = tmp_path / "store"
    with serving(store) as server:
        there = ("--server", server.url, "--cache", tmp_path / "cache")
        first = succeed("backup", tree, *there, "--name", "first")["snapshot"]
        (tree / "below" / "new").write_bytes(content)
        second = succeed("backup", tree, *there, "--name", "second")["snapshot"]
        assert server.stop().status == 0
    # Random bytes don't compress, so that the chunk stands there as it is.
    (name,) = [name for name in files(store) if content[:1000] in (store / name).read_bytes()]
    pack = store / name
    flip(pack, (pack.read_bytes().index(content[:1000]) + 500) * 8)
    with serving(store) as server:
        there = ("--server", server.url, "--cache", tmp_path / "cache")
        verified = here("verify", *there)
        assert verified.status == 1
        assert "second" in verified.stdout
        assert "below/new" in verified.stdout
        assert "first" not in verified.stdout
        assert "below/old" not in verified.stdout
        told = here("verify", *there, "--json")
        assert told.status == 1
        *lines, last = map(json.loads, told.stdout.splitlines())
        hits = [(line["snapshot"], line["path"]) for line in lines if line["snapshot"]]
        assert hits == [(second, "below/new")]
        assert (last["damaged"], last["ok"]) == (len(lines), False)
        assert here("restore", second, tmp_path / "damaged", *there).status == 1
        again = succeed("backup", tree, *there, "--name", "second")
        assert again["new_chunks"] >= 1
        succeed("restore", second, tmp_path / "mended", *there)
        assert (tmp_path / "mended" / "below" / "new").read_bytes() == content
        succeed("restore", first, tmp_path / "whole", *there)
