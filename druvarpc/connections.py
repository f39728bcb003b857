"""A client's connections to its server: one, a fixed number, or as many as the link rewards.

All of them make up one client. A call belongs to one connection: which one is decided when it is
made, by `choose` for a small call and by `roomiest` for one that carries much. Where there is only
one, `only` saves the question. What ends a connection ends its calls and none of the others.

With more than one, `_keep` watches over them: it opens those that are missing, as `ConnectionCount`
(druvarpc/protocol/goodput.py) demands or in the place of one that was lost, and drains what is too
many. When the last has ended the client has, too.

With "auto" there is one more as long as small calls go beside bulk: the quiet one, which carries
no others. Lanes keep a small call from waiting for bulk in this process; but once in the same
TCP connection it waits for what was given to the kernel before it, and shares all that happens to
the connection: a lost packet of bulk's holds it up, and so does BBR when it stops to measure the
round trip, for 0.2 s out of 10.
"""

import math
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, Literal

import trio

from druvarpc.calls import Calls
from druvarpc.client_connection import ClientConnection, no_answer
from druvarpc.errors import ConnectionLost
from druvarpc.protocol import (
    Budget,
    Clubbing,
    Connection,
    Limits,
    Priority,
)
from druvarpc.protocol.compression import Algorithm
from druvarpc.protocol.goodput import ConnectionCount
from druvarpc.statistics import Statistics, Totals
from druvarpc.transports import Transport

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
    """The connections of one client.

    Args:
        dial: opens a transport; raises ConnectionLost.
        address: where to, for messages.
        number: how many connections, or "auto".
        nursery: where they run; it ends with the client.
        clubbing: how calls gather.
        limits: what the client accepts on each.
        timeout: seconds that opening one may take.
        compression: the algorithms for what calls carry, the best first.

    Attributes:
        only: the calls of the connection, if there is only one, or none is left.
        nursery: where they run.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[Transport]],
        address: str,
        number: int | Literal["auto"],
        nursery: trio.Nursery,
        *,
        clubbing: Clubbing,
        limits: Limits,
        timeout: float,
        compression: Sequence[Algorithm] = (),
    ) -> None:
        self.nursery = nursery
        self.only: Calls | None = None
        # The last that took calls and doesn't any more: it says why.
        self._last: ClientConnection | None = None
        self._dial = dial
        self._address = address
        self._number: int | Literal["auto"] = number
        self._clubbing = clubbing
        self._limits = limits
        self._timeout = timeout
        self._compression = compression
        self._budget = Budget(limits.total_memory)
        self._totals = Totals()
        self._running: dict[ClientConnection, None] = {}
        # Those that take calls; the first is where small calls go.
        self._open: list[ClientConnection] = []
        self._quiet: ClientConnection | None = None
        self._quiet_until = -math.inf  # it stays, or isn't tried again
        self._light = 0
        self._moved = 0
        self._looked_at = -math.inf
        # Those that are drained are open as long as they have calls.
        self._most = 2 * (MOST_CONNECTIONS if number == "auto" else number)
        self._keeping = trio.CancelScope()
        self._dialing = trio.CancelScope()  # of the quiet one
        self._changed = trio.Event()

    async def start(self, start: float) -> None:
        """Open the first connection, or all of a fixed number of them.

        Raises:
            ConnectionLost: one of them can't be opened within the time, counted from `start`.
        """
        number = 1 if self._number == "auto" else self._number
        await self._add(start)
        # Whoever is cancelled at this very moment is to learn that, not what it did to others.
        await trio.lowlevel.checkpoint_if_cancelled()
        errors = await self._add_all(number - 1, start)
        if errors:
            raise errors[0]
        if self._number != 1:
            self.nursery.start_soon(self._keep)

    async def close(self) -> None:
        """End all connections in good order."""
        self._keeping.cancel()
        self._dialing.cancel()
        async with trio.open_nursery() as nursery:
            for connection in self._running:
                nursery.start_soon(connection.close)

    def statistics(self) -> Statistics:
        """See `Client.statistics`."""
        return self._totals.with_open([one.session for one in self._running])

    async def ping(self) -> float:
        """See `Client.ping`."""
        return await self._first.ping()

    @property
    def number(self) -> int:
        """How many take calls that carry much."""
        return max(1, len(self._open))

    def check_open(self) -> None:
        """See to it that calls can be made.

        Raises:
            ConnectionLost: all connections have ended or take no more calls.
        """
        self._first.calls.check_open()

    def choose(self, size: int, lane: Priority) -> Calls:
        """Return the calls of the connection that a call of so many bytes is made on."""
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

    @property
    def _first(self) -> ClientConnection:
        if self._open:
            return self._open[0]
        assert self._last is not None, "nobody asks before the first connection is open"
        return self._last

    async def _add(self, start: float, *, quiet: bool = False) -> None:
        """Open a connection.

        Raises:
            ConnectionLost: that couldn't be done.
        """
        deadline = start + self._timeout
        transport: Transport | None = None
        with trio.move_on_at(deadline):
            transport = await self._dial()
        if transport is None:
            raise no_answer(self._address, self._timeout)
        core = Connection(
            "client",
            now=trio.current_time(),
            limits=self._limits,
            clubbing=self._clubbing,
            budget=self._budget,
            compression=self._compression,
        )
        connection = ClientConnection(core, transport, self._totals, self._note_change)
        self._running[connection] = None
        self.nursery.start_soon(self._run, connection)
        await connection.settle(deadline, self._timeout)
        if not connection.accepts_calls:
            error = connection.session.lost()
            error.not_started = True
            raise error
        if self._last is not None:
            # All others have ended while this one was opened, and with them the client.
            connection.session.close()
            raise self._last.session.lost()
        if quiet:
            self._quiet = connection
        else:
            self._open.append(connection)
        self._note_change()

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
        self._open = still
        if len(still) > 1 or self._quiet is not None:
            self.only = None
        elif still or self._last is not None:
            self.only = self._first.calls
        self._changed.set()

    # More than one.

    async def _keep(self) -> None:
        """Keep as many connections as there should be, as long as there is one."""
        now = trio.current_time()
        count = ConnectionCount(MOST_CONNECTIONS, now) if self._number == "auto" else None
        pause, next_attempt = _FIRST_PAUSE, now
        with self._keeping:
            while self._open:
                self._changed = trio.Event()
                now = trio.current_time()
                target = self._number if count is None else self._decide(count, now)
                assert target != "auto"
                for _ in range(len(self._open) - target):
                    self._retire()
                if count is not None:
                    self._keep_quiet(now)
                missing = min(target - len(self._open), self._most - len(self._running))
                if missing > 0 and now >= next_attempt:
                    if now > next_attempt + pause:
                        pause = _FIRST_PAUSE  # what was opened last has held
                    errors = await self._add_all(missing, now)
                    now = trio.current_time()
                    # Full jitter (Brooker, "Exponential backoff and jitter", 2015): clients that
                    # lost the same server don't come back together.
                    next_attempt = now + random.uniform(0, pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                    if errors and count is not None:
                        count.refuse(now, len(self._open))
                    continue
                until = count.deadline if count is not None else math.inf
                if missing > 0:
                    until = min(until, next_attempt)
                elif count is not None and len(self._open) < target:
                    # Those that are drained still have calls.
                    count.refuse(now, len(self._open))
                with trio.move_on_at(until):
                    await self._changed.wait()

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
            self.nursery.start_soon(self._open_quiet, now)

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
