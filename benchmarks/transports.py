"""What does a transport cost? druvarpc over TCP, TLS, a Unix socket, and an upgrade of HTTP."""

from benchmarks.comparison import Case, Comparison
from benchmarks.tables import count, microseconds

PEERS = ("druvarpc", "druvarpc_tls", "druvarpc_unix", "druvarpc_http")

QUESTION = Comparison(
    title="Transports",
    what=(
        "druvarpc over TCP, and beside it over other transports: calls of 64 bytes a second, and "
        "connections a second with one call each. The multiples are those of TCP."
    ),
    cases=(
        Case("one at a time", "echo"),
        Case("256 tasks", "echo_tasks", count=256),
        Case("connections", "connects"),
    ),
    show=count,
    show_cost=microseconds,
    cost="Processor time of a call or a connection, client + server, in microseconds:",
    peers=PEERS,
)
