"""Async multiplexed RPC on trio: many calls in one message, and a link that is kept full."""

from druvarpc.client import Client, connect
from druvarpc.club import Club, Part, Reply
from druvarpc.errors import (
    CircuitOpen,
    ConnectionLost,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    RpcError,
    Status,
)
from druvarpc.handlers import CurrentCall, current_call
from druvarpc.peers import Certificate, Peer, UnixCredentials
from druvarpc.protocol import Clubbing, Limits, Priority
from druvarpc.resilience import Balance, Breaker, Hedge, Outliers, Retry
from druvarpc.server import Server, serve
from druvarpc.service import Service, rpc
from druvarpc.statistics import ClubCount, Statistics
from druvarpc.timings import CallTimes, MethodTimes
from druvarpc.tls import TLS
from druvarpc.version import __version__
from druvarpc.windowed import windowed

# As an attribute too, without an import of its own.
from druvarpc import testing as testing  # isort: skip

__all__ = [
    "TLS",
    "Balance",
    "Breaker",
    "CallTimes",
    "Certificate",
    "CircuitOpen",
    "Client",
    "Club",
    "ClubCount",
    "Clubbing",
    "ConnectionLost",
    "CurrentCall",
    "Hedge",
    "Limits",
    "LocalProtocolError",
    "MethodTimes",
    "Outliers",
    "Part",
    "Peer",
    "Priority",
    "ProtocolError",
    "RemoteProtocolError",
    "Reply",
    "Retry",
    "RpcError",
    "Server",
    "Service",
    "Statistics",
    "Status",
    "UnixCredentials",
    "__version__",
    "connect",
    "current_call",
    "rpc",
    "serve",
    "windowed",
]
