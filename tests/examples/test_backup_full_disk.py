"""A disk that is full: said so, nothing lost, and all works again once there is space."""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.backup_commands import here, run, same, serving, succeed

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root"),
]

SIZE = 4 * 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system, in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def tree(path: Path, size: int, seed: int) -> Path:
    path.mkdir()
    chance = random.Random(seed)
    for number in range(20):
        (path / f"{number}").write_bytes(chance.randbytes(size // 20))
    return path


def test_a_full_disk_fails_the_backup_and_nothing_else(tmp_path: Path, disk: Path) -> None:
    small, large = tree(tmp_path / "small", SIZE // 8, 1), tree(tmp_path / "large", SIZE * 2, 2)
    with serving(disk / "store") as server:
        there = ("--server", server.url)
        kept = succeed("backup", small, *there, "--name", "small")["snapshot"]

        failed = run("backup", large, *there, "--name", "large")

        assert failed.status == 1
        (line,) = failed.stderr.splitlines()
        assert line == "error: the store cannot be written: No space left on device"
        # The server goes on: what is there can be read, and is sound.
        listed = succeed("snapshots", *there)["snapshots"]
        assert [found["id"] for found in listed] == [kept]
        assert here("verify", *there).status == 0
        succeed("restore", kept, tmp_path / "1", *there)
        assert same(tmp_path / "1", small)

        grow = ["mount", "-o", f"remount,size={SIZE * 16}", str(disk)]
        subprocess.run(grow, check=True)

        # The same server, not started anew.
        succeed("backup", large, *there, "--name", "large")
        succeed("restore", "large", tmp_path / "2", *there)
        assert same(tmp_path / "2", large)
        assert here("verify", *there).status == 0
        assert server.stop().status == 0


def test_a_server_that_ends_on_a_full_disk_starts_again(tmp_path: Path, disk: Path) -> None:
    small, large = tree(tmp_path / "small", SIZE // 8, 1), tree(tmp_path / "large", SIZE * 2, 2)
    with serving(disk / "store") as server:
        there = ("--server", server.url)
        kept = succeed("backup", small, *there, "--name", "small")["snapshot"]
        assert server.stop().status == 0
    with serving(disk / "store") as server:
        there = ("--server", server.url)
        assert here("backup", large, *there, "--name", "large").status == 1
        # Fill up what is left, so that not even a new pack can be begun.
        with (disk / "filling").open("wb", buffering=0) as filling:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while filling.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue
        server.kill()
    (disk / "filling").unlink()
    with serving(disk / "store") as server:
        there = ("--server", server.url)
        assert here("verify", *there).status == 0
        succeed("restore", kept, tmp_path / "1", *there)
        assert same(tmp_path / "1", small)
        # What the large one had stored is garbage, in a pack of its own; collected, it makes room.
        succeed("gc", *there)
        succeed("backup", small, *there, "--name", "again")
