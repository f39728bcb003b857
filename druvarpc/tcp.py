"""What is asked of the kernel's TCP: that it holds little unsent, and doesn't run dry.

What has been given to the kernel can't be overtaken any more, so it is to hold little that it
hasn't sent yet (TCP_NOTSENT_LOWAT). But not too little: it asks for more when half of that is left,
and what is left then must last until a task has been woken and has written. So the limit follows
the rate at which the kernel sends, which it tells (TCP_INFO), and how long waking the task takes:
longer in a process that computes, which shows by nothing being left when it writes. Where the
kernel doesn't tell, as on other systems than Linux, what trio sets stays: 16 KiB.

BBR needs more. It sends at 2.9 times the rate that it has measured until that stops growing, and a
round trip in which it ran out of data doesn't count, as the application may have had none. That
makes it go on for ever, with a queue as long as the link's buffer and as many losses, where data
can't come as fast as that: since the limit is too low; or since so much is on the way that the
send buffer is full (with `tcp_wmem` at 4 MiB from about 1 MB of bandwidth-delay product on). Both
were measured. Hence a generous limit while it probes, and for the second case a cap on the rate
(SO_MAX_PACING_RATE) for a moment, a little below what arrives, in which the queue drains, nothing
runs dry, and BBR sees that there is no more.

Later, BBR sends 1.25 times the rate for one round trip of eight, to find out whether there is more,
and makes a queue of a quarter of a round trip. What is to leave the link to others
(`Priority.BULK`, and data that small calls go beside) is capped to 1.1 times: it takes longer to
find more, and gets less than a fair share beside others that don't hold back.
"""

import math
import socket
import struct
import sys
import time
from typing import Final

import trio

if sys.platform == "linux":
    from fcntl import ioctl

# Seconds of sending that the kernel may hold: half of them must be enough to wake a task.
UNSENT_TIME: Final = 0.002
# By how much that grows, at most, for a process that is late; and what it keeps of that each time
# that it was not.
MOST_LATE: Final = 16.0
TIMELY: Final = 0.97
# The same while a congestion control probes, which shows by sending so much faster than arrives.
PROBING_UNSENT_TIME: Final = 0.020
PROBING: Final = 1.5
LEAST_UNSENT: Final = 16 * 1024
MOST_UNSENT: Final = 512 * 1024
# How often the kernel asks for more until it is asked how fast it sends.
TUNE_EVERY: Final = 8
# A start-up whose rate hasn't grown by a quarter for so many round trips is over: BBR itself takes
# three of them. Then it is held back for so many, and its rate capped to such a part.
STALE_ROUNDS: Final = 5
GROWTH: Final = 1.25
CAPPED_ROUNDS: Final = 5
# Only if the round trip shows a queue: without one nobody is harmed.
QUEUED: Final = 1.2
CAP: Final = 0.75
# What a gentle sender may send, of the greatest rate that arrived; that is forgotten within
# some thousand times that the kernel asked for more, seconds at 100 Mbit/s.
GENTLE_CAP: Final = 1.1
FORGET: Final = 0.999
# No sane rate is capped below this, in bytes a second; and none at all means something else.
LEAST_CAP: Final = 64 * 1024
NO_CAP: Final = 2**32 - 1  # the value of `SO_MAX_PACING_RATE` for that
# `SO_MAX_PACING_RATE` of Linux, which Python doesn't name.
_SO_MAX_PACING_RATE: Final = 47
# Of Linux' <linux/sockios.h>: how many bytes are unsent.
_SIOCOUTQNSD: Final = 0x894B
_BYTES: Final = struct.Struct("=i")
_NO_BYTES: Final = bytes(_BYTES.size)
# Of Linux' `struct tcp_info`: tcpi_pacing_rate at 104 and tcpi_delivery_rate at 160, in bytes a
# second; tcpi_rtt at 68 and tcpi_min_rtt at 148, in microseconds.
_INFO: Final = struct.Struct("=68xI32xQ36xI8xQ")
# Round trips, in microseconds, from which on it is worth it. Below that the send buffer isn't full
# of data on their way, and what trio sets, 16 KiB, serves bulk and small calls alike.
LONG: Final = 4_000
_NAME_SIZE: Final = 16  # of a congestion control


class Pacing:
    """What a socket is to hold unsent, and how fast to send: pure, rates in and limits out.

    Args:
        bbr: whether the congestion control is BBR, whose start-up may have to be ended.

    Attributes:
        unsent: bytes that the kernel may hold unsent.
        cap: bytes a second that it may send, `NO_CAP` for any number.
    """

    __slots__ = (
        "_bbr",
        "_fastest",
        "_fastest_at",
        "_held_until",
        "_late",
        "_rate",
        "cap",
        "unsent",
    )

    def __init__(self, *, bbr: bool) -> None:
        self.unsent = LEAST_UNSENT
        self.cap = NO_CAP
        self._bbr = bbr
        self._late = 1.0
        self._rate = 0.0  # the greatest that arrived lately
        self._fastest = 0.0  # the greatest of this start-up
        self._fastest_at = 0.0
        self._held_until = -math.inf

    def follow(
        self,
        now: float,
        rtt: float,
        sending: int,
        arriving: int,
        *,
        queued: bool,
        gentle: bool,
        dry: bool = False,
    ) -> None:
        """Set the limits anew.

        Args:
            now: the time in seconds.
            rtt: seconds of a round trip.
            sending: bytes a second that the kernel would send.
            arriving: those that arrive, 0 if that isn't known yet.
            queued: whether there is a queue on the way.
            gentle: whether what is sent should make no queue on the way.
            dry: whether there was a moment with nothing to send, for lack of a task that writes.
        """
        self._late = min(2 * self._late, MOST_LATE) if dry else max(TIMELY * self._late, 1.0)
        probing = sending > PROBING * arriving
        unsent_time = UNSENT_TIME * self._late
        if probing:
            unsent_time = max(unsent_time, PROBING_UNSENT_TIME)
        self.unsent = max(LEAST_UNSENT, min(int(sending * unsent_time), MOST_UNSENT))
        self._rate = max(FORGET * self._rate, arriving)
        if now < self._held_until:
            return  # a cap that followed what arrives would fall and fall
        if self._is_stale(now, rtt, arriving, harmful=probing and queued):
            self._held_until = now + CAPPED_ROUNDS * rtt
            self._fastest = 0
            self._cap(CAP * arriving)
        elif gentle and not probing:
            self._cap(GENTLE_CAP * self._rate)
        else:
            self.cap = NO_CAP

    def _is_stale(self, now: float, rtt: float, arriving: int, *, harmful: bool) -> bool:
        """Tell whether this is a start-up that doesn't end."""
        if not (self._bbr and harmful and arriving) or arriving > GROWTH * self._fastest:
            self._fastest, self._fastest_at = arriving, now
        return now - self._fastest_at > STALE_ROUNDS * rtt

    def _cap(self, rate: float) -> None:
        self.cap = max(LEAST_CAP, min(int(rate), NO_CAP))


class SendBuffer:
    """The unsent data of one TCP socket, on Linux.

    Args:
        connected: the socket.
        long: microseconds of a round trip from which on it is tuned.

    Attributes:
        gentle: what is sent should make no queue on the way.
        patience: seconds to wait for the kernel to ask for more before `has_room` is asked, since a
            third of the send buffer would stay unused otherwise; infinity if that is no matter.
        unsent: bytes that the kernel may hold unsent.
    """

    __slots__ = (
        "_capped_to",
        "_dry",
        "_long",
        "_pacing",
        "_socket",
        "_tune_in",
        "gentle",
        "patience",
        "unsent",
    )

    def __init__(self, connected: socket.socket, long: int = LONG) -> None:
        self._long = long
        self.gentle = False
        self.patience = math.inf
        self.unsent = LEAST_UNSENT
        self._capped_to = NO_CAP
        self._dry = False
        self._socket = connected
        self._tune_in = 1
        self._pacing: Pacing | None = None  # made when the congestion control has been chosen

    def has_room(self) -> bool:
        """Whether so little is unsent that more should be written now.

        The kernel itself says so only once a third of the send buffer is free, and on a link with a
        long round trip the buffer is full of data that was sent.
        """
        if self.patience == math.inf:
            return True  # the kernel's own word is good enough
        left = self._left()
        return left is None or left <= self.unsent // 2

    def _left(self) -> int | None:
        """Return how many bytes are unsent, None if it isn't told."""
        try:
            (unsent,) = _BYTES.unpack(ioctl(self._socket, _SIOCOUTQNSD, _NO_BYTES))
        except OSError:  # a sandbox that knows sockets only
            self.patience = math.inf
            return None
        assert isinstance(unsent, int)
        return unsent

    def tune(self) -> bool:
        """Follow the rate, to be called whenever the kernel asks for more; return if it changed."""
        if self.patience < math.inf and self._left() == 0:
            self._dry = True
        self._tune_in -= 1
        if self._tune_in:
            return False
        self._tune_in = TUNE_EVERY
        try:
            return self._follow()
        except OSError:
            self._tune_in = 0  # an old kernel, or none of Linux' own: never again
            return False

    def _follow(self) -> bool:
        connected, pacing = self._socket, self._pacing
        if pacing is None:
            name = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_SIZE)
            pacing = self._pacing = Pacing(bbr=name.startswith(b"bbr"))
        info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        if len(info) < _INFO.size:
            raise OSError("it doesn't tell its rates")
        rtt, sending, least_rtt, arriving = _INFO.unpack(info)
        if least_rtt < self._long:
            return False
        self.patience = min(least_rtt / 1e6 / 32, 0.005)
        pacing.follow(
            time.monotonic(),
            rtt / 1e6,
            sending,
            arriving,
            queued=rtt > QUEUED * least_rtt,
            gentle=self.gentle,
            dry=self._dry,
        )
        self._dry = False
        if not 0.97 * self._capped_to <= pacing.cap <= 1.03 * self._capped_to:
            value = struct.pack("=I", pacing.cap)
            connected.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, value)
            self._capped_to = pacing.cap
        if 0.8 * self.unsent <= pacing.unsent <= 1.25 * self.unsent:
            return False
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, pacing.unsent)
        self.unsent = pacing.unsent
        return True


def send_buffer(connected: socket.socket) -> SendBuffer | None:
    """Return the send buffer of a socket if it is one of TCP that can be tuned, else None."""
    internet = connected.family in (socket.AF_INET, socket.AF_INET6)
    return SendBuffer(connected) if internet and sys.platform == "linux" else None


def set_congestion_control(connected: socket.socket | trio.socket.SocketType, name: str) -> None:
    """Choose a socket's congestion control.

    Raises:
        ValueError: the system doesn't have it.
    """
    option = getattr(socket, "TCP_CONGESTION", None)
    if option is None:
        raise ValueError(f"congestion control {name!r}: this system has no choice")
    try:
        connected.setsockopt(socket.IPPROTO_TCP, option, name.encode())
    except OSError as error:
        raise ValueError(f"congestion control {name!r}: {error.strerror}") from error
