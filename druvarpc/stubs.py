"""Stubs: objects with a service's methods, each of which makes a call."""

import inspect
import math
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, Final, TypeVar

import trio
from trio.lowlevel import Task, current_task, wait_task_rescheduled

from druvarpc.calls import Call, Calls, Options, note_reply
from druvarpc.connections import HEAVY
from druvarpc.endpoints import Endpoints
from druvarpc.errors import RpcError, Status
from druvarpc.outgoing import Around
from druvarpc.replies import Pairs, collecting
from druvarpc.resilience import Retry
from druvarpc.retries import Attempts
from druvarpc.service import Cardinality, Method, Service, methods_of
from druvarpc.streaming import download, exchange, upload

S = TypeVar("S", bound=Service)

# With these a call was answered, for what it asks: another server would say the same. What else a
# copy fails with may be the fault of its server, and is no reason to give up on the others.
_ANSWERS: Final = frozenset(
    {
        Status.INVALID_ARGUMENT,
        Status.NOT_FOUND,
        Status.ALREADY_EXISTS,
        Status.FAILED_PRECONDITION,
        Status.OUT_OF_RANGE,
    }
)


class StubMethod:
    """A method of a stub: calling it makes the call."""

    __slots__ = ("connections", "method", "options")

    def __init__(self, connections: Endpoints, method: Method, options: Options) -> None:
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
        except RpcError as error:
            return await self.repeat(payload, error, sent=False)
        call.task = task
        await wait_task_rescheduled(call.cancelled)
        if collecting.get() is not None:
            note_reply(call)
        if call.plain:
            return self.decode(call)
        try:
            return await self.result(call)
        except RpcError as error:
            return await self.repeat(payload, error)

    async def repeat(self, payload: bytes, error: RpcError, *, sent: bool = True) -> Any:
        """Make a call that failed again, as often as it may be; return the result.

        Args:
            payload: its arguments.
            error: how it failed.
            sent: it had been given to a connection.
        """
        attempts = Attempts(
            self.connections, self.options, idempotent=self.method.idempotent, sent=sent
        )
        while True:
            await attempts.pause(error)
            try:
                call = self.begin(payload)
                attempts.begun()
                try:
                    return await self.result(call)
                finally:
                    note_reply(call)
            except RpcError as again:
                error = again

    def begin(self, payload: bytes, task: Task | None = None, calls: Calls | None = None) -> Call:
        """Send a call, which `task` is going to wait for, or somebody in another step.

        Args:
            payload: its arguments.
            task: who will wait.
            calls: of the connection that it is made on, None for any.

        Raises:
            ConnectionLost: there is no connection that takes calls.
            RpcError: INVALID_ARGUMENT, the call can't be sent; or calls to the server fail.
        """
        options, connections = self.options, self.connections
        calls = calls or connections.only or connections.choose(len(payload), options.lane)
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


class HedgedMethod(UnaryMethod):
    """A unary method whose calls are made once more if their replies don't come in time."""

    __slots__ = ()

    async def _call(self, payload: bytes) -> Any:
        hedge = self.options.hedge
        assert hedge is not None
        try:
            begun = [self.begin(payload)]
        except RpcError as error:
            return await self.repeat(payload, error, sent=False)
        waiting, copies = [*begun], hedge.attempts - 1
        try:
            while True:
                call = await _first_done(waiting, hedge.delay if copies else math.inf)
                if call is None:
                    copy = self._begin_copy(payload, begun[-1].calls)
                    copies = copies - 1 if copy else 0
                    waiting += copy
                    begun += copy
                    continue
                waiting.remove(call)
                failure = call.failure
                if waiting and isinstance(failure, RpcError) and failure.status not in _ANSWERS:
                    continue
                note_reply(call)
                if failure is None:
                    return await self.result(call)
                if not isinstance(failure, RpcError):
                    raise failure
                break
        finally:
            for call in begun:
                call.on_done = None
                call.calls.abandon(call)
        return await self.repeat(payload, failure)

    def _begin_copy(self, payload: bytes, besides: Calls) -> list[Call]:
        """Send a copy, on another connection if there is one; return it if that could be done."""
        connections, options = self.connections, self.options
        if not connections.may_retry(options.retry or Retry()):
            return []
        try:
            copy = self.begin(payload, None, connections.apart(besides, options.lane))
        except RpcError:
            return []
        connections.hedged += 1
        return [copy]


async def _first_done(calls: Sequence[Call], seconds: float) -> Call | None:
    """Wait for one of some calls; return None if none is done in time."""
    done = trio.Event()
    for call in calls:
        call.on_done = done.set
        if call.done:
            done.set()
    with trio.move_on_after(seconds):
        await done.wait()
    return next((call for call in calls if call.done), None)


class Intercepted(StubMethod):
    """A method of a stub with interceptors."""

    __slots__ = ("_around",)

    def __init__(self, connections: Endpoints, method: Method, options: Options) -> None:
        super().__init__(connections, method, options)
        self._around = around(connections, method, options)

    def __call__(
        self, *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, Any] | AsyncGenerator[Any, None]:
        """Make the call within the interceptors; see `StubMethod`."""
        arguments, source = self.method.bind(args, kwargs)
        if self.method.cardinality.server_streaming:
            return self._around.stream(self.connections, arguments, source)
        return self._around.result(arguments, source)


class InterceptedUnary(UnaryMethod):
    """Likewise, a unary one.

    Attributes:
        around: how its calls are made.
    """

    __slots__ = ("around",)

    def __init__(self, connections: Endpoints, method: Method, options: Options) -> None:
        super().__init__(connections, method, options)
        self.around = around(connections, method, options)

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Make the call within the interceptors; see `StubMethod`."""
        return self.around.result(self.method.bind(args, kwargs)[0])


def around(connections: Endpoints, method: Method, options: Options) -> Around:
    """Return how calls are made within the interceptors of `options`."""
    kind = kind_within(method, options)

    def make(metadata: Pairs) -> StubMethod:
        return kind(connections, method, options.within(metadata))

    return Around(method, options.interceptors, options.metadata, make)


def kind_within(method: Method, options: Options) -> type[StubMethod]:
    """Return what makes the calls of a method, within interceptors if there are any."""
    if method.cardinality is not Cardinality.UNARY_UNARY:
        return StubMethod
    return HedgedMethod if options.hedge and method.idempotent else UnaryMethod


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


def make_stub(service: type[S], connections: Endpoints, options: Options) -> S:
    """Return a stub of a service that calls over some of `connections`.

    Raises:
        TypeError: an annotation of the service can't be resolved.
        ValueError: there is nothing to hedge.
    """
    kind: Any = service
    if inspect.isabstract(service):
        # A declaration may be abstract; what it calls is there.
        kind = type(kind)(service.__name__, (service,), {})
        kind.__abstractmethods__ = frozenset()
    # Not by calling the class: its constructor is the server's business.
    stub: S = object.__new__(kind)
    methods = methods_of(service)
    kinds = {attribute: kind_within(method, options) for attribute, method in methods.items()}
    if options.hedge and HedgedMethod not in kinds.values():
        raise ValueError(f"{service.__name__} has no unary method that is idempotent: no hedging")
    for attribute, method in methods.items():
        kind = kinds[attribute]
        if options.interceptors:
            kind = InterceptedUnary if issubclass(kind, UnaryMethod) else Intercepted
        object.__setattr__(stub, attribute, kind(connections, method, options))
    return stub
