"""The client: stubs of services, clubs, and the connections that carry them."""

import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Final, Literal, TypeVar

import trio

from druvarpc.addresses import parse_address
from druvarpc.calls import Options
from druvarpc.club import Club
from druvarpc.compression import Compression, algorithms_for
from druvarpc.dialing import Target, Terms
from druvarpc.endpoints import Endpoints
from druvarpc.outgoing import ClientInterceptor
from druvarpc.protocol import Clubbing, Limits, Priority
from druvarpc.resilience import Balance, Breaker, Hedge, Outliers, Retry
from druvarpc.routes import Route
from druvarpc.service import Service
from druvarpc.session import quiet_nursery
from druvarpc.statistics import Statistics
from druvarpc.stubs import make_stub
from druvarpc.timings import Timings
from druvarpc.tls import TLS
from druvarpc.tokens import Tokens, TokenSource
from druvarpc.transports import Transport, check_congestion_control

S = TypeVar("S", bound=Service)
Metadata = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]

CONNECT_TIMEOUT: Final = 10.0


class Client:
    """A server, as its client sees it. Made by `connect`.

    Its methods may be used by any number of tasks at once.
    """

    def __init__(
        self,
        connections: Endpoints,
        timings: Timings = False,
        *,
        retry: Retry | None = Retry(),
        wait_for_ready: bool = False,
        interceptors: Sequence[ClientInterceptor] = (),
    ) -> None:
        self._connections = connections
        self._timings: Timings = timings
        self._retry = retry
        self._wait_for_ready = wait_for_ready
        self._interceptors = tuple(interceptors)

    def stub(
        self,
        service: type[S],
        *,
        metadata: Metadata = (),
        priority: Priority = Priority.NORMAL,
        timings: Timings | None = None,
        retry: Retry | Literal["inherit"] | None = "inherit",
        wait_for_ready: bool | None = None,
        hedge: Hedge | None = None,
        compress: bool = True,
        interceptors: Sequence[ClientInterceptor] = (),
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
            retry: which calls are made again when they fail; None for none, "inherit" for what
                `connect` was told.
            wait_for_ready: calls wait for a server that is away, as long as their deadline allows;
                None for what `connect` was told.
            hedge: when calls of idempotent unary methods are made once more beside the first; not
                those of clubs and windows.
            compress: let what the calls send be compressed, if `connect` was told to; False for
                data that is compressed already.
            interceptors: run around every call, within those of `connect`, the first outermost.

        Raises:
            TypeError: `service` is no service, or an annotation of it can't be resolved.
            ValueError: `hedge` for a service none of whose methods can be hedged.
        """
        pairs = metadata.items() if isinstance(metadata, Mapping) else metadata
        options = Options(
            Priority(priority),
            tuple((key, value) for key, value in pairs),
            self._timings if timings is None else timings,
            retry=self._retry if retry == "inherit" else retry,
            wait=self._wait_for_ready if wait_for_ready is None else wait_for_ready,
            hedge=hedge,
            compress=compress,
            interceptors=(*self._interceptors, *interceptors),
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
    address: str | Sequence[str],
    *,
    tls: TLS | ssl.SSLContext | None = None,
    proxy: str | None = None,
    connections: int | Literal["auto"] = 1,
    balance: Balance = Balance.PICK_FIRST,
    reconnect: bool = True,
    wait_for_ready: bool = False,
    retry: Retry | None = Retry(),
    breaker: Breaker | None = None,
    outliers: Outliers | None = Outliers(),
    clubbing: Clubbing = Clubbing(),
    limits: Limits = Limits(),
    connect_timeout: float = CONNECT_TIMEOUT,
    congestion_control: str | None = None,
    timings: Timings = False,
    compression: Compression | None = None,
    token: TokenSource | None = None,
    interceptors: Sequence[ClientInterceptor] = (),
) -> AsyncGenerator[Client, None]:
    """Connect to a server for the time of a block, or to several that do the same.

    A connection that is lost takes its calls with it: they raise `ConnectionLost`, whose
    `not_started` says where nothing of a call was begun. Another is opened at once, and after
    attempts that fail with pauses that double up to 30 seconds, each of random length. Calls wait
    for the first attempt; until a later one succeeds they fail. Calls that `retry` covers are made
    again before anybody sees an error. Leaving the block ends it all: calls that other tasks still
    wait for raise `ConnectionLost`.

    Args:
        address: "tcp://host:port", "tls://host:port" or "unix:///path"; or "http://host:port/path"
            ("https:"), for the same protocol behind an upgrade of HTTP; or several of them.
        tls: how to encrypt, for tls and https: files, or a context, which is used as it is; None
            for servers that are certified by whom the system trusts. See `TLS`.
        proxy: the HTTP proxy to connect by, "http://user:password@host:port"; "" for none; None for
            that of the environment: for tls and https HTTPS_PROXY, for http http_proxy, else
            ALL_PROXY, but for the hosts of NO_PROXY. tcp addresses go by a proxy only if it is
            named here.
        connections: how many to each server; "auto" starts with one, adds more while the goodput
            rises with them, up to eight, and drops those that don't pay. A call stays on the
            connection that it began on.
        balance: PICK_FIRST connects to the first of the addresses that answers, and ROUND_ROBIN to
            all of them, to make one call after the other to each.
        reconnect: open a connection in the place of the last one that was lost. Otherwise the
            client ends with it.
        wait_for_ready: wait for a server that is away, here until one answers, and each call as
            long as its deadline allows.
        retry: which calls are made again when they fail; None for none.
        breaker: when no calls are made to a server for some time, since they fail there; None for
            never.
        outliers: the same of a part of several servers, with ROUND_ROBIN, if there is no breaker.
        clubbing: how calls gather.
        limits: what this client accepts from the server, on each connection.
        connect_timeout: seconds until the server must have answered.
        congestion_control: of TCP, for what this client sends: one that the system has, such as
            "bbr", "cubic" or "reno" on Linux; None for its default.
        timings: find out where the time of every call goes; see `Client.stub`.
        compression: how arguments, results and items of streams are compressed, where the server
            has been told of it too: "zstd", "zlib", or "auto" for the best that both have; None for
            not at all. What doesn't shrink goes as it is. See docs/compression.md.
        token: who the client says it is, for the server's `authenticate`: a token, or a function,
            `async` or not, that returns one, or a `Token` that expires. Every connection sends it
            before its first call. The function is called again ahead of the expiry, and when the
            server refuses a call as UNAUTHENTICATED; the call is then made once more. Over
            "tcp://" it travels unencrypted.
        interceptors: `async def interceptor(call: OutgoingCall, proceed)`, run around every call,
            the first outermost.

    Raises:
        ImportError: zstd is asked for and isn't installed.
        ValueError: an address or the proxy isn't one, or can't be had with the other arguments,
            there is no address, the number of connections isn't positive, or the system doesn't
            have that congestion control.
        OSError: a file of `tls` can't be used.
        ConnectionLost: no druvarpc server answers there.
    """
    addresses = [address] if isinstance(address, str) else address
    parsed = [parse_address(one) for one in addresses]
    if congestion_control is not None:
        check_congestion_control(congestion_control, parsed)
    targets = [
        Target(str(one), Route(one, tls=tls, proxy=proxy, congestion_control=congestion_control))
        for one in parsed
    ]
    algorithms = algorithms_for(compression)
    async with connect_to(
        targets,
        Terms(connections, clubbing, limits, connect_timeout, reconnect, algorithms),
        balance=balance,
        wait_for_ready=wait_for_ready,
        retry=retry,
        breaker=breaker,
        outliers=outliers,
        timings=timings,
        token=token,
        interceptors=interceptors,
    ) as client:
        yield client


def connect_by(
    dial: Callable[[], Awaitable[Transport]],
    address: str,
    *,
    connections: int | Literal["auto"] = 1,
    clubbing: Clubbing = Clubbing(),
    limits: Limits = Limits(),
    timeout: float = CONNECT_TIMEOUT,
    reconnect: bool = True,
    timings: Timings = False,
    compression: Compression | None = None,
) -> AbstractAsyncContextManager[Client]:
    """Be a client on transports that `dial` opens, to `address`; see `connect`.

    They are closed in the end. The server must have answered within `timeout` seconds.
    """
    algorithms = algorithms_for(compression)
    terms = Terms(connections, clubbing, limits, timeout, reconnect, algorithms)
    return connect_to([Target(address, dial)], terms, timings=timings)


@asynccontextmanager
async def connect_to(
    targets: Sequence[Target],
    terms: Terms,
    *,
    balance: Balance = Balance.PICK_FIRST,
    wait_for_ready: bool = False,
    retry: Retry | None = Retry(),
    breaker: Breaker | None = None,
    outliers: Outliers | None = Outliers(),
    timings: Timings = False,
    token: TokenSource | None = None,
    interceptors: Sequence[ClientInterceptor] = (),
) -> AsyncGenerator[Client, None]:
    """Be a client of servers; see `connect`."""
    number = terms.number
    if number != "auto" and (type(number) is not int or number < 1):
        raise ValueError(f"connections={number!r}: 1 or more, or 'auto'")
    if not targets:
        raise ValueError("no address")
    async with quiet_nursery() as nursery:
        if token is not None:
            tokens = Tokens(token, terms.timeout)
            terms = replace(terms, tokens=tokens)
            nursery.start_soon(tokens.run)
        endpoints = Endpoints(
            targets, terms, nursery, balance=balance, breaker=breaker, outliers=outliers
        )
        await endpoints.start(trio.current_time(), wait=wait_for_ready)
        yield Client(
            endpoints,
            timings,
            retry=retry,
            wait_for_ready=wait_for_ready,
            interceptors=interceptors,
        )
        await endpoints.close()
        nursery.cancel_scope.cancel()
