"""The client: stubs of services, clubs, and the connections that carry them."""

import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, Literal, TypeVar

import trio

from druvarpc.addresses import parse_address
from druvarpc.calls import Options
from druvarpc.club import Club
from druvarpc.compression import Compression, algorithms_for
from druvarpc.connections import Connections
from druvarpc.protocol import Clubbing, Limits, Priority
from druvarpc.routes import Route
from druvarpc.service import Service
from druvarpc.session import quiet_nursery
from druvarpc.statistics import Statistics
from druvarpc.stubs import make_stub
from druvarpc.timings import Timings
from druvarpc.tls import TLS
from druvarpc.transports import Transport, check_congestion_control

S = TypeVar("S", bound=Service)
Metadata = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]

CONNECT_TIMEOUT: Final = 10.0


class Client:
    """A server, as its client sees it. Made by `connect`.

    Its methods may be used by any number of tasks at once.
    """

    def __init__(self, connections: Connections, timings: Timings = False) -> None:
        self._connections = connections
        self._timings: Timings = timings

    def stub(
        self,
        service: type[S],
        *,
        metadata: Metadata = (),
        priority: Priority = Priority.NORMAL,
        timings: Timings | None = None,
        compress: bool = True,
    ) -> S:
        """Return an object with the service's methods, each of which calls the server.

        Args:
            service: the service's class.
            metadata: sent with every call.
            priority: the lane of every call.
            timings: find out where the time of every call goes. They are summed up in
                `Statistics.times`; a function is moreover called with the `CallTimes` of each that
                has been replied to, whatever the status, before its caller goes on. None for what
                `connect` was told.
            compress: let what the calls send be compressed, if `connect` was told to; False for
                data that is compressed already.

        Raises:
            TypeError: `service` is no service, or an annotation of it can't be resolved.
        """
        pairs = metadata.items() if isinstance(metadata, Mapping) else metadata
        options = Options(
            Priority(priority),
            tuple((key, value) for key, value in pairs),
            self._timings if timings is None else timings,
            compress=compress,
        )
        return make_stub(service, self._connections, options)

    @asynccontextmanager
    async def club(self, *, raise_errors: bool = True) -> AsyncGenerator[Club, None]:
        """Collect calls, and send them as one when the block ends, in the lane of the first.

        Nothing is sent if the block raises. If it is cancelled while it waits for the replies, what
        hasn't ended is abandoned.

        Args:
            raise_errors: raise what calls failed with; otherwise `Reply.value` does.

        Raises:
            ExceptionGroup: of the errors of the calls that failed.
        """
        club = Club(self._connections)
        try:
            yield club
        finally:
            club.closed = True
        errors = await club.settle()
        if errors and raise_errors:
            raise ExceptionGroup("calls of a club failed", errors)

    async def ping(self) -> float:
        """Return the seconds that a round trip to the server takes now.

        Raises:
            ConnectionLost: the connection has ended.
        """
        return await self._connections.ping()

    def statistics(self) -> Statistics:
        """Return what this client has done so far."""
        return self._connections.statistics()


@asynccontextmanager
async def connect(
    address: str,
    *,
    tls: TLS | ssl.SSLContext | None = None,
    proxy: str | None = None,
    connections: int | Literal["auto"] = 1,
    clubbing: Clubbing = Clubbing(),
    limits: Limits = Limits(),
    connect_timeout: float = CONNECT_TIMEOUT,
    congestion_control: str | None = None,
    timings: Timings = False,
    compression: Compression | None = None,
) -> AsyncGenerator[Client, None]:
    """Connect to a server for the time of a block.

    Leaving the block ends the connections: calls that other tasks still wait for raise
    `ConnectionLost`. So do the calls of a connection that is lost, and all calls once none is left
    or the server has drained. Of several, one that is lost is made again as long as others remain.
    Where nothing of a call was begun, the error's `not_started` says so.

    Args:
        address: "tcp://host:port", "tls://host:port" or "unix:///path"; or "http://host:port/path"
            ("https:"), for the same protocol behind an upgrade of HTTP.
        tls: how to encrypt, for tls and https: files, or a context, which is used as it is; None
            for servers that are certified by whom the system trusts. See `TLS`.
        proxy: the HTTP proxy to connect by, "http://user:password@host:port"; "" for none; None for
            that of the environment: for tls and https HTTPS_PROXY, for http http_proxy, else
            ALL_PROXY, but for the hosts of NO_PROXY. tcp addresses go by a proxy only if it is
            named here.
        connections: how many; "auto" starts with one, adds more while the goodput rises with them,
            up to eight, and drops those that don't pay. A call stays on the connection that it
            began on.
        clubbing: how calls gather.
        limits: what this client accepts from the server, on each connection.
        connect_timeout: seconds until the server must have answered.
        congestion_control: of TCP, for what this client sends: one that the system has, such as
            "bbr", "cubic" or "reno" on Linux; None for its default.
        timings: find out where the time of every call goes; see `Client.stub`.
        compression: how arguments, results and items of streams are compressed, where the server
            has been told of it too: "zstd", "zlib", or "auto" for the best that both have; None for
            not at all. What doesn't shrink goes as it is. See docs/compression.md.

    Raises:
        ImportError: zstd is asked for and isn't installed.
        ValueError: the address or the proxy isn't one, or can't be had with the other arguments,
            the number of connections isn't positive, or the system doesn't have that congestion
            control.
        OSError: a file of `tls` can't be used.
        ConnectionLost: no druvarpc server answers there.
    """
    parsed = parse_address(address)
    if congestion_control is not None:
        check_congestion_control(congestion_control, [parsed])
    route = Route(parsed, tls=tls, proxy=proxy, congestion_control=congestion_control)
    async with connect_by(
        route,
        str(parsed),
        connections=connections,
        clubbing=clubbing,
        limits=limits,
        timeout=connect_timeout,
        timings=timings,
        compression=compression,
    ) as client:
        yield client


@asynccontextmanager
async def connect_by(
    dial: Callable[[], Awaitable[Transport]],
    address: str,
    *,
    connections: int | Literal["auto"] = 1,
    clubbing: Clubbing = Clubbing(),
    limits: Limits = Limits(),
    timeout: float = CONNECT_TIMEOUT,
    timings: Timings = False,
    compression: Compression | None = None,
) -> AsyncGenerator[Client, None]:
    """Be a client on transports that `dial` opens, to `address`; see `connect`.

    They are closed in the end. The server must have answered within `timeout` seconds.
    """
    if connections != "auto" and (type(connections) is not int or connections < 1):
        raise ValueError(f"connections={connections!r}: 1 or more, or 'auto'")
    async with quiet_nursery() as nursery:
        opened = Connections(
            dial,
            address,
            connections,
            nursery,
            clubbing=clubbing,
            limits=limits,
            timeout=timeout,
            compression=algorithms_for(compression),
        )
        await opened.start(trio.current_time())
        yield Client(opened, timings)
        await opened.close()
        nursery.cancel_scope.cancel()
