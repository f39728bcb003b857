"""What a hostile peer can try: refused in bounded time and memory, and nobody else harmed by it.

The hostile side is raw bytes, made by hand, since our own core wouldn't send them. What an attack
costs in memory is measured with tracemalloc: what the core holds while the peer goes on.
"""

import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from struct import Struct
from typing import Any

import msgspec
import pytest

from druvarpc.errors import CloseCode, Status
from druvarpc.protocol import (
    CallsReceived,
    Connection,
    Event,
    GoAwayReceived,
    Limits,
    Outcome,
    Readable,
    Reference,
    RemoteProtocolError,
    ResetReceived,
    Stalled,
    Stream,
)
from tests.protocol.pair import Pair

HEADER = Struct("!IQ")
SETTINGS, PING, PONG, GOAWAY, CREDIT, AUTH = range(1, 7)
CALLS, REPLIES, DATA, RESET, METADATA = range(0x10, 0x15)
IGNORED = 0x80
END_MESSAGE, END_STREAM = 1, 2
MORE = 1
# What a DATA frame costs beside its bytes, and the least window.
COST = 64
WINDOW = 65_536

PREFACE = b"\x8bDRUVA\n\x01"


def frame(kind: int, body: bytes = b"", *, flags: int = 0, id: int = 0) -> bytes:
    return HEADER.pack(kind << 24 | len(body), flags << 56 | id) + body


def packed(kind: int, body: object, *, id: int = 0) -> bytes:
    return frame(kind, msgspec.msgpack.encode(body), id=id)


HELLO = PREFACE + packed(SETTINGS, [])


def call(id: int, flags: int = 0, payload: bytes | None = b"\x90") -> bytes:
    """CALLS with one call; the first names the method."""
    return packed(CALLS, [["Vault.put" if id == 1 else 0, flags, payload]], id=id)


def events(connection: Connection) -> list[Event]:
    """All events so far; raises what the connection fails with."""
    return list(iter(connection.next_event, None))


def arrived(connection: Connection) -> list[Stream]:
    return [
        one
        for event in events(connection)
        if isinstance(event, CallsReceived)
        for one in event.calls
    ]


def sent(connection: Connection, now: float = 0.0) -> list[tuple[int, int, bytes]]:
    """Let the connection send; return type, id and body of each frame."""
    data, frames = b"".join(connection.data_to_send(now)).removeprefix(PREFACE), []
    while data:
        head, tail = HEADER.unpack_from(data)
        end = HEADER.size + (head & 0xFFFFFF)
        frames.append((head >> 24, tail & 2**56 - 1, data[HEADER.size : end]))
        data = data[end:]
    return frames


def replies(connection: Connection, now: float = 0.0) -> dict[int, tuple[Status, bool]]:
    """Let the connection send; return status and NOT_STARTED of each call that it replies to."""
    found = {}
    while connection.wants_to_send:
        for kind, _, body in sent(connection, now):
            if kind == REPLIES:
                for id, _, *rest in msgspec.msgpack.decode(body):
                    found[id] = Status(rest[0] if rest else 0), bool(rest and rest[3])
    return found


def connect(role: str = "server", **limits: Any) -> Connection:
    """One end whose peer has said hello and does the rest by hand."""
    connection = Connection(role, now=0, limits=Limits(**limits))
    connection.receive_data(HELLO, 0)
    for kind, id, _ in sent(connection):
        if kind == PING:
            connection.receive_data(frame(PONG, id=id), 0)
    events(connection)
    return connection


def calling(count: int = 1, *, more: bool = False, **limits: Any) -> Connection:
    """A client whose calls are under way."""
    connection = connect("client", **limits)
    for _ in range(count):
        connection.call(Stream("Vault.get", b"\x90", more=more), 0)
    sent(connection)
    return connection


def refusal(connection: Connection, data: bytes, now: float = 0.0) -> CloseCode:
    """Let the connection hear what it must refuse; return the code that it tells the peer."""
    connection.receive_data(data, now)
    return failure(connection)


def failure(connection: Connection) -> CloseCode:
    with pytest.raises(RemoteProtocolError) as caught:
        events(connection)
    kind, _, body = sent(connection)[-1]
    assert kind == GOAWAY
    assert msgspec.msgpack.decode(body)[0] == caught.value.code
    assert connection.closed
    return caught.value.code


@contextmanager
def measured() -> Iterator[Callable[[], int]]:
    """Measure memory: gives a function that returns the bytes held since the block began."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@contextmanager
def memory_stays_below(most: int) -> Iterator[None]:
    with measured():
        yield
        _, peak = tracemalloc.get_traced_memory()
    assert peak < most


# 1. Declared lengths.


@pytest.mark.parametrize("kind", [PING, CREDIT, AUTH, CALLS, DATA, RESET, IGNORED])
def test_a_length_above_the_maximum_is_refused_from_the_header_alone(kind: int) -> None:
    header = HEADER.pack(kind << 24 | 262_145, 1)
    assert refusal(connect(max_frame=262_144), header) is CloseCode.FRAME_TOO_LARGE


@pytest.mark.parametrize("role", ["client", "server"])
def test_before_the_settings_4096_bytes_are_the_most(role: str) -> None:
    connection = Connection(role, now=0, limits=Limits(max_frame=16_777_215))
    header = HEADER.pack(SETTINGS << 24 | 4_097, 0)
    assert refusal(connection, PREFACE + header) is CloseCode.FRAME_TOO_LARGE


def test_a_declared_length_reserves_no_memory() -> None:
    connection = connect(max_frame=16_777_215)
    with memory_stays_below(16_384):
        connection.receive_data(HEADER.pack(CALLS << 24 | 16_777_215, 1) + b"\xdd", 0)
    assert events(connection) == []


# 2. Peers that don't finish.


def drip(connection: Connection, data: bytes, start: float) -> float:
    """Let a byte come each second until the connection gives up; return when it does."""
    for now, byte in enumerate(data):
        deadline = connection.next_deadline()
        if deadline is None:
            return start + now
        if deadline <= start + now:
            connection.handle_timer(start + now)
        connection.receive_data(bytes([byte]), start + now)
    raise AssertionError("the connection waited for all of it")


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_handshake_of_a_byte_a_second_is_cut_off(role: str) -> None:
    connection = Connection(role, now=100, limits=Limits(handshake_timeout=10))
    with memory_stays_below(16_384):
        assert drip(connection, PREFACE + packed(SETTINGS, [9, b"x" * 900]), 100) <= 112
    assert failure(connection) is CloseCode.TIMEOUT


def test_a_handshake_that_never_begins_is_cut_off() -> None:
    connection = Connection("server", now=100, limits=Limits(handshake_timeout=10))
    assert connection.next_deadline() == 110
    connection.handle_timer(110)
    assert failure(connection) is CloseCode.TIMEOUT


def test_a_frame_of_a_byte_a_second_is_cut_off() -> None:
    connection = connect(frame_timeout=60, keepalive_interval=10_000)
    assert drip(connection, packed(AUTH, ["x" * 900]), 0) <= 62
    assert failure(connection) is CloseCode.TIMEOUT


def test_frames_that_complete_slowly_but_in_time_are_borne() -> None:
    connection = connect(frame_timeout=60, keepalive_interval=10_000)
    # Each piece ends one frame and begins the next: there is always one that is incomplete.
    stream = packed(AUTH, ["x" * 86]) * 20
    for now, start in enumerate(range(0, len(stream), 50)):
        connection.receive_data(stream[start : start + 50], now * 10)
        deadline = connection.next_deadline()
        assert deadline is not None
        assert deadline > now * 10
    assert len(events(connection)) == 20


def test_a_handshake_in_single_bytes_holds_no_more_than_its_bytes() -> None:
    connection = Connection("server", now=0)
    data = PREFACE + packed(SETTINGS, [9, b"x" * 4_000])
    with memory_stays_below(32_768):
        for byte in data[:-1]:
            connection.receive_data(bytes([byte]), 0)


# 3. Flow control and ids, to the byte.


def open_stream(role: str) -> Connection:
    if role == "client":
        return calling(stream_window=WINDOW, connection_window=WINDOW)
    connection = connect(stream_window=WINDOW, connection_window=WINDOW)
    connection.receive_data(call(1, MORE), 0)
    return connection


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_byte_beyond_the_credit_ends_the_connection(role: str) -> None:
    connection = open_stream(role)
    connection.receive_data(frame(DATA, bytes(WINDOW - COST), flags=END_MESSAGE, id=1), 0)
    events(connection)
    connection = open_stream(role)
    too_much = frame(DATA, bytes(WINDOW - COST + 1), flags=END_MESSAGE, id=1)
    assert refusal(connection, too_much) is CloseCode.FLOW_CONTROL_ERROR


def test_streams_together_stay_within_the_credit_of_the_connection() -> None:
    connection = connect(stream_window=WINDOW, connection_window=WINDOW)
    connection.receive_data(call(1, MORE) + call(2, MORE), 0)
    half = bytes(WINDOW // 2 - COST)
    connection.receive_data(frame(DATA, half, flags=END_MESSAGE, id=1), 0)
    connection.receive_data(frame(DATA, half, flags=END_MESSAGE, id=2), 0)
    events(connection)
    one_more = frame(DATA, flags=END_MESSAGE, id=2)
    assert refusal(connection, one_more) is CloseCode.FLOW_CONTROL_ERROR


def test_what_is_sent_for_a_call_that_was_replied_to_is_under_credit_too() -> None:
    connection = connect(stream_window=WINDOW, connection_window=4 * WINDOW)
    connection.receive_data(call(1, MORE), 0)
    connection.reply(arrived(connection)[0], 0)
    too_much = frame(DATA, bytes(WINDOW), flags=END_MESSAGE, id=1)
    assert refusal(connection, too_much) is CloseCode.FLOW_CONTROL_ERROR


@pytest.mark.parametrize("pairs", [[0, 0], [1, 0], [0, 2**31 - 1], [1, 2**31 - 1], [2, 5_000]])
def test_credit_of_nothing_too_much_or_for_nobody_ends_the_connection(pairs: list[int]) -> None:
    connection = open_stream("server")
    assert refusal(connection, packed(CREDIT, pairs)) is CloseCode.FLOW_CONTROL_ERROR


@pytest.mark.parametrize("id", [1, 3, 2**56 - 1], ids=["reused", "left out", "far away"])
def test_ids_follow_one_another(id: int) -> None:
    connection = connect()
    connection.receive_data(call(1), 0)
    connection.reply(arrived(connection)[0], 0, b"\xc0")
    sent(connection)
    assert refusal(connection, call(id)) is CloseCode.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "data",
    [
        frame(DATA, b"x", flags=END_MESSAGE, id=1),
        frame(DATA, flags=END_STREAM, id=1),
        frame(DATA, b"x", flags=END_MESSAGE, id=2),
        packed(RESET, [1], id=1) * 2,
        packed(RESET, [1], id=2),
        packed(RESET, [1], id=1) + frame(DATA, b"x", flags=END_MESSAGE, id=1),
        packed(GOAWAY, [0]) + call(2),
        packed(REPLIES, [[1, b"\xc0"]]),
        packed(METADATA, [], id=1),
        packed(SETTINGS, []),
    ],
)
def test_frames_that_the_state_forbids_end_the_connection(data: bytes) -> None:
    connection = connect()
    connection.receive_data(call(1), 0)
    assert refusal(connection, data) is CloseCode.PROTOCOL_ERROR


# 4. Open and cancel.


class Handlers:
    """A server's handlers, which take two turns to stop when they are cancelled."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.running: set[Stream] = set()
        self.most = 0
        self._stopping: list[list[Stream]] = [[], []]

    def turn(self, now: float) -> None:
        self._stopping.append([])
        for stream in self._stopping.pop(0):
            self.running.remove(stream)
            self.connection.reply(stream, now)
        for event in events(self.connection):
            if isinstance(event, CallsReceived):
                self.running.update(event.calls)
            elif isinstance(event, ResetReceived):
                self._stopping[-1].append(event.stream)
        self.most = max(self.most, len(self.running))


def test_opening_and_cancelling_runs_no_more_handlers_than_may_run() -> None:
    connection = connect(max_calls=100)
    handlers = Handlers(connection)

    def attack() -> None:
        for id in range(1, 100_001):
            connection.receive_data(call(id) + packed(RESET, [1], id=id), 0)
            handlers.turn(0)  # and none of the replies is waited for

    with pytest.raises(RemoteProtocolError):
        attack()
    assert handlers.most <= 100


def test_opening_and_cancelling_without_end_is_abuse() -> None:
    connection = connect(max_calls=100)
    handlers = Handlers(connection)

    def attack() -> None:
        for id in range(1, 100_001):
            connection.receive_data(call(id) + packed(RESET, [1], id=id), id * 1e-5)
            handlers.turn(id * 1e-5)
            sent(connection)  # it reads, so that places are free again

    with pytest.raises(RemoteProtocolError) as caught:
        attack()
    assert caught.value.code is CloseCode.ABUSE
    assert handlers.most <= 3


def test_cancelling_at_a_rate_that_services_know_is_borne() -> None:
    connection = connect(max_calls=100)
    handlers = Handlers(connection)
    for id in range(1, 30_001):
        now = id / 900
        connection.receive_data(call(id) + packed(RESET, [1], id=id), now)
        handlers.turn(now)
        sent(connection)
    assert not connection.closed


def test_ending_what_was_replied_to_early_is_borne_at_any_rate() -> None:
    connection = connect()
    for id in range(1, 30_001):
        connection.receive_data(call(id, MORE), 0)
        connection.reply(arrived(connection)[0], 0, b"\xc0")
        sent(connection)
        connection.receive_data(packed(RESET, [1], id=id), 0)
    assert events(connection) == []
    assert connection.open_calls == 0


def test_a_call_that_was_cancelled_holds_its_place_until_the_handler_has_ended() -> None:
    connection = connect(max_calls=64)
    for id in range(1, 65):
        connection.receive_data(call(id) + packed(RESET, [1], id=id), 0)
    assert refusal(connection, call(65)) is CloseCode.PROTOCOL_ERROR


# 5. Floods from a peer that never reads.


def closed_call() -> Connection:
    connection = connect()
    connection.receive_data(call(1), 0)
    connection.reply(arrived(connection)[0], 0, b"\xc0")
    return connection


def draining() -> Connection:
    connection = connect()
    connection.receive_data(call(1), 0)
    connection.drain()
    return connection


FLOODS: dict[str, tuple[Callable[[], Connection], bytes]] = {
    "ping": (connect, frame(PING)),
    "ping to a client": (lambda: connect("client"), frame(PING)),
    "auth": (connect, packed(AUTH, ["token"])),
    "goaway": (connect, packed(GOAWAY, [0])),
    "goaway to a client": (lambda: connect("client"), packed(GOAWAY, [0])),
    "scraps of credit": (connect, packed(CREDIT, [0, 1] * 100)),
    "scraps of credit to a client": (lambda: connect("client"), packed(CREDIT, [0, 1] * 100)),
    "credit for a closed call": (closed_call, packed(CREDIT, [1, 2_000])),
    "reset of a closed call": (closed_call, packed(RESET, [1], id=1)),
    "ignored frames": (connect, frame(IGNORED)),
    "ignored frames to a client": (lambda: connect("client"), frame(0xFF, b"x")),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_from_a_peer_that_never_reads_is_abuse(flood: str) -> None:
    make, piece = FLOODS[flood]
    connection = make()
    events(connection)
    code = None
    with memory_stays_below(256 * 1024):
        for _ in range(300):
            connection.receive_data(piece * 100, 0)
            try:
                events(connection)
            except RemoteProtocolError as error:
                code = error.code
                break
    assert code is CloseCode.ABUSE


def test_calls_without_end_to_a_server_that_drains_are_abuse() -> None:
    connection = draining()

    def attack() -> None:
        for id in itertools.count(2):
            connection.receive_data(call(id), 0)
            events(connection)

    with memory_stays_below(256 * 1024), pytest.raises(RemoteProtocolError) as caught:
        attack()
    assert caught.value.code is CloseCode.ABUSE


@pytest.mark.parametrize("role", ["client", "server"])
def test_settings_come_once(role: str) -> None:
    assert refusal(connect(role), packed(SETTINGS, [])) is CloseCode.PROTOCOL_ERROR


def test_empty_data_frames_are_refused_at_the_first() -> None:
    connection = connect()
    connection.receive_data(call(1, MORE), 0)
    assert refusal(connection, frame(DATA, id=1)) is CloseCode.PROTOCOL_ERROR


def test_pongs_that_nobody_reads_are_counted_by_themselves() -> None:
    connection = connect()
    for second in range(256):  # far below the rate that is abuse
        connection.receive_data(frame(PING), second)
    assert refusal(connection, frame(PING), 256) is CloseCode.ABUSE


def test_pings_at_a_rate_that_peers_know_are_borne() -> None:
    connection = connect()
    for count in range(30_000):
        connection.receive_data(frame(PING, id=count), count / 900)
        assert (PONG, count, b"") in sent(connection, count / 900)


def test_replies_that_nobody_reads_keep_their_places() -> None:
    connection = connect(max_calls=64)
    for id in range(1, 65):
        connection.receive_data(call(id), 0)
        connection.reply(arrived(connection)[0], 0, b"\xc0")
    assert connection.open_calls == 0
    assert refusal(connection, call(65)) is CloseCode.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "end", [lambda id: frame(DATA, flags=END_STREAM, id=id), lambda id: packed(RESET, [1], id=id)]
)
def test_replies_that_nobody_reads_keep_their_places_when_the_peer_ends_its_direction(
    end: Callable[[int], bytes],
) -> None:
    connection = connect(max_calls=64)
    for id in range(1, 65):
        connection.receive_data(call(id, MORE), 0)
        connection.reply(arrived(connection)[0], 0, b"\xc0")
        connection.receive_data(end(id), 0)
    assert connection.open_calls == 0
    assert refusal(connection, call(65)) is CloseCode.PROTOCOL_ERROR


def test_a_call_that_was_replied_to_before_its_caller_ended_holds_one_place() -> None:
    pair = Pair(server_options={"limits": Limits(max_calls=64)})
    streams = [pair.call(more=True) for _ in range(40)]
    pair.to_server()
    for call_ in pair.arrived():
        pair.server.reply(call_, pair.now, b"\xc0")
    # The client doesn't know yet, and has room for 24.
    for _ in range(24):
        pair.call()
    pair.run()
    assert len(pair.replies()) == len(streams)
    assert len(pair.arrived()) == 24


# 6. One-byte data frames.


def test_one_byte_frames_cost_what_they_take() -> None:
    connection = connect(stream_window=WINDOW, connection_window=WINDOW)
    connection.receive_data(call(1, MORE), 0)
    piece = frame(DATA, b"x", flags=END_MESSAGE, id=1)
    most = WINDOW // (COST + 1)
    with memory_stays_below(4 * WINDOW):
        connection.receive_data(piece * most, 0)
        events(connection)
    assert refusal(connection, piece) is CloseCode.FLOW_CONTROL_ERROR


def test_a_message_in_tiny_pieces_takes_the_memory_of_its_bytes() -> None:
    most = 50_000
    connection = connect(max_message=most)
    connection.receive_data(call(1, MORE, None), 0)
    piece = frame(DATA, b"xy", id=1)
    with memory_stays_below(3 * most):
        for _ in range(most // 2):
            connection.receive_data(piece, 0)
            b"".join(connection.data_to_send(0))  # credit
    assert events(connection) == []
    connection.receive_data(piece, 0)
    assert replies(connection) == {1: (Status.RESOURCE_EXHAUSTED, True)}


# 7. A peer that gives no credit.


def test_a_result_that_the_peer_gives_no_credit_for_is_dropped_in_time() -> None:
    connection = connect(stall_timeout=300, keepalive_interval=10_000)
    connection.receive_data(call(1) + call(2), 0)
    big, small = arrived(connection)
    with measured() as held:
        connection.reply(big, 0, bytes(8 * 1024 * 1024))
        sent(connection)
        assert held() > 8 * 1024 * 1024
        connection.reply(small, 1, b"\xc0")
        assert replies(connection, 1) == {2: (Status.OK, False)}
        assert connection.next_deadline() == 300
        connection.handle_timer(300)
        assert held() < 65_536  # with what coverage allots while it looks on
    assert replies(connection, 300) == {1: (Status.ABORTED, False)}
    assert connection.open_calls == 0


def test_a_stream_that_the_peer_gives_no_credit_for_pins_little_and_ends_in_time() -> None:
    connection = connect(stall_timeout=300, keepalive_interval=10_000)
    connection.receive_data(call(1), 0)
    [stream] = arrived(connection)
    with measured() as held:
        while connection.send(stream, bytes(10_000)):
            sent(connection)
        assert held() < 512 * 1024
        connection.handle_timer(299)
        assert events(connection) == []
        connection.handle_timer(301)
        assert events(connection) == [Stalled(stream)]
        connection.reply(stream, 301, outcome=Outcome(Status.ABORTED))
        assert held() < 65_536  # with what coverage allots while it looks on
    assert replies(connection, 301) == {1: (Status.ABORTED, False)}


def test_credit_in_drops_lets_nobody_cut_messages_into_drops() -> None:
    connection = connect()
    connection.receive_data(call(1), 0)
    [stream] = arrived(connection)
    connection.reply(stream, 0, bytes(100_000))
    sent(connection)  # all but what the window doesn't hold
    for _ in range(100):
        connection.receive_data(packed(CREDIT, [0, 65, 1, 65]), 0)
    pieces = [len(body) for kind, _, body in sent(connection) if kind == DATA]
    assert len(pieces) <= 1


# 8. A receiver whose application doesn't take.


def test_a_handler_that_does_not_read_stalls_its_own_caller_only() -> None:
    pair = Pair(server_options={"limits": Limits(stream_window=WINDOW, connection_window=2**20)})
    slow, unread = pair.accept(more=True)
    fast, read = pair.accept(more=True)
    message = bytes(10_000)
    with memory_stays_below(1024 * 1024):
        while pair.client.send(slow, message):
            pair.run()
        for _ in range(500):
            pair.client.send(fast, message)
            pair.run()
            assert pair.server.take(read, pair.now) == message
    assert not pair.client.closed
    # What waits is the stream's window and what the client holds; all of it still comes.
    pair.client.end(slow)
    count = 0
    while not pair.server.incoming(unread).ended or pair.server.incoming(unread).messages:
        count += pair.server.take(unread, pair.now) is not None
        pair.run()
    assert WINDOW // 11_000 < count < (WINDOW + 300_000) // 10_000


def test_a_client_that_does_not_read_stalls_its_own_handler_only() -> None:
    pair = Pair(client_options={"limits": Limits(stream_window=WINDOW, connection_window=2**20)})
    _, slow = pair.accept()
    wanted, fast = pair.accept()
    message = bytes(10_000)
    with memory_stays_below(1024 * 1024):
        while pair.server.send(slow, message):
            pair.run()
        for _ in range(500):
            pair.server.send(fast, message)
            pair.run()
            assert pair.client.take(wanted, pair.now) == message


# 9. Both sides only write.


def test_two_sides_that_only_write_do_not_block_each_other_for_good() -> None:
    pair = Pair()
    up, down = pair.accept(more=True)
    message = bytes(50_000)
    for sender, stream in ((pair.client, up), (pair.server, down)):
        for _ in range(100):
            sender.send(stream, message)
    pair.run()
    # Both are out of credit; a small call is not.
    _, small = pair.accept()
    pair.server.reply(small, pair.now, b"\xc0")
    pair.run()
    assert len(pair.replies()) == 1
    taken = {pair.client: 0, pair.server: 0}
    while sum(taken.values()) < 200:
        before = sum(taken.values())
        for receiver, stream in ((pair.client, up), (pair.server, down)):
            while receiver.take(stream, pair.now) is not None:
                taken[receiver] += 1
        pair.run()
        assert sum(taken.values()) > before or pair.client.incoming(up).messages
    assert taken == {pair.client: 100, pair.server: 100}


# 10. MessagePack bombs.

BOMBS = {
    "array": b"\xdd\xff\xff\xff\xff",
    "map": b"\xdf\xff\xff\xff\xff\x01",
    "str": b"\xdb\xff\xff\xff\xffx",
    "bin": b"\xc6\xff\xff\xff\xffx",
    "ext": b"\xc9\xff\xff\xff\xff\x01x",
    "arrays as long as the frame, in each other": b"\xdd\x00\x03\xff\xf0" * 1_000 + bytes(200_000),
    "short arrays in each other": b"\xdc\xff\xff" * 300 + bytes(70_000),
    "100,000 arrays in each other": b"\x91" * 100_000 + b"\xc0",
    "100,000 maps in each other": b"\x81\x01" * 100_000 + b"\xc0",
    "900 arrays in each other": b"\x91" * 900 + b"\xc0",
    "a key twice": b"\x82\x01\x02\x01\x03",
    "an array as a key": b"\x81\x91\x01\x02",
    "a map as a key": b"\x81\x81\x01\x02\x03",
    "bad UTF-8": b"\xa2\xc3\x28",
    "a surrogate": b"\xa3\xed\xa0\x80",
    "a time out of all bounds": b"\xc7\x0c\xff" + b"\xff" * 12,
    "the byte that is never used": b"\xc1",
    "nothing": b"",
}
BODIES = {
    "server": (CREDIT, GOAWAY, AUTH, CALLS, RESET),
    "client": (CREDIT, GOAWAY, REPLIES, METADATA),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(
    "around", [b"", b"\x91", b"\x91\x91", b"\x91\x93\x00", b"\x91\x92\x01\xc0\x00"]
)
@pytest.mark.parametrize(
    ("role", "kind"), [(role, kind) for role, kinds in BODIES.items() for kind in kinds]
)
def test_a_bomb_is_refused_at_the_cost_of_its_bytes(
    role: str, kind: int, around: bytes, bomb: str
) -> None:
    connection = calling() if role == "client" else connect()
    body = around + BOMBS[bomb]
    id = 1 if kind in (CALLS, RESET, METADATA) else 0
    with memory_stays_below(65_536 + 100 * len(body)):
        assert refusal(connection, frame(kind, body, id=id)) is CloseCode.PROTOCOL_ERROR


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("role", ["client", "server"])
def test_a_bomb_in_the_settings_is_refused_at_the_cost_of_its_bytes(role: str, bomb: str) -> None:
    connection = Connection(role, now=0)
    body = (b"\x91" + BOMBS[bomb])[:4_096]
    with memory_stays_below(65_536 + 100 * len(body)):
        data = PREFACE + frame(SETTINGS, body)
        assert refusal(connection, data) is CloseCode.PROTOCOL_ERROR


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_among_the_arguments_harms_its_own_call_only(bomb: str) -> None:
    connection = connect(max_inline=32_768)
    payload = (b"\x92\xc0" + BOMBS[bomb])[:32_768]
    calls = [["Vault.put", 0, b"\x90"], [0, 0, payload, None, None, [[0, 0, []]]]]
    connection.receive_data(packed(CALLS, calls, id=1), 0)
    [first] = arrived(connection)
    with memory_stays_below(65_536 + 100 * len(payload)):
        connection.reply(first, 0, b"\xc0")
    followed = arrived(connection)
    found = replies(connection)
    assert found.pop(1) == (Status.OK, False)
    if followed:  # it was MessagePack, however odd; the handler's decoder has the next word
        assert found == {}
    else:
        assert found == {2: (Status.INVALID_ARGUMENT, True)}
    assert not connection.closed


# 11. Metadata and names.


@pytest.mark.parametrize(
    "metadata",
    [
        ["k", "v"] * 65,
        ["k", b"x" * 8_160],
        ["k", "é" * 4_080],
        ["k", ""] * 64 + ["k"],
        ["", "v"],
        ["k" * 256, "v"],
        [b"k", "v"],
        ["k", None],
        ["k", ["v"]],
        {"k": "v"},
    ],
)
def test_metadata_are_capped_wherever_they_come(metadata: object) -> None:
    calls = [["Vault.put", 0, b"\x90", None, metadata]]
    for data in (packed(CALLS, calls, id=1), packed(AUTH, ["", metadata])):
        assert refusal(connect(), data) is CloseCode.PROTOCOL_ERROR
    trailers = [[1, b"\xc0", 0, None, None, 0, metadata]]
    for data in (packed(REPLIES, trailers), packed(METADATA, metadata, id=1)):
        assert refusal(calling(), data) is CloseCode.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a" * 256,
        "a b",
        "a/b",
        "a\n",
        "\n",
        "é",
        "\u0661",
        "a\0",
        b"a",
        True,
        -1,
        0,
        2**64 - 1,
        1.0,
        [],
    ],
)
def test_names_are_checked_before_they_are_used(name: object) -> None:
    data = packed(CALLS, [[name, 0, b"\x90"]], id=1)
    assert refusal(connect(), data) is CloseCode.PROTOCOL_ERROR


def test_names_are_numbered_up_to_4096() -> None:
    connection = connect()
    with memory_stays_below(4 * 1024 * 1024):
        for id in range(1, 4_097):
            connection.receive_data(packed(CALLS, [[f"A.m{id}", 0, b"\x90"]], id=id), 0)
            connection.reply(arrived(connection)[0], 0)
            sent(connection)
    one_more = packed(CALLS, [["A.m0", 0, b"\x90"]], id=4_097)
    assert refusal(connection, one_more) is CloseCode.PROTOCOL_ERROR


# 12. Clubs.


def club(*calls: Sequence[object]) -> bytes:
    return packed(CALLS, [["Vault.put", 0, b"\x90"], *([0, *one] for one in calls)], id=1)


@pytest.mark.parametrize(
    "data",
    [
        club(*([[0, b"\x90"]] * 64)),
        packed(CALLS, [[["Vault.put", 0, b"\x90"], ["Vault.get", 0, b"\x90"]]], id=1),
        packed(CALLS, [["Vault.put", 0, [0, 0, b"\x90"]]], id=1),
        packed(CALLS, [], id=1),
        club([0, b"\x91\xc0", None, None, [[0, 1, []]]]),
        club([0, b"\x91\xc0", None, None, [[0, 2, []]]], [0, b"\x90"]),
        club([0, b"\x91\xc0", None, None, [[0, 99, []]]]),
        club([0, b"\x91\xc0", None, None, [[0, -1, []]]]),
        club([0, b"\x91\xc0", None, None, [[0, 0, [0] * 17]]]),
        club([0, b"\x91\xc0", None, None, [[0, 0, []], [0, 0, []]]]),
        club([0, b"\x91\xc0", None, None, [[n, 0, []] for n in range(65)]]),
    ],
    ids=[
        "too many",
        "a club in a club",
        "a call in a call",
        "none",
        "itself",
        "forward",
        "outside",
        "negative",
        "long path",
        "one place twice",
        "too many references",
    ],
)
def test_clubs_that_break_the_rules_end_the_connection(data: bytes) -> None:
    assert refusal(connect(max_club=64), data) is CloseCode.PROTOCOL_ERROR


def test_a_club_counts_as_its_calls() -> None:
    connection = connect(max_calls=64, max_club=1_024)
    assert refusal(connection, club(*([[0, b"\x90"]] * 64))) is CloseCode.PROTOCOL_ERROR


def test_a_position_far_out_is_an_argument_that_is_not_there() -> None:
    connection = connect()
    connection.receive_data(club([0, b"\x91\xc0", None, None, [[2**64 - 1, 0, []]]]), 0)
    connection.reply(arrived(connection)[0], 0, b"\xc0")
    assert replies(connection)[2] == (Status.INVALID_ARGUMENT, True)


@pytest.mark.parametrize("path", [[], ["a"]], ids=["whole results", "parts of them"])
def test_results_are_not_multiplied_by_references(path: list[str]) -> None:
    most = 1024 * 1024
    connection = connect(max_message=most)
    dependent = [0, b"\x91\xc0", None, None, [[0, 0, path]]]
    connection.receive_data(club(*([dependent] * 500)), 0)
    [first] = arrived(connection)
    result = msgspec.msgpack.encode({"a": 1, "b": bytes(100_000)})
    with memory_stays_below(2 * most):
        connection.reply(first, 0, result)
        started = arrived(connection)
    assert len(started) * len(result) <= most
    assert sum(len(one.payload or b"") for one in started) <= most
    refused = [one for one in replies(connection).values() if one[0] is not Status.OK]
    assert refused == [(Status.RESOURCE_EXHAUSTED, True)] * (500 - len(started))


def test_one_call_with_many_references_is_bounded_too() -> None:
    connection = connect(max_message=1024 * 1024)
    references = [[n, 0, []] for n in range(64)]
    payload = msgspec.msgpack.encode([None] * 64)
    connection.receive_data(club([0, payload, None, None, references]), 0)
    [first] = arrived(connection)
    with memory_stays_below(2 * 1024 * 1024):
        connection.reply(first, 0, msgspec.msgpack.encode(bytes(20_000)))
    assert replies(connection)[2] == (Status.RESOURCE_EXHAUSTED, True)


def test_a_long_chain_of_calls_that_need_each_other_unwinds() -> None:
    connection = connect()
    chain = [[0, b"\x91\xc0", None, None, [[0, n, []]]] for n in range(1_000)]
    connection.receive_data(club(*chain), 0)
    [first] = arrived(connection)
    connection.reply(first, 0, outcome=Outcome(Status.NOT_FOUND))
    found = replies(connection)
    assert found.pop(1) == (Status.NOT_FOUND, False)
    assert found == dict.fromkeys(range(2, 1_002), (Status.FAILED_PRECONDITION, True))
    assert connection.open_calls == 0


def test_one_call_may_refer_to_one_result_twice() -> None:
    pair = Pair()
    first = Stream("Vault.get", b"\x90")
    second = Stream(
        "Vault.put",
        b"\x92\xc0\xc0",
        references=(Reference(0, 0, ("a",)), Reference(1, 0, ("b",))),
    )
    pair.client.club([first, second], pair.now)
    pair.run()
    [got] = pair.arrived()
    pair.server.reply(got, pair.now, msgspec.msgpack.encode({"a": 1, "b": 2}))
    pair.run()
    [ready] = pair.arrived()
    assert ready.payload == b"\x92\x01\x02"
    assert [stream for stream, _, _ in pair.replies()] == [first]


def test_results_that_nobody_refers_to_are_not_kept() -> None:
    connection = connect()
    waiting = [0, b"\x91\xc0", None, None, [[0, 0, []]]]
    connection.receive_data(club(waiting, *([[0, b"\x90"]] * 200)), 0)
    first, *others = arrived(connection)
    with measured() as held:
        while others:
            connection.reply(others.pop(), 0, bytes(4_000))
            sent(connection)
        assert held() < 100_000
    assert first.state is not first.state.CLOSED


def test_a_reply_above_the_cap_is_not_put_together() -> None:
    most = 128 * 1024
    connection = connect("client", max_message=most, stream_window=most)
    stream = Stream("Vault.get", b"\x90")
    connection.call(stream, 0)
    sent(connection)
    with memory_stays_below(2 * most):
        told: list[Event] = []
        while not told:
            connection.receive_data(frame(DATA, bytes(16_384), id=1), 0)
            sent(connection)  # with credit, since the application waits
            told = events(connection)
    assert told == [Readable(stream)]
    assert connection.incoming(stream).too_long
    connection.reset(stream, 0)
    assert [kind for kind, _, _ in sent(connection)] == [RESET]


def test_arguments_above_the_cap_are_not_put_together() -> None:
    most = 128 * 1024
    connection = connect(max_message=most, stream_window=most)
    connection.receive_data(call(1, MORE, None), 0)
    with memory_stays_below(2 * most):
        for _ in range(9):
            connection.receive_data(frame(DATA, bytes(16_384), id=1), 0)
            assert events(connection) == []
    assert replies(connection) == {1: (Status.RESOURCE_EXHAUSTED, True)}


# What the peer says after it has given up.


def test_nothing_is_heard_after_a_goaway_with_an_error() -> None:
    connection = connect()
    connection.receive_data(packed(GOAWAY, [CloseCode.INTERNAL_ERROR]) + b"\0" * 100, 0)
    connection.receive_data(b"\0" * 100, 0)
    assert [event.code for event in events(connection) if isinstance(event, GoAwayReceived)] == [
        CloseCode.INTERNAL_ERROR
    ]
    sent(connection)
    assert connection.closed


def test_a_goaway_gives_back_only_the_calls_that_are_still_wanted() -> None:
    connection = connect("client")
    streams = [Stream("Vault.get", b"\x90") for _ in range(3)]
    for stream in streams:
        connection.call(stream, 0)
    sent(connection)
    connection.reset(streams[1], 0)
    connection.receive_data(packed(GOAWAY, [0], id=1), 0)
    [event] = events(connection)
    assert isinstance(event, GoAwayReceived)
    assert event.refused == [streams[2]]


# 17. What a peer sends is told in a form that can be logged.


@pytest.mark.parametrize("value", ["\x1b[2J" * 100, [[[]]] * 1_000, {"k": "v"}, b"\xff" * 1_000])
def test_errors_quote_little_of_what_came_and_nothing_raw(value: object) -> None:
    for body in ([[value, 0, b"\x90"]], [["A.b", value, b"\x90"]], [["A.b", 0, b"\x90", value]]):
        connection = connect()
        connection.receive_data(packed(CALLS, body, id=1), 0)
        with pytest.raises(RemoteProtocolError) as caught:
            events(connection)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
