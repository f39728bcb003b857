"""How fast does one connection carry raw bytes to the client?"""

from benchmarks.bulk_up import COST, SIZES
from benchmarks.comparison import Case, Comparison
from benchmarks.tables import byte_rate, milliseconds_per_gigabyte

QUESTION = Comparison(
    title="Bulk download",
    what="Raw bytes from the server in pieces of a size, over one connection: bytes per second.",
    cases=tuple(Case(title, "download", size=size) for title, size in SIZES.items()),
    show=byte_rate,
    show_cost=milliseconds_per_gigabyte,
    cost=COST,
    headline=True,
)
