"""Both ends of what is measured over a long link: one module for each peer, with the same names.

`serve` runs a server on a free port of an address, which it reports by calling its argument, until
it is killed. `OPERATIONS` maps what the questions ask for to functions that take a `Job`, connect
to that server, and return figures. What a peer can't do is missing there.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from benchmarks.wan.job import Figures, Job

# Modules of this package.
ENDS = ("druvarpc", "grpc_aio")


class End(Protocol):
    OPERATIONS: Mapping[str, Callable[[Job], Figures]]

    def serve(self, address: str, announce: Callable[[int], None]) -> None: ...


def load_end(module: str) -> End:
    """Return a peer."""
    return cast(End, importlib.import_module(f"{__name__}.{module}"))
