"""What do typed messages cost? A record of ten fields there and back."""

from benchmarks.comparison import Case, Comparison
from benchmarks.tables import count, microseconds

QUESTION = Comparison(
    title="Typed messages",
    what="Unary call with a record of ten fields, answered by such a record: calls per second.",
    cases=(
        Case("one at a time", "revise"),
        Case("256 tasks", "revise", count=256),
    ),
    show=count,
    show_cost=microseconds,
    cost="Processor time of a call, client + server, in microseconds:",
    headline=True,
)
