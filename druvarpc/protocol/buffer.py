"""Bytes to frames: cuts what arrives, in whatever pieces, into headers and bodies.

What has come of an incomplete unit (the preface, a header, or a header and its body) waits in
`_pieces`, `_held` bytes in all; the unit is complete at `_need` bytes. Pieces are joined only then,
so that the work is linear in the input even at one byte a time; and a frame that lies within one
piece of input is never copied: its body is a view of that piece.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from druvarpc.errors import CloseCode, RemoteProtocolError
from druvarpc.protocol.frames import (
    HEADER_SIZE,
    MAGIC,
    MAX_FIRST_FRAME,
    MAX_ID,
    PREFACE,
    SETTINGS,
    VERSION,
    Buffer,
    Role,
    check_header,
    unpack_header,
)

# Pieces below this are gathered in one bytearray: an object for each of 65,536 one-byte pieces is
# 200 times the memory of the bytes, and a view of a few bytes would pin all that they came with.
_SMALL: Final = 4096


class Frame(NamedTuple):
    """One frame, its body a view of the input."""

    kind: int
    flags: int
    id: int
    body: memoryview


class FrameBuffer:
    """Cuts one direction of a connection into frames.

    Args:
        sender: the role of the side whose bytes come here.
        max_frame: the greatest length of a body to accept, in bytes.
    """

    def __init__(self, sender: Role, max_frame: int) -> None:
        self._sender = sender
        self._max_frame = max_frame
        self._pieces: list[Buffer] = []
        self._held = 0
        self._need = len(PREFACE)
        self._in_preface = True
        self._has_settings = False

    @property
    def in_frame(self) -> bool:
        """Whether a unit has begun to arrive and isn't complete."""
        return self._held > 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that `data` completes.

        Raises:
            RemoteProtocolError: for a preface or a header that isn't allowed, after the frames
                before it. The buffer must not be used after that.
        """
        if self._in_preface:
            _check_magic(data, self._held)
        self._hold(memoryview(data))
        while self._held >= self._need:
            unit = memoryview(b"".join(self._pieces) if len(self._pieces) > 1 else self._pieces[0])
            self._pieces = []
            start, end = 0, len(unit)
            if self._in_preface:
                start = self._end_preface(unit)
            while end - start >= self._need:
                head, tail = unpack_header(unit, start)
                kind, length, flags, id = head >> 24, head & 0xFFFFFF, tail >> 56, tail & MAX_ID
                if self._need == HEADER_SIZE:
                    self._check(kind, length, flags, id)
                    self._need += length
                    if end - start < self._need:
                        break
                body = start + HEADER_SIZE
                start += self._need
                self._need = HEADER_SIZE
                yield Frame(kind, flags, id, unit[body:start])
            self._held = 0
            self._hold(unit[start:])

    def _hold(self, piece: memoryview) -> None:
        size = len(piece)
        self._held += size
        if size >= _SMALL or size >= self._need:
            self._pieces.append(piece)
        elif size:
            last = self._pieces[-1] if self._pieces else None
            if isinstance(last, bytearray):
                last += piece
            else:
                self._pieces.append(bytearray(piece))

    def _end_preface(self, unit: memoryview) -> int:
        version = unit[len(MAGIC)]
        if version != VERSION:
            raise RemoteProtocolError(
                f"protocol version {version} instead of {VERSION}", CloseCode.VERSION_MISMATCH
            )
        self._in_preface = False
        self._need = HEADER_SIZE
        return len(PREFACE)

    def _check(self, kind: int, length: int, flags: int, id: int) -> None:
        most = self._max_frame if self._has_settings else MAX_FIRST_FRAME
        if length > most:
            raise RemoteProtocolError(
                f"a frame of {length} bytes, at most {most} are accepted",
                CloseCode.FRAME_TOO_LARGE,
            )
        if (kind == SETTINGS) == self._has_settings:
            raise RemoteProtocolError(
                "SETTINGS came twice" if self._has_settings else "the first frame isn't SETTINGS"
            )
        self._has_settings = True
        check_header(kind, length, flags, id, self._sender)


def _check_magic(data: bytes, held: int) -> None:
    expected = MAGIC[held : held + len(data)]
    if not data.startswith(expected):
        raise RemoteProtocolError("not a druvarpc connection: the preface is wrong")
