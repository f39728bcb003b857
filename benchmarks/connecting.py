"""How quickly does a connection come about?"""

from benchmarks.comparison import Case, Comparison
from benchmarks.tables import count, microseconds

QUESTION = Comparison(
    title="Connecting",
    what="Connect, make one small call, disconnect; one after the other: connections per second.",
    cases=(Case("connections", "connects"),),
    show=count,
    show_cost=microseconds,
    cost="Processor time of a connection, client + server, in microseconds:",
)
