"""How long do small calls take while bulk fills the link?"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.processes import MeasurementError
from benchmarks.wan import controls
from benchmarks.wan.bulk import AUTO, PIECE
from benchmarks.wan.job import Figures, Job
from benchmarks.wan.link import Wire
from benchmarks.wan.question import (
    CONTROL,
    Entry,
    Pace,
    Part,
    Question,
    Table,
    megabits,
    peer,
    picked,
    seconds,
    to_rtt,
)

# Long enough for a 99th percentile that isn't the worst of all: four samples are above it.
SAMPLES = 400
EVERY = 0.02


def job(down: bool, options: Mapping[str, Any], pace: Pace) -> Job:
    return Job(
        options=options,
        size=PIECE,
        down=down,
        omit=pace.warm_up,
        seconds=pace.seconds,
        calls=pace.of(SAMPLES),
        every=EVERY,
    )


def percentile(state: str, number: int, figures: Figures) -> float:
    return float(figures[state][number])


IDLE, MEDIAN, WORST = (
    partial(percentile, *which) for which in (("idle", 50), ("loaded", 50), ("loaded", 99))
)


def beside_pings(measure: Callable[[Wire, Pace], Figures]) -> Callable[[Wire, Pace], Figures]:
    """Return the measurement with the median of pings while small calls and bulk were under way."""

    def measured(wire: Wire, pace: Pace) -> Figures:
        answers: list[tuple[float, float]] = []
        with controls.pinging(wire, answers):
            figures = measure(wire, pace)
        within = [took for at, took in answers if figures["begin"] < at < figures["end"]]
        if not within:
            raise MeasurementError("ping: no answer beside bulk")
        return figures | {"queueing": statistics.median(within)}

    return measured


def one_way(title: str, *, down: bool) -> Part:
    return Part(
        title=title,
        links=("branch", "outpost"),
        entries=(
            Entry("druvarpc", beside_pings(peer("druvarpc", "lanes", partial(job, down, {})))),
            Entry(
                "druvarpc, auto",
                beside_pings(peer("druvarpc", "lanes", partial(job, down, AUTO))),
            ),
            Entry("grpc.aio", beside_pings(peer("grpc_aio", "lanes", partial(job, down, {})))),
        ),
        tables=(
            Table(
                "A small call on an idle link, median; in round trips of the control:",
                IDLE,
                seconds,
                to_rtt,
            ),
            Table(
                "A ping beside bulk, median; in round trips of the control:",
                picked("queueing"),
                seconds,
                to_rtt,
            ),
            Table("Beside bulk, median; in round trips of the control:", MEDIAN, seconds, to_rtt),
            Table(
                "Beside bulk, 99th percentile; in round trips of the control:",
                WORST,
                seconds,
                to_rtt,
                headline=True,
            ),
            Table(
                "Beside bulk, median; times that on an idle link:",
                MEDIAN,
                seconds,
                lambda own, around: IDLE(own),
            ),
            Table(
                "Bulk without small calls; times bare TCP:",
                picked("alone"),
                megabits,
                lambda own, around: float(around[CONTROL]["rate"]),
            ),
            Table(
                "Bulk with them; times that without:",
                picked("together"),
                megabits,
                lambda own, around: float(own["alone"]),
            ),
        ),
    )


QUESTION = Question(
    title="Small calls beside bulk",
    what=(
        "A call of 64 bytes every 20 ms, whether or not those before it were answered, over the "
        "connection on which bulk fills the link; druvarpc's bulk with `Priority.BULK`."
    ),
    parts=(
        one_way("Beside an upload", down=False),
        one_way("Beside a download", down=True),
    ),
)
