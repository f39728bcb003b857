"""The three programs: how each is served, prepared, and told to back up and to restore.

Each as its documentation shows it, at its defaults but for zstd at level 3, and told to say little.
restic reaches its repository by `rclone serve restic`, borg a `borg serve` through a bare TCP
connection in place of ssh's: neither has anything to encrypt for the network. restic has no
repository without encryption; borg and ours are measured with and without.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.processes import ROOT

PORT = 7420
PASSPHRASE = "correct horse battery staple"
# Debian's packages, by the command that is missing.
PACKAGES = {
    "restic": "restic",
    "rclone": "rclone",
    "borg": "borgbackup",
    "socat": "socat",
}
# What borg starts in place of ssh, with arguments that say what to run at the other end.
PIPE = f"#!/bin/sh\nexec socat -b 131072 STDIO TCP:$BENCH_HOST:{PORT},nodelay\n"


def missing_commands() -> list[str]:
    """Return the commands of PACKAGES that aren't installed."""
    return [command for command in PACKAGES if shutil.which(command) is None]


@dataclass(frozen=True)
class Scene:
    """What there is for one program in one round.

    Attributes:
        host: the server's address.
        tree: what to back up.
        work: a directory of its own, empty at first, for all that it keeps.
    """

    host: str
    tree: Path
    work: Path

    @property
    def store(self) -> Path:
        """The server's part of it."""
        return self.work / "store"

    @property
    def cache(self) -> Path:
        """The client's part of it, kept between its commands."""
        return self.work / "cache"


@dataclass(frozen=True)
class Command:
    """What to run, where, and what it finds in its environment."""

    argv: Sequence[str]
    cwd: Path = ROOT
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


class Program(Protocol):
    """A program that backs up.

    Attributes:
        encrypted: whether what it stores is.
    """

    @property
    def encrypted(self) -> bool: ...

    @property
    def name(self) -> str:
        """What the tables call it."""
        ...

    def serve(self, scene: Scene) -> Command:
        """Return what serves the store; it listens at PORT once it does."""
        ...

    def prepare(self, scene: Scene) -> Command | None:
        """Return what has to be run once, before the first backup."""
        ...

    def back_up(self, scene: Scene, number: int) -> Command:
        """Return what makes the backup with this number."""
        ...

    def restore(self, scene: Scene, into: Path) -> Command:
        """Return what restores a backup into an empty directory; they are all of the same tree."""
        ...


@dataclass(frozen=True)
class Ours:
    """examples/backup."""

    encrypted: bool = False

    @property
    def name(self) -> str:
        return "druvarpc, encrypted" if self.encrypted else "druvarpc"

    def serve(self, scene: Scene) -> Command:
        listen = f"tcp://{scene.host}:{PORT}"
        return self._command("serve", "--store", str(scene.store), "--listen", listen)

    def prepare(self, scene: Scene) -> Command | None:
        return None

    def back_up(self, scene: Scene, number: int) -> Command:
        there = ("--server", f"tcp://{scene.host}:{PORT}", "--cache", str(scene.cache))
        how = ("--compression", "zstd:3", *(["--encrypt"] if self.encrypted else []))
        what = (str(scene.tree), "--name", "tree")
        return self._command("backup", *what, *there, *how, *self._key(scene))

    def restore(self, scene: Scene, into: Path) -> Command:
        there = ("--server", f"tcp://{scene.host}:{PORT}")
        return self._command("restore", "tree", str(into), *there, *self._key(scene))

    def _command(self, *arguments: str) -> Command:
        return Command([sys.executable, "-m", "examples.backup", *arguments])

    def _key(self, scene: Scene) -> Sequence[str]:
        if not self.encrypted:
            return ()
        file = scene.work / "passphrase"
        file.write_text(PASSPHRASE)
        return ("--passphrase-file", str(file))


@dataclass(frozen=True)
class Restic:
    """restic; it always encrypts."""

    encrypted: bool = True

    @property
    def name(self) -> str:
        return "restic"

    def serve(self, scene: Scene) -> Command:
        address = ("--addr", f"{scene.host}:{PORT}")
        return Command(
            ["rclone", "serve", "restic", *address, str(scene.store)],
            environment={"RCLONE_CONFIG": os.devnull},
        )

    def prepare(self, scene: Scene) -> Command | None:
        # Of version 2: the first one does not compress.
        return self._command(scene, "init", "--repository-version", "2")

    def back_up(self, scene: Scene, number: int) -> Command:
        return self._command(scene, "backup", "--tag", f"tree{number}", ".")

    def restore(self, scene: Scene, into: Path) -> Command:
        return self._command(scene, "restore", "latest", "--tag", "tree1", "--target", str(into))

    def _command(self, scene: Scene, *arguments: str) -> Command:
        environment = {
            "RESTIC_REPOSITORY": f"rest:http://{scene.host}:{PORT}/",
            "RESTIC_PASSWORD": PASSPHRASE,
            "RESTIC_CACHE_DIR": str(scene.cache),
        }
        # Its "auto" is zstd at its library's default level, which is meant to be zstd's 3.
        options = ("--quiet", "--compression", "auto")
        return Command(["restic", *options, *arguments], scene.tree, environment)


@dataclass(frozen=True)
class Borg:
    """BorgBackup, in the modes "none" and "repokey-blake2"."""

    encrypted: bool = False

    @property
    def name(self) -> str:
        return "borg, encrypted" if self.encrypted else "borg"

    def serve(self, scene: Scene) -> Command:
        serve = ("borg", "serve", "--restrict-to-path", str(scene.store))
        listen = (scene.host, str(PORT))
        return Command(
            [sys.executable, "-m", "benchmarks.backup.inetd", *listen, *serve],
            environment={"BORG_BASE_DIR": str(scene.work / "server")},
        )

    def prepare(self, scene: Scene) -> Command | None:
        mode = "repokey-blake2" if self.encrypted else "none"
        return self._command(scene, "init", "--encryption", mode)

    def back_up(self, scene: Scene, number: int) -> Command:
        return self._command(scene, "create", "--compression", "zstd,3", f"::tree{number}", ".")

    def restore(self, scene: Scene, into: Path) -> Command:
        return self._command(scene, "extract", "::tree1", cwd=into)

    def _command(self, scene: Scene, *arguments: str, cwd: Path | None = None) -> Command:
        pipe = scene.work / "pipe"
        pipe.write_text(PIPE)
        pipe.chmod(0o700)
        environment = {
            "BENCH_HOST": scene.host,
            "BORG_BASE_DIR": str(scene.cache),
            "BORG_PASSPHRASE": PASSPHRASE,
            "BORG_REPO": f"ssh://server{scene.store}/repository",
            "BORG_RSH": str(pipe),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        return Command(["borg", *arguments], cwd or scene.tree, environment)


# Those in the clear first, then those that encrypt.
PROGRAMS: tuple[Program, ...] = (
    Ours(),
    Borg(),
    Restic(),
    Borg(encrypted=True),
    Ours(encrypted=True),
)
