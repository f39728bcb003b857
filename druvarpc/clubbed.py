"""A call of a club within interceptors.

Its interceptors run in a task of the club's. They get as far as their first `proceed()` before the
call goes out, so that what they changed goes with it; those that answer by themselves take their
call out of the club. A second attempt is a call of its own.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from druvarpc.calls import Call
from druvarpc.errors import RpcError, Status, cancelled_part
from druvarpc.interceptors import chain
from druvarpc.outgoing import Around, OutgoingCall
from druvarpc.replies import Pairs

__all__ = ["ClubbedCall"]


class ClubbedCall:
    """A call of a club within interceptors.

    Args:
        around: how it is made.
        arguments: its arguments, replies of other calls among them.
        bound: some of them are.
        deadline: of the scopes that it was added in.
        change: takes the metadata, and the arguments if the interceptors have replaced them.
        result: returns what the call returned, or raises why it failed, once it is settled.
        on_progress: called when it can be sent, and when it has gone well.

    Attributes:
        ready: it can be sent, or won't be.
        settled: it has ended, as far as the club is concerned.
        ended: `value` and `error` tell how it ended.
    """

    def __init__(
        self,
        around: Around,
        arguments: tuple[Any, ...],
        deadline: float,
        *,
        bound: bool,
        change: Callable[[Pairs, tuple[Any, ...] | None], None],
        result: Callable[[], Awaitable[Any]],
        on_progress: Callable[[], object],
    ) -> None:
        self.ready = trio.Event()
        self.settled = trio.Event()
        self.ended = trio.Event()
        self.value: Any = None
        self.error: Exception | None = None
        self._wanted = False
        self._around = around
        self._arguments = arguments
        self._bound = bound
        self._deadline = deadline
        self._change = change
        self._result = result
        self._on_progress = on_progress
        self._call: Call | None = None
        self._failure: Exception | None = None

    @property
    def answered(self) -> bool:
        """Whether the interceptors have ended without the call."""
        return self.ended.is_set() and not self._wanted

    def begin(self, call: Call) -> None:
        """Note the call that is sent for this one, which ends it unless it fails."""
        self._call = call
        call.on_done = self._note

    def _note(self) -> None:
        assert self._call is not None
        if not self._call.failed:
            self.settled.set()
            self._on_progress()

    async def run(self, after: Sequence["ClubbedCall"] = ()) -> None:
        """Run the interceptors, once these calls can be sent."""
        for call in after:
            await call.ready.wait()
        outgoing = OutgoingCall(self._around.method, self._arguments, self._around.metadata)
        outgoing.deadline = min(outgoing.deadline, self._deadline)

        async def proceed() -> Any:
            return await self._attempt(outgoing)

        try:
            self.value = await chain(outgoing, self._around.interceptors, proceed)()
        except Exception as error:
            self.error = error
        except BaseExceptionGroup as group:
            raise cancelled_part(group) from None
        self.ended.set()
        self.ready.set()
        self._on_progress()

    async def _attempt(self, outgoing: OutgoingCall) -> Any:
        outgoing.attempt += 1
        if not self._wanted:
            return await self._in_club(outgoing)
        if self._failure is not None and self._bound:
            # What it needs of others is forgotten once the club has ended.
            raise self._failure
        # This task isn't in the scopes of the call's author.
        late = trio.current_time() >= outgoing.deadline
        if not late:
            with trio.CancelScope(deadline=outgoing.deadline):
                return await self._around.plain(outgoing.metadata)(*outgoing.arguments)
        raise RpcError(Status.DEADLINE_EXCEEDED, "the deadline passed", not_started=late)

    async def _in_club(self, outgoing: OutgoingCall) -> Any:
        arguments = None if outgoing.arguments is self._arguments else outgoing.arguments
        self._change(self._around.pairs(outgoing.metadata), arguments)
        self._wanted = True
        self.ready.set()
        self._on_progress()
        await self.settled.wait()
        try:
            return await self._result()
        except Exception as error:
            self._failure = error
            raise
        finally:
            call = self._call
            if call is not None:
                trailers = () if call.outcome is None else call.outcome.trailers
                outgoing.note(call.metadata_ahead, trailers)
