"""What do a connection and a stream cost the server while nothing happens in them?"""

from benchmarks.comparison import Case, Comparison
from benchmarks.tables import kibibytes

QUESTION = Comparison(
    title="Memory",
    what=(
        "Resident memory of the server for each of 500 idle connections, over which one call was "
        "made, and for each of 5,000 open bidirectional streams on 60 connections, in which one "
        "message went each way. Less is better: a ratio below 1 speaks for druvarpc."
    ),
    cases=(
        Case("idle connection", "idle_connections", count=500),
        Case("open stream", "open_streams", count=5_000),
    ),
    show=kibibytes,
    headline=True,
)
