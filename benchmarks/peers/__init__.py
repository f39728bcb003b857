"""The peers: one module each, all with the same few names.

`NAME` is what the tables call it, `PACKAGE` the distribution whose version they give. `serve` runs
a server on a free loopback port, which it reports by calling its argument, until it is killed.
`OPERATIONS` maps what the questions ask for to functions that take a `Load`, connect to that port,
and return what they `Measured`; what a peer can't do is missing there.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from benchmarks.measure import Load, Measured

# Modules of this package. The first is what the others are compared with.
PEERS = ("druvarpc", "grpc_aio", "grpclib", "pycapnp", "rpyc", "trio_tcp")


class Peer(Protocol):
    NAME: str
    PACKAGE: str
    OPERATIONS: Mapping[str, Callable[[Load], Measured]]

    def serve(self, announce: Callable[[int], None]) -> None: ...


def load_peer(module: str) -> Peer:
    """Return a peer."""
    return cast(Peer, importlib.import_module(f"{__name__}.{module}"))
