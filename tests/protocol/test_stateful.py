"""Two cores exchange random valid work over a link that delays, splits and stops.

The machine keeps a model of each call: what was sent in it and what was told of it. After each step
all credit is added up; at the end the link flows, everything is taken, and nothing may be left.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgpack
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from druvarpc.errors import Status
from druvarpc.protocol import (
    Algorithm,
    AuthReceived,
    Budget,
    CallsReceived,
    Clubbing,
    Connection,
    GoAwayReceived,
    Limits,
    MetadataReceived,
    Outcome,
    PongReceived,
    Priority,
    Readable,
    Reference,
    RepliesReceived,
    ResetReceived,
    SettingsReceived,
    State,
    Stream,
    Writable,
)
from druvarpc.protocol.outflow import LOW_MARK
from tests.protocol.dialogue import COMPRESSION
from tests.protocol.link import Link

# Nothing; inline; as data; more than a window; more than all windows, and the limit if it is small.
SIZES = st.sampled_from([0, 1, 100, 5_000, 70_000, 200_000])
SMALL = st.integers(0, 3)
LANES = st.sampled_from(list(Priority))
METADATA = (("trace", b"\x00\x01"), ("trace", "again"))
OWN_ANSWERS = {
    Status.FAILED_PRECONDITION,
    Status.RESOURCE_EXHAUSTED,
    Status.DEADLINE_EXCEEDED,
}


def limits(most: int, inline: int, window: int, memory: int, message: int) -> Limits:
    """Limits whose clocks never strike, since a stopped link is no breach."""
    return Limits(
        max_calls=most,
        max_inline=inline,
        stream_window=window,
        connection_window=window,
        memory=memory,
        max_message=message,
        handshake_timeout=1e6,
        keepalive_interval=1e6,
        keepalive_timeout=1e6,
        frame_timeout=1e6,
        stall_timeout=1e6,
    )


LIMITS = st.builds(
    limits,
    most=st.sampled_from([64, 1024]),
    inline=st.sampled_from([4096, 16 * 1024]),
    window=st.sampled_from([65_536, 100_000, 1024 * 1024]),
    memory=st.sampled_from([1, 100_000, 64 * 1024 * 1024]),
    message=st.sampled_from([150_000, 16 * 1024 * 1024]),
)
CLUBBING = st.builds(
    Clubbing,
    max_calls=st.sampled_from([1, 3, 1024]),
    max_bytes=st.sampled_from([100, 64 * 1024]),
    linger=st.sampled_from([0.0, 0.01]),
)


@dataclass
class Way:
    """One direction of a call."""

    sent: list[bytes] = field(default_factory=list)
    taken: int = 0
    asked: bool = False  # take() has been called
    hungry: bool = False  # take() found nothing, and Readable hasn't come
    congested: bool = False  # send() asked to wait, and Writable hasn't come


@dataclass(eq=False)
class Call:
    stream: Stream
    arguments: list[object]
    served: Stream | None = None
    up: Way = field(default_factory=Way)
    down: Way = field(default_factory=Way)
    ended: bool = False
    reset: bool = False
    reset_told: bool = False
    replied: tuple[bytes | None, Outcome | None] | None = None
    all_comes: bool = False  # all that was sent goes ahead of the reply
    answered: bool = False
    refused: bool = False
    announced: bool = False  # METADATA was sent
    announcement_told: bool = False

    @property
    def over(self) -> bool:
        return self.reset or self.answered or self.refused


class TwoCores(RuleBasedStateMachine):
    @initialize(
        mine=LIMITS,
        yours=LIMITS,
        clubbing=CLUBBING,
        drainer=st.sampled_from([0, 1, 2]),
        shared=st.sampled_from([1, 1_000_000, 2**30]),
        by=st.tuples(COMPRESSION, COMPRESSION),
    )
    def connect(
        self,
        mine: Limits,
        yours: Limits,
        clubbing: Clubbing,
        drainer: int,
        shared: int,
        by: tuple[Sequence[Algorithm], Sequence[Algorithm]],
    ) -> None:
        self.now = 0.0
        self.memory = Budget(shared)
        self.client = Connection(
            "client",
            now=0.0,
            limits=mine,
            clubbing=clubbing,
            budget=self.memory,
            compression=by[0],
        )
        self.server = Connection(
            "server", now=0.0, limits=yours, budget=self.memory, compression=by[1]
        )
        self.drainer = [None, self.client, self.server][drainer]
        self.up = Link(self.client, self.server)
        self.down = Link(self.server, self.client)
        self.calls: list[Call] = []
        self.by_stream: dict[Stream, Call] = {}
        self.pings = self.pongs = self.tokens = self.tokens_told = self.goaways = 0
        self.serial = 0

    # What the owners of both cores do.

    @rule(size=SIZES, lane=LANES, more=st.booleans(), bare=st.booleans())
    @precondition(lambda self: self.client.accepts_calls)
    def call(self, size: int, lane: Priority, more: bool, bare: bool) -> None:
        call = self.new(size, lane, more=more, bare=bare)
        self.client.call(call.stream, self.now)

    @rule(number=st.sampled_from([10, 60]), lane=LANES)
    @precondition(lambda self: self.client.accepts_calls)
    def burst(self, number: int, lane: Priority) -> None:
        for _ in range(number):
            self.client.call(self.new(10, lane).stream, self.now)

    @rule(
        lane=LANES,
        calls=st.lists(
            st.tuples(SIZES, st.booleans(), st.lists(st.integers(0, 5), max_size=3)),
            min_size=1,
            max_size=6,
        ),
    )
    @precondition(lambda self: self.client.accepts_calls)
    def club(self, lane: Priority, calls: list[tuple[int, bool, list[int]]]) -> None:
        club: list[Stream] = []
        for index, (size, more, others) in enumerate(calls):
            references = tuple(
                Reference(position, other, (0,) if position % 2 else ())
                for position, other in enumerate(others)
                if other < index
            )
            # The positions of references that point forward stay as they are: nil.
            club.append(self.new(size, lane, more=more, references=references).stream)
        self.client.club(club, self.now)

    def new(
        self,
        size: int,
        lane: Priority,
        *,
        more: bool = False,
        bare: bool = True,
        references: tuple[Reference, ...] = (),
    ) -> Call:
        self.serial += 1
        arguments = [None, None, None, self.serial, b"a" * size]
        stream = Stream(
            f"Vault.m{self.serial % 3}",
            msgpack.packb(arguments),
            more=more,
            lane=lane,
            deadline=None if bare else self.now + 0.5,
            metadata=() if bare else METADATA,
            timings=not bare,
            references=references,
        )
        call = Call(stream, arguments)
        self.calls.append(call)
        self.by_stream[stream] = call
        return call

    @rule(n=SMALL, size=SIZES, number=SMALL)
    def send_up(self, n: int, size: int, number: int) -> None:
        for call in self.pick(n, lambda call: self.client.can_send(call.stream)):
            for _ in range(number):
                self.send(self.client, call.stream, call.up, size)

    @rule(n=SMALL, size=SIZES, number=SMALL)
    def send_down(self, n: int, size: int, number: int) -> None:
        for call in self.pick(
            n, lambda call: call.served is not None and self.server.can_send(call.served)
        ):
            for _ in range(number):
                self.send(self.server, call.served, call.down, size)

    def send(self, core: Connection, stream: Stream, way: Way, size: int) -> None:
        self.serial += 1
        message = b"%07d" % self.serial + b"m" * (size - 7) if size > 7 else b"m" * size
        way.sent.append(message)
        way.congested = not core.send(stream, message)

    @rule(n=SMALL)
    def end(self, n: int) -> None:
        for call in self.pick(n, lambda call: self.client.can_send(call.stream)):
            self.client.end(call.stream)
            call.ended = True

    @rule(n=SMALL)
    def reset(self, n: int) -> None:
        for call in self.pick(n, lambda call: not call.reset and not call.refused):
            self.do_reset(call)

    def do_reset(self, call: Call) -> None:
        self.client.reset(call.stream, self.now, Status.CANCELLED, "enough")
        call.reset = True

    @rule(n=SMALL, size=SIZES, failed=st.booleans(), rich=st.booleans())
    def reply(self, n: int, size: int, failed: bool, rich: bool) -> None:
        for call in self.pick(n, lambda call: call.served is not None and call.replied is None):
            self.do_reply(call, size, failed=failed, rich=rich)

    def do_reply(self, call: Call, size: int, *, failed: bool = False, rich: bool = False) -> None:
        outcome = Outcome(trailers=METADATA, timings=(1, 2, 3)) if rich else None
        payload = msgpack.packb([self.serial, b"r" * size]) if size else None
        if failed:
            payload = None
            outcome = Outcome(Status.NOT_FOUND, "no", msgpack.packb(7) if rich else None)
        self.server.reply(call.served, self.now, payload, outcome, after_data=rich)
        call.all_comes = rich or not failed
        call.replied = payload, outcome
        if payload is not None and len(payload) > self.server.peer.max_inline:
            call.down.sent.append(payload)
            call.replied = None, outcome

    @rule(n=SMALL)
    def announce(self, n: int) -> None:
        def fits(call: Call) -> bool:
            return (
                call.served is not None
                and self.server.can_send(call.served)
                and not call.down.sent
                and not call.announced
            )

        for call in self.pick(n, fits):
            self.server.send_metadata(call.served, METADATA)
            call.announced = True

    @rule(n=SMALL, number=SMALL)
    def take_up(self, n: int, number: int) -> None:
        for call in self.pick(n, lambda call: call.served is not None and call.replied is None):
            for _ in range(number):
                self.take(self.server, call, call.served, call.up)

    @rule(n=SMALL, number=SMALL)
    def take_down(self, n: int, number: int) -> None:
        for call in self.pick(n, lambda call: not call.reset and not call.refused):
            for _ in range(number):
                self.take(self.client, call, call.stream, call.down)

    def take(self, core: Connection, call: Call, stream: Stream, way: Way) -> bool:
        """Take a message, if there is one; end the call if it was too long."""
        message = core.take(stream, self.now)
        way.asked = True
        if message is not None:
            assert message == way.sent[way.taken]
            way.taken += 1
            return True
        incoming = core.incoming(stream)
        if not incoming.too_long:
            way.hungry = not incoming.ended
        elif core is self.client:
            self.do_reset(call)
        elif call.replied is None:
            call.replied = None, Outcome(Status.RESOURCE_EXHAUSTED)
            core.reply(stream, self.now, *call.replied)
        return False

    @rule(client=st.booleans())
    def ping(self, client: bool) -> None:
        (self.client if client else self.server).ping(self.now)
        self.pings += 1

    @rule()
    def authenticate(self) -> None:
        self.client.authenticate("a token", METADATA)
        self.tokens += 1

    @rule(n=st.integers(0, 9))
    @precondition(lambda self: self.drainer is not None)
    def drain(self, n: int) -> None:
        if not n:
            self.drainer.drain()

    # The link, and the clock.

    @rule(up=st.booleans(), most=st.sampled_from([1, 1000, 256 * 1024]))
    def write(self, up: bool, most: int) -> None:
        (self.up if up else self.down).accept(self.now, most)

    @rule(up=st.booleans(), size=st.sampled_from([1, 11, 300, 70_000, 10**9]))
    def deliver(self, up: bool, size: int) -> None:
        (self.up if up else self.down).deliver(self.now, size)

    @rule(rounds=st.integers(1, 3), size=st.sampled_from([500, 30_000, 10**9]))
    def flow(self, rounds: int, size: int) -> None:
        for _ in range(rounds):
            for link in (self.up, self.down):
                link.accept(self.now, 256 * 1024)
                while len(link):
                    link.deliver(self.now, size)
                    self.listen()

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.02, 0.6]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for core in (self.client, self.server):
            deadline = core.next_deadline()
            if deadline is not None and deadline <= self.now:
                core.handle_timer(self.now)

    # What the cores tell.

    @invariant()
    def listen(self) -> None:
        while (event := self.client.next_event()) is not None:
            match event:
                case RepliesReceived(replies):
                    for reply in replies:
                        self.on_reply(*reply)
                case MetadataReceived(stream, metadata):
                    call = self.by_stream[stream]
                    assert not call.over
                    assert list(metadata) == list(METADATA)
                    assert call.announced
                    assert not call.announcement_told
                    call.announcement_told = True
                case Readable(stream):
                    self.on_readable(self.by_stream[stream].down)
                case Writable(stream):
                    self.by_stream[stream].up.congested = False
                case GoAwayReceived(_, _, refused):
                    self.on_goaway(refused)
                case _:
                    self.on_common(event)
        while (event := self.server.next_event()) is not None:
            match event:
                case CallsReceived(streams):
                    for stream in streams:
                        self.on_call(stream)
                case Readable(stream):
                    self.on_readable(self.by_stream[stream].up)
                case Writable(stream):
                    self.by_stream[stream].down.congested = False
                case ResetReceived(stream, code, message):
                    call = self.by_stream[stream]
                    assert call.reset
                    assert not call.reset_told
                    assert call.replied is None
                    assert (code, message) in ((Status.CANCELLED, "enough"), (Status.CANCELLED, ""))
                    call.reset_told = True
                case AuthReceived("a token", metadata):
                    assert list(metadata) == list(METADATA)
                    self.tokens_told += 1
                case GoAwayReceived():
                    self.goaways += 1
                case _:
                    self.on_common(event)

    def on_common(self, event: object) -> None:
        assert isinstance(event, SettingsReceived | PongReceived)
        self.pongs += isinstance(event, PongReceived)

    def on_readable(self, way: Way) -> None:
        assert way.hungry or not way.asked, "Readable comes only when it was asked for"
        way.hungry = False

    def on_call(self, stream: Stream) -> None:
        [call] = [call for call in self.calls if call.stream.id == stream.id]
        assert call.served is None, "a call is told of once"
        call.served = stream
        self.by_stream[stream] = call
        mine = call.stream
        expected = list(call.arguments)
        for reference in mine.references:
            other = next(c for c in self.calls if c.stream.id == self.first(mine) + reference.call)
            result = self.result(other)
            expected[reference.position] = result[0] if reference.path else result
        assert msgpack.unpackb(stream.payload) == expected
        assert (stream.method, stream.lane, stream.more or not mine.inline) == (
            mine.method,
            mine.lane,
            mine.more or not mine.inline,
        )
        assert list(stream.metadata) == list(mine.metadata)
        assert stream.timings == mine.timings
        assert (stream.deadline is None) == (mine.deadline is None)

    def first(self, stream: Stream) -> int:
        """Return the id of the first call of a stream's club, which the server knows."""
        served = self.by_stream[stream].served
        assert served is not None
        assert served.club is not None
        return served.club.first

    def result(self, call: Call) -> list[object]:
        assert call.replied is not None
        payload = call.replied[0] if call.replied[0] is not None else call.down.sent[-1]
        return msgpack.unpackb(payload)

    def on_reply(self, stream: Stream, payload: bytes | None, outcome: Outcome | None) -> None:
        call = self.by_stream[stream]
        assert not call.over, "each call ends once"
        call.answered = True
        if call.replied is not None:
            expected = call.replied[1]
            assert payload == call.replied[0]
            assert (outcome or Outcome()).status == (expected or Outcome()).status
            if expected is not None and outcome is not None:
                assert outcome.message == expected.message
                assert outcome.details == expected.details
                assert list(outcome.trailers) == list(expected.trailers)
            # The reply comes after METADATA, and after that nothing more can be sent.
            assert call.announcement_told == call.announced
            assert not self.client.can_send(stream)
        else:
            assert outcome is not None
            assert outcome.status in OWN_ANSWERS
            assert outcome.not_started
            assert call.served is None

    def on_goaway(self, refused: list[Stream]) -> None:
        self.goaways += 1
        for stream in refused:
            call = self.by_stream[stream]
            assert not call.over
            assert call.served is None
            call.refused = True

    # What holds at any time.

    @invariant()
    def the_connections_credit_is_conserved(self) -> None:
        ways = (
            (self.client, self.server, self.up, self.down, False),
            (self.server, self.client, self.down, self.up, True),
        )
        for sender, receiver, there, back, down in ways:
            if not sender.settled:
                continue
            owed = (
                receiver.receive_window
                - sender.send_window
                - there.cost()
                - back.credit()
                - sum(map(held, self.incoming(down=down)))
            )
            assert owed >= 0, "no credit comes from nowhere"
            if not receiver.wants_to_send:
                assert 4 * owed < receiver.receive_window, "no credit is kept back"

    @invariant()
    def each_streams_credit_is_conserved(self) -> None:
        for call in self.calls:
            served, mine = call.served, call.stream
            if served is None or served.incoming is None or mine.outgoing is None:
                continue
            if not self.client.settled:
                continue
            incoming, window = served.incoming, served.incoming.window
            if (
                call.replied
                or incoming.ended
                or served.state is not State.OPEN
                or mine.state is not State.OPEN
            ):
                continue
            kept = sum(message[2] for message in incoming.messages)
            kept += incoming.cost - incoming.advanced
            assert window.available + kept + window.owed == window.size
            spent = window.available - mine.outgoing.window.available
            spent -= self.up.cost(mine.id) + self.down.credit(mine.id)
            assert spent >= 0, "no credit comes from nowhere"
            if not self.server.wants_to_send:
                assert spent == 0, "no credit is kept back"

    def incoming(self, *, down: bool) -> Iterator[Stream]:
        for call in self.calls:
            stream = call.stream if down else call.served
            if stream is not None:
                yield stream

    @invariant()
    def nobody_waits_for_an_event_that_has_happened(self) -> None:
        for call in self.calls:
            for stream, way in ((call.stream, call.down), (call.served, call.up)):
                if way.hungry and stream is not None and stream.incoming is not None:
                    assert not stream.incoming.messages
            for stream, way in ((call.stream, call.up), (call.served, call.down)):
                if stream is not None and way.congested and not call.over and not call.replied:
                    assert stream.outgoing is not None
                    assert stream.outgoing.queued > LOW_MARK

    # The end.

    def teardown(self) -> None:
        if not hasattr(self, "calls"):
            return
        for _ in range(len(self.calls) + 40):
            self.settle()
            if self.quiet():
                break
        for call in self.calls:
            self.check(call)
        assert self.client.open_calls == self.server.open_calls == 0
        self.the_connections_credit_is_conserved()
        for core in (self.client, self.server):
            assert core.settled
            assert not core.closed
        assert self.pongs >= self.pings + 2  # the cores ask too, when SETTINGS come and later
        assert self.tokens_told == self.tokens
        self.part()

    def settle(self) -> None:
        """Let the link flow, take everything, end and answer what hasn't been."""
        for _ in range(4):
            self.flow(1, 10**9)
            self.listen()
        for call in self.calls:
            if self.client.can_send(call.stream):
                self.client.end(call.stream)
                call.ended = True
            if not call.reset and not call.refused:
                while self.take(self.client, call, call.stream, call.down):
                    pass
            if call.served is not None and call.replied is None:
                while self.take(self.server, call, call.served, call.up):
                    pass
                if call.replied is not None:
                    continue  # a message was too long
                if call.reset_told:
                    self.do_reply(call, 100)
                elif call.served.incoming.ended:
                    assert call.up.taken == len(call.up.sent), "all that was sent has come"
                    self.do_reply(call, 70_000 if call in self.calls[-5:] else 10)
        self.wait(0.02)

    def quiet(self) -> bool:
        return (
            not any(core.wants_to_send or core.open_calls for core in (self.client, self.server))
            and not len(self.up)
            and not len(self.down)
            and all(call.over for call in self.calls)
        )

    def check(self, call: Call) -> None:
        assert call.over, "each call ends"
        assert call.stream.state is State.CLOSED or not call.stream.id
        if call.all_comes and not call.reset and not call.refused:
            assert call.down.taken == len(call.down.sent), "all that was sent has come"

    def part(self) -> None:
        (self.drainer or self.client).drain()
        self.flow(2, 10**9)
        assert self.goaways == 1
        grown = sum(
            core.receive_window - core.limits.connection_window
            for core in (self.client, self.server)
        )
        assert self.memory.size - self.memory.left == grown, "streams gave all of it back"
        for core in (self.client, self.server):
            assert core.drained
            core.release()
        assert self.memory.left == self.memory.size

    def pick(self, n: int, fits: Callable[[Call], bool]) -> list[Call]:
        """Return one of the calls that fit, if there is one, rather a late one."""
        fitting = [call for call in self.calls if fits(call)]
        return fitting[-1 - n % len(fitting) :][:1] if fitting else []


def held(stream: Stream) -> int:
    """Return the connection's credit that a stream's receiver holds."""
    incoming = stream.incoming
    if incoming is None:
        return 0
    unfinished = incoming.cost - incoming.returned
    return sum(message[1] for message in incoming.messages) + unfinished


TestTwoCores = TwoCores.TestCase
