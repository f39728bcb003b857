"""Two cores on a modelled TCP connection, in virtual time: how long a transfer takes.

Each direction has a bottleneck of a rate, a delay of half a round trip, and a sender that begins
with 10 segments and doubles what is under way each round trip while it is what limits the transfer
(slow start). Nothing is lost. What the socket takes ahead of that is bounded, as by
TCP_NOTSENT_LOWAT.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from druvarpc.protocol import CallsReceived, Connection, Limits, Stream

INITIAL = 14_000
UNSENT = 128 * 1024
MESSAGE = bytes(256 * 1024)
# Steps of the clock in a round trip.
STEPS = 40


@dataclass
class Tcp:
    """What `source` sends to `target`."""

    source: Connection
    target: Connection
    rate: float
    rtt: float
    most: float  # bytes under way: what the route and its queue hold
    refill: Callable[[], None]  # gives the source what the application sends
    window: float = INITIAL
    unsent: bytearray = field(default_factory=bytearray)
    sending: int = 0  # bytes on the way or not acknowledged
    busy: float = 0.0  # until then the bottleneck has work
    arriving: deque[tuple[float, bytes]] = field(default_factory=deque)
    acknowledged: deque[tuple[float, int]] = field(default_factory=deque)

    def step(self, now: float) -> None:
        """Do what is due."""
        full = 2 * self.sending > self.window
        while self.acknowledged and self.acknowledged[0][0] <= now:
            size = self.acknowledged.popleft()[1]
            self.sending -= size
            if full:
                self.window = min(self.window + size, self.most)
        while self.arriving and self.arriving[0][0] <= now:
            data = self.arriving.popleft()[1]
            self.target.receive_data(data, now)
            self.acknowledged.append((now + self.rtt / 2, len(data)))
        room = int(self.window) - self.sending
        while len(self.unsent) < room + UNSENT:
            self.refill()
            data = b"".join(self.source.data_to_send(now))
            if not data:
                break
            self.unsent += data
        if self.unsent and room > 0:
            piece = bytes(self.unsent[:room])
            del self.unsent[:room]
            self.sending += len(piece)
            self._transmit(piece, now)

    def _transmit(self, data: bytes, now: float) -> None:
        size = max(1, int(self.rate * self.rtt / STEPS))
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            self.busy = max(self.busy, now) + len(piece) / self.rate
            self.arriving.append((self.busy + self.rtt / 2, piece))


class Transfer:
    """A client and a server, and streams that carry messages one way as fast as they go."""

    def __init__(
        self,
        rate: float,
        rtt: float,
        *,
        limits: Limits | None = None,
        streams: int = 1,
        upwards: bool = True,
        depth: float = 2.0,
    ) -> None:
        limits = limits or Limits()
        self.now = 0.0
        self.rtt = rtt
        self.client = Connection("client", now=0.0, limits=limits)
        self.server = Connection("server", now=0.0, limits=limits)
        most = depth * rate * rtt
        self.up = Tcp(self.client, self.server, rate, rtt, most, self._refill)
        self.down = Tcp(self.server, self.client, rate, rtt, most, self._refill)
        self.sender, self.receiver = (
            (self.client, self.server) if upwards else (self.server, self.client)
        )
        self.taken = 0
        self.paused = False
        self.sources: list[Stream] = []
        self.sinks: list[Stream] = []
        served: list[Stream] = []
        calls = [Stream("Vault.put", b"\x90", more=True) for _ in range(streams)]
        for call in calls:
            self.client.call(call, 0.0)
        self.run(until=lambda: self._accept(served) == streams)  # a round trip, as in earnest
        self.sources, self.sinks = (calls, served) if upwards else (served, calls)

    def run(self, *, until: Callable[[], bool] = lambda: False, seconds: float = 60.0) -> float:
        """Let the clock run until something is so; return the seconds that it took."""
        began = self.now
        while self.now - began < seconds and not until():
            self.now += self.rtt / STEPS
            self.up.step(self.now)
            self.down.step(self.now)
            for stream in () if self.paused else self.sinks:
                while (message := self.receiver.take(stream, self.now)) is not None:
                    self.taken += len(message)
            for core in (self.sender, self.receiver) if self.sources else ():
                while core.next_event() is not None:
                    pass
        return self.now - began

    def _refill(self) -> None:
        for stream in self.sources:
            while self.sender.has_room(stream):
                self.sender.send(stream, MESSAGE)

    def _accept(self, served: list[Stream]) -> int:
        while (event := self.server.next_event()) is not None:
            if isinstance(event, CallsReceived):
                served += event.calls
        return len(served)
