"""What if the calls come over many connections, where little can be clubbed?"""

from benchmarks.comparison import Case, Comparison
from benchmarks.tables import count, microseconds

QUESTION = Comparison(
    title="Many connections",
    what="100 clients in one process, each calling (64 bytes) one at a time: calls per second.",
    cases=(Case("100 connections", "echo_connections", count=100),),
    show=count,
    show_cost=microseconds,
    cost="Processor time of a call, client + server, in microseconds:",
)
