"""A client's connections to its server: one, a fixed number, or as many as the link rewards.

All of them make up one client. A call belongs to one connection: which one is decided when it is
made, by `choose` for a small call and by `roomiest` for one that carries much. Where there is only
one, `only` saves the question. What ends a connection ends its calls and none of the others.

`_keep` watches over them: it opens those that are missing, as `ConnectionCount`
(druvarpc/protocol/goodput.py) demands or in the place of one that has ended, and drains what is too
many. When none is left, calls wait for the first attempt to open another; once that has failed this
is `hopeless`, and they fail, while attempts go on. Without `reconnect` the client has ended with
its last connection.

With "auto" there is one more as long as small calls go beside bulk: the quiet one, which carries
no others. Lanes keep a small call from waiting for bulk in this process; but once in the same
TCP connection it waits for what was given to the kernel before it, and shares all that happens to
the connection: a lost packet of bulk's holds it up, and so does BBR when it stops to measure the
round trip, for 0.2 s out of 10.
"""

import logging
import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import trio

from druvarpc.calls import Calls
from druvarpc.client_connection import ClientConnection
from druvarpc.dialing import Dialer, Target, Terms
from druvarpc.errors import ConnectionLost
from druvarpc.protocol import (
    Budget,
    Connection,
    Priority,
)
from druvarpc.protocol.goodput import ConnectionCount
from druvarpc.resilience import Backoff
from druvarpc.session import Session
from druvarpc.statistics import Totals
from druvarpc.tokens import Token
from druvarpc.transports import Transport

logger = logging.getLogger("druvarpc")

# With "auto". On the longest link that we measured eight carried no more than four, and each weighs
# on the server.
MOST_CONNECTIONS: Final = 8
# A call with more bytes than this goes where the most room is.
HEAVY: Final = 16 * 1024
# Small calls stay with a connection until it has so many more than another: few of them are to
# ride in one club, many are to be spread.
_SLACK: Final = 8
# Seconds until the next attempt to replace what was lost, at most; doubled for each that fails or
# that doesn't hold longer than this.
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 30.0
# Seconds until the next attempt that calls wait for; before a longer pause they fail.
_PATIENCE: Final = 1.0
# Calls that the quiet connection has at once: so many small ones at a time are a load themselves,
# whatever their results weigh.
_QUIET_CALLS: Final = 16
# Bytes a second that bulk moves at least.
_BULK_RATE: Final = 256 * 1024
# Seconds that the quiet connection stays without bulk beside it, or isn't tried after a failure.
_QUIET_TIME: Final = 10.0
# Seconds between two looks at a client that does nothing.
_IDLE_LOOK: Final = 1.0


class Connections:
    """The connections to one server, or to the first of several that answers.

    Args:
        targets: where to, in the order of preference.
        terms: how they are made.
        nursery: where they run; it ends with the client.
        budget: the client's memory.
        totals: where to count.
        on_change: called when others, or no others, take calls.
        on_failure: called when a call fails as with a server that is ill, or a connection is lost.

    Attributes:
        only: the calls of the connection, if there is only one, or none is left for ever.
        reconnects: how often a connection was opened when none was left.
        hopeless: that none is open won't change soon.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        terms: Terms,
        nursery: trio.Nursery,
        *,
        budget: Budget,
        totals: Totals,
        on_change: Callable[[], None],
        on_failure: Callable[[], None],
    ) -> None:
        self.only: Calls | None = None
        self.reconnects = 0
        self.hopeless = False
        # The last that took calls and doesn't any more: it says why.
        self._last: ClientConnection | None = None
        self._targets = targets
        self._terms = terms
        if terms.tokens is not None:
            terms.tokens.listeners.append(self._authenticate)
        self._nursery = nursery
        self._dialer = Dialer(targets, terms, budget)
        self._totals = totals
        self._on_change = on_change
        self._on_failure = on_failure
        self._running: dict[ClientConnection, None] = {}
        # Those that take calls; the first is where small calls go.
        self._open: list[ClientConnection] = []
        self._backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        self._opening = 0  # by the keeper, just now
        self._failure: ConnectionLost | None = None  # of the last attempt
        self._closed = False
        self._quiet: ClientConnection | None = None
        self._quiet_until = -math.inf  # it stays, or isn't tried again
        self._light = 0
        self._moved = 0
        self._looked_at = -math.inf
        # Those that are drained are open as long as they have calls.
        self._most = 2 * (MOST_CONNECTIONS if terms.number == "auto" else terms.number)
        self._keeping = trio.CancelScope()
        self._dialing = trio.CancelScope()  # of the quiet one
        self._changed = trio.Event()

    async def start(self, start: float) -> None:
        """Open the first connection, or all of a fixed number of them.

        Raises:
            ConnectionLost: one of them can't be opened within the time, counted from `start`.
        """
        number = self._terms.number
        await self._add(start)
        # Whoever is cancelled at this very moment is to learn that, not what it did to others.
        await trio.lowlevel.checkpoint_if_cancelled()
        errors = await self._add_all((1 if number == "auto" else number) - 1, start)
        if errors:
            raise errors[0]
        self.keep()

    def keep(self) -> None:
        """Open the connections that are missing, from now on, and see to it that they stay."""
        if self._terms.number != 1 or self._terms.reconnect or not self._open:
            self._nursery.start_soon(self._keep)

    async def close(self) -> None:
        """End all connections in good order."""
        self._closed = True
        self._keeping.cancel()
        self._dialing.cancel()
        self._on_change()  # who waits for a connection waits in vain
        async with trio.open_nursery() as nursery:
            for connection in self._running:
                nursery.start_soon(connection.close)

    @property
    def sessions(self) -> list[Session]:
        """Those of all that haven't ended."""
        return [one.session for one in self._running]

    async def ping(self) -> float:
        """See `Client.ping`; there must be a connection that is `open`."""
        return await self._open[0].ping()

    @property
    def number(self) -> int:
        """How many take calls that carry much."""
        return max(1, len(self._open))

    @property
    def open(self) -> bool:
        """Whether calls can be made."""
        return bool(self._open)

    @property
    def over(self) -> bool:
        """Whether none can be made any more."""
        tried = self._last is not None or self._failure is not None
        return self._closed or (tried and not self._open and not self._terms.reconnect)

    def lost(self) -> ConnectionLost:
        """Return the error of calls that can't be made."""
        if self._closed:
            message = "the client is closed"
        elif self._failure is not None:
            message = self._failure.message
        elif self._last is not None:
            message = self._last.session.lost().message
        else:
            message = f"not connected to {self._targets[0].address} yet"
        return ConnectionLost(message, not_started=True)

    def choose(self, size: int, lane: Priority) -> Calls:
        """Return the calls of the connection that a call of so many bytes is made on.

        There must be one that is `open`.
        """
        if size > HEAVY:
            return self.roomiest()
        quiet = self._quiet
        if quiet is not None and lane is not Priority.BULK and quiet.calls.active < _QUIET_CALLS:
            return quiet.calls
        chosen = self._open
        first = chosen[0]
        most = first.calls.active - _SLACK
        if most > 0:
            for index in range(1, len(chosen)):
                if chosen[index].calls.active < most:
                    # The one with the fewest goes to the front.
                    least = min(range(1, len(chosen)), key=lambda at: chosen[at].calls.active)
                    chosen[0], chosen[least] = chosen[least], first
                    return chosen[0].calls
        return first.calls

    def roomiest(self) -> Calls:
        """Return the calls of the connection that has the most room for one that carries much."""
        return min(self._open, key=lambda one: one.calls.load).calls

    def has(self, calls: Calls) -> bool:
        """Whether these are the calls of one of the connections."""
        return any(one.calls is calls for one in self._open)

    def apart(self, calls: Calls) -> Calls:
        """Return the calls of another connection than these, if there is one."""
        others = [one.calls for one in self._open if one.calls is not calls]
        return min(others, key=lambda one: one.active, default=self._open[0].calls)

    async def _add(self, start: float, *, quiet: bool = False) -> None:
        """Open a connection.

        Raises:
            ConnectionLost: that couldn't be done.
        """
        self._take(await self._dialer.open(start, self._begin), quiet=quiet)

    def _begin(self, core: Connection, transport: Transport) -> ClientConnection:
        connection = ClientConnection(
            core, transport, self._totals, self._note_change, self._on_failure
        )
        self._running[connection] = None
        self._nursery.start_soon(self._run, connection)
        return connection

    def _take(self, connection: ClientConnection, *, quiet: bool) -> None:
        """Let calls be made on a new connection, or end it.

        Raises:
            ConnectionLost: none can be made on it.
        """
        if self.over:
            # All others have ended while this one was opened, and with them the client.
            connection.session.close()
            raise self.lost()
        tokens = self._terms.tokens
        if tokens is not None and tokens.current is not None:
            try:
                connection.authenticate(tokens.current)
            except ConnectionLost:
                connection.session.close(message="the token isn't taken")
                raise
        if quiet:
            self._quiet = connection
        else:
            self.reconnects += not self._open and self._last is not None
            self._open.append(connection)
        self._failure, self.hopeless = None, False
        self._note_change()

    def _authenticate(self, token: Token) -> None:
        """Send a new token over the connections that are open; others send it when they are."""
        for connection in (*self._open, *([] if self._quiet is None else [self._quiet])):
            try:
                connection.authenticate(token)
            except ConnectionLost as error:
                logger.error("%s", error)  # noqa: TRY400 - no traceback of ours

    async def _run(self, connection: ClientConnection) -> None:
        try:
            await connection.run()
        finally:
            del self._running[connection]
            self._note_change()

    def _note_change(self) -> None:
        if self._quiet is not None and not self._quiet.accepts_calls:
            self._quiet = None
        still = [one for one in self._open if one.accepts_calls]
        if not still and self._quiet is not None:
            still, self._quiet = [self._quiet], None
        if self._open and not still:
            self._last = self._open[-1]
            self._failure = None
            self.hopeless = self._backoff.at > trio.current_time() + _PATIENCE
        self._open = still
        if len(still) == 1 and self._quiet is None:
            self.only = still[0].calls
        elif still or self._terms.reconnect or self._last is None:
            self.only = None
        else:
            self.only = self._last.calls
        self._changed.set()
        self._on_change()

    # As many as there should be.

    async def _keep(self) -> None:
        """Keep as many connections as there should be, as long as there is to be any."""
        now = trio.current_time()
        number = self._terms.number
        count = ConnectionCount(MOST_CONNECTIONS, now) if number == "auto" else None
        with self._keeping:
            while not self.over:
                self._changed = trio.Event()
                now = trio.current_time()
                if count is None:
                    assert number != "auto"
                    target = number
                else:
                    target = self._decide(count, now) if self._open else 1
                for _ in range(len(self._open) - target):
                    self._retire()
                if count is not None:
                    self._keep_quiet(now)
                missing = self._missing(target)
                if missing and now >= self._backoff.at:
                    self._backoff.attempt(now, random.random())
                    self._opening += missing
                    self._nursery.start_soon(self._replace, missing, now, count)
                    missing = 0
                until = count.deadline if count is not None and self._open else math.inf
                if missing:
                    until = min(until, self._backoff.at)
                elif count is not None and len(self._open) + self._opening < target:
                    # Those that are drained still have calls.
                    count.refuse(now, len(self._open))
                    until = count.deadline
                with trio.move_on_at(until):
                    await self._changed.wait()

    def _missing(self, target: int) -> int:
        """Return how many connections to open now."""
        missing = target - len(self._open) - self._opening
        least = 0 if self._open or self._opening else 1  # whatever those have that are drained
        return max(least, min(missing, self._most - len(self._running) - self._opening))

    async def _replace(self, number: int, start: float, count: ConnectionCount | None) -> None:
        errors = await self._add_all(number, start)
        self._opening -= number
        if errors and not self._open:
            self._failure, self.hopeless = errors[0], True
        if errors and count is not None:
            count.refuse(trio.current_time(), len(self._open))
        self._note_change()

    def _decide(self, count: ConnectionCount, now: float) -> int:
        sessions = [one.session for one in self._running]
        rtts = [one.core.rtt for one in sessions if one.core.rtt is not None]
        numbers = [one.calls.active for one in self._open]
        active = sum(numbers)
        count.update(
            now,
            self._totals.bytes_sent
            + self._totals.bytes_received
            + sum(one.bytes_sent + one.bytes_received for one in sessions),
            min(rtts, default=None),
            spread=active >= 2 * len(numbers),
            idle=not min(numbers),
        )
        if not active:
            count.deadline = max(count.deadline, now + _IDLE_LOOK)
        return count.target

    def _keep_quiet(self, now: float) -> None:
        """Have a quiet connection if small calls go beside bulk, and only then."""
        light = sum(one.calls.light for one in self._open)
        moved = sum(one.session.bytes_sent + one.session.bytes_received for one in self._open)
        bulk = any(one.calls.load for one in self._open) and moved - self._moved >= _BULK_RATE * (
            now - self._looked_at
        )
        beside = bulk and light > self._light
        self._light, self._moved, self._looked_at = light, moved, now
        if self._quiet is not None:
            if bulk:
                self._quiet_until = now + _QUIET_TIME
            elif now >= self._quiet_until:
                self._quiet.drain()
                self._note_change()
        elif beside and now >= self._quiet_until:
            self._quiet_until = now + _QUIET_TIME
            self._dialing = trio.CancelScope()
            self._nursery.start_soon(self._open_quiet, now)

    async def _open_quiet(self, start: float) -> None:
        # One that can't be opened is tried again when it would have been closed.
        with self._dialing, suppress(ConnectionLost):
            await self._add(start, quiet=True)

    async def _add_all(self, number: int, start: float) -> list[ConnectionLost]:
        """Open connections at once; return the errors of those that couldn't be."""
        errors: list[ConnectionLost] = []

        async def add() -> None:
            try:
                await self._add(start)
            except ConnectionLost as error:
                errors.append(error)

        if number:
            async with trio.open_nursery() as nursery:
                for _ in range(number):
                    nursery.start_soon(add)
            # A nursery's end may pass over a cancellation, which others have met by then.
            await trio.lowlevel.checkpoint_if_cancelled()
        return errors

    def _retire(self) -> None:
        least = min(self._open, key=lambda one: (one.calls.load, one.calls.active))
        least.drain()
        self._note_change()
