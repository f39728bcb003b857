"""Stubs: objects with a service's methods, each of which makes a call."""

import inspect
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from druvarpc.calls import Calls, Options
from druvarpc.service import Cardinality, Method, Service, methods_of

S = TypeVar("S", bound=Service)


class StubMethod:
    """A method of a stub: calling it makes the call."""

    __slots__ = ("calls", "method", "options")

    def __init__(self, calls: Calls, method: Method, options: Options) -> None:
        self.calls = calls
        self.method = method
        self.options = options

    def __repr__(self) -> str:
        return f"<stub of {self.method.name}>"

    def __call__(
        self, *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, Any] | AsyncGenerator[Any, None]:
        """Make the call.

        Raises:
            TypeError: the arguments are not those of the method.
            RpcError: INVALID_ARGUMENT, an argument can't be encoded.
        """
        method, calls = self.method, self.calls
        payload, source = method.encode_call(args, kwargs)
        if method.cardinality is Cardinality.UNARY_UNARY:
            return calls.unary(method, self.options, payload)
        if source is None:
            return calls.download(method, self.options, payload)
        if method.cardinality is Cardinality.STREAM_UNARY:
            return calls.upload(method, self.options, payload, source)
        return calls.exchange(method, self.options, payload, source)


def stub_method(method: object) -> StubMethod:
    """Return `method` as what it is at run time, a stub's method.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(method, StubMethod):
        raise TypeError(f"{method!r} is not a method of a stub")
    return method


def make_stub(service: type[S], calls: Calls, options: Options) -> S:
    """Return a stub of a service that calls by `calls`.

    Raises:
        TypeError: an annotation of the service can't be resolved.
    """
    kind: Any = service
    if inspect.isabstract(service):
        # A declaration may be abstract; what it calls is there.
        kind = type(kind)(service.__name__, (service,), {})
        kind.__abstractmethods__ = frozenset()
    # Not by calling the class: its constructor is the server's business.
    stub: S = object.__new__(kind)
    for attribute, method in methods_of(service).items():
        object.__setattr__(stub, attribute, StubMethod(calls, method, options))
    return stub
