"""For tests of services: a client wired in memory to a server, at once or over a simulated link.

Under trio's `MockClock` such tests take no real time.
"""

import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Literal

import trio

from druvarpc.client import CONNECT_TIMEOUT, Client, connect_to
from druvarpc.compression import Compression, algorithms_for
from druvarpc.dialing import Target, Terms
from druvarpc.handlers import ServerInterceptor
from druvarpc.identity import Authenticate
from druvarpc.links import Clock, Connection, End, Pipe, Wire
from druvarpc.outgoing import ClientInterceptor
from druvarpc.protocol import Clubbing, Limits
from druvarpc.resilience import Balance, Breaker, Outliers, Retry
from druvarpc.server import Server
from druvarpc.service import Service
from druvarpc.session import quiet_nursery
from druvarpc.timings import Timings
from druvarpc.tokens import TokenSource
from druvarpc.transports import Transport, memory_transports

__all__ = ["Link", "connected"]


class Link:
    """A link between two places, for tests: its connections share a rate, and break together.

    What it carries arrives complete and in order, as with TCP, and later than it was sent. It is
    meant for `trio.testing.MockClock(autojump_threshold=0)`, under which minutes of the link's time
    take milliseconds, but follows any clock of trio's. A link is for one `trio.run`.

    Args:
        rtt: seconds of a round trip, half of them in each direction.
        bandwidth: bytes per second in each direction, for all connections together. Headers of
            packets are not counted.
        queue: bytes that are taken from the sender ahead of the wire, in each direction of each
            connection; None for what the wire carries in a millisecond, and at least 16 KiB.
        jitter: seconds by which segments arrive later at most, by chance; they keep their order.
        window: bytes that each direction of each connection may have unacknowledged; None for no
            limit. It holds a connection to `window / rtt` bytes per second, as losses or a small
            socket buffer do.
        stalls: when nothing moves, as pairs of start and length, in seconds. Times are counted from
            the first connection.
        cuts: when all connections break, in seconds.
        seed: of the chance in `jitter`.

    Raises:
        ValueError: an argument is out of range.

    Attributes:
        rtt: as given.
        bandwidth: as given.
    """

    def __init__(
        self,
        *,
        rtt: float = 0.0,
        bandwidth: float = math.inf,
        queue: int | None = None,
        jitter: float = 0.0,
        window: int | None = None,
        stalls: Iterable[tuple[float, float]] = (),
        cuts: Iterable[float] = (),
        seed: int = 0,
    ) -> None:
        self._stalls = list(stalls)
        self._cuts = sorted(cuts)
        _require("rtt", 0 <= rtt < math.inf, "0 or more seconds")
        _require("bandwidth", bandwidth > 0, "more than 0 bytes per second")
        _require("queue", queue is None or queue >= 1, "1 byte or more")
        _require("jitter", 0 <= jitter < math.inf, "0 or more seconds")
        _require("window", window is None or window >= 1, "1 byte or more")
        valid = all(0 <= start < math.inf and seconds >= 0 for start, seconds in self._stalls)
        _require("stalls", valid, "pairs of 0 or more seconds")
        _require("cuts", all(time >= 0 for time in self._cuts), "0 or more seconds")
        self.rtt = rtt
        self.bandwidth = bandwidth
        self._window = window
        self._seed = seed
        self._clock = Clock()
        self._up = Wire(self._clock, rtt, bandwidth, queue, jitter)
        self._down = Wire(self._clock, rtt, bandwidth, queue, jitter)
        self._connections: list[Connection] = []
        self._made = 0

    @property
    def bytes_up(self) -> int:
        """Bytes taken from near ends so far; with `connected`, those are the client's."""
        return self._up.carried

    @property
    def bytes_down(self) -> int:
        """Bytes taken from far ends so far."""
        return self._down.carried

    @property
    def peak_queue(self) -> int:
        """The most bytes that ever waited for the wire in one direction; 0 without a rate."""
        return max(self._up.peak, self._down.peak)

    def connect(self) -> tuple[Transport, Transport]:
        """Return the near and the far end of a new connection, which both have at once.

        `connected` does this for you. An end has the methods of druvarpc's transports:
        `send_nowait`, `wait_writable`, `send_eof`, `receive` and `close`.
        """
        now = trio.current_time()
        if not self._made:
            for start, seconds in self._stalls:
                self._clock.stall(now + start, now + start + seconds)
            self._cuts = [now + cut for cut in self._cuts]
        self._made += 1
        up, down = (
            # Of its own, so that chance doesn't depend on the order in which tasks run.
            Pipe(wire, self._window, Random(f"{self._seed} {self._made} {way}"))
            for way, wire in (("up", self._up), ("down", self._down))
        )
        broken_at = next((cut for cut in self._cuts if cut > now), math.inf)
        connection = Connection(up, down, broken_at)
        self._connections = [other for other in self._connections if not other.over(now)]
        self._connections.append(connection)
        return End(connection, down, up), End(connection, up, down)

    def stall(self, seconds: float) -> None:
        """Let nothing move from now on for so long; `math.inf` for ever.

        Raises:
            ValueError: `seconds` is less than 0.
        """
        _require("seconds", seconds >= 0, "0 or more")
        now = trio.current_time()
        self._clock.stall(now, now + seconds)

    def cut(self) -> None:
        """Break all connections now, at both ends; what is on the way is lost.

        New ones can be made.
        """
        now = trio.current_time()
        for connection in self._connections:
            connection.break_at(now)
        self._connections.clear()


def _require(name: str, valid: bool, what: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {what}")


@asynccontextmanager
async def connected(
    services: Sequence[Service],
    *,
    connections: int | Literal["auto"] = 1,
    clubbing: Clubbing = Clubbing(),
    limits: Limits = Limits(),
    server_limits: Limits = Limits(),
    link: Link | None = None,
    balance: Balance = Balance.PICK_FIRST,
    reconnect: bool = True,
    wait_for_ready: bool = False,
    retry: Retry | None = Retry(),
    breaker: Breaker | None = None,
    outliers: Outliers | None = Outliers(),
    connect_timeout: float = CONNECT_TIMEOUT,
    timings: Timings = False,
    compression: Compression | None = None,
    token: TokenSource | None = None,
    authenticate: Authenticate | None = None,
    interceptors: Sequence[ClientInterceptor] = (),
    server_interceptors: Sequence[ServerInterceptor] = (),
) -> AsyncGenerator[Client, None]:
    """Yield a client of a server that offers `services`, both in this process.

    Everything but the socket is real: two protocol cores, their bytes, handlers and tasks. A
    connection that `Link.cut` has broken is opened again, as to a server that is still there.

    Args:
        services: what the server offers.
        connections: how many; see `connect`.
        clubbing: how the client's calls gather.
        limits: what the client accepts from the server.
        server_limits: what the server accepts from the client.
        link: what lies between the two, the client at its near end; None for nothing.
        balance: like `outliers` of no matter with one server; here, as all but for sockets, so that
            the options of `connect` can be given as they are.
        reconnect: see `connect`.
        wait_for_ready: how calls wait.
        retry: which calls are made again.
        breaker: when calls aren't made.
        outliers: the same, of several servers.
        connect_timeout: see `connect`.
        timings: find out where the time of every call goes; see `Client.stub`.
        compression: how both compress what calls carry; see `connect`.
        token: who the client says it is; see `connect`.
        authenticate: what the server makes of that; see `serve`.
        interceptors: run around the client's calls; see `connect`.
        server_interceptors: run around the server's; see `serve`.
    """
    server = Server(
        services,
        server_limits,
        compression=compression,
        authenticate=authenticate,
        interceptors=server_interceptors,
    )
    async with quiet_nursery() as nursery:

        async def dial() -> Transport:
            near, far = memory_transports() if link is None else link.connect()
            nursery.start_soon(server.serve_transport, far)
            return near

        async with connect_to(
            [Target("memory", dial)],
            Terms(
                connections,
                clubbing,
                limits,
                connect_timeout,
                reconnect,
                compression=algorithms_for(compression),
            ),
            balance=balance,
            wait_for_ready=wait_for_ready,
            retry=retry,
            breaker=breaker,
            outliers=outliers,
            timings=timings,
            token=token,
            interceptors=interceptors,
        ) as client:
            yield client
        nursery.cancel_scope.cancel()
