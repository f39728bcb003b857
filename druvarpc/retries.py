"""Calls that are made again: whether, and after what pause.

Every cardinality asks `Attempts.pause` when an attempt has failed, and makes another if that
returns. What was never in a server's hands moves on for nothing: to the connection that is being
opened, or to another server. What a server was given is another attempt, with a pause, out of the
retry budget (`druvarpc.resilience`). What the server refused for the client's token is made again
once, with a new token, if there is another (`druvarpc.tokens`).
"""

import random
from typing import Final

import trio

from druvarpc.calls import Options
from druvarpc.endpoints import Endpoints
from druvarpc.errors import CircuitOpen, ConnectionLost, RpcError, Status
from druvarpc.tokens import Token, Tokens

# Times that a call moves on for nothing: servers that drain one after the other, each as the call
# comes, aren't met more often than that, and a server that refuses all is soon left alone.
_MOVES: Final = 16


class Attempts:
    """The attempts of one call.

    Args:
        endpoints: where it is made.
        options: those of its stub.
        idempotent: it may be made again though it may have been begun.
        sent: the first attempt has been given to a connection.
    """

    __slots__ = (
        "_endpoints",
        "_failed",
        "_idempotent",
        "_moved",
        "_renewed",
        "_retry",
        "_sent",
        "_token",
        "_wait",
        "_went_well",
        "made",
    )

    def __init__(
        self, endpoints: Endpoints, options: Options, *, idempotent: bool, sent: bool = False
    ) -> None:
        self._endpoints = endpoints
        self._retry = options.retry
        self._wait = options.wait
        self._idempotent = idempotent
        self._failed = 0
        self._moved = 0
        self._renewed = False
        # What the attempt was made with; None if that isn't known, for one that was made before.
        self._token: Token | None = None
        self._went_well = 0  # others, when this one was refused
        self._sent = sent  # once, at least
        self.made = sent  # this attempt was

    def begun(self, calls: int = 1) -> None:
        """Note that an attempt has been given to a connection, or those of several calls."""
        self._endpoints.retried += calls if self._sent else 0
        self._sent = self.made = True
        tokens = self._endpoints.tokens
        self._token = None if tokens is None else tokens.current

    async def pause(self, error: RpcError, calls: int = 1, elapsed: float = 0.0) -> None:
        """Wait until the next attempt is to begin.

        Args:
            error: how this one failed.
            calls: how many are made again together.
            elapsed: seconds since then, which are part of the pause.

        Raises:
            RpcError: `error`, or what keeps the next one from being made.
        """
        # Maybe what cancels this task has ended the connection a moment before. And who calls again
        # and again what fails at once shall not keep others from running.
        await trio.lowlevel.checkpoint()
        made, self.made = self.made, False
        if self._may_renew(error):
            tokens = self._endpoints.tokens
            assert tokens is not None
            await tokens.renew()
            if tokens.refused:
                raise error
            return
        if isinstance(error, CircuitOpen):
            raise error
        if isinstance(error, ConnectionLost) and error.not_started and self._may_move(made):
            try:
                await self._endpoints.ready(wait=self._wait)
                return
            except ConnectionLost as unready:
                error = unready
        await self._back_off(error, calls, elapsed)

    def follows(self, error: RpcError) -> bool:
        """Whether another attempt may begin now, beside that of another call which has waited.

        If not it is as if nobody had asked.
        """
        if not self._follows(error):
            return False
        self.made = False
        return True

    def _follows(self, error: RpcError) -> bool:
        if self._may_renew(error):
            tokens = self._endpoints.tokens
            return tokens is not None and not tokens.refused  # that other has had a new one
        if isinstance(error, ConnectionLost) and error.not_started and self._may_move(self.made):
            return True
        retry = self._retry
        if retry is None or not may_fare_better(error, idempotent=self._idempotent):
            return False
        if self._failed + 1 >= retry.attempts or not self._endpoints.may_retry(retry):
            return False
        self._failed += 1
        return True

    def refused(self, error: RpcError, elapsed: float, went_well: int) -> float | None:
        """Return the pause of a call that the server refused; None if it isn't made again.

        It isn't charged to the retry budget: who asks sees to it that no more calls are made than
        the server takes.

        Args:
            error: the refusal (`is_refusal`).
            elapsed: seconds since then.
            went_well: how many other calls of the same kind have. If that has grown since it was
                refused before, the attempts are counted anew.
        """
        if went_well > self._went_well:
            self._failed, self._went_well = 0, went_well
        if self._retry is None or self._endpoints.over:
            return None
        pause = self._retry.pause(self._failed + 1, random.random(), error.retry_after)
        if pause is None:
            return None
        if trio.current_time() + pause - elapsed >= trio.current_effective_deadline():
            return None
        self._failed += 1
        self.made = False
        return pause

    def _may_renew(self, error: RpcError) -> bool:
        """Whether the call may be made again with a new token, which it may once."""
        tokens = self._endpoints.tokens
        if tokens is None or not renewable(tokens, error):
            return False
        tokens.note_refusal(self._token)
        renewed, self._renewed = self._renewed, True
        return not renewed

    def _may_move(self, made: bool) -> bool:
        """Whether the call may go elsewhere at once: no server has begun it."""
        if made and self._retry is None:
            return False
        self._moved += 1
        return self._moved <= _MOVES

    async def _back_off(self, error: RpcError, calls: int, elapsed: float) -> None:
        retry = self._retry
        if retry is None or not may_fare_better(error, idempotent=self._idempotent):
            raise error
        if self._endpoints.over:
            raise error
        self._failed += 1
        pause = retry.pause(self._failed, random.random(), error.retry_after)
        if pause is None:
            raise error
        pause = max(pause - elapsed, 0.0)
        if trio.current_time() + pause >= trio.current_effective_deadline():
            raise error
        if not self._endpoints.may_retry(retry, calls):
            raise error
        await trio.sleep(pause)


def is_refusal(error: RpcError) -> bool:
    """Whether a server has too many calls, and has told when it takes this one."""
    busy = error.status is Status.RESOURCE_EXHAUSTED and error.not_started
    return busy and error.retry_after is not None


def may_fare_better(error: RpcError, *, idempotent: bool) -> bool:
    """Whether a call that failed so may be made again, and could fare better."""
    if error.status is Status.UNAVAILABLE:
        return error.not_started or idempotent
    if error.status is Status.RESOURCE_EXHAUSTED:
        return error.not_started or (idempotent and error.retry_after is not None)
    return False


def renewable(tokens: Tokens | None, error: RpcError) -> bool:
    """Whether a call failed since the server didn't take the client's token, and it can change."""
    refused = error.status is Status.UNAUTHENTICATED and error.not_started
    return refused and tokens is not None and tokens.renewable
