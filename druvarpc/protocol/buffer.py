"""Bytes to frames: cuts what arrives, in whatever pieces, into headers and bodies.

A unit (the preface, a header, a body) that lies within one piece of input is taken as it lies
there, as a view. Of one that doesn't, what has come waits in `_pieces`, `_held` bytes in all; it is
complete at `_need` bytes. Pieces are joined only then, so that the work is linear in the input even
at one byte a time; those of a DATA frame's body aren't joined even then, but with the rest of the
message. A header is checked as soon as it is there, before its body is awaited.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from druvarpc.errors import CloseCode, RemoteProtocolError
from druvarpc.protocol.frames import (
    COMPRESSED,
    DATA,
    END_MESSAGE,
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


class Frame:
    """One frame.

    Attributes:
        size: bytes of the body.
        pieces: the body as it lies in the input; one piece of it at least.
    """

    __slots__ = ("flags", "id", "kind", "pieces", "size")

    # Neither a named tuple nor a dataclass: both are slower to make.
    def __init__(self, kind: int, flags: int, id: int, size: int, pieces: Sequence[Buffer]) -> None:
        self.kind = kind
        self.flags = flags
        self.id = id
        self.size = size
        self.pieces = pieces

    @property
    def body(self) -> Buffer:
        """The body in one piece."""
        return _joined(self.pieces)


class FrameBuffer:
    """Cuts one direction of a connection into frames.

    Args:
        sender: the role of the side whose bytes come here.
        max_frame: the greatest length of a body to accept, in bytes.
        compressed: messages may be compressed.
    """

    __slots__ = (
        "_compressed",
        "_has_settings",
        "_head",
        "_held",
        "_in_preface",
        "_max_frame",
        "_need",
        "_pieces",
        "_sender",
    )

    def __init__(self, sender: Role, max_frame: int, *, compressed: bool = False) -> None:
        self._sender = sender
        self._max_frame = max_frame
        self._compressed = COMPRESSED if compressed else 0
        self._pieces: list[Buffer] = []
        self._held = 0
        self._need = len(PREFACE)
        self._head: tuple[int, int, int, int] | None = None  # of the frame whose body is arriving
        self._in_preface = True
        self._has_settings = False

    @property
    def in_frame(self) -> bool:
        """Whether a unit has begun to arrive and isn't complete."""
        return self._held > 0 or self._head is not None

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """Yield the frames that `data` completes.

        Raises:
            RemoteProtocolError: for a preface or a header that isn't allowed, after the frames
                before it. The buffer must not be used after that.
        """
        if self._in_preface:
            _check_magic(data, self._held)
        view = memoryview(data)
        start, end = 0, len(view)
        while start < end:
            in_unit = self._held or self._in_preface or self._head is not None
            if not in_unit and end - start >= HEADER_SIZE:
                head, tail = unpack_header(view, start)
                start += HEADER_SIZE
            else:
                start, pieces = self._gather(view, start)
                if pieces is None:
                    return
                if self._in_preface:
                    self._end_preface(_joined(pieces))
                    continue
                if self._head is not None:
                    frame = Frame(*self._head, pieces)
                    self._head = None
                    self._need = HEADER_SIZE
                    yield frame
                    continue
                head, tail = unpack_header(_joined(pieces))
            kind, length, flags, id = head >> 24, head & 0xFFFFFF, tail >> 56, tail & MAX_ID
            self._check(kind, length, flags, id)
            if length <= end - start:
                body = view[start : start + length]
                start += length
                yield Frame(kind, flags, id, length, (body,))
            else:
                self._head = kind, flags, id, length
                self._need = length

    def _gather(self, view: memoryview, start: int) -> tuple[int, Sequence[Buffer] | None]:
        """Take what the unit still needs; return where the rest begins, and the unit if whole."""
        stop = min(start + self._need - self._held, len(view))
        self._hold(view[start:stop])
        if self._held < self._need:
            return stop, None
        pieces, self._pieces, self._held = self._pieces, [], 0
        return stop, pieces

    def _hold(self, piece: memoryview) -> None:
        self._held += len(piece)
        if len(piece) >= _SMALL:
            self._pieces.append(piece)
            return
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, bytearray):
            last += piece
        else:
            self._pieces.append(bytearray(piece))

    def _end_preface(self, preface: Buffer) -> None:
        version = preface[len(MAGIC)]
        if version != VERSION:
            raise RemoteProtocolError(
                f"protocol version {version} instead of {VERSION}", CloseCode.VERSION_MISMATCH
            )
        self._in_preface = False
        self._need = HEADER_SIZE

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
        if flags & self._compressed and kind == DATA and flags & END_MESSAGE:
            flags &= ~COMPRESSED
        check_header(kind, length, flags, id, self._sender)


def _joined(pieces: Sequence[Buffer]) -> Buffer:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_magic(data: Buffer, held: int) -> None:
    expected = MAGIC[held : held + len(data)]
    if bytes(data[: len(expected)]) != expected:
        raise RemoteProtocolError("not a druvarpc connection: the preface is wrong")
