"""A client's servers: which of them a call is made to.

An `Endpoint` is what calls are divided between: one address, or with `Balance.PICK_FIRST` all of
them together, of which connections go to the first that answers. Where there is one, and it has one
connection, `only` is that connection's calls, and nobody asks further. It is None whenever there is
something to decide: which of several, that there is none, or that a circuit isn't closed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import trio

from druvarpc.calls import Calls
from druvarpc.connections import Connections
from druvarpc.dialing import Target, Terms
from druvarpc.errors import CircuitOpen, RpcError
from druvarpc.protocol import Budget, Priority
from druvarpc.resilience import Balance, Breaker, Circuit, Outliers, Retry, RetryBudget
from druvarpc.statistics import Statistics, Totals

# Seconds that `start` waits for other servers once one has answered: the delay between attempts of
# Happy Eyeballs (RFC 8305, section 8).
_OTHERS: Final = 0.25


class Endpoint:
    """One of the servers that calls are divided between.

    Args:
        targets: where it is; the first that answers counts.
        terms: how its connections are made.
        owner: tells of its changes.
        budget: the client's memory.
        rule: when no more calls are made to it; None for never.

    Attributes:
        connections: those to it.
        totals: what was done there.
        circuit: whether calls may be made; None if always.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        terms: Terms,
        owner: "Endpoints",
        budget: Budget,
        rule: Breaker | None,
    ) -> None:
        self.address = ", ".join(target.address for target in targets)
        self.totals = Totals()
        self.circuit = None if rule is None else Circuit(rule)
        self._owner = owner
        self.connections = Connections(
            targets,
            terms,
            owner.nursery,
            budget=budget,
            totals=self.totals,
            on_change=owner.note_change,
            on_failure=self._note_failure,
        )

    @property
    def open(self) -> bool:
        """Whether it is connected."""
        return self.connections.open

    @property
    def tripped(self) -> bool:
        """Whether the circuit isn't closed."""
        return self.circuit is not None and self.circuit.until is not None

    def admits(self, now: float) -> bool:
        """Whether calls may be made, as far as the circuit says."""
        totals = self.totals
        circuit = self.circuit
        return circuit is None or circuit.admits(totals.calls_good, totals.calls_given_up, now)

    def _note_failure(self) -> None:
        circuit = self.circuit
        if circuit is not None:
            now = trio.current_time()
            good, others = self.totals.calls_good, self._owner.failure_rate(self, now)
            if circuit.fail(good, now, others) and self._owner.may_open(self):
                circuit.open(now)
                self._owner.note_change()


class Endpoints:
    """The servers of one client.

    Args:
        targets: where they are.
        terms: how connections to them are made.
        nursery: where those run; it ends with the client.
        balance: how calls are divided.
        breaker: when no more calls are made to a server.
        outliers: the same where there are several, and no breaker.

    Attributes:
        only: the calls of the only connection to the only server, None if there is a choice.
        nursery: where connections run.
        limits: what the client accepts on each.
        tokens: who the client says it is; None for nobody.
        retried: how many calls have been made again.
        hedged: how many copies have been sent.
        kept: bytes of messages that are kept to be sent again.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        terms: Terms,
        nursery: trio.Nursery,
        *,
        balance: Balance = Balance.PICK_FIRST,
        breaker: Breaker | None = None,
        outliers: Outliers | None = None,
    ) -> None:
        self.only: Calls | None = None
        self.nursery = nursery
        self.limits = terms.limits
        self.tokens = terms.tokens
        self.retried = 0
        self.hedged = 0
        self.kept = 0
        self._ready: list[Endpoint] = []  # those that calls are made to
        self._waiting = trio.lowlevel.ParkingLot()  # for one of them
        self._turn = 0
        self._sole: Connections | None = None  # those to the only server, if it takes calls
        self._tripped = False  # a circuit isn't closed
        self._budgets: dict[Retry, RetryBudget] = {}
        groups = [targets] if balance is Balance.PICK_FIRST else [[one] for one in targets]
        rule = breaker or (outliers if len(groups) > 1 else None)
        self._forced = breaker is None  # rather a bad server than none
        self._most_out = len(groups)
        if breaker is None and outliers is not None:
            self._most_out = int(len(groups) * outliers.most)
        budget = Budget(terms.limits.total_memory)
        self._all: list[Endpoint] = []
        for group in groups:
            self._all.append(Endpoint(group, terms, self, budget, rule))

    async def start(self, start: float, *, wait: bool) -> None:
        """Connect; to one server at least.

        Args:
            start: when the time for that began.
            wait: go on until that succeeds.

        Raises:
            ConnectionLost: none answers in time.
        """
        if len(self._all) == 1 and not wait:
            await self._all[0].connections.start(start)
            return
        for one in self._all:
            one.connections.keep()
        await self.ready(wait=wait)
        with trio.move_on_after(_OTHERS):
            while not all(one.open or one.connections.hopeless for one in self._all):
                await self._waiting.park()

    async def close(self) -> None:
        """End all connections in good order."""
        async with trio.open_nursery() as nursery:
            for one in self._all:
                nursery.start_soon(one.connections.close)

    def statistics(self) -> Statistics:
        """See `Client.statistics`."""
        totals = Totals()
        for one in self._all:
            totals.update(one.totals)
        sessions = [session for one in self._all for session in one.connections.sessions]
        return replace(
            totals.with_open(sessions),
            calls_retried=self.retried,
            calls_hedged=self.hedged,
            reconnects=sum(one.connections.reconnects for one in self._all),
        )

    async def ping(self) -> float:
        """See `Client.ping`."""
        await self.ready(wait=False)
        return await next(one for one in self._all if one.open).connections.ping()

    @property
    def number(self) -> int:
        """How many connections take calls that carry much."""
        return max(1, sum(one.connections.number for one in self._ready))

    @property
    def open(self) -> bool:
        """Whether a server is connected."""
        return any(one.open for one in self._all)

    @property
    def over(self) -> bool:
        """Whether no calls can be made any more."""
        return all(one.connections.over for one in self._all)

    def check_open(self) -> None:
        """See to it that calls can be made, now or later.

        Raises:
            ConnectionLost: the client is closed, or isn't to reconnect.
        """
        if self.over:
            raise self._all[0].connections.lost()

    async def ready(self, *, wait: bool) -> None:
        """Wait for a connection, as long as first attempts at one are under way.

        Args:
            wait: also while others are, and in the pauses between them.

        Raises:
            ConnectionLost: there won't be one.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.open:
            connections = [one.connections for one in self._all]
            if all(one.over or (one.hopeless and not wait) for one in connections):
                raise connections[0].lost()
            await self._waiting.park()

    def choose(self, size: int, lane: Priority) -> Calls:
        """Return the calls of the connection that a call of so many bytes is made on.

        Raises:
            ConnectionLost: there is none.
            CircuitOpen: calls fail there.
        """
        return (self._sole or self._next()).choose(size, lane)

    def roomiest(self) -> Calls:
        """Return the calls of the connection that has the most room for one that carries much.

        Raises:
            ConnectionLost: there is none.
            CircuitOpen: calls fail there.
        """
        return (self._sole or self._next()).roomiest()

    def apart(self, calls: Calls, lane: Priority) -> Calls:
        """Return the calls of another server, else of another connection, else the same.

        Raises:
            ConnectionLost: there is none.
            CircuitOpen: calls fail there.
        """
        for _ in self._ready:
            chosen = self._next()
            if not chosen.has(calls):
                return chosen.choose(0, lane)
        return self._next().apart(calls)

    def _next(self) -> Connections:
        if self._tripped:
            self.note_change()  # a pause may be over
        ready = self._ready
        if not ready:
            raise self._refusal(trio.current_time())
        self._turn = (self._turn + 1) % len(ready)
        chosen = ready[self._turn]
        if self._tripped and chosen.circuit is not None:
            totals, now = chosen.totals, trio.current_time()
            chosen.circuit.let_through(totals.calls_good, totals.calls_given_up, now)
        return chosen.connections

    def _admitted(self, now: float) -> list[Endpoint]:
        opened = [one for one in self._all if one.open]
        admitted = [one for one in opened if one.admits(now)]
        return admitted or (opened if self._forced else [])

    def _refusal(self, now: float) -> RpcError:
        """Return the error of a call that no server is there for."""
        tripped = [one for one in self._all if one.open and one.circuit is not None]
        untils = [one.circuit.until for one in tripped if one.circuit is not None]
        pauses = [max(0.0, until - now) for until in untils if until is not None]
        if not pauses:
            return self._all[0].connections.lost()
        where = "; ".join(one.address for one in tripped)
        pause = min(pauses)
        when = f"again in {pause:.3g} s" if pause else "by another call just now"
        return CircuitOpen(f"calls to {where} fail; it is tried {when}", pause)

    # What endpoints tell.

    def note_change(self) -> None:
        """Take in which servers are connected, and which are well."""
        self._ready = self._admitted(trio.current_time())
        self._tripped = any(one.tripped for one in self._all)
        if len(self._all) == 1 and not self._tripped:
            self._sole = self._all[0].connections if self._ready else None
            self.only = self._all[0].connections.only
        else:
            self._sole = self.only = None
        self._waiting.unpark_all()

    def failure_rate(self, besides: Endpoint, now: float) -> float:
        """Return the mean rate of failures of the other servers."""
        rates = [
            one.circuit.rate(one.totals.calls_good, now)
            for one in self._all
            if one is not besides and one.circuit is not None
        ]
        return sum(rates) / len(rates) if rates else 0.0

    def may_open(self, endpoint: Endpoint) -> bool:
        """Whether one more server may get no calls."""
        out = [one for one in self._all if one.tripped and one is not endpoint]
        return len(out) < self._most_out

    # Retries.

    def may_retry(self, retry: Retry, calls: int = 1) -> bool:
        """Take so many retries from the budget, if they are left."""
        now = trio.current_time()
        budget = self._budgets.get(retry)
        if budget is None:
            budget = self._budgets[retry] = RetryBudget(retry.budget, retry.least, now)
        started = sum(one.totals.calls_started for one in self._all)
        return budget.take(calls, started - self.retried - self.hedged, now)
