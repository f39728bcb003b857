"""What `Client.statistics` and `Server.statistics` return."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from druvarpc.protocol.caller import MAX_COMBINATIONS
from druvarpc.session import Session
from druvarpc.timings import MethodTimes, TimesTotals


class ClubCount(NamedTuple):
    """What was sent with the same methods in one frame.

    Attributes:
        frames: how many such frames.
        calls: how many calls were in them.
    """

    frames: int
    calls: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot of what one client or server has done.

    Attributes:
        connections: open now.
        calls_started: since the beginning, as are the other sums.
        calls_active: begun and not ended.
        calls_failed: ended with another status than OK, or by a lost connection; calls that their
            caller abandoned, also because of its deadline, don't count.
        clubs_sent: frames of calls (by a client) or of replies (by a server), also of one alone.
        calls_clubbed: calls or replies that went out in a frame with others.
        bytes_sent: written to sockets.
        bytes_received: read from sockets.
        bytes_saved_sent: that needn't be sent, since what calls carried was compressed.
        bytes_saved_received: that the peers needn't send, likewise, of what has been read.
        rtt: seconds of a round trip, the least measured on any open connection; None before the
            first measurement.
        send_window: bytes that may be sent before more credit comes, all connections together.
        receive_window: bytes that peers may send before anything is consumed, likewise.
        times: where the time of calls went, by method: of those that asked for it (see
            `Client.stub`) and have been replied to. A server knows `queue` and `handler`, and of
            what it sends `credit`; what else it waited for is its `way`.
        clubs: which calls of a client rode together: by the methods in a frame, each once and
            sorted. At most 256 such combinations are told apart; the others have the key ().
        calls_retried: by a client, once more each time; they are among `calls_started`.
        calls_hedged: copies that a client sent of calls whose replies took long, likewise.
        calls_refused: by a server that was at its limit (`Limits.total_calls`); they are among
            `calls_failed`.
        reconnects: how often a client opened a connection to a server to which it had none left.
    """

    connections: int
    calls_started: int
    calls_active: int
    calls_failed: int
    clubs_sent: int
    calls_clubbed: int
    bytes_sent: int
    bytes_received: int
    bytes_saved_sent: int
    bytes_saved_received: int
    rtt: float | None
    send_window: int
    receive_window: int
    times: Mapping[str, MethodTimes]
    clubs: Mapping[tuple[str, ...], ClubCount]
    calls_retried: int = 0
    calls_hedged: int = 0
    calls_refused: int = 0
    reconnects: int = 0


@dataclass(slots=True)
class Totals:
    """Sums that outlive the connections they come from.

    Beside what `Statistics` tells, of calls that have ended:

    Attributes:
        calls_given_up: without a reply.
        calls_ill: with a reply that says that the server is ill.
    """

    calls_started: int = 0
    calls_ended: int = 0
    calls_failed: int = 0
    calls_given_up: int = 0
    calls_ill: int = 0
    clubs_sent: int = 0
    calls_clubbed: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_saved_sent: int = 0
    bytes_saved_received: int = 0
    times: TimesTotals = field(default_factory=TimesTotals)
    clubs: dict[tuple[str, ...], ClubCount] = field(
        default_factory=dict[tuple[str, ...], ClubCount]
    )

    @property
    def calls_good(self) -> int:
        """Calls whose reply says that the server is well, whatever came of them."""
        return self.calls_ended - self.calls_given_up - self.calls_ill

    def add(self, session: Session) -> None:
        """Add what a connection that has ended did."""
        self.clubs_sent += session.core.clubs_sent
        self.calls_clubbed += session.core.calls_clubbed
        self.bytes_sent += session.bytes_sent
        self.bytes_received += session.bytes_received
        self.bytes_saved_sent += session.core.saved_sent
        self.bytes_saved_received += session.core.saved_received
        _add_clubs(self.clubs, session)

    def update(self, other: "Totals") -> None:
        """Add the sums of others."""
        for one in fields(self):
            if one.name not in ("times", "clubs"):
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        self.times.update(other.times)
        for key, count in other.clubs.items():
            _add_club(self.clubs, key, count)

    def with_open(self, sessions: Iterable[Session]) -> Statistics:
        """Return the sums together with those of the open connections."""
        opened = list(sessions)
        cores = [session.core for session in opened]
        clubs = dict(self.clubs)
        for session in opened:
            _add_clubs(clubs, session)
        return Statistics(
            connections=len(opened),
            calls_started=self.calls_started,
            calls_active=self.calls_started - self.calls_ended,
            calls_failed=self.calls_failed,
            clubs_sent=self.clubs_sent + sum(core.clubs_sent for core in cores),
            calls_clubbed=self.calls_clubbed + sum(core.calls_clubbed for core in cores),
            bytes_sent=self.bytes_sent + sum(session.bytes_sent for session in opened),
            bytes_received=self.bytes_received + sum(one.bytes_received for one in opened),
            bytes_saved_sent=self.bytes_saved_sent + sum(core.saved_sent for core in cores),
            bytes_saved_received=self.bytes_saved_received
            + sum(core.saved_received for core in cores),
            rtt=min((core.rtt for core in cores if core.rtt is not None), default=None),
            send_window=sum(core.send_window for core in cores),
            receive_window=sum(core.receive_window for core in cores),
            times=self.times.by_method(),
            clubs=clubs,
        )


def _add_clubs(clubs: dict[tuple[str, ...], ClubCount], session: Session) -> None:
    for methods, (frames, calls) in session.core.clubs.items():
        key = (methods,) if isinstance(methods, str) else tuple(sorted(methods))
        _add_club(clubs, key, ClubCount(frames, calls))


def _add_club(
    clubs: dict[tuple[str, ...], ClubCount], key: tuple[str, ...], count: ClubCount
) -> None:
    if key not in clubs and len(clubs) >= MAX_COMBINATIONS:
        key = ()
    before = clubs.get(key, ClubCount(0, 0))
    clubs[key] = ClubCount(before.frames + count.frames, before.calls + count.calls)
