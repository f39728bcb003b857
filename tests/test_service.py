# mypy: disable-error-code="empty-body, abstract"
import array
import dataclasses
import datetime as dt
import enum
import functools
import sys
import tracemalloc
import uuid
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, NewType, TypedDict

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.errors import RpcError, Status
from druvarpc.service import (
    Cardinality,
    Method,
    Service,
    implementation_of,
    methods_of,
    rpc,
    wire_name_of,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass(frozen=True)
class Chunk:
    digest: bytes
    data: bytes


@dataclasses.dataclass(slots=True)
class Tree:
    name: str
    chunk: Chunk | None = None
    children: "list[Tree]" = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Even:
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError(f"{self.number} is odd")


@dataclasses.dataclass
class Quoting:
    text: str

    def __post_init__(self) -> None:
        raise ValueError(self.text)


@dataclasses.dataclass
class Clumsy:
    number: int

    def __post_init__(self) -> None:
        raise TypeError("SecretClass wants a str")


class Point(NamedTuple):
    x: int
    y: float = 0.0


class Options(TypedDict, total=False):
    depth: int
    name: str


class Vault(Service):
    @rpc(idempotent=True)
    async def missing(self, digests: list[bytes]) -> list[int]: ...

    @rpc
    async def put(self, chunk: Chunk, priority: int = 0, note: str = "") -> int: ...

    @rpc
    async def upload(self, pieces: AsyncIterator[bytes], total: int | None = None) -> int: ...

    @rpc
    def download(self, digests: list[bytes]) -> AsyncGenerator[bytes, None]: ...

    @rpc
    def sync(self, have: AsyncIterable[Chunk]) -> AsyncIterator[Chunk]: ...

    @rpc
    async def reset(self) -> None: ...


VAULT = methods_of(Vault)

# One annotation a method: a service whose method takes a value and returns it.
ANNOTATIONS: dict[str, Any] = {
    "none": None,
    "boolean": bool,
    "integer": int,
    "real": float,
    "text": str,
    "blob": bytes,
    "mutable_blob": bytearray,
    "union": int | str | None,
    "texts": list[str],
    "pair": tuple[int, str],
    "integers": tuple[int, ...],
    "members": set[int],
    "frozen_members": frozenset[str],
    "mapping": dict[str, list[int]],
    "by_pair": dict[tuple[int, int], str],
    "colour": Colour,
    "level": Level,
    "literal": Literal["a", "b"],
    "chunk": Chunk,
    "tree": Tree,
    "chunks": dict[str, list[Chunk]],
    "either": Chunk | list[int] | None,
    "point": Point,
    "options": Options,
    "moment": dt.datetime,
    "day": dt.date,
    "time": dt.time,
    "span": dt.timedelta,
    "identity": uuid.UUID,
    "decimal": Decimal,
    "anything": Any,
    "thing": object,
    "raw": msgspec.Raw,
}


def method_taking(annotation: Any, returning: Any = None) -> Method:
    """The only method of a service, which takes one argument called `value`."""

    async def call(self: Service, value: Any) -> Any: ...

    call.__annotations__ = {"value": annotation, "return": returning}
    return method_of(call)


def method_of(function: Callable[..., Any]) -> Method:
    service = type("Echo", (Service,), {"call": rpc(function)})
    return methods_of(service)["call"]


ECHO = {name: method_taking(annotation, annotation) for name, annotation in ANNOTATIONS.items()}


def payload(*arguments: object) -> bytes:
    return msgpack.packb(arguments)


def refused(decode: Callable[[bytes], object], data: bytes) -> str:
    with pytest.raises(RpcError) as caught:
        decode(data)
    assert caught.value.status is Status.INVALID_ARGUMENT
    return caught.value.message


# --- the table ---


def test_methods_have_their_names_and_flags() -> None:
    assert list(VAULT) == ["missing", "put", "upload", "download", "sync", "reset"]
    assert {method.name for method in VAULT.values()} == {f"Vault.{name}" for name in VAULT}
    assert [name for name, method in VAULT.items() if method.idempotent] == ["missing"]
    assert VAULT["put"].attribute == "put"
    assert VAULT["upload"].parameters == ("total",)


@pytest.mark.parametrize(
    ("attribute", "cardinality", "position"),
    [
        ("put", Cardinality.UNARY_UNARY, None),
        ("upload", Cardinality.STREAM_UNARY, 0),
        ("download", Cardinality.UNARY_STREAM, None),
        ("sync", Cardinality.STREAM_STREAM, 0),
    ],
)
def test_cardinality_follows_from_the_annotations(
    attribute: str, cardinality: Cardinality, position: int | None
) -> None:
    assert VAULT[attribute].cardinality is cardinality
    assert VAULT[attribute].stream_position == position


def test_cardinality_tells_who_streams() -> None:
    assert [(c.client_streaming, c.server_streaming) for c in Cardinality] == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]


def test_a_method_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VAULT["put"].name = "Vault.get"  # type: ignore[misc]
    with pytest.raises(TypeError):
        VAULT["get"] = VAULT["put"]  # type: ignore[index]


# --- names and subclasses ---


def names_of(service: type[Service]) -> list[str]:
    return [method.name for method in methods_of(service).values()]


def test_an_implementation_keeps_the_name_of_what_it_implements() -> None:
    class MyVault(Vault):
        async def put(self, chunk: Chunk, priority: int = 0, note: str = "") -> int:
            return await self.weigh(chunk)

        async def weigh(self, chunk: Chunk) -> int:
            return len(chunk.data)

    assert wire_name_of(MyVault) == "Vault"
    assert methods_of(MyVault) == VAULT


def test_repeating_rpc_on_an_override_changes_nothing() -> None:
    class MyVault(Vault):
        @rpc
        async def missing(self, digests: list[bytes]) -> list[int]:
            return []

    assert wire_name_of(MyVault) == "Vault"
    assert methods_of(MyVault) == VAULT


def test_a_service_is_named_explicitly() -> None:
    class Store(Service, name="backup.v1.Store"):
        @rpc
        async def put(self, chunk: Chunk) -> int: ...

    assert wire_name_of(Store) == "backup.v1.Store"
    assert names_of(Store) == ["backup.v1.Store.put"]
    message = refused(methods_of(Store)["put"].decode_call, payload(1))
    assert message == "backup.v1.Store.put: argument chunk: Expected `object`, got `int`"


def test_added_methods_bear_the_name_of_the_class_that_adds_them() -> None:
    class Ping(Service):
        @rpc
        async def ping(self) -> None: ...

    class Mirror(Ping):
        @rpc
        async def echo(self, value: int) -> int: ...

    class MyMirror(Mirror):
        pass

    assert names_of(Mirror) == names_of(MyMirror) == ["Ping.ping", "Mirror.echo"]
    assert wire_name_of(MyMirror) == "Mirror"
    assert methods_of(MyMirror)["ping"] is methods_of(Ping)["ping"]


def test_a_renamed_subclass_is_a_service_of_its_own() -> None:
    class Other(Vault, name="other"):
        @rpc
        async def put(self, chunk: Chunk, priority: int = 0, note: str = "", more: int = 0) -> int:
            return 0

    class MyOther(Other):
        pass

    assert names_of(MyOther) == [f"other.{name}" for name in VAULT]
    assert methods_of(Other)["put"].parameters == ("chunk", "priority", "note", "more")
    assert methods_of(Other)["missing"].idempotent
    assert "other.missing: argument digests" in refused(
        methods_of(Other)["missing"].decode_call, payload(1)
    )
    assert names_of(Vault) == [f"Vault.{name}" for name in VAULT]


def test_two_services_can_be_joined_and_the_first_base_wins() -> None:
    class Left(Service):
        @rpc
        async def same(self) -> None: ...

        @rpc
        async def left(self) -> None: ...

    class Right(Service):
        @rpc
        async def same(self) -> None: ...

        @rpc
        async def right(self) -> None: ...

    class Both(Left, Right):
        pass

    assert sorted(names_of(Both)) == ["Left.left", "Left.same", "Right.right"]


def test_a_service_without_methods_has_an_empty_table() -> None:
    class Nothing(Service):
        async def ordinary(self) -> None: ...

    assert methods_of(Nothing) == {}


@pytest.mark.parametrize(
    "name", ["", "a-b", "1a", "a..b", ".a", "a.", "größe", "a b", "a\n", "x" * 201]
)
def test_names_that_do_not_fit_on_the_wire_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name on the wire"):
        type("Named", (Service,), {}, name=name)


def test_a_method_name_that_does_not_fit_on_the_wire_is_refused() -> None:
    async def call(self: Service) -> None: ...

    with pytest.raises(ValueError, match="name on the wire"):
        type("Named", (Service,), {"größe": rpc(call)})
    with pytest.raises(ValueError, match="name on the wire"):
        type("Named", (Service,), {"x" * 200: rpc(call)})
    with pytest.raises(TypeError, match=r"Named\._call: .* underscore"):
        type("Named", (Service,), {"_call": rpc(call)})


# --- what can't be a remote method ---


async def no_annotation(self: Service, value) -> None: ...  # type: ignore[no-untyped-def]


async def no_return_annotation(self: Service, value: int): ...  # type: ignore[no-untyped-def]


async def keyword_only(self: Service, *, value: int) -> None: ...


async def variadic(self: Service, *value: int) -> None: ...


async def keywords(self: Service, **value: int) -> None: ...


async def no_self() -> None: ...


async def custom_class(self: Service, value: list[range]) -> None: ...


async def custom_result(self: Service) -> complex: ...


async def custom_item(self: Service, value: AsyncIterator[range]) -> None: ...


async def bare_stream(self: Service, value: AsyncIterator) -> None: ...  # type: ignore[type-arg]


async def optional_stream(self: Service, value: AsyncIterator[int] | None) -> None: ...


async def stream_default(self: Service, value: AsyncIterator[int] = ...) -> None: ...


async def nested_stream(self: Service, value: list[AsyncIterator[int]]) -> None: ...


async def two_streams(
    self: Service, first: AsyncIterator[int], value: AsyncIterator[int]
) -> None: ...


@dataclasses.dataclass
class Ambiguous:
    either: Chunk | Even


async def ambiguous_field(self: Service, value: list[Ambiguous]) -> None: ...


async def custom_member(self: Service, value: Chunk | Even | range) -> None: ...


async def choice_of_keys(self: Service, value: dict[Chunk | Even, int]) -> None: ...


async def record_keys(self: Service, value: dict[Chunk, int]) -> None: ...


async def bad_annotation(self: Service, value: "1 +") -> None: ...  # type: ignore[valid-type]  # noqa: F722


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (no_annotation, "parameter value: has no annotation"),
        (no_return_annotation, "has no return annotation"),
        (keyword_only, "parameter value: is keyword-only"),
        (variadic, "parameter value: is variadic positional"),
        (keywords, "parameter value: is variadic keyword"),
        (no_self, "first parameter is self"),
        (custom_class, "parameter value: range can't be converted"),
        (custom_result, "return annotation: complex can't be converted"),
        (custom_item, "parameter value: range can't be converted"),
        (bare_stream, "parameter value: says nothing about the stream's items"),
        (optional_stream, "parameter value: AsyncIterator can't be converted"),
        (stream_default, "parameter value: is a stream, which can't have a default"),
        (nested_stream, "parameter value: AsyncIterator can't be converted"),
        (two_streams, "parameter value: is a second stream"),
        (ambiguous_field, "parameter value: Type unions may not contain more than one dataclass"),
        (custom_member, "parameter value: range can't be converted"),
        (choice_of_keys, "parameter value: a dict whose keys are records"),
        (record_keys, "parameter value: a dict whose keys are records"),
        (bad_annotation, "an annotation can't be evaluated"),
    ],
)
def test_what_cannot_be_called_remotely_is_refused(
    function: Callable[..., Any], complaint: str
) -> None:
    with pytest.raises(TypeError) as caught:
        type("Odd", (Service,), {"call": rpc(function)})
    assert str(caught.value).startswith("Odd.call: ")
    assert complaint in str(caught.value)


def test_a_unary_method_is_a_coroutine_function() -> None:
    def plain(self: Service) -> int: ...

    async def generator(self: Service) -> int:  # type: ignore[misc]
        yield 1

    with pytest.raises(TypeError, match="has to be `async def`"):
        method_of(plain)
    with pytest.raises(TypeError, match="an async generator returns AsyncGenerator"):
        method_of(generator)


def test_a_coroutine_that_returns_a_stream_is_refused() -> None:
    async def download(self: Service) -> AsyncGenerator[int, None]: ...

    with pytest.raises(TypeError, match="declare it with `def`"):
        method_of(download)


def test_an_async_generator_is_a_stream() -> None:
    async def download(self: Service) -> AsyncGenerator[int, None]:
        yield 1

    assert method_of(download).cardinality is Cardinality.UNARY_STREAM


def test_rpc_marks_functions_only() -> None:
    with pytest.raises(TypeError, match="not staticmethod objects"):
        rpc(staticmethod(no_self))

    async def call(value: int) -> None: ...

    with pytest.raises(TypeError, match=r"Odd\.call: a remote method can't be a staticmethod"):
        type("Odd", (Service,), {"call": staticmethod(rpc(call))})


# --- annotations ---


def test_annotations_may_be_local_to_a_function() -> None:
    @dataclasses.dataclass
    class Local:
        number: int

    class Store(Service):
        @dataclasses.dataclass
        class Nested:
            number: int

        @rpc
        async def put(self, value: "Local", nested: "Nested") -> "list[Local]": ...

        @rpc
        async def list(self) -> "list[Local]": ...

    methods = methods_of(Store)
    assert methods["put"].decode_call(payload({"number": 1}, {"number": 2})) == [
        Local(1),
        Store.Nested(2),
    ]
    assert methods["list"].decode_result(b"\x91\x81\xa6number\x03") == [Local(3)]


class Forward(Service):
    @rpc
    async def put(self, value: "DefinedLater") -> None: ...


class RenamedForward(Forward, name="renamed"):
    pass


def put_before_the_definition() -> str:
    with pytest.raises(TypeError) as caught:
        methods_of(Forward)
    return str(caught.value)


COMPLAINT = put_before_the_definition()


@dataclasses.dataclass
class DefinedLater:
    number: int


def test_forward_references_are_resolved_on_first_use() -> None:
    assert "Forward.put: an annotation can't be resolved: name 'DefinedLater'" in COMPLAINT
    for service in (Forward, RenamedForward):
        method = methods_of(service)["put"]
        assert method.decode_call(payload({"number": 1})) == [DefinedLater(1)]


def test_what_can_never_be_resolved_is_a_type_error() -> None:
    class Lost(Service):
        @rpc
        async def put(self, value: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(TypeError, match=r"Lost\.put: .*'Nowhere' is not defined"):
        methods_of(Lost)


def test_constraints_are_checked() -> None:
    method = method_taking(Annotated[int, msgspec.Meta(ge=1)])
    assert method.decode_call(payload(1)) == [1]
    assert refused(method.decode_call, payload(0)) == (
        "Echo.call: argument value: Expected `int` >= 1"
    )


def test_aliases_and_annotated_streams_are_seen_through() -> None:
    Piece = NewType("Piece", bytes)

    async def upload(self: Service, pieces: Annotated[AsyncIterator[Piece], "doc"]) -> None: ...

    upload.__annotations__["pieces"] = Annotated[AsyncIterator[Piece], "doc"]
    method = method_of(upload)
    assert method.stream_position == 0
    assert method.encode_request(b"raw") == b"raw"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement is new in Python 3.12")
def test_type_statements_are_seen_through() -> None:
    names: dict[str, Any] = {"AsyncIterator": AsyncIterator}
    exec("type Piece = bytes\ntype Pieces = AsyncIterator[Piece]\ntype Name = str", names)

    async def upload(self: Service, pieces: Any, name: Any) -> None: ...

    upload.__annotations__ |= {"pieces": names["Pieces"], "name": names["Name"]}
    method = method_of(upload)
    assert method.stream_position == 0
    assert method.encode_request(b"raw") == b"raw"
    assert method.decode_call(payload("x")) == ["x"]


# --- calls ---


async def stream_of(*items: object) -> AsyncIterator[object]:
    for item in items:
        yield item


CHUNK = Chunk(b"d", b"x")


@pytest.mark.parametrize(
    ("args", "kwargs", "arrives"),
    [
        ((CHUNK,), {}, [CHUNK]),
        ((CHUNK, 1), {}, [CHUNK, 1]),
        ((CHUNK, 1, "n"), {}, [CHUNK, 1, "n"]),
        ((), {"chunk": CHUNK}, [CHUNK]),
        ((CHUNK,), {"priority": 2}, [CHUNK, 2]),
        ((CHUNK,), {"note": "n"}, [CHUNK, 0, "n"]),
        ((), {"note": "n", "chunk": CHUNK, "priority": 1}, [CHUNK, 1, "n"]),
    ],
)
def test_arguments_arrive_in_order(
    args: tuple[Any, ...], kwargs: dict[str, Any], arrives: list[Any]
) -> None:
    data, stream = VAULT["put"].encode_call(args, kwargs)
    assert stream is None
    assert VAULT["put"].decode_call(data) == arrives


def test_the_payload_is_an_array_of_the_arguments_given() -> None:
    data, _ = VAULT["put"].encode_call((CHUNK,), {})
    assert msgpack.unpackb(data) == [{"digest": b"d", "data": b"x"}]
    assert VAULT["reset"].encode_call((), {}) == (b"\x90", None)
    assert VAULT["reset"].decode_call(b"\x90") == []


def test_the_stream_argument_stays_out_of_the_payload() -> None:
    async def mixed(
        self: Service, before: int, pieces: AsyncIterator[bytes], after: int = 0
    ) -> None: ...

    method = method_of(mixed)
    assert method.stream_position == 1
    pieces = stream_of()
    assert method.encode_call((1, pieces), {}) == (payload(1), pieces)
    assert method.encode_call((1, pieces, 2), {}) == (payload(1, 2), pieces)
    assert method.encode_call((1,), {"pieces": pieces, "after": 2}) == (payload(1, 2), pieces)
    assert method.decode_call(payload(1)) == [1]
    assert method.decode_call(payload(1, 2)) == [1, 2]


@pytest.mark.parametrize(
    ("args", "kwargs", "complaint"),
    [
        ((), {}, "missing a required argument: 'chunk'"),
        ((), {"note": ""}, "missing a required argument: 'chunk'"),
        ((CHUNK, 1, "n", 2), {}, "too many positional arguments"),
        ((CHUNK,), {"size": 1}, "unexpected keyword argument 'size'"),
        ((CHUNK,), {"chunk": CHUNK}, "multiple values for argument 'chunk'"),
    ],
)
def test_wrong_calls_are_type_errors(
    args: tuple[Any, ...], kwargs: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TypeError) as caught:
        VAULT["put"].encode_call(args, kwargs)
    assert str(caught.value).startswith("Vault.put(): ")
    assert complaint in str(caught.value)


def test_a_stream_argument_that_is_no_stream_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="not an async iterable but 'list'"):
        VAULT["upload"].encode_call(([b""],), {})


def test_binding_leaves_placeholders_alone() -> None:
    placeholder = object()
    arguments, _ = VAULT["put"].bind((), {"chunk": placeholder, "note": "n"})
    assert arguments == (placeholder, 0, "n")
    assert VAULT["put"].encode_arguments((None, 0, "n")) == payload(None, 0, "n")


class Unsupported:
    pass


@pytest.mark.parametrize("value", [Unsupported(), 2**64, -(2**63) - 1, "\ud800", [{1: object()}]])
def test_arguments_without_an_encoding_are_refused_by_name(value: object) -> None:
    with pytest.raises(RpcError) as caught:
        VAULT["put"].encode_call((CHUNK, value), {})
    assert caught.value.status is Status.INVALID_ARGUMENT
    assert caught.value.message.startswith("Vault.put: argument priority: ")


def test_an_argument_nested_in_itself_is_refused() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(RpcError, match=r"Echo\.call: argument value: "):
        ECHO["anything"].encode_call((endless,), {})


def test_results_without_an_encoding_are_the_handlers_bug() -> None:
    with pytest.raises(TypeError):
        VAULT["put"].encode_result(Unsupported())
    with pytest.raises(OverflowError):
        VAULT["put"].encode_result(2**64)
    with pytest.raises(TypeError):
        VAULT["download"].encode_response("text")


# --- values ---

INTEGERS = st.integers(-(2**63), 2**64 - 1)
TEXT = st.text(max_size=20)
CHUNKS = st.builds(Chunk, st.binary(max_size=20), st.binary(max_size=20))
TREES = st.recursive(
    st.builds(Tree, TEXT, st.none() | CHUNKS),
    lambda children: st.builds(Tree, TEXT, st.none() | CHUNKS, st.lists(children, max_size=3)),
    max_leaves=10,
)
ANYTHING: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | TEXT | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "none": st.none(),
    "boolean": st.booleans(),
    "integer": INTEGERS,
    "real": st.floats(allow_nan=False),
    "text": TEXT,
    "blob": st.binary(),
    "mutable_blob": st.binary().map(bytearray),
    "union": st.none() | INTEGERS | TEXT,
    "texts": st.lists(TEXT),
    "pair": st.tuples(INTEGERS, TEXT),
    "integers": st.lists(INTEGERS).map(tuple),
    "members": st.sets(INTEGERS),
    "frozen_members": st.frozensets(TEXT),
    "mapping": st.dictionaries(TEXT, st.lists(INTEGERS)),
    "by_pair": st.dictionaries(st.tuples(INTEGERS, INTEGERS), TEXT),
    "colour": st.sampled_from(Colour),
    "level": st.sampled_from(Level),
    "literal": st.sampled_from(["a", "b"]),
    "chunk": CHUNKS,
    "tree": TREES,
    "chunks": st.dictionaries(TEXT, st.lists(CHUNKS, max_size=3)),
    "either": CHUNKS | st.lists(INTEGERS) | st.none(),
    "point": st.builds(Point, INTEGERS, st.floats(allow_nan=False)),
    "options": st.fixed_dictionaries({}, optional={"depth": INTEGERS, "name": TEXT}),
    "moment": st.datetimes() | st.datetimes(timezones=st.just(dt.UTC)),
    "day": st.dates(),
    "time": st.times(),
    "span": st.timedeltas(dt.timedelta(days=-9999), dt.timedelta(days=9999)),
    "identity": st.uuids(),
    "decimal": st.decimals(allow_nan=False, allow_infinity=False),
    "anything": ANYTHING,
    "thing": ANYTHING,
}


@given(st.sampled_from(sorted(VALUES)).flatmap(lambda n: st.tuples(st.just(n), VALUES[n])))
def test_values_arrive_as_they_were_sent(case: tuple[str, Any]) -> None:
    name, value = case
    method = ECHO[name]
    data, _ = method.encode_call((value,), {})
    assert method.decode_call(data) == [value]
    assert method.decode_result(method.encode_result(value)) == value


@given(st.lists(CHUNKS))
def test_items_arrive_as_they_were_sent(chunks: list[Chunk]) -> None:
    sync = VAULT["sync"]
    for chunk in chunks:
        assert sync.decode_request(sync.encode_request(chunk)) == chunk
        assert sync.decode_response(sync.encode_response(chunk)) == chunk


def test_unknown_fields_are_ignored() -> None:
    data = payload({"digest": b"", "data": b"", "new": {"in": "version 2"}})
    assert VAULT["put"].decode_call(data) == [Chunk(b"", b"")]


# --- raw streams ---

Raw = dict[Any, type]
RAW: Raw = {
    bytes: bytes,
    bytearray: bytearray,
    memoryview: memoryview,
    bytes | bytearray | memoryview: bytes,
    bytearray | memoryview: bytearray,
}


@pytest.mark.parametrize(("annotation", "kind"), RAW.items(), ids=str)
def test_streams_of_buffers_are_raw(annotation: Any, kind: type) -> None:
    async def call(self: Service, pieces: Any) -> None: ...

    call.__annotations__["pieces"] = AsyncIterator[annotation]
    method = method_of(call)
    piece = method.decode_request(b"\xc1piece")
    assert type(piece) is kind
    assert piece == b"\xc1piece"
    assert method.encode_request(piece) == b"\xc1piece"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="collections.abc has it from 3.12 on")
def test_streams_of_buffer_are_raw() -> None:
    async def call(self: Service, pieces: Any) -> None: ...

    buffer: Any = vars(sys.modules["collections.abc"])["Buffer"]
    call.__annotations__["pieces"] = AsyncIterator[buffer]
    assert method_of(call).decode_request(b"x") == b"x"


def test_bytes_are_passed_on_without_a_copy() -> None:
    piece = bytes(1000)
    download, upload = VAULT["download"], VAULT["upload"]
    assert download.encode_response(piece) is piece
    assert download.decode_response(piece) is piece
    assert upload.encode_request(piece) is piece
    assert upload.decode_request(piece) is piece


@pytest.mark.parametrize(
    ("piece", "sent"),
    [
        (bytearray(b"abc"), b"abc"),
        (memoryview(b"abcdef")[::2], b"ace"),
        (array.array("H", [1, 2]), array.array("H", [1, 2]).tobytes()),
        (memoryview(b""), b""),
    ],
)
def test_any_buffer_can_be_sent(piece: Any, sent: bytes) -> None:
    assert VAULT["download"].encode_response(piece) == sent
    assert VAULT["upload"].encode_request(piece) == sent


def test_what_changes_after_it_was_encoded_is_sent_as_it_was() -> None:
    piece = bytearray(b"abc")
    sent = VAULT["upload"].encode_request(piece)
    piece[:] = b"xyz"
    assert sent == b"abc"


@pytest.mark.parametrize("item", ["text", 5, None, [1, 2], Chunk(b"", b"")])
def test_items_of_a_raw_stream_are_buffers(item: object) -> None:
    with pytest.raises(RpcError) as caught:
        VAULT["upload"].encode_request(item)
    assert caught.value.status is Status.INVALID_ARGUMENT
    assert caught.value.message.startswith("Vault.upload: item of pieces: ")


def test_constrained_bytes_are_messages() -> None:
    async def call(self: Service, pieces: Any) -> None: ...

    call.__annotations__["pieces"] = AsyncIterator[Annotated[bytes, msgspec.Meta(max_length=2)]]
    method = method_of(call)
    assert method.decode_request(method.encode_request(b"ab")) == b"ab"
    assert "length <= 2" in refused(method.decode_request, method.encode_request(b"abc"))


def test_a_method_without_a_stream_has_no_requests() -> None:
    with pytest.raises(TypeError, match="sends no stream"):
        VAULT["put"].encode_request(b"")


# --- what a peer may send ---


@pytest.mark.parametrize(
    ("attribute", "arguments", "message"),
    [
        ("put", [{"digest": 1, "data": b""}], "argument chunk.digest: Expected `bytes`, got `int`"),
        ("put", [{"digest": b""}], "argument chunk: Object missing required field `data`"),
        ("put", [{1: 2}], "argument chunk, a key: Expected `str`, got `int`"),
        ("put", [None], "argument chunk: Expected `object`, got `None`"),
        (
            "put",
            [{"digest": b"", "data": b""}, "x"],
            "argument priority: Expected `int`, got `str`",
        ),
        ("put", [{"digest": b"", "data": b""}, None], "argument priority: Expected `int`, got"),
        ("put", [], "arguments: Expected `array` of at least length 1, got 0"),
        ("reset", [1, 2, 3, 4], "arguments: Expected `array` of at most length 0, got 4"),
        ("missing", [[b"", 1]], "argument digests[1]: Expected `bytes`, got `int`"),
        ("upload", ["x"], "argument total: Expected `int | null`, got `str`"),
        ("reset", [1], "arguments: Expected `array` of at most length 0, got 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    attribute: str, arguments: list[object], message: str
) -> None:
    got = refused(VAULT[attribute].decode_call, payload(*arguments))
    assert got.startswith(f"Vault.{attribute}: {message}")


def test_results_and_items_that_do_not_fit_are_named() -> None:
    data = msgpack.packb([1, "x"])
    assert refused(VAULT["missing"].decode_result, data) == (
        "Vault.missing: result[1]: Expected `int`, got `str`"
    )
    assert refused(VAULT["sync"].decode_request, data) == (
        "Vault.sync: item of have: Expected `object`, got `array`"
    )
    assert refused(VAULT["sync"].decode_response, b"\x81\xa6digest\x01") == (
        "Vault.sync: item of the result.digest: Expected `bytes`, got `int`"
    )
    assert refused(VAULT["reset"].decode_result, b"\x01") == (
        "Vault.reset: result: Expected `null`, got `int`"
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x91",
        b"\xc1",
        b"\x91\x01\x01",
        b"\x80",
        b"\x91\xdb\xff\xff\xff\xff",
        b"\x91\xc7\x0c\xff" + b"\xff" * 12,
        b"\x91" * 100_000,
        b"\x91" + b"\x81\x01" * 100_000,
    ],
)
@pytest.mark.parametrize("method", ECHO.values(), ids=ECHO.keys())
def test_malformed_payloads_are_refused(method: Method, data: bytes) -> None:
    assert refused(method.decode_call, data).startswith("Echo.call: argument")


@pytest.mark.parametrize("method", ECHO.values(), ids=ECHO.keys())
@given(data=st.binary() | ANYTHING.map(lambda value: payload(value)))
def test_any_bytes_give_values_or_an_rpc_error(method: Method, data: bytes) -> None:
    for decode in (method.decode_call, method.decode_result):
        check_values_or_refusal(decode, data)


@given(st.binary())
def test_any_bytes_of_an_item_give_it_or_an_rpc_error(data: bytes) -> None:
    for method in VAULT.values():
        check_values_or_refusal(method.decode_response, data)
        if method.cardinality.client_streaming:
            check_values_or_refusal(method.decode_request, data)


def check_values_or_refusal(decode: Callable[[bytes], object], data: bytes) -> None:
    try:
        decode(data)
    except RpcError:
        message = refused(decode, data)
        assert message.isprintable()
        assert len(message) <= 300


TWICE = b"\x82\xa1a\x01\xa1a\x02"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mapping", b"\x82\xa1a\x90\xa1a\x90"),
        ("chunk", b"\x83\xa6digest\xc4\x00\xa6digest\xc4\x00\xa4data\xc4\x00"),
        ("tree", b"\x82\xa4name\xa0\xa8children\x91\x82\xa4name\xa0\xa4name\xa0"),
        ("options", b"\x82\xa5depth\x01\xa5depth\x02"),
        ("either", b"\x83\xa6digest\xc4\x00\xa4data\xc4\x00\xa6digest\xc4\x00"),
        ("chunk", b"\x83\xa6digest\xc4\x00\xa4data\xc4\x00\xa3new" + TWICE),
        ("anything", TWICE),
        ("anything", b"\x92\x01" + TWICE),
        ("anything", b"\x82\x01\x01\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00\x01"),
        ("thing", TWICE),
        ("raw", TWICE),
        ("by_pair", b"\x82\x92\x01\x02\xa1a\x92\x01\x02\xa1b"),
    ],
)
def test_a_key_that_comes_twice_is_refused(name: str, value: bytes) -> None:
    assert refused(ECHO[name].decode_call, b"\x91" + value) == (
        "Echo.call: arguments: a map has a key twice"
    )
    assert refused(ECHO[name].decode_result, value) == "Echo.call: result: a map has a key twice"


@pytest.mark.parametrize("key", [b"\x80", b"\x91\x80", b"\x81\x01\x01"])
def test_maps_are_no_keys(key: bytes) -> None:
    refused(ECHO["anything"].decode_call, b"\x91\x81" + key + b"\x01")


@pytest.mark.parametrize("name", ["anything", "mapping", "texts", "integers", "tree", "raw"])
def test_memory_is_proportional_to_the_input(name: str) -> None:
    # Arrays and maps within each other that all claim as many elements as the input has bytes.
    size = 30_000
    bombs = [
        b"\x91" + b"\xdd\x00\x00\x70\x00" * 900 + bytes(size - 4500),
        b"\x91" + b"\xdf\x00\x00\x70\x00\xa0" * 900 + bytes(size - 5400),
        b"\x91" + b"\x82\xa4name\xa0\xa8children\xdd\x00\x00\x70\x00" * 500 + bytes(size // 3),
        b"\x91\xdd\xff\xff\xff\xff",
        b"\x91\xdf\xff\xff\xff\xff",
        b"\x91\xc6\xff\xff\xff\xff",
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            refused(ECHO[name].decode_call, bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * size


def test_a_class_may_refuse_a_value() -> None:
    method = method_taking(list[Even])
    data = payload([{"number": 2}, {"number": 3}])
    assert refused(method.decode_call, data) == "Echo.call: argument value[1]: 3 is odd"


def test_a_type_error_from_a_class_is_not_quoted() -> None:
    method = method_taking(dict[str, Clumsy])
    message = refused(method.decode_call, payload({"a": {"number": 2}}))
    assert message == "Echo.call: argument value[...]: refused"


def test_what_a_class_quotes_of_a_peer_is_escaped() -> None:
    method = method_taking(Quoting, Quoting)
    value = {"text": "\x1b[31m\n\u2028é - at `$[7]`"}
    quoted = r"\x1b[31m\n\u2028é - at `$[7]`"
    message = refused(method.decode_call, payload(value))
    assert message == f"Echo.call: argument value: {quoted}"
    refused(method.decode_result, payload(value)[1:])


def test_members_of_a_set_that_cannot_be_hashed_are_refused() -> None:
    method = method_taking(set[Any])
    assert refused(method.decode_call, payload([{}])).startswith("Echo.call: argument")


def test_messages_are_one_short_printable_line() -> None:
    value = "\x1b[31m\n\u2028\ud7ff - at `$[7]`" + "x" * 10_000
    message = refused(ECHO["colour"].decode_call, payload(value))
    assert message.startswith("Echo.call: argument value: Invalid enum value ")
    assert message.isprintable()
    assert len(message) == 300
    assert "x" * 100 in message


def test_no_cause_is_attached_to_what_a_peer_provoked() -> None:
    with pytest.raises(RpcError) as caught:
        ECHO["text"].decode_call(b"\x91\xa1\xff")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert caught.value.message == "Echo.call: arguments: a string is not UTF-8"


# --- implementations ---


class Declared(Service):
    @rpc
    async def dots(self) -> None: ...

    @rpc
    async def passing(self) -> None:
        pass

    @rpc
    async def docstring(self) -> None:
        """Only says what it does."""

    @rpc
    async def docstring_and_dots(self, number: int, name: str = "x") -> int:
        """Says what it does."""
        ...  # noqa: PIE790  (what is tested)

    @rpc
    async def raises(self) -> None:
        raise NotImplementedError

    @rpc
    async def raises_instance(self) -> int:
        """Says what it does."""
        raise NotImplementedError()

    @rpc
    async def raises_text(self) -> int:
        raise NotImplementedError("to be done by subclasses")

    @rpc
    @abstractmethod
    async def abstract(self) -> None: ...

    @rpc
    def stream(self) -> AsyncGenerator[int, None]: ...

    @rpc
    def stream_raises(self) -> AsyncGenerator[int, None]:
        raise NotImplementedError

    @rpc
    async def stream_yields(self) -> AsyncGenerator[int, None]:
        """Says what it does."""
        raise NotImplementedError
        yield 1


class Implemented(Service):
    @rpc
    async def returns(self) -> int:
        return 1

    @rpc
    async def raises(self) -> None:
        raise ValueError

    @rpc
    async def raises_later(self, number: int) -> None:
        if number:
            raise NotImplementedError

    @rpc
    async def assigns(self) -> None:
        self.done = True

    @rpc
    async def stream(self) -> AsyncGenerator[int, None]:
        yield 1

    @rpc
    async def empty_stream(self) -> AsyncGenerator[int, None]:
        if False:
            yield 1

    @rpc
    def delegated(self) -> AsyncGenerator[int, None]:
        return self.stream()


@pytest.mark.parametrize("attribute", methods_of(Declared))
def test_a_method_with_an_empty_body_is_not_implemented(attribute: str) -> None:
    class Mine(Declared):
        pass

    method = methods_of(Declared)[attribute]
    assert implementation_of(Declared(), method) is None
    assert implementation_of(Mine(), method) is None


@pytest.mark.parametrize("attribute", methods_of(Implemented))
def test_a_method_with_a_body_is_implemented_where_it_is_declared(attribute: str) -> None:
    service = Implemented()
    assert implementation_of(service, methods_of(Implemented)[attribute]) == getattr(
        service, attribute
    )


def test_an_override_is_an_implementation_even_if_it_does_nothing() -> None:
    class Mine(Declared):
        async def dots(self) -> None:
            pass

        async def stream(self) -> AsyncGenerator[int, None]:
            yield 1

    service = Mine()
    for attribute in ("dots", "stream"):
        assert implementation_of(service, methods_of(Mine)[attribute]) == getattr(
            service, attribute
        )


def test_a_wrapped_override_is_an_implementation() -> None:
    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def wrapper(*args: Any) -> Any:
            return await function(*args)

        return wrapper

    class Mine(Declared):
        @traced
        async def dots(self) -> None:
            pass

    service = Mine()
    assert implementation_of(service, methods_of(Mine)["dots"]) == service.dots


def test_a_function_put_on_the_instance_is_an_implementation() -> None:
    async def dots() -> None:
        pass

    service = Declared()
    service.dots = dots  # type: ignore[method-assign]
    assert implementation_of(service, methods_of(Declared)["dots"]) is dots
