"""One connection's calls on the server: a pool of tasks that runs their handlers.

Calls wait in a queue and are taken by workers. A worker runs one handler after the other without
giving up its turn as long as they don't block; before it begins one it sees to it that another
worker has been woken if calls still wait, so that a handler that blocks delays nobody. Quick
handlers therefore cost no task and no switch each, and each that blocks has a task.

A worker runs its handlers in one cancel scope, whose deadline is that of the call; once that scope
has been cancelled, for a call's sake, the worker makes another. Each handler runs in a copy of the
context, so that what it sets in context variables doesn't reach the next one.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Final

import trio
from trio.lowlevel import Abort, RaiseCancelT, Task

from druvarpc.codec import printable
from druvarpc.errors import LocalProtocolError, Status
from druvarpc.handlers import Entry, Requests, failure_of, run_for
from druvarpc.protocol import (
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
    Writable,
)
from druvarpc.service import Cardinality
from druvarpc.session import Pipe, Session, closing
from druvarpc.statistics import Totals
from druvarpc.transports import Transport

logger = logging.getLogger("druvarpc")

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

    Attributes:
        session: the connection.
    """

    def __init__(
        self,
        table: Mapping[str, Entry],
        core: Connection,
        transport: Transport,
        nursery: trio.Nursery,
        totals: Totals,
    ) -> None:
        self.session = Session(core, transport, self._handle, self._discard)
        self._core = core
        self._table = table
        self._nursery = nursery
        self._totals = totals
        self._queue: deque[Stream] = deque()
        self._workers: dict[_Worker, None] = {}
        self._idle: list[Task] = []
        self._waking = False
        self._active = 0

    def forget(self) -> None:
        """Count the calls that have ended with the connection: they get no reply."""
        self._totals.calls_active -= self._active
        self._totals.calls_failed += self._active

    def _handle(self, event: Event) -> None:
        if isinstance(event, CallsReceived):
            self._totals.calls_started += len(event.calls)
            self._totals.calls_active += len(event.calls)
            self._active += len(event.calls)
            self._queue.extend(event.calls)
            self._wake()
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
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
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
        """Run what is in the queue; return whether there is more to do, in a new scope."""
        queue = self._queue
        while True:
            while not queue:
                if len(self._idle) >= MAX_IDLE:
                    return False
                task = trio.lowlevel.current_task()
                self._idle.append(task)
                await trio.lowlevel.wait_task_rescheduled(partial(self._leave, task))
                self._waking = False
            call = queue.popleft()
            if queue:
                self._wake()
            if call.final is not None or call.state not in (State.OPEN, State.CALLED):
                continue
            await self._run_call(worker, call)
            if worker.stopped is not None or (
                call.deadline is not None and worker.scope.cancel_called
            ):
                return True

    def _leave(self, task: Task, _: RaiseCancelT) -> Abort:
        if task in self._idle:
            self._idle.remove(task)
        return Abort.SUCCEEDED

    async def _run_call(self, worker: _Worker, call: Stream) -> None:
        worker.call = call
        call.token = worker
        if call.deadline is not None:
            if call.deadline <= trio.current_time():
                late = Outcome(Status.DEADLINE_EXCEEDED, "the deadline passed", not_started=True)
                self._end(worker, call, None, late)
                return
            worker.scope.deadline = call.deadline
        entry = self._table.get(call.method)
        if entry is None or entry.handler is None:
            outcome = Outcome(Status.UNIMPLEMENTED, f"{call.method} is not implemented")
            self._end(worker, call, None, outcome)
        else:
            try:
                payload = await run_for(
                    call, self.session.transport.peer, self._answer(worker, entry, call)
                )
            except Exception as error:
                self._failed(worker, error)
            except BaseExceptionGroup as group:
                # Cancelled beside what tasks of the handler raised in their cleanup. That ends
                # here: in the pool's nursery it would end the server.
                errors, rest = group.split(Exception)
                if errors is not None:
                    self._failed(worker, errors)
                assert rest is not None, "a group of Exceptions alone is one itself"
                raise rest from None
            else:
                self._end(worker, call, payload, None)
        if call.deadline is not None:
            worker.scope.deadline = math.inf

    async def _answer(self, worker: _Worker, entry: Entry, call: Stream) -> bytes | None:
        """Run a handler; return the payload of the reply, None for a streaming method."""
        method, handler = entry.method, entry.handler
        assert handler is not None
        assert call.payload is not None
        arguments = method.decode_call(call.payload)
        call.payload = None
        if method.cardinality is Cardinality.UNARY_UNARY:
            return method.encode_result(await handler(*arguments))
        worker.pipe = pipe = Pipe(self.session, call)
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

    # How calls end.

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
        self._totals.calls_active -= 1
        if outcome is not None and outcome.status and call.state is not State.RESET:
            self._totals.calls_failed += 1
        now = trio.current_time()
        try:
            self._core.reply(call, now, payload, outcome, after_data=after_data)
        except LocalProtocolError as error:
            logger.error("%s: the reply can't be sent: %s", call.method, error)  # noqa: TRY400 - no traceback of ours
            self._core.reply(call, now, None, Outcome(Status.INTERNAL, "the server failed"))
        # Calls of a club that waited for this one may be ready.
        self.session.handle_events()
