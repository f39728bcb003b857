"""Who calls: the server's `authenticate`, asked once for each AUTH of a connection.

A client says who it is by AUTH (docs/protocol.md, 5.7), and what it says holds for the calls that
come after it. Each AUTH, and the time before the first, is one `_Claim`. It is settled when the
first call comes that falls under it, not before: so a client that sends one AUTH after the other
makes the server ask for none of them. Until it is settled its calls wait here, and with them those
of later claims, in the order in which they came; they are as many as the connection's `max_calls`
at most. Arguments that came as data have left their credit behind, and may be many times what the
client sent if it compresses: of these no more wait than `max_message` for a connection and
`total_memory` for a server, together with what windows take. Calls beyond that are refused. One
task for each connection asks, claim by claim.

What `authenticate` said is kept with the claim: an identity until it expires, a refusal as long as
the claim lasts, and a failure (it raised something else, or took too long) for `_RETRY_AFTER`.
"""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import trio

from druvarpc.authorization import whereabouts
from druvarpc.errors import Status, cancelled_part, rpc_error_in
from druvarpc.handlers import outcome_of
from druvarpc.peers import Certificate, UnixCredentials
from druvarpc.protocol import AuthReceived, Budget, Outcome, State, Stream
from druvarpc.session import Session

__all__ = ["Authenticate", "Authenticator", "Caller", "Identity"]

logger = logging.getLogger("druvarpc")

# Seconds until a failed `authenticate` is asked again for the same claim: soon enough for whom it
# depends on to be back, and not for each call of a client that only repeats it.
_RETRY_AFTER: Final = 1.0
# Claims that may wait to be settled. A client has a second when it refreshes its token meanwhile;
# one that has many makes this end keep the tokens.
_MOST_PENDING: Final = 16
# What `authenticate` answers to the claim itself.
_FINAL: Final = (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED)

_TOO_MANY: Final = Outcome(
    Status.RESOURCE_EXHAUSTED, "too many tokens wait to be looked at", not_started=True
)
_TOO_LARGE: Final = Outcome(
    Status.RESOURCE_EXHAUSTED,
    "the arguments of calls that wait for authentication are too large",
    not_started=True,
)


@dataclass(frozen=True, slots=True)
class Caller:
    """What `authenticate` decides by. The token and the metadata are not part of its `repr`.

    Attributes:
        address: of the peer.
        certificate: what the peer has shown, if TLS asked for it and has verified it.
        credentials: the process at the other end of a Unix socket.
        token: what the client sent; None if it sent nothing.
        metadata: what the client sent with the token; of equal keys, the last.
    """

    address: str
    certificate: Certificate | None = None
    credentials: UnixCredentials | None = None
    token: str | None = field(default=None, repr=False)
    metadata: Mapping[str, str | bytes] = field(default_factory=dict[str, str | bytes], repr=False)


@dataclass(frozen=True, slots=True)
class Identity:
    """What `authenticate` may return instead of an identity: one that holds for a time.

    Attributes:
        value: the identity.
        expires_in: seconds until a call makes the server authenticate again.
    """

    value: object
    expires_in: float = math.inf

    def __post_init__(self) -> None:
        if not self.expires_in > 0:
            raise ValueError(f"expires_in={self.expires_in!r}: more than 0 seconds")


Authenticate = Callable[[Caller], Awaitable[object]]


class _Claim:
    """One AUTH, or the time before the first, and what came of it.

    Attributes:
        identity: whose calls they are, if `refusal` is None.
        refusal: what its calls are answered.
        until: when it has to be settled (again), in trio's clock.
        waiting: its calls that wait for that; None while it isn't to be settled.
    """

    __slots__ = ("identity", "metadata", "refusal", "token", "until", "waiting")

    def __init__(self, auth: AuthReceived | None) -> None:
        self.token = None if auth is None else auth.token
        self.metadata: Mapping[str, str | bytes] = {} if auth is None else dict(auth.metadata)
        self.identity: object = None
        self.refusal: Outcome | None = None
        self.until = -math.inf
        self.waiting: dict[Stream, None] | None = None


class Authenticator:
    """Gives the calls of one connection their identity, or refuses them.

    Args:
        authenticate: the user's.
        session: the connection.
        memory: what the connections of the server share.
        release: called with calls that may run now, their identity as `token`.
        refuse: called to answer one of them.
    """

    __slots__ = (
        "_authenticate",
        "_claim",
        "_memory",
        "_pending",
        "_refuse",
        "_release",
        "_session",
        "_wake",
    )

    def __init__(
        self,
        authenticate: Authenticate,
        session: Session,
        memory: Budget,
        release: Callable[[Sequence[Stream]], None],
        refuse: Callable[[Stream, Outcome], None],
    ) -> None:
        self._authenticate = authenticate
        self._session = session
        self._memory = Budget(session.core.limits.max_message, memory)
        self._release = release
        self._refuse = refuse
        self._claim = _Claim(None)  # before the first AUTH
        self._pending: deque[_Claim] = deque()
        self._wake = trio.lowlevel.ParkingLot()

    def admit(self, calls: Sequence[Stream]) -> list[Stream]:
        """Return those of new calls that may run now; keep or answer the others."""
        now = self._session.now()
        ready: list[Stream] = []
        for call in calls:
            claim = self._claim_of(call)
            # None must overtake another, though it were another's: hence also those of a claim
            # that is settled wait if some of an earlier one do.
            if claim.waiting is not None:
                self._keep(call, claim.waiting)
            elif len(self._pending) >= _MOST_PENDING:
                self._refuse(call, _TOO_MANY)
            elif self._pending or now >= claim.until:
                claim.waiting = {}
                self._pending.append(claim)
                self._wake.unpark()
                self._keep(call, claim.waiting)
            elif claim.refusal is not None:
                self._refuse(call, claim.refusal)
            else:
                call.token = claim.identity
                ready.append(call)
        return ready

    def forget(self, call: Stream) -> None:
        """Keep a call no longer that is answered otherwise, such as one that was abandoned."""
        waiting = self._claim_of(call).waiting
        if waiting is not None and call in waiting:
            del waiting[call]
            self._memory.give(self._weight(call))

    def part(self) -> None:
        """Leave the shared memory to the other connections."""
        self._memory.part()

    def _keep(self, call: Stream, waiting: dict[Stream, None]) -> None:
        if self._memory.take(self._weight(call)):
            waiting[call] = None
        else:
            self._refuse(call, _TOO_LARGE)

    def _weight(self, call: Stream) -> int:
        """Return the bytes that a call takes beside what it has a right to, as `Limits` says."""
        size = len(call.payload or b"")
        return size if size > self._session.core.limits.max_inline else 0

    def _claim_of(self, call: Stream) -> _Claim:
        auth = call.token
        if not isinstance(auth, AuthReceived):
            return self._claim
        if not isinstance(auth.answer, _Claim):
            auth.answer = _Claim(auth)
        return auth.answer

    async def run(self) -> None:
        """Settle claims until cancelled."""
        while True:
            while not self._pending:
                await self._wake.park()
            claim = self._pending[0]
            if self._session.now() >= claim.until:
                await self._settle(claim)
            self._pending.popleft()
            self._go_on(claim)

    async def _settle(self, claim: _Claim) -> None:
        """Ask the user's function."""
        session = self._session
        who = session.transport.who
        caller = Caller(who.address, who.certificate, who.credentials, claim.token, claim.metadata)
        timeout = session.core.limits.handshake_timeout
        claim.identity = claim.refusal = None
        claim.until = math.inf
        failure: Exception | None = None
        try:
            with trio.fail_after(timeout):
                claim.identity = await self._authenticate(caller)
        # The user's code, in a task of ours: it must not end the connection, nor the server.
        except Exception as error:
            failure = error
        except BaseExceptionGroup as group:
            raise cancelled_part(group) from None
        if failure is not None:
            claim.refusal = self._refusal(caller, failure)
            if claim.refusal.status not in _FINAL:
                claim.until = session.now() + _RETRY_AFTER
        elif isinstance(claim.identity, Identity):
            claim.until = session.now() + claim.identity.expires_in
            claim.identity = claim.identity.value

    def _refusal(self, caller: Caller, error: Exception) -> Outcome:
        """Return what calls are answered whose caller couldn't be told."""
        core = self._session.core
        found = rpc_error_in(error)
        if found is not None:
            try:
                outcome = outcome_of("authenticate", found, core.peer.max_inline)
                if outcome is not None:
                    return replace(outcome, not_started=True)
            except Exception as malformed:
                error = malformed
        if isinstance(error, trio.TooSlowError):
            logger.error("%s: authenticate took too long", caller.address)
            return Outcome(Status.UNAVAILABLE, "authentication took too long", not_started=True)
        logger.error("%s: authenticate failed\n%s", caller.address, whereabouts(error))
        return Outcome(Status.INTERNAL, "the server failed", not_started=True)

    def _go_on(self, claim: _Claim) -> None:
        """Let the calls go that waited for a claim."""
        waiting, claim.waiting = claim.waiting, None
        if waiting is None or self._session.ended:
            return
        self._memory.give(sum(map(self._weight, waiting)))
        # Of one that was abandoned the event may be still to come.
        calls = [
            call
            for call in waiting
            if call.final is None and call.state in (State.OPEN, State.CALLED)
        ]
        if claim.refusal is not None:
            for call in calls:
                self._refuse(call, claim.refusal)
            self._session.flush()
            return
        for call in calls:
            call.token = claim.identity
        if calls:
            self._release(calls)
