import socket
from contextlib import aclosing, asynccontextmanager

import pytest
import trio

import druvarpc
from druvarpc.protocol.frames import PREFACE, Settings, encode_settings
from druvarpc.server import Server
from druvarpc.testing import connected
from druvarpc.transports import Transport
from tests.io.peers import (
    HELLO,
    Calls,
    RawPeer,
    Vanishing,
    Work,
    Workshop,
    call,
    client_on,
    raw_client,
    raw_server,
    serving,
    settled,
    vanishing_pair,
)

# Found after this many seconds, and a little for the goodbye that nobody hears.
LIMITS = druvarpc.Limits(keepalive_interval=30, keepalive_timeout=20)
FOUND = 50.0
GRACE = 2.5


@asynccontextmanager
async def between(workshop: Workshop, near: Transport, far: Transport):
    """A client and a server, each on its end of a transport; both are given up in the end."""
    async with trio.open_nursery() as nursery:
        server = Server([workshop], LIMITS)
        nursery.start_soon(server.serve_transport, far)
        async with client_on(near, LIMITS) as client:
            yield server, client
            nursery.cancel_scope.cancel()


async def test_a_peer_that_vanishes_is_found_by_both_sides(autojump_clock):
    workshop = Workshop()
    near, far = vanishing_pair()
    async with between(workshop, near, far) as (server, client), trio.open_nursery() as nursery:
        calls = Calls(client)
        calls.start(nursery)
        await workshop.until(lambda: workshop.running == 5)
        await trio.sleep(100)
        assert not calls.errors
        assert workshop.cancelled == 0
        start = trio.current_time()
        near.gone = far.gone = True
        await settled(lambda: len(calls.errors) == 5, within=100)
        assert trio.current_time() - start <= FOUND + 0.1
        await workshop.until(lambda: workshop.running == 0)
        assert trio.current_time() - start <= FOUND + 0.1
        assert workshop.cancelled == 5
        await settled(lambda: server.statistics().connections == 0, within=GRACE)
        await settled(lambda: client.statistics().connections == 0, within=GRACE)
    for error in calls.errors:
        lost = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        assert isinstance(lost, druvarpc.ConnectionLost)
        assert "PING" in lost.message


async def test_an_idle_client_finds_that_its_server_has_vanished(autojump_clock):
    near, far = vanishing_pair()
    async with between(Workshop(), near, far) as (_, client):
        near.gone = far.gone = True
        await trio.sleep(FOUND + 0.1)
        start = trio.current_time()
        with pytest.raises(druvarpc.ConnectionLost) as lost:
            await client.stub(Work).echo(b"x")
        assert lost.value.not_started
        assert trio.current_time() == start, "without waiting for anything"


async def test_a_call_to_a_server_that_has_vanished_ends_with_its_deadline(autojump_clock):
    near, far = vanishing_pair()
    async with between(Workshop(), near, far) as (_, client):
        near.gone = far.gone = True
        start = trio.current_time()
        with pytest.raises(trio.TooSlowError), trio.fail_after(5):
            await client.stub(Work).echo(b"x")
        assert trio.current_time() - start == pytest.approx(5)


async def test_an_idle_connection_lives_for_hours(autojump_clock, caplog):
    async with connected([Workshop()]) as client:
        await client.stub(Work).echo(b"x")
        before = client.statistics()
        await trio.sleep(24 * 3600)
        after = client.statistics()
        assert after.connections == 1
        assert after.bytes_sent - before.bytes_sent < 24 * 3600 / 30 * 100
        assert await client.stub(Work).echo(b"x") == b"x"
    assert not caplog.records


async def test_a_handler_that_takes_hours_keeps_its_call(autojump_clock):
    class Slow(Workshop):
        async def hold(self) -> None:
            await trio.sleep(10 * 3600)

    async with connected([Slow()]) as client:
        await client.stub(Work).hold()
        assert trio.current_time() >= 10 * 3600


class Far:
    """A transport whose bytes arrive later."""

    def __init__(self, inner: Vanishing, delay: float) -> None:
        self.peer = "far"
        self.write_size = inner.write_size
        self.delay = delay
        self._inner = inner

    def has_room(self) -> bool:
        return self._inner.has_room()

    def hold_back(self, gentle: bool) -> None:
        self._inner.hold_back(gentle)

    async def receive(self) -> bytes:
        data = await self._inner.receive()
        await trio.sleep(self.delay)
        return data

    def send_nowait(self, buffers):
        return self._inner.send_nowait(buffers)

    async def wait_writable(self) -> None:
        await self._inner.wait_writable()

    def send_eof(self) -> None:
        self._inner.send_eof()

    def close(self) -> None:
        self._inner.close()


async def test_the_round_trip_is_measured(autojump_clock):
    near, far = vanishing_pair()
    far_end = Far(far, 0.05)
    async with between(Workshop(), Far(near, 0.05), far_end) as (server, client):
        await trio.sleep(1)  # until the pings of the handshake are over
        assert await client.ping() == pytest.approx(0.1)
        assert client.statistics().rtt == pytest.approx(0.1)
        assert server.statistics().rtt == pytest.approx(0.1)
        # The way has become longer.
        far_end.delay = 0.15
        await trio.sleep(1000)
        assert await client.ping() == pytest.approx(0.2)
        assert client.statistics().rtt == pytest.approx(0.2)


async def test_pings_of_several_tasks_each_take_a_round_trip(autojump_clock):
    near, far = vanishing_pair()
    async with between(Workshop(), Far(near, 0.5), Far(far, 0.5)) as (_, client):
        times = []

        async def ping(after: float) -> None:
            await trio.sleep(after)
            times.append(await client.ping())

        async with trio.open_nursery() as nursery:
            for after in (0, 0.3, 0.6, 0.9):
                nursery.start_soon(ping, after)
        # Bytes wait for those before them on this link, so that it can take more, but never less.
        assert all(time >= 0.99 for time in times)


# --- on sockets ---

SHORT = druvarpc.Limits(keepalive_interval=0.15, keepalive_timeout=0.15, stall_timeout=0.3)


async def test_a_client_that_falls_silent_is_found(caplog):
    workshop = Workshop()
    async with serving(workshop, limits=SHORT) as server, raw_client(server) as peer:
        await peer.send(call(1, "Work.hold"))
        await workshop.until(lambda: workshop.running == 1)
        with trio.fail_after(4):
            await workshop.until(lambda: workshop.cancelled == 1)
        code, message = (await peer.last()).reason
        assert code == 5
        assert "PING" in message
    assert len(caplog.records) == 1


async def test_a_server_that_falls_silent_is_found():
    async def greet(peer: RawPeer) -> None:
        await peer.send(HELLO)
        await trio.sleep_forever()

    async with (
        raw_server(greet) as address,
        druvarpc.connect(address, limits=SHORT) as client,
    ):
        with trio.fail_after(1), pytest.raises(druvarpc.ConnectionLost, match="PING"):
            await client.stub(Work).hold()


def small_buffers(peer: RawPeer) -> None:
    peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


async def test_a_server_that_never_reads_is_found():
    limits = druvarpc.Limits(stall_timeout=0.3)

    async def never_read(peer: RawPeer) -> None:
        small_buffers(peer)
        await peer.send(HELLO)
        await trio.sleep_forever()

    async with (
        raw_server(never_read) as address,
        druvarpc.connect(address, limits=limits) as client,
    ):
        errors = []

        async def echo() -> None:
            try:
                await client.stub(Work).echo(bytes(12_000_000))
            except druvarpc.RpcError as error:
                errors.append(error.status)

        with trio.fail_after(2):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(echo)
        assert set(errors) <= {druvarpc.Status.ABORTED, druvarpc.Status.UNAVAILABLE}
        assert len(errors) == 3


async def test_a_server_that_reads_no_calls_is_found():
    """Calls need no credit, so that only the socket holds them up."""

    async def never_read(peer: RawPeer) -> None:
        small_buffers(peer)
        await peer.send(PREFACE + encode_settings(Settings(max_calls=100_000)))
        await trio.sleep_forever()

    async with (
        raw_server(never_read) as address,
        druvarpc.connect(address, limits=druvarpc.Limits(stall_timeout=0.3)) as client,
    ):
        await trio.sleep(0.4)  # an idle connection has set its clock to later things
        with trio.fail_after(2), pytest.raises(druvarpc.ConnectionLost, match="take what was"):
            calls = druvarpc.windowed(client.stub(Work).echo, [bytes(4000)] * 5000, window=5000)
            async with aclosing(calls) as results:
                async for _ in results:
                    pass


async def test_a_client_that_never_reads_is_found():
    """Replies need no credit, so that only the socket holds them up."""
    workshop = Workshop()
    limits = druvarpc.Limits(stall_timeout=0.3)
    async with (
        serving(workshop, limits=limits) as server,
        druvarpc.connect(server.addresses[0]) as bystander,
        raw_client(server, PREFACE + encode_settings(Settings(max_inline=16_384))) as peer,
    ):
        with trio.fail_after(3):
            for id in range(1, 1001):
                await peer.send(call(id, "Work.echo" if id == 1 else 0, bytes(16_000)))
            await settled(lambda: server.statistics().connections == 1)
            assert await bystander.stub(Work).echo(b"x") == b"x"
