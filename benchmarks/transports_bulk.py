"""What does a transport cost for bulk? An upload over TCP, TLS, a Unix socket, and an upgrade."""

from benchmarks.comparison import Case, Comparison
from benchmarks.tables import byte_rate, milliseconds_per_gigabyte
from benchmarks.transports import PEERS

QUESTION = Comparison(
    title="Bulk over the transports",
    what=(
        "druvarpc over TCP, and beside it over other transports: an upload in pieces of 64 KiB. "
        "The multiples are those of TCP."
    ),
    cases=(Case("upload", "upload", size=64 << 10),),
    show=byte_rate,
    show_cost=milliseconds_per_gigabyte,
    cost="Processor time of a gigabyte, client + server, in milliseconds:",
    peers=PEERS,
)
