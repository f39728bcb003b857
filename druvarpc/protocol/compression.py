"""Which payloads and messages are compressed, and what of compressed ones is believed.

docs/protocol.md, section 6.2. The core decides; the algorithms themselves are given to it by its
owner (`Algorithm`), one after the other as they are preferred. `Decompressor` is what a connection
takes, `Compressor` what it sends.

What doesn't shrink costs time and brings nothing, so a `Compressor` tries less and less of it. Of a
large message it tries the beginning first. Of a method whose last `MISSES` messages didn't shrink
it lets the next ones pass, twice as many with each further miss, up to `MOST_PASSED`; the first
that shrinks ends that.
"""

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from druvarpc.errors import RemoteProtocolError
from druvarpc.protocol.frames import Buffer

# Shorter ones aren't tried: half of 512 bytes is less than what a lone call costs in packets and
# frames, and compressing that takes as long as all that the core does for the call.
LEAST_SIZE: Final = 512
# What shrinks by less than a tenth isn't worth the receiver's time.
_MOST_SHARE: Final = 0.9
# What is tried of a message of at least eight times as much. Noise shows by its first KiB; by zlib,
# the slower one, this takes 0.1 ms.
_PROBE: Final = 4096
MISSES: Final = 4
# So that data which begins to shrink isn't missed for long, and trying costs 1/65 of what it would.
MOST_PASSED: Final = 64
# Methods of which misses are counted; those beyond are always tried.
_MOST_METHODS: Final = 1024
# Bytes for each byte on the wire. A greater ratio lets a peer make work and take memory out of
# proportion to what it sends; data that shrinks more is filled up to this.
MOST_RATIO: Final = 100


class Algorithm(Protocol):
    """A way to compress."""

    @property
    def number(self) -> int:
        """What names it on the wire, a power of two."""
        ...

    def compress(self, data: Buffer) -> bytes:
        """Return data in its compressed form."""
        ...

    def decompress(self, data: Buffer, most: int) -> bytes | None:
        """Return what a compressed form stands for; None if it is longer than `most` bytes.

        Memory for no more than those is taken, whatever the form says.

        Raises:
            ValueError: it isn't a compressed form, or not all of one and nothing else.
        """
        ...


class Compressed(bytes):
    """The compressed form of a message, among others that wait to be sent."""

    __slots__ = ()


class Decompressor:
    """What a connection's peer may have compressed.

    Args:
        algorithms: those that are accepted.

    Attributes:
        accepts: their numbers in one, as they are announced; 0 for none.
        saved: bytes that haven't come over the wire.
    """

    __slots__ = ("_algorithms", "accepts", "saved")

    def __init__(self, algorithms: Iterable[Algorithm]) -> None:
        self._algorithms = {algorithm.number: algorithm for algorithm in algorithms}
        self.accepts = sum(self._algorithms)
        self.saved = 0

    def decompress(self, data: bytes, most: int) -> bytes | None:
        """Return what a compressed form stands for; None if it is longer than `most` bytes.

        Raises:
            RemoteProtocolError: the form is wrong.
        """
        form = data.lstrip(b"\x00")
        algorithm = self._algorithms.get(form[0]) if form else None
        if algorithm is None:
            raise RemoteProtocolError("compressed by an algorithm that isn't accepted")
        allowed = MOST_RATIO * len(data)
        try:
            plain = algorithm.decompress(memoryview(form)[1:], min(most, allowed))
        except ValueError as error:
            raise RemoteProtocolError(f"compressed wrongly: {error}") from None
        if plain is None:
            if allowed < most:
                raise RemoteProtocolError(f"compressed to less than one in {MOST_RATIO} bytes")
            return None
        if not plain:
            raise RemoteProtocolError("nothing, compressed")
        self.saved += len(plain) - len(data)
        return plain

    def payload(self, data: bytes, most: int) -> bytes:
        """Return a payload that rode in a club, where it may have `most` bytes.

        Raises:
            RemoteProtocolError: the form is wrong, or the payload longer.
        """
        plain = self.decompress(data, most)
        if plain is None:
            raise RemoteProtocolError(f"a payload that isn't at most {most} bytes, decompressed")
        return plain


class _Misses:
    """What of one method didn't shrink.

    Attributes:
        count: misses since the last message that shrank.
        passing: messages that aren't tried.
    """

    __slots__ = ("count", "passing")

    def __init__(self) -> None:
        self.count = 0
        self.passing = 0

    def add(self) -> None:
        self.count += 1
        # At most so many steps, lest the power grows for ever.
        steps = min(self.count - MISSES, MOST_PASSED.bit_length() - 2)
        self.passing = 2 << steps if steps >= 0 else 0


class Compressor:
    """Compresses what a connection sends.

    Args:
        algorithm: by which.

    Attributes:
        saved: bytes that needn't be sent.
    """

    __slots__ = ("_algorithm", "_misses", "saved")

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._misses: dict[str, _Misses] = {}
        self.saved = 0

    def compress(self, method: str, data: Buffer) -> bytes | None:
        """Return the compressed form of something that belongs to a call; None to send it as it is.

        Args:
            method: the call's.
            data: a payload or a message.
        """
        if len(data) < LEAST_SIZE:
            return None
        misses = self._misses.get(method)
        if misses is not None and misses.passing:
            misses.passing -= 1
            return None
        form = self._shrink(data)
        if form is None:
            if misses is None:
                if len(self._misses) == _MOST_METHODS:
                    return None
                misses = self._misses[method] = _Misses()
            misses.add()
            return None
        if misses is not None:
            del self._misses[method]
        self.saved += len(data) - len(form)
        return form

    def _shrink(self, data: Buffer) -> bytes | None:
        algorithm, size = self._algorithm, len(data)
        if size >= 8 * _PROBE:
            probe = algorithm.compress(memoryview(data)[:_PROBE])
            if len(probe) > _MOST_SHARE * _PROBE:
                return None
        form = algorithm.compress(data)
        if len(form) > _MOST_SHARE * size:
            return None
        least = -(-size // MOST_RATIO)
        padding = bytes(max(0, least - len(form) - 1))
        return b"".join((padding, bytes((algorithm.number,)), form))


def best_of(algorithms: Sequence[Algorithm], accepted: int) -> Compressor | None:
    """Return what compresses for a peer that accepts algorithms; None if it knows none of these.

    Args:
        algorithms: the best first.
        accepted: the numbers of those that the peer accepts, in one.
    """
    for algorithm in algorithms:
        if algorithm.number & accepted:
            return Compressor(algorithm)
    return None
