"""What one endpoint accepts, how long it waits, and how much useless work it bears."""

from dataclasses import dataclass, fields
from typing import Final

from druvarpc.errors import CloseCode, RemoteProtocolError
from druvarpc.protocol.frames import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an endpoint grants to each of its connections, and by `total_...` to all together.

    The memory that a peer can make a connection hold is at most `connection_window` for messages
    that nobody reads, `memory` for growth and for large messages that are arriving, and
    `max_calls` times `max_inline` plus `stream_window`. Beside that, `max_message` for arguments
    longer than `max_inline` of calls that wait for the server's `authenticate`.

    What waits to be sent to a peer that takes nothing is at most 16 MiB and one message a call.

    Attributes:
        max_calls: calls open at once; also the handlers running at once.
        max_club: calls in one club.
        max_inline: bytes of a payload that rides in a club; longer ones go as data.
        max_message: bytes of one argument list, result or piece.
        max_frame: bytes of one frame.
        max_metadata: bytes of one call's metadata.
        stream_window: bytes that a call may send before the first is consumed.
        connection_window: the same for all calls of a connection together.
        memory: bytes that windows may grow by and unfinished messages may take.
        total_memory: the same for all connections of a server, or of a client, together, and the
            arguments that wait for `authenticate`; beyond it each connection still gets one
            unfinished message.
        total_calls: handlers running at once, all connections of a server together; calls beyond it
            are refused, see docs/serving.md.
        handshake_timeout: seconds until the peer's settings have come.
        frame_timeout: seconds from a frame's first byte to its last.
        keepalive_interval: seconds of silence until the peer is asked whether it lives.
        keepalive_timeout: seconds that it has for an answer.
        stall_timeout: seconds that a call may wait for the peer's credit or socket.
    """

    max_calls: int = 4096
    max_club: int = 1024
    max_inline: int = 16 * 1024
    max_message: int = 16 * 1024 * 1024
    max_frame: int = 256 * 1024
    max_metadata: int = 8 * 1024
    stream_window: int = 512 * 1024
    connection_window: int = 4 * 1024 * 1024
    memory: int = 128 * 1024 * 1024
    total_memory: int = 512 * 1024 * 1024
    total_calls: int = 64 * 1024
    handshake_timeout: float = 10.0
    frame_timeout: float = 60.0
    keepalive_interval: float = 30.0
    keepalive_timeout: float = 20.0
    stall_timeout: float = 300.0

    def __post_init__(self) -> None:
        self.settings()
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be more than 0")

    def settings(self, compression: int = 0) -> Settings:
        """Return what of this the peer is told, with the algorithms that it may compress by."""
        return Settings(
            max_frame=self.max_frame,
            max_calls=self.max_calls,
            max_club=self.max_club,
            max_inline=self.max_inline,
            stream_window=self.stream_window,
            connection_window=self.connection_window,
            max_metadata=self.max_metadata,
            compression=compression,
        )


class Patience:
    """Counts frames that cost work and bring nothing (docs/protocol.md, section 10).

    A leaky bucket: it takes bursts, since a service that cancels a thousand calls at once is within
    its rights, and no sustained rate above `LEAK`.
    """

    __slots__ = ("_at", "_level")

    MOST: Final = 20_000
    LEAK: Final = 1_000  # a second

    def __init__(self, now: float) -> None:
        self._level = 0.0
        self._at = now

    def charge(self, now: float) -> None:
        """Count one such frame.

        Raises:
            RemoteProtocolError: it was one too many.
        """
        self._level = max(0.0, self._level - (now - self._at) * self.LEAK) + 1
        self._at = now
        if self._level > self.MOST:
            raise RemoteProtocolError(
                "too many frames that bring nothing (resets, pings, scraps of credit)",
                CloseCode.ABUSE,
            )
