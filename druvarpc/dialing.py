"""How a client's connections are opened: to the first server that answers, in the time for that."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import trio

from druvarpc.client_connection import ClientConnection, no_answer
from druvarpc.errors import ConnectionLost, RpcError
from druvarpc.protocol import Budget, Clubbing, Connection, Limits
from druvarpc.protocol.compression import Algorithm
from druvarpc.tokens import Tokens
from druvarpc.transports import Transport

# Connections at once to a server that drains as they come, until that counts as a failure: where
# several servers share a port, the next one may be another's.
_DRAINED: Final = 4


class Target(NamedTuple):
    """A server.

    Attributes:
        address: where it is, for messages.
        dial: opens a transport; raises ConnectionLost.
    """

    address: str
    dial: Callable[[], Awaitable[Transport]]


@dataclass(frozen=True, slots=True)
class Terms:
    """How the connections of a client are made.

    Attributes:
        number: how many to each server, or "auto".
        clubbing: how calls gather.
        limits: what the client accepts on each.
        timeout: seconds that opening one may take.
        reconnect: they are made again when all have ended.
        compression: the algorithms for what calls carry, the best first.
        tokens: who the client says it is on each; None for nobody.
    """

    number: int | Literal["auto"] = 1
    clubbing: Clubbing = Clubbing()
    limits: Limits = Limits()
    timeout: float = 10.0
    reconnect: bool = True
    compression: Sequence[Algorithm] = ()
    tokens: Tokens | None = None


# Makes a connection of a core and a transport, and runs it.
Begin = Callable[[Connection, Transport], ClientConnection]


class Dialer:
    """Opens connections.

    Args:
        targets: where to, in the order of preference.
        terms: how.
        budget: the client's memory.
    """

    def __init__(self, targets: Sequence[Target], terms: Terms, budget: Budget) -> None:
        self._targets = targets
        self._terms = terms
        self._budget = budget

    async def open(self, start: float, begin: Begin) -> ClientConnection:
        """Open a connection that takes calls. Each target gets an equal part of the time.

        Args:
            start: from when on the time counts.
            begin: called for each that is tried; one that isn't returned ends by itself.

        Raises:
            ConnectionLost: none answers.
        """
        timeout = self._terms.timeout / len(self._targets)
        errors: list[ConnectionLost] = []
        for target in self._targets:
            try:
                return await self._open(target, start, timeout, begin)
            except ConnectionLost as error:
                errors.append(error)
                start = trio.current_time()
        if len(errors) == 1:
            raise errors[0]
        messages = dict.fromkeys(error.message for error in errors)  # each once
        raise ConnectionLost("; ".join(messages), not_started=True)

    async def _open(
        self, target: Target, start: float, timeout: float, begin: Begin
    ) -> ClientConnection:
        for left in range(_DRAINED, 0, -1):
            transport: Transport | None = None
            with trio.move_on_at(start + timeout):
                if self._terms.tokens is not None:
                    # Before the connection is there: the server doesn't wait for ever.
                    await _need_token(self._terms.tokens, target.address)
                transport = await target.dial()
            if transport is None:
                raise no_answer(target.address, timeout)
            core = Connection(
                "client",
                now=trio.current_time(),
                limits=self._terms.limits,
                clubbing=self._terms.clubbing,
                budget=self._budget,
                compression=self._terms.compression,
            )
            connection = begin(core, transport)
            try:
                await connection.settle(start + timeout, timeout)
                return connection
            except ConnectionLost:
                if not connection.drained or left == 1:
                    raise
        raise AssertionError("the last attempt returns or raises")


async def _need_token(tokens: Tokens, address: str) -> None:
    """Have a token, for a connection to `address`.

    Raises:
        ConnectionLost: none can be had.
    """
    try:
        await tokens.get()
    except RpcError as error:
        raise ConnectionLost(f"can't connect to {address}: {error}", not_started=True) from error
