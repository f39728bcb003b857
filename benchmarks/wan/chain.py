"""What do dependent calls cost over a long link?"""

import statistics

from benchmarks.wan.job import Figures, Job
from benchmarks.wan.question import Entry, Pace, Part, Question, Table, peer, seconds, to, to_rtt

CHAINS = 20


def job(pace: Pace) -> Job:
    return Job(calls=CHAINS)


def one_chain(figures: Figures) -> float:
    return float(statistics.median(figures["took"]))


QUESTION = Question(
    title="Dependent calls",
    what=(
        "Three calls, each with the result of the one before: in one club, and one after the "
        f"other. The median of {CHAINS} such chains."
    ),
    parts=(
        Part(
            title="Three dependent calls",
            links=("rack", "city", "region", "continent"),
            entries=(
                Entry("druvarpc, one club", peer("druvarpc", "chain", job)),
                Entry("grpc.aio, three calls", peer("grpc_aio", "chain", job)),
            ),
            tables=(
                Table(
                    "Time of a chain; in round trips of the control:", one_chain, seconds, to_rtt
                ),
                Table(
                    "The same, as a multiple of grpc.aio's:",
                    one_chain,
                    seconds,
                    to("grpc.aio, three calls", one_chain),
                ),
            ),
        ),
    ),
)
