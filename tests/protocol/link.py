"""One direction of a wire that delays, splits and stops: bytes stay in it until they are let out.

It also knows which frames are still under way, so that a test can add up where all credit is.
"""

from collections import deque
from typing import NamedTuple

from druvarpc.protocol import Connection
from druvarpc.protocol.frames import (
    CREDIT,
    DATA,
    END_MESSAGE,
    FRAME_COST,
    HEADER_SIZE,
    MAX_ID,
    PREFACE,
    decode_credits,
    unpack_header,
)


class UnderWay(NamedTuple):
    """A frame in the link, with what it takes of, or gives to, each window; 0 is the connection."""

    end: int
    cost: dict[int, int]
    credit: dict[int, int]


class Link:
    """Carries what `source` sends to `target`."""

    def __init__(self, source: Connection, target: Connection) -> None:
        self._source = source
        self._target = target
        self._bytes = bytearray()
        self._accepted = len(PREFACE)  # frames begin behind it
        self._delivered = 0
        self._frames: deque[UnderWay] = deque()

    def __len__(self) -> int:
        return len(self._bytes)

    def accept(self, now: float, most: int) -> None:
        """Let the source write about `most` bytes once."""
        data = b"".join(self._source.data_to_send(now, most))
        position = 0 if self._delivered or self._bytes else len(PREFACE)
        self._bytes += data
        while position < len(data):
            position = self._note(data, position)

    def deliver(self, now: float, size: int) -> None:
        """Let `size` bytes out, in one piece."""
        piece = bytes(self._bytes[:size])
        del self._bytes[:size]
        self._delivered += len(piece)
        self._target.receive_data(piece, now)
        while self._frames and self._frames[0].end <= self._delivered:
            self._frames.popleft()

    def cost(self, id: int = 0) -> int:
        """Return what the DATA under way cost on the connection or on a stream."""
        return sum(frame.cost.get(id, 0) for frame in self._frames)

    def credit(self, id: int = 0) -> int:
        """Return what the CREDIT under way gives to the connection or to a stream."""
        return sum(frame.credit.get(id, 0) for frame in self._frames)

    def _note(self, data: bytes, position: int) -> int:
        head, tail = unpack_header(data, position)
        kind, length, flags, id = head >> 24, head & 0xFFFFFF, tail >> 56, tail & MAX_ID
        body = position + HEADER_SIZE
        end = body + length
        self._accepted += HEADER_SIZE + length
        cost: dict[int, int] = {}
        credit: dict[int, int] = {}
        if kind == DATA and (length or flags & END_MESSAGE):
            cost = {0: length + FRAME_COST, id: length + FRAME_COST}
        elif kind == CREDIT:
            credit = dict(decode_credits(data[body:end]))
        self._frames.append(UnderWay(self._accepted, cost, credit))
        return end
