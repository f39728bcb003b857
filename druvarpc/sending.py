"""Calls of an explicit club (`druvarpc.club`) on their way.

They are sent in as few frames as the server's limits allow. Those that fail are made again if they
may be, each by the options of its own stub and until its own deadline; those that need each other,
together or not at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from druvarpc.calls import Call, Calls, Options
from druvarpc.endpoints import Endpoints
from druvarpc.errors import RpcError, Status
from druvarpc.parts import Reply
from druvarpc.protocol import Reference
from druvarpc.protocol.clubs import call_size
from druvarpc.protocol.wire import MAX_CLUB
from druvarpc.resilience import Retry
from druvarpc.retries import Attempts, may_fare_better, renewable
from druvarpc.stubs import UnaryMethod

__all__ = ["Entry", "Sending"]


@dataclass(slots=True)
class Entry:
    """One call of a club.

    Attributes:
        index: in the club.
        metadata: what goes with it.
        deadline: of the scopes that it was added in.
    """

    index: int
    stub: UnaryMethod
    payload: bytes
    references: tuple[Reference, ...]
    reply: Reply[Any]
    metadata: tuple[tuple[str, str | bytes], ...]
    deadline: float

    def make(self, calls: Calls) -> Call:
        """Return a new call."""
        options = self.stub.options
        call = Call(
            calls,
            self.stub.method.name,
            self.payload,
            lane=options.lane,
            metadata=self.metadata,
            references=self.references,
        )
        if self.deadline < math.inf:
            call.deadline = self.deadline
        if options.special:
            options.apply(call)
        self.reply.begin(call)
        return call

    def may_be_repeated(self) -> bool:
        """Whether the call failed in a way that lets it be made again."""
        error = self.reply.error
        return isinstance(error, RpcError) and (
            may_fare_better(error, idempotent=self.stub.method.idempotent)
            or renewable(self.stub.connections.tokens, error)
        )

    def was_in_vain(self) -> bool:
        """Whether the call didn't run since another that it needs didn't."""
        error = self.reply.error
        return (
            bool(self.references)
            and isinstance(error, RpcError)
            and error.status is Status.FAILED_PRECONDITION
            and error.not_started
        )


class Sending:
    """Calls of a club that go out together.

    Args:
        connections: where to.
        club: all calls of the club.
        entries: those that go out.
    """

    def __init__(
        self, connections: Endpoints, club: Sequence[Entry], entries: Sequence[Entry]
    ) -> None:
        self._connections = connections
        self._club = club
        self._entries = entries

    async def settle(self) -> None:
        """Send the calls and wait until their replies are settled; cancelled, abandon them."""
        if not self._entries:
            return
        try:
            sent = await self._attempt(self._entries)
            groups = self._groups(_to_repeat(self._entries))
            if len(groups) == 1:
                await self._repeat(*groups[0], sent=sent)
            elif groups:
                async with trio.open_nursery() as nursery:
                    for entries, options, deadline in groups:
                        again = partial(self._repeat, entries, options, deadline, sent=sent)
                        nursery.start_soon(again)
        finally:
            for entry in self._entries:
                entry.reply.abandon()

    def _groups(self, failed: Sequence[Entry]) -> list[tuple[Sequence[Entry], Options, float]]:
        """Return which calls are made again together, by which options, and until when."""
        if any(entry.references for entry in failed):
            # One that its stub doesn't make again keeps all from that.
            strictest = min((entry.stub.options for entry in failed), key=_attempts)
            return [(failed, strictest, min(entry.deadline for entry in failed))]
        groups: dict[tuple[Retry | None, bool, float], list[Entry]] = {}
        for entry in failed:
            options = entry.stub.options
            groups.setdefault((options.retry, options.wait, entry.deadline), []).append(entry)
        return [(group, group[0].stub.options, group[0].deadline) for group in groups.values()]

    async def _repeat(
        self, entries: Sequence[Entry], options: Options, deadline: float, *, sent: bool
    ) -> None:
        """Make calls that failed again, and those of them that fail again; see `_groups`.

        Where there is no other attempt each keeps the error that it has.
        """
        attempts = Attempts(self._connections, options, idempotent=True, sent=sent)
        while entries:
            with trio.CancelScope(deadline=deadline) as until_deadline:
                try:
                    await attempts.pause(_reason(entries), len(entries))
                except RpcError:
                    return
            if until_deadline.cancelled_caught:
                return
            await self._attempt(entries, attempts)
            entries = _to_repeat(entries)

    async def _attempt(self, entries: Sequence[Entry], attempts: Attempts | None = None) -> bool:
        """Make calls once; return whether there was a connection for that."""
        sent = True
        try:
            self._submit(entries)
        except RpcError as error:
            sent = False
            for entry in entries:
                entry.reply.fail(error)
        if sent and attempts is not None:
            attempts.begun(len(entries))
        for entry in entries:
            await entry.reply.settle()
        return sent

    def _submit(self, entries: Sequence[Entry]) -> None:
        """Send calls in as few frames as the server's limits allow.

        Raises:
            ConnectionLost: there is no connection.
            CircuitOpen: calls to the server fail.
        """
        size = sum(len(entry.payload) for entry in entries)
        lane = entries[0].stub.options.lane
        calls = self._connections.only or self._connections.choose(size, lane)
        peer = calls.session.core.peer
        most = min(peer.max_club, peer.max_calls)
        # Calls that need each other must share a frame, however large. Others do better in several:
        # the server begins with the first while the next are on their way.
        bound = any(entry.references for entry in entries)
        places: dict[int, int] = {}  # in the frame, by the index in the club
        frame: list[tuple[Entry, Call]] = []
        room = MAX_CLUB
        for entry in entries:
            call = entry.make(calls)
            call.lane = lane
            size = call_size(call)
            room -= size
            if len(places) == most or (places and room < 0 and not bound):
                self._send(calls, frame)
                places, frame, room = {}, [], MAX_CLUB - size
            missing = next((one.call for one in call.references if one.call not in places), None)
            if missing is not None:
                entry.reply.fail(self._unreachable(call, missing))
                continue
            call.references = tuple(one._replace(call=places[one.call]) for one in call.references)
            places[entry.index] = len(places)
            frame.append((entry, call))
        if frame:
            self._send(calls, frame)

    def _send(self, calls: Calls, frame: Sequence[tuple[Entry, Call]]) -> None:
        """Send some of the calls in one frame."""
        try:
            calls.submit_club([call for _, call in frame])
        except RpcError as error:
            for entry, _ in frame:
                entry.reply.fail(error)

    def _unreachable(self, call: Call, index: int) -> RpcError:
        """Return the error of a call that refers to one which isn't in the same frame."""
        if self._club[index].reply.error is not None:
            return RpcError(
                Status.FAILED_PRECONDITION,
                f"call {index} of the club, which this one needs, has no result",
                not_started=True,
            )
        return RpcError(
            Status.INVALID_ARGUMENT,
            f"{call.method}: refers to a call too far before it to go out in the same frame",
            not_started=True,
        )


def _attempts(options: Options) -> int:
    return 0 if options.retry is None else options.retry.attempts


def _to_repeat(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Return the calls that are made again: none, those that failed, or all.

    Calls that need results of others are made again with them, so only if none has run.
    """
    failed = [entry for entry in entries if entry.may_be_repeated()]
    if not any(entry.references for entry in entries):
        return failed
    if failed and all(entry.may_be_repeated() or entry.was_in_vain() for entry in entries):
        return entries
    return []


def _reason(entries: Sequence[Entry]) -> RpcError:
    """Return the error that says most of when to make calls again."""
    errors = [entry.reply.error for entry in entries if entry.may_be_repeated()]
    return max(
        (error for error in errors if isinstance(error, RpcError)),
        key=lambda error: error.retry_after or 0.0,
    )
