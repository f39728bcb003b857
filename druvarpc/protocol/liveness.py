"""Whether the peer is there: handshake, unfinished frames, keepalive and the round-trip time."""

from typing import Final

from druvarpc.errors import CloseCode, RemoteProtocolError
from druvarpc.protocol.limits import Limits

# While data arrive the round trip is measured this often, in seconds.
_MEASURE: Final = 5.0
# The same at first, when the only measurement may have waited behind the first burst.
_MEASURE_FIRST: Final = 0.25
# The round-trip time is the least of so many measurements: what waited in a queue is left out, and
# a route that became longer is noticed after eight. So many are also taken in haste.
_SAMPLES: Final = 8


class Liveness:
    """The clocks of one connection.

    Attributes:
        rtt: seconds, the least of the latest measurements, None before the first.
        settled: the peer's settings have come.
    """

    __slots__ = (
        "_count",
        "_frame",
        "_handshake",
        "_heard",
        "_limits",
        "_measure",
        "_pings",
        "_samples",
        "rtt",
        "settled",
    )

    def __init__(self, limits: Limits, now: float) -> None:
        self.rtt: float | None = None
        self.settled = False
        self._limits = limits
        self._heard = now
        self._handshake = now + limits.handshake_timeout
        self._frame: float | None = None
        self._pings: list[tuple[int, float]] = []
        self._count = 0
        self._samples: list[float] = []
        self._measure = now + _MEASURE_FIRST

    def heard(self, now: float, *, in_frame: bool, completed: bool) -> bool:
        """Note that bytes have come: whether they completed a frame, and whether one has begun.

        Returns:
            whether the round-trip time should be measured again.
        """
        self._heard = now
        if not in_frame:
            self._frame = None
        elif completed or self._frame is None:
            self._frame = now + self._limits.frame_timeout
        return now >= self._measure and not self._pings

    def ping(self, now: float) -> int:
        """Note that a PING is sent; return its id."""
        self._count += 1
        self._measure = now + (_MEASURE if self._count > _SAMPLES else _MEASURE_FIRST)
        self._pings.append((self._count, now))
        return self._count

    def pong(self, id: int, now: float) -> float:
        """Note a PONG; return the round-trip time that it measured, in seconds."""
        if not self._pings or self._pings[0][0] != id:
            raise RemoteProtocolError(f"PONG {id} answers no PING")
        sample = now - self._pings.pop(0)[1]
        self._samples = [*self._samples[1 - _SAMPLES :], sample]
        self.rtt = min(self._samples)
        return sample

    @property
    def deadline(self) -> float:
        """When `expire` must be called next."""
        if not self.settled:
            return self._handshake
        silence = self._silence() if self._pings else self._heard + self._limits.keepalive_interval
        return silence if self._frame is None else min(silence, self._frame)

    def expire(self, now: float) -> bool:
        """Do what time demands: tell whether a PING is to be sent.

        Raises:
            RemoteProtocolError: the peer took too long.
        """
        if not self.settled:
            if now >= self._handshake:
                raise _timeout("the handshake", self._limits.handshake_timeout)
            return False
        if self._frame is not None and now >= self._frame:
            raise _timeout("a frame", self._limits.frame_timeout)
        if now < self._silence():
            return False
        if self._pings:
            raise _timeout("an answer to PING", self._limits.keepalive_timeout)
        return True

    def _silence(self) -> float:
        if self._pings:
            return max(self._heard, self._pings[0][1]) + self._limits.keepalive_timeout
        return self._heard + self._limits.keepalive_interval


def _timeout(what: str, seconds: float) -> RemoteProtocolError:
    return RemoteProtocolError(f"{what} took more than {seconds:g} s", CloseCode.TIMEOUT)
