"""Stubs: objects with a service's methods, each of which makes a call."""

import inspect
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from trio.lowlevel import Task, checkpoint_if_cancelled, current_task, wait_task_rescheduled

from druvarpc.calls import Call, Options
from druvarpc.connections import HEAVY, Connections
from druvarpc.errors import ConnectionLost
from druvarpc.service import Cardinality, Method, Service, methods_of
from druvarpc.streaming import download, exchange, upload

S = TypeVar("S", bound=Service)


class StubMethod:
    """A method of a stub: calling it makes the call."""

    __slots__ = ("connections", "method", "options")

    def __init__(self, connections: Connections, method: Method, options: Options) -> None:
        self.connections = connections
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
        method, connections = self.method, self.connections
        payload, source = method.encode_call(args, kwargs)
        if source is None:
            return download(connections, method, self.options, payload)
        if method.cardinality is Cardinality.STREAM_UNARY:
            return upload(connections, method, self.options, payload, source)
        return exchange(connections, method, self.options, payload, source)


class UnaryMethod(StubMethod):
    """A unary method of a stub."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Make the call; see `StubMethod`."""
        return self._call(self.method.encode_call(args, kwargs)[0])

    async def _call(self, payload: bytes) -> Any:
        task = current_task()
        try:
            call = self.begin(payload, task)
        except ConnectionLost:
            # Maybe since what cancels this task has ended the connection a moment before.
            await checkpoint_if_cancelled()
            raise
        call.task = task
        await wait_task_rescheduled(call.cancelled)
        return self.decode(call) if call.plain else await self.result(call)

    def begin(self, payload: bytes, task: Task | None = None) -> Call:
        """Send a call, which `task` is going to wait for, or somebody in another step.

        Raises:
            ConnectionLost: the connection has ended or takes no more calls.
            RpcError: INVALID_ARGUMENT, the call can't be sent.
        """
        options, connections = self.options, self.connections
        calls = connections.only or connections.choose(len(payload), options.lane)
        call = Call(calls, self.method.name, payload, lane=options.lane, metadata=options.metadata)
        if len(payload) > HEAVY:
            call.weight = len(payload)
        if options.special:
            options.apply(call)
        calls.submit(call, task)
        return call

    async def result(self, call: Call) -> Any:
        """Wait for a call and return its result; cancelled, abandon it."""
        return self.method.decode_result(await call.calls.result(call))

    def decode(self, call: Call) -> Any:
        """Return the result of a call whose reply is `plain`."""
        assert call.result is not None
        return self.method.decode_result(call.result)


def unary_method(method: object, place: str) -> UnaryMethod:
    """Return `method` as what it is at run time, a stub's method.

    Raises:
        TypeError: it is something else, or streams, which can't be done in such a place.
    """
    if not isinstance(method, StubMethod):
        raise TypeError(f"{method!r} is not a method of a stub")
    if not isinstance(method, UnaryMethod):
        raise TypeError(f"{method.method.name} streams; a {place} is of unary calls")
    return method


def make_stub(service: type[S], connections: Connections, options: Options) -> S:
    """Return a stub of a service that calls over some of `connections`.

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
        unary = method.cardinality is Cardinality.UNARY_UNARY
        kind_of_method = UnaryMethod if unary else StubMethod
        object.__setattr__(stub, attribute, kind_of_method(connections, method, options))
    return stub
