"""Where does it stop to pay to club more calls?"""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.tables import count, table
from benchmarks.wan.job import Job
from benchmarks.wan.question import Entry, Pace, Part, Question, peer, seconds

SIZES = (1, 4, 16, 64, 256, 1024)
# Of a handler: seconds of processor time, and seconds asleep.
COSTS = {
    "no work": (0.0, 0.0),
    "0.1 ms of work": (0.0001, 0.0),
    "1 ms of work": (0.001, 0.0),
    "1 ms asleep": (0.0, 0.001),
}
LINKS = ("rack", "city", "region", "continent")
ENTRY = "druvarpc"
# Seconds for each size and cost.
EACH = 0.3


def job(pace: Pace) -> Job:
    return Job(sizes=SIZES, costs=tuple(COSTS.values()), seconds=EACH * pace.share)


def point(found: Mapping[str, Any], cost: str, size: int) -> float:
    """Return the seconds of a club, the median of the rounds."""
    busy, asleep = COSTS[cost]
    return float(
        statistics.median(
            one["seconds"] / one["clubs"]
            for a_round in found["rounds"]
            if ENTRY in a_round
            for one in a_round[ENTRY]["points"]
            if (one["size"], one["busy"], one["asleep"]) == (size, busy, asleep)
        )
    )


def render(links: Mapping[str, Any]) -> str:
    """Return a table for each cost: calls per second, and the time of a club."""
    measured = {
        name: found
        for name, found in links.items()
        if any(ENTRY in a_round for a_round in found["rounds"])
    }
    blocks: list[str] = []
    for cost in COSTS:
        rows: list[list[str]] = []
        for size in SIZES:
            clubs = [point(found, cost, size) for found in measured.values()]
            rows.append([f"{size:,}", *(f"{count(size / one)} · {seconds(one)}" for one in clubs)])
        heads = [f"{cost}; calls in a club", *measured]
        blocks.append(table(heads, rows))
    return "\n\n".join(blocks)


QUESTION = Question(
    title="The size of a club",
    what=(
        "Explicit clubs, one after the other, by the number of calls in each and by what a handler "
        "does, which is work that keeps the server's one thread busy, or sleep: calls per second, "
        "and the time of a club."
    ),
    parts=(
        Part(
            title="Calls in a club",
            links=LINKS,
            entries=(Entry(ENTRY, peer("druvarpc", "club_sizes", job)),),
            render=render,
        ),
    ),
)
