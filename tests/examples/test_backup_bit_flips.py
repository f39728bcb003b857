"""Single bits flipped in stored files: `verify` finds each, and no restore returns wrong bytes."""

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.examples.backup_commands import here, same, serving, succeed

pytestmark = pytest.mark.once

# Each starts a server.
FLIPS = int(os.environ.get("DRUVARPC_FLIPS", "16"))


@pytest.fixture(scope="module")
def backed_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tree, a store that has it in two snapshots, and garbage."""
    home = tmp_path_factory.mktemp("flips")
    chance = random.Random(1)
    tree = home / "tree"
    (tree / "below").mkdir(parents=True)
    for number in range(30):
        size = chance.choice((10, 3_000, 60_000))
        (tree / ("below" if number % 2 else ".") / f"{number}").write_bytes(chance.randbytes(size))
    with serving(home / "store") as server:
        there = ("--server", server.url)
        succeed("backup", tree, *there, "--name", "first")
        (tree / "new").write_bytes(chance.randbytes(50_000))
        succeed("backup", tree, *there, "--name", "second")
        assert server.stop().status == 0
    return home


def files(store: Path) -> list[Path]:
    """Returns the files that hold something."""
    return sorted(path for path in store.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_verify_finds_every_flipped_bit(tmp_path: Path, backed_up: Path) -> None:
    chance = random.Random(int(os.environ.get("DRUVARPC_SEED", "1")))
    found = refused = 0
    for number in range(FLIPS):
        store = tmp_path / "store"
        shutil.copytree(backed_up / "store", store)
        stored = files(store)
        # Each file has its turn, then any of them.
        path = stored[number] if number < len(stored) else chance.choice(stored)
        bit = chance.randrange(path.stat().st_size * 8)
        flip(path, bit)
        where = f"bit {bit} of {path.relative_to(store)}"
        try:
            with serving(store) as server:
                there = ("--server", server.url)
                verified = here("verify", *there, "--json")
                assert verified.status == 1, where
                for name in ("first", "second"):
                    into = tmp_path / name
                    restored = here("restore", name, into, *there)
                    if restored.status == 0 and name == "second":
                        assert same(into, backed_up / "tree"), where
                    shutil.rmtree(into, ignore_errors=True)
                found += 1
        except AssertionError as error:
            # A store that can't be opened says so in one line: that is found as well.
            (done,) = error.args[:1]
            if isinstance(done, str):
                raise
            assert done.status == 1, where
            assert len(done.stderr.splitlines()) == 1, (where, done)
            refused += 1
        shutil.rmtree(store)
    assert found + refused == FLIPS
    print(f"{FLIPS} flips: verify found {found}, the server refused {refused} at its start")


def test_the_snapshots_and_paths_that_are_hit_are_named(tmp_path: Path, backed_up: Path) -> None:
    """Hits a chunk that one file alone has, which is in one snapshot alone."""
    store = tmp_path / "store"
    shutil.copytree(backed_up / "store", store)
    content = (backed_up / "tree" / "new").read_bytes()
    # Random bytes don't compress, so that the chunk stands there as it is.
    (pack,) = [path for path in files(store) if content[:1000] in path.read_bytes()]
    flip(pack, (pack.read_bytes().index(content[:1000]) + 500) * 8)
    with serving(store) as server:
        there = ("--server", server.url)
        verified = here("verify", *there)
        assert verified.status == 1
        said = verified.stdout + verified.stderr
        assert "second" in said
        assert "new" in said
        assert "first" not in said
        assert here("restore", "second", tmp_path / "into", *there).status == 1
        succeed("restore", "first", tmp_path / "whole", *there)
