"""Clubs: many calls or replies in one frame, and references between a club's calls.

docs/protocol.md, sections 5.1, 5.2 and 5.4. One frame is one MessagePack array, encoded and
decoded in one go; what is checked here is its shape. A call that has only what every call has,
method, flags and payload, takes the short way through both functions.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from druvarpc.errors import RemoteProtocolError, RpcError, Status
from druvarpc.protocol.compression import Decompressor
from druvarpc.protocol.frames import (
    CALLS,
    REPLIES,
    Buffer,
    Metadata,
    Settings,
    check_array,
    check_metadata,
    check_optional_uint,
    check_text,
    check_uint,
    element,
    flatten_metadata,
    frame,
    metadata_size,
    pack,
    shorten,
    show,
    unpack,
    unpack_array,
)
from druvarpc.protocol.lanes import LANES
from druvarpc.protocol.streams import Reference, Stream

MAX_METHODS: Final = 4096
MAX_REFERENCES: Final = 64
MAX_PATH: Final = 16
# What a call takes in a frame beside method, payload and metadata: headers, flags and timeout.
CALL_OVERHEAD: Final = 24

_MORE: Final = 0x01
_LANE: Final = 0x06
_TIMINGS: Final = 0x08
_COMPRESSED: Final = 0x10
_UNKNOWN: Final = 0xF0
_NOT_STARTED: Final = 0x01
_REPLY_COMPRESSED: Final = 0x02
_STATUSES: Final = {int(status): status for status in Status}
_NAME: Final = re.compile(r"[A-Za-z0-9_.]{1,255}")
_MAX_MICROSECONDS: Final = 2**53


@dataclass(frozen=True, slots=True)
class Clubbing:
    """How calls gather.

    Attributes:
        max_calls: calls in one frame at most; 1 sends each by itself.
        max_bytes: bytes in one frame at most, as far as one call alone isn't larger.
        linger: seconds that the first call waits for others. With 0 nothing waits on an idle link:
            what gathers is what starts in the same turn of the event loop, or while the transport
            takes no more.
    """

    max_calls: int = 1024
    max_bytes: int = 64 * 1024
    linger: float = 0.0

    def __post_init__(self) -> None:
        if self.max_calls < 1 or self.max_bytes < 1 or not 0 <= self.linger < 60:
            raise ValueError(f"{self} makes no sense")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reply says beside its payload.

    Attributes:
        details: one MessagePack value, or None.
        not_started: no part of the call was begun.
        timings: microseconds in the server's queue, in the handler, and in which the server's data
            waited for credit, if they were asked for.
    """

    status: Status = Status.OK
    message: str = ""
    details: bytes | None = None
    not_started: bool = False
    trailers: Metadata = ()
    timings: tuple[int, int, int] | None = None


_OK: Final = Outcome()


class MethodNames:
    """The numbers that one connection gave to methods, in the order of their first use.

    Attributes:
        names: by number.
        numbers: by name.
        reserved: names that have, or will get, a number.
    """

    __slots__ = ("names", "numbers", "reserved")

    def __init__(self) -> None:
        self.names: list[str] = []
        self.numbers: dict[str, int] = {}
        self.reserved: set[str] = set()

    def first_use(self, name: str) -> str:
        """Return what stands for a method in its first call: its name, which now has a number."""
        self._add(name)
        return name

    def learn(self, method: object) -> str:
        """Give a number to what stands in the first call of a method, off the wire: its name."""
        if type(method) is not str:
            raise RemoteProtocolError(f"CALLS: method {show(method)} has no name")
        if not _NAME.fullmatch(method):
            raise RemoteProtocolError(f"CALLS: {show(method)} can't be a method's name")
        if method in self.numbers or len(self.names) == MAX_METHODS:
            raise RemoteProtocolError(f"CALLS: method {method} can't be numbered (again)")
        self._add(method)
        return method

    def reserve(self, name: str) -> bool:
        """Make sure that a method that hasn't been called yet will get a number."""
        if len(self.reserved) == MAX_METHODS or not _NAME.fullmatch(name):
            return False
        self.reserved.add(name)
        return True

    def _add(self, name: str) -> None:
        self.numbers[name] = len(self.names)
        self.names.append(name)


def encode_calls(calls: Sequence[Stream], first: int, names: MethodNames, now: float) -> bytes:
    """Return the CALLS frame of calls whose ids follow one another from `first` on."""
    items: list[list[object]] = []
    numbers = names.numbers
    for call in calls:
        flags = call.lane << 1
        if call.more or not call.inline:
            flags |= _MORE
        if call.timings:
            flags |= _TIMINGS
        payload = call.payload
        if call.packed is not None:
            payload = call.packed
            flags |= _COMPRESSED if call.inline else 0
        method = numbers.get(call.method)
        item: list[object] = [
            names.first_use(call.method) if method is None else method,
            flags,
            payload if call.inline else None,
        ]
        if call.deadline is not None or call.metadata or call.references:
            item += _options(call, now)
        items.append(item)
    return frame(CALLS, pack(items), id=first)


def _options(call: Stream, now: float) -> list[object]:
    timeout = None
    if call.deadline is not None:
        timeout = round(min(max(0, (call.deadline - now) * 1e6), _MAX_MICROSECONDS))
    options: list[object] = [timeout]
    if call.metadata or call.references:
        options.append(flatten_metadata(call.metadata))
    if call.references:
        options.append(call.references)
    return options


def decode_calls(
    body: Buffer,
    names: MethodNames,
    accepted: Settings,
    decompressor: Decompressor,
    now: float,
) -> list[Stream]:
    """Return the calls of a CALLS frame, still without ids."""
    array = unpack_array(body, "CALLS", 1)
    most, known = accepted.max_inline, names.names
    if len(array) > accepted.max_club:
        raise RemoteProtocolError(
            f"CALLS: {len(array)} calls in a club, at most {accepted.max_club} are accepted"
        )
    unknown = _UNKNOWN & ~_COMPRESSED if decompressor.accepts else _UNKNOWN
    calls: list[Stream] = []
    for index, item in enumerate(array):
        check_array(item, "CALLS: call", 3)
        method, flags, payload = item if len(item) == 3 else item[:3]
        if type(flags) is not int or flags < 0 or flags & unknown or flags & _LANE == _LANE:
            raise RemoteProtocolError(f"CALLS: flags {show(flags)}")
        if payload is None:
            if not flags & _MORE:
                raise RemoteProtocolError("CALLS: neither a payload nor MORE")
        elif type(payload) is not bytes or len(payload) > most:
            raise RemoteProtocolError(f"CALLS: a payload that isn't at most {most} bytes")
        if flags & _COMPRESSED:
            payload = _decompressed(payload, most, decompressor)
        if type(method) is int and 0 <= method < len(known):
            name = known[method]
        else:
            name = names.learn(method)
        call = Stream(
            name,
            payload,
            more=flags & _MORE != 0,
            lane=LANES[(flags & _LANE) >> 1],
            timings=flags & _TIMINGS != 0,
        )
        if len(item) > 3:
            timeout = element(item, 3)
            if timeout is not None:
                call.deadline = now + check_uint(timeout, "CALLS: timeout") / 1e6
            call.metadata = check_metadata(
                element(item, 4), "CALLS: metadata", accepted.max_metadata
            )
            call.references = _decode_references(element(item, 5), index)
        calls.append(call)
    return calls


def _decompressed(payload: bytes | None, most: int, decompressor: Decompressor) -> bytes:
    if payload is None:
        raise RemoteProtocolError("COMPRESSED without a payload")
    return decompressor.payload(payload, most)


def _decode_references(value: object, index: int) -> tuple[Reference, ...]:
    if value is None:
        return ()
    array = check_array(value, "CALLS: references")
    references = tuple(_decode_reference(item, index) for item in array)
    positions = {reference.position for reference in references}
    if len(positions) < len(array) or len(array) > MAX_REFERENCES:
        raise RemoteProtocolError("CALLS: too many references, or two for one position")
    return references


def _decode_reference(value: object, index: int) -> Reference:
    array = check_array(value, "CALLS: reference", 3)
    path = check_array(array[2], "CALLS: path of a reference")
    if len(path) > MAX_PATH:
        raise RemoteProtocolError("CALLS: path of a reference: too long")
    for step in path:
        if type(step) is not str:
            check_uint(step, "CALLS: step of a reference")
    position = check_uint(array[0], "CALLS: position of a reference")
    call = check_uint(array[1], "CALLS: reference")
    if call >= index:
        raise RemoteProtocolError(f"CALLS: call {index} of a club refers to call {call}")
    return Reference(position, call, tuple(path))


def encode_replies(replies: Sequence[list[object]]) -> bytes:
    """Return the REPLIES frame of replies made by `reply_item`."""
    return frame(REPLIES, pack(replies))


def reply_item(
    id: int, payload: bytes | None, outcome: Outcome | None = None, *, compressed: bool = False
) -> list[object]:
    """Return one reply as it stands in a REPLIES frame."""
    flags = _REPLY_COMPRESSED if compressed else 0
    if outcome is None:
        return [id, payload, None, None, None, flags] if flags else [id, payload]
    if outcome.not_started:
        flags |= _NOT_STARTED
    return [
        id,
        payload,
        int(outcome.status),
        shorten(outcome.message),
        outcome.details,
        flags,
        flatten_metadata(outcome.trailers),
        outcome.timings,
    ]


def decode_replies(
    body: Buffer, accepted: Settings, decompressor: Decompressor
) -> list[tuple[int, bytes | None, Outcome | None]]:
    """Return id, payload and, if it says more than OK, outcome of each reply of a REPLIES frame."""
    replies: list[tuple[int, bytes | None, Outcome | None]] = []
    most = accepted.max_inline
    for item in unpack_array(body, "REPLIES", 1):
        check_array(item, "REPLIES: reply", 2)
        id, payload = item if len(item) == 2 else item[:2]
        if type(id) is not int:
            raise RemoteProtocolError("REPLIES: an id that isn't an integer")
        if payload is not None and (type(payload) is not bytes or len(payload) > most):
            raise RemoteProtocolError(f"REPLIES: a payload that isn't at most {most} bytes")
        outcome = None
        if len(item) > 2:
            flags = check_optional_uint(element(item, 5), "REPLIES: flags")
            outcome = _decode_outcome(item, flags, accepted)
            if outcome.status and payload is not None:
                raise RemoteProtocolError("REPLIES: a payload with a status that isn't OK")
            if flags & _REPLY_COMPRESSED:
                payload = _decompressed(payload, most, decompressor)
                outcome = outcome if outcome != _OK else None
        replies.append((id, payload, outcome))
    return replies


def _decode_outcome(item: list[Any], flags: int, accepted: Settings) -> Outcome:
    number = check_optional_uint(item[2], "REPLIES: status")
    details = element(item, 4)
    if details is not None and (type(details) is not bytes or len(details) > accepted.max_inline):
        raise RemoteProtocolError(
            f"REPLIES: details that aren't at most {accepted.max_inline} bytes"
        )
    known = _NOT_STARTED | _REPLY_COMPRESSED if accepted.compression else _NOT_STARTED
    if flags & 0xFF & ~known or (flags & _NOT_STARTED and not number):
        raise RemoteProtocolError(f"REPLIES: flags {flags:#x}")
    timings = element(item, 7)
    if timings is not None:
        array = check_array(timings, "REPLIES: timings", 2)
        timings = (
            check_uint(array[0], "REPLIES: timings"),
            check_uint(array[1], "REPLIES: timings"),
            check_optional_uint(element(array, 2), "REPLIES: timings"),
        )
    return Outcome(
        _STATUSES.get(number, Status.UNKNOWN),
        check_text(element(item, 3), "REPLIES: message"),
        details,
        bool(flags & _NOT_STARTED),
        check_metadata(element(item, 6), "REPLIES: trailers", accepted.max_metadata),
        timings,
    )


def fits(calls: Sequence[Stream], index: int) -> bool:
    """Tell whether the references of one of a club's calls are such as its receiver accepts."""
    references = calls[index].references
    return (
        len({reference.position for reference in references}) == len(references) <= MAX_REFERENCES
        and all(0 <= reference.call < index for reference in references)
        and all(len(reference.path) <= MAX_PATH for reference in references)
    )


def cut_at(calls: Sequence[Stream], most: int) -> int:
    """Return how many of a club's calls, at most `most`, may go ahead in a frame of their own.

    None of those that stay may refer to one that goes.
    """
    size = len(calls)
    lowest = size
    while size > most or lowest < size:
        size -= 1
        if size <= 0:
            return 0
        lowest = min([lowest, *(reference.call for reference in calls[size].references)])
    return size


def call_size(call: Stream) -> int:
    """Return the bytes that a call takes in a frame, or a few more."""
    size = CALL_OVERHEAD + len(call.method)
    payload = call.packed or call.payload
    if call.inline and payload is not None:
        size += len(payload)
    if call.metadata or call.references:
        size += metadata_size(call.metadata) + len(pack(call.references))
    return size


def resolve(payload: bytes, values: Sequence[tuple[Reference, bytes]], most: int) -> bytes:
    """Return arguments with the results that they refer to in place.

    Args:
        payload: the arguments, MessagePack.
        values: each reference with the result that it refers to, MessagePack.
        most: the greatest size to return, in bytes.

    Raises:
        RpcError: the arguments have no such place, or a result has no such part.
    """
    try:
        arguments = check_array(unpack(payload, _pairs), "the arguments")
    except (ValueError, RemoteProtocolError) as error:
        raise RpcError(Status.INVALID_ARGUMENT, f"no arguments: {error}") from None
    size = len(payload)
    for reference, result in values:
        position = reference.position
        if position >= len(arguments) or arguments[position] is not None:
            raise RpcError(
                Status.INVALID_ARGUMENT, f"argument {position} has no place for a reference"
            )
        size += len(result)
        if size > most:
            raise RpcError(
                Status.RESOURCE_EXHAUSTED,
                f"arguments of more than {most} bytes",
                not_started=True,
            )
        arguments[position] = _part(result, reference)
    try:
        return pack(arguments)
    # An argument is a level deeper than the result that it was. Only from Python 3.12 on do the
    # encoder and the decoder not also share the limit with the functions around them.
    except RecursionError:  # pragma: no cover
        raise RpcError(Status.INVALID_ARGUMENT, "the arguments are nested too deep") from None


def _part(result: bytes, reference: Reference) -> object:
    value: object
    try:
        value = unpack(result)
    except ValueError:
        raise RpcError(
            Status.FAILED_PRECONDITION,
            f"argument {reference.position}: the result referred to is not MessagePack",
            not_started=True,
        ) from None
    for step in reference.path:
        parts = _parts(value, step)
        if step not in parts:
            raise RpcError(
                Status.FAILED_PRECONDITION,
                f"argument {reference.position}: the result referred to has no part {step!r:.80}",
                not_started=True,
            )
        value = parts[step]
    return value


def _parts(value: object, step: str | int) -> Mapping[object, object]:
    """Return the parts of a value that a step of a path can lead to."""
    kind = type(value)
    if type(step) is str and kind is dict:
        return cast("dict[object, object]", value)
    if type(step) is int and kind is list:
        return dict(enumerate(cast("list[object]", value)[step : step + 1], step))
    return {}


def _pairs(pairs: list[tuple[object, object]]) -> dict[object, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found
