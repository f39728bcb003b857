"""`python -m examples.backup.demo`: the whole of it, on the library of this Python.

In a temporary directory, with a server in a process of its own: back up, back up again, change
some of it, back that up, restore both, and compare every byte, mode, time and link. Exits with 0 if
nothing differs. Packages in site-packages are left out: how many there are says nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import tree
from .errors import display
from .progress import size
from .tree import Entry, Kind, Skipped

COMMAND = [sys.executable, "-m", "examples.backup"]

# The changed tree's edits: enough to show that only what changed is sent.
EDITED, DELETED, ADDED = 20, 20, 10


def main() -> None:
    """Runs the demo, and exits."""
    library = Path(sysconfig.get_path("stdlib"))
    with tempfile.TemporaryDirectory(prefix="druvarpc-demo-") as name:
        place = Path(name)
        before, live = place / "before", place / "live"
        print(f"copying {library}, without site-packages")
        shutil.copytree(library, before, True, shutil.ignore_patterns("site-packages"))
        shutil.copytree(before, live, True)
        with serving(place / "store") as url:
            back_up = ("backup", str(live), "--name", "library", "--cache", str(place / "cache"))
            runs = {
                "backup": run(*back_up, "--server", url),
                "again": run(*back_up, "--server", url),
            }
            for line in change(live):
                print(f"  changed: {line}")
            runs["changed"] = run(*back_up, "--server", url)
            for column, snapshot, target in (
                ("restore", runs["again"]["snapshot"], "restored-before"),
                ("restore 2", "library", "restored-after"),
            ):
                runs[column] = run("restore", snapshot, str(place / target), "--server", url)
        print(table(runs))
        print(summary(runs))
        differences = [
            *compare(before, place / "restored-before"),
            *compare(live, place / "restored-after"),
        ]
    for difference in differences[:20]:
        print(f"DIFFERS: {difference}")
    if differences:
        sys.exit(f"{len(differences)} differences")
    print("Both restored trees are equal to their sources, in contents, attributes and links.")


def change(root: Path) -> Iterator[str]:
    """Changes a tree here and there; says what it did."""
    files = sorted(path for path in root.rglob("*.py") if _is_own(path))
    step = len(files) // (EDITED + DELETED)
    for path in files[: EDITED * step : step]:
        with path.open("ab") as file:
            file.write(b"\n# edited\n")
    yield f"{EDITED} files edited"
    for path in files[EDITED * step :: step][:DELETED]:
        path.unlink()
    yield f"{DELETED} files deleted"
    for number in range(ADDED):
        (root / f"added-{number}").write_bytes(os.urandom(1000 * number))
    (root / "a link").symlink_to("added-1")
    yield f"{ADDED} files and a link added"
    (root / "json").rename(root / "renamed")
    (root / "renamed").chmod(0o700)
    yield "a directory renamed, its mode changed"
    largest = max(filter(_is_own, root.rglob("*")), key=_size)
    content = largest.read_bytes()
    middle = len(content) // 2
    largest.write_bytes(content[:middle] + b"inserted" + content[middle:])
    yield f"8 bytes inserted in the middle of {largest.name} ({size(len(content))})"


@contextmanager
def serving(store: Path) -> Iterator[str]:
    """Runs a server for the time of the block; yields its URL."""
    command = [*COMMAND, "serve", "--store", str(store), "--listen", "tcp://127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().split()
            if line[:2] != ["listening", "on"]:
                sys.exit("the server does not start")
            yield line[2]
        finally:
            process.terminate()
    if process.returncode:
        sys.exit(f"the server ended with status {process.returncode}")


def run(*arguments: str) -> dict[str, Any]:
    """Runs a command; returns its JSON."""
    print("$ python -m examples.backup", *(Path(argument).name for argument in arguments[:-2]))
    output = subprocess.run([*COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, check=False)
    if output.returncode:
        sys.exit(f"{arguments[0]} failed with status {output.returncode}")
    found: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return found


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Returns the figures, a column for each run."""
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("files", lambda run: f"{run['files']:,}"),
        ("source", lambda run: size(_bytes(run))),
        ("chunks", lambda run: f"{run['chunks']:,}" if "chunks" in run else ""),
        ("unchanged", lambda run: f"{run['unchanged']:,}"),
        ("new chunks", lambda run: f"{run['new_chunks']:,}" if "chunks" in run else ""),
        ("new content", lambda run: size(run["new_bytes"]) if "chunks" in run else ""),
        ("on the wire", lambda run: size(run["wire_bytes"])),
        ("calls", lambda run: f"{run['calls']:,}"),
        ("frames of calls", lambda run: f"{run['round_trips']:,}"),
        ("seconds", lambda run: f"{run['seconds']:.2f}"),
        ("CPU seconds", lambda run: f"{run['cpu_seconds']:.2f}"),
        ("rate", lambda run: size(round(_bytes(run) / run["seconds"])) + "/s"),
    ]
    lines = ["", "".join([f"{'':17}", *(f"{name:>12}" for name in runs)])]
    for label, cell in rows:
        lines.append("".join([f"{label:17}", *(f"{cell(run):>12}" for run in runs.values())]))
    return "\n".join(lines) + "\n"


def summary(runs: dict[str, dict[str, Any]]) -> str:
    """Returns what deduplication, compression and clubbing saved, in sentences."""
    first, again, changed = runs["backup"], runs["again"], runs["changed"]
    source, unique, wire = first["source_bytes"], first["new_bytes"], first["wire_bytes"]
    # What a client would call that asks for, puts and names things one by one.
    single = first["chunks"] + first["new_chunks"] + first["files"]
    return (
        f"Deduplication left {unique / source:.0%} of the source to be sent, compression"
        f" {wire / unique:.0%} of that:\n{wire / source:.0%} of the source went over the wire."
        f" Of the same tree again, {again['wire_bytes'] / source:.2%} did;"
        f" of the changed one, {changed['wire_bytes'] / source:.2%}.\n"
        f"One call for each chunk asked for, each chunk put and each file would have been"
        f" {single:,} calls;\nbundled by the client they were {first['calls']:,}, and the library"
        f" sent those in {first['round_trips']:,} frames."
    )


def compare(left: Path, right: Path) -> Iterator[str]:
    """Yields what differs between two trees."""
    others = dict(_described(right))
    for path, found in _described(left):
        other = others.pop(path, None)
        if other is None:
            yield f"{display(path)} is missing in {right.name}"
        elif found != other:
            yield f"{display(path)} is not the same in {right.name}"
    yield from (f"{display(path)} is only in {right.name}" for path in others)


def _described(root: Path) -> Iterator[tuple[bytes, tuple[Entry | Skipped, bytes]]]:
    place = os.fsencode(root)
    for found in tree.scan(place):
        if isinstance(found, Skipped):
            yield found.path, (found, b"")
            continue
        entry = tree.describe(place, found)
        path = Path(os.fsdecode(os.path.join(place, found.path)))
        yield found.path, (entry, path.read_bytes() if entry.kind is Kind.FILE else b"")


def _bytes(run: dict[str, Any]) -> int:
    found: int = run["source_bytes"] if "source_bytes" in run else run["bytes"]
    return found


def _is_own(path: Path) -> bool:
    # Through a link, a file outside the copy would be changed.
    return path.is_file() and not path.is_symlink() and os.access(path, os.W_OK)


def _size(path: Path) -> int:
    return path.lstat().st_size


if __name__ == "__main__":
    main()
