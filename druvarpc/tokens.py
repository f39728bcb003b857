"""The token by which a client says who it is: fetched, refreshed ahead of its expiry, renewed.

All connections of a client send the same token. One task fetches it, so that however many ask,
there is one fetch at a time: a new connection that finds none that holds, a call that the server
refused as UNAUTHENTICATED, and the clock.
"""

import inspect
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import trio

from druvarpc.errors import RpcError, Status, cancelled_part, rpc_error_in
from druvarpc.protocol.frames import MAX_TOKEN

__all__ = ["Token", "TokenSource", "Tokens"]

# Of a token's life, after which the next one is fetched.
_REFRESH_AT: Final = 0.8
# Seconds between two attempts to refresh, at first and at most.
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0
# Seconds in which a token that the server refuses isn't asked for again: whoever has given it would
# give it again, and the calls that were refused together are all to be made with the next one.
_YOUNG: Final = 1.0


@dataclass(frozen=True, slots=True)
class Token:
    """What a callable may return instead of a token: one that expires, or has metadata.

    Neither the token nor the metadata are part of its `repr`.

    Attributes:
        value: the token, at most 16,384 bytes.
        expires_in: seconds, counted from when it was returned, or given to `connect`: afterwards no
            connection is made with it.
        metadata: what goes with it to the server's `authenticate`.
    """

    value: str = field(repr=False)
    expires_in: float = math.inf
    metadata: Mapping[str, str | bytes] = field(default_factory=dict[str, str | bytes], repr=False)

    def __post_init__(self) -> None:
        if type(self.value) is not str or len(self.value.encode()) > MAX_TOKEN:
            raise ValueError(f"a token is a str of at most {MAX_TOKEN} bytes")
        if not self.expires_in > 0:
            raise ValueError(f"expires_in={self.expires_in!r}: more than 0 seconds")


TokenSource = str | Token | Callable[[], "str | Token | Awaitable[str | Token]"]


class Tokens:
    """The token of one client.

    Args:
        source: the token, or what returns it.
        timeout: seconds that a fetch may take.

    Attributes:
        current: the last that was fetched.
        listeners: called with each new one.
    """

    def __init__(self, source: TokenSource, timeout: float) -> None:
        self.current: Token | None = None
        self.listeners: list[Callable[[Token], None]] = []
        self._source = source
        self._timeout = timeout
        self._failure: RpcError | None = None
        self._refused: Token | None = None  # the last that the server is known to refuse
        self._only = True  # there has been one at most
        self._fetched_at = self._failed_at = -math.inf
        self._refresh_at = math.inf
        self._expires_at = -math.inf
        self._pause = _FIRST_PAUSE
        self._wanted = trio.Event()
        self._waiting = trio.lowlevel.ParkingLot()
        if not callable(source):
            self._take(source if isinstance(source, Token) else Token(source))

    def __repr__(self) -> str:
        return f"<Tokens {self.current!r}>"

    async def get(self) -> Token:
        """Return a token that holds.

        Raises:
            RpcError: none can be had.
        """
        while self.current is None or trio.current_time() >= self._expires_at:
            await self._fetched()
        return self.current

    @property
    def renewable(self) -> bool:
        """Whether there may be another token."""
        return callable(self._source)

    @property
    def refused(self) -> bool:
        """Whether the server is known to refuse the current token."""
        now, refused = self.current, self._refused
        return (
            now is not None
            and refused is not None
            and (now.value, now.metadata) == (refused.value, refused.metadata)
        )

    def note_refusal(self, token: Token | None) -> None:
        """Note that the server refuses a token; None for one of those that there have been."""
        if token is None and self._only:
            token = self.current
        if token is self.current:
            self._refused = token

    async def renew(self) -> None:
        """Have a new token, since the server has refused one.

        Whether it takes the one that is `current` then, `refused` tells as far as that is known.

        Raises:
            RpcError: none can be had.
        """
        if trio.current_time() >= self._fetched_at + _YOUNG:
            await self._fetched()

    async def _fetched(self) -> None:
        """Wait for a fetch.

        Raises:
            RpcError: it failed, or there is nothing to fetch another token from.
        """
        if not self.renewable:
            raise RpcError(Status.UNAUTHENTICATED, "the token has expired", not_started=True)
        if trio.current_time() >= self._failed_at + _YOUNG:
            self._wanted.set()
            await self._waiting.park()
        failure = self._failure
        if failure is not None:
            # Each time another: it is raised in many tasks.
            error = RpcError(failure.status, failure.message, failure.details, not_started=True)
            raise error from failure.__cause__

    async def run(self) -> None:
        """Fetch tokens until cancelled."""
        source = self._source
        if not callable(source):
            return
        while True:
            with trio.move_on_at(self._refresh_at):
                await self._wanted.wait()
            try:
                with trio.fail_after(self._timeout):
                    token = source()
                    if inspect.isawaitable(token):
                        token = await token
                self._take(token if isinstance(token, Token) else Token(token))
            # The user's code, in a task of ours: it is raised where a token is needed.
            except Exception as error:
                self._fail(error)
            except BaseExceptionGroup as group:
                raise cancelled_part(group) from None
            self._wanted = trio.Event()
            self._waiting.unpark_all()

    def _take(self, token: Token) -> None:
        now = trio.current_time()
        self._only = self.current is None
        self.current = token
        self._failure = None
        self._pause = _FIRST_PAUSE
        self._fetched_at = now
        self._expires_at = now + token.expires_in
        self._refresh_at = now + _REFRESH_AT * token.expires_in
        for listener in self.listeners:
            listener(token)

    def _fail(self, error: Exception) -> None:
        now = trio.current_time()
        self._failed_at = now
        if self._refresh_at <= now:
            # Half of it is chance, so that clients whose tokens come from one place spread.
            self._refresh_at = now + random.uniform(0.5, 1) * self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        found = rpc_error_in(error)
        if found is None:
            # No more of it: its text may tell a secret.
            found = RpcError(
                Status.UNAUTHENTICATED, f"no token can be had: {type(error).__name__} was raised"
            )
            found.__cause__ = error
        self._failure = found
