"""The client's end of one connection: its calls, its PINGs, and how it begins and ends."""

import math
from collections.abc import Callable
from typing import Final

import trio

from druvarpc.calls import Calls
from druvarpc.errors import ConnectionLost, LocalProtocolError
from druvarpc.protocol import (
    Connection,
    Event,
    GoAwayReceived,
    PongReceived,
    SettingsReceived,
)
from druvarpc.session import Session
from druvarpc.statistics import Totals
from druvarpc.tokens import Token
from druvarpc.transports import Transport

# Seconds between two PINGs of a user's, not faster than a server takes for no abuse
# (docs/protocol.md, section 10).
PING_INTERVAL: Final = 0.001


class ClientConnection:
    """The client's end of one connection.

    Args:
        core: its protocol.
        transport: its bytes.
        totals: where its calls are counted.
        on_change: called when it takes no more calls.
        on_failure: called when a call fails as with a server that is ill, or the connection is
            lost.

    Attributes:
        calls: its calls.
        session: its bytes and tasks.
    """

    def __init__(
        self,
        core: Connection,
        transport: Transport,
        totals: Totals,
        on_change: Callable[[], None],
        on_failure: Callable[[], None],
    ) -> None:
        self.session = Session(core, transport, self._handle, self._lose)
        self.calls = Calls(self.session, totals, on_failure)
        self._totals = totals
        self._on_change = on_change
        self._on_failure = on_failure
        self._pongs = trio.lowlevel.ParkingLot()
        self._last_pong = 0
        self._next_ping = -math.inf
        self._settled = trio.Event()
        self._ended = trio.Event()
        self._scope = trio.CancelScope()

    @property
    def accepts_calls(self) -> bool:
        """Whether calls can be made on it."""
        return not self.session.ended and self.session.core.accepts_calls

    @property
    def drained(self) -> bool:
        """Whether it takes no calls, though nothing is wrong with it."""
        return self.session.failure is None and not self.session.core.accepts_calls

    async def run(self) -> None:
        """Serve the connection until it ends."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.session.read_all)
                    await self.session.run()
                    nursery.cancel_scope.cancel()
        finally:
            self._totals.add(self.session)
            self._ended.set()

    async def settle(self, deadline: float, timeout: float) -> None:
        """Wait for the server's settings until `deadline`, which is `timeout` after the start.

        If it raises, the connection ends.

        Raises:
            ConnectionLost: they haven't come.
        """
        try:
            with trio.move_on_at(deadline):
                await self._settled.wait()
            peer = self.session.transport.peer
            if self.session.ended or self.drained:
                reason = self.session.lost().message
                raise ConnectionLost(f"can't connect to {peer}: {reason}", not_started=True)
            if not self._settled.is_set():
                raise no_answer(peer, timeout)
        except BaseException:
            self._scope.cancel()
            raise

    def authenticate(self, token: Token) -> None:
        """Say who the client is, for the calls that go out after this.

        Raises:
            ConnectionLost: the server takes less metadata than go with the token.
        """
        try:
            self.session.core.authenticate(token.value, tuple(token.metadata.items()))
        except LocalProtocolError as error:
            peer = self.session.transport.peer
            raise ConnectionLost(f"{peer} doesn't take the token: {error}") from None
        self.session.flush()

    async def ping(self) -> float:
        """See `Client.ping`."""
        now = trio.current_time()
        self._next_ping = max(now, self._next_ping + PING_INTERVAL)
        await trio.sleep_until(self._next_ping)
        start = trio.current_time()
        if not self.session.ended:
            id = self.session.core.ping(start)
            self.session.flush()
            # Others ping too, the core among them.
            while self._last_pong < id and not self.session.ended:
                await self._pongs.park()
        if self.session.ended:
            raise self.session.lost()
        return trio.current_time() - start

    def drain(self) -> None:
        """Make no more calls here; it ends when the last has."""
        self.session.core.drain()
        self.session.flush()

    async def close(self) -> None:
        """End the connection in good order."""
        self.session.close(message="the client is closed")
        await self._ended.wait()

    def _lose(self) -> None:
        """Fail all that waits for the server."""
        self._on_change()
        if self.session.failure is not None and self._settled.is_set():
            self._on_failure()
        self.calls.fail_all()
        self._pongs.unpark_all()
        self._settled.set()

    def _handle(self, event: Event) -> None:
        if isinstance(event, SettingsReceived):
            self._settled.set()
        elif isinstance(event, PongReceived):
            self._last_pong = event.id
            self._pongs.unpark_all()
        else:
            if isinstance(event, GoAwayReceived):
                self._on_change()
            self.calls.handle(event)


def no_answer(peer: str, timeout: float) -> ConnectionLost:
    """Return the error of a connection that nobody answered in time."""
    return ConnectionLost(
        f"can't connect to {peer}: no answer within {timeout:g} s", not_started=True
    )
