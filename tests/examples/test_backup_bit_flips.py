"""Single bits flipped in stored files: `verify` finds each, and no restore returns wrong bytes."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from examples.backup.directory import Directory
from examples.backup.errors import BackupError
from examples.backup.store import Store
from tests.examples.backup_commands import here, serving, succeed
from tests.examples.small_trees import Tree, back_up, damage, read

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
