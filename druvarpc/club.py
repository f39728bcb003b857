"""Explicit clubs: calls that go out together and may use each other's results."""

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar

import trio

from druvarpc.calls import Call, Calls
from druvarpc.connections import Connections
from druvarpc.errors import ConnectionLost, RpcError, Status
from druvarpc.protocol import Reference
from druvarpc.protocol.clubs import MAX_PATH, MAX_REFERENCES, call_size
from druvarpc.protocol.wire import MAX_CLUB
from druvarpc.service import Method
from druvarpc.stubs import unary_method

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
        self._call = call

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


class Club:
    """Calls that go out in one frame when the block of `Client.club` ends.

    Attributes:
        closed: no call can be added any more.
        ended: every reply is settled.
    """

    def __init__(self, connections: Connections) -> None:
        self.closed = False
        self.ended = False
        self._connections = connections
        self._begun: list[tuple[Reply[Any], Call]] = []

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
        reply: Reply[T] = Reply(self, len(self._begun), row)
        call = Call(
            self._connections.only or self._connections.choose(0, stub.options.lane),
            row.name,
            payload,
            lane=stub.options.lane,
            metadata=stub.options.metadata,
            references=references,
        )
        if stub.options.special:
            stub.options.apply(call)
        reply.begin(call)
        self._begun.append((reply, call))
        return reply

    async def settle(self) -> list[Exception]:
        """Send the calls, wait for all replies and return the errors; cancelled, abandon them."""
        try:
            self._submit()
            for reply, _ in self._begun:
                await reply.settle()
        finally:
            for _, call in self._begun:
                call.calls.abandon(call)
        if any(isinstance(reply.error, ConnectionLost) for reply, _ in self._begun):
            # Maybe since what cancels this task has ended the connection a moment before.
            await trio.lowlevel.checkpoint_if_cancelled()
        self.ended = True
        return [reply.error for reply, _ in self._begun if reply.error is not None]

    def _submit(self) -> None:
        """Send the calls in as few frames as the server's limits allow."""
        if not self._begun:
            return
        size = sum(len(call.payload or b"") for _, call in self._begun)
        lane = self._begun[0][1].lane
        calls = self._connections.only or self._connections.choose(size, lane)
        peer = calls.session.core.peer
        most = min(peer.max_club, peer.max_calls)
        # Calls that need each other must share a frame, however large. Others do better in several:
        # the server begins with the first while the next are on their way.
        bound = any(call.references for _, call in self._begun)
        places: dict[int, int] = {}  # in the frame, by the index in the club
        room = MAX_CLUB
        for index, (reply, call) in enumerate(self._begun):
            size = call_size(call)
            room -= size
            if len(places) == most or (places and room < 0 and not bound):
                self._send(calls, places)
                places, room = {}, MAX_CLUB - size
            missing = next((one.call for one in call.references if one.call not in places), None)
            if missing is not None:
                reply.fail(self._unreachable(call, missing))
                continue
            call.references = tuple(one._replace(call=places[one.call]) for one in call.references)
            places[index] = len(places)
        if places:
            self._send(calls, places)

    def _send(self, calls: Calls, indices: Iterable[int]) -> None:
        """Send some of the calls in one frame."""
        part = [self._begun[index] for index in indices]
        for _, call in part:
            call.lane = part[0][1].lane
            call.calls = calls
        try:
            calls.submit_club([call for _, call in part])
        except RpcError as error:
            for reply, _ in part:
                reply.fail(error)

    def _unreachable(self, call: Call, index: int) -> RpcError:
        """Return the error of a call that refers to one which isn't in the same frame."""
        if self._begun[index][0].error is not None:
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
