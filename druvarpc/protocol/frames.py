"""Frame types, their headers and the bodies that aren't clubs (docs/protocol.md, sections 2 to 5).

A frame on the wire is a 12-byte header and a body. `KINDS` is the table of what a header may say;
`check_header` holds one against it before the body is awaited. The functions `decode_*` turn a body
into Python values and raise `RemoteProtocolError` for anything that the specification forbids; the
functions `encode_*` return whole frames.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from struct import Struct
from typing import Any, Final, NamedTuple, cast

import msgpack
import msgspec

from druvarpc.errors import CloseCode, LocalProtocolError, RemoteProtocolError

MAGIC: Final = b"\x8bDRUVA\n"
VERSION: Final = 1
PREFACE: Final = MAGIC + bytes([VERSION])

# type << 24 | length, flags << 56 | id: two fields are quicker to pack than four.
_HEADER: Final = Struct("!IQ")
HEADER_SIZE: Final = _HEADER.size
unpack_header: Final = _HEADER.unpack_from

SETTINGS: Final = 0x01
PING: Final = 0x02
PONG: Final = 0x03
GOAWAY: Final = 0x04
CREDIT: Final = 0x05
AUTH: Final = 0x06
CALLS: Final = 0x10
REPLIES: Final = 0x11
DATA: Final = 0x12
RESET: Final = 0x13
METADATA: Final = 0x14

END_MESSAGE: Final = 0x01
END_STREAM: Final = 0x02
COMPRESSED: Final = 0x04  # only where the receiver has announced that it decompresses

MAX_ID: Final = 2**56 - 1
MAX_WINDOW: Final = 2**31 - 1
# Charged for a DATA frame beside its bytes: about what a queued one-byte message takes in memory.
FRAME_COST: Final = 64
MAX_FIRST_FRAME: Final = 4096
MAX_TEXT: Final = 1024
MAX_TOKEN: Final = 16384
MAX_PAIRS: Final = 64
MAX_CREDITS: Final = 1024
MAX_KEY: Final = 255
PAIR_COST: Final = 32
# What is sent at most, whatever the peer takes: a club's frame must hold it beside a payload.
MAX_METADATA: Final = 16 * 1024

Metadata = Sequence[tuple[str, str | bytes]]
Buffer = bytes | bytearray | memoryview


class Role(StrEnum):
    """Which end of the connection this is."""

    CLIENT = "client"
    SERVER = "server"


class _Kind(NamedTuple):
    name: str
    senders: tuple[Role, ...]
    flags: int = 0
    has_id: bool | None = False  # None: any id will do
    has_body: bool = True


_BOTH: Final = (Role.CLIENT, Role.SERVER)
KINDS: Final = {
    SETTINGS: _Kind("SETTINGS", _BOTH),
    PING: _Kind("PING", _BOTH, has_id=None, has_body=False),
    PONG: _Kind("PONG", _BOTH, has_id=None, has_body=False),
    GOAWAY: _Kind("GOAWAY", _BOTH, has_id=None),
    CREDIT: _Kind("CREDIT", _BOTH),
    AUTH: _Kind("AUTH", (Role.CLIENT,)),
    CALLS: _Kind("CALLS", (Role.CLIENT,), has_id=True),
    REPLIES: _Kind("REPLIES", (Role.SERVER,)),
    DATA: _Kind("DATA", _BOTH, flags=END_MESSAGE | END_STREAM, has_id=True),
    RESET: _Kind("RESET", (Role.CLIENT,), has_id=True),
    METADATA: _Kind("METADATA", (Role.SERVER,), has_id=True),
}
FIRST_IGNORED_TYPE: Final = 0x80


@dataclass(frozen=True, slots=True)
class Settings:
    """What an endpoint accepts; the defaults hold until its SETTINGS have arrived.

    Attributes:
        max_frame: bytes in one frame's body.
        max_calls: calls open at once.
        max_club: calls in one CALLS frame.
        max_inline: bytes of one payload inside CALLS or REPLIES.
        stream_window: initial credit of each stream, in bytes.
        connection_window: initial credit of the connection, in bytes.
        max_metadata: size of the metadata of one call or reply, in bytes.
        compression: the algorithms that payloads and messages may be compressed by, as bits.
    """

    max_frame: int = 65_536
    max_calls: int = 64
    max_club: int = 64
    max_inline: int = 4_096
    stream_window: int = 65_536
    connection_window: int = 65_536
    max_metadata: int = 8_192
    compression: int = 0

    def __post_init__(self) -> None:
        for field, greatest in zip(fields(self), _GREATEST, strict=True):
            value = getattr(self, field.name)
            if not field.default <= value <= greatest:
                raise ValueError(
                    f"{field.name} must be {field.default} to {greatest}, not {value!r}"
                )


# In the order of the fields, whose keys on the wire count from 1.
_GREATEST: Final = (
    *(16_777_215, 1_000_000, 65_536, 32_768, MAX_WINDOW, MAX_WINDOW, 1_048_576),
    255,
)
_SETTING_NAMES: Final = dict(enumerate((field.name for field in fields(Settings)), start=1))


def frame(kind: int, body: bytes = b"", *, flags: int = 0, id: int = 0) -> bytes:
    """Return a whole frame."""
    return _HEADER.pack(kind << 24 | len(body), flags << 56 | id) + body


def data_header(length: int, flags: int, id: int) -> bytes:
    """Return the header of a DATA frame, whose body is sent as it is behind it."""
    return _HEADER.pack(DATA << 24 | length, flags << 56 | id)


def check_header(kind: int, length: int, flags: int, id: int, sender: Role) -> None:
    """Refuse a header that the specification forbids, whatever its body will be."""
    known = KINDS.get(kind)
    if known is None:
        if kind < FIRST_IGNORED_TYPE:
            raise RemoteProtocolError(f"unknown frame type {kind:#04x}")
        return
    name = known.name
    if sender not in known.senders:
        raise RemoteProtocolError(f"{name} from the {sender}")
    if flags & 0x0F & ~known.flags:
        raise RemoteProtocolError(f"unknown flags {flags:#04x} on {name}")
    if known.has_id is not None and known.has_id != (id > 0):
        raise RemoteProtocolError(f"{name} with id {id}")
    if length and not known.has_body:
        raise RemoteProtocolError(f"{name} with a body of {length} bytes")


# The decoder is msgspec's, since msgpack's makes room for as many elements as an array declares
# before it has seen them: a thousand arrays in each other are 80 MB for 5 KB.
_decode: Final = msgspec.msgpack.Decoder().decode
_UNPACK_ERRORS: Final = (
    msgspec.DecodeError,
    ValueError,
    TypeError,
    OverflowError,
    RecursionError,
)
pack: Final = msgspec.msgpack.Encoder().encode


def unpack(data: Buffer, pairs: Callable[[list[tuple[Any, Any]]], object] | None = None) -> Any:
    """Return the value that MessagePack off the wire stands for.

    Args:
        data: the value, and nothing else.
        pairs: is shown the pairs of every map, and may raise ValueError.

    Raises:
        ValueError: it isn't MessagePack, or `pairs` refuses it.
    """
    try:
        value = _decode(data)
        if pairs is not None:
            # After the other: what that has accepted declares no more than it holds.
            msgpack.unpackb(data, strict_map_key=False, object_pairs_hook=pairs)
    except _UNPACK_ERRORS as error:
        raise ValueError(f"not MessagePack: {type(error).__name__}") from None
    return value


def unpack_array(body: Buffer, name: str, least: int = 0) -> list[Any]:
    """Return the array that a body is; its elements are still unchecked."""
    try:
        value = unpack(body)
    except ValueError as error:
        raise RemoteProtocolError(f"{name}: {error}") from None
    return check_array(value, name, least)


def show(value: object) -> str:
    """Return a value off the wire for a message; the repr of a nested one can be too deep."""
    if isinstance(value, str):
        value = value[:80]
    return repr(value) if isinstance(value, str | int) else type(value).__name__


def check_array(value: object, name: str, least: int = 0) -> list[Any]:
    """Return `value` if it is an array of at least `least` elements."""
    kind = type(value)
    if kind is not list:
        raise RemoteProtocolError(f"{name}: {kind.__name__} instead of an array")
    array = cast("list[Any]", value)
    if len(array) < least:
        raise RemoteProtocolError(f"{name}: {len(array)} elements instead of {least}")
    return array


def check_uint(value: object, name: str, greatest: int = 2**64 - 1) -> int:
    """Return `value` if it is an integer from 0 to `greatest`."""
    if type(value) is not int or not 0 <= value <= greatest:
        raise RemoteProtocolError(f"{name}: {show(value)} is not an integer up to {greatest}")
    return value


def check_optional_uint(value: object, name: str) -> int:
    """Return `value` if it is an integer; None is 0."""
    return 0 if value is None else check_uint(value, name)


def check_text(value: object, name: str, most: int = MAX_TEXT) -> str:
    """Return `value` if it is a string of at most `most` bytes; None is the empty string."""
    if value is None:
        return ""
    if type(value) is not str or len(value.encode()) > most:
        raise RemoteProtocolError(f"{name}: not a string of at most {most} bytes")
    return value


def element(array: list[Any], position: int) -> Any:
    """Return the element at an optional position, None if it was left out."""
    return array[position] if position < len(array) else None


def encode_settings(settings: Settings) -> bytes:
    """Return the SETTINGS frame, without those that are at their defaults."""
    default = Settings()
    body: list[int] = []
    for key, name in _SETTING_NAMES.items():
        if (value := getattr(settings, name)) != getattr(default, name):
            body += (key, value)
    return frame(SETTINGS, pack(body))


def decode_settings(body: Buffer) -> Settings:
    """Return what the peer accepts."""
    array = unpack_array(body, "SETTINGS")
    if len(array) % 2 or len(array) > 2 * MAX_PAIRS:
        raise RemoteProtocolError(f"SETTINGS: {len(array)} elements")
    keys, values = array[::2], array[1::2]
    found = {
        check_uint(key, "SETTINGS: key"): value for key, value in zip(keys, values, strict=True)
    }
    if len(found) < len(keys):
        raise RemoteProtocolError("SETTINGS: a key twice")
    known = {
        name: check_uint(found[key], f"SETTINGS: {name}")
        for key, name in _SETTING_NAMES.items()
        if key in found
    }
    try:
        return Settings(**known)
    except ValueError as error:
        raise RemoteProtocolError(f"SETTINGS: {error}") from None


def encode_reason(kind: int, code: int, message: str, *, id: int) -> bytes:
    """Return a GOAWAY or RESET frame."""
    return frame(kind, pack([code, shorten(message)] if message else [code]), id=id)


def decode_reason(body: Buffer, name: str) -> tuple[int, str]:
    """Return code and message of a GOAWAY or RESET."""
    array = unpack_array(body, name, 1)
    return check_uint(array[0], f"{name}: code"), check_text(element(array, 1), f"{name}: message")


def shorten(text: str, most: int = MAX_TEXT) -> str:
    """Return as much of a text as fits in `most` bytes of UTF-8."""
    return text.encode(errors="replace")[:most].decode(errors="ignore")


def encode_credits(credits: Iterable[tuple[int, int]]) -> bytes:
    """Return the CREDIT frame that gives each id its bytes."""
    return frame(CREDIT, pack([number for pair in credits for number in pair]))


def decode_credits(body: Buffer) -> list[tuple[int, int]]:
    """Return the pairs of id and bytes of a CREDIT."""
    array = unpack_array(body, "CREDIT", 2)
    if len(array) % 2 or len(array) > 2 * MAX_CREDITS:
        raise RemoteProtocolError(f"CREDIT: {len(array)} elements")
    pairs: list[tuple[int, int]] = []
    for id, size in zip(array[::2], array[1::2], strict=True):
        check_uint(id, "CREDIT: id")
        check_uint(size, "CREDIT: bytes")
        if not 0 < size <= MAX_WINDOW:
            raise RemoteProtocolError(f"CREDIT of {size} bytes", CloseCode.FLOW_CONTROL_ERROR)
        pairs.append((id, size))
    return pairs


def flatten_metadata(metadata: Metadata) -> list[str | bytes]:
    """Return metadata as its array on the wire."""
    return [text for pair in metadata for text in pair]


def metadata_size(metadata: Metadata) -> int:
    """Return what metadata count against `max_metadata`, in bytes."""
    return sum(
        PAIR_COST
        + len(key.encode())
        + (len(value.encode()) if isinstance(value, str) else len(value))
        for key, value in metadata
    )


def check_metadata(value: object, name: str, most: int) -> Metadata:
    """Return the pairs of a metadata array; None is no metadata."""
    if value is None:
        return ()
    array = check_array(value, name)
    if len(array) % 2 or len(array) > 2 * MAX_PAIRS:
        raise RemoteProtocolError(f"{name}: {len(array)} elements")
    pairs = list(zip(array[::2], array[1::2], strict=True))
    for key, item in pairs:
        if not check_text(key, f"{name}: key", MAX_KEY):
            raise RemoteProtocolError(f"{name}: an empty key")
        if type(item) is not str and type(item) is not bytes:
            raise RemoteProtocolError(f"{name}: value: {type(item).__name__}")
    if metadata_size(pairs) > most:
        raise RemoteProtocolError(f"{name}: more than {most} bytes")
    return pairs


def check_outgoing_metadata(metadata: Metadata, most: int) -> None:
    """Refuse metadata that the peer would refuse."""
    try:
        size = metadata_size(metadata)
    except UnicodeEncodeError:
        size = most + 1
    most = min(most, MAX_METADATA)
    if size > most or len(metadata) > MAX_PAIRS:
        raise LocalProtocolError(f"metadata above {most} bytes or {MAX_PAIRS} pairs, or not text")
    if not all(1 <= len(key.encode()) <= MAX_KEY for key, _ in metadata):
        raise LocalProtocolError(f"a key of metadata that isn't 1 to {MAX_KEY} bytes")


def encode_metadata(id: int, metadata: Metadata) -> bytes:
    """Return the METADATA frame of a call."""
    return frame(METADATA, pack(flatten_metadata(metadata)), id=id)


def decode_metadata(body: Buffer, most: int) -> Metadata:
    """Return the metadata that a METADATA frame carries."""
    return check_metadata(unpack_array(body, "METADATA"), "METADATA", most)


def encode_auth(token: str, metadata: Metadata = ()) -> bytes:
    """Return the AUTH frame with a token."""
    return frame(AUTH, pack([token, flatten_metadata(metadata)] if metadata else [token]))


def decode_auth(body: Buffer, most: int) -> tuple[str, Metadata]:
    """Return token and metadata of an AUTH."""
    array = unpack_array(body, "AUTH", 1)
    if array[0] is None:
        raise RemoteProtocolError("AUTH: no token")
    token = check_text(array[0], "AUTH: token", MAX_TOKEN)
    return token, check_metadata(element(array, 1), "AUTH: metadata", most)
