"""The calls of one window (`druvarpc.windowed`): those in flight, and those that wait to be taken.

A window that isn't fixed is tuned by `druvarpc.protocol.concurrency`. All that a call costs for
that is a token in a list, which is taken out when it is done; once in a round trip one is timed.

A call that failed and may be made again (`druvarpc.retries`) is, when it is its turn, and with it
those that failed as well. One that finds no connection is held, and no other starts before it.

Calls that a server refused because it has too many begin again each at the time that it named, and
until then new ones leave room for them. From then on no more are in flight than it took
(`Flight.places`), less a part so that other clients get some, and one more for each so many that
went well: additive increase, multiplicative decrease (Chiu and Jain, "Analysis of the increase and
decrease algorithms for congestion avoidance in computer networks", 1989). They are attempted as
often as it takes, as long as others end well between two attempts.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from heapq import heappop, heappush
from typing import Any, Final

import trio

from druvarpc.calls import Call
from druvarpc.errors import RpcError
from druvarpc.protocol.concurrency import LEAST, ConcurrencyLimit
from druvarpc.retries import Attempts, is_refusal
from druvarpc.stubs import UnaryMethod

# With `window=None`: bytes of arguments and results that calls may take in this process at once. At
# 1 Gbit/s and 80 ms 10 MB are on their way; twice that, as in calls, and some more. It isn't tuned:
# what it bounds is memory, and how much of it is on its way the connection sees to.
_MOST_BYTES: Final = 24 * 1024 * 1024
# With `window=None`: as many again as may be in flight may wait to be taken. So a call that takes
# long doesn't keep those behind it from starting, nor a consumer that does let them pile up.
_SLOTS: Final = 2
# Beyond what a server takes at once: calls that are ready to go when it takes more.
_MARGIN: Final = 1 / 8
# Calls that start before what they are is written: the server shall not wait for a whole window.
PORTION: Final = 256

# The part of a server's places that a window keeps when it has been refused one more, once a round.
_DECREASE: Final = 7 / 8
# What `Flight.take` returns if the call whose turn it was is made again later.
LATER: Final = object()

_NO_KEYWORDS: Final[Mapping[str, Any]] = {}


class Flight:
    """The calls of one window.

    Attributes:
        calls: those whose results haven't been taken, and the bytes that each is charged for.
        started: how many calls there have been.
        error: why the source of arguments failed.
        held: the arguments of a call that can't start, for lack of a connection, and why.
        later: those that the server refused: when they begin again, a number that tells them apart,
            the call that has their turn, and their latest attempt.
        places: how many the server takes at once, infinite until it has refused one.
    """

    def __init__(self, stub: UnaryMethod, window: int | None, *, ordered: bool) -> None:
        self.stub = stub
        self.calls: dict[Call, int] = {}
        self.started = 0
        self.error: Exception | None = None
        self.held: tuple[bytes, RpcError] | None = None
        self.later: list[tuple[float, int, Call, Call]] = []
        self.places = math.inf
        self._again: dict[Call, Attempts] = {}  # those made again
        # If ordered: the latest attempt of a call that has a turn; None as long as it is `later`.
        self._latest: dict[Call, Call | None] = {}
        self._ordered = ordered
        self._turns: deque[Call] = deque()  # whose results are taken next: all, or those done
        self._changed = trio.lowlevel.ParkingLot()
        self._waiting = 0
        self._repeated = 0
        self._refusals = 0
        self._number = 0
        self._next_decrease = 0.0  # of `places`: when so many calls have gone well
        self._bytes = 0
        self._tuned = window is None
        self._tuner: ConcurrencyLimit | None = None  # made with the first call
        self._timeless = self._tuned  # no call is being timed, and one should be
        # A token for each call that isn't done. To take one out is all that most calls do when they
        # are done, and no Python code runs for it.
        self._undone: list[None] = []
        self._pop = self._undone.pop
        self._expected = 0  # bytes of a result
        if window is None:
            # Until the first call has told what its server takes.
            self._limit, self._most_calls, self._most_bytes = 1, LEAST, _MOST_BYTES
        else:
            self._limit, self._most_calls, self._most_bytes = window, window, sys.maxsize
        self._most_undone: float = self._limit  # or the server's `places`

    @property
    def has_room(self) -> bool:
        """Whether one more call may start."""
        return (
            self.held is None
            and len(self._undone) + len(self.later) < self._most_undone
            and len(self.calls) < self._most_calls
            and self._bytes < self._most_bytes
        )

    @property
    def ready(self) -> bool:
        """Whether the result whose turn it is can be taken."""
        turns = self._turns
        if not turns:
            return False
        if self._latest:
            call = self._latest.get(turns[0], turns[0])
            return call is not None and call.done
        return turns[0].done

    def fill(self, source: Iterator[Any]) -> bool:
        """Start one call, and more until there is no room or a portion is full.

        Returns:
            whether there may be more arguments.
        """
        try:
            self.add(next(source))
            while self.started % PORTION and self.has_room:
                self.add(next(source))
        except StopIteration:
            return False
        except Exception as error:
            # The source failed, or what it gave can't be sent: raised in its turn.
            self.error = error
            return False
        return True

    def add(self, argument: Any) -> None:
        """Start the call for one more argument."""
        payload, _ = self.stub.method.encode_call((argument,), _NO_KEYWORDS)
        self._begin(payload)

    def _begin(self, payload: bytes) -> None:
        try:
            call = self.stub.begin(payload)
        except RpcError as error:
            self.held = payload, error
            if self._waiting:
                self.wake()
            return
        size = len(payload)
        if self._expected:
            # At most so much that there is always room for `LEAST` results.
            size += min(self._expected, _MOST_BYTES // LEAST)
        self.calls[call] = size
        self._bytes += size
        self.started += 1
        if self._ordered:
            self._turns.append(call)
        self._watch(call)
        if self._timeless and len(self._undone) >= self._most_undone:
            self._time(call)
        if self._waiting:
            self.wake()

    def _watch(self, call: Call) -> None:
        self._undone.append(None)
        call.on_done = self._pop if self._ordered else partial(self._note, call)

    async def resume(self) -> bool:
        """Start the call that is held, when there is a connection; return whether there is."""
        assert self.held is not None
        payload, error = self.held
        attempts = Attempts(
            self.stub.connections, self.stub.options, idempotent=self.stub.method.idempotent
        )
        try:
            while self.held is not None:
                await attempts.pause(error)
                self.held = None
                self._begin(payload)
                if self.held is not None:
                    error = self.held[1]
        except RpcError as last:
            self.held, self.error = None, last
            return False
        self.wake()
        return True

    async def take(self) -> Any:
        """Return the result that is `ready`, or make its call again and wait for that.

        Returns:
            `LATER` if the server refused the call and named a time at which it may begin again.
        """
        call = first = self._turns.popleft()
        if self._latest:
            latest = self._latest.pop(first, first)
            assert latest is not None
            call = latest
        if call.plain:
            await trio.lowlevel.checkpoint_if_cancelled()
            result = self.stub.decode(call)
        elif self._refused(call) and self._postpone(first, call):
            return LATER
        else:
            call, result = await self._result(call)
        if self.places is not math.inf:
            self._set_places(self.places + 1 / self.places)
        if self._tuned and call.result is not None:
            # An average of the latest that moves by an eighth.
            self._expected += len(call.result) - self._expected >> 3
        self._bytes -= self.calls.pop(call)
        if self._again:
            self._again.pop(call, None)
        if self._waiting:
            self.wake()
        return result

    # Calls that the server refused.

    def _refused(self, call: Call | None) -> bool:
        if call is None or not call.done or not call.failed:
            return False
        error = call.failure
        return isinstance(error, RpcError) and is_refusal(error)

    def _postpone(self, first: Call, call: Call) -> bool:
        """Note when a call that was refused begins again, and others that were refused with it.

        Args:
            first: what had its turn, which it gets back.
            call: its latest attempt.

        Returns:
            whether it does so.
        """
        refused = [(first, call)]
        if self._ordered:
            self._turns.appendleft(first)
            latest = ((other, self._latest.get(other, other)) for other in self._turns)
            refused += ((a, b) for a, b in latest if a is not first and b and self._refused(b))
        self._refusals += len(refused)
        went_well = self.started + self._repeated - len(self._undone) - self._refusals
        postponed = [self._postpone_one(*one, went_well) for one in refused]
        places = min(self.places, len(self._undone))
        if went_well >= self._next_decrease:
            places *= _DECREASE
            self._next_decrease = went_well + places
        self._set_places(max(places, 1))
        if self._ordered and not postponed[0]:
            self._turns.popleft()
        return postponed[0]

    def _postpone_one(self, first: Call, call: Call, went_well: int) -> bool:
        error = call.failure
        assert isinstance(error, RpcError)
        self._again[call] = attempts = self._attempts_of(call)
        pause = attempts.refused(error, trio.current_time() - call.failed_at, went_well)
        if pause is None:
            return False
        self._number += 1
        heappush(self.later, (call.failed_at + pause, self._number, first, call))
        if self._ordered:
            self._latest[first] = None
        return True

    def restart(self) -> bool:
        """Begin the calls again whose time has come; return whether there were any."""
        restarted, now = False, trio.current_time()
        while self.later and self.later[0][0] <= now:
            _, _, first, call = heappop(self.later)
            restarted = True
            try:
                latest = self._replace(call, self._again.pop(call))
                self._watch(latest)
            except RpcError as error:
                # It is made again in its turn, as one that failed so.
                latest = call
                latest.error, latest.failed_at = error, now
                if not self._ordered:
                    self._turns.append(latest)
            if self._ordered:
                self._latest[first] = latest
            # The server had told that it would have a place.
            self._set_places(max(self.places, len(self._undone)))
        return restarted

    def _set_places(self, places: float) -> None:
        self.places = places
        self._most_undone = min(self._limit, places)

    # Calls that failed are made again.

    async def _result(self, call: Call) -> tuple[Call, Any]:
        """Return the result of the call whose turn it is, and the call that it is of in the end."""
        while True:
            try:
                return call, await self.stub.result(call)
            except RpcError as error:
                failed = error
            call = await self._repeat(call, failed)
            self._follow()

    async def _repeat(self, call: Call, error: RpcError) -> Call:
        attempts = self._attempts_of(call)
        # Its turn may have come long after its failure.
        elapsed = trio.current_time() - call.failed_at if call.failed else 0.0
        while True:
            await attempts.pause(error, elapsed=elapsed)
            try:
                return self._replace(call, attempts)
            except RpcError as again:
                error, elapsed = again, 0.0

    def _follow(self) -> None:
        """Make others again that failed before it is their turn, but for those it is too early for.

        In their own turn each would take a round trip by itself.
        """
        turns = self._turns
        if not self._ordered:
            self._turns = deque()
        now = trio.current_time()
        for first in turns:
            call = self._latest.get(first, first)
            again = None
            if call is not None and call.done and call.failed:
                again = self._follower(call, now)
            if self._ordered and again is not None:
                self._latest[first] = again
            elif not self._ordered and again is None:
                self._turns.append(first)
        self.wake()

    def _follower(self, call: Call, now: float) -> Call | None:
        error = call.failure
        if not isinstance(error, RpcError) or call.failed_at + (error.retry_after or 0.0) > now:
            return None
        attempts = self._attempts_of(call)
        if not attempts.follows(error):
            self._again[call] = attempts
            return None
        try:
            again = self._replace(call, attempts)
        except RpcError:
            return None  # it waits for its turn
        self._watch(again)
        return again

    def _attempts_of(self, call: Call) -> Attempts:
        attempts = self._again.pop(call, None)
        if attempts is None:
            stub = self.stub
            attempts = Attempts(
                stub.connections, stub.options, idempotent=stub.method.idempotent, sent=True
            )
        return attempts

    def _replace(self, call: Call, attempts: Attempts) -> Call:
        """Begin a call that takes the place of another.

        Raises:
            RpcError: that can't be done now.
        """
        self._again[call] = attempts
        assert call.payload is not None
        again = self.stub.begin(call.payload)
        attempts.begun()
        self._repeated += 1
        self._again[again] = self._again.pop(call)
        self.calls[again] = self.calls.pop(call)
        return again

    async def changed(self, *, restarts: bool = True) -> None:
        """Wait until there may be room, a result to take, or, if asked for, a call to restart."""
        if self._ordered and self._turns:
            first = self._latest.get(self._turns[0], self._turns[0])
            if first is not None and first.on_done is self._pop:
                first.on_done = self._first_done
        self._waiting += 1
        try:
            if not (restarts and self.later):
                await self._changed.park()
                return
            with trio.CancelScope(deadline=self.later[0][0]):
                await self._changed.park()
        finally:
            self._waiting -= 1

    def wake(self) -> None:
        """Wake who waits for a change."""
        self._changed.unpark_all()

    def abandon(self) -> None:
        """Abandon what is in flight."""
        for call in self.calls:
            call.on_done = None
            call.calls.abandon(call)
        self.calls.clear()

    def _first_done(self) -> None:
        self._pop()
        self.wake()

    def _note(self, call: Call) -> None:
        call.on_done = None
        self._turns.append(call)
        self._pop()
        if self._waiting:
            self.wake()

    # Tuning.

    def _time(self, call: Call) -> None:
        """Take the time of this call: the first, or one that fills the window."""
        then, now = call.on_done, trio.current_time()
        assert then is not None
        if self._tuner is None:
            self._tuner = ConcurrencyLimit(_most(call, self.stub.connections.number))
            self._set_most(self._tuner.limit)
            call.on_done = partial(self._end_first, self._tuner, call, now, then)
        else:
            self._timeless = False
            self._tuner.mark(now, len(self._undone), self.started - len(self._undone))
            call.on_done = partial(self._end_round, self._tuner, call, then)

    def _end_first(
        self, tuner: ConcurrencyLimit, call: Call, began: float, then: Callable[[], None]
    ) -> None:
        call.on_done = None
        then()
        if call.failed:
            self._tuner = None  # the next tells
            self._limit, self._most_undone = 1, min(1, self.places)
            self.wake()
            return
        tuner.first(trio.current_time() - began)
        self._expect(call)
        self.wake()

    def _end_round(self, tuner: ConcurrencyLimit, call: Call, then: Callable[[], None]) -> None:
        call.on_done = None
        then()
        self._timeless = True
        if call.failed:
            # It tells nothing of the path, and those that failed with it haven't been delivered:
            # the round goes on.
            self.wake()
            return
        self._expect(call)
        ended = self.started - len(self._undone)
        tuner.end(trio.current_time(), ended, _most(call, self.stub.connections.number))
        self._set_most(tuner.limit)
        # Also if it is another call's turn, which may take long: there is room for more.
        self.wake()

    def _expect(self, call: Call) -> None:
        # At once, not by and by: before the first result is taken there may be room for many calls.
        if not self._expected and call.result is not None:
            self._expected = len(call.result)

    def _set_most(self, limit: int) -> None:
        self._limit, self._most_calls = limit, _SLOTS * limit
        self._most_undone = min(limit, self.places)


def _most(call: Call, connections: int) -> int:
    """Return how many calls are of use at most to the server that `call` is made to."""
    return int(connections * call.calls.session.core.peer.max_calls * (1 + _MARGIN))
