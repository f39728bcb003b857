"""What a client at the near end of a link is to do, and how it and its server count.

Both ends read the same clock, since they are processes of one machine: so a receiver's count of
bytes by time can be read with the sender's times.
"""

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A figure, or a series of them.
Figures = dict[str, Any]

MEBIBYTE = 1 << 20
# Seconds for which a sender that is to stall must have sent nothing.
STALLED = 3.0


@dataclass(frozen=True)
class Job:
    """What a client is to do; an operation reads what it needs.

    Attributes:
        host: the server's address.
        port: the server's.
        server: the server's process.
        size: bytes of a payload or piece.
        count: tasks that call, calls of a club, or streams at once.
        calls: altogether.
        amount: bytes to be carried.
        each: bytes of a stream, after which another takes its place; 0 for no end.
        omit: seconds at the start that don't count.
        seconds: that count.
        every: seconds between two small calls.
        down: whether bulk goes to the client.
        sizes: of clubs, each tried in turn.
        costs: of a handler, each tried in turn: seconds busy, and seconds asleep.
        options: of the connection, for druvarpc.
    """

    host: str = ""
    port: int = 0
    server: int = 0
    size: int = 64
    count: int = 1
    calls: int = 0
    amount: int = 0
    each: int = 0
    omit: float = 0.0
    seconds: float = 0.0
    every: float = 0.0
    down: bool = False
    sizes: Sequence[int] = ()
    costs: Sequence[tuple[float, float]] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def payload(self) -> bytes:
        """What to send: bytes that don't compress."""
        return os.urandom(self.size)

    def pieces(self) -> Iterator[bytes]:
        """Yield one piece again and again, `amount` bytes in all."""
        piece, left = self.payload, self.amount
        while left > 0:
            yield piece[:left]
            left -= self.size


def now() -> float:
    """Return the seconds of the clock that all processes share."""
    return time.monotonic()


class Meter:
    """Counts bytes by the hundredth of a second in which they came."""

    SLOTS = 100

    def __init__(self, slots: Mapping[int, int] | None = None) -> None:
        self.slots: dict[int, int] = dict(slots or {})

    def add(self, size: int) -> None:
        """Count bytes that have come now."""
        slot = int(now() * self.SLOTS)
        self.slots[slot] = self.slots.get(slot, 0) + size

    def rate(self, start: float, end: float) -> float:
        """Return the bytes per second between two times."""
        first, last = int(start * self.SLOTS), int(end * self.SLOTS)
        total = sum(size for slot, size in self.slots.items() if first <= slot < last)
        return total * self.SLOTS / (last - first)

    @classmethod
    def total(cls, meters: Sequence[Mapping[int, int]]) -> "Meter":
        """Return what several counted together."""
        whole = cls()
        for slots in meters:
            for slot, size in slots.items():
                whole.slots[slot] = whole.slots.get(slot, 0) + size
        return whole


def quantiles(seconds: Sequence[float]) -> list[float]:
    """Return the least, the hundredths, and the greatest."""
    if len(seconds) < 2:
        return list(seconds)
    hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
    return [min(seconds), *hundredths, max(seconds)]


class Footprint:
    """The resident memory of both ends: what it grew by at its peak, from the making of this on."""

    def __init__(self, job: Job) -> None:
        self._processes = {"client": os.getpid(), "server": job.server}
        self._before: dict[str, int] = {}
        for end, process in self._processes.items():
            # proc(5): sets the peak to what is resident now.
            Path(f"/proc/{process}/clear_refs").write_text("5")
            self._before[end] = _status(process, "VmRSS")

    def growth(self) -> Figures:
        """Return bytes, by end, and what it was at its peak."""
        figures: Figures = {}
        for end, process in self._processes.items():
            peak = _status(process, "VmHWM")
            figures |= {end: peak - self._before[end], f"{end}_peak": peak}
        return figures


def _status(process: int, what: str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return int(value.split()[0]) * 1024
    raise ValueError(f"no {what} in the status of process {process}")


def burn(seconds: float) -> None:
    """Use so much processor time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
