"""The server: accepts connections, and runs the handlers of the services that it offers."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import trio

from druvarpc.compression import Compression, algorithms_for
from druvarpc.dispatch import Dispatcher
from druvarpc.errors import CloseCode
from druvarpc.handlers import dispatch_table
from druvarpc.protocol import Budget, Connection, Limits
from druvarpc.service import Service
from druvarpc.session import GOODBYE, Session
from druvarpc.statistics import Statistics, Totals
from druvarpc.transports import (
    Address,
    Transport,
    accepted_transport,
    check_congestion_control,
    listening_address,
    open_listeners,
    parse_address,
    remove_socket,
)

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
        compression: Compression | None = None,
    ) -> None:
        self._compression = algorithms_for(compression)
        self._congestion_control = congestion_control
        self.addresses: list[str] = []
        self._bound: list[Address] = []
        self._table = dispatch_table(services)
        self._limits = limits
        self._memory = Budget(limits.total_memory)
        self._totals = Totals()
        self._sessions: dict[Session, None] = {}
        self._changed = trio.lowlevel.ParkingLot()
        self._accepting = trio.CancelScope()
        self._serving = trio.CancelScope()
        self._draining = False

    def statistics(self) -> Statistics:
        """Return what this server has done so far."""
        return self._totals.with_open(self._sessions)

    async def drain(self, timeout: float = DRAIN_TIMEOUT) -> None:
        """Stop accepting connections and calls, let those that run end, and stop serving.

        Clients are told which of their calls were accepted; the others they may send elsewhere.
        A handler that waits for this waits for itself until the time is up.
        Cancelled, it leaves the server draining.

        Args:
            timeout: seconds after which what still runs is cancelled.
        """
        self._draining = True
        self._remove_sockets()
        self._accepting.cancel()
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
        while self._sessions:
            await self._changed.park()

    async def run(
        self,
        addresses: Sequence[Address],
        task_status: trio.TaskStatus["Server"] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen and serve until cancelled or drained."""
        listeners: list[trio.SocketListener] = []
        try:
            for address in addresses:
                listeners += await open_listeners(address, self._congestion_control)
                self._bound.append(address)
            self.addresses = [str(listening_address(listener)) for listener in listeners]
            with self._serving:
                async with trio.open_nursery() as nursery:
                    with self._accepting, ExitStack() as stack:
                        # Not as late as below: handlers may take long to end.
                        stack.callback(self._remove_sockets)
                        task_status.started(self)
                        await trio.serve_listeners(self._accept, listeners, handler_nursery=nursery)
        finally:
            self._remove_sockets()
            for listener in listeners:
                listener.socket.close()

    async def serve_transport(self, transport: Transport) -> None:
        """Serve one connection until it ends."""
        core = Connection(
            "server",
            now=trio.current_time(),
            limits=self._limits,
            budget=self._memory,
            compression=self._compression,
        )
        async with trio.open_nursery() as nursery:
            dispatcher = Dispatcher(self._table, core, transport, nursery, self._totals)
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

    async def _accept(self, stream: trio.SocketStream) -> None:
        await self.serve_transport(accepted_transport(stream))


async def serve(
    services: Sequence[Service],
    *addresses: str,
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
        addresses: one or more of "tcp://host:port" and "unix:///path"; port 0 takes a free one.
        limits: what each connection, and all together, may use.
        congestion_control: of TCP, for what this server sends; see `connect`.
        compression: how arguments, results and items of streams are compressed for clients that
            have been told of it too; see `connect`.
        task_status: reports the `Server`; given by `nursery.start`.

    Raises:
        ImportError: zstd is asked for and isn't installed.
        TypeError: a service is none.
        ValueError: an address isn't one, none is given, two services have the same method, or the
            system doesn't have that congestion control.
        OSError: it isn't possible to listen there.
    """
    if not addresses:
        raise ValueError("serve() needs an address to listen on")
    parsed = [parse_address(address) for address in addresses]
    if congestion_control is not None:
        check_congestion_control(congestion_control, parsed)
    server = Server(services, limits, congestion_control, compression=compression)
    await server.run(parsed, task_status)
