"""What the signature of a remote method says: its parameters, its streams, its result.

`read_shape` is called once a method, when its service is defined. Everything that a remote method
can't be is refused there, by a TypeError that names the method and the parameter.
"""

import dis
import functools
import inspect
import types
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Mapping,
)
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from druvarpc.codec import buffer_decoder, contains_map
from druvarpc.unions import expand_alias

__all__ = ["Parameter", "Shape", "is_declaration", "read_shape", "visible_names"]

_STREAM_TYPES = (AsyncIterator, AsyncIterable, AsyncGenerator)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter whose argument travels with the call, or the items of a stream parameter."""

    name: str
    annotation: Any
    optional: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """A method's signature, taken apart.

    Attributes:
        signature: what the caller calls, without `self`.
        parameters: those that are not a stream.
        stream: the streamed parameter with the annotation of its items.
        stream_position: among the positional parameters.
        result: the annotation of the result, or of its items.
        result_is_stream: the method returns a stream.
    """

    signature: inspect.Signature
    parameters: tuple[Parameter, ...]
    stream: Parameter | None
    stream_position: int | None
    result: Any
    result_is_stream: bool


def read_shape(name: str, function: types.FunctionType, names: Mapping[str, Any]) -> Shape:
    """Read a method's signature.

    Args:
        name: what errors call the method.
        function: what `rpc` marked.
        names: what string annotations may use besides the names of the function's module.

    Raises:
        TypeError: it can't be called remotely.
        NameError, AttributeError: an annotation can't be resolved (yet).
    """
    hints = _annotations(name, function, names)
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if not parameters:
        raise TypeError(f"{name}: a method's first parameter is self")
    for parameter in parameters:
        if parameter.kind not in {
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        }:
            kind = parameter.kind.description
            raise TypeError(f"{name}: parameter {parameter.name}: is {kind}, not positional")
    plain: list[Parameter] = []
    streams: list[tuple[int, Parameter]] = []
    for position, parameter in enumerate(parameters[1:]):
        where = f"{name}: parameter {parameter.name}"
        if parameter.name not in hints:
            raise TypeError(f"{where}: has no annotation")
        annotation = hints[parameter.name]
        optional = parameter.default is not parameter.empty
        items = _items(where, annotation)
        if items is None:
            _check(where, annotation)
            plain.append(Parameter(parameter.name, annotation, optional))
            continue
        if streams:
            raise TypeError(f"{where}: is a second stream, a method has at most one")
        # So that all parameters before the stream are required, and its place in a call is fixed.
        if optional:
            raise TypeError(f"{where}: is a stream, which can't have a default")
        streams.append((position, Parameter(parameter.name, items[0], optional=False)))
    result, result_is_stream = _result(name, function, hints)
    return Shape(
        signature=signature.replace(parameters=parameters[1:]),
        parameters=tuple(plain),
        stream=streams[0][1] if streams else None,
        stream_position=streams[0][0] if streams else None,
        result=result,
        result_is_stream=result_is_stream,
    )


def visible_names(cls: type) -> dict[str, Any]:
    """The names that string annotations in a class under definition may use.

    Those are the types in its body, and the locals of the functions in which it is being defined.
    """
    # Only types: in `def list(self) -> "list[str]"` the annotation doesn't mean the method.
    names: dict[str, Any] = {k: v for k, v in vars(cls).items() if isinstance(v, type)}
    frame = inspect.currentframe()
    while frame is not None:
        in_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
        if in_function and frame.f_globals.get("__name__") == cls.__module__:
            names = dict(frame.f_locals) | names
        frame = frame.f_back
    return names


def _annotations(
    name: str, function: types.FunctionType, names: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        return get_type_hints(function, localns=dict(names), include_extras=True)
    except (TypeError, ValueError, SyntaxError) as error:
        raise TypeError(f"{name}: an annotation can't be evaluated: {error}") from error


def _items(where: str, annotation: Any) -> tuple[Any] | None:
    """The type of a stream's items, in a tuple; None if the annotation is no stream."""
    annotation = expand_alias(annotation)
    while get_origin(annotation) is Annotated:
        annotation = expand_alias(get_args(annotation)[0])
    if get_origin(annotation) not in _STREAM_TYPES and annotation not in _STREAM_TYPES:
        return None
    arguments = get_args(annotation)
    if not arguments:
        raise TypeError(f"{where}: says nothing about the stream's items: AsyncIterator[…]")
    if buffer_decoder(arguments[0]) is None:
        _check(where, arguments[0])
    return (arguments[0],)


def _check(where: str, annotation: Any) -> None:
    try:
        contains_map(annotation)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error


def _result(name: str, function: types.FunctionType, hints: Mapping[str, Any]) -> tuple[Any, bool]:
    where = f"{name}: return annotation"
    if "return" not in hints:
        raise TypeError(f"{name}: has no return annotation; one that returns nothing says None")
    annotation = hints["return"]
    items = _items(where, annotation)
    # Decorators between the method and `rpc` may hide what it is behind a plain function.
    inner = inspect.unwrap(function)
    if items is not None:
        if inspect.iscoroutinefunction(inner):
            raise TypeError(
                f"{name}: as `async def` it would have to be awaited to give a stream: declare it "
                "with `def`, or write an async generator, with `yield`"
            )
        return items[0], True
    if inspect.isasyncgenfunction(inner):
        raise TypeError(f"{where}: an async generator returns AsyncGenerator[…]")
    if not inspect.iscoroutinefunction(inner):
        raise TypeError(f"{name}: has to be `async def`, because it doesn't return a stream")
    _check(where, annotation)
    return annotation, False


# --- declarations ---

_EMPTY_BODIES = (
    "...",
    "raise NotImplementedError",
    "raise NotImplementedError()",
    "raise NotImplementedError('any text')",
)


def is_declaration(function: object) -> bool:
    """Tell whether a function's body is empty, or does nothing but raise NotImplementedError."""
    return isinstance(function, types.FunctionType) and _outline(function.__code__) in _outlines()


@functools.cache
def _outlines() -> frozenset[tuple[object, ...]]:
    # Compiled by the interpreter that compiled the functions they are compared with, so that
    # nothing here knows the instructions of any version of Python.
    sources = [
        f"{head}\n  {body}" for head in ("def f():", "async def f():") for body in _EMPTY_BODIES
    ]
    # An async generator that declares itself one. Without the `raise` it is an empty stream.
    sources += [f"async def f():\n  {body}\n  yield" for body in _EMPTY_BODIES[1:]]
    modules = [compile(source, "<declaration>", "exec", dont_inherit=True) for source in sources]
    return frozenset(
        _outline(code)
        for module in modules
        for code in module.co_consts
        if isinstance(code, types.CodeType)
    )


def _outline(code: types.CodeType) -> tuple[object, ...]:
    """The kind of function and its instructions, without the text of strings."""
    kind = code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
    steps = [
        (step.opname, "text" if _loads_text(step) else step.argval)
        for step in dis.get_instructions(code)
        # Marks, which only say where lines and functions begin.
        if step.opname not in {"NOP", "RESUME"}
    ]
    return (kind, *steps)


def _loads_text(step: dis.Instruction) -> bool:
    return step.opname == "LOAD_CONST" and isinstance(step.argval, str)
