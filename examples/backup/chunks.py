"""Files cut into chunks where their content says so; a chunk's id and its compressed form.

A cut depends on the bytes around it alone (FastCDC), so that an insertion changes the chunks it
touches and no others. A chunk is named by the BLAKE3 hash of its content. It is stored and sent
*encoded*: a tag byte, then the content, raw or compressed, whichever is smaller. With a tenant's
keys (see `crypt`) the hash is keyed, and all that is sealed behind another tag byte.

Most of what is not worth compressing (images, archives, what is encrypted) shows it in a sample, at
a fraction of the time: so a *probe* decides. `python -m benchmarks.backup.compression` tells what
it saves and what it loses.

Whoever reads a chunk knows its id and its size from elsewhere, and trusts neither the encoded bytes
nor, if that comes from a server, the size.
"""

import lzma
import os
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import zstandard
from blake3 import blake3

from .crypt import OVERHEAD, Box, Keys
from .errors import BackupError, ChunkError, PageError

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

# What is read at once from a large file, and what small ones are read into together.
BLOCK_SIZE = 1024 * 1024

ID_SIZE = 32

RAW = b"\0"
ZSTD = b"\1"
ZLIB = b"\2"
LZMA = b"\3"
SEALED = b"\4"

# An encoded chunk is at most so much longer than its content: the tags, and what sealing adds.
MAX_OVERHEAD = 2 + OVERHEAD

# The probe compresses this much of the beginning, the middle and the end, in bytes, at zstd's
# fastest. Below PROBE_FROM, compressing costs about what the probe does.
PROBE_SIZE = 2 * 1024
PROBE_FROM = 16 * 1024
PROBE_LEVEL = 1
# What the sample has to shrink to: less than 3 % are not worth decompressing at every restore.
PROBE_LIMIT = 3 * PROBE_SIZE * 97 // 100

# What decompressing takes beside the output: a dictionary of LIMIT, and some tables.
LZMA_MEMORY = 2 * 1024 * 1024


Content = bytes | memoryview


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


def chunk_id(content: Content) -> bytes:
    """Returns the id of a chunk with this content: 32 bytes."""
    return blake3(content).digest()


def new_block(size: int) -> memoryview:
    """Returns memory of this many bytes."""
    return memoryview(bytearray(size))


def split(fd: int, size: int, take: Callable[[int], memoryview] = new_block) -> Iterator[Content]:
    """Yields the chunks of an open file, from its position on, each in what `take` returned last.

    Args:
        fd: The file's descriptor.
        size: The file's size in bytes. Reading ends there, or earlier where the file does.
        take: Returns memory to read into, of as many bytes as it is told, at most BLOCK_SIZE.
    """
    rest = memoryview(b"")
    while size or rest:
        block = take(min(len(rest) + size, BLOCK_SIZE))
        done = len(rest)
        block[:done] = rest
        while done < len(block) and (count := os.readv(fd, [block[done:]])):
            done += count
        size -= done - len(rest)
        last = done < len(block) or not size
        if last and done <= MIN_SIZE:
            if done:  # so FastCDC would cut it too, but a small file should cost little
                yield block[:done]
            return
        # Cheap, and its documentation forbids sharing one between threads.
        cutter = FastCDC(
            AVERAGE_SIZE, min_size=MIN_SIZE, max_size=MAX_SIZE, normalized_chunking=NORMALIZATION
        )
        end = 0
        for cut in cutter.cut_buf(block[:done]):
            # A cut looks at most MAX_SIZE ahead. Nearer to the end than that, the next block
            # could move it.
            if not last and done - cut.offset < MAX_SIZE:
                break
            end = cut.offset + cut.length
            yield block[cut.offset : end]
        if last:
            return
        rest = block[end:done]


class Compression(NamedTuple):
    """How chunks are compressed.

    Attributes:
        algorithm: "zstd", "zlib", "lzma" or "none".
        level: Of zstd: 1 to 19. Of zlib and lzma: 0 to 9.
        probe: Whether a sample decides first if compressing is worth it.
    """

    algorithm: str = "zstd"
    level: int = 3
    probe: bool = True


AUTO = Compression()

LEVELS = {"none": (0, 0, 0), "zstd": (1, 19, 3), "zlib": (0, 9, 6), "lzma": (0, 9, 6)}


def compression_of(text: str) -> Compression:
    """Returns what is meant by "auto", "none", or an algorithm's name with or without ":LEVEL".

    "auto" is zstd at level 3 after a probe; the others compress everything.

    Raises:
        BackupError: It is none of these.
    """
    if text == "auto":
        return AUTO
    algorithm, _, level = text.partition(":")
    if algorithm not in LEVELS:
        raise BackupError(f"no compression {text}: auto, none, zstd:LEVEL, zlib:LEVEL, lzma:LEVEL")
    lowest, highest, usual = LEVELS[algorithm]
    if not level:
        return Compression(algorithm, usual, probe=False)
    if not level.isdecimal() or not lowest <= int(level) <= highest:
        raise BackupError(f"no compression {text}: {algorithm} has levels {lowest} to {highest}")
    return Compression(algorithm, int(level), probe=False)


class Codec:
    """Encodes and decodes chunks, in any number of threads at a time.

    Args:
        compression: How to compress.
        keys: A tenant's keys. With them ids are keyed, and all that is encoded is sealed; without,
            sealed chunks cannot be decoded.
    """

    def __init__(self, compression: Compression | None = None, keys: Keys | None = None) -> None:
        self._compression = compression or AUTO
        self._box = keys.chunks if keys else None
        self.id: Callable[[Content], bytes] = keys.id if keys else chunk_id
        # zstd's contexts serve one thread at a time, and are too expensive to make for each chunk.
        self._local = threading.local()

    def encode(self, id: bytes, content: Content) -> Chunk:
        """Returns the chunk with this id and content, compressed if that makes it smaller."""
        return self.encode_all([(id, content)])[0]

    def encode_all(self, contents: Sequence[tuple[bytes, Content]]) -> list[Chunk]:
        """Returns the chunks with these ids and contents."""
        chunks = []
        compressed = self._compressed([content for _, content in contents])
        for (id, content), shrunk in zip(contents, compressed, strict=True):
            data = b"".join(shrunk if shrunk is not None else (RAW, content))
            if self._box:
                data = SEALED + self._box.seal(data, id)
            chunks.append(Chunk(id, len(content), data))
        return chunks

    def decode(self, chunk: Chunk) -> bytes:
        """Returns the content of a chunk, after checking it against the chunk's id and size.

        Allocates no more than a little over the chunk's size, and never more than LIMIT.

        Raises:
            ChunkError: It is not what it says, or sealed with other keys.
        """
        if not 0 < chunk.size <= LIMIT:
            raise ChunkError(f"chunk {chunk.id.hex()} has {chunk.size} bytes, {LIMIT} are allowed")
        if len(chunk.data) > chunk.size + MAX_OVERHEAD:
            raise ChunkError(f"chunk {chunk.id.hex()} is encoded in more bytes than it has")
        data = memoryview(chunk.data)
        if self._box:
            data = self._opened(self._box, chunk)
        tag, payload = bytes(data[:1]), data[1:]
        if tag == RAW and len(payload) == chunk.size:
            content = bytes(payload)
        elif tag in _DECOMPRESS and len(payload) < chunk.size:
            content = _DECOMPRESS[tag](self, payload, chunk)
        elif tag == SEALED:
            raise ChunkError(f"chunk {chunk.id.hex()} is encrypted")
        else:
            raise ChunkError(f"chunk {chunk.id.hex()} is not encoded as a chunk")
        if self.id(content) != chunk.id:
            raise ChunkError(f"chunk {chunk.id.hex()} has other content than its id says")
        return content

    def is_compressible(self, content: Content) -> bool:
        """Whether a sample of it shrinks: if not, the whole is not worth the time.

        Contents too small for it to pay are all said to be.
        """
        return self._compressible([content])[0]

    def _compressible(self, contents: Sequence[Content]) -> list[bool]:
        verdicts = [len(content) < PROBE_FROM for content in contents]
        probed = [position for position, small in enumerate(verdicts) if not small]
        samples = self._zstd("probe", PROBE_LEVEL, [_sample(contents[one]) for one in probed])
        for position, sample in zip(probed, samples, strict=True):
            verdicts[position] = len(sample) < PROBE_LIMIT
        return verdicts

    def _compressed(self, contents: Sequence[Content]) -> list[tuple[bytes, bytes] | None]:
        """Returns the tag and the compressed content of each, None if it is to be stored raw."""
        algorithm, level, probe = self._compression
        results: list[tuple[bytes, bytes] | None] = [None] * len(contents)
        if algorithm == "none":
            return results
        chosen = self._compressible(contents) if probe else [True] * len(contents)
        positions = [position for position, choice in enumerate(chosen) if choice]
        tried = [contents[position] for position in positions]
        if algorithm == "zstd":
            tag, made = ZSTD, self._zstd("zstd", level, tried)
        elif algorithm == "zlib":
            tag, made = ZLIB, [zlib.compress(content, level) for content in tried]
        else:
            # A dictionary larger than any chunk would only cost whoever decompresses.
            chain = [{"id": lzma.FILTER_LZMA2, "preset": level, "dict_size": LIMIT}]
            tag, made = LZMA, [lzma.compress(content, filters=chain) for content in tried]
        for position, content, data in zip(positions, tried, made, strict=True):
            if len(data) < len(content):
                results[position] = tag, data
        return results

    def _zstd(self, use: str, level: int, contents: list[Any]) -> list[bytes]:
        # All by one call: among busy threads, each call waits for its turn to go on in Python.
        if not contents:
            return []
        made = self._compressor(use, level).multi_compress_to_buffer(contents, threads=1)
        return [made[position].tobytes() for position in range(len(made))]

    def _compressor(self, use: str, level: int) -> zstandard.ZstdCompressor:
        found: zstandard.ZstdCompressor | None = getattr(self._local, use, None)
        if found is None:
            found = zstandard.ZstdCompressor(level=level)
            setattr(self._local, use, found)
        return found

    def _opened(self, box: Box, chunk: Chunk) -> memoryview:
        if chunk.data[:1] != SEALED:
            raise ChunkError(f"chunk {chunk.id.hex()} is not encrypted")
        try:
            return memoryview(box.open(memoryview(chunk.data)[1:], chunk.id))
        except PageError as error:
            raise ChunkError(f"chunk {chunk.id.hex()} is {error}") from error

    def _decompress_zstd(self, payload: memoryview, chunk: Chunk) -> bytes:
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

    def _decompress_zlib(self, payload: memoryview, chunk: Chunk) -> bytes:
        inflater = zlib.decompressobj()
        try:
            content = inflater.decompress(payload, chunk.size + 1)
        except zlib.error as error:
            raise ChunkError(f"chunk {chunk.id.hex()} is damaged: {error}") from error
        return _whole(content, inflater.eof and not inflater.unused_data, chunk)

    def _decompress_lzma(self, payload: memoryview, chunk: Chunk) -> bytes:
        try:
            # A stream may ask for 4 GB.
            expander = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY)
            content = expander.decompress(payload, chunk.size + 1)
        except (lzma.LZMAError, EOFError) as error:
            raise ChunkError(f"chunk {chunk.id.hex()} is damaged: {error}") from error
        return _whole(content, expander.eof and not expander.unused_data, chunk)


def _sample(content: Content) -> bytes:
    view = memoryview(content)
    middle = (len(view) - PROBE_SIZE) // 2
    return b"".join((view[:PROBE_SIZE], view[middle : middle + PROBE_SIZE], view[-PROBE_SIZE:]))


def _whole(content: bytes, complete: bool, chunk: Chunk) -> bytes:
    if not complete or len(content) != chunk.size:
        raise ChunkError(f"chunk {chunk.id.hex()} decompresses to another size")
    return content


_DECOMPRESS = {
    ZSTD: Codec._decompress_zstd,
    ZLIB: Codec._decompress_zlib,
    LZMA: Codec._decompress_lzma,
}
