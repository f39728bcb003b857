"""How much of a long link does bulk data get?"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from benchmarks.wan import controls
from benchmarks.wan.job import Job
from benchmarks.wan.question import (
    Entry,
    Pace,
    Part,
    Question,
    Table,
    bare,
    megabits,
    peer,
    picked,
    seconds,
    to,
)

PIECE = 64 * 1024
TRANSFER = 10_000_000
STREAMS = 32
# Of each stream, where one takes the place of another: a call stays on the connection that it began
# on, so that only calls that begin can make use of another.
EACH = 4_000_000
LINKS = ("region", "continent")
RATE = picked("rate")
AUTO = {"connections": "auto"}
CONNECTIONS = Table(
    "Connections:", lambda found: float(found.get("connections", 1)), "{:.0f}".format
)


def stream(
    *, down: bool, count: int = 1, each: int = 0, options: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Pace], Job]:
    return lambda pace: Job(
        size=PIECE,
        count=count,
        each=each,
        down=down,
        omit=pace.warm_up,
        seconds=pace.seconds,
        options=dict(options),
    )


def many(down: bool, options: Mapping[str, Any] = MappingProxyType({})) -> Callable[[Pace], Job]:
    """Streams that follow one another, `STREAMS` at a time, long enough for connections to come."""

    def job(pace: Pace) -> Job:
        one = stream(down=down, count=STREAMS, each=EACH, options=options)(pace)
        return replace(one, omit=3 * pace.warm_up)

    return job


def arrived(base: str) -> Table:
    """Return the table of the rates, as multiples of an entry's."""
    return Table(
        "Arrived at the application; times iperf3's:",
        RATE,
        megabits,
        to(base, RATE),
        headline=True,
    )


def whole(pace: Pace) -> Job:
    return Job(size=PIECE, amount=pace.of(TRANSFER))


def one_way(title: str, *, down: bool) -> Part:
    return Part(
        title=title,
        links=LINKS,
        bare="iperf3",
        entries=(
            Entry("iperf3", bare(down=down)),
            Entry("druvarpc", peer("druvarpc", "bulk", stream(down=down))),
            Entry(
                f"druvarpc, {STREAMS} streams",
                peer("druvarpc", "bulk", stream(down=down, count=STREAMS)),
            ),
            Entry("grpc.aio", peer("grpc_aio", "bulk", stream(down=down))),
        ),
        tables=(arrived("iperf3"),),
    )


def several(title: str, *, down: bool) -> Part:
    best = "iperf3, best of 1, 2, 4, 8"

    return Part(
        title=title,
        links=("continent",),
        bare=best,
        entries=(
            Entry(
                best,
                lambda wire, pace: controls.best_iperf(wire, pace.warm_up, pace.seconds, down=down),
            ),
            Entry("druvarpc, one connection", peer("druvarpc", "bulk", many(down))),
            Entry("druvarpc, auto", peer("druvarpc", "bulk", many(down, AUTO))),
            Entry("grpc.aio", peer("grpc_aio", "bulk", stream(down=down))),
        ),
        tables=(
            arrived(best),
            CONNECTIONS,
        ),
    )


QUESTION = Question(
    title="Bulk over a long link",
    what=(
        "Pieces of 64 KiB, once the connection has got going: what arrives at the receiving "
        "application from a few seconds after the start on, beside bare TCP that omits the same "
        "seconds. And whole transfers, in a connection over which one call was made."
    ),
    parts=(
        one_way("Upload, one connection", down=False),
        one_way("Download, one connection", down=True),
        Part(
            title="10 MB, to the acknowledgement",
            links=LINKS,
            entries=(
                Entry("druvarpc", peer("druvarpc", "transfer", whole)),
                Entry("grpc.aio", peer("grpc_aio", "transfer", whole)),
            ),
            tables=(
                Table(
                    "Seconds; times grpc.aio's:",
                    picked("seconds"),
                    seconds,
                    to("grpc.aio", picked("seconds")),
                ),
            ),
        ),
        several("Upload, as many connections as pay", down=False),
        several("Download, as many connections as pay", down=True),
    ),
)
