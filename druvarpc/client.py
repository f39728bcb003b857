"""The client: a connection, and stubs of services on it."""

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import trio

from druvarpc.calls import Calls, Options
from druvarpc.club import Club
from druvarpc.errors import ConnectionLost
from druvarpc.protocol import (
    Clubbing,
    Connection,
    Event,
    Limits,
    PongReceived,
    Priority,
    SettingsReceived,
)
from druvarpc.service import Service
from druvarpc.session import Session, quiet_nursery
from druvarpc.statistics import Statistics, Totals
from druvarpc.stubs import make_stub
from druvarpc.transports import Transport, open_transport, parse_address

S = TypeVar("S", bound=Service)
Metadata = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]

CONNECT_TIMEOUT: Final = 10.0
PING_INTERVAL: Final = 0.001


class Client:
    """A server, as its client sees it. Made by `connect`.

    Its methods may be used by any number of tasks at once.
    """

    def __init__(self, core: Connection, transport: Transport, nursery: trio.Nursery) -> None:
        self._session = Session(core, transport, self._handle, self._lose)
        self._totals = Totals()
        self._calls = Calls(self._session, nursery, self._totals)
        self._pongs = trio.lowlevel.ParkingLot()
        self._last_pong = 0
        self._next_ping = -math.inf
        self._settled = trio.Event()
        self._ended = trio.Event()

    def stub(
        self,
        service: type[S],
        *,
        metadata: Metadata = (),
        priority: Priority = Priority.NORMAL,
    ) -> S:
        """Return an object with the service's methods, each of which calls the server.

        Args:
            service: the service's class.
            metadata: sent with every call.
            priority: the lane of every call.

        Raises:
            TypeError: `service` is no service, or an annotation of it can't be resolved.
        """
        pairs = metadata.items() if isinstance(metadata, Mapping) else metadata
        options = Options(Priority(priority), tuple((key, value) for key, value in pairs))
        return make_stub(service, self._calls, options)

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
        club = Club(self._calls)
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
        # Not faster than a server takes for no abuse (docs/protocol.md, section 10).
        now = trio.current_time()
        self._next_ping = max(now, self._next_ping + PING_INTERVAL)
        await trio.sleep_until(self._next_ping)
        start = trio.current_time()
        if not self._session.ended:
            id = self._session.core.ping(start)
            self._session.flush()
            # Others ping too, the core among them.
            while self._last_pong < id and not self._session.ended:
                await self._pongs.park()
        if self._session.ended:
            raise self._session.lost()
        return trio.current_time() - start

    def statistics(self) -> Statistics:
        """Return what this client has done so far."""
        return self._totals.with_open([] if self._ended.is_set() else [self._session])

    async def run(self) -> None:
        """Serve the connection until it ends."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._session.read_all)
                await self._session.run()
                nursery.cancel_scope.cancel()
        finally:
            self._totals.add(self._session)
            self._ended.set()

    async def settle(self, start: float, timeout: float) -> None:
        """Wait for the server's settings, until `timeout` seconds after `start`."""
        with trio.move_on_at(start + timeout):
            await self._settled.wait()
        peer = self._session.transport.peer
        if self._session.ended:
            reason = self._session.lost().message
            raise ConnectionLost(f"can't connect to {peer}: {reason}", not_started=True)
        if not self._settled.is_set():
            raise _no_answer(peer, timeout)

    async def close(self) -> None:
        """End the connection in good order."""
        self._session.close(message="the client is closed")
        await self._ended.wait()

    def _lose(self) -> None:
        """Fail all that waits for the server."""
        self._calls.fail_all()
        self._pongs.unpark_all()
        self._settled.set()

    def _handle(self, event: Event) -> None:
        if isinstance(event, SettingsReceived):
            self._settled.set()
        elif isinstance(event, PongReceived):
            self._last_pong = event.id
            self._pongs.unpark_all()
        else:
            self._calls.handle(event)


@asynccontextmanager
async def connect(
    address: str,
    *,
    clubbing: Clubbing = Clubbing(),
    limits: Limits = Limits(),
    connect_timeout: float = CONNECT_TIMEOUT,
) -> AsyncGenerator[Client, None]:
    """Connect to a server for the time of a block.

    Leaving the block ends the connection: calls that other tasks still wait for raise
    `ConnectionLost`. So do all calls after the connection has been lost or the server has drained:
    it isn't made again. Where nothing of a call was begun, the error's `not_started` says so.

    Args:
        address: "tcp://host:port" or "unix:///path".
        clubbing: how calls gather.
        limits: what this client accepts from the server.
        connect_timeout: seconds until the server must have answered.

    Raises:
        ValueError: the address isn't one.
        ConnectionLost: no druvarpc server answers there.
    """
    parsed = parse_address(address)
    start = trio.current_time()
    transport: Transport | None = None
    with trio.move_on_after(connect_timeout):
        transport = await open_transport(parsed)
    if transport is None:
        raise _no_answer(str(parsed), connect_timeout)
    async with connect_by(
        transport, clubbing=clubbing, limits=limits, start=start, timeout=connect_timeout
    ) as client:
        yield client


@asynccontextmanager
async def connect_by(
    transport: Transport, *, clubbing: Clubbing, limits: Limits, start: float, timeout: float
) -> AsyncGenerator[Client, None]:
    """Be a client on a transport, which is closed in the end; see `connect`.

    The server must have answered `timeout` seconds after `start`.
    """
    async with quiet_nursery() as nursery:
        core = Connection("client", now=trio.current_time(), limits=limits, clubbing=clubbing)
        client = Client(core, transport, nursery)
        nursery.start_soon(client.run)
        await client.settle(start, timeout)
        yield client
        await client.close()
        nursery.cancel_scope.cancel()


def _no_answer(peer: str, timeout: float) -> ConnectionLost:
    return ConnectionLost(
        f"can't connect to {peer}: no answer within {timeout:g} s", not_started=True
    )
