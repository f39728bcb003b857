"""Async multiplexed RPC on trio: many calls in one message, and a link that is kept full."""

from druvarpc.authorization import Predicate, authorize
from druvarpc.client import Client, Metadata, connect
from druvarpc.club import Club
from druvarpc.compression import Compression
from druvarpc.current import CurrentCall, current_call
from druvarpc.errors import (
    CircuitOpen,
    ConnectionLost,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    RpcError,
    Status,
)
from druvarpc.handlers import ServerInterceptor
from druvarpc.identity import Authenticate, Caller, Identity
from druvarpc.interceptors import InterceptedCall, Proceed, Wrapper
from druvarpc.outgoing import ClientInterceptor, OutgoingCall
from druvarpc.parts import Part, Reply
from druvarpc.peers import Certificate, Peer, UnixCredentials
from druvarpc.protocol import Clubbing, Limits, Priority
from druvarpc.replies import ReplyMetadata, reply_metadata
from druvarpc.resilience import Balance, Breaker, Hedge, Outliers, Retry
from druvarpc.server import Server, serve
from druvarpc.service import Cardinality, Service, rpc
from druvarpc.statistics import ClubCount, Statistics
from druvarpc.timings import CallTimes, MethodTimes, Timings
from druvarpc.tls import TLS
from druvarpc.tokens import Token, TokenSource
from druvarpc.version import __version__
from druvarpc.windowed import windowed

# As an attribute too, without an import of its own.
from druvarpc import testing as testing  # isort: skip

__all__ = [
    "TLS",
    "Authenticate",
    "Balance",
    "Breaker",
    "CallTimes",
    "Caller",
    "Cardinality",
    "Certificate",
    "CircuitOpen",
    "Client",
    "ClientInterceptor",
    "Club",
    "ClubCount",
    "Clubbing",
    "Compression",
    "ConnectionLost",
    "CurrentCall",
    "Hedge",
    "Identity",
    "InterceptedCall",
    "Limits",
    "LocalProtocolError",
    "Metadata",
    "MethodTimes",
    "OutgoingCall",
    "Outliers",
    "Part",
    "Peer",
    "Predicate",
    "Priority",
    "Proceed",
    "ProtocolError",
    "RemoteProtocolError",
    "Reply",
    "ReplyMetadata",
    "Retry",
    "RpcError",
    "Server",
    "ServerInterceptor",
    "Service",
    "Statistics",
    "Status",
    "Timings",
    "Token",
    "TokenSource",
    "UnixCredentials",
    "Wrapper",
    "__version__",
    "authorize",
    "connect",
    "current_call",
    "reply_metadata",
    "rpc",
    "serve",
    "windowed",
]
