"""Encryption by the client, and what others can do with it: nothing."""

import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.backup import pages
from examples.backup.chunks import SEALED, Chunk, Codec, chunk_id
from examples.backup.crypt import COST, OVERHEAD, Box, Keys, Wrapped, new_key, unwrap
from examples.backup.errors import ChunkError, KeyRefused, PageError
from examples.backup.tree import HOLE, Entry, Kind

KEYS, OTHERS = Keys(b"k" * 32), Keys(b"o" * 32)
FILE = Entry(b"secret/name", Kind.FILE, 0o644, 1, 10, chunks=(b"1" * 32, HOLE), sizes=(5, 5))
LOW = COST >> 4


@given(st.binary(max_size=1000), st.binary(max_size=100))
def test_what_is_sealed_can_be_opened_and_is_never_the_same(message, associated):
    box = Box(bytes(32))
    sealed = box.seal(message, associated)
    assert len(sealed) == len(message) + OVERHEAD
    assert box.open(sealed, associated) == message
    assert sealed != box.seal(message, associated)


@given(st.binary(max_size=50), st.integers(0), st.integers(0, 7))
def test_any_flipped_bit_is_found(message, position, bit):
    box = Box(bytes(32))
    damaged = bytearray(box.seal(message, b"associated"))
    damaged[position % len(damaged)] ^= 1 << bit
    for sealed, associated in ((damaged, b"associated"), (damaged[:-1], b"associated")):
        with pytest.raises(PageError):
            box.open(bytes(sealed), associated)
    with pytest.raises(PageError):
        box.open(box.seal(message, b"associated"), b"other")


def test_ids_are_those_of_the_key():
    assert len({keys.id(b"content") for keys in (KEYS, OTHERS)} | {chunk_id(b"content")}) == 3
    assert KEYS.id(b"content") == Keys(b"k" * 32).id(b"content")
    assert KEYS.fingerprint != OTHERS.fingerprint


@given(st.binary(min_size=1, max_size=2000))
def test_chunks_are_readable_with_the_key_only(content):
    content *= 20
    mine = Codec(keys=KEYS)
    chunk = mine.encode(mine.id(content), content)
    assert chunk.data[:1] == SEALED
    assert content[:20] not in chunk.data
    assert mine.decode(chunk) == content
    for codec in (Codec(), Codec(keys=OTHERS)):
        with pytest.raises(ChunkError):
            codec.decode(chunk)


def test_a_chunk_cannot_take_another_ones_place_nor_be_one_that_is_not_sealed():
    codec = Codec(keys=KEYS)
    one, two = (codec.encode(codec.id(content), content) for content in (b"one", b"two"))
    plain = Codec().encode(codec.id(b"one"), b"one")
    for false in (Chunk(one.id, two.size, two.data), plain, one._replace(data=one.data[:-1])):
        with pytest.raises(ChunkError):
            codec.decode(false)


def test_pages_are_readable_with_the_key_only_and_hide_names():
    page = pages.encode([FILE], KEYS.pages)
    assert b"secret" not in page.data
    assert page[2:] == (1, 1, 10)
    assert page.ids() == {b"1" * 32}
    assert pages.decode(page.data, page.chunks, KEYS.pages) == [FILE]
    swapped = page.chunks[32:] + page.chunks[:32]
    plain = pages.encode([FILE])
    for data, chunks, box in (
        (page.data, page.chunks, None),
        (page.data, page.chunks, OTHERS.pages),
        (page.data, swapped, KEYS.pages),
        (plain.data, plain.chunks, KEYS.pages),
        (page.data[:5], page.chunks, KEYS.pages),
        (b"", b"", KEYS.pages),
    ):
        with pytest.raises(PageError):
            pages.decode(data, chunks, box)


@given(st.binary(max_size=200))
def test_any_bytes_are_no_page_and_nothing_worse(data):
    for tag in (b"", b"\1", b"\2", b"\1\x28\xb5\x2f\xfd"):
        for box in (None, KEYS.pages):
            with pytest.raises(PageError):
                pages.decode(tag + data, b"", box)


def test_a_key_is_unwrapped_by_its_passphrase_only():
    master, wrapped = new_key(b"correct horse", cost=LOW)
    assert unwrap(wrapped, b"correct horse") == master
    assert new_key(b"correct horse", cost=LOW)[0] != master
    with pytest.raises(KeyRefused, match="passphrase"):
        unwrap(wrapped, b"battery staple")


@pytest.mark.parametrize(
    "wrapped",
    [
        b"",
        b"\xc1",
        os.urandom(50),
        *(
            msgspec.msgpack.encode(Wrapped(cost, block, bytes(16), bytes(60)))
            for cost, block in ((1 << 30, 8), (2, 8), (LOW + 1, 8), (LOW, 1 << 20), (-LOW, 8))
        ),
    ],
)
def test_a_server_cannot_make_a_client_work_too_much_or_too_little(wrapped):
    with pytest.raises(KeyRefused):
        unwrap(wrapped, b"correct horse")
