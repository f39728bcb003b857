"""One connection's calls on the server: a pool of tasks that reads them and runs their handlers.

The tasks are leader and followers (Schmidt and others, "Leader/Followers", 2000). The leader reads
from the connection, runs the handlers of the calls that have come one after the other, writes all
their replies at once and reads on. A handler that doesn't block costs no task and no switch. When
one blocks, its task wakes a successor, which goes on with the other calls and leads from then on;
so a handler that blocks delays nobody. A task whose handler has ended follows: it waits to be the
successor of one whose handler blocks.

A worker runs its handlers in one cancel scope, whose deadline is that of the call; once that scope
has been cancelled, for a call's sake, the worker makes another. Each handler runs in a copy of the
context, so that what it sets in context variables doesn't reach the next one.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import msgspec
import trio
from trio.lowlevel import Abort, RaiseCancelT, Task

from druvarpc.codec import printable
from druvarpc.current import Served, current_call
from druvarpc.errors import RETRY_AFTER, LocalProtocolError, Status
from druvarpc.handlers import Attempts, Entry, Requests, Run, failure_of, with_trailers
from druvarpc.identity import Authenticate, Authenticator
from druvarpc.interceptors import chain
from druvarpc.load import Load
from druvarpc.pipe import Pipe, closing
from druvarpc.protocol import (
    Budget,
    CallsReceived,
    Connection,
    Event,
    GoAwayReceived,
    Outcome,
    Readable,
    ResetReceived,
    Stalled,
    State,
    Stream,
    Times,
    Writable,
)
from druvarpc.service import Cardinality
from druvarpc.session import Session
from druvarpc.statistics import Totals
from druvarpc.timings import handler_times
from druvarpc.transports import Transport

logger = logging.getLogger("druvarpc")

# Handlers that run before the replies so far are written. With some on their way, the client works
# at the same time; with fewer, system calls cost more than that gains.
WRITE_EVERY: Final = 64
# Tasks that a connection keeps for the next calls; a task more or less costs some 10 µs.
MAX_IDLE: Final = 8


class _Worker:
    """A task of the pool.

    Attributes:
        scope: what its handlers run in.
        call: what it works for, as long as that isn't replied to.
        pipe: the call's data, if it streams.
        stopped: why the call was cancelled by somebody else than its deadline.
    """

    __slots__ = ("call", "pipe", "scope", "stopped")

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.call: Stream | None = None
        self.pipe: Pipe | None = None
        self.stopped: Outcome | None = None

    def stop(self, outcome: Outcome) -> None:
        """Cancel the handler."""
        self.stopped = outcome
        self.scope.cancel()


class Dispatcher:
    """The calls of one connection.

    Args:
        table: what answers which method.
        core: the connection's protocol.
        transport: its bytes.
        nursery: where handlers run; cancelled with the connection.
        totals: where to count.
        load: how many handlers run, those of other connections included.
        memory: what the connections of the server share.
        authenticate: tells whose calls they are; None for nobody's.

    Attributes:
        session: the connection.
    """

    __slots__ = (
        "_active",
        "_authenticator",
        "_core",
        "_idle",
        "_led",
        "_load",
        "_nursery",
        "_queue",
        "_served",
        "_table",
        "_totals",
        "_waking",
        "_workers",
        "session",
    )

    def __init__(
        self,
        table: Mapping[str, Entry],
        core: Connection,
        transport: Transport,
        nursery: trio.Nursery,
        totals: Totals,
        load: Load,
        memory: Budget,
        authenticate: Authenticate | None = None,
    ) -> None:
        self.session = Session(core, transport, self._handle, self._discard)
        self._served = Served(self.session)
        self._authenticator: Authenticator | None = None
        if authenticate is not None:
            self._authenticator = Authenticator(
                authenticate, self.session, memory, self._release, self._refuse
            )
            nursery.start_soon(self._authenticator.run)
        self._core = core
        self._table = table
        self._nursery = nursery
        self._totals = totals
        self._load = load
        self._queue: list[Stream] = []  # from last to first: calls are taken off its end
        self._workers: dict[_Worker, None] = {}
        self._idle: list[Task] = []
        self._waking = False  # a successor is on its way
        self._led = False  # a worker reads
        self._active = 0

    def forget(self) -> None:
        """Count the calls that have ended with the connection: they get no reply."""
        self._totals.calls_ended += self._active
        self._totals.calls_failed += self._active
        if self._authenticator is not None:
            self._authenticator.part()

    def _handle(self, event: Event) -> None:
        if isinstance(event, CallsReceived):
            self._totals.calls_started += len(event.calls)
            self._active += len(event.calls)
            calls = event.calls
            if self._authenticator is not None:
                calls = self._authenticator.admit(calls)
            # They come of what a worker does, reading or replying; it goes on with the queue.
            self._queue[:0] = calls[::-1]
        elif isinstance(event, ResetReceived):
            self._stop(event.stream, Outcome(Status.CANCELLED))
        elif isinstance(event, Stalled):
            self._stop(
                event.stream, Outcome(Status.ABORTED, "the caller took no data for too long")
            )
        elif isinstance(event, Readable):
            if isinstance(event.stream.token, _Worker) and event.stream.token.pipe is not None:
                event.stream.token.pipe.readable()
        elif isinstance(event, Writable):
            if isinstance(event.stream.token, _Worker) and event.stream.token.pipe is not None:
                event.stream.token.pipe.writable()
        elif isinstance(event, GoAwayReceived) and event.code:
            self.session.fail(f"the client closed the connection: {printable(event.message)}")

    def _discard(self) -> None:
        """Begin no more handlers and stop those that run: nobody will hear of their results."""
        self._queue.clear()
        for worker in self._workers:
            if worker.call is not None:
                worker.stop(Outcome(Status.CANCELLED))

    def _stop(self, call: Stream, outcome: Outcome) -> None:
        worker = call.token
        if isinstance(worker, _Worker) and worker.call is call:
            worker.stop(outcome)
        elif call.final is None and call.state is not State.CLOSED:
            # Its handler hasn't begun; where the queue is read it is passed over.
            if self._authenticator is not None:
                self._authenticator.forget(call)
            self._reply(call, None, outcome)

    def _release(self, calls: Sequence[Stream]) -> None:
        """Run calls whose caller has been told."""
        self._queue[:0] = calls[::-1]
        self._wake()

    def _refuse(self, call: Stream, outcome: Outcome) -> None:
        """Answer a call that isn't run."""
        call.token = None
        # The core knows it for as long as its caller sends data: without what it takes.
        call.payload = None
        self._reply(call, None, outcome)

    # The pool.

    def _wake(self) -> None:
        """See to it that a worker is on its way to the queue."""
        if self._waking:
            return
        self._waking = True
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop())
        else:
            self._nursery.start_soon(self.work)

    # An interrupt is for the program's main task, or for a handler, not for what is in between.
    @trio.lowlevel.enable_ki_protection
    async def work(self) -> None:
        """Be a worker, as long as there is something to do or few others are idle."""
        self._waking = False
        worker = _Worker()
        self._workers[worker] = None
        busy = True
        while busy:
            with trio.CancelScope() as worker.scope:
                busy = await self._run_calls(worker)
            call = worker.call
            if call is not None:
                late = Outcome(Status.DEADLINE_EXCEEDED, "the deadline passed")
                self._end(worker, call, None, worker.stopped or late)
            worker.stopped = None
        del self._workers[worker]

    async def _run_calls(self, worker: _Worker) -> bool:
        """Run calls and lead, by turns; return whether there is more to do, in a new scope."""
        queue = self._queue
        while True:
            begun = 0
            while queue:
                if begun == WRITE_EVERY:
                    begun = 0
                    self.session.write()
                begun += 1
                call = queue.pop()
                if call.final is not None or call.state not in (State.OPEN, State.CALLED):
                    continue
                run = self._begin(worker, call)
                if run is not None:
                    if queue or not self._led:
                        self._wake()
                    else:
                        self.session.flush()
                    await self._finish(worker, run)
                if call.deadline is not None or worker.stopped is not None:
                    worker.scope.deadline = math.inf
                    if worker.scope.cancel_called:
                        return True
            if not self._led:
                self._led = True
                try:
                    self.session.write()
                    if not await self.session.read():
                        return False
                finally:
                    self._led = False
            elif not await self._follow():
                return False

    async def _follow(self) -> bool:
        """Wait to be a successor; return False at once if enough others do."""
        self.session.flush()
        if len(self._idle) >= MAX_IDLE:
            return False
        task = trio.lowlevel.current_task()
        self._idle.append(task)
        await trio.lowlevel.wait_task_rescheduled(partial(self._leave, task))
        self._waking = False
        return True

    def _leave(self, task: Task, _: RaiseCancelT) -> Abort:
        if task in self._idle:
            self._idle.remove(task)
        return Abort.SUCCEEDED

    def _begin(self, worker: _Worker, call: Stream) -> Run[bytes | None] | None:
        """Begin a call; return what runs on if the handler blocks."""
        worker.call = call
        identity = None if self._authenticator is None else call.token
        call.token = worker
        if call.deadline is not None:
            if call.deadline <= self.session.now():
                late = Outcome(Status.DEADLINE_EXCEEDED, "the deadline passed", not_started=True)
                self._end(worker, call, None, late)
                return None
            worker.scope.deadline = call.deadline
        if self._load.full:
            self._turn_away(worker, call)
            return None
        entry = self._table.get(call.method)
        if entry is None or entry.handler is None:
            outcome = Outcome(Status.UNIMPLEMENTED, f"{call.method} is not implemented")
            self._end(worker, call, None, outcome)
            return None
        if call.times is not None:
            call.times.begun = self.session.now()
        place = (self._served, call, entry.method, identity)
        if entry.interceptors:
            run = Run(place, self._intercept(worker, entry, call))
        else:
            run = Run(place, self._answer(worker, entry, call))
        try:
            run.start()
        except StopIteration as stop:
            self._end(worker, call, stop.value, None)
        except Exception as error:
            self._failed(worker, error)
        else:
            return run
        return None

    async def _finish(self, worker: _Worker, run: Run[bytes | None]) -> None:
        """Run a call whose handler has blocked to its end."""
        call = worker.call
        assert call is not None
        now, load = self.session.now, self._load
        began = now()
        load.enter()
        try:
            try:
                payload = await run.finish()
            finally:
                # Not before: a handler that is cancelled holds its place until it has ended.
                load.leave(now() - began)
        except Exception as error:
            self._failed(worker, error)
        except BaseExceptionGroup as group:
            # Cancelled beside what tasks of the handler raised in their cleanup. That ends here: in
            # the pool's nursery it would end the server.
            errors, rest = group.split(Exception)
            if errors is not None:
                self._failed(worker, errors)
            assert rest is not None, "a group of Exceptions alone is one itself"
            raise rest from None
        else:
            self._end(worker, call, payload, None)

    @trio.lowlevel.disable_ki_protection
    async def _answer(self, worker: _Worker, entry: Entry, call: Stream) -> bytes | None:
        """Run a handler; return the payload of the reply, None for a streaming method."""
        method, handler = entry.method, entry.handler
        assert handler is not None
        assert call.payload is not None
        arguments = method.decode_call(call.payload)
        call.payload = None
        if method.cardinality is Cardinality.UNARY_UNARY:
            return method.encode_result(await handler(*arguments))
        worker.pipe = pipe = Pipe(self.session, call, call.times)
        if method.stream_position is not None:
            arguments.insert(method.stream_position, Requests(method, pipe))
        if method.cardinality is Cardinality.STREAM_UNARY:
            return method.encode_result(await handler(*arguments))
        items = handler(*arguments)
        async with closing(items):
            async for item in items:
                if not await pipe.send(method.encode_response(item)):
                    break
        return None

    @trio.lowlevel.disable_ki_protection
    async def _intercept(self, worker: _Worker, entry: Entry, call: Stream) -> bytes | None:
        """Do what `_answer` does, within interceptors."""
        method = entry.method
        current = current_call()
        attempts = Attempts(entry, current, lambda: self._pipe(worker, call))
        result = await chain(current, entry.interceptors, attempts.proceed)()
        if method.cardinality.server_streaming:
            return None
        return method.encode_result(result)

    def _pipe(self, worker: _Worker, call: Stream) -> Pipe:
        """Return the data of a call, one and the same for as long as it lasts."""
        if worker.pipe is None:
            worker.pipe = Pipe(self.session, call, call.times)
        return worker.pipe

    # How calls end.

    def _turn_away(self, worker: _Worker, call: Stream) -> None:
        """Refuse a call whose handler would be one too many."""
        details = msgspec.msgpack.encode({RETRY_AFTER: self._load.refuse(self.session.now())})
        busy = Outcome(Status.RESOURCE_EXHAUSTED, "the server is busy", details, not_started=True)
        self._end(worker, call, None, busy)

    def _failed(self, worker: _Worker, error: Exception) -> None:
        call = worker.call
        assert call is not None
        outcome = failure_of(call.method, error, self._core.peer.max_inline)
        # The items that the handler sent before it failed still arrive.
        self._end(worker, call, None, outcome, after_data=worker.stopped is None)

    def _end(
        self,
        worker: _Worker,
        call: Stream,
        payload: bytes | None,
        outcome: Outcome | None,
        *,
        after_data: bool = False,
    ) -> None:
        worker.call = worker.pipe = None
        call.token = None
        if self._served.calls:
            current = self._served.calls.pop(call, None)
            if current is not None and current.has_trailers:
                outcome = with_trailers(outcome, current.trailers)
        self._reply(call, payload, outcome, after_data=after_data)

    def _reply(
        self,
        call: Stream,
        payload: bytes | None,
        outcome: Outcome | None,
        *,
        after_data: bool = False,
    ) -> None:
        if self.session.ended:
            return
        self._active -= 1
        self._totals.calls_ended += 1
        if outcome is not None and outcome.status and call.state is not State.RESET:
            self._totals.calls_failed += 1
        now = self.session.now()
        if call.times is not None:
            self._take_times(call, call.times, now)
        try:
            self._core.reply(call, now, payload, outcome, after_data=after_data)
        except LocalProtocolError as error:
            logger.error("%s: the reply can't be sent: %s", call.method, error)  # noqa: TRY400 - no traceback of ours
            self._core.reply(call, now, None, Outcome(Status.INTERNAL, "the server failed"))
        if call.club is not None:
            # Others that waited for this one may be ready.
            self.session.handle_events()

    def _take_times(self, call: Stream, times: Times, now: float) -> None:
        # Names that a client made up must not fill the memory.
        if call.state is not State.RESET and call.method in self._table:
            self._totals.times.add(call.method, handler_times(call, times, now))
