"""Calls as their callers see them: started, waited for, failed, abandoned.

A unary call (`druvarpc.stubs`) costs neither a task nor a scope: the caller's own task sleeps until
the reply's event wakes it, and when it is cancelled instead, the call is reset. Calls that stream
are in `druvarpc.streaming`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import trio
from trio.lowlevel import Abort, RaiseCancelT, Task, reschedule

from druvarpc.codec import printable
from druvarpc.errors import ConnectionLost, LocalProtocolError, RpcError, Status
from druvarpc.outgoing import ClientInterceptor
from druvarpc.pipe import Pipe
from druvarpc.protocol import (
    Event,
    GoAwayReceived,
    MetadataReceived,
    Outcome,
    Priority,
    Readable,
    Reference,
    RepliesReceived,
    Stalled,
    State,
    Stream,
    Times,
    Writable,
)
from druvarpc.protocol.frames import Metadata
from druvarpc.replies import collecting
from druvarpc.resilience import Hedge, Retry
from druvarpc.session import Session
from druvarpc.statistics import Totals
from druvarpc.timings import CallTimes, Timings, call_times

logger = logging.getLogger("druvarpc")

# A server's DEADLINE_EXCEEDED that comes so close to the caller's own deadline, in seconds, is the
# same event seen from the other side: the caller's scope is left to tell of it.
_SAME_DEADLINE: Final = 0.05
# Statuses that say that the server is ill, rather than something of the call.
_ILL: Final = frozenset({Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.INTERNAL})


class Call(Stream):
    """A call of a client.

    Attributes:
        task: what sleeps until the reply comes.
        done: the reply has come, or the call has failed here.
        single: the server sends one result, not a stream.
        result: that result, or what has come of it.
        outcome: what the reply says beside it.
        error: why the call failed here.
        pipe: the data of a streaming call.
        on_done: called when the call is done.
        failed_at: when it failed; without a value until then.
        metadata_ahead: what the server sent ahead of the reply.
        weight: what it counts for where connections are compared: the bytes of its data, as far as
            they are known.
    """

    __slots__ = (
        "calls",
        "done",
        "error",
        "failed_at",
        "metadata_ahead",
        "on_done",
        "outcome",
        "pipe",
        "result",
        "single",
        "task",
        "weight",
    )

    failed_at: float  # not set at first: a call that goes well doesn't pay for it

    def __init__(
        self,
        calls: "Calls",
        method: str,
        payload: bytes,
        *,
        more: bool = False,
        single: bool = True,
        lane: Priority = Priority.NORMAL,
        metadata: tuple[tuple[str, str | bytes], ...] = (),
        references: tuple[Reference, ...] = (),
    ) -> None:
        deadline = trio.current_effective_deadline()
        super().__init__(
            method,
            payload,
            more=more,
            lane=lane,
            deadline=None if deadline == math.inf else deadline,
            metadata=metadata,
            references=references,
        )
        self.calls = calls
        self.task: Task | None = None
        self.done = False
        self.single = single
        self.result: bytes | None = None
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self.pipe: Pipe | None = None
        self.on_done: Callable[[], None] | None = None
        self.metadata_ahead: Metadata = ()
        self.weight = 0

    @property
    def failed(self) -> bool:
        """Whether the call has ended otherwise than with OK."""
        return self.error is not None or (self.outcome is not None and self.outcome.status != 0)

    @property
    def failure(self) -> Exception | None:
        """Why the call failed, None if it didn't."""
        outcome = self.outcome
        if self.error is not None or outcome is None or not outcome.status:
            return self.error
        return RpcError(
            outcome.status,
            outcome.message,
            _details(outcome.details),
            not_started=outcome.not_started,
            trailers=dict(outcome.trailers),
        )

    @property
    def plain(self) -> bool:
        """Whether the reply has come, and is nothing but a result."""
        return (
            self.result is not None
            and self.outcome is None
            and self.error is None
            and self.incoming is None
        )

    def finish(self) -> None:
        """Note that the call is done, and wake who waits for it."""
        self.done = True
        if self.task is not None:
            reschedule(self.task)
            self.task = None
        if self.pipe is not None:
            self.pipe.readable()
            self.pipe.writable()
        if self.on_done is not None:
            self.on_done()

    def cancelled(self, _: RaiseCancelT) -> Abort:
        """Abandon the call, since the task that waits for it is cancelled."""
        self.task = None
        self.calls.abandon(self)
        return Abort.SUCCEEDED


class Calls:
    """The calls of one connection.

    Args:
        session: the connection.
        totals: where to count.
        on_failure: called when a call fails as with a server that is ill.

    Attributes:
        session: the connection.
        load: the `weight` of all that are active.
        light: how many without weight have been made.
    """

    def __init__(self, session: Session, totals: Totals, on_failure: Callable[[], None]) -> None:
        self.session = session
        self.load = 0
        self.light = 0
        self._totals = totals
        self._on_failure = on_failure
        self._active: dict[Call, None] = {}
        # The task whose reply came last, if it came alone. The next call of such a one goes out at
        # once, as long as no other is under way: who makes one call after the other would only wait
        # for tasks that don't come.
        self._lone: Task | None = None

    @property
    def active(self) -> int:
        """How many have been made and haven't ended."""
        return len(self._active)

    def check_open(self) -> None:
        """See to it that calls can be sent.

        Raises:
            ConnectionLost: the connection has ended or takes no more calls.
        """
        if self.session.ended or not self.session.core.accepts_calls:
            error = self.session.lost()
            error.not_started = True
            raise error

    def submit(self, call: Call, task: Task | None = None) -> None:
        """Send a call, which `task` is going to wait for.

        Raises:
            ConnectionLost: the connection has ended or takes no more calls.
            RpcError: INVALID_ARGUMENT, the call can't be sent.
        """
        session = self.session
        if session.ended:
            self.check_open()
        try:
            session.core.call(call, session.now())
        except LocalProtocolError as error:
            self.check_open()
            raise RpcError(Status.INVALID_ARGUMENT, str(error)) from error
        self._active[call] = None
        if call.weight:
            self.load += call.weight
        else:
            self.light += 1
        self._totals.calls_started += 1
        if task is not None and task is self._lone and len(self._active) == 1:
            session.write()
        else:
            session.flush()

    def submit_club(self, calls: Sequence[Call]) -> None:
        """Send calls as one club; see `submit`."""
        self.check_open()
        try:
            self.session.core.club(calls, self.session.now())
        except LocalProtocolError as error:
            raise RpcError(Status.INVALID_ARGUMENT, str(error)) from error
        self._active |= dict.fromkeys(calls)
        self.light += len(calls)
        self._totals.calls_started += len(calls)
        self.session.flush()

    def abandon(self, call: Call) -> None:
        """Reset a call if it hasn't ended, and drop what hasn't been read of it."""
        session = self.session
        now = session.now()
        passed = call.deadline is not None and now >= call.deadline
        if call in self._active:
            self._end(call)
            if passed:
                self._on_failure()
        if session.ended:
            return
        session.core.reset(call, now, Status.DEADLINE_EXCEEDED if passed else Status.CANCELLED)
        if session.core.wants_to_send:
            session.flush()

    def fail(self, call: Call, error: Exception) -> None:
        """End a call here, with an error."""
        if call in self._active:
            self._end(call)
            self._totals.calls_failed += 1
            call.error = error
            call.failed_at = self.session.now()
            call.finish()

    def fail_all(self) -> None:
        """End all calls, since the connection has ended."""
        for call in list(self._active):
            error = self.session.lost()
            error.not_started = call.state is State.IDLE  # it hasn't been in a frame
            self.fail(call, error)

    def handle(self, event: Event) -> None:
        """Do what an event of the connection's demands."""
        if isinstance(event, RepliesReceived):
            self._end_all(event.replies)
        elif isinstance(event, Readable):
            self._readable(event.stream)
        elif isinstance(event, Writable):
            assert isinstance(event.stream, Call)
            if event.stream.pipe is not None:
                event.stream.pipe.writable()
        elif isinstance(event, GoAwayReceived):
            message = printable(event.message)
            self.session.reason = f"the server goes away: {message}"
            for stream in event.refused:
                assert isinstance(stream, Call)
                self.fail(stream, ConnectionLost(self.session.reason, not_started=True))
            if event.code:
                self.session.fail(f"the server closed the connection: {message}")
        elif isinstance(event, MetadataReceived):
            assert isinstance(event.stream, Call)
            event.stream.metadata_ahead = event.metadata
        elif isinstance(event, Stalled):
            assert isinstance(event.stream, Call)
            self.fail(
                event.stream, RpcError(Status.ABORTED, "the server took no data for too long")
            )
            self.abandon(event.stream)

    def _end_all(self, replies: Sequence[tuple[Stream, bytes | None, Outcome | None]]) -> None:
        active, totals = self._active, self._totals
        self._lone = None
        for call, payload, outcome in replies:
            assert isinstance(call, Call)
            if call not in active:
                continue  # given up while the reply was on its way from the core to here
            del active[call]
            if call.weight:
                self.load -= call.weight
            totals.calls_ended += 1
            if call.result is None:
                call.result = payload
            elif payload is not None:
                self._take_result(call, payload)
            if outcome is not None:
                call.outcome = outcome
                if outcome.status:
                    call.failed_at = self.session.now()
                    totals.calls_failed += 1
                    if outcome.status in _ILL:
                        totals.calls_ill += 1
                        self._on_failure()
            if len(replies) == 1:
                self._lone = call.task
            if call.times is not None:
                self._take_times(call, call.times)
            call.finish()

    def _take_times(self, call: Call, times: Times) -> None:
        lacked = 0.0
        now = self.session.now()
        if call.outgoing is not None:
            lacked = call.outgoing.lacked_credit(now)
        parts = call_times(times, call.outcome, lacked, now)
        self._totals.times.add(call.method, parts)
        if callable(call.token):
            try:
                call.token(CallTimes(call.method, *parts))
            # The user's code, in a task of ours: it must not end the connection.
            except Exception:
                logger.exception("%s: what was to take its times failed", call.method)

    def _readable(self, call: Stream) -> None:
        assert isinstance(call, Call)
        if not call.single:
            assert call.pipe is not None
            call.pipe.readable()
            return
        # At once, whether or not anybody waits for it: held in the core it would keep the credit
        # that other calls need to end.
        while (message := self.session.core.take(call, self.session.now())) is not None:
            self._take_result(call, message)
        if self.session.core.incoming(call).too_long:
            # Its reply won't come: the server waits for credit that isn't given any more.
            most = self.session.core.limits.max_message
            text = f"{call.method}: a result of more than {most} bytes"
            self.fail(call, RpcError(Status.RESOURCE_EXHAUSTED, text))
            self.abandon(call)

    def _take_result(self, call: Call, payload: bytes) -> None:
        if call.result is not None:
            call.error = RpcError(Status.INTERNAL, f"{call.method}: a reply with two results")
            call.failed_at = self.session.now()
        call.result = payload

    async def wait(self, call: Call) -> None:
        """Wait until a call is done; cancelled, abandon it."""
        if call.done:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            call.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(call.cancelled)

    async def check(self, call: Call) -> None:
        """Raise the error of a call that has failed."""
        failure = call.failure
        if failure is None:
            return
        outcome = call.outcome
        near = call.deadline is not None and call.deadline - self.session.now() < _SAME_DEADLINE
        late = outcome is not None and outcome.status == Status.DEADLINE_EXCEEDED
        if call.error is None and near and late:
            assert call.deadline is not None
            await trio.sleep_until(call.deadline)
        raise failure

    async def result(self, call: Call) -> bytes:
        """Wait for a unary call; return the payload of its reply."""
        await self.wait(call)
        if call.failed:
            await self.check(call)
        if call.incoming is not None:
            self.abandon(call)
        if call.result is None:
            raise RpcError(Status.INTERNAL, f"{call.method}: a reply without a result")
        return call.result

    def _end(self, call: Call) -> None:
        del self._active[call]
        self.load -= call.weight
        self._totals.calls_ended += 1
        self._totals.calls_given_up += 1


class Options:
    """What a stub adds to each of its calls.

    Attributes:
        lane: their lane.
        metadata: sent with them.
        special: they need `apply`, since they ask for their times or aren't compressed.
        retry: which of them are made again, None for none.
        wait: they wait for a server however long it takes to come back.
        hedge: when unary ones that are idempotent are made once more, beside; None for never.
        interceptors: run around them, the first outermost.
    """

    __slots__ = (
        "_compress",
        "_report",
        "_timed",
        "hedge",
        "interceptors",
        "lane",
        "metadata",
        "retry",
        "special",
        "wait",
    )

    def __init__(
        self,
        lane: Priority,
        metadata: tuple[tuple[str, str | bytes], ...],
        timings: Timings,
        *,
        retry: Retry | None = None,
        wait: bool = False,
        hedge: Hedge | None = None,
        compress: bool = True,
        interceptors: Sequence[ClientInterceptor] = (),
    ) -> None:
        self.hedge = hedge
        self.interceptors = interceptors
        self.retry = retry
        self.wait = wait
        self.lane = lane
        self.metadata = metadata
        self._timed = timings is not False
        self._compress = compress
        self.special = self._timed or not compress
        self._report = timings if callable(timings) else None

    def within(self, metadata: Metadata) -> "Options":
        """Return the options of the calls within the interceptors, which left `metadata`."""
        options = object.__new__(Options)
        for name in Options.__slots__:
            setattr(options, name, getattr(self, name))
        options.metadata = tuple(metadata)
        options.interceptors = ()
        return options

    def apply(self, call: Call) -> None:
        """Let a new call ask for its times, or go as it is."""
        call.compress = self._compress
        if self._timed:
            call.timings = True
            call.token = self._report


def note_metadata(call: Call) -> None:
    """Give what came ahead of a reply to the block of `reply_metadata` that this runs in."""
    found = collecting.get()
    if found is not None:
        found.note(call.metadata_ahead)


def note_reply(call: Call) -> None:
    """Give it what came with the reply, too."""
    found = collecting.get()
    if found is not None:
        trailers = () if call.outcome is None else call.outcome.trailers
        found.note(call.metadata_ahead, trailers)


def _details(details: bytes | None) -> object:
    if details is None:
        return None
    try:
        return msgspec.msgpack.decode(details)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
