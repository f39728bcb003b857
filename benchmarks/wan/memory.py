"""What does bulk over a long link cost in memory?"""

from collections.abc import Callable

from benchmarks.tables import DASH
from benchmarks.wan.bulk import PIECE
from benchmarks.wan.job import Figures, Job
from benchmarks.wan.question import Entry, Pace, Part, Question, Table, megabytes, peer, picked

CARRIED, OFFERED = 500_000_000, 1_000_000_000


def carried(pace: Pace) -> Job:
    return Job(size=PIECE, amount=pace.of(CARRIED))


def offered(pace: Pace) -> Job:
    return Job(size=PIECE, amount=pace.of(OFFERED))


def window(figures: Figures) -> float:
    return float(figures.get("send_window", -1))


GROWTH = (
    Table("Growth of the client:", picked("client"), megabytes),
    Table("Growth of the server:", picked("server"), megabytes),
    Table("Client in all:", picked("client_peak"), megabytes),
    Table("Server in all:", picked("server_peak"), megabytes),
)


def both(operation: str, job: Callable[[Pace], Job]) -> tuple[Entry, ...]:
    return tuple(
        Entry(name, peer(end, operation, job))
        for name, end in (("druvarpc", "druvarpc"), ("grpc.aio", "grpc_aio"))
    )


QUESTION = Question(
    title="Memory of bulk",
    what=(
        "What the resident memory of each process grew by at its peak (`VmHWM`, reset when the "
        "connection had made one call, less `VmRSS` at that moment): uploads in pieces of 64 KiB. "
        "What the kernel's sockets hold isn't in it."
    ),
    parts=(
        Part(
            title="500 MB are carried",
            links=("continent",),
            entries=both("memory", carried),
            tables=GROWTH,
        ),
        Part(
            title="1 GB is offered to a handler that reads nothing, until the sender stalls",
            links=("continent",),
            entries=both("stalled", offered),
            tables=(
                *GROWTH,
                Table("Taken from the sender's application:", picked("sent"), megabytes),
                Table(
                    "`statistics().send_window` of the client then:",
                    window,
                    lambda value: DASH if value < 0 else megabytes(value),
                ),
            ),
        ),
    ),
)
