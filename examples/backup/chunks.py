"""Files cut into chunks where their content says so; a chunk's id and its compressed form.

A cut depends on the bytes around it alone (FastCDC), so that an insertion changes the chunks it
touches and no others. A chunk is named by the BLAKE3 hash of its content. It is stored and sent
*encoded*: a tag byte, then the content, raw or as one zstd frame, whichever is smaller.

Whoever reads a chunk knows its id and its size from elsewhere, and trusts neither the encoded bytes
nor, if that comes from a server, the size.
"""

import os
import threading
import warnings
from collections.abc import Iterator
from typing import Final, NamedTuple

import zstandard
from blake3 import blake3

from .errors import ChunkError

with warnings.catch_warnings():
    # Without its extension pyfastcdc warns and goes on with pure Python, a hundred times slower.
    # One error replaces both.
    warnings.simplefilter("ignore")
    from pyfastcdc import FastCDC
if not FastCDC.__module__.startswith("pyfastcdc.cy"):
    raise ImportError(
        "pyfastcdc lacks its compiled extension: install one of its wheels, or a C compiler"
        " and then pip install --force-reinstall --no-binary pyfastcdc pyfastcdc"
    )

# Three CPython library trees (775 MB in 22,772 files) gave after deduplication and zstd, in MB and
# chunks: 195 and 56,000 at an average of 16 KiB, 200 and 28,900 at 64, 203 and 23,600 at 256. Most
# files are smaller than any of these, so sizes matter for large ones: 200 insertions of 40 bytes
# in one file of 256 MiB made 5, 17 and 63 MB of new chunks. 64 KiB is where chunks stop getting
# fewer by much. pyfastcdc's average excludes the minimum: large files come out at 76 KiB a chunk.
AVERAGE_SIZE = 64 * 1024
# A quarter and four times the average, as in the FastCDC paper; normalization 2 as well. It sent
# a fifth less than 1 in the trial above.
MIN_SIZE = AVERAGE_SIZE // 4
MAX_SIZE = AVERAGE_SIZE * 4
NORMALIZATION: Final = 2

# The largest chunk that a store takes and that a reader allocates for. More than MAX_SIZE, so that
# chunks of a client with other sizes remain readable.
LIMIT = 1024 * 1024

# What is read at once from a large file. Every chunk of a block keeps the whole block in memory.
BLOCK_SIZE = 1024 * 1024

ID_SIZE = 32

RAW = b"\0"
ZSTD = b"\1"


class Chunk(NamedTuple):
    """A chunk as it is sent and stored.

    Attributes:
        id: The BLAKE3 hash of the content, 32 bytes.
        size: The content's length in bytes.
        data: The encoded content.
    """

    id: bytes
    size: int
    data: bytes


def chunk_id(content: bytes | memoryview) -> bytes:
    """Returns the id of a chunk with this content: 32 bytes."""
    return blake3(content).digest()


def split(fd: int, size: int) -> Iterator[bytes | memoryview]:
    """Yields the chunks of an open file, from its position on.

    Memory stays below three blocks, whatever the file's size, if the chunks are let go. The chunks
    remain valid for as long as they are kept.

    Args:
        fd: The file's descriptor.
        size: The file's size in bytes. Reading ends there, or earlier where the file does.
    """
    pending = b""
    while True:
        block = os.read(fd, min(size, BLOCK_SIZE)) if size else b""
        size -= len(block)
        last = not block or not size
        pending += block
        if last and len(pending) <= MIN_SIZE:
            if pending:  # so FastCDC would cut it too, but a small file should cost little
                yield pending
            return
        # Cheap, and its documentation forbids sharing one between threads.
        cutter = FastCDC(
            AVERAGE_SIZE, min_size=MIN_SIZE, max_size=MAX_SIZE, normalized_chunking=NORMALIZATION
        )
        rest = 0
        for cut in cutter.cut_buf(pending):
            # A cut looks at most MAX_SIZE ahead. Nearer to the end than that, the next block
            # could move it.
            if not last and len(pending) - cut.offset < MAX_SIZE:
                break
            rest = cut.offset + cut.length
            yield cut.data
        if last:
            return
        pending = pending[rest:]


class Codec:
    """Encodes and decodes chunks, in any number of threads at a time.

    Args:
        level: zstd's compression level.
    """

    def __init__(self, level: int = 3) -> None:
        self._level = level
        # zstd's contexts serve one thread at a time, and are too expensive to make for each chunk.
        self._local = threading.local()

    def encode(self, id: bytes, content: bytes | memoryview) -> Chunk:
        """Returns the chunk with this id and content, compressed if that makes it smaller."""
        compressor: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = zstandard.ZstdCompressor(level=self._level)
            self._local.compressor = compressor
        compressed = compressor.compress(content)
        if len(compressed) < len(content):
            return Chunk(id, len(content), ZSTD + compressed)
        return Chunk(id, len(content), b"".join((RAW, content)))

    def decode(self, chunk: Chunk) -> bytes:
        """Returns the content of a chunk, after checking it against the chunk's id and size.

        Allocates no more than the chunk's size, and never more than LIMIT.

        Raises:
            ChunkError: It is not what it says.
        """
        if not 0 < chunk.size <= LIMIT:
            raise ChunkError(f"chunk {chunk.id.hex()} has {chunk.size} bytes, {LIMIT} are allowed")
        tag, payload = chunk.data[:1], memoryview(chunk.data)[1:]
        if len(payload) > chunk.size:
            raise ChunkError(f"chunk {chunk.id.hex()} is encoded in more bytes than it has")
        if tag == RAW and len(payload) == chunk.size:
            content = bytes(payload)
        elif tag == ZSTD:
            content = self._decompress(payload, chunk)
        else:
            raise ChunkError(f"chunk {chunk.id.hex()} is not encoded as a chunk")
        if chunk_id(content) != chunk.id:
            raise ChunkError(f"chunk {chunk.id.hex()} has other content than its id says")
        return content

    def _decompress(self, payload: memoryview, chunk: Chunk) -> bytes:
        decompressor: zstandard.ZstdDecompressor | None
        decompressor = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = zstandard.ZstdDecompressor(max_window_size=LIMIT)
            self._local.decompressor = decompressor
        try:
            # The output buffer is as large as the frame says: so that is what to check first.
            if zstandard.get_frame_parameters(payload).content_size != chunk.size:
                raise ChunkError(f"chunk {chunk.id.hex()} decompresses to another size")
            return decompressor.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ChunkError(f"chunk {chunk.id.hex()} is damaged: {error}") from error
