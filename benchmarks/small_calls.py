"""How many small calls a second does one connection carry?"""

from benchmarks.comparison import Case, Comparison
from benchmarks.tables import count, microseconds

QUESTION = Comparison(
    title="Small calls",
    what="Unary echo of 64 bytes over one connection: calls per second.",
    cases=(
        Case("one at a time", "echo"),
        Case("256 tasks", "echo_tasks", count=256),
        Case("one task, 512 in flight", "echo_ahead", count=512),
    ),
    show=count,
    show_cost=microseconds,
    cost="Processor time of a call, client + server, in microseconds:",
    headline=True,
)
