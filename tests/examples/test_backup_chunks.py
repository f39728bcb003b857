"""Cutting files into chunks, and chunks that lie about themselves."""

import lzma
import os
import random
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyfastcdc import FastCDC

from examples.backup import chunks
from examples.backup.chunks import (
    BLOCK_SIZE,
    LIMIT,
    MAX_SIZE,
    MIN_SIZE,
    Chunk,
    Codec,
    chunk_id,
    compression_of,
)
from examples.backup.errors import BackupError, ChunkError


def content_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def split(content: bytes, size: int | None = None) -> list[bytes]:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        pieces = chunks.split(file.fileno(), len(content) if size is None else size)
        return [bytes(piece) for piece in pieces]


def cut_at_once(content: bytes) -> list[bytes]:
    cutter = FastCDC(
        chunks.AVERAGE_SIZE,
        min_size=MIN_SIZE,
        max_size=MAX_SIZE,
        normalized_chunking=chunks.NORMALIZATION,
    )
    return [bytes(cut.data) for cut in cutter.cut_buf(content)]


sizes = st.one_of(
    st.integers(0, 3 * BLOCK_SIZE),
    st.sampled_from([MIN_SIZE, MAX_SIZE, BLOCK_SIZE]).flatmap(
        lambda edge: st.integers(edge - 2, edge + 2)
    ),
)


@given(sizes, st.integers(0, 99))
def test_a_file_read_in_blocks_is_cut_as_if_read_at_once(size, seed):
    content = content_of(size, seed)
    pieces = split(content)
    assert b"".join(pieces) == content
    assert pieces == cut_at_once(content)


@pytest.mark.parametrize("content", [b"\0" * 3 * BLOCK_SIZE, b"ab" * BLOCK_SIZE])
def test_monotonous_content_is_cut_too(content):
    pieces = split(content)
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= MAX_SIZE


def test_sizes_keep_their_bounds():
    *pieces, last = split(content_of(4 * BLOCK_SIZE))
    assert all(MIN_SIZE <= len(piece) <= MAX_SIZE for piece in pieces)
    assert len(last) <= MAX_SIZE


def test_an_empty_file_has_no_chunks_and_a_small_one_has_one():
    assert split(b"") == []
    assert split(b"x") == [b"x"]
    assert split(content_of(MIN_SIZE)) == [content_of(MIN_SIZE)]


def test_an_insertion_changes_the_chunks_around_it_only():
    content = content_of(4 * BLOCK_SIZE)
    before = set(split(content))
    after = set(split(content[:2_000_000] + b"inserted" + content[2_000_000:]))
    assert len(after - before) <= 2


def test_reading_ends_where_the_file_was_said_to_end():
    content = content_of(2 * BLOCK_SIZE)
    assert b"".join(split(content, BLOCK_SIZE + 7)) == content[: BLOCK_SIZE + 7]


def test_a_file_that_shrank_gives_what_it_still_has():
    content = content_of(BLOCK_SIZE)
    assert b"".join(split(content, 5 * BLOCK_SIZE)) == content


def test_short_reads_do_not_move_the_cuts():
    content = content_of(BLOCK_SIZE)
    source, sink = os.pipe()

    def feed():
        with os.fdopen(sink, "wb") as file:
            file.write(content)

    feeder = threading.Thread(target=feed)
    feeder.start()
    pieces = [bytes(piece) for piece in chunks.split(source, len(content))]
    feeder.join()
    os.close(source)
    assert pieces == cut_at_once(content)


def test_fastcdc_is_compiled():
    assert isinstance(sys.modules["pyfastcdc.cy.fastcdc"].__loader__, ExtensionFileLoader)


def test_without_the_compiled_extension_the_import_fails_with_one_error():
    program = "import sys; sys.modules['pyfastcdc.cy'] = None; import examples.backup.chunks"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: pyfastcdc lacks its compiled")
    assert "Warning" not in result.stderr


@given(st.binary(min_size=1, max_size=1000), st.integers(1, 200))
def test_what_is_encoded_can_be_decoded(content, repeat):
    content *= repeat
    codec = Codec()
    chunk = codec.encode(chunk_id(content), memoryview(content))
    assert chunk.size == len(content)
    assert len(chunk.data) <= len(content) + 1
    assert codec.decode(chunk) == content


def test_compression_is_used_where_it_shrinks():
    assert encoded(b"a" * 1000).data[:1] == chunks.ZSTD
    assert encoded(content_of(1000)).data[:1] == chunks.RAW


def encoded(content: bytes) -> Chunk:
    return Codec().encode(chunk_id(content), content)


def bomb(size: int) -> bytes:
    return chunks.ZSTD + zstandard.compress(bytes(size))


def without_size(content: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    return chunks.ZSTD + compressor.compress(content)


ZEROS = encoded(bytes(1000))


@pytest.mark.parametrize(
    "chunk",
    [
        ZEROS._replace(id=bytes(32)),
        ZEROS._replace(size=999),
        ZEROS._replace(size=0),
        ZEROS._replace(size=-1),
        ZEROS._replace(size=LIMIT + 1),
        ZEROS._replace(data=b""),
        ZEROS._replace(data=b"\7" + ZEROS.data[1:]),
        ZEROS._replace(data=ZEROS.data[:-1]),
        ZEROS._replace(data=ZEROS.data + b"x"),
        ZEROS._replace(data=ZEROS.data + bytes(1000)),
        ZEROS._replace(data=bomb(1 << 30)),
        ZEROS._replace(data=without_size(bytes(1000))),
        Chunk(chunk_id(b""), 0, chunks.RAW),
        Chunk(chunk_id(b"abc"), 3, chunks.RAW + b"abd"),
        Chunk(chunk_id(b"abc"), 3, chunks.RAW + b"abcd"),
        Chunk(chunk_id(bytes(LIMIT + 1)), LIMIT + 1, bomb(LIMIT + 1)),
    ],
)
def test_a_chunk_that_is_not_what_it_says_is_refused(chunk):
    with pytest.raises(ChunkError):
        Codec().decode(chunk)


@given(st.binary(max_size=100), st.integers(-1, 1 << 64))
def test_any_bytes_are_refused_in_the_same_way(data, size):
    for tag in (
        b"",
        chunks.RAW,
        chunks.ZSTD,
        chunks.ZSTD + zstandard.MAGIC_NUMBER.to_bytes(4, "little"),
    ):
        with pytest.raises(ChunkError):
            Codec().decode(Chunk(bytes(32), size, tag + data))


def test_one_codec_serves_many_threads():
    codec = Codec()

    def roundtrip(seed: int) -> bool:
        content = content_of(5000, seed) * 4
        return codec.decode(codec.encode(chunk_id(content), content)) == content

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(roundtrip, range(200)))


@pytest.mark.parametrize("text", ["none", "zstd:1", "zstd:19", "zstd", "zlib:9", "lzma:0", "auto"])
@pytest.mark.parametrize("content", [b"a" * 50_000, content_of(50_000), b"x"])
def test_every_algorithm_comes_back(text, content):
    codec = Codec(compression_of(text))
    chunk = codec.encode(chunk_id(content), content)
    assert Codec().decode(chunk) == content
    assert len(chunk.data) <= len(content) + 1
    if content == b"a" * 50_000 and text != "none":
        assert len(chunk.data) < 1000


@pytest.mark.parametrize(
    "text", ["", "best", "zstd:0", "zstd:20", "zstd:x", "zstd:-1", "zlib:10", "none:1", "auto:1"]
)
def test_other_compressions_are_refused(text):
    with pytest.raises(BackupError, match="no compression"):
        compression_of(text)


def test_the_probe_tells_what_is_compressed_already():
    codec = Codec()
    words = random.Random(1)
    text = b" ".join(b"%d" % words.randrange(1_000_000) for _ in range(50_000))
    assert codec.is_compressible(text)
    for compress in (zlib.compress, lzma.compress, zstandard.compress):
        assert not codec.is_compressible(compress(text)[:60_000])
    # Half of it shrinks; and a small one is not worth a probe.
    assert codec.is_compressible(content_of(30_000) + bytes(30_000))
    assert codec.is_compressible(content_of(1000))


EXPANDING = {
    chunks.ZLIB: zlib.compress(bytes(1 << 26)),
    chunks.LZMA: lzma.compress(bytes(1 << 26), preset=9),
}


@pytest.mark.parametrize("tag", EXPANDING)
def test_other_bombs_are_refused_before_they_expand(tag):
    tracemalloc.start()
    try:
        for size in (1000, LIMIT):
            bomb = Chunk(bytes(32), size, tag + EXPANDING[tag][: size - 1])
            with pytest.raises(ChunkError):
                Codec().decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tag", EXPANDING)
@given(data=st.binary(max_size=100), size=st.integers(1, 200))
def test_any_bytes_are_refused_by_other_algorithms(tag, data, size):
    true = {chunks.ZLIB: zlib.compress, chunks.LZMA: lzma.compress}[tag](bytes(50))
    for payload in (data, true + data, true[: len(data)], true + true):
        if len(payload) < size:
            with pytest.raises(ChunkError):
                Codec().decode(Chunk(bytes(32), size, tag + payload))
