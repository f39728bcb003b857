"""`python -m benchmarks.backup`: the reference backup beside restic and borg, link by link.

It needs root, for network namespaces. See ../README.md.
"""

import argparse
import compileall
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.backup.measured import measured
from benchmarks.backup.places import PLACES, Place, at
from benchmarks.backup.programs import PACKAGES, PROGRAMS, Program, missing_commands
from benchmarks.backup.tables import CEILING, first_tables, report
from benchmarks.backup.trees import SIZE, Tree, build, installation
from benchmarks.comparison import Pace
from benchmarks.environment import environment
from benchmarks.processes import PATIENCE, ROOT, MeasurementError
from benchmarks.tables import replace_block
from benchmarks.wan import controls
from benchmarks.wan import link as wan
from benchmarks.wan.link import CLIENT, has_netem
from benchmarks.wan.question import CONTROL, CONTROL_OMIT, CONTROL_SECONDS

RESULTS = ROOT / "benchmarks" / "results" / "backup.json"
# Of the whole tree, for --quick.
QUICK_SIZE = 20_000_000


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(source: Path, rounds: int, places: list[str], size: int, work: Path) -> dict[str, Any]:
    """Measure, and return what is to be kept."""
    progress(f"copying files of {source}")
    tree = build(source, work / "tree", size)
    for package in ("druvarpc", "examples"):
        compileall.compile_dir(ROOT / package, quiet=1)
    kept: dict[str, Any] = {
        "environment": around(rounds),
        "tree": {**asdict(tree), "path": source.name, "source": described(source)},
        "places": {name: {"link": linked(name), "rounds": [], "failures": {}} for name in places},
    }
    for number in range(rounds):
        # Whoever is first finds the machine otherwise than whoever is last: each is, in turn.
        turn = number % len(PROGRAMS)
        programs = PROGRAMS[turn:] + PROGRAMS[:turn]
        for name, found in kept["places"].items():
            progress(f"round {number + 1}, {name}")
            with at(name, seed=number + 1) as place:
                found["rounds"].append(
                    one_round(programs, place, tree, work / "run", found["failures"])
                )
    return kept


def one_round(
    programs: tuple[Program, ...],
    place: Place,
    tree: Tree,
    work: Path,
    failures: dict[str, list[str]],
) -> dict[str, Any]:
    """Return one round's figures at one place: the control's, the ceiling's, the programs'."""
    found: dict[str, Any] = {CEILING: ceiling(tree, place)}
    if place.wire is not None:
        found[CONTROL] = {"rtt": controls.ping(place.wire)}
        found[CONTROL] |= controls.iperf(place.wire, CONTROL_OMIT, CONTROL_SECONDS)
    for program in programs:
        try:
            found[program.name] = measured(program, place, tree, work)
        except MeasurementError as error:
            failures.setdefault(program.name, []).append(str(error))
            progress(f"  {program.name}: {error}")
            continue
        times = ", ".join(
            f"{what} {one['seconds']:.2f} s"
            for what, one in found[program.name].items()
            if isinstance(one, dict)
        )
        progress(f"  {program.name}: {times}")
    return found


def ceiling(tree: Tree, place: Place) -> dict[str, float]:
    """Return what cutting, hashing and compressing took; the tree is in the page cache then."""
    command = [sys.executable, "-m", "benchmarks.backup.ceiling", str(tree.path)]
    printed = controls.spoken(place.inside(CLIENT, command), patience=PATIENCE)
    figures: dict[str, float] = json.loads(printed)
    return figures


def linked(name: str) -> dict[str, Any] | None:
    """Return what is kept of a place's link."""
    link = PLACES[name]
    return None if link is None else {"text": str(link), "fields": asdict(link)}


def described(source: Path) -> str:
    """Return which installation it is, without where."""
    return f"{source.parent.name}/{source.name}"


def around(rounds: int) -> dict[str, Any]:
    """Return what it was measured on and with."""
    kept = environment(Pace(rounds, 0, 0), peers=("druvarpc",))
    for command in (["restic", "version"], ["rclone", "version"], ["borg", "--version"]):
        first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kept["versions"].append(" ".join(first.splitlines()[0].split()[:2]))
    kept["versions"].append(controls.iperf_version())
    kept["link"] = "netem" if has_netem() else "forwarder.c over TUN"
    kept["files"] = subprocess.run(
        ["stat", "--file-system", "--format=%T", tempfile.gettempdir()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return kept


def sentence(kept: dict[str, Any]) -> str:
    """Return what was measured on, and with which tree."""
    around, tree = kept["environment"], kept["tree"]
    at = f" (at {around['revision']})" if around["revision"] else ""
    return (
        f"{around['date']}, {around['processor']}, {around['cores']} cores, {around['kernel']}, "
        f"{around['python']}; {', '.join(around['versions'])}{at}; {around['rounds']} rounds; "
        f"load average at the start {around['load_average']:g}; links by {around['link']}; "
        f"all files on {around.get('files', 'a disk')}. "
        f"The tree: {tree['files']:,} files, {tree['size'] / 1e6:.0f} MB, of {tree['source']}."
    )


def whole(kept: dict[str, Any]) -> str:
    return f"{report(kept)}\n\n{sentence(kept)}"


def write(kept: dict[str, Any]) -> None:
    """Put the tables into the READMEs that have markers for them."""
    first = f"{first_tables(kept)}\n\n{sentence(kept)}"
    for path, text in (
        ("benchmarks/README.md", whole(kept)),
        ("examples/backup/README.md", first),
    ):
        if not replace_block(ROOT / path, "backup", text):
            sys.exit(f"{path}: no markers for backup")


def install() -> None:
    """Install what is missing, where that can be done: as root, and with apt-get."""
    wan.install()
    if packages := sorted({PACKAGES[command] for command in missing_commands()}):
        wan.run("apt-get", "update", "-qq")
        wan.run("apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages)


def missing() -> list[str]:
    """Return what is needed and isn't there, each as a phrase."""
    return wan.missing() + [
        f"`{command}` (Debian's package {PACKAGES[command]})" for command in missing_commands()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backup", description=__doc__)
    parser.add_argument("--rounds", type=int, help="3, or 1 with --quick; the median counts")
    parser.add_argument(
        "--link", nargs="+", metavar="NAME", help=", ".join(PLACES), choices=PLACES, default=[]
    )
    parser.add_argument(
        "--source", type=Path, help="what to copy the tree from; a Python installation by default"
    )
    parser.add_argument("--quick", action="store_true", help="a small tree, once, over one link")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--install", action="store_true", help="first install the tools that are missing (apt-get)"
    )
    parser.add_argument(
        "--show", action="store_true", help="don't measure: print the tables of what was kept"
    )
    parser.add_argument(
        "--write", action="store_true", help="don't measure: put what was kept into the READMEs"
    )
    options = parser.parse_args()
    if options.show or options.write:
        kept = json.loads(RESULTS.read_text())
        if options.write:
            write(kept)
        else:
            print(whole(kept))
        return
    if options.install:
        install()
    if wanted := missing():
        sys.exit(f"benchmarks of backups need {', '.join(wanted)}")
    places = options.link or (["loopback", "region"] if options.quick else list(PLACES))
    with tempfile.TemporaryDirectory(prefix="druvarpc-backup-") as work:
        kept = run(
            options.source or installation(),
            options.rounds or (1 if options.quick else 3),
            places,
            QUICK_SIZE if options.quick else SIZE,
            Path(work),
        )
    print(json.dumps(kept) if options.json else whole(kept), flush=True)
    if not options.quick and not options.link:
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
