"""Typed values to bytes and back.

Every value that a call carries is one MessagePack value, written and checked against its
annotation by msgspec; items of a stream of buffers are the exception and travel as they are.
A decoder is built once, when a service is defined: `message_decoder` for results and items,
`arguments_decoder` for the array of a call's arguments, `buffer_decoder` for raw pieces. What they
raise for anything a peer can send is `RpcError` with `INVALID_ARGUMENT`, whose message names the
value ("Vault.put: argument chunk.digest: Expected `bytes`, got `int`").

msgspec is silent about a key that stands twice in a map (the last one wins), so that two readers
of the same bytes could disagree. Types that can hold a map are therefore scanned a second time
with msgpack, which hands over the pairs. Types without maps, the hot path, are not. The scan looks
at keys as they were sent: "1.0" and "1.00" are two keys, also where the annotation turns both into
the same `Decimal`.
"""

import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Union, get_args, get_origin

import msgpack
import msgspec
from msgspec import UNSET, UnsetType, inspect
from msgspec.structs import astuple

from druvarpc.errors import RpcError, Status
from druvarpc.unions import Choice, choose, expand_alias, replace_unions

__all__ = [
    "ENCODE_ERRORS",
    "arguments_decoder",
    "buffer_decoder",
    "caller_encoder",
    "contains_map",
    "encode_message",
    "item_codec",
    "message_decoder",
    "printable",
    "unencodable",
]

# Bounds what one malformed value adds to a reply and to a log; names and reason fit in it.
MAX_MESSAGE = 300

# What msgspec and memoryview raise for a value that has no encoding.
ENCODE_ERRORS = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)

# What msgspec and msgpack raise for bytes that don't fit. An annotated class may raise ValueError
# or TypeError to refuse a value; any other exception from its code is a bug and passes through.
_DECODE_ERRORS = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)

# msgspec ends its messages with the place: "… - at `$[0].digest`", "… - at `key` in `$[0]`".
_PLACE = re.compile(r"(?s)(.*) - at (`key` in )?`\$([^`]*)`")
_ARGUMENT = re.compile(r"\[(\d+)\](.*)")

encode_message: Callable[[object], bytes] = msgspec.msgpack.Encoder().encode


def printable(text: str) -> str:
    """One line of at most `MAX_MESSAGE` characters, with what is not printable escaped."""
    line = text[: MAX_MESSAGE + 1]
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"


# --- what a type can hold ---


# Nodes that are or admit a map. CustomType is `object` here: contains_map refuses all others.
_OPEN_TYPES = (inspect.AnyType, inspect.RawType, inspect.DictType, inspect.CustomType)


def contains_map(annotation: object) -> bool:
    """Tell whether a value of this type can hold a MessagePack map.

    Raises:
        TypeError: the type, or one inside it, can't be converted.
        NameError: an annotation inside it can't be resolved (yet).
    """
    # A choice holds what its members hold, which are nodes too.
    nodes = [n for n in _nodes(inspect.type_info(replace_unions(annotation))) if not _is_choice(n)]
    for node in nodes:
        if isinstance(node, inspect.CustomType) and node.cls not in {object, UnsetType}:
            raise TypeError(f"{node.cls.__name__} can't be converted to MessagePack")
        # The scan refuses them, because hashing a map within a key within a map is quadratic.
        if isinstance(node, inspect.DictType) and any(map(_is_record, _nodes(node.key_type))):
            raise TypeError("a dict whose keys are records can't be converted to MessagePack")
    return any(isinstance(node, _OPEN_TYPES) or _is_record(node) for node in nodes)


def _is_choice(node: inspect.Type) -> bool:
    return isinstance(node, inspect.CustomType) and isinstance(node.cls, Choice)


def _is_record(node: inspect.Type) -> bool:
    if isinstance(node, inspect.StructType):
        return not node.array_like
    return isinstance(node, inspect.DataclassType | inspect.TypedDictType)


def _nodes(root: inspect.Type) -> Iterator[inspect.Type]:
    """The node and all below it, each once: a recursive type is a cycle."""
    seen = {id(root)}
    pending = [root]
    while pending:
        node = pending.pop()
        yield node
        for child in _children(node):
            if id(child) not in seen:
                seen.add(id(child))
                pending.append(child)


def _children(node: inspect.Type) -> Sequence[inspect.Type]:
    match node:
        case inspect.Metadata():
            return (node.type,)
        case inspect.UnionType():
            return node.types
        case inspect.CustomType() if isinstance(node.cls, Choice):
            return node.cls.nodes
        case inspect.DictType():
            return (node.key_type, node.value_type)
        case inspect.TupleType():
            return node.item_types
        case (
            inspect.ListType()
            | inspect.VarTupleType()
            | inspect.SetType()
            | inspect.FrozenSetType()
        ):
            return (node.item_type,)
        case (
            inspect.StructType()
            | inspect.DataclassType()
            | inspect.TypedDictType()
            | inspect.NamedTupleType()
        ):
            return [field.type for field in node.fields]
        case _:
            return ()


# --- raw buffers ---


def _encode_buffer(item: Any) -> bytes:
    """The bytes of any object with the buffer protocol.

    Only `bytes` is passed on without a copy: what can still change must not lie in a queue.

    Raises:
        TypeError: the object has no buffer.
    """
    # Not bytes(item), which would accept an int or a list.
    return item if type(item) is bytes else memoryview(item).tobytes()


def buffer_decoder(annotation: Any) -> Callable[[bytes], Any] | None:
    """How a raw piece is handed over, or None if items of this type are MessagePack values.

    Buffers are `bytes`, `bytearray`, `memoryview`, `Buffer` and unions of them. One that carries
    a constraint (`Annotated[bytes, Meta(max_length=…)]`) is a MessagePack value, so as to be
    checked.
    """
    annotation = expand_alias(annotation)
    is_union = get_origin(annotation) in {Union, types.UnionType}
    members = get_args(annotation) if is_union else (annotation,)
    kinds = {_buffer_kind(expand_alias(member)) for member in members}
    if None in kinds:
        return None
    # The first costs nothing: bytes(data) is data.
    return next(kind for kind in (bytes, bytearray, memoryview) if kind in kinds)


def _buffer_kind(annotation: Any) -> type | None:
    # collections.abc has it from Python 3.12 on, typing_extensions before that.
    if (
        getattr(annotation, "__module__", None) in {"collections.abc", "typing_extensions"}
        and getattr(annotation, "__name__", None) == "Buffer"
    ):
        return bytes
    match inspect.type_info(replace_unions(annotation)):
        case inspect.BytesType(min_length=None, max_length=None):
            return bytes
        case inspect.ByteArrayType(min_length=None, max_length=None):
            return bytearray
        case inspect.MemoryViewType(min_length=None, max_length=None):
            return memoryview
        case _:
            return None


# --- MessagePack ---


def unencodable(label: str, error: Exception) -> RpcError:
    """The error of a caller whose value, called by the label, has no encoding."""
    return RpcError(Status.INVALID_ARGUMENT, printable(f"{label}: {error}"))


def caller_encoder(encode: Callable[[object], bytes], label: str) -> Callable[[object], bytes]:
    """Let an encoder raise `unencodable` in the place of its own errors."""

    def encode_for_caller(value: object) -> bytes:
        try:
            return encode(value)
        except ENCODE_ERRORS as error:
            raise unencodable(label, error) from error

    return encode_for_caller


def message_decoder(annotation: Any, label: str) -> Callable[[bytes], Any]:
    """A decoder of one value; errors call it by the label: "Vault.put: result"."""
    return _decoder(replace_unions(annotation), label, lambda path: label + path)


def item_codec(
    annotation: Any, label: str
) -> tuple[Callable[[object], bytes], Callable[[bytes], Any]]:
    """An encoder and a decoder of a stream's items; errors call an item by the label."""
    decode_piece = buffer_decoder(annotation)
    if decode_piece is not None:
        return _encode_buffer, decode_piece
    return encode_message, message_decoder(annotation, label)


def arguments_decoder(
    name: str, parameters: Sequence[tuple[str, Any, bool]]
) -> Callable[[bytes], list[Any]]:
    """Build a decoder of a call's arguments, an array in the order of the parameters.

    Args:
        name: the method's, for errors.
        parameters: of each its name, its type, and whether it may be left out.
    """

    def locate(path: str) -> str:
        found = _ARGUMENT.fullmatch(path)
        if found is None:
            return f"{name}: arguments{path}"
        return f"{name}: argument {parameters[int(found[1])][0]}{found[2]}"

    # One decode checks the array's length and every element. The fields are numbered because a
    # Struct has names that a parameter may bear and a field may not. A default is not checked
    # against its type, so that UNSET marks what was left out of the array's end; it can't come
    # from the wire.
    fields: list[Any] = [
        (f"p{i}", replace_unions(annotation), *([UNSET] if optional else []))
        for i, (_, annotation, optional) in enumerate(parameters)
    ]
    struct = msgspec.defstruct("Arguments", fields, array_like=True, forbid_unknown_fields=True)
    decode = _decoder(struct, f"{name}: arguments", locate)

    def decode_arguments(payload: bytes) -> list[Any]:
        values = list(astuple(decode(payload)))
        while values and values[-1] is UNSET:
            values.pop()
        return values

    return decode_arguments


def _decoder(annotation: Any, label: str, locate: Callable[[str], str]) -> Callable[[bytes], Any]:
    # Not without need: msgspec would call it for every `object` too.
    has_choices = any(map(_is_choice, _nodes(inspect.type_info(annotation))))
    hook = choose if has_choices else None
    decode = msgspec.msgpack.Decoder(annotation, dec_hook=hook).decode
    has_maps = contains_map(annotation)

    def decode_checked(data: bytes) -> Any:
        try:
            value = decode(data)
            # After the typed decode, never before: msgpack allocates an array as long as it
            # claims to be, at each of a thousand levels of nesting. msgspec doesn't, and what it
            # has accepted makes no false claims.
            if has_maps:
                _refuse_repeated_keys(data)
        except _DECODE_ERRORS as error:
            message = _explain(error, label, locate)
            # Without the cause: its text is the peer's, and a traceback would print it unescaped.
            raise RpcError(Status.INVALID_ARGUMENT, message) from None
        return value

    return decode_checked


class _RepeatedKeyError(ValueError):
    pass


# Stands for every map of the scan. Unhashable, so that a map within a key is refused, and shared,
# so that a million empty maps take no memory.
_SCANNED: dict[str, object] = {}


def _scan_map(pairs: list[tuple[Any, Any]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise _RepeatedKeyError
    return _SCANNED


def _refuse_repeated_keys(data: bytes) -> None:
    msgpack.unpackb(data, object_pairs_hook=_scan_map, strict_map_key=False, use_list=False)


def _explain(error: Exception, label: str, locate: Callable[[str], str]) -> str:
    if isinstance(error, msgspec.MsgspecError):
        found = _PLACE.fullmatch(str(error))
        reason = found[1] if found else str(error)
        if isinstance(error.__cause__, TypeError):
            # Raised by the code of an annotated class, and worded by Python rather than by its
            # author: it may name what the peer shouldn't know.
            reason = "refused"
        if found:
            label = f"{locate(found[3])}, a key" if found[2] else locate(found[3])
    else:
        reason = _reason(error)
    return printable(f"{label}: {reason}")


def _reason(error: Exception) -> str:
    match error:
        case _RepeatedKeyError():
            return "a map has a key twice"
        case RecursionError() | msgpack.StackError():
            return "nested too deeply"
        case UnicodeError():
            return "a string is not UTF-8"
        case OverflowError():
            return "a number is out of range"
        case TypeError():
            return "a key or a member of a set is not hashable"
        case _:
            return "malformed MessagePack"
