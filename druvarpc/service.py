"""Services: typed methods, shared by both sides of a connection.

A subclass of `Service` is a table. Each method marked with `rpc` is a row, a `Method`: its name on
the wire, its cardinality (read from the annotations), and the conversion of its arguments, results
and items. The client's stub and the server's dispatch are driven by `methods_of(service_class)`.

*Names.* A row is called after the class that declares it: `Vault.put`. Subclasses that override it
(a server's implementation) don't change that, so a stub of `Vault` reaches any server that serves a
subclass of `Vault`. A subclass may declare rows of its own, named after itself. One that is given a
wire name (`class Other(Vault, name="other")`) starts over: all its rows, also the inherited ones,
bear that name, and where it marks an override with `rpc`, that signature counts. Everywhere else
`rpc` on an override says nothing new.

*Annotations* are read when the class is defined. Where a name is not known yet (a forward
reference), the row waits, and `methods_of` reads it again or raises TypeError. A union may have any
members, also several dataclasses (see `druvarpc.unions` for which one a value becomes), except in
the field of a dataclass, where it needs to be one that msgspec can tell apart: else TypeError.

*Implemented or not.* A method marked with `rpc` whose body is empty, or only raises
NotImplementedError, is a declaration; everything else is an implementation, be it an override or a
body in the declaring class itself. Python compiles `...`, `pass`, a docstring alone and
`return None` to the same code, so a method that shall do nothing has to be an override.
"""

import inspect
import re
from collections.abc import AsyncIterable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType, MappingProxyType
from typing import Any, ClassVar, NoReturn, TypeVar, cast, overload

from druvarpc.codec import (
    ENCODE_ERRORS,
    arguments_decoder,
    caller_encoder,
    encode_message,
    item_codec,
    message_decoder,
    printable,
    unencodable,
)
from druvarpc.signatures import Shape, is_declaration, read_shape, visible_names

__all__ = [
    "Cardinality",
    "Method",
    "Service",
    "implementation_of",
    "methods_of",
    "rpc",
    "wire_name_of",
]

F = TypeVar("F", bound=Callable[..., object])

# Well within the 255 bytes that the protocol allows (docs/protocol.md, 5.1), because it stands at
# the head of error messages too.
MAX_WIRE_NAME = 200
_WIRE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")

# The function attribute by which `rpc` marks; its value is whether the method is idempotent.
_MARK = "__druvarpc_idempotent__"


class Cardinality(Enum):
    """How many messages go each way: the caller's first, then the handler's."""

    UNARY_UNARY = (False, False)
    UNARY_STREAM = (False, True)
    STREAM_UNARY = (True, False)
    STREAM_STREAM = (True, True)

    @property
    def client_streaming(self) -> bool:
        """The caller sends a stream."""
        return self.value[0]

    @property
    def server_streaming(self) -> bool:
        """The handler sends a stream."""
        return self.value[1]


@overload
def rpc(function: F, /) -> F: ...
@overload
def rpc(*, idempotent: bool = False) -> Callable[[F], F]: ...
def rpc(function: F | None = None, /, *, idempotent: bool = False) -> F | Callable[[F], F]:
    """Mark a method of a `Service` as one that can be called remotely.

    An idempotent method, of which two calls do no more than one, may be called again when its
    reply was lost.
    """

    def mark(function: F) -> F:
        if not inspect.isfunction(function):
            raise TypeError(f"rpc marks methods, not {type(function).__name__} objects")
        function.__dict__[_MARK] = idempotent
        return cast("F", function)

    return mark if function is None else mark(function)


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One row of a service's table: how a method is called, and how its values travel.

    What decodes raises `RpcError` with INVALID_ARGUMENT for any bytes that don't fit the
    annotation. Other exceptions out of it are bugs in the code of an annotated class (a
    `__post_init__`). What encodes for the caller raises the same for values that have no encoding;
    what encodes for the handler raises the encoder's TypeError, ValueError or OverflowError,
    because that is a bug of the handler's, and none of the caller's business.

    Attributes:
        name: on the wire, "Vault.put".
        attribute: in Python, "put".
        idempotent: may be sent again after its reply was lost.
        parameters: the names of the positional parameters, the streamed one left out.
        stream_position: where the streamed parameter stands among the handler's positional
            parameters, `self` not counted; None if there is none. All parameters before it are
            required, so it is never past the end of what `decode_call` returns.
        decode_call: payload of a call to positional arguments, the streamed one left out. Trailing
            ones that the caller left out are missing here too: the handler's defaults apply.
        encode_request: an item of the caller's stream to its message; TypeError without a stream.
        decode_request: a message of the caller's stream to the item.
        encode_response: an item of the handler's stream to its message.
        decode_response: a message of the handler's stream to the item.
        encode_result: what a unary handler returned to the payload of its reply.
        decode_result: the payload of a unary reply to the result.
    """

    name: str
    attribute: str
    cardinality: Cardinality
    idempotent: bool
    parameters: tuple[str, ...]
    stream_position: int | None
    # Functions in fields, and no methods around them: a frame of Python costs as much as they do.
    decode_call: Callable[[bytes], list[Any]] = field(repr=False)
    encode_request: Callable[[object], bytes] = field(repr=False)
    decode_request: Callable[[bytes], Any] = field(repr=False)
    encode_response: Callable[[object], bytes] = field(repr=False)
    decode_response: Callable[[bytes], Any] = field(repr=False)
    encode_result: Callable[[object], bytes] = field(repr=False)
    decode_result: Callable[[bytes], Any] = field(repr=False)
    _signature: inspect.Signature = field(repr=False)
    _required: int = field(repr=False)
    _total: int = field(repr=False)

    def encode_call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[bytes, AsyncIterable[Any] | None]:
        """Encode the arguments of a call: what `bind` and `encode_arguments` do, in one step.

        Returns:
            The payload, and the stream argument of a method that has one.

        Raises:
            TypeError: the method can't be called with these arguments.
            RpcError: INVALID_ARGUMENT, an argument can't be encoded.
        """
        stream = None
        if kwargs or self.stream_position is not None or len(args) != self._total:
            args, stream = self.bind(args, kwargs)
        return self.encode_arguments(args), stream

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], AsyncIterable[Any] | None]:
        """Put the arguments of a call in order, as Python would.

        Defaults are left to the handler, except where one precedes an argument that is given.

        Returns:
            The positional arguments without the stream, and the stream.

        Raises:
            TypeError: the method can't be called with these arguments.
        """
        if kwargs or not self._required <= len(args) <= self._total:
            args = self._bind_by_signature(args, kwargs)
        position = self.stream_position
        if position is None:
            return args, None
        if not isinstance(args[position], AsyncIterable):
            kind = type(args[position]).__name__
            raise TypeError(f"{self.name}(): the stream is not an async iterable but {kind!r}")
        return args[:position] + args[position + 1 :], args[position]

    def _bind_by_signature(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        try:
            given = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{self.name}(): {error}") from None
        values: list[Any] = []
        missing = len(given)
        for name, parameter in self._signature.parameters.items():
            if not missing:
                break
            if name in given:
                values.append(given[name])
                missing -= 1
            else:
                values.append(parameter.default)
        return tuple(values)

    def encode_arguments(self, arguments: tuple[Any, ...]) -> bytes:
        """Encode the positional arguments, without the stream, as one MessagePack array.

        Raises:
            RpcError: INVALID_ARGUMENT, one of them can't be encoded.
        """
        try:
            return encode_message(arguments)
        except ENCODE_ERRORS as error:
            for name, argument in zip(self.parameters, arguments, strict=False):
                try:
                    encode_message(argument)
                except ENCODE_ERRORS as cause:
                    raise unencodable(f"{self.name}: argument {name}", cause) from cause
            raise unencodable(f"{self.name}: arguments", error) from error


class Service:
    """Methods that one side offers and the other calls. Subclass it, and mark methods with `rpc`.

    Raises (on definition of a subclass):
        TypeError: a method can't be a remote one; the message names it and the parameter.
        ValueError: a name can't go on the wire.
    """

    __druvarpc_name__: ClassVar[str] = "Service"
    __druvarpc_rows__: ClassVar[Mapping[str, "_Row"]] = {}

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        """Read the table of the new class.

        The service's name on the wire is by default that of the class which declares the methods.
        """
        super().__init_subclass__(**kwargs)
        inherited: dict[str, _Row] = {}
        # Backwards, so that the first base wins, as it does for Python.
        for base in reversed(cls.__bases__):
            if issubclass(base, Service):
                inherited |= base.__druvarpc_rows__
        wire_name = name or cls.__name__
        if name is not None:
            _check_wire_name(name)
            inherited = {attribute: row.renamed(name) for attribute, row in inherited.items()}
        names = visible_names(cls)
        own = {
            attribute: _Row(wire_name, attribute, function, names)
            for attribute, function in _marked_functions(cls).items()
            if name is not None or attribute not in inherited
        }
        if name is not None or own:
            cls.__druvarpc_name__ = wire_name
        cls.__druvarpc_rows__ = inherited | own
        for row in cls.__druvarpc_rows__.values():
            row.resolve_if_possible()


def wire_name_of(service: type[Service]) -> str:
    """The name on the wire of a service, which an implementation has from what it implements."""
    return service.__druvarpc_name__


def methods_of(service: type[Service]) -> Mapping[str, Method]:
    """The table of a service: its remote methods by attribute, inherited ones first.

    Raises:
        TypeError: an annotation names what can't be found.
    """
    return MappingProxyType({a: row.resolve() for a, row in service.__druvarpc_rows__.items()})


def implementation_of(service: Service, method: Method) -> Callable[..., Any] | None:
    """The bound method that answers calls, or None if the service only declares it.

    See the head of this module for what counts as a declaration.
    """
    bound: Callable[..., Any] = getattr(service, method.attribute)
    function: Any = getattr(bound, "__func__", bound)
    if _MARK in getattr(function, "__dict__", ()) and is_declaration(function):
        return None
    return bound


# --- reading a class ---


class _Row:
    """A marked function on its way to a `Method`, shared by a class and its subclasses."""

    __slots__ = ("_attribute", "_function", "_method", "_name", "_names", "_shape")

    def __init__(
        self, service: str, attribute: str, function: FunctionType, names: Mapping[str, Any]
    ) -> None:
        self._name = f"{service}.{attribute}"
        self._attribute = attribute
        self._function = function
        self._names: Mapping[str, Any] = names
        self._shape: Shape | None = None
        self._method: Method | None = None
        _check_wire_name(self._name)

    def renamed(self, service: str) -> "_Row":
        """The same method under the name of another service."""
        row = _Row(service, self._attribute, self._function, self._names)
        row._shape = self._shape
        return row

    def resolve(self) -> Method:
        """The method.

        Raises:
            TypeError: it can't be called remotely, or an annotation can't be resolved.
        """
        try:
            return self._define()
        except (NameError, AttributeError) as error:
            raise TypeError(f"{self._name}: an annotation can't be resolved: {error}") from error

    def resolve_if_possible(self) -> None:
        """Do what `resolve` does, if nothing refers to a name that is still to come."""
        # AttributeError is a module half imported, in a circle: "models.Chunk".
        with suppress(NameError, AttributeError):
            self._define()

    def _define(self) -> Method:
        if self._method is None:
            if self._shape is None:
                self._shape = read_shape(self._name, self._function, self._names)
                # They are the locals of whatever function defines the service: let them go.
                self._names = {}
            mark: bool = self._function.__dict__[_MARK]
            self._method = _method(self._name, self._attribute, self._shape, idempotent=mark)
        return self._method


def _method(name: str, attribute: str, shape: Shape, *, idempotent: bool) -> Method:
    encode_request: Callable[[object], bytes] = _no_stream
    decode_request: Callable[[bytes], Any] = _no_stream
    if shape.stream is not None:
        label = f"{name}: item of {shape.stream.name}"
        encode_request, decode_request = item_codec(shape.stream.annotation, label)
        encode_request = caller_encoder(encode_request, label)
    if shape.result_is_stream:
        encode, decode = item_codec(shape.result, f"{name}: item of the result")
    else:
        encode, decode = encode_message, message_decoder(shape.result, f"{name}: result")
    total = len(shape.signature.parameters)
    return Method(
        name=name,
        attribute=attribute,
        cardinality=Cardinality((shape.stream is not None, shape.result_is_stream)),
        idempotent=idempotent,
        parameters=tuple(parameter.name for parameter in shape.parameters),
        stream_position=shape.stream_position,
        decode_call=arguments_decoder(
            name, [(p.name, p.annotation, p.optional) for p in shape.parameters]
        ),
        encode_request=encode_request,
        decode_request=decode_request,
        encode_response=encode,
        decode_response=decode,
        encode_result=encode,
        decode_result=decode,
        _signature=shape.signature,
        _required=total - sum(parameter.optional for parameter in shape.parameters),
        _total=total,
    )


def _no_stream(_: object) -> NoReturn:
    raise TypeError("the caller of this method sends no stream")


def _marked_functions(cls: type[Service]) -> dict[str, FunctionType]:
    functions: dict[str, FunctionType] = {}
    for attribute, value in vars(cls).items():
        # A staticmethod or classmethod is looked into, so as to be refused.
        if _MARK not in getattr(getattr(value, "__func__", value), "__dict__", ()):
            continue
        where = f"{cls.__name__}.{attribute}"
        if attribute.startswith("_"):
            raise TypeError(f"{where}: a remote method's name can't start with an underscore")
        if not isinstance(value, FunctionType):
            raise TypeError(f"{where}: a remote method can't be a {type(value).__name__}")
        functions[attribute] = value
    return functions


def _check_wire_name(name: str) -> None:
    if len(name) > MAX_WIRE_NAME or not _WIRE_NAME.fullmatch(name):
        raise ValueError(
            f"{printable(repr(name))} can't be a name on the wire: it takes ASCII identifiers "
            f"joined by dots, at most {MAX_WIRE_NAME} bytes"
        )
