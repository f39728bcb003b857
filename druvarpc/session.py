"""One connection under trio: any task writes, one reads, one keeps time.

The protocol is in the core (`druvarpc.protocol`); here its bytes meet a transport and its events
meet tasks.

*Writing.* Two ways. `flush` is for tasks whose like may have something to send in this very turn of
the event loop: what all of them submit goes out together, after the last of them, in one write by
the task of `run`. `write` is for who knows that nothing is to be gained by waiting: it writes at
once, as far as the transport takes it without waiting; what it doesn't take waits in `_unsent` for
the task of `run`. From then on, and until there is nothing left to send, only that task writes, a
little each time that the transport has room again (`_pressed`): what goes next is decided as late
as can be, so that a small call has little before it. A write never waits, so that a cancelled task
can't leave half of one behind; nor can an interrupted one.

*Reading.* Whoever calls `read` reads: on a client a task of its own, on a server the task that runs
the handlers (`druvarpc.dispatch`).
"""

import logging
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio
from trio.lowlevel import Abort, RaiseCancelT, Task

from druvarpc.errors import CloseCode, ConnectionLost, RemoteProtocolError
from druvarpc.protocol import Connection, Event
from druvarpc.transports import Buffer, Transport

logger = logging.getLogger("druvarpc")

# What a last GOAWAY may take on its way, in seconds, and what the peer may then take to close.
GOODBYE: Final = 2.0


@asynccontextmanager
async def quiet_nursery() -> AsyncGenerator[trio.Nursery, None]:
    """A nursery for tasks that raise nothing, whose block may raise.

    What the block raises leaves as it is, not in an ExceptionGroup for the sake of tasks that the
    author of the block knows nothing of.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except trio.Cancelled:
                raise  # maybe for the nursery's own sake
            except BaseException as error:
                # Kept from the nursery, which would wrap it, and beside cancellation do so even
                # where the scope that is cancelled takes its part out.
                failure = error
                nursery.cancel_scope.cancel()
    finally:
        if failure is not None:
            raise failure


class Session:
    """One connection.

    Args:
        core: its protocol.
        transport: its bytes.
        handle: called with each event of the core's; it must not raise.
        on_end: called once, when no more events will come; nor may this raise.

    Attributes:
        now: tells trio's time, in seconds.
        failure: why the connection ended before its time; None while it runs, and if it was closed
            in good order.
        ended: no more events will come, though the last GOAWAY may still be on its way.
        reason: why it takes no more calls, for the errors of calls if there is no failure.
        bytes_sent: written to the transport.
        bytes_received: read from it.
    """

    __slots__ = (
        "_goodbye_at",
        "_handle",
        "_handling",
        "_on_end",
        "_over",
        "_parted",
        "_pressed",
        "_sleeping",
        "_timer",
        "_timer_at",
        "_unsent",
        "_write_began",
        "bytes_received",
        "bytes_sent",
        "core",
        "ended",
        "failure",
        "now",
        "reason",
        "transport",
    )

    def __init__(
        self,
        core: Connection,
        transport: Transport,
        handle: Callable[[Event], None],
        on_end: Callable[[], None],
    ) -> None:
        self.core = core
        self.transport = transport
        self.now = trio.lowlevel.current_clock().current_time
        self.failure: ConnectionLost | None = None
        self.ended = False
        self.reason = "the connection is closed"
        self.bytes_sent = 0
        self.bytes_received = 0
        self._handle = handle
        self._on_end = on_end
        self._handling = False
        self._sleeping: Task | None = None  # that of `run`
        self._unsent: Sequence[Buffer] = ()
        self._pressed = False  # there is more to send than the transport takes
        self._write_began = math.inf  # when the transport took no more
        self._parted = False  # all has been written, and no more will be
        self._goodbye_at = math.inf
        self._over = False  # `run` returns
        self._timer_at = math.inf
        self._timer = trio.CancelScope()  # what `run` waits in

    def lost(self) -> ConnectionLost:
        """Return the error of calls on a connection that has ended."""
        return ConnectionLost(self.failure.message if self.failure else self.reason)

    def close(self, code: CloseCode = CloseCode.NO_ERROR, message: str = "") -> None:
        """End the connection at once, but tell the peer."""
        self.core.close(code, message)
        self._close()

    def fail(self, message: str, cause: BaseException | None = None) -> None:
        """Note why the connection ends, if that isn't known already."""
        if self.failure is None:
            self.failure = ConnectionLost(message)
            self.failure.__cause__ = cause

    def handle_events(self) -> None:
        """Hand the core's events on. What came of them is still to be written."""
        if self._handling:
            # Handling an event made others. They have their turn after it, not inside it: a
            # thousand resets that came together would be as many calls in each other.
            return
        self._handling = True
        try:
            while (event := self.core.next_event()) is not None:
                self._handle(event)
        except RemoteProtocolError as error:
            if self.failure is None:
                logger.warning("%s: %s", self.transport.peer, error)
                self.fail(f"the peer broke the protocol: {error}", error)
                self._close()
        finally:
            self._handling = False

    # Writing.

    def flush(self) -> None:
        """See to it that what the core has to send is sent, after the tasks that can run now."""
        if self._sleeping is not None:
            trio.lowlevel.reschedule(self._sleeping)
            self._sleeping = None

    # Also in a user's task it must not stop half way.
    @trio.lowlevel.enable_ki_protection
    def write(self) -> None:
        """Write what the core has to send, as far as the transport takes it now."""
        if self._pressed:
            self._set_timer()
        else:
            self._write()

    def _write(self) -> None:
        core = self.core
        if not self._unsent and not self._parted:
            if core.wants_to_send:
                now = self.now()
                buffers = core.data_to_send(now, self.transport.write_size)
                if core.has_events:
                    self.handle_events()
                self._send(buffers, now)
            if self._unsent or core.wants_to_send:
                self.flush()
            elif core.closed or core.drained:
                self._part()
        # Also when nothing could be written: calls may linger now, or streams lack credit.
        self._set_timer()

    def _send(self, buffers: Sequence[Buffer], now: float) -> None:
        size = sum(map(len, buffers))
        try:
            self._unsent = self.transport.send_nowait(buffers)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._break(error)
            return
        if self._unsent:
            self._pressed = True
            size -= sum(map(len, self._unsent))
            self._wait_for_peer(now)
        else:
            self._write_began = math.inf
            if self.core.timed:
                self.core.written(self.now())
        self.bytes_sent += size

    def _wait_for_peer(self, now: float) -> None:
        """Count the time from when the transport took no more."""
        self._write_began = min(self._write_began, now)
        self._wake_at(self._write_began + self.core.limits.stall_timeout)

    def _part(self) -> None:
        """Leave the last word to the peer: nothing more is written."""
        self._parted = True
        self._end()
        self._goodbye_at = self.now() + GOODBYE
        self._wake_at(self._goodbye_at)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self.transport.send_eof()

    def _break(self, error: Exception) -> None:
        self.fail(f"the connection broke: {error}", error)
        self._unsent, self._parted = (), True
        self._stop()

    # Reading.

    async def read(self) -> bool:
        """Wait for bytes of the peer's, and handle what they mean; return whether more may come.

        What came of it is still to be written, by `write` or `flush`, which also set the clock.
        Cancelled, it has read nothing.
        """
        core = self.core
        try:
            data = await self.transport.receive()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            if not self._over:
                self._break(error)
            return False
        if not data:
            if not core.drained:
                self.fail("the peer closed the connection")
            self._stop()
            return False
        self.bytes_received += len(data)
        core.receive_data(data, self.now())
        self.handle_events()
        return True

    @trio.lowlevel.enable_ki_protection
    async def read_all(self) -> None:
        """Read until the end."""
        core = self.core
        while await self.read():
            if core.wants_to_send or core.drained:
                self.flush()
            else:
                self._set_timer()

    # Time, and the life of the connection.

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Keep the connection until it ends, and close its transport.

        `failure` says how it went; nothing is raised but on cancellation, which closes at once.
        """
        try:
            while not self._over:
                self._timer_at = self._next_time()
                with trio.CancelScope(deadline=self._timer_at) as self._timer:
                    await self._write_all()
                self._expire(self.now())
        finally:
            self._end()
            self.core.release()
            self.transport.close()

    async def _write_all(self) -> None:
        """Write what others left, and what they flush."""
        while True:
            self._write()
            if self._unsent:
                await self.transport.wait_writable()
                self._send(self._unsent, self.now())
            elif self.core.wants_to_send and not self._parted:
                if self._pressed:
                    self.transport.hold_back(self.core.yields(self.now()))
                if self._pressed and not self.transport.has_room():
                    self._wait_for_peer(self.now())
                    await self.transport.wait_writable()
                    self._write_began = math.inf
                else:
                    await trio.lowlevel.checkpoint()
            else:
                self._pressed = False
                self._sleeping = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._wake_cancelled)

    def _wake_cancelled(self, _: RaiseCancelT) -> Abort:
        self._sleeping = None
        return Abort.SUCCEEDED

    def _expire(self, now: float) -> None:
        if now >= self._goodbye_at:
            self._stop()
        elif now >= self._write_began + self.core.limits.stall_timeout:
            limit = self.core.limits.stall_timeout
            self.fail(f"the peer didn't take what was written within {limit:g} s")
            self._stop()
        else:
            self.core.handle_timer(now)
            self.handle_events()

    def _next_time(self) -> float:
        deadline = self.core.next_deadline()
        return min(
            math.inf if deadline is None else deadline,
            self._goodbye_at,
            self._write_began + self.core.limits.stall_timeout,
        )

    def _set_timer(self) -> None:
        """Let the timer wake in time for what the core waits for now."""
        at = self.core.next_deadline()
        if at is not None and at < self._timer_at:
            self._wake_at(at)

    def _wake_at(self, at: float) -> None:
        """Let the timer wake earlier if it must; one that wakes too early finds nothing to do."""
        if at < self._timer_at:
            self._timer_at = self._timer.deadline = at

    def _close(self) -> None:
        """Let the last GOAWAY go out; it has its time for that."""
        self._goodbye_at = min(self._goodbye_at, self.now() + GOODBYE)
        self._wake_at(self._goodbye_at)
        self._end()
        self.flush()

    def _stop(self) -> None:
        self._over = True
        self._timer.cancel()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._on_end()
