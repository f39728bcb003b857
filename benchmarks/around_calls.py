"""What do interceptors, authentication and authorisation cost a call? druvarpc beside itself."""

from benchmarks.comparison import Case, Comparison
from benchmarks.tables import count, microseconds

PEERS = (
    "druvarpc",
    "druvarpc_client_1",
    "druvarpc_client_3",
    "druvarpc_server_1",
    "druvarpc_server_3",
    "druvarpc_identity",
)

QUESTION = Comparison(
    title="Around calls",
    what=(
        "Unary echo of 64 bytes over one connection with interceptors that do nothing but proceed, "
        "and with a token, an identity and a predicate on the method: calls per second. The "
        "multiples are those of druvarpc without."
    ),
    cases=(
        Case("one at a time", "echo"),
        Case("256 tasks", "echo_tasks", count=256),
        Case("windowed", "echo_ahead", count=512),
    ),
    show=count,
    show_cost=microseconds,
    cost="Processor time of a call, client + server, in microseconds:",
    peers=PEERS,
)
