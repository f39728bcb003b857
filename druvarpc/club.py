"""Explicit clubs: calls that go out together and may use each other's results."""

import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import trio

from druvarpc.calls import Call, Calls
from druvarpc.endpoints import Endpoints
from druvarpc.errors import RpcError, Status
from druvarpc.protocol import Reference
from druvarpc.protocol.clubs import MAX_PATH, MAX_REFERENCES, call_size
from druvarpc.protocol.wire import MAX_CLUB
from druvarpc.retries import Attempts, may_fare_better
from druvarpc.service import Method
from druvarpc.stubs import UnaryMethod, unary_method

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

    __slots__ = ("_call", "_club", "_error", "_index", "_method", "_value")

    def __init__(self, club: "Club", index: int, method: Method) -> None:
        super().__init__(self, ())
        self._club = club
        self._index = index
        self._method = method
        self._call: Call | None = None
        self._value: T | None = None
        self._error: Exception | None = None

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

    def index_in(self, club: "Club", position: int, path: tuple[str | int, ...]) -> Reference:
        """See `Part.reference`."""
        if club is not self._club:
            raise ValueError(f"{self!r} belongs to another club")
        return Reference(position, self._index, path)

    def begin(self, call: Call) -> None:
        """Note the call that was made for this reply."""
        self._call, self._error = call, None

    def abandon(self) -> None:
        """Abandon the call if it hasn't ended."""
        if self._call is not None:
            self._call.calls.abandon(self._call)

    async def settle(self) -> None:
        """Wait for the call, and keep what it returned or why it failed."""
        if self._error is not None:
            return
        assert self._call is not None
        try:
            self._value = self._method.decode_result(await self._call.calls.result(self._call))
        except RpcError as error:
            self._error = error

    def fail(self, error: Exception) -> None:
        """Note that the call couldn't be made."""
        self._error = error


@dataclass(slots=True)
class _Entry:
    """One call of a club.

    Attributes:
        index: in the club.
        deadline: of the scopes that it was added in.
    """

    index: int
    stub: UnaryMethod
    payload: bytes
    references: tuple[Reference, ...]
    reply: Reply[Any]
    deadline: float

    def make(self, calls: Calls) -> Call:
        """Return a new call."""
        options = self.stub.options
        call = Call(
            calls,
            self.stub.method.name,
            self.payload,
            lane=options.lane,
            metadata=options.metadata,
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
        return isinstance(error, RpcError) and may_fare_better(
            error, idempotent=self.stub.method.idempotent
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
        reply: Reply[T] = Reply(self, len(self._entries), row)
        deadline = trio.current_effective_deadline()
        self._entries.append(_Entry(len(self._entries), stub, payload, references, reply, deadline))
        return reply

    async def settle(self) -> list[Exception]:
        """Send the calls, wait for all replies and return the errors; cancelled, abandon them."""
        entries = self._entries
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
            for entry in self._entries:
                entry.reply.abandon()
        self.ended = True
        return [one.reply.error for one in self._entries if one.reply.error is not None]

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
        failed = [one for one in self._entries if one.may_be_repeated()]
        if not any(one.references for one in self._entries):
            return failed
        if failed and all(one.may_be_repeated() or one.was_in_vain() for one in self._entries):
            return self._entries
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
