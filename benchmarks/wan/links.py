"""The links that the questions are put over."""

from dataclasses import dataclass, replace

# Bytes that a queue holds at least: on short links one round trip's worth is next to nothing, and
# no router has a queue of ten packets.
LEAST_QUEUE = 64 * 1024


@dataclass(frozen=True)
class Link:
    """What a link is like, in both directions.

    Attributes:
        name: what the tables call it.
        rtt: seconds that an empty link takes for a small packet and its answer.
        rate: bits per second, of IP packets.
        loss: share of the packets that are lost, each by itself.
        burst_loss: share that are lost in bursts.
        burst_length: packets that a burst has on average.
        queue: bytes that wait at most; None for one round trip's worth, and at least LEAST_QUEUE.
        seed: of what is lost.
        congestion_control: of both ends; None for the kernel's default.
    """

    name: str
    rtt: float
    rate: float
    loss: float = 0.0
    burst_loss: float = 0.0
    burst_length: float = 1.0
    queue: int | None = None
    seed: int = 1
    congestion_control: str | None = None

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait at most."""
        if self.queue is not None:
            return self.queue
        return max(LEAST_QUEUE, int(self.rtt * self.rate / 8))

    def __str__(self) -> str:
        rate = f"{self.rate / 1e9:g} Gbit/s" if self.rate >= 1e9 else f"{self.rate / 1e6:g} Mbit/s"
        lost = f", {self.loss + self.burst_loss:.3g} lost" if self.loss or self.burst_loss else ""
        by = f", {self.congestion_control}" if self.congestion_control else ""
        return f"{self.name}: {self.rtt * 1e3:g} ms, {rate}{lost}{by}"


METRO = Link("metro", 0.020, 100e6, loss=0.05)
LINKS = {
    link.name: link
    for link in (
        # A queue of 64 KiB would be half a millisecond's worth, and empty whenever a core is late.
        Link("rack", 0.0, 1e9, queue=1 << 20),
        Link("city", 0.010, 1e9),
        METRO,
        Link("branch", 0.040, 100e6),
        Link("region", 0.040, 200e6),
        Link("outpost", 0.080, 100e6),
        Link("continent", 0.080, 1e9),
        *(
            replace(METRO, name=f"metro-{by}", congestion_control=by)
            for by in ("bbr", "cubic", "reno")
        ),
    )
}
