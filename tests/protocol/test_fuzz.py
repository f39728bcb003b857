"""Any bytes at all, to either role: events or a RemoteProtocolError, and nothing else."""

from collections.abc import Sequence
from contextlib import suppress

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.compression import Zlib
from druvarpc.errors import Status
from druvarpc.protocol import (
    Algorithm,
    CallsReceived,
    Connection,
    Event,
    GoAwayReceived,
    Limits,
    MetadataReceived,
    Outcome,
    Readable,
    RemoteProtocolError,
    RepliesReceived,
    ResetReceived,
    Stalled,
    Stream,
    Writable,
)
from druvarpc.protocol.frames import GOAWAY, KINDS, PREFACE, SETTINGS, frame
from druvarpc.zstd import Zstd
from tests.protocol.dialogue import (
    COMPRESSION,
    LIMITS,
    SCRIPTS,
    Say,
    answer,
    frames,
    hello,
    speak,
    split,
)

HELLO = PREFACE + frame(SETTINGS, b"\x90")
CUTS = st.lists(st.floats(0, 1), max_size=6)


class Owner:
    """Goes on using its side whatever the peer sends, and only in ways that are allowed.

    Choices are read from `dice`, over and over, so that Hypothesis can search them.
    """

    def __init__(self, core: Connection, dice: bytes) -> None:
        self.core = core
        self.now = 0.0
        self.failed = False
        self._dice = dice or b"\x00"
        self._throws = 0
        self._streams: dict[Stream, None] = {}
        self._replied: set[Stream] = set()

    def throw(self, sides: int) -> int:
        self._throws += 1
        return self._dice[self._throws % len(self._dice)] % sides

    def hear(self, data: bytes) -> None:
        self.core.receive_data(data, self.now)
        self.listen()

    def listen(self) -> None:
        try:
            while (event := self.core.next_event()) is not None:
                assert not self.failed, "nothing comes after the error"
                self.on_event(event)
        except RemoteProtocolError:
            self.failed = True

    def on_event(self, event: Event) -> None:
        match event:
            case CallsReceived(calls):
                self._streams.update(dict.fromkeys(calls))
            case RepliesReceived(replies):
                for stream, _, _ in replies:
                    self._streams[stream] = None
            case (
                Readable(stream)
                | Writable(stream)
                | ResetReceived(stream)
                | MetadataReceived(stream)
                | Stalled(stream)
            ):
                assert stream in self._streams, "it was told of the call before"
            case GoAwayReceived(_, _, refused):
                assert self._streams.keys() >= set(refused)

    def call(self) -> None:
        if self.core.accepts_calls:
            stream = Stream("Vault.put", b"\x90" * [1, 5000][self.throw(2)], more=self.throw(2) > 0)
            self._streams[stream] = None
            self.core.call(stream, self.now)

    def act(self) -> None:
        """Do one thing for each call, and let the clock go on."""
        core, client = self.core, self.core.role == "client"
        if client:
            self.call()
        for stream in list(self._streams):
            match self.throw(6):
                case 0:
                    with suppress(RemoteProtocolError):  # `listen` finds it too
                        core.take(stream, self.now)
                case 1 if core.can_send(stream):
                    core.send(stream, b"x" * self.throw(256) * 400)
                case 2 if client:
                    core.reset(stream, self.now)
                case 3 if client and core.can_send(stream):
                    core.end(stream)
                case 2 if core.can_send(stream) and stream.outgoing is None:
                    core.send_metadata(stream, [("k", "v")])
                case 4 | 3 if not client and stream not in self._replied:
                    self._replied.add(stream)
                    if self.throw(2):
                        core.reply(stream, self.now, None, Outcome(Status.ABORTED, "no"))
                    else:
                        core.reply(stream, self.now, b"\x93" + b"\x01\x02\x03" * self.throw(9000))
        if self.throw(9) == 0:
            core.drain()
        if self.throw(3) == 0:
            core.data_to_send(self.now)
        self.now += self.throw(3) * 20
        core.handle_timer(self.now)
        core.next_deadline()
        self.listen()

    def check(self) -> None:
        """After an error there is one GOAWAY, the last that is sent, and then no more."""
        if not self.failed:
            return
        assert self.core.wants_to_send == (not self.core.closed)
        said = b"".join(self.core.data_to_send(self.now))
        if said:
            assert [*frames(said)][-1][0] == GOAWAY
        assert self.core.closed
        assert not self.core.wants_to_send
        assert self.core.next_deadline() is None
        self.core.receive_data(HELLO, self.now)
        self.act()
        assert self.failed


def attack(core: Connection, data: bytes, cuts: list[float], dice: bytes) -> None:
    owner = Owner(core, dice)
    if core.role == "client":
        for _ in range(4):
            owner.call()
        core.data_to_send(0.0)
    for piece in split(data, cuts):
        owner.hear(piece)
        owner.act()
    owner.check()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 70)
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.sampled_from(["", "Vault.put", "V" * 300])
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([b"\x90", b"\x91\xc0", b"x" * 20_000]),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.integers(0, 3), inner),
    max_leaves=12,
)
# By the one algorithm and the other, whole, in part, with something behind them, too long.
FORMS = [
    form[:end] + more
    for form in (b"\x01" + Zlib().compress(b"\x90" * 50), b"\x02" + Zstd().compress(b"\x90" * 50))
    for end, more in ((None, b""), (-1, b""), (None, b"\x00"), (1, b""))
] + [b"\x01" + Zlib().compress(bytes(20_000)), b"\x00\x02" + Zstd().compress(bytes(20_000))]
CALL = st.tuples(
    st.sampled_from(["Vault.put", 0, 1]),
    st.integers(0, 8) | st.integers(16, 24),
    st.sampled_from([b"\x90", b"\x91\xc0", None, *FORMS]),
    st.none() | st.integers(0, 10**8),
    st.none() | st.lists(st.text(max_size=3), max_size=4),
    st.none() | st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.lists(VALUES))),
).flatmap(lambda call: st.integers(3, 6).map(lambda size: list(call[:size])))
REPLY = st.tuples(
    st.integers(0, 5),
    st.sampled_from([b"\x90", None, *FORMS]),
    st.none() | st.integers(0, 20),
    st.none() | st.text(max_size=3),
    st.none() | st.binary(max_size=3),
    st.none() | st.integers(0, 3),
).flatmap(lambda reply: st.integers(2, 6).map(lambda size: list(reply[:size])))
CREDITS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 64, 2000, 2**30, 2**31])), max_size=4
).map(lambda pairs: [number for pair in pairs for number in pair])
BODIES = st.one_of(
    VALUES.map(msgpack.packb),
    st.lists(CALL, max_size=4).map(msgpack.packb),
    st.lists(REPLY, max_size=4).map(msgpack.packb),
    CREDITS.map(msgpack.packb),
    st.binary(max_size=40),
    st.sampled_from([b"", b"d" * 3000]),
)
HEADERS = st.tuples(
    st.sampled_from([*KINDS, *KINDS, *KINDS, 0x07, 0x80]),
    st.sampled_from([0, 0, 0, 1, 2, 3, 0x10, 0xFF]),
    st.sampled_from([0, 0, 1, 1, 2, 3, 4, 5, 2**56 - 1]),
    st.sampled_from([0, 0, 0, 0, 0, 1, -1, 2**20]),  # the length is wrong by this
)


def raw(header: tuple[int, int, int, int], body: bytes) -> bytes:
    kind, flags, id, wrong = header
    length = max(0, len(body) + wrong).to_bytes(3, "big")
    return bytes([kind]) + length + bytes([flags]) + id.to_bytes(7, "big") + body


# One frame mostly knows of its kind what to hold, so that most get beyond the first check.
LIKELY = st.one_of(
    st.builds(raw, HEADERS, BODIES),
    st.tuples(st.integers(1, 5), st.lists(CALL, min_size=1, max_size=4)).map(
        lambda pair: frame(0x10, msgpack.packb(pair[1]), id=pair[0])
    ),
    st.lists(REPLY, min_size=1, max_size=4).map(lambda r: frame(0x11, msgpack.packb(r))),
    st.tuples(
        st.integers(0, 5), st.integers(0, 7), st.binary(max_size=9) | st.sampled_from(FORMS)
    ).map(lambda data: frame(0x12, data[2], flags=data[1], id=data[0])),
    st.integers(1, 5).map(lambda id: frame(0x13, b"\x91\x01", id=id)),
    CREDITS.map(lambda pairs: frame(0x05, msgpack.packb(pairs))),
)


@given(data=st.binary(max_size=200), cuts=CUTS, dice=st.binary(max_size=9), client=st.booleans())
def test_random_bytes(data: bytes, cuts: list[float], dice: bytes, client: bool) -> None:
    attack(Connection("client" if client else "server", now=0.0), data, cuts, dice)


@given(
    data=st.lists(LIKELY, max_size=12).map(b"".join),
    cuts=CUTS,
    dice=st.binary(max_size=20),
    client=st.booleans(),
    by=COMPRESSION,
)
def test_random_frames(
    data: bytes, cuts: list[float], dice: bytes, client: bool, by: Sequence[Algorithm]
) -> None:
    core = Connection(
        "client" if client else "server",
        now=0.0,
        limits=Limits(memory=1, max_message=10_000),
        compression=by,
    )
    attack(core, HELLO + data, cuts, dice)


@st.composite
def mutilated(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw what is left of valid bytes after some accidents."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from([1, 2, 12, 50, 5000]))
        part = data[at : at + size]
        match draw(st.sampled_from(["change", "drop", "double", "move", "insert"])):
            case "change":
                part = bytes([draw(st.integers(0, 255))]) + part[1:]
            case "drop":
                part = b""
            case "double":
                part += part
            case "move":
                other = draw(st.integers(0, len(data)))
                part = data[other : other + size]
            case "insert":
                part += draw(st.binary(max_size=20))
        data = data[:at] + part + data[at + size :]
    return data


@given(script=SCRIPTS, cuts=CUTS, dice=st.binary(max_size=20), by=COMPRESSION, data=st.data())
def test_mutilated_calls(
    script: list[Say], cuts: list[float], dice: bytes, by: Sequence[Algorithm], data: st.DataObject
) -> None:
    _, said = speak(script, by)
    server = Connection("server", now=0.0, limits=LIMITS, compression=by)
    attack(server, data.draw(mutilated(said)), cuts, dice)


@given(script=SCRIPTS, cuts=CUTS, dice=st.binary(max_size=20), by=COMPRESSION, data=st.data())
def test_mutilated_answers(
    script: list[Say], cuts: list[float], dice: bytes, by: Sequence[Algorithm], data: st.DataObject
) -> None:
    _, said = speak(script, by)
    client = Connection("client", now=0.0, limits=LIMITS, compression=by)
    if by:
        client.receive_data(hello(by), 0.0)
    attack(client, data.draw(mutilated(answer(script, said, by))), cuts, dice)
