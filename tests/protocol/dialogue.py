"""Random valid dialogues as bytes, and what a core makes of bytes in a comparable form."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import msgpack
from hypothesis import strategies as st

from druvarpc.compression import Zlib
from druvarpc.errors import RemoteProtocolError, Status
from druvarpc.protocol import (
    Algorithm,
    CallsReceived,
    Connection,
    Event,
    Limits,
    Outcome,
    Priority,
    Reference,
    Stream,
)
from druvarpc.protocol.frames import HEADER_SIZE, PREFACE, unpack_header
from druvarpc.zstd import Zstd

SIZES = st.sampled_from([0, 1, 300, 5_000, 70_000])
EVERYTHING = 2**40
# Windows that the longest of the dialogues fill, so that both ends give credit.
LIMITS = Limits(stream_window=128 * 1024, connection_window=1024 * 1024)
COMPRESSION: st.SearchStrategy[Sequence[Algorithm]] = st.sampled_from(
    [(), (Zlib(),), (Zstd(), Zlib())]
)


@dataclass(frozen=True)
class Say:
    """One call: what the client sends for it and what the server answers."""

    size: int
    lane: Priority
    up: tuple[int, ...] | None  # sizes of messages; None: a call that sends none
    ends: bool
    abandoned: bool
    clubbed: bool
    down: tuple[int, ...]
    result: int | None  # its size; None: the call fails
    rich: bool


SCRIPTS = st.lists(
    st.builds(
        Say,
        size=SIZES,
        lane=st.sampled_from(list(Priority)),
        up=st.none() | st.lists(SIZES, max_size=3).map(tuple),
        ends=st.booleans(),
        abandoned=st.sampled_from([False, False, False, True]),
        clubbed=st.booleans(),
        down=st.lists(SIZES, max_size=3).map(tuple),
        result=st.none() | SIZES,
        rich=st.booleans(),
    ),
    max_size=6,
)


def hello(compression: Sequence[Algorithm]) -> bytes:
    """Return the first that a core says."""
    core = Connection("server", now=0.0, limits=LIMITS, compression=compression)
    return b"".join(core.data_to_send(0.0))


def speak(script: list[Say], compression: Sequence[Algorithm] = ()) -> tuple[Connection, bytes]:
    """Return a client that has said its part, and the bytes of it.

    The server is still mute; but if they compress it has said `hello`.
    """
    client = Connection("client", now=0.0, limits=LIMITS, compression=compression)
    if compression:
        client.receive_data(hello(compression), 0.0)
    said = b""
    streams: list[Stream] = []
    for say in script:
        stream = Stream(
            f"Vault.m{say.size}",
            msgpack.packb([None, b"a" * say.size]),
            more=say.up is not None,
            lane=say.lane,
            deadline=9.0 if say.rich else None,
            metadata=[("trace", "\u00e4"), ("id", b"\xff")] if say.rich else (),
            timings=say.rich,
        )
        streams.append(stream)
        if say.clubbed:
            other = Stream(stream.method, b"\x91\xc0", lane=say.lane, references=(Reference(0, 0),))
            client.club([stream, other], 0.0)
            streams.append(other)
        else:
            client.call(stream, 0.0)
        for size in say.up or ():
            client.send(stream, b"u" * size)
        if say.up is not None and say.ends:
            client.end(stream)
        if say.rich:
            client.authenticate("token", [("tenant", "t")])
            client.ping(0.0)
        said += b"".join(client.data_to_send(0.0))
        if say.abandoned:
            client.reset(stream, 0.0, Status.CANCELLED, "enough")
    said += b"".join(client.data_to_send(0.0, EVERYTHING))
    return client, said


def answer(script: list[Say], said: bytes, compression: Sequence[Algorithm] = ()) -> bytes:
    """Return the bytes of a server that has heard the client's part and answers it.

    If they compress, what it says after its `hello`.
    """
    server = Connection("server", now=0.0, limits=LIMITS, compression=compression)
    server.receive_data(said, 0.0)
    says = iter(script * 2)
    while (event := server.next_event()) is not None:
        for stream in event.calls if isinstance(event, CallsReceived) else ():
            say = next(says)
            if say.rich and server.can_send(stream):
                server.send_metadata(stream, [("trace", b"\x00")])
            for size in say.down:
                if server.can_send(stream):
                    server.send(stream, b"d" * size)
            outcome = Outcome(message="m", trailers=[("t", "")], timings=(1, 2, 3))
            if say.result is None:
                server.reply(stream, 0.0, None, Outcome(Status.NOT_FOUND, "none", b"\xc0"))
            else:
                result = msgpack.packb(b"r" * say.result)
                server.reply(stream, 0.0, result, outcome if say.rich else None)
    answered = b"".join(server.data_to_send(0.0, EVERYTHING))
    first = hello(compression)
    assert answered.startswith(first)
    return answered[len(first) :] if compression else answered


def heard(core: Connection, pieces: list[bytes]) -> list[object]:
    """Return all that a core makes of bytes: events, messages, an error, what it sends then."""
    found: list[object] = []
    streams: dict[int, Stream] = {}
    for piece in pieces:
        core.receive_data(piece, 0.0)
    try:
        while (event := core.next_event()) is not None:
            found.append(plain(event, streams))
    except RemoteProtocolError as error:
        found.append((error.code, str(error)))
    for id, stream in sorted(streams.items()):
        try:
            while (message := core.take(stream, 0.0)) is not None:
                found.append((id, message))
        except RemoteProtocolError as error:
            found.append((id, str(error)))
        incoming = core.incoming(stream)
        found.append((id, stream.state, incoming.ended, incoming.too_long, incoming.size))
    found.append(b"".join(core.data_to_send(0.0, EVERYTHING)))
    return found


def plain(value: object, streams: dict[int, Stream]) -> object:
    """Return an event, or a part of one, with its streams told by what they say."""
    if isinstance(value, Stream):
        streams[value.id] = value
        return value.id, value.method, value.payload, value.lane, value.more, value.timings
    if isinstance(value, Event):
        return type(value), *(plain(getattr(value, f.name), streams) for f in fields(value))
    if isinstance(value, list | tuple):
        return [plain(item, streams) for item in value]
    return value


def split(data: bytes, cuts: list[float]) -> list[bytes]:
    """Return the pieces of data that is cut at fractions of its length."""
    places = sorted(int(cut * len(data)) for cut in cuts)
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kind of each frame that a core sent, with its bytes; the preface is left out."""
    position = len(PREFACE) if data.startswith(PREFACE) else 0
    while position < len(data):
        head, _ = unpack_header(data, position)
        end = position + HEADER_SIZE + (head & 0xFFFFFF)
        yield head >> 24, data[position:end]
        position = end
