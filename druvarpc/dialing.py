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
# Seconds that a server has before the next is tried beside it: the delay between attempts of Happy
# Eyeballs (RFC 8305, section 8).
_HEAD_START: Final = 0.25
_NOT_NEEDED: Final = "another server answered"


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
        """Open a connection that takes calls, to the first target that answers.

        Happy Eyeballs (RFC 8305): each has a head start before the next, which begins at once when
        one fails. All of them together have the time of `Terms.timeout`.

        Args:
            start: from when on the time counts.
            begin: called for each that is tried; one that isn't returned ends by itself.

        Raises:
            ConnectionLost: none answers.
        """
        deadline = start + self._terms.timeout
        if self._terms.tokens is not None:
            # Before a connection is there: the server doesn't wait for ever. And before a target's
            # head start, which is for what that one takes.
            await self._need_token(self._terms.tokens, deadline)
        if len(self._targets) == 1:
            return await self._open(self._targets[0], deadline, begin)
        return await self._open_first(deadline, begin)

    async def _open_first(self, deadline: float, begin: Begin) -> ClientConnection:
        # Of many, each is to have its turn in time.
        head_start = min(_HEAD_START, self._terms.timeout / len(self._targets))
        opened: list[ClientConnection] = []
        errors: dict[int, ConnectionLost] = {}

        async def attempt(index: int, failed: trio.Event) -> None:
            try:
                connection = await self._open(self._targets[index], deadline, begin)
            except ConnectionLost as error:
                errors[index] = error
                failed.set()
            else:
                opened.append(connection)
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for index in range(len(self._targets)):
                    failed = trio.Event()
                    nursery.start_soon(attempt, index, failed)
                    with trio.move_on_after(head_start):
                        await failed.wait()
        except BaseException:
            for connection in opened:
                connection.session.close(message=_NOT_NEEDED)
            raise
        for connection in opened[1:]:  # they were opened in the same moment
            connection.session.close(message=_NOT_NEEDED)
        if opened:
            return opened[0]
        messages = dict.fromkeys(errors[index].message for index in sorted(errors))  # each once
        raise ConnectionLost("; ".join(messages), not_started=True)

    async def _open(self, target: Target, deadline: float, begin: Begin) -> ClientConnection:
        timeout = self._terms.timeout
        for left in range(_DRAINED, 0, -1):
            transport: Transport | None = None
            with trio.move_on_at(deadline):
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
                await connection.settle(deadline, timeout)
                return connection
            except ConnectionLost:
                if not connection.drained or left == 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _need_token(self, tokens: Tokens, deadline: float) -> None:
        """Have a token until `deadline`.

        Raises:
            ConnectionLost: none can be had.
        """
        address = self._targets[0].address
        try:
            with trio.move_on_at(deadline) as scope:
                await tokens.get()
        except RpcError as error:
            raise ConnectionLost(
                f"can't connect to {address}: {error}", not_started=True
            ) from error
        if scope.cancelled_caught:
            raise no_answer(address, self._terms.timeout)
