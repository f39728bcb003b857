import gc
import tracemalloc
from contextlib import contextmanager
from itertools import count

import msgspec
import pytest
import trio

import druvarpc
from druvarpc.errors import CloseCode
from druvarpc.protocol.frames import (
    DATA,
    END_MESSAGE,
    GOAWAY,
    PING,
    PONG,
    PREFACE,
    REPLIES,
    encode_credits,
    frame,
    pack,
)
from tests.io.peers import (
    HELLO,
    RawPeer,
    Seen,
    Work,
    Workshop,
    call,
    port_of,
    raw_client,
    raw_server,
    reset,
    serving,
    settled,
)


@contextmanager
def memory_within(most: int):
    """The block must not have held more than `most` bytes at any time, this process all in all."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak / 1e6:.1f} MB"


class Bystander:
    """Another client, which must not notice anything."""

    def __init__(self, client: druvarpc.Client) -> None:
        self._work = client.stub(Work)

    async def is_well(self) -> bool:
        with trio.fail_after(2):
            return await self._work.echo(b"well") == b"well"


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


# --- what is no protocol ---


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", CloseCode.PROTOCOL_ERROR),
        (b"\x00" * 1000, CloseCode.PROTOCOL_ERROR),
        (PREFACE[:-1] + b"\x09", CloseCode.VERSION_MISMATCH),
        (PREFACE + frame(PING, id=1), CloseCode.PROTOCOL_ERROR),
        (PREFACE + b"\x01\xff\xff\xff" + bytes(8), CloseCode.FRAME_TOO_LARGE),
        (HELLO + b"\x12\xff\xff\xff" + bytes(7) + b"\x01", CloseCode.FRAME_TOO_LARGE),
        (HELLO + frame(0x7F), CloseCode.PROTOCOL_ERROR),
        (HELLO + frame(REPLIES, pack([[1, b""]])), CloseCode.PROTOCOL_ERROR),
        (HELLO + frame(DATA, b"x", id=1), CloseCode.PROTOCOL_ERROR),
        (HELLO + call(1, "Work.hold") * 2, CloseCode.PROTOCOL_ERROR),
        (HELLO + encode_credits([(0, 2**31 - 1)]), CloseCode.FLOW_CONTROL_ERROR),
        (HELLO + reset(1), CloseCode.PROTOCOL_ERROR),
        (HELLO + call(1, "no name!"), CloseCode.PROTOCOL_ERROR),
        (HELLO + frame(GOAWAY, pack([0])) + call(1, "Work.echo", b""), CloseCode.PROTOCOL_ERROR),
    ],
    ids=count(),
)
async def test_a_breach_is_answered_with_its_code_and_the_end(workshop, caplog, sent, code):
    async with serving(workshop) as server, druvarpc.connect(server.addresses[0]) as client:
        async with raw_client(server, sent) as peer:
            with trio.fail_after(1):
                assert (await peer.last()).reason[0] == code
        assert await Bystander(client).is_well()
        await settled(lambda: server.statistics().connections == 1)
    (record,) = caplog.records
    assert record.name == "druvarpc"
    assert record.levelname == "WARNING"
    assert "tcp://127.0.0.1:" in record.getMessage()


async def test_probes_of_the_port_leave_no_trace(workshop, caplog):
    """As those of load balancers, which connect and close."""
    async with serving(workshop) as server:
        for hello in (b"", PREFACE[:3], PREFACE, HELLO):
            async with raw_client(server, hello):
                pass
        await settled(lambda: server.statistics().connections == 0)
    assert not caplog.records


async def test_a_peer_that_half_closes_has_gone(workshop, caplog):
    async with serving(workshop) as server, raw_client(server) as peer:
        await peer.send(call(1, "Work.hold"))
        await workshop.until(lambda: workshop.running == 1)
        await peer.stream.send_eof()
        with trio.fail_after(1):
            await workshop.until(lambda: workshop.running == 0)
            while await peer.next() is not None:
                pass
    assert workshop.cancelled == 1
    assert not caplog.records


async def test_frames_after_goaway_are_not_acted_upon(workshop):
    """The server drains, and the peer goes on as if it hadn't noticed."""
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [workshop], "tcp://127.0.0.1:0")
        async with raw_client(server) as peer:
            await peer.send(call(1, "Work.hold"))
            await workshop.until(lambda: workshop.running == 1)
            nursery.start_soon(server.drain)
            goaway = await peer.until(GOAWAY)
            assert goaway.id == 1
            assert goaway.reason[0] == CloseCode.NO_ERROR
            for id in range(2, 100):
                await peer.send(call(id, "Work.fail" if id == 2 else 1, "late"))
            await peer.send(frame(PING, id=7))
            workshop.release.set()
            seen = await peer.until(REPLIES)
            assert seen.body == pack([[1, pack(None)]])
            assert await peer.next() is None
    assert workshop.most == 1


async def test_a_peer_that_goes_on_after_an_error_is_cut_off(workshop):
    async with serving(workshop) as server, raw_client(server, b"rubbish") as peer:
        with trio.fail_after(5):
            await flood(peer, b"rubbish" * 1000)


# --- slowness ---


async def test_a_handshake_at_a_byte_a_second_ends_in_time(workshop):
    limits = druvarpc.Limits(handshake_timeout=0.3)
    async with serving(workshop, limits=limits) as server, raw_client(server, b"") as peer:
        start = trio.current_time()
        sent = 0
        for byte in HELLO * 100:
            if not await peer.send(bytes([byte])):
                break
            sent += 1
            await trio.sleep(0.05)
            if server.statistics().connections and trio.current_time() - start > 0.3:
                break
        assert sent < 10
        with trio.fail_after(1):
            assert (await peer.last()).reason[0] == CloseCode.TIMEOUT


async def test_a_frame_at_a_byte_a_second_ends_in_time(workshop):
    limits = druvarpc.Limits(frame_timeout=0.3)
    async with serving(workshop, limits=limits) as server, raw_client(server) as peer:
        await peer.send(call(1, "Work.echo", bytes(1000))[:-500])
        with trio.fail_after(1):
            assert (await peer.last()).reason[0] == CloseCode.TIMEOUT
    assert workshop.most == 0


async def test_a_peer_that_takes_no_data_is_stalled_out(workshop):
    """It gives no credit for a download; its connection and others go on."""
    limits = druvarpc.Limits(stall_timeout=0.3)
    async with (
        serving(workshop, limits=limits) as server,
        druvarpc.connect(server.addresses[0]) as client,
        raw_client(server) as peer,
    ):
        # Each handler may be 256 KiB, and one item, ahead of what has been sent.
        with memory_within(10 * 400_000 + 4_000_000):
            for id in range(1, 11):
                await peer.send(call(id, "Work.pour" if id == 1 else 0, 1000, 100_000))
            assert await Bystander(client).is_well()
            with trio.fail_after(3):
                await workshop.until(lambda: workshop.most > 0 and workshop.running == 0)
        with trio.fail_after(1):
            replies = await peer.until(REPLIES)
            assert b"took no data" in replies.body
            await peer.send(call(11, "Work.echo", b"still here"))
            while b"still here" not in (await peer.until(REPLIES)).body:
                pass


# --- floods ---


async def flood(peer: RawPeer, data: bytes) -> None:
    """Send the same again and again until the other end closes."""
    while await peer.send(data):
        pass


async def flood_and_listen(peer: RawPeer, data: bytes) -> Seen:
    """Likewise, but close when the other end does; return its last frame."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, peer, data)
        last = await peer.last()
        nursery.cancel_scope.cancel()
    return last


async def test_pings_of_a_peer_that_reads_nothing(workshop, caplog):
    async with serving(workshop) as server, druvarpc.connect(server.addresses[0]) as client:
        with memory_within(8_000_000):
            async with raw_client(server) as peer:
                with trio.fail_after(10):
                    await flood(peer, frame(PING, id=1) * 1000)
        assert await Bystander(client).is_well()
    assert len(caplog.records) == 1
    assert "bring nothing" in caplog.text or "PING" in caplog.text


class Counter(Work):
    """Counts the handlers that run, and does nothing else."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0

    async def echo(self, data: bytes) -> bytes:
        return data

    async def hold(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep_forever()
        finally:
            self.running -= 1


async def test_a_hundred_thousand_calls_opened_and_cancelled(mock_clock, caplog):
    """By a peer that keeps to the limits, and asks for nothing but work in vain.

    The clock stands still: patience grows back, so that a slow machine would bear more.
    """
    counter = Counter()
    async with (
        serving(counter, limits=druvarpc.Limits(max_calls=100)) as server,
        druvarpc.connect(server.addresses[0]) as client,
    ):
        async with raw_client(server) as peer:
            last = None
            for first in range(1, 100_001, 100):
                ids = range(first, first + 100)
                await peer.send(b"".join(call(id, "Work.hold" if id == 1 else 0) for id in ids))
                await trio.testing.wait_all_tasks_blocked()
                await peer.send(b"".join(map(reset, ids)))
                replies = 0
                while replies < 100 and (last := await peer.next()) is not None:
                    if last.kind == REPLIES:
                        replies += len(msgspec.msgpack.decode(last.body))
                    elif last.kind == GOAWAY:
                        break
                if replies < 100:
                    break
            assert last is not None
            assert last.reason[0] == CloseCode.ABUSE
        assert await Bystander(client).is_well()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert server.statistics().connections == 1
    assert first < 25_000
    assert counter.running == 0
    assert 0 < counter.most <= 100
    assert len(caplog.records) == 1


async def test_a_call_that_was_reset_counts_until_its_handler_has_ended(workshop):
    class Stubborn(Workshop):
        async def hold(self) -> None:
            with self.at_work(), trio.CancelScope(shield=True):
                await self.release.wait()

    stubborn = Stubborn()
    async with serving(stubborn, limits=druvarpc.Limits(max_calls=100)) as server:
        async with raw_client(server) as peer:
            try:
                for id in range(1, 101):
                    await peer.send(call(id, "Work.hold" if id == 1 else 0))
                await stubborn.until(lambda: stubborn.running == 100)
                for id in range(1, 101):
                    await peer.send(reset(id))
                await peer.send(call(101, 0))
                with trio.fail_after(1):
                    assert (await peer.last()).reason[0] == CloseCode.PROTOCOL_ERROR
            finally:
                stubborn.release.set()
        await stubborn.until(lambda: stubborn.running == 0)
    assert stubborn.most == 100


async def test_a_thousand_calls_reset_in_one_write(workshop):
    """None of them has begun when the resets are there."""
    async with serving(workshop) as server, raw_client(server) as peer:
        ids = range(1, 1001)
        await peer.send(
            b"".join(call(id, "Work.hold" if id == 1 else 0) for id in ids)
            + b"".join(map(reset, ids))
            + call(1001, "Work.echo", b"still here")
        )
        with trio.fail_after(5):
            while b"still here" not in (await peer.until(REPLIES)).body:
                pass
        await workshop.until(lambda: workshop.running == 0)


async def test_data_that_no_handler_reads(workshop):
    """What a peer may send before it is read is all that is kept, and beyond is a breach."""

    class Deaf(Workshop):
        async def gather(self, pieces) -> int:
            with self.at_work():
                await trio.sleep_forever()

    deaf = Deaf()
    async with serving(deaf) as server, druvarpc.connect(server.addresses[0]) as client:
        with memory_within(8_000_000):
            async with raw_client(server) as peer:
                await peer.send(call(1, "Work.gather", flags=1))
                data = frame(DATA, bytes(1000), flags=END_MESSAGE, id=1)
                with trio.fail_after(5):
                    last = await flood_and_listen(peer, data)
                assert last.reason[0] == CloseCode.FLOW_CONTROL_ERROR
        assert await Bystander(client).is_well()
    assert deaf.cancelled == 1


async def test_a_client_is_not_harmed_by_a_hostile_server(caplog):
    async def hostile(peer: RawPeer) -> None:
        await peer.send(HELLO)
        await peer.until(0x10)
        with memory_within(8_000_000):
            await flood_and_listen(peer, frame(PING, id=1) * 1000)

    async with raw_server(hostile) as address, druvarpc.connect(address, reconnect=False) as client:
        with trio.fail_after(3), pytest.raises(druvarpc.ConnectionLost, match="protocol"):
            await client.stub(Work).hold()
    assert len(caplog.records) == 1


# --- many connections ---


async def greeted(server: druvarpc.Server, streams: list[trio.SocketStream]) -> None:
    """Open a connection that stays idle once the server has answered."""
    stream = await trio.open_tcp_stream("127.0.0.1", port_of(server))
    streams.append(stream)
    peer = RawPeer(stream)
    await peer.send(HELLO + frame(PING, id=9))
    await peer.until(PONG)


async def test_a_thousand_connections_at_once(workshop):
    streams: list[trio.SocketStream] = []
    async with serving(workshop) as server, druvarpc.connect(server.addresses[0]) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(greeted, server, streams)
        assert server.statistics().connections == 1001
        assert await Bystander(client).is_well()
        for stream in streams:
            await stream.aclose()
        await settled(lambda: server.statistics().connections == 1)


async def test_an_idle_connection_takes_little_memory(workshop, record_property):
    streams: list[trio.SocketStream] = []
    async with serving(workshop) as server:
        await greeted(server, streams)
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(200):
                await greeted(server, streams)
            gc.collect()
            each = tracemalloc.get_traced_memory()[0] / 200
        finally:
            tracemalloc.stop()
        record_property("bytes_per_idle_connection", round(each))
        print(f"{each:.0f} bytes for an idle connection, the client's socket included")
        assert each < 50_000
        for stream in streams:
            await stream.aclose()


# --- what is logged ---


async def test_logs_hold_no_secrets_and_no_control_characters(workshop, caplog):
    secret = "hunter2"
    async with serving(workshop) as server:
        async with druvarpc.connect(server.addresses[0]) as client:
            work = client.stub(Work, metadata={"authorization": secret})
            with pytest.raises(druvarpc.RpcError):
                await work.echo(secret)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                await work.gather([secret])  # type: ignore[arg-type]
            await work.echo(secret.encode())
        for sent in (
            call(1, f"\x1b[31m{secret}\n"),
            frame(GOAWAY, pack([1, "\x1b[31mred\n"])),
            frame(0x10, pack([[secret, 0, 5]]), id=1),
            frame(0x06, pack([5, secret]), id=0),
        ):
            async with raw_client(server, HELLO + sent) as peer:
                with trio.fail_after(3):
                    await peer.last()
    for record in caplog.records:
        message = record.getMessage()
        assert message.isprintable(), message
    assert len(caplog.records) == 3, "the one with GOAWAY has said itself why it ends"
