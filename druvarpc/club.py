"""Explicit clubs: calls that go out together and may use each other's results."""

import math
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import trio

from druvarpc.clubbed import ClubbedCall
from druvarpc.endpoints import Endpoints
from druvarpc.errors import RpcError
from druvarpc.parts import Part, Reply
from druvarpc.protocol import Reference
from druvarpc.protocol.clubs import MAX_REFERENCES, resolve
from druvarpc.replies import Pairs
from druvarpc.sending import Entry, Sending
from druvarpc.service import Method
from druvarpc.session import quiet_nursery
from druvarpc.stubs import InterceptedUnary, unary_method

T = TypeVar("T")

# Steps of all tasks after which interceptors that haven't let a call go are taken to wait for
# something. Each lets go of a lock, say, or takes it, in a step or two.
_STEPS: Final = 16
# Seconds that calls wait for others that need their results, after the last that was let go: longer
# than most interceptors take. In vain, they cost that once a club; not waiting, a round trip each.
_PATIENCE: Final = 0.1


class Club:
    """Calls that go out in one frame when the block of `Client.club` ends.

    Attributes:
        closed: no call can be added any more.
        ended: every reply is settled.
    """

    def __init__(self, connections: Endpoints) -> None:
        self.closed = False
        self.ended = False
        self._connections = connections
        self._entries: list[Entry] = []
        self._progress = trio.lowlevel.ParkingLot()  # of calls within interceptors

    def call(
        self, method: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any
    ) -> Reply[T]:
        """Add a call of a stub's unary method; arguments may be replies, or parts of replies.

        Raises:
            TypeError: `method` is no unary method of a stub, or the arguments are not its own.
            ValueError: the stub or a reply belongs to somebody else, or too many arguments are
                replies.
            RpcError: INVALID_ARGUMENT, an argument can't be encoded.
            RuntimeError: the club's block has ended.
        """
        if self.closed:
            raise RuntimeError("the club's block has ended")
        stub = unary_method(method, "club")
        row = stub.method
        if stub.connections is not self._connections:
            raise ValueError(f"{stub!r} belongs to another client")
        arguments, _ = row.bind(args, kwargs)
        payload, references = self._encode(row, arguments)
        reply: Reply[T] = Reply(self, len(self._entries), row)
        deadline = trio.current_effective_deadline()
        metadata = stub.options.metadata
        entry = Entry(len(self._entries), stub, payload, references, reply, metadata, deadline)
        if isinstance(stub, InterceptedUnary):
            reply.within = ClubbedCall(
                stub.around,
                arguments,
                deadline,
                bound=bool(references),
                change=partial(self._change, entry),
                result=reply.result,
                on_progress=self._progress.unpark_all,
            )
        self._entries.append(entry)
        return reply

    def _encode(
        self, row: Method, arguments: tuple[Any, ...]
    ) -> tuple[bytes, tuple[Reference, ...]]:
        references = tuple(
            argument.reference(position, self)
            for position, argument in enumerate(arguments)
            if isinstance(argument, Part)
        )
        if len(references) > MAX_REFERENCES:
            raise ValueError(f"{row.name}: more than {MAX_REFERENCES} arguments are replies")
        payload = row.encode_arguments(
            tuple(None if isinstance(one, Part) else one for one in arguments)
        )
        return payload, references

    async def settle(self) -> list[Exception]:
        """Send the calls, wait for all replies and return the errors; cancelled, abandon them."""
        if any(one.reply.within is not None for one in self._entries):
            await _Departures(self._connections, self._entries, self._progress).settle()
        else:
            await Sending(self._connections, self._entries, self._entries).settle()
        self.ended = True
        return [one.reply.error for one in self._entries if one.reply.error is not None]

    def _change(self, entry: Entry, metadata: Pairs, arguments: tuple[Any, ...] | None) -> None:
        """Take in what interceptors have changed before a call goes out."""
        entry.metadata = tuple(metadata)
        if arguments is not None:
            entry.payload, entry.references = self._encode(entry.stub.method, arguments)


class _Departures:
    """The calls of a club of which some are within interceptors, and when they go out.

    Those go out together, one frame for all, that can when no interceptor gets any further by
    itself. Others follow when they can: an interceptor may wait for what another call's holds until
    that call has ended. What a call needs of those that went before it is put in its arguments
    here; for the sake of a single frame calls wait a while for others that need them.

    Args:
        connections: where to.
        entries: all calls of the club.
        progress: where to wait until interceptors let a call go, or a call has ended.
    """

    def __init__(
        self, connections: Endpoints, entries: Sequence[Entry], progress: trio.lowlevel.ParkingLot
    ) -> None:
        self._connections = connections
        self._entries = entries
        self._progress = progress
        self._waiting = list(entries)
        self._over: set[int] = set()  # those that need nothing more from a server, by their index
        self._patient = True

    async def settle(self) -> None:
        """Send the calls, each when it can go out, and wait for all that is around them."""
        within = [one.reply.within for one in self._entries if one.reply.within is not None]
        async with quiet_nursery() as nursery:
            for entry in self._entries:
                if entry.reply.within is not None:
                    nursery.start_soon(entry.reply.within.run, self._before(entry))
            while len(leaving := await self._next()) < len(self._waiting):
                gone = {entry.index for entry in leaving}
                self._waiting = [one for one in self._waiting if one.index not in gone]
                nursery.start_soon(self._send, leaving)
            await self._send(leaving)
            for call in within:
                await call.ended.wait()
        for entry in self._entries:
            if entry.reply.within is not None:
                entry.reply.end(entry.reply.within)

    def _before(self, entry: Entry) -> list[ClubbedCall]:
        """Return the calls that a call needs: whose interceptors must be able to begin before its.

        What they share with its own, and hold across a call, its own would keep from them.
        """
        needed = [self._entries[one.call].reply.within for one in entry.references]
        return [call for call in needed if call is not None]

    async def _next(self) -> list[Entry]:
        """Wait until calls can go out; return them."""
        patient_until, most = trio.current_time() + _PATIENCE, 0
        while True:
            await self._come_to_rest()
            ready = _count_ready(self._waiting)
            if ready > most:
                patient_until, most = trio.current_time() + _PATIENCE, ready
            able = self._able()
            leaving = self._unlinked(able) if self._patient else able
            if leaving:
                return leaving
            with trio.move_on_at(patient_until if able else math.inf) as pause:
                await self._progress.park()
            if pause.cancelled_caught:
                self._patient = False

    async def _come_to_rest(self) -> None:
        """Let interceptors run as far as they get by themselves.

        That is until a few steps of all tasks have brought none further.
        """
        most, steps = _count_ready(self._waiting), 0
        while most < len(self._waiting) and steps < _STEPS:
            await trio.lowlevel.checkpoint()
            steps += 1
            ready = _count_ready(self._waiting)
            if ready > most:
                most, steps = ready, 0

    def _able(self) -> list[Entry]:
        """Return the calls that can go out: what they need is there, or goes with them."""
        able: dict[int, Entry] = {}
        for entry in self._waiting:
            if _is_ready(entry) and all(
                one.call in able or self._has_ended(one.call) for one in entry.references
            ):
                able[entry.index] = entry
        return list(able.values())

    def _has_ended(self, index: int) -> bool:
        within = self._entries[index].reply.within
        return index in self._over or (within is not None and within.settled.is_set())

    def _unlinked(self, able: Sequence[Entry]) -> list[Entry]:
        """Return those of the calls that no reference links to one that can't go out yet."""
        waiting = {entry.index for entry in self._waiting}
        held = waiting.difference(entry.index for entry in able)
        before = 0
        while before < len(held) < len(waiting):
            before = len(held)
            # Both ways, since a call refers to those before it: mostly once is enough.
            for entry in (*self._waiting, *reversed(self._waiting)):
                linked = {entry.index, *(one.call for one in entry.references)} & waiting
                if not held.isdisjoint(linked):
                    held |= linked
        return [entry for entry in able if entry.index not in held]

    async def _send(self, entries: Sequence[Entry]) -> None:
        """Send calls and wait for their replies."""
        sent: list[Entry] = []
        for entry in entries:
            if self._goes_out(entry):
                sent.append(entry)
            else:
                self._end([entry])
        await Sending(self._connections, self._entries, sent).settle()
        self._end(sent)

    def _end(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._over.add(entry.index)
            if entry.reply.within is not None:
                entry.reply.within.settled.set()
        self._progress.unpark_all()

    def _goes_out(self, entry: Entry) -> bool:
        """Whether a call is sent; put results that are there already in place for it."""
        within = entry.reply.within
        if within is not None and within.answered:
            if within.error is not None:
                entry.reply.fail(within.error)
            return False
        values: list[tuple[Reference, bytes]] = []
        try:
            for one in entry.references:
                answer = self._entries[one.call].reply.answer()
                if answer is not None:
                    values.append((one, answer))
            if values:
                most = entry.stub.connections.limits.max_message
                entry.payload = resolve(entry.payload, values, most)
        except RpcError as error:
            entry.reply.fail(error)
            return False
        there = [one for one, _ in values]
        entry.references = tuple(one for one in entry.references if one not in there)
        return True


def _is_ready(entry: Entry) -> bool:
    """Whether interceptors have let a call go, or answered it."""
    return entry.reply.within is None or entry.reply.within.ready.is_set()


def _count_ready(entries: Sequence[Entry]) -> int:
    return sum(_is_ready(entry) for entry in entries)
