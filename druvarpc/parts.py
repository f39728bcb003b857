"""Replies of an explicit club (`druvarpc.club`), and parts of them, before and after they come."""

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from druvarpc.calls import Call
from druvarpc.clubbed import ClubbedCall
from druvarpc.codec import ENCODE_ERRORS, unencodable
from druvarpc.errors import RpcError
from druvarpc.protocol import Reference
from druvarpc.protocol.clubs import MAX_PATH
from druvarpc.service import Method

__all__ = ["Ending", "Part", "Reply"]

T = TypeVar("T")


class Ending(Protocol):
    """A club, as far as it matters here."""

    @property
    def ended(self) -> bool:
        """Whether every reply is settled."""
        ...


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

    def reference(self, position: int, club: object) -> Reference:
        """Return the reference that stands for this part as an argument of a call of `club`."""
        return self._reply.index_in(club, position, self._path)


class Reply(Part, Generic[T]):
    """What one call of a club will return."""

    __slots__ = ("_call", "_club", "_error", "_index", "_method", "_value", "within")

    def __init__(self, club: Ending, index: int, method: Method) -> None:
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

    def index_in(self, club: object, position: int, path: tuple[str | int, ...]) -> Reference:
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
        """Return the result as it has come, or would have if interceptors hadn't answered.

        None if there is none, or not yet.

        Raises:
            RpcError: it can't be encoded.
        """
        if self.within is not None and self.within.answered:
            if self.within.error is not None:
                return None
            try:
                return self._method.encode_result(self.within.value)
            except ENCODE_ERRORS as error:
                raise unencodable(f"{self._method.name}: result", error) from error
        call = self._call
        return None if call is None or not call.done or call.failed else call.result

    def fail(self, error: Exception) -> None:
        """Note that the call couldn't be made."""
        self._error = error
