"""How long do 10,000 small calls take over a long link?"""

from benchmarks.wan.job import Job
from benchmarks.wan.question import (
    Entry,
    Pace,
    Part,
    Question,
    Table,
    peer,
    picked,
    seconds,
    to,
    to_rtt,
)

CALLS, TASKS = 10_000, 256
BARE = "bare TCP, the same bytes"
GRPC = f"grpc.aio, {TASKS} tasks"


def job(pace: Pace) -> Job:
    return Job(calls=pace.of(CALLS), count=TASKS)


QUESTION = Question(
    title="Small calls over a long link",
    what=(
        f"{CALLS:,} unary echoes of 64 bytes over one connection that one call was made over "
        "before: by 256 tasks that each await a call at a time, by `druvarpc.windowed`, and in "
        "clubs of 1,024, all at once. Beside them, bare TCP that sends as many bytes and gets them "
        "back as they come: what TCP's slow start leaves to win, in a new connection. A task that "
        f"awaits each call makes {CALLS // TASKS + 1} round trips, whatever the protocol."
    ),
    parts=(
        Part(
            title="10,000 calls",
            links=("region", "continent"),
            entries=(
                Entry(f"druvarpc, {TASKS} tasks", peer("druvarpc", "tasks", job)),
                Entry("druvarpc, windowed", peer("druvarpc", "windowed", job)),
                Entry("druvarpc, clubs", peer("druvarpc", "clubs", job)),
                Entry(GRPC, peer("grpc_aio", "tasks", job)),
                Entry(BARE, peer("bare_tcp", "echoed", job)),
            ),
            tables=(
                Table(
                    "Until the last reply; in round trips of the control:",
                    picked("seconds"),
                    seconds,
                    to_rtt,
                ),
                Table(
                    "The same, as a multiple of bare TCP's:",
                    picked("seconds"),
                    seconds,
                    to(BARE, picked("seconds")),
                ),
                Table(
                    "The same, as a multiple of grpc.aio's:",
                    picked("seconds"),
                    seconds,
                    to(GRPC, picked("seconds")),
                    headline=True,
                ),
            ),
        ),
    ),
)
