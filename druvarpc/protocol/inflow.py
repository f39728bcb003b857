"""The receiving half of flow control: messages put together, held, consumed, and credit for them.

Credit returns when the application takes a message. For the message that the application waits for
that would be too late if it is larger than the window, so its frames count as consumed while they
arrive: for the connection's window always, since such a message must never keep others from moving,
and for the stream's as long as the budget lasts. The first stream that finds the budget empty is
`_favoured` and overdraws it, by one message at most: of many large messages that arrive together,
one must always be able to become complete. Others wait in `_starving` and go on, in their order,
when some is given back.
"""

from collections.abc import Set

from druvarpc.protocol.buffer import Frame
from druvarpc.protocol.compression import Decompressor
from druvarpc.protocol.frames import COMPRESSED, END_MESSAGE, Buffer
from druvarpc.protocol.limits import Limits
from druvarpc.protocol.streams import Incoming, State, Stream
from druvarpc.protocol.windows import LEAST_RTT, MOST_RTT, Budget, ReceiveWindow

# A part of a message shorter than this is copied: a view would pin all the input it came with.
_VIEW = 16 * 1024


class Inflow:
    """What a connection receives as DATA.

    Args:
        limits: what this end accepts.
        receiving: the states of a stream in which data can come.
        budget: memory that is shared with other connections.
        decompressor: for messages that the peer has compressed.

    Attributes:
        rtt: seconds that windows take for a round trip.
        window: the connection's window.
        due: the credit to give, by stream; 0 is the connection.
    """

    __slots__ = (
        "_budget",
        "_decompressor",
        "_favoured",
        "_limits",
        "_receiving",
        "_starving",
        "due",
        "rtt",
        "window",
    )

    def __init__(
        self,
        limits: Limits,
        receiving: Set[State],
        budget: Budget | None,
        decompressor: Decompressor | None = None,
    ) -> None:
        self.rtt = MOST_RTT
        self._decompressor = decompressor
        self._limits = limits
        self._receiving = receiving
        self._budget = Budget(limits.memory, budget)
        self.window = ReceiveWindow(limits.connection_window, self._budget)
        self._favoured: Stream | None = None
        self._starving: dict[Stream, None] = {}
        self.due: dict[int, int] = {}

    def measured(self, rtt: float) -> None:
        """Note how long a round trip takes, in seconds."""
        self.rtt = min(max(rtt, LEAST_RTT), MOST_RTT)

    def part(self) -> None:
        """Leave the shared memory to the other connections."""
        self._budget.part()

    def open(self, stream: Stream) -> Incoming:
        """Return the incoming direction of a stream, made when first needed."""
        if stream.incoming is None:
            stream.incoming = Incoming(ReceiveWindow(self._limits.stream_window, self._budget))
            stream.incoming.ended = stream.state not in self._receiving
        return stream.incoming

    def discard(self, cost: int, now: float) -> None:
        """Return to the connection what DATA that nobody will read cost."""
        if cost:
            self.window.consume(cost, now, self.rtt)
            self._owe(0, self.window)

    def receive(self, stream: Stream, frame: Frame, cost: int, now: float) -> bool:
        """Add a DATA frame, whose cost both windows have counted, to a stream.

        Returns:
            whether the application, waiting for a message, has something to look at now.
        """
        incoming = self.open(stream)
        if incoming.too_long:
            self.discard(cost, now)
            return False
        incoming.cost += cost
        incoming.size += frame.size
        if incoming.size > self._limits.max_message:
            incoming.too_long = True
            self.end(stream, now)
            wanted, incoming.wanted = incoming.wanted, False
            return wanted
        if incoming.unread:
            self._relieve(incoming, now)
        if frame.size:
            for piece in frame.pieces:
                _add(incoming.parts, piece)
        if frame.flags & END_MESSAGE:
            wanted = incoming.wanted
            incoming.finish(compressed=bool(frame.flags & COMPRESSED))
            self._starving.pop(stream, None)
            return wanted
        if incoming.wanted:
            self._advance(stream, incoming, now)
        return False

    def take(self, stream: Stream, now: float) -> bytes | None:
        """Return the next message of a stream, or None and note that it is waited for.

        Raises:
            RemoteProtocolError: it is compressed wrongly; it stays there.
        """
        incoming = self.open(stream)
        if not incoming.messages:
            incoming.wanted = True
            self._advance(stream, incoming, now)
            return None
        message: bytes | None
        message, connection, own, advanced, compressed = incoming.messages[0]
        if compressed:
            assert self._decompressor is not None, "its flag would have been refused"
            message = self._decompressor.decompress(message, self._limits.max_message)
        incoming.messages.popleft()
        self.discard(connection, now)
        self._consume(stream, incoming, own, now)
        self._give(stream, advanced, now)
        if message is None:
            incoming.too_long = True
            self.close(stream, now)
        return message

    def end(self, stream: Stream, now: float) -> None:
        """Note that a stream's sender has ended; complete messages can still be taken."""
        incoming = self.open(stream)
        incoming.ended = True
        incoming.window.close()
        if stream.id:  # a call that wasn't sent has none, and 0 is the connection
            self.due.pop(stream.id, None)
        self._starving.pop(stream, None)
        self._return(stream, incoming.drop_unfinished(), now)

    def close(self, stream: Stream, now: float) -> None:
        """Forget a stream that nobody will read any more; the windows get their bytes back."""
        if stream.incoming is not None:
            self.end(stream, now)
            self._return(stream, stream.incoming.drop(), now)

    def credits(self) -> list[tuple[int, int]]:
        """Take out what is `due`."""
        credits = list(self.due.items())
        self.due.clear()
        return credits

    def _advance(self, stream: Stream, incoming: Incoming, now: float) -> None:
        self._relieve(incoming, now)
        size = incoming.cost - incoming.advanced
        if not size:
            return
        if not self._budget.take(size):
            if self._favoured not in (None, stream):
                self._starving[stream] = None
                return
            self._favoured = stream
            self._budget.overdraw(size)
        self._starving.pop(stream, None)
        incoming.advanced = incoming.cost
        self._consume(stream, incoming, size, now)

    def _relieve(self, incoming: Incoming, now: float) -> None:
        self.discard(incoming.cost - incoming.returned, now)
        incoming.returned = incoming.cost

    def _consume(self, stream: Stream, incoming: Incoming, size: int, now: float) -> None:
        if not incoming.ended:
            incoming.window.consume(size, now, self.rtt)
            self._owe(stream.id, incoming.window)

    def _owe(self, id: int, window: ReceiveWindow) -> None:
        size = window.due()
        if size:
            self.due[id] = self.due.get(id, 0) + size

    def _return(self, stream: Stream, dropped: tuple[int, int], now: float) -> None:
        connection, budget = dropped
        self.discard(connection, now)
        self._give(stream, budget, now)

    def _give(self, stream: Stream, size: int, now: float) -> None:
        if not size:
            return
        self._budget.give(size)
        if stream is self._favoured:
            self._favoured = None
        for other in list(self._starving):
            self._advance(other, self.open(other), now)
            if other in self._starving:
                break


def _add(parts: list[Buffer], body: Buffer) -> None:
    """Add to a message; an object for each of its pieces could be 20 times its bytes."""
    if len(body) >= _VIEW:
        parts.append(body)
    elif parts and isinstance(parts[-1], bytearray):
        parts[-1] += body
    else:
        # Most messages have but one piece, and bytes are what they become.
        parts.append(bytearray(body) if parts else bytes(body))
