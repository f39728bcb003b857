"""The server: accepts connections, and runs the handlers of the services that it offers."""

import ssl
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Final

import trio

from druvarpc.addresses import Address, parse_address
from druvarpc.arrivals import Arrivals
from druvarpc.compression import Compression, algorithms_for
from druvarpc.dispatch import Dispatcher
from druvarpc.entrance import Entrance
from druvarpc.errors import CloseCode
from druvarpc.handlers import ServerInterceptor, dispatch_table
from druvarpc.http import Site
from druvarpc.identity import Authenticate
from druvarpc.load import Load
from druvarpc.protocol import Budget, Connection, Limits
from druvarpc.service import Service
from druvarpc.session import GOODBYE, Session
from druvarpc.statistics import Statistics, Totals
from druvarpc.tls import HTTP, PROTOCOL, TLS, Contexts
from druvarpc.transports import (
    SharedListener,
    Transport,
    check_congestion_control,
    listening_address,
    open_listeners,
    remove_socket,
)
from druvarpc.version import __version__

DRAIN_TIMEOUT: Final = 30.0


class Server:
    """A running server. `serve` makes one and reports it as started.

    Attributes:
        addresses: where it listens, with the ports that the system chose.
    """

    def __init__(
        self,
        services: Sequence[Service],
        limits: Limits,
        congestion_control: str | None = None,
        *,
        contexts: Contexts | None = None,
        proxy_protocol: bool = False,
        compression: Compression | None = None,
        authenticate: Authenticate | None = None,
        interceptors: Sequence[ServerInterceptor] = (),
    ) -> None:
        self._compression = algorithms_for(compression)
        self._authenticate = authenticate
        self._congestion_control = congestion_control
        self._contexts = contexts
        self._proxy_protocol = proxy_protocol
        self.addresses: list[str] = []
        self._bound: list[Address] = []
        self._table = dispatch_table(services, interceptors)
        self._limits = limits
        self._memory = Budget(limits.total_memory)
        self._totals = Totals()
        self._load = Load(limits.total_calls)
        self._sessions: dict[Session, None] = {}
        self._changed = trio.lowlevel.ParkingLot()
        self._arrivals = Arrivals(limits.handshake_timeout)
        self._arriving = 0  # connections that haven't been admitted yet
        self._accepting = trio.CancelScope()
        self._stopped = trio.Event()  # accepting, or not begun
        self._stopped.set()
        self._serving = trio.CancelScope()
        self._draining = False

    def statistics(self) -> Statistics:
        """Return what this server has done so far."""
        return replace(self._totals.with_open(self._sessions), calls_refused=self._load.refused)

    async def drain(self, timeout: float = DRAIN_TIMEOUT) -> None:
        """Stop accepting connections and calls, let those that run end, and stop serving.

        Clients are told which of their calls were accepted; the others they may send elsewhere. A
        connection on which nothing has come yet, or that is kept for HTTP, has a second to begin.
        A handler that waits for this waits for itself until the time is up.
        Cancelled, it leaves the server draining.

        Args:
            timeout: seconds after which what still runs is cancelled.
        """
        self._draining = True
        self._remove_sockets()
        self._accepting.cancel()
        self._arrivals.hurry()
        for session in self._sessions:
            session.core.drain()
            session.flush()
        with trio.move_on_after(timeout):
            await self._wait_for_sessions()
        for session in self._sessions:
            session.close(CloseCode.TIMEOUT, "its time for draining is up")
        with trio.move_on_after(GOODBYE):
            await self._wait_for_sessions()
        self._serving.cancel()

    async def _wait_for_sessions(self) -> None:
        # A connection that was accepted at the last moment is one of them, though not at once.
        await self._stopped.wait()
        while self._sessions or self._arriving:
            await self._changed.park()

    async def run(
        self,
        addresses: Sequence[Address],
        task_status: trio.TaskStatus["Server"] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen and serve until cancelled or drained."""
        listeners: list[trio.SocketListener] = []
        own: list[trio.SocketListener] = []
        entrances: list[Entrance] = []
        try:
            for address in addresses:
                opened = await open_listeners(address, self._congestion_control)
                listeners += opened
                entrances += [self._entrance(address)] * len(opened)
                if address.fd is None:
                    self._bound.append(address)
                    own += opened
                self.addresses += [str(listening_address(one, address)) for one in opened]
            self._stopped = trio.Event()
            with self._serving:
                async with trio.open_nursery() as nursery:
                    with self._accepting, ExitStack() as stack:
                        # Not as late as below: handlers may take long to end.
                        stack.callback(self._stopped.set)
                        stack.callback(self._remove_sockets)
                        async with trio.open_nursery() as accepting:
                            for listener, entrance in zip(listeners, entrances, strict=True):
                                accept = partial(self._accept, entrance)
                                await accepting.start(
                                    partial(trio.serve_listeners, handler_nursery=nursery),
                                    accept,
                                    [listener if listener in own else SharedListener(listener)],
                                )
                            task_status.started(self)
        finally:
            self._remove_sockets()
            for listener in listeners:
                listener.socket.close()

    async def serve_transport(self, transport: Transport, since: float | None = None) -> None:
        """Serve one connection until it ends; its handshake began at `since`."""
        now = trio.current_time() if since is None else since
        core = Connection(
            "server",
            now=now,
            limits=self._limits,
            budget=self._memory,
            compression=self._compression,
        )
        async with trio.open_nursery() as nursery:
            dispatcher = Dispatcher(
                self._table,
                core,
                transport,
                nursery,
                self._totals,
                self._load,
                self._memory,
                self._authenticate,
            )
            session = dispatcher.session
            self._sessions[session] = None
            try:
                if self._draining:
                    core.drain()
                nursery.start_soon(dispatcher.work)
                await session.run()
            finally:
                del self._sessions[session]
                self._totals.add(session)
                dispatcher.forget()
                self._changed.unpark_all()
                # Handlers end with their connection.
                nursery.cancel_scope.cancel()

    def _remove_sockets(self) -> None:
        """Remove the files of this server's Unix sockets, once.

        Before they are closed where that can be: later, a file of the name may be a successor's.
        """
        while self._bound:
            remove_socket(self._bound.pop())

    def _entrance(self, address: Address) -> Entrance:
        site = Site(
            name=f"druvarpc {__version__}",
            path=address.path if address.upgraded else "",
            serving=lambda: not self._draining,
            statistics=self.statistics,
        )
        contexts = self._contexts if address.secure else None
        return Entrance(site, self._limits, self._arrivals, contexts, proxied=self._proxy_protocol)

    async def _accept(self, entrance: Entrance, stream: trio.SocketStream) -> None:
        self._arriving += 1
        try:
            admitted = await entrance.admit(stream)
        finally:
            self._arriving -= 1
            self._changed.unpark_all()
        if admitted is not None:
            await self.serve_transport(*admitted)


async def serve(
    services: Sequence[Service],
    *addresses: str,
    tls: TLS | ssl.SSLContext | None = None,
    proxy_protocol: bool = False,
    authenticate: Authenticate | None = None,
    interceptors: Sequence[ServerInterceptor] = (),
    limits: Limits = Limits(),
    congestion_control: str | None = None,
    compression: Compression | None = None,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled, or until the server has been drained.

    For `nursery.start`, which returns the `Server` once it listens. Cancelling it ends all
    connections and handlers at once; `Server.drain` lets them end.

    Args:
        services: objects of classes derived from `Service`.
        addresses: one or more of "tcp://host:port", "tls://host:port" and "unix:///path"; port 0
            takes a free one. Each of them answers HTTP too, and so does "http://host:port/path"
            ("https:"), which moreover says where the upgrade is to be asked for; without a path,
            and at the other addresses, that may be anywhere. "fd://3" is a socket that this process
            has been given and that listens already, also as "fd+tls://3" and so on; it stays
            open, and the file of a Unix socket stays where it is.
        tls: how to encrypt at tls and https addresses: files, which may change while the server
            runs, or a context, which is used as it is. See `TLS`.
        proxy_protocol: every connection begins with a header of the PROXY protocol, version 1 or 2,
            and the peers of calls are those that it names. Only for addresses that nobody but the
            proxy can reach.
        authenticate: `async def authenticate(caller: Caller)` returns who makes the calls of a
            connection, any object, or an `Identity` that expires; it is their
            `CurrentCall.identity`. It raises an RpcError to refuse them, UNAUTHENTICATED or
            PERMISSION_DENIED. It is asked when the first call comes and when one comes after
            another token of the client's or after the expiry; the calls wait for it, at most
            `Limits.handshake_timeout`.
        interceptors: `async def interceptor(call: CurrentCall, proceed)`, run around every call of
            a method that is implemented, the first outermost.
        limits: what each connection, and all together, may use.
        congestion_control: of TCP, for what this server sends; see `connect`.
        compression: how arguments, results and items of streams are compressed for clients that
            have been told of it too; see `connect`.
        task_status: reports the `Server`; given by `nursery.start`.

    Raises:
        ImportError: zstd is asked for and isn't installed.
        TypeError: a service is none.
        ValueError: an address isn't one, none is given, `tls` is missing for one or belongs to
            none, two services have the same method, or the system doesn't have that congestion
            control.
        OSError: it isn't possible to listen there, or a file of `tls` can't be used.
    """
    if not addresses:
        raise ValueError("serve() needs an address to listen on")
    parsed = [parse_address(address) for address in addresses]
    contexts = _contexts(parsed, tls)
    if congestion_control is not None:
        check_congestion_control(congestion_control, parsed)
    server = Server(
        services,
        limits,
        congestion_control,
        contexts=contexts,
        proxy_protocol=proxy_protocol,
        compression=compression,
        authenticate=authenticate,
        interceptors=interceptors,
    )
    await server.run(parsed, task_status)


def _contexts(addresses: Sequence[Address], tls: TLS | ssl.SSLContext | None) -> Contexts | None:
    """Return what the addresses that demand TLS need, None if none does."""
    secure = [address for address in addresses if address.secure]
    if secure and tls is None:
        raise ValueError(f"{secure[0]}: TLS needs tls=")
    if tls is None:
        return None
    if not secure:
        raise ValueError("tls= is for tls:// and https:// addresses, and there is none")
    return Contexts(tls, "server", [PROTOCOL, HTTP])
