"""What is compressed, how much of it is tried, and what compressed bytes can't do."""

import random
import tracemalloc
import zlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.compression import Zlib
from druvarpc.errors import CloseCode, RemoteProtocolError, Status
from druvarpc.protocol import (
    Algorithm,
    CallsReceived,
    Connection,
    Limits,
    Outcome,
    Readable,
    Reference,
    State,
    Stream,
)
from druvarpc.protocol.compression import (
    LEAST_SIZE,
    MISSES,
    MOST_PASSED,
    MOST_RATIO,
    Compressor,
    Decompressor,
)
from druvarpc.protocol.frames import CALLS, DATA, PREFACE, SETTINGS, Buffer, frame, pack
from druvarpc.zstd import Zstd
from tests.protocol.pair import Pair

ALGORITHMS = [Zlib(), Zstd()]
BOTH = (Zstd(), Zlib())
KIB, MIB = 1024, 1024 * 1024
LINES = b"".join(b"%06d GET /index.html 200\n" % number for number in range(40_000))
NOISE = random.Random(1).randbytes(MIB)
BY_EACH = pytest.mark.parametrize("by", ALGORITHMS, ids=["zlib", "zstd"])


def compressing(mine: Sequence[Algorithm] = BOTH, yours: Sequence[Algorithm] = BOTH) -> Pair:
    return Pair({"compression": mine}, {"compression": yours})


def taken(core: Connection, stream: Stream) -> list[bytes]:
    return list(iter(lambda: core.take(stream, 0.0), None))


# What goes compressed.


@BY_EACH
@pytest.mark.parametrize("size", [600, 15_000, 300_000])
def test_arguments_and_results_arrive_as_they_were(by: Algorithm, size: int) -> None:
    two = compressing([by], [by])
    mine, yours = two.accept(payload=LINES[:size])
    assert yours.payload == mine.payload == LINES[:size]
    two.server.reply(yours, 0.0, LINES[-size:])
    two.run()
    [(_, payload, outcome)] = two.replies()
    assert outcome is None
    assert (payload or two.client.take(mine, 0.0)) == LINES[-size:]
    assert two.client.saved_sent == two.server.saved_received > size // 2
    assert two.server.saved_sent == two.client.saved_received > size // 2


@BY_EACH
def test_messages_arrive_as_they_were(by: Algorithm) -> None:
    two = compressing([by], [by])
    mine, yours = two.accept(more=True)
    said = [b"", b"x", LINES[:5000], memoryview(LINES[:200_000]), bytearray(NOISE[:9000])]
    for message in said:
        two.client.send(mine, message)
        two.server.send(yours, message)
    two.client.end(mine)
    two.run()
    assert taken(two.server, yours) == said
    two.server.reply(yours, 0.0, b"\xc0", Outcome(message="m"))
    two.run()
    assert taken(two.client, mine) == said
    assert two.client.saved_sent == two.server.saved_sent == two.client.saved_received > 100_000


def test_what_fits_inline_is_decided_by_its_own_size() -> None:
    """Else a payload could be longer than the receiver takes inline."""
    limits = Limits(max_inline=4096)
    two = Pair({"compression": BOTH, "limits": limits}, {"compression": BOTH, "limits": limits})
    short, long = two.call(payload=LINES[:4096]), two.call(payload=LINES[:4097])
    two.run()
    assert (short.inline, long.inline) == (True, False)
    assert [call.payload for call in two.arrived()] == [LINES[:4096], LINES[:4097]]


def test_a_call_that_waited_for_the_settings_goes_as_it_is() -> None:
    two = Pair({"compression": BOTH}, {"compression": BOTH}, settled=False)
    first = two.call(payload=LINES[:3000])
    two.run()
    assert (first.packed, two.arrived()[0].payload) == (None, LINES[:3000])
    second = two.call(payload=LINES[:3000])
    assert second.packed is not None


@pytest.mark.parametrize(
    ("mine", "yours", "saves"),
    [
        ((), BOTH, False),
        (BOTH, (), False),
        ([Zlib()], [Zstd()], False),
        ([Zlib()], BOTH, True),
        (BOTH, [Zlib()], True),
    ],
)
def test_only_what_both_know_is_used(
    mine: Sequence[Algorithm], yours: Sequence[Algorithm], saves: bool
) -> None:
    two = compressing(mine, yours)
    _, call = two.accept(payload=LINES[:3000])
    two.server.reply(call, 0.0, LINES[:4000])
    two.run()
    assert two.replies()[0][1] == LINES[:4000]
    assert (two.client.saved_sent > 0) == (two.server.saved_sent > 0) == saves
    assert two.client.peer.compression == sum(one.number for one in yours)


def test_a_call_that_asks_for_it_goes_as_it_is() -> None:
    two = compressing()
    mine, yours = two.accept(payload=LINES[:3000], more=True, compress=False)
    two.client.send(mine, LINES[:100_000])
    two.run()
    assert two.client.saved_sent == 0
    assert taken(two.server, yours) == [LINES[:100_000]]


def test_failures_and_what_goes_with_a_reply_stay() -> None:
    two = compressing()
    calls = [two.accept() for _ in range(3)]
    failure = Outcome(Status.NOT_FOUND, "m" * 900, b"\xc4\xff" + bytes(255), not_started=True)
    success = Outcome(message="m", trailers=[("k", "v")], timings=(1, 2, 3))
    two.server.reply(calls[0][1], 0.0, None, failure)
    two.server.reply(calls[1][1], 0.0, LINES[:2000], success)
    two.server.reply(calls[2][1], 0.0, None, Outcome())
    two.run()
    told = [
        (stream, payload, outcome.status, outcome.message, outcome.details, list(outcome.trailers))
        for stream, payload, outcome in two.replies()
    ]
    assert told == [
        (calls[0][0], None, Status.NOT_FOUND, failure.message, failure.details, []),
        (calls[1][0], LINES[:2000], Status.OK, "m", None, [("k", "v")]),
        (calls[2][0], None, Status.OK, "", None, []),
    ]


def test_a_club_refers_to_results_whatever_their_form() -> None:
    two = compressing()
    result = pack([LINES[:3000], LINES[:60_000]])
    first = Stream("Vault.get", pack([LINES[:2000]]))
    second = Stream("Vault.put", pack([None, LINES[:40_000]]), references=(Reference(0, 0, (1,)),))
    two.client.club([first, second], 0.0)
    two.run()
    [call] = two.arrived()
    two.server.reply(call, 0.0, result)
    two.run()
    [other] = two.arrived()
    assert other.payload == pack([LINES[:60_000], LINES[:40_000]])
    assert two.client.take(first, 0.0) == result
    assert two.client.saved_sent > 20_000


def test_a_call_that_does_not_fit_uncompressed_may_fit_its_club() -> None:
    two = Pair({"compression": BOTH}, {"compression": BOTH, "limits": Limits(max_inline=32 * KIB)})
    club = [Stream("Vault.put", LINES[:30_000]) for _ in range(10)]
    two.client.club(club, 0.0)
    two.run()
    assert [call.inline for call in club] == [True] * 10
    assert [call.payload for call in two.arrived()] == [call.payload for call in club]


# What isn't tried, or isn't worth it.


class Counting:
    """zlib, and how often and on how much it was tried."""

    number = 1

    def __init__(self) -> None:
        self.tried: list[int] = []

    def compress(self, data: Buffer) -> bytes:
        self.tried.append(len(data))
        return zlib.compress(data, 1)

    def decompress(self, data: Buffer, most: int) -> bytes | None:
        return Zlib().decompress(data, most)


def test_what_is_small_is_not_tried() -> None:
    algorithm = Counting()
    compressor = Compressor(algorithm)
    assert compressor.compress("m", bytes(LEAST_SIZE - 1)) is None
    assert algorithm.tried == []
    assert compressor.compress("m", bytes(LEAST_SIZE)) is not None


def test_what_saves_less_than_a_tenth_goes_as_it_is() -> None:
    compressor = Compressor(Zlib())
    assert compressor.compress("m", NOISE[:9200] + bytes(800)) is None
    assert compressor.compress("m", NOISE[:8000] + bytes(2000)) is not None
    assert compressor.saved > 1900


def test_of_a_large_message_the_beginning_tells() -> None:
    algorithm = Counting()
    assert Compressor(algorithm).compress("m", NOISE) is None
    assert algorithm.tried == [4096]
    assert Compressor(algorithm).compress("m", LINES) is not None
    assert algorithm.tried == [4096, 4096, len(LINES)]


def test_what_keeps_on_not_shrinking_is_tried_less_and_less() -> None:
    algorithm = Counting()
    compressor = Compressor(algorithm)
    gaps, passed = [], 0
    for _ in range(1000):
        before = len(algorithm.tried)
        assert compressor.compress("m", NOISE[:1000]) is None
        if len(algorithm.tried) > before:
            gaps.append(passed)
            passed = 0
        else:
            passed += 1
    assert gaps[: MISSES + 6] == [0] * MISSES + [2, 4, 8, 16, 32, 64]
    assert set(gaps[MISSES + 5 :]) == {MOST_PASSED}
    # What is another method's goes on, and so does this once something shrinks.
    assert compressor.compress("n", LINES[:1000]) is not None
    while compressor.compress("m", LINES[:1000]) is None:
        passed += 1
    assert passed <= MOST_PASSED
    assert compressor.compress("m", LINES[:1000]) is not None
    assert compressor.compress("m", NOISE[:1000]) is None
    assert compressor.compress("m", LINES[:1000]) is not None


def test_the_table_of_misses_is_bounded() -> None:
    compressor = Compressor(Zlib())
    tracemalloc.start()
    try:
        for number in range(1024):
            compressor.compress(f"m{number}", NOISE[:600])
        held, _ = tracemalloc.get_traced_memory()
        for number in range(1024, 3000):
            assert compressor.compress(f"m{number}", NOISE[:600]) is None
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now - held < 1000
    assert compressor.compress("m2999", LINES[:600]) is not None


@BY_EACH
@pytest.mark.parametrize("size", [512, 4096, 16 * KIB, MIB])
def test_what_shrinks_to_nearly_nothing_is_filled_up(by: Algorithm, size: int) -> None:
    form = Compressor(by).compress("m", bytes(size))
    assert form is not None
    assert size / MOST_RATIO <= len(form) <= max(size / MOST_RATIO + 1, 40, size / 90)
    assert Decompressor([by]).decompress(form, size) == bytes(size)
    assert Decompressor([by]).decompress(form, size - 1) is None


@given(
    st.sampled_from(ALGORITHMS),
    st.binary(max_size=40),
    st.integers(1, 5000),
    st.integers(-1, 1),
)
def test_every_form_is_undone(by: Algorithm, pattern: bytes, times: int, more: int) -> None:
    data = pattern * times
    form = Compressor(by).compress("m", data)
    if form is None:
        return
    assert len(data) <= MOST_RATIO * len(form)
    found = Decompressor(ALGORITHMS).decompress(form, len(data) + more)
    assert found == (None if more < 0 else data)


@given(st.sampled_from([b"", b"\x01", b"\x02", b"\x00\x01"]), st.data())
def test_any_form_is_undone_or_refused(head: bytes, draw: st.DataObject) -> None:
    by = draw.draw(st.sampled_from(ALGORITHMS))
    tail = bytearray(by.compress(LINES[: draw.draw(st.integers(0, 9000))]))
    for _ in range(draw.draw(st.integers(0, 3))):
        tail[draw.draw(st.integers(0, len(tail) - 1))] = draw.draw(st.integers(0, 255))
    most = draw.draw(st.integers(1, 9000))
    try:
        found = Decompressor(ALGORITHMS).decompress(head + bytes(tail), most)
    except RemoteProtocolError:
        return
    assert found is None or 0 < len(found) <= most


# Attacks (docs/protocol.md, section 6.2).


def zlib_bomb(mebibytes: int) -> bytes:
    """As many MiB of zeros; whole blocks, since nobody wants to wait for zlib to make them."""
    encoder = zlib.compressobj(9)
    first = encoder.compress(bytes(MIB)) + encoder.flush(zlib.Z_FULL_FLUSH)
    again = encoder.compress(bytes(MIB)) + encoder.flush(zlib.Z_FULL_FLUSH)
    return b"\x01" + first + again * (mebibytes - 1)


def zstd_bomb(mebibytes: int) -> bytes:
    """As many MiB of zeros, in blocks of 128 KiB that take 4 bytes."""
    size = (mebibytes * MIB).to_bytes(8, "little")
    block = (128 * KIB << 3 | 2).to_bytes(3, "little") + b"\x00"
    last = (128 * KIB << 3 | 3).to_bytes(3, "little") + b"\x00"
    # A content size of 8 bytes and a window of 128 KiB.
    return b"\x02\x28\xb5\x2f\xfd\xc0\x38" + size + block * (8 * mebibytes - 1) + last


def padded(bomb: bytes, size: int) -> bytes:
    return bytes(max(0, -(-size // MOST_RATIO) - len(bomb))) + bomb


BOMBS = [zlib_bomb(1024), zstd_bomb(1024)]
BY_EACH_BOMB = pytest.mark.parametrize("bomb", BOMBS, ids=["zlib", "zstd"])


def victim(**limits: int) -> Connection:
    """A server that takes compressed messages, and has a call that is open."""
    server = Connection("server", now=0.0, limits=Limits(**limits), compression=BOTH)
    server.receive_data(PREFACE + frame(SETTINGS, pack([8, 3])), 0.0)
    server.receive_data(frame(CALLS, pack([["Vault.put", 1, b"\x90"]]), id=1), 0.0)
    return server


def opened(server: Connection) -> Stream:
    calls = [
        call
        for event in iter(server.next_event, None)
        if isinstance(event, CallsReceived)
        for call in event.calls
    ]
    return calls[-1]


def feed(server: Connection, message: bytes) -> None:
    """Let a server hear a compressed message of call 1, as its credit allows."""
    step = 60_000
    for start in range(0, len(message), step):
        last = start + step >= len(message)
        body = message[start : start + step]
        server.receive_data(frame(DATA, body, flags=5 if last else 0, id=1), 0.0)
        server.data_to_send(0.0)


@BY_EACH_BOMB
def test_a_bomb_as_a_message_takes_no_more_memory_than_a_message(bomb: bytes) -> None:
    """A gibibyte, in a message that is allowed a mebibyte."""
    server = victim(max_message=MIB, memory=64 * MIB)
    stream = opened(server)
    assert server.take(stream, 0.0) is None
    bomb = padded(bomb[: 900 * KIB], MIB)
    feed(server, bomb)
    assert [type(event) for event in iter(server.next_event, None)] == [Readable]
    tracemalloc.start()
    try:
        assert server.take(stream, 0.0) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert server.incoming(stream).too_long
    assert peak < 3 * MIB
    feed(server, b"\x01more")
    assert server.take(stream, 0.0) is None
    server.reply(stream, 0.0, None, Outcome(Status.RESOURCE_EXHAUSTED))
    assert stream.final is not None


@BY_EACH_BOMB
def test_a_bomb_that_shrinks_too_well_ends_the_connection(bomb: bytes) -> None:
    server = victim(max_message=1024 * MIB, memory=64 * MIB)
    stream = opened(server)
    short = bomb[: 60 * KIB]
    feed(server, short)
    tracemalloc.start()
    try:
        for _ in range(2):  # asked again it says it again, and goes no further
            with pytest.raises(RemoteProtocolError, match="one in 100"):
                server.take(stream, 0.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * MOST_RATIO * len(short)
    with pytest.raises(RemoteProtocolError):
        server.next_event()
    server.data_to_send(0.0)
    assert server.closed


@BY_EACH_BOMB
def test_a_bomb_inside_a_club_takes_no_more_than_a_payload(bomb: bytes) -> None:
    server = victim(max_inline=16 * KIB)
    opened(server)
    calls = [[0, 16, padded(bomb[: 10 * KIB], 16 * KIB)]]
    said = frame(CALLS, pack(calls), id=2)
    tracemalloc.start()
    try:
        server.receive_data(said, 0.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    with pytest.raises(RemoteProtocolError, match="16384 bytes, decompressed") as caught:
        list(iter(server.next_event, None))
    assert caught.value.code is CloseCode.PROTOCOL_ERROR
    assert peak < 200 * KIB


def test_a_size_that_is_only_declared_takes_no_memory() -> None:
    head = b"\x02\x28\xb5\x2f\xfd\xa0" + (2**31).to_bytes(4, "little")
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            Decompressor(BOTH).decompress(head + bytes(1000), 2**32)
        assert Decompressor(BOTH).decompress(padded(head, 2**31), MIB) is None
        with pytest.raises(RemoteProtocolError):  # allowed, but not there
            Decompressor(BOTH).decompress(
                padded(b"\x02\x28\xb5\x2f\xfd\xa0" + (60_000).to_bytes(4, "little"), 60_000), MIB
            )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * MIB, "the padding, twice"


def test_messages_that_nobody_reads_stay_as_they_came() -> None:
    """What a peer can make this end hold is what it has sent, not a hundred times as much."""
    server = victim()
    stream = opened(server)
    form = padded(b"\x02" + Zstd().compress(bytes(MIB)), MIB)
    tracemalloc.start()
    try:
        for _ in range(40):
            feed(server, form)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < MIB
    assert server.take(stream, 0.0) == bytes(MIB)


def test_a_result_that_is_too_long_decompressed() -> None:
    two = Pair({"compression": BOTH, "limits": Limits(max_message=100_000)}, {"compression": BOTH})
    mine, yours = two.accept()
    two.server.send(yours, LINES[:90_000])
    two.server.send(yours, LINES[:200_000])
    two.server.send(yours, LINES[:90_000])
    two.server.reply(yours, 0.0, None)
    two.run()
    assert two.client.take(mine, 0.0) == LINES[:90_000]
    assert two.client.take(mine, 0.0) is None
    assert two.client.incoming(mine).too_long
    assert two.client.take(mine, 0.0) is None, "nothing comes after it"


def test_arguments_that_are_too_long_decompressed() -> None:
    two = Pair({"compression": BOTH}, {"compression": BOTH, "limits": Limits(max_message=100_000)})
    mine = two.call(payload=LINES[:200_000])
    two.run()
    assert two.arrived() == []
    [(stream, payload, outcome)] = two.replies()
    assert (stream, payload, mine.state) == (mine, None, State.CLOSED)
    assert outcome.status is Status.RESOURCE_EXHAUSTED
    assert outcome.not_started


def test_a_message_compressed_wrongly_after_the_end_of_the_connection() -> None:
    """This end has closed already: that stays the reason."""
    server = victim()
    stream = opened(server)
    feed(server, b"\x01nonsense")
    server.close(CloseCode.NO_ERROR, "enough")
    with pytest.raises(RemoteProtocolError):
        server.take(stream, 0.0)
    assert server.next_event() is None
