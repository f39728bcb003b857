import dataclasses
import datetime as dt
import enum
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Optional

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.errors import RpcError, Status
from druvarpc.service import Method, Service, methods_of, rpc


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True)
class File:
    name: str
    size: int


@dataclasses.dataclass(frozen=True)
class Link:
    name: str
    target: str


@dataclasses.dataclass(frozen=True)
class Note:
    name: str
    text: str = ""
    author: str = ""


@dataclasses.dataclass(frozen=True)
class Name:
    name: str


UTC_MOMENT = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
MOMENT = dt.datetime(2026, 1, 2)

# Each union that msgspec refuses, with values that arrive as they are sent.
UNIONS: dict[str, tuple[Any, list[Any]]] = {
    "records": (File | Link, [File("a", 1), Link("a", "b")]),
    "records_or_none": (File | Link | None, [File("a", 1), Link("a", "b"), None]),
    "growing_records": (Note | File | Name, [Name("a"), Note("a"), File("a", 1)]),
    "record_or_dict": (File | dict[str, int], [File("a", 1), {"size": 1}, {}]),
    "dict_or_record": (dict[str, Any] | File, [File("a", 1), {"name": "a", "size": 1, "b": 2}]),
    "binary_or_text": (bytes | str, [b"a", "a", b"", ""]),
    "text_or_binary": (str | bytearray, ["YQ==", bytearray(b"YQ==")]),
    "text_or_moment": (str | dt.datetime, ["a", "2026-01-02T00:00:00Z", UTC_MOMENT]),
    "moment_or_colour": (dt.datetime | Colour, [MOMENT, UTC_MOMENT, Colour.RED]),
    "text_or_colour": (str | Colour, ["red", "green"]),
    "binary_or_numbers": (bytes | str | float | int | bool, [b"", "", 1.0, 1, True]),
    "list_or_set": (list[int] | set[int], [[1, 1], []]),
    "list_or_set_of_texts": (list[int] | set[str], [[1, 1], {"a"}]),
    "lists": (list[File] | list[Link], [[File("a", 1)], [Link("a", "b")], []]),
    "list_of_records": (list[File | Link], [[File("a", 1), Link("a", "b")], []]),
    "dict_of_records": (dict[bytes | str, File | Link], [{b"a": File("a", 1), "a": Link("", "")}]),
    "pair": (tuple[File | Link, bytes | str], [(Link("a", "b"), b"a")]),
    "tuple": (tuple[bytes | str, ...], [(b"a", "a"), ()]),
    "set": (set[bytes | str], [{b"a", "a"}, set()]),
    "sequence": (Sequence[bytes | str], [[b"a", "a"]]),
    "optional": (Optional[list[bytes | str]], [None, [b"a", "a"]]),  # noqa: UP045
    "choice_in_choice": (list[File | Link] | set[bytes | str], [[Link("", "")], {b"a", "a"}]),
    "beside_others": (list[bytes | str] | int, [[b"a", "a"], 1]),
    "deep": (dict[str, list[tuple[File | Link, ...]]], [{"a": [(File("a", 1), Link("", ""))]}]),
}


def method_of(annotation: Any) -> Method:
    """A method that takes a value and returns it, with a stream of such values."""

    async def call(self: Service, value: Any, items: Any) -> Any: ...

    call.__annotations__ = {
        "value": annotation,
        "items": AsyncIterator[annotation],
        "return": annotation,
    }
    return methods_of(type("Echo", (Service,), {"call": rpc(call)}))["call"]


METHODS = {name: method_of(annotation) for name, (annotation, _) in UNIONS.items()}


def refused(decode: Callable[[bytes], object], data: bytes) -> str:
    with pytest.raises(RpcError) as caught:
        decode(data)
    assert caught.value.status is Status.INVALID_ARGUMENT
    return caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, (_, values) in UNIONS.items() for value in values],
    ids=repr,
)
def test_members_arrive_as_they_were_sent(name: str, value: Any) -> None:
    method = METHODS[name]
    received = [
        method.decode_call(method.encode_arguments((value,)))[0],
        method.decode_result(method.encode_result(value)),
        method.decode_request(method.encode_request(value)),
    ]
    for got in received:
        assert got == value
        assert type(got) is type(value)


def test_items_of_a_result_may_be_a_union() -> None:
    def call(self: Service) -> AsyncIterator[bytes | str]: ...

    method = methods_of(type("Echo", (Service,), {"call": rpc(call)}))["call"]
    assert method.encode_response("a") == b"\xa1a"
    assert method.encode_response(b"a") == b"\xc4\x01a"
    assert method.decode_response(b"\xa1a") == "a"
    assert method.decode_response(b"\xc4\x01a") == b"a"


def test_an_argument_may_be_left_out() -> None:
    async def call(self: Service, value: File | Link | None = None) -> None: ...

    method = methods_of(type("Echo", (Service,), {"call": rpc(call)}))["call"]
    assert method.decode_call(b"\x90") == []
    assert method.decode_call(b"\x91\xc0") == [None]


@pytest.mark.parametrize(
    ("name", "sent", "arrives"),
    [
        # What is written alike can't be told apart.
        ("text_or_colour", Colour.RED, "red"),
        ("text_or_moment", MOMENT, "2026-01-02T00:00:00"),
        ("list_or_set", {1}, [1]),
        # Keys that no member knows: the first that takes the rest.
        ("records", {"name": "a", "target": "b", "new": 1}, Link("a", "b")),
        ("growing_records", {"name": "a", "new": 1}, Note("a")),
        ("record_or_dict", {"name": "a", "size": 1, "new": 1}, File("a", 1)),
        # The fields fit one member, the values another.
        ("lists", [{"name": "a", "target": "b"}], [Link("a", "b")]),
        ("dict_or_record", {"name": 1, "size": 1}, {"name": 1, "size": 1}),
    ],
)
def test_the_nearest_member_is_chosen(name: str, sent: Any, arrives: Any) -> None:
    method = METHODS[name]
    assert method.decode_result(method.encode_result(sent)) == arrives


@pytest.mark.parametrize(
    ("name", "value", "place", "expected"),
    [
        ("records", 1, "", "`File | Link`, got `int`"),
        ("records", {"name": "a"}, "", "`File | Link`, got `object`"),
        ("records", None, "", "`File | Link`, got `null`"),
        ("records_or_none", [], "", "`File | Link | None`, got `array`"),
        ("record_or_dict", {"a": "b"}, "", "`File | dict[str, int]`, got `object`"),
        ("binary_or_text", 1.5, "", "`bytes | str`, got `float`"),
        ("moment_or_colour", "green", "", "`datetime | Colour`, got `str`"),
        ("list_of_records", [{"name": "a", "size": 1}, "a"], "[1]", "`File | Link`, got `str`"),
        ("dict_of_records", {1: {}}, ", a key", "`bytes | str`, got `int`"),
        ("choice_in_choice", [1], "", "`list[File | Link] | set[bytes | str]`, got `array`"),
        ("deep", {"a": [[1]]}, "[...][0][0]", "`File | Link`, got `int`"),
    ],
)
def test_what_fits_no_member_is_refused(name: str, value: Any, place: str, expected: str) -> None:
    method, data = METHODS[name], msgpack.packb(value)
    complaint = f"{place}: Expected {expected} that fits none of them"
    assert refused(method.decode_call, b"\x91" + data) == f"Echo.call: argument value{complaint}"
    assert refused(method.decode_result, data) == f"Echo.call: result{complaint}"
    assert refused(method.decode_request, data) == f"Echo.call: item of items{complaint}"


def test_a_string_is_no_base64() -> None:
    method = method_of(bytes | list[int] | set[str])
    assert "got `str`" in refused(method.decode_result, b"\xa4YQ==")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("records", b"\x83\xa4name\xa0\xa4size\x01\xa4size\x02"),
        ("record_or_dict", b"\x82\xa1a\x01\xa1a\x02"),
        ("list_of_records", b"\x91\x83\xa4name\xa0\xa4size\x01\xa4size\x02"),
        (
            "dict_of_records",
            b"\x82\xa1a\x82\xa4name\xa0\xa4size\x01\xa1a\x82\xa4name\xa0\xa4size\x01",
        ),
    ],
)
def test_a_key_that_comes_twice_is_refused(name: str, value: bytes) -> None:
    method = METHODS[name]
    message = refused(method.decode_call, b"\x91" + value)
    assert message == "Echo.call: arguments: a map has a key twice"
    assert refused(method.decode_result, value) == "Echo.call: result: a map has a key twice"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement is new in Python 3.12")
def test_type_statements_are_seen_through() -> None:
    names: dict[str, Any] = {"File": File, "Link": Link, "Name": Name}
    exec("type Entry = File | Link\ntype Any_ = Entry | Name\ntype Some = list[Any_]", names)
    method = method_of(names["Some"])
    entries = [Name("a"), File("a", 1), Link("a", "b")]
    assert method.decode_result(method.encode_result(entries)) == entries


ANYTHING: st.SearchStrategy[object] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.just(dt.UTC)),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["name", "size", "target"]) | st.text(), inner)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@given(data=st.binary() | ANYTHING.map(msgspec.msgpack.encode))
def test_any_bytes_give_values_or_an_rpc_error(method: Method, data: bytes) -> None:
    for decode in (method.decode_call, method.decode_result, method.decode_request):
        for payload in (data, b"\x91" + data):
            refused = None
            try:
                decode(payload)
            except RpcError as error:
                refused = error
            if refused is not None:
                assert refused.status is Status.INVALID_ARGUMENT
                assert refused.message.isprintable()
                assert len(refused.message) <= 300
