"""`python -m benchmarks [QUESTION…]`: measure, keep the results, print tables. See README.md."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.comparison import FIRST, Comparison, Pace
from benchmarks.compression import Compression
from benchmarks.core import Core
from benchmarks.environment import environment, sentence
from benchmarks.processes import describe
from benchmarks.tables import replace_block

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# Modules of this package, in the order of the tables.
QUESTIONS = (
    "small_calls",
    "typed",
    "bulk_up",
    "bulk_down",
    "many_connections",
    "connecting",
    "memory",
    "around_calls",
    "transports",
    "transports_bulk",
    "compression",
    "core",
)


def question(name: str) -> Comparison | Compression | Core:
    found: Comparison | Compression | Core = importlib.import_module(f"benchmarks.{name}").QUESTION
    return found


def progress(text: str) -> None:
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def run(name: str, pace: Pace) -> dict[str, Any]:
    asked = question(name)
    around = environment(pace)
    kept = {"question": asked.title, "environment": around, "results": asked.run(pace, progress)}
    progress("")
    return kept


def report(name: str, kept: dict[str, Any]) -> str:
    asked = question(name)
    where = sentence(kept["environment"])
    return f"### {asked.title}\n\n{asked.tables(kept['results'])}\n\n{where}"


def saved() -> dict[str, dict[str, Any]]:
    """Return the results that were kept, in the order of the tables."""
    paths = {name: RESULTS / f"{name}.json" for name in QUESTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def write(kept: dict[str, dict[str, Any]]) -> None:
    """Put the tables into benchmarks/README.md, and the first of them into the README."""
    whole = "\n\n".join(report(name, one) for name, one in kept.items())
    first = [
        f"**{question(name).title}.** {question(name).what}\n\n"
        f"{question(name).first_table(one['results'])}\n\n"
        f"{sentence(one['environment'])}"
        for name, one in kept.items()
        if question(name).headline
    ]
    blocks = [
        (HERE / "README.md", "benchmarks", whole),
        (HERE.parent / "README.md", "benchmarks", "\n\n".join(first)),
    ]
    if "compression" in kept:
        page = HERE.parent / "docs" / "compression.md"
        results, around = kept["compression"]["results"], kept["compression"]["environment"]
        text = f"{question('compression').tables(results)}\n\n{sentence(around)}"
        blocks.append((page, "compression", text))
    for path, marks, text in blocks:
        done = "tables written" if replace_block(path, marks, text) else "no markers, left as it is"
        print(f"{path.relative_to(HERE.parent)}: {done}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--quick", action="store_true", help="one short round; nothing is kept")
    parser.add_argument(
        "--write", action="store_true", help="don't measure: put what is kept into the READMEs"
    )
    options = parser.parse_args()
    unknown = set(options.questions) - set(QUESTIONS)
    if unknown or options.repeats < 1:
        parser.error(f"no such question: {', '.join(sorted(unknown))}" if unknown else "no rounds")
    if options.write:
        write(saved())
        return
    if describe(FIRST).failure:
        sys.exit(f"{FIRST} can't be measured: {describe(FIRST).failure}")
    pace = Pace(1, 0.2, 0.3) if options.quick else Pace(options.repeats, 0.5, 1.0)
    for name in options.questions or QUESTIONS:
        kept = run(name, pace)
        print(f"{report(name, kept)}\n", flush=True)
        if not options.quick:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


main()
