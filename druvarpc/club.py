"""Explicit clubs: calls that go out together and may use each other's results."""

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import trio

from druvarpc.calls import Call, Calls
from druvarpc.clubbed import ClubbedCall
from druvarpc.codec import ENCODE_ERRORS, unencodable
from druvarpc.endpoints import Endpoints
from druvarpc.errors import RpcError, Status
from druvarpc.protocol import Reference
from druvarpc.protocol.clubs import MAX_PATH, MAX_REFERENCES, call_size, resolve
from druvarpc.protocol.wire import MAX_CLUB
from druvarpc.replies import Pairs
from druvarpc.retries import Attempts, may_fare_better, renewable
from druvarpc.service import Method
from druvarpc.session import quiet_nursery
from druvarpc.stubs import InterceptedUnary, UnaryMethod, unary_method

T = TypeVar("T")


class Part:
    """A part of a reply that isn't there yet, to be used as an argument of a later call.

    Made by `reply["field"]`, `reply[0]` or `reply.field("name")`, and by the same on a part.
    """

    __slots__ = ("_path", "_reply")

    def __init__(self, reply: "Reply[Any]", path: tuple[str | int, ...]) -> None:
        self._reply = reply
        self._path = path

    def __getitem__(self, step: str | int) -> "Part":
        if type(step) is not str and (type(step) is not int or step < 0):
            raise TypeError(f"a part of a reply is a key or an index from 0, not {step!r}")
        if len(self._path) == MAX_PATH:
            raise ValueError(f"a part of a reply lies at most {MAX_PATH} steps deep")
        return Part(self._reply, (*self._path, step))

    def __iter__(self) -> Any:
        # Python would make an endless loop of __getitem__.
        raise TypeError("a reply can't be iterated before it has come")

    def field(self, name: str) -> "Part":
        """Return the part that is a field of a dataclass or a key of a map."""
        return self[name]

    def reference(self, position: int, club: "Club") -> Reference:
        """Return the reference that stands for this part as an argument of a call of `club`."""
        return self._reply.index_in(club, position, self._path)


class Reply(Part, Generic[T]):
    """What one call of a club will return."""

    __slots__ = ("_call", "_club", "_error", "_index", "_method", "_value", "within")

    def __init__(self, club: "Club", index: int, method: Method) -> None:
        super().__init__(self, ())
        self._club = club
        self._index = index
        self._method = method
        self._call: Call | None = None
        self._value: T | None = None
        self._error: Exception | None = None
        self.within: ClubbedCall | None = None  # interceptors

    def __repr__(self) -> str:
        return f"<reply {self._index} of a club, {self._method.name}>"

    @property
    def value(self) -> T:
        """What the call returned.

        Raises:
            RuntimeError: the club's block hasn't ended.
            RpcError: the call failed.
        """
        if not self._club.ended:
            raise RuntimeError(
                "a reply has a value once its club's block has ended without raising"
            )
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # set when there is no error

    @property
    def error(self) -> Exception | None:
        """Why the call failed, None if it didn't, or hasn't ended."""
        return self._error

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """What the server sent ahead of the reply; of equal keys, the last."""
        return {} if self._call is None else dict(self._call.metadata_ahead)

    @property
    def trailers(self) -> Mapping[str, str | bytes]:
        """What the server sent with the reply, also one that failed; of equal keys, the last."""
        outcome = None if self._call is None else self._call.outcome
        return {} if outcome is None else dict(outcome.trailers)

    def index_in(self, club: "Club", position: int, path: tuple[str | int, ...]) -> Reference:
        """See `Part.reference`."""
        if club is not self._club:
            raise ValueError(f"{self!r} belongs to another club")
        return Reference(position, self._index, path)

    def begin(self, call: Call) -> None:
        """Note the call that was made for this reply."""
        self._call, self._error = call, None
        if self.within is not None:
            self.within.begin(call)

    def abandon(self) -> None:
        """Abandon the call if it hasn't ended."""
        if self._call is not None:
            self._call.calls.abandon(self._call)

    async def settle(self) -> None:
        """Wait for the call, and keep what it returned or why it failed."""
        if self._error is None:
            try:
                self._value = await self.result()
            except RpcError as error:
                self._error = error

    async def result(self) -> T:
        """Wait for the call, and return what it returned."""
        if self._error is not None:
            raise self._error
        assert self._call is not None
        result: T = self._method.decode_result(await self._call.calls.result(self._call))
        return result

    def end(self, within: ClubbedCall) -> None:
        """Keep what came of the interceptors around the call."""
        self._value, self._error = within.value, within.error

    def answer(self) -> bytes | None:
        """Return what interceptors answered in the call's place, as it would have come.

        None if they haven't.

        Raises:
            RpcError: it can't be encoded.
        """
        if self.within is None or not self.within.answered or self.within.error is not None:
            return None
        try:
            return self._method.encode_result(self.within.value)
        except ENCODE_ERRORS as error:
            raise unencodable(f"{self._method.name}: result", error) from error

    def fail(self, error: Exception) -> None:
        """Note that the call couldn't be made."""
        self._error = error


@dataclass(slots=True)
class _Entry:
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
        self._entries: list[_Entry] = []
        self._sent: list[_Entry] = []  # those that interceptors left

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
        entry = _Entry(len(self._entries), stub, payload, references, reply, metadata, deadline)
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
            self._sent = self._entries
            await self._settle_sent()
        self.ended = True
        return [one.reply.error for one in self._entries if one.reply.error is not None]

    async def _settle_within(self, within: Sequence[ClubbedCall]) -> None:
        """Send the calls and wait for their replies, some of them within interceptors."""
        async with quiet_nursery() as nursery:
            for call in within:
                nursery.start_soon(call.run)
            for call in within:
                await call.ready.wait()
            for entry in self._entries:
                if self._goes_out(entry):
                    self._sent.append(entry)
            await self._settle_sent()
            for call in within:
                call.settled.set()
            for call in within:
                await call.ended.wait()
        for entry in self._entries:
            if entry.reply.within is not None:
                entry.reply.end(entry.reply.within)

    def _change(self, entry: _Entry, metadata: Pairs, arguments: tuple[Any, ...] | None) -> None:
        """Take in what interceptors have changed before a call goes out."""
        entry.metadata = tuple(metadata)
        if arguments is not None:
            entry.payload, entry.references = self._encode(entry.stub.method, arguments)

    def _goes_out(self, entry: _Entry) -> bool:
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

    async def _settle_sent(self) -> None:
        entries = self._sent
        attempts = None
        try:
            while entries:
                sent = self._try_to_submit(entries)
                if sent and attempts is not None:
                    attempts.begun(len(entries))
                for entry in entries:
                    await entry.reply.settle()
                entries = self._to_repeat()
                if entries:
                    options = entries[0].stub.options
                    attempts = attempts or Attempts(
                        self._connections, options, idempotent=True, sent=sent
                    )
                    await attempts.pause(self._reason(entries), len(entries))
        except RpcError:
            pass  # there is no other attempt: each keeps the error that it has
        finally:
            for entry in self._sent:
                entry.reply.abandon()

    def _try_to_submit(self, entries: Sequence[_Entry]) -> bool:
        """Send calls; return whether there is a connection for that."""
        try:
            self._submit(entries)
        except RpcError as error:
            for entry in entries:
                entry.reply.fail(error)
            return False
        return True

    def _to_repeat(self) -> list[_Entry]:
        """Return the calls that are made again: none, those that failed, or all.

        Calls that need results of others are made again with them, so only if none has run.
        """
        sent = self._sent
        failed = [one for one in sent if one.may_be_repeated()]
        if not any(one.references for one in sent):
            return failed
        if failed and all(one.may_be_repeated() or one.was_in_vain() for one in sent):
            return sent
        return []

    def _reason(self, entries: Sequence[_Entry]) -> RpcError:
        """Return the error that says most of when to make calls again."""
        errors = [one.reply.error for one in entries if one.may_be_repeated()]
        return max(
            (error for error in errors if isinstance(error, RpcError)),
            key=lambda error: error.retry_after or 0.0,
        )

    def _submit(self, entries: Sequence[_Entry]) -> None:
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
        frame: list[tuple[_Entry, Call]] = []
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

    def _send(self, calls: Calls, frame: Sequence[tuple[_Entry, Call]]) -> None:
        """Send some of the calls in one frame."""
        try:
            calls.submit_club([call for _, call in frame])
        except RpcError as error:
            for entry, _ in frame:
                entry.reply.fail(error)

    def _unreachable(self, call: Call, index: int) -> RpcError:
        """Return the error of a call that refers to one which isn't in the same frame."""
        if self._entries[index].reply.error is not None:
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
