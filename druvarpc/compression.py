"""The algorithms that compress messages: zlib, and zstd where it is installed.

The core decides what is compressed and how large the result may become
(`druvarpc.protocol.compression`); here is how. An algorithm may serve any number of connections, in
one thread.
"""

import zlib
from importlib import import_module
from typing import TYPE_CHECKING, Final, Literal

from druvarpc.protocol.compression import Algorithm
from druvarpc.protocol.frames import Buffer

if TYPE_CHECKING:
    import zstandard

Compression = Literal["auto", "zlib", "zstd"]

# For both the fastest level that tries at all. On JSON, level 3 of zstd took 1.2 to 1.8 times the
# time of level 1 for no fewer bytes, on words for 5 to 10 % fewer; level 6 of zlib took 2 to 7 times
# that of level 1 for 10 to 20 % fewer.
_ZLIB_LEVEL: Final = 1
_ZSTD_LEVEL: Final = 1
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# RFC 8878, 3.1.1.1.2: what every decoder should support.
_MOST_WINDOW: Final = 8 * 1024 * 1024


class Zlib:
    """DEFLATE in zlib's format, RFC 1950."""

    number = 1

    def compress(self, data: Buffer) -> bytes:
        """Return data in its compressed form."""
        return zlib.compress(data, _ZLIB_LEVEL)

    def decompress(self, data: Buffer, most: int) -> bytes | None:
        """See `Algorithm.decompress`."""
        # Its output grows by steps, as the data come, up to the length that is given.
        decoder = zlib.decompressobj()
        try:
            plain = decoder.decompress(data, most + 1)
        except zlib.error as error:
            raise ValueError(f"not zlib: {error}") from None
        if len(plain) > most:
            return None
        if not decoder.eof or decoder.unused_data:
            raise ValueError("not one zlib stream")
        return plain


class Zstd:
    """Zstandard, RFC 8878: one frame that says how long its content is."""

    number = 2

    def __init__(self) -> None:
        self._zstd: "zstandard" = import_module("zstandard")
        self._compressor = self._zstd.ZstdCompressor(level=_ZSTD_LEVEL)
        self._decompressor = self._zstd.ZstdDecompressor()

    def compress(self, data: Buffer) -> bytes:
        """Return data in its compressed form."""
        return self._compressor.compress(data)

    def decompress(self, data: Buffer, most: int) -> bytes | None:
        """See `Algorithm.decompress`."""
        # Other frames are skipped by decoders, or are zstd's of before its specification.
        if data[:4] != _ZSTD_MAGIC:
            raise ValueError("not zstd")
        try:
            head = self._zstd.get_frame_parameters(data)
            size = head.content_size
            if size == self._zstd.CONTENTSIZE_UNKNOWN or not size:
                raise ValueError("a zstd frame that doesn't say how long its content is")
            if head.window_size > max(_MOST_WINDOW, size):
                raise ValueError("a zstd frame with a window above 8 MiB")
            if size > most:
                return None
            # All at once, into the room that its size takes, without a window beside it.
            return self._decompressor.decompress(data, allow_extra_data=False)
        except self._zstd.ZstdError as error:
            raise ValueError(f"not zstd: {error}") from None


def algorithms_for(compression: Compression | None) -> tuple[Algorithm, ...]:
    """Return what a choice stands for, the best first.

    Args:
        compression: "zstd" or "zlib" for that one, "auto" for all that are installed, None for
            none.

    Raises:
        ImportError: "zstd" isn't installed.
        ValueError: it's none of these.
    """
    if compression is None:
        return ()
    if compression == "zlib":
        return (Zlib(),)
    if compression not in ("auto", "zstd"):
        raise ValueError(f"compression={compression!r}: 'auto', 'zstd', 'zlib' or None")
    try:
        zstd = Zstd()
    except ImportError:
        if compression == "zstd":
            raise ImportError(
                "compression='zstd' needs the package zstandard: pip install 'druvarpc[zstd]'"
            ) from None
        return (Zlib(),)
    return (zstd, Zlib()) if compression == "auto" else (zstd,)
