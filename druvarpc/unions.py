"""Unions that msgspec refuses, because it decides by the kind of a value before it reads on.

`replace_unions` puts a class of its own, a `Choice`, in the place of each such union. msgspec hands
what it finds there to `choose`, as the builtins that MessagePack has, and `choose` tries the
members. Those that match the value best go first, and members that match equally well in the order
of the annotation:

1. Of a map, the records whose fields include all its keys, the fewest fields left out first.
2. The type of the value itself: bytes for a bin, `str` for a string, `datetime` for a timestamp.
3. All others: an enum or a `datetime` of a string, a `set` of an array, a record that doesn't know
   all the keys.

So what is written like another member arrives as that: an enum's value as `str` in `str | Colour`,
a set as a list in `list[int] | set[int]`.
"""

import datetime as dt
import re
import types
from dataclasses import dataclass
from typing import Annotated, Any, Union, cast, get_args, get_origin

import msgspec
from msgspec import inspect

__all__ = ["Choice", "choose", "expand_alias", "replace_unions"]

# What MessagePack gives, by the node of the annotation that means just that.
_EXACT: dict[type[inspect.Type], type] = {
    inspect.BoolType: bool,
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.StrType: str,
    inspect.BytesType: bytes,
    inspect.DateTimeType: dt.datetime,
    inspect.ListType: list,
    inspect.DictType: dict,
}

# How msgspec's messages call them.
_KINDS: dict[type[object], str] = {type(None): "null", list: "array", dict: "object"}

# Without them msgspec takes a string for base64.
_BUFFERS = (bytes, bytearray, memoryview)

_MODULES = re.compile(r"(?:[\w<>]+\.)+")


@dataclass(frozen=True, slots=True)
class _Member:
    annotation: Any
    exact: type | None
    # Of a record, as they stand in a map.
    fields: frozenset[str] | None

    def distance(self, value: object) -> tuple[int, int]:
        """How far the value is from this member; the nearest is tried first."""
        kind: type = type(value)
        if kind is dict and self.fields is not None:
            keys = cast("dict[object, object]", value).keys()
            return (0, len(self.fields - keys)) if keys <= self.fields else (2, 0)
        return (1, 0) if kind is self.exact else (2, 0)


class Choice(type):
    """The class of the classes that stand for a union."""

    members: tuple[_Member, ...]
    nodes: tuple[inspect.Type, ...]

    def __instancecheck__(cls, instance: object) -> bool:
        """Let msgspec accept whatever `choose` has made."""
        return True


def expand_alias(annotation: Any) -> Any:
    """The type that `type X = …` stands for; any other annotation as it is."""
    # By name, because the class came with Python 3.12.
    while type(annotation).__name__ == "TypeAliasType":
        annotation = annotation.__value__
    return annotation


def replace_unions(annotation: Any) -> Any:
    """The annotation with a `Choice` for each union, outside of records, that msgspec refuses.

    Raises:
        TypeError: a member of such a union can't be converted.
        NameError: an annotation inside it can't be resolved (yet).
    """
    try:
        return _replace(annotation)
    except RecursionError:
        # An alias that refers to itself: msgspec's to accept or to refuse.
        return annotation


def _replace(annotation: Any) -> Any:
    annotation = expand_alias(annotation)
    origin = get_origin(annotation)
    before = get_args(annotation)
    if origin is Annotated:
        return Annotated[_replace(before[0]), *annotation.__metadata__]
    after = tuple(map(_replace, before))
    if origin in {Union, types.UnionType}:
        union: Any = Union[after]  # noqa: UP007  (its members are not known before)
        return union if _is_accepted(union) else _choice(get_args(union))
    if all(old is new for old, new in zip(before, after, strict=True)):
        return annotation
    return origin[after]


def _is_accepted(union: Any) -> bool:
    try:
        inspect.type_info(union)
    except TypeError:
        return False
    return True


def _choice(annotations: tuple[Any, ...]) -> Choice:
    members: list[_Member] = []
    for annotation in annotations:
        # A union in an alias has become a choice already.
        nested = isinstance(annotation, Choice)
        members += annotation.members if nested else (_member(annotation),)
    name = " | ".join(_name(member.annotation) for member in members)
    # As a builtin it is shown by its name alone: "list[A | B]".
    choice = Choice(name, (), {"__module__": "builtins"})
    choice.members = tuple(members)
    choice.nodes = tuple(inspect.type_info(member.annotation) for member in members)
    return choice


def _member(annotation: Any) -> _Member:
    node = inspect.type_info(annotation)
    while isinstance(node, inspect.Metadata):
        node = node.type
    fields = None
    if isinstance(node, inspect.StructType | inspect.DataclassType | inspect.TypedDictType):
        fields = frozenset(field.encode_name for field in node.fields)
    return _Member(annotation, _EXACT.get(type(node)), fields)


def _name(annotation: Any) -> str:
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return _MODULES.sub("", repr(annotation))


def choose(kind: type, value: object) -> Any:
    """The value as the best member of the union for which `kind` stands; a `dec_hook` of msgspec.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(kind, Choice):
        return value
    for member in sorted(kind.members, key=lambda member: member.distance(value)):
        try:
            return msgspec.convert(
                value, member.annotation, builtin_types=_BUFFERS, dec_hook=choose
            )
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
            continue
    found = type(value)
    got = _KINDS.get(found, found.__name__)
    raise ValueError(f"Expected `{kind.__name__}`, got `{got}` that fits none of them")
