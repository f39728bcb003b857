"""Who may call a method: predicates on methods and services."""

import inspect
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, cast

from druvarpc.current import CurrentCall
from druvarpc.errors import RpcError, Status, rpc_error_in
from druvarpc.interceptors import Proceed
from druvarpc.service import Service

__all__ = ["Predicate", "authorize", "predicates_of", "require", "whereabouts"]

logger = logging.getLogger("druvarpc")

Predicate = Callable[[CurrentCall], bool | Awaitable[bool]]
F = TypeVar("F", bound=Callable[..., Any])

# The attribute of functions and classes by which `authorize` marks.
_MARK: Final = "__druvarpc_predicates__"


def authorize(predicate: Predicate) -> Callable[[F], F]:
    """Let a method, or all methods of a service, be called only where `predicate` holds.

    To be put on methods or on the class, of the service or of what implements it; all that are
    there must hold, and overriding a method or deriving from a class takes none away. They are
    asked for every call, in a club or not, within the interceptors and before the arguments are
    decoded; others are refused with PERMISSION_DENIED.

    Args:
        predicate: takes the `CurrentCall`, whose `identity` is mostly what counts, and returns
            whether the call may be made; may be `async`. It may also raise an RpcError. Of another
            exception the log has the type and where it was raised, not what it says.
    """

    def mark(target: F) -> F:
        # What the class itself has, not what it inherits.
        own: tuple[Predicate, ...] = vars(target).get(_MARK, ())
        setattr(target, _MARK, (predicate, *own))
        return target

    return mark


def predicates_of(service: Service, attribute: str) -> tuple[Predicate, ...]:
    """Return what must hold for a call of a method, the outermost class's first."""
    found: list[Predicate] = []
    for kind in reversed(type(service).__mro__):
        for place in (kind, vars(kind).get(attribute)):
            found += vars(place).get(_MARK, ()) if hasattr(place, "__dict__") else ()
    instance: Callable[..., Any] | None = vars(service).get(attribute)
    found += getattr(instance, _MARK, ())
    return tuple(found)


def require(
    predicates: tuple[Predicate, ...],
) -> Callable[[CurrentCall, Proceed], Awaitable[Any]]:
    """Return the interceptor that asks predicates."""

    async def check(call: CurrentCall, proceed: Proceed) -> Any:
        for predicate in predicates:
            try:
                holds = predicate(call)
                if inspect.isawaitable(holds):
                    holds = await holds
            # The user's code, like a handler; but it handles secrets.
            except Exception as error:
                if rpc_error_in(error) is not None:
                    raise
                logger.error("%s: a predicate failed\n%s", call.method, whereabouts(error))  # noqa: TRY400 - what it says may be a secret
                raise RpcError(Status.INTERNAL, "the server failed") from None
            if not holds:
                raise RpcError(Status.PERMISSION_DENIED, f"{call.method}: not allowed")
        return await proceed()

    return check


def whereabouts(error: BaseException) -> str:
    """Return where an exception was raised and of what type it is, for the log: not what it says.

    For code that handles secrets: what a KeyError says is the key, and no search for the secret
    finds it once it has been cut, escaped or encoded. What the exception came of, or has grouped,
    follows it.
    """
    told: list[str] = []
    found = [error]
    for one in found:  # which grows
        told.append(f"{type(one).__qualname__}, at:\n")
        told += traceback.format_tb(one.__traceback__)
        if isinstance(one, BaseExceptionGroup):
            found += cast("BaseExceptionGroup[BaseException]", one).exceptions
        before = one.__cause__ if one.__suppress_context__ else one.__cause__ or one.__context__
        if before is not None and before not in found:
            found.append(before)
    return "".join(told)
