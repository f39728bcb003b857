"""A question that is put over several links: parts, their entries, and the tables made of them.

In each round every link is laid anew, with the round's number as its seed; its controls are
measured, and then the entries, one right after the other. A ratio is taken within a round, to
another entry or to the control of the same link, and the median of the rounds' ratios counts.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks import comparison
from benchmarks.processes import PATIENCE, MeasurementError, first_line
from benchmarks.tables import DASH, TIMES, ratio, table
from benchmarks.wan import controls
from benchmarks.wan.job import Figures, Job
from benchmarks.wan.link import ADDRESSES, CLIENT, SERVER, Wire, laid
from benchmarks.wan.links import LINKS, Link

CONTROL = "control"
# Seconds of bare TCP for the control, where no entry is bare TCP. After one second alone, what was
# held back behind the losses of the start still comes, and makes a link look quicker than it is.
CONTROL_OMIT, CONTROL_SECONDS = 2.0, 3.0


@dataclass(frozen=True)
class Pace(comparison.Pace):
    """How long it may take.

    Attributes:
        share: of the work of operations that have an amount of it, rather than a time.
        first_links: links of each part that are measured; None for all.
    """

    share: float = 1.0
    first_links: int | None = None

    def of(self, amount: int) -> int:
        """Return the amount of work to be done."""
        return max(1, int(amount * self.share))


@dataclass(frozen=True)
class Entry:
    """A row of the tables."""

    name: str
    measure: Callable[[Wire, Pace], Figures]


# Given an entry's figures and those of all of the round, returns what the former are divided by.
Against = Callable[[Figures, Mapping[str, Figures]], float]


@dataclass(frozen=True)
class Table:
    """What of the entries' figures is shown, and what it is compared with.

    Attributes:
        caption: what a cell says.
        value: picks the figure.
        show: makes text of it.
        against: what it is divided by for the ratio; None for no ratio.
        headline: whether the project's README shows it.
    """

    caption: str
    value: Callable[[Figures], float]
    show: Callable[[float], str]
    against: Against | None = None
    headline: bool = False


@dataclass(frozen=True)
class Part:
    """Entries that are compared over some links.

    Attributes:
        title: of the part.
        links: columns of the tables, by name.
        entries: rows of the tables.
        tables: made of the figures.
        render: makes text of a link's rounds that tables don't suit, given all links.
        bare: the entry that is bare TCP, and thus the control of the rate.
    """

    title: str
    links: tuple[str, ...]
    entries: tuple[Entry, ...]
    tables: tuple[Table, ...] = ()
    render: Callable[[Mapping[str, Any]], str] | None = None
    bare: str | None = None


@dataclass(frozen=True)
class Question:
    """A question, and its parts."""

    title: str
    what: str
    parts: tuple[Part, ...]

    def run(
        self, pace: Pace, links: Sequence[str], progress: Callable[[str], None]
    ) -> dict[str, Any]:
        """Measure, and return what is to be kept.

        Args:
            pace: how long it may take.
            links: names of those to be measured; none for all of each part.
            progress: told what is being measured.
        """
        kept: dict[str, Any] = {}
        for part in self.parts:
            chosen = [name for name in part.links if not links or name in links]
            kept[part.title] = {
                name: {"link": asdict(LINKS[name]), "rounds": [], "failures": {}, "counts": {}}
                for name in chosen[: pace.first_links]
            }
        for number in range(pace.rounds):
            for part in self.parts:
                for name, found in kept[part.title].items():
                    where = f"{self.title}, round {number + 1}: {part.title}, {name}"
                    link = replace(LINKS[name], seed=number + 1)
                    with laid(link, found["counts"]) as wire:
                        one = measured(part, wire, pace, found["failures"], where, progress)
                    found["rounds"].append(one)
        return kept

    def report(self, kept: Mapping[str, Any]) -> str:
        """Return the figures as Markdown."""
        blocks = [self.what]
        for part in self.parts:
            links = kept.get(part.title)
            if not links:
                continue
            blocks += [f"#### {part.title}", control_table(links)]
            blocks += [f"{one.caption}\n\n{cells(part, one, links)}" for one in part.tables]
            if part.render is not None:
                blocks.append(part.render(links))
            blocks += [
                f"{entry}, {name}: {len(why)} of {len(found['rounds'])} rounds failed ({why[0]})."
                for name, found in links.items()
                for entry, why in found["failures"].items()
            ]
        return "\n\n".join(blocks)

    def headlines(self, kept: Mapping[str, Any]) -> list[str]:
        """Return the tables that the project's README shows, as Markdown."""
        return [
            f"**{self.title}: {part.title[0].lower()}{part.title[1:]}.** {one.caption}\n\n"
            f"{cells(part, one, kept[part.title])}"
            for part in self.parts
            for one in part.tables
            if one.headline and kept.get(part.title)
        ]


def measured(
    part: Part,
    wire: Wire,
    pace: Pace,
    failures: dict[str, list[str]],
    where: str,
    progress: Callable[[str], None],
) -> dict[str, Figures]:
    """Return the figures of one round over one link, by entry; those of CONTROL are first."""
    progress(f"{where}, control")
    found: dict[str, Figures] = {CONTROL: {"rtt": controls.ping(wire)}}
    if part.bare is None:
        found[CONTROL] |= controls.iperf(wire, CONTROL_OMIT, CONTROL_SECONDS)
    for entry in part.entries:
        progress(f"{where}, {entry.name}")
        try:
            found[entry.name] = entry.measure(wire, pace)
        except MeasurementError as error:
            failures.setdefault(entry.name, []).append(str(error))
    if part.bare in found:
        found[CONTROL] = found[part.bare] | found[CONTROL]
    return found


# What entries are.


def peer(end: str, operation: str, job: Callable[[Pace], Job]) -> Callable[[Wire, Pace], Figures]:
    """Return a measurement of a peer: a new server at the far end, a new client at the near one."""

    def measure(wire: Wire, pace: Pace) -> Figures:
        module = [sys.executable, "-m", "benchmarks.wan.ends"]
        host = ADDRESSES[SERVER]
        serving = wire.inside(SERVER, [*module, "serve", end, host])
        with first_line(serving, patience=PATIENCE) as (port, server):
            there = replace(job(pace), host=host, port=json.loads(port), server=server)
            command = [*module, "measure", end, operation, json.dumps(asdict(there))]
            patience = 3 * PATIENCE + there.omit + there.seconds
            with first_line(wire.inside(CLIENT, command), patience=patience) as (line, _):
                figures: Figures = json.loads(line)
                return figures

    return measure


def bare(*, down: bool = False, connections: int = 1) -> Callable[[Wire, Pace], Figures]:
    """Return a measurement of bare TCP."""
    return lambda wire, pace: controls.iperf(
        wire, pace.warm_up, pace.seconds, down=down, connections=connections
    )


# What ratios are to.


def to_rtt(own: Figures, around: Mapping[str, Figures]) -> float:
    """The round trip of the control."""
    return float(around[CONTROL]["rtt"])


def to(entry: str, value: Callable[[Figures], float]) -> Against:
    """Another entry's figure."""
    return lambda own, around: value(around[entry])


def picked(key: str) -> Callable[[Figures], float]:
    """Return what picks a figure by its name."""
    return lambda figures: float(figures[key])


# Text.


def control_table(links: Mapping[str, Any]) -> str:
    """Return what the links were, as measured."""
    rows: list[list[str]] = []
    for found in links.values():
        rtts, rates = (
            [one[CONTROL][key] for one in found["rounds"] if key in one[CONTROL]]
            for key in ("rtt", "rate")
        )
        rows.append([str(Link(**found["link"])), span(rtts, 1e3), span(rates, 8e-6)])
    heads = ["control", "RTT by ping, ms", "bare TCP by iperf3, Mbit/s"]
    return table(heads, rows)


def span(values: Sequence[float], scale: float) -> str:
    """Return a median with the least and the greatest."""
    if not values:
        return DASH
    low, middle, high = (figure(of(values) * scale) for of in (min, statistics.median, max))
    return f"{middle} ({low}{DASH}{high})"


def figure(value: float) -> str:
    """Return a number of three digits, or of all that it has before its point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cells(part: Part, shown: Table, links: Mapping[str, Any]) -> str:
    """Return a table of one figure: a row for each entry, a column for each link."""
    rows = [
        [entry.name, *(cell(entry.name, shown, found["rounds"]) for found in links.values())]
        for entry in part.entries
    ]
    return table(["", *links], rows)


def cell(entry: str, shown: Table, rounds: Sequence[Mapping[str, Figures]]) -> str:
    """Return the median of a figure, and of its ratio with the least and the greatest."""
    done = [one for one in rounds if entry in one]
    if not done:
        return "failed"
    text = shown.show(statistics.median(shown.value(one[entry]) for one in done))
    ratios = list[float]()
    for one in done if shown.against is not None else ():
        assert shown.against is not None
        try:
            ratios.append(shown.value(one[entry]) / shown.against(one[entry], one))
        except (KeyError, ZeroDivisionError):
            continue
    if not ratios:
        return text
    return (
        f"{text} · **{ratio(statistics.median(ratios))} {TIMES}** "
        f"({ratio(min(ratios))}{DASH}{ratio(max(ratios))})"
    )


def megabits(bytes_per_second: float) -> str:
    """Return a rate as networks are measured."""
    return f"{figure(bytes_per_second * 8e-6)} Mbit/s"


def seconds(value: float) -> str:
    """Return seconds, or milliseconds."""
    return f"{figure(value)} s" if value >= 1 else f"{figure(value * 1e3)} ms"


def megabytes(value: float) -> str:
    """Return bytes of memory."""
    return f"{figure(value / 1e6)} MB" if value >= 1e6 else f"{figure(value / 1e3)} kB"
