"""Explicit clubs: calls that go out together and may use each other's results."""

from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

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
        within = [one.reply.within for one in self._entries if one.reply.within is not None]
        if within:
            await self._settle_within(within)
        else:
            await Sending(self._connections, self._entries, self._entries).settle()
        self.ended = True
        return [one.reply.error for one in self._entries if one.reply.error is not None]

    async def _settle_within(self, within: Sequence[ClubbedCall]) -> None:
        """Send the calls and wait for their replies, some of them within interceptors."""
        async with quiet_nursery() as nursery:
            for call in within:
                nursery.start_soon(call.run)
            for call in within:
                await call.ready.wait()
            sent = [entry for entry in self._entries if self._goes_out(entry)]
            await Sending(self._connections, self._entries, sent).settle()
            for call in within:
                call.settled.set()
            for call in within:
                await call.ended.wait()
        for entry in self._entries:
            if entry.reply.within is not None:
                entry.reply.end(entry.reply.within)

    def _change(self, entry: Entry, metadata: Pairs, arguments: tuple[Any, ...] | None) -> None:
        """Take in what interceptors have changed before a call goes out."""
        entry.metadata = tuple(metadata)
        if arguments is not None:
            entry.payload, entry.references = self._encode(entry.stub.method, arguments)

    def _goes_out(self, entry: Entry) -> bool:
        """Whether a call is sent; put results that interceptors have answered in place for it."""
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
        answered = [one for one, _ in values]
        entry.references = tuple(one for one in entry.references if one not in answered)
        return True
