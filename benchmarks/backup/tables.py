"""What a run found, as Markdown: seconds, the marks that were set, and what it cost."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.backup.measured import AGAIN, FIRST, RESTORE
from benchmarks.backup.places import LOOPBACK
from benchmarks.backup.programs import PROGRAMS, Borg, Ours, Program, Restic
from benchmarks.tables import DASH, TIMES, table
from benchmarks.wan.question import control_table, figure

ACTS = (FIRST, AGAIN, RESTORE)
HEADS = {FIRST: "first backup", AGAIN: "unchanged backup", RESTORE: "restore"}
# How many times as long the faster of the others is to take.
WANTED = {
    LOOPBACK: {FIRST: 1.5, AGAIN: 1.3, RESTORE: 1.3},
    "region": {FIRST: 1.2, AGAIN: 1.3, RESTORE: 1.3},
    "continent": {FIRST: 1.5, AGAIN: 1.3, RESTORE: 1.5},
    "metro": {FIRST: 1.1, AGAIN: 1.1, RESTORE: 1.3},
}
LOSSY, LOSSLESS = "metro", "metro, no loss"
CEILING = "ceiling"
PLAIN, ENCRYPTED = Ours(), Ours(encrypted=True)

# A place's rounds: by program's name, its figures by act; and the control.
Rounds = Sequence[Mapping[str, Any]]


def report(results: Mapping[str, Any]) -> str:
    """Return all tables."""
    places: Mapping[str, Any] = results["places"]
    links = {name: found for name, found in places.items() if found["link"] is not None}
    blocks = [first_tables(results), "**Against the marks**", marks_table(places)]
    if LOOPBACK in places:
        blocks += ["**What it costs**", costs_table(places[LOOPBACK]["rounds"])]
    if links:
        shown = {name: {**found, "link": found["link"]["fields"]} for name, found in links.items()}
        blocks += ["**The links, as measured**", control_table(shown)]
    return "\n\n".join(blocks)


def first_tables(results: Mapping[str, Any]) -> str:
    """Return the tables of seconds, place by place."""
    places: Mapping[str, Any] = results["places"]
    blocks = [
        "Seconds, median of the rounds; then how many times ours that is, as the median of the "
        "rounds' ratios, with the least and the greatest. Plain rows are against ours in the "
        "clear, encrypted ones against ours encrypted.",
    ]
    for found in places.values():
        blocks.append(f"**{found['link']['text'] if found['link'] else LOOPBACK}**")
        blocks.append(seconds_table(found["rounds"]))
        blocks += [
            f"{program}: {len(why)} of {len(found['rounds'])} rounds failed ({why[0]})."
            for program, why in found["failures"].items()
        ]
    return "\n\n".join(blocks)


def seconds_table(rounds: Rounds) -> str:
    """Return a place's table: a row for each program, a column for each act."""
    rows = [
        [program.name, *(against_ours(program, what, rounds) for what in ACTS)]
        for program in PROGRAMS
        if done(rounds, program)
    ]
    return table(["", *HEADS.values()], rows)


def against_ours(program: Program, what: str, rounds: Rounds) -> str:
    """Return a program's seconds, and the ratio to ours of the same kind."""
    own = ENCRYPTED if program.encrypted and done(rounds, ENCRYPTED) else PLAIN
    text = f"{figure(statistics.median(picked(rounds, program, what)))} s"
    if isinstance(program, Ours):
        return text
    return f"{text} · {spread(quotients(rounds, own, (program,), what))}"


def marks_table(places: Mapping[str, Any]) -> str:
    """Return what was asked of each act over each link, and what was reached."""
    rows: list[list[str]] = []
    for name, wanted in WANTED.items():
        if name not in places:
            continue
        rounds: Rounds = places[name]["rounds"]
        for what, mark in wanted.items():
            plain = quotients(rounds, PLAIN, (Restic(), Borg()), what)
            both = quotients(rounds, ENCRYPTED, (Restic(), Borg(encrypted=True)), what)
            row = [f"{name}, {HEADS[what]}: the faster of the others to ours", f"at least {mark}"]
            rows.append([*row, judged(plain, mark), judged(both, mark)])
    floors = {"region": 1.15}
    for name, mark in floors.items():
        if name in places:
            row = [f"{name}, first backup: to the floor of the bytes sent", f"at most {mark}"]
            rows.append([*row, *(judged(to_floor(places, name, own), -mark) for own in OURS)])
    if LOSSY in places and LOSSLESS in places:
        pairs = [with_and_without(places, own) for own in OURS]
        row = ["metro, restore: to that without loss", "at most 1.15"]
        rows.append([*row, *(judged(found, -1.15) for found in pairs)])
    if LOOPBACK in places:
        rounds = places[LOOPBACK]["rounds"]
        for ends in (("client",), ("client", "server")):
            shares = [of_ceiling(rounds, own, ends) for own in OURS]
            whose = " and ".join(ends)
            row = [f"loopback, first backup: GB per hour per core of {whose} to the ceiling"]
            rows.append([*row, "at least 0.5", *(judged(found, 0.5) for found in shares)])
        lighter = [
            [one[Restic().name][FIRST]["memory"] / one[own.name][FIRST]["memory"] for one in both]
            for own in OURS
            for both in [having(rounds, own, Restic())]
        ]
        row = ["loopback, first backup: restic's peak memory to ours", "at least 1"]
        rows.append([*row, *(judged(found, 1.0) for found in lighter)])
    return table(["", "asked", "in the clear", "encrypted"], rows)


OURS = (PLAIN, ENCRYPTED)


def costs_table(rounds: Rounds) -> str:
    """Return processor time, memory and bytes of a first backup, and memory of a restore."""
    rows = [
        [
            program.name,
            f"{medians(rounds, program, FIRST, 'client')} + "
            f"{medians(rounds, program, FIRST, 'server')}",
            figure(statistics.median(per_core(rounds, program, "client"))),
            figure(statistics.median(per_core(rounds, program, "client", "server"))),
            medians(rounds, program, FIRST, "memory", 1e-6),
            medians(rounds, program, RESTORE, "memory", 1e-6),
            medians(rounds, program, FIRST, "sent", 1e-6),
            medians(rounds, program, AGAIN, "sent", 1e-3),
        ]
        for program in PROGRAMS
        if done(rounds, program)
    ]
    ceilings = [one[CEILING]["bytes"] / one[CEILING]["processor"] * 3.6e-6 for one in rounds]
    dashes = [DASH] * 4
    processor = [one[CEILING]["processor"] for one in rounds]
    most = figure(statistics.median(ceilings))
    alone = f"{figure(statistics.median(processor))}"
    rows.append(["cutting, hashing, compressing alone", alone, most, most, *dashes])
    heads = [
        "loopback",
        "first backup: client + server, s of processor",
        "GB per hour per core, client",
        "client and server",
        "client's peak memory, MB",
        "of a restore, MB",
        "first backup: MB on the wire",
        "unchanged: kB on the wire",
    ]
    return table(heads, rows)


# Figures of rounds.


def done(rounds: Rounds, *programs: Program) -> bool:
    """Return whether there is a round that all of these have ended."""
    return bool(having(rounds, *programs))


def having(rounds: Rounds, *programs: Program) -> list[Mapping[str, Any]]:
    """Return the rounds that all of these have ended."""
    return [one for one in rounds if all(program.name in one for program in programs)]


def picked(rounds: Rounds, program: Program, what: str, key: str = "seconds") -> list[float]:
    """Return one figure of each round."""
    return [float(one[program.name][what][key]) for one in having(rounds, program)]


def quotients(rounds: Rounds, own: Program, others: Sequence[Program], what: str) -> list[float]:
    """Return, for each round, the least time of the others divided by our own."""

    def took(one: Mapping[str, Any], program: Program) -> float:
        return float(one[program.name][what]["seconds"])

    return [
        min(took(one, other) for other in others) / took(one, own)
        for one in having(rounds, own, *others)
    ]


def to_floor(places: Mapping[str, Any], name: str, own: Program) -> list[float]:
    """Return the time of a first backup divided by what the link takes for the bytes sent."""
    found = places[name]
    rate = found["link"]["fields"]["rate"] / 8
    return [
        one[own.name][FIRST]["seconds"] * rate / one[own.name][FIRST]["sent"]
        for one in having(found["rounds"], own)
    ]


def with_and_without(places: Mapping[str, Any], own: Program) -> list[float]:
    """Return the times of restores with loss divided by those without, round by round."""
    pairs = zip(places[LOSSY]["rounds"], places[LOSSLESS]["rounds"], strict=False)
    return [
        lossy[own.name][RESTORE]["seconds"] / clean[own.name][RESTORE]["seconds"]
        for lossy, clean in pairs
        if own.name in lossy and own.name in clean
    ]


def per_core(rounds: Rounds, program: Program, *ends: str) -> list[float]:
    """Return the gigabytes that a first backup takes in for each hour of processor time."""
    return [
        one[CEILING]["bytes"] / sum(one[program.name][FIRST][end] for end in ends) * 3.6e-6
        for one in having(rounds, program)
    ]


def of_ceiling(rounds: Rounds, own: Program, ends: Sequence[str]) -> list[float]:
    """Return the share of the ceiling that these ends together reach."""
    return [
        one[CEILING]["processor"] / sum(one[own.name][FIRST][end] for end in ends)
        for one in having(rounds, own)
    ]


# Text.


def medians(rounds: Rounds, program: Program, what: str, key: str, scale: float = 1.0) -> str:
    """Return the median of a figure."""
    return figure(statistics.median(picked(rounds, program, what, key)) * scale)


def spread(ratios: Sequence[float]) -> str:
    """Return a median of ratios with the least and the greatest."""
    if not ratios:
        return DASH
    low, middle, high = (f"{of(ratios):.2f}" for of in (min, statistics.median, max))
    return f"**{middle} {TIMES}** ({low}{DASH}{high})"


def judged(ratios: Sequence[float], mark: float) -> str:
    """Return ratios, and whether their median reaches the mark; one below 0 is a most."""
    if not ratios:
        return DASH
    middle = statistics.median(ratios)
    reached = middle >= mark if mark > 0 else middle <= -mark
    return f"{spread(ratios)}{'' if reached else ', missed'}"
