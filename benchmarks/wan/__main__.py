"""`python -m benchmarks.wan [QUESTION…]`: measure over long links, keep the results, print tables.

It needs root, for network namespaces. See ../README.md.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any, cast

from benchmarks.environment import environment, sentence
from benchmarks.tables import replace_block
from benchmarks.wan.controls import iperf_version
from benchmarks.wan.ends import ENDS
from benchmarks.wan.link import has_netem, install, missing
from benchmarks.wan.links import LINKS
from benchmarks.wan.question import Pace, Question

RESULTS = Path(__file__).parent.parent / "results"
# Modules of this package, in the order of the tables.
QUESTIONS = ("small_calls", "chain", "bulk", "loss", "lanes", "memory", "clubs")


def question(name: str) -> Question:
    return cast(Question, importlib.import_module(f"benchmarks.wan.{name}").QUESTION)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def run(name: str, pace: Pace, links: list[str]) -> dict[str, Any]:
    asked = question(name)
    around = environment(pace, ENDS)
    around["versions"].append(iperf_version())
    around["link"] = "netem" if has_netem() else "forwarder.c over TUN"
    kept = {"question": asked.title, "environment": around}
    kept["results"] = asked.run(pace, links, progress)
    progress("")
    return kept


def where(kept: dict[str, Any]) -> str:
    """Return what was measured on, and when."""
    around = kept["environment"]
    return f"{sentence(around)} Links by {around['link']}."


def report(name: str, kept: dict[str, Any]) -> str:
    asked = question(name)
    return f"### {asked.title}\n\n{asked.report(kept['results'])}\n\n{where(kept)}"


def saved() -> dict[str, dict[str, Any]]:
    """Return the results that were kept, in the order of the tables."""
    paths = {name: RESULTS / f"wan_{name}.json" for name in QUESTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def write(kept: dict[str, dict[str, Any]]) -> None:
    """Put the tables into benchmarks/README.md, and some of them into the README and docs/."""

    def heads(*names: str) -> str:
        chosen = {name: kept[name] for name in names if name in kept}
        texts = [
            text
            for name, one in chosen.items()
            for text in question(name).headlines(one["results"])
        ]
        texts += [where(one) for one in list(chosen.values())[-1:]]
        return "\n\n".join(texts)

    root = RESULTS.parent.parent
    for path, marker, text in (
        ("benchmarks/README.md", "long links", "\n\n".join(report(*one) for one in kept.items())),
        ("README.md", "long links", heads("small_calls", "bulk", "loss", "lanes")),
        ("docs/connections.md", "connections", heads("bulk", "loss")),
        ("docs/connections.md", "lanes", heads("lanes")),
        ("docs/clubs.md", "clubs", report("clubs", kept["clubs"]) if "clubs" in kept else ""),
    ):
        if not replace_block(root / path, marker, text):
            sys.exit(f"{path}: no markers for {marker}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wan", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--rounds", type=int, help="5, or 1 with --quick; the median counts")
    parser.add_argument(
        "--link", nargs="+", default=[], metavar="NAME", help=", ".join(LINKS), choices=LINKS
    )
    parser.add_argument("--quick", action="store_true", help="one short round; nothing is kept")
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
    if options.write:
        write(saved())
        return
    unknown = set(options.questions) - set(QUESTIONS)
    if unknown:
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    rounds = options.rounds or (1 if options.quick else 5)
    if options.quick:
        pace = Pace(rounds, 1.0, 2.0, share=0.1, first_links=1)
    else:
        pace = Pace(rounds, 2.0, 3.0)
    if options.install:
        install()
    if not options.show and (wanted := missing()):
        sys.exit(f"benchmarks over long links need {', '.join(wanted)}")
    for name in options.questions or QUESTIONS:
        path = RESULTS / f"wan_{name}.json"
        if options.show:
            if not path.exists():
                continue
            kept = json.loads(path.read_text())
        else:
            kept = run(name, pace, options.link)
        print(json.dumps(kept) if options.json else f"{report(name, kept)}\n", flush=True)
        if not options.quick and not options.link and not options.show:
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
