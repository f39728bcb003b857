"""How fast does one connection carry raw bytes to the server?"""

from benchmarks.comparison import Case, Comparison
from benchmarks.tables import byte_rate, milliseconds_per_gigabyte

SIZES = {"4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "4 MiB": 4 << 20}
COST = "Processor time of a gigabyte, client + server, in milliseconds:"

QUESTION = Comparison(
    title="Bulk upload",
    what="Raw bytes from the client in pieces of a size, over one connection: bytes per second.",
    cases=tuple(Case(title, "upload", size=size) for title, size in SIZES.items()),
    show=byte_rate,
    show_cost=milliseconds_per_gigabyte,
    cost=COST,
    headline=True,
)
