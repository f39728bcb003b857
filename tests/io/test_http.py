"""HTTP on the port of the protocol: what it answers, how it becomes the protocol, and its abuse."""

from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import druvarpc
from druvarpc.arrivals import Arrivals
from druvarpc.errors import CloseCode
from druvarpc.http import Site, answer, upgrade
from druvarpc.protocol.frames import PREFACE
from druvarpc.transports import MemoryTransport, memory_transports
from tests.io.certificates import authority
from tests.io.peers import (
    HELLO,
    RawPeer,
    Work,
    Workshop,
    call,
    port_of,
    raw_client,
    raw_server,
    serving,
    settled,
)

HTTP = "http://127.0.0.1:0"
UPGRADE = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: druvarpc/1\r\n\r\n"


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    received = b""
    try:
        with trio.fail_after(5):
            while data := await stream.receive_some(65536):
                received += data
    except trio.BrokenResourceError:
        pass
    return received


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    received = b""
    with trio.fail_after(5):
        while end not in received:
            data = await stream.receive_some(65536)
            assert data, received
            received += data
    return received


@asynccontextmanager
async def open_stream(server: druvarpc.Server):
    async with await trio.open_tcp_stream("127.0.0.1", port_of(server)) as stream:
        yield stream


async def ask(server: druvarpc.Server, request: bytes) -> bytes:
    """Return all that is answered until the connection ends, which the request must bring about."""
    async with open_stream(server) as stream:
        await stream.send_all(request)
        return await read_all(stream)


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode()


async def answers(address: str, **options) -> bool:
    async with druvarpc.connect(address, **options) as client:
        return await client.stub(Work).echo(b"x") == b"x"


# --- what is answered ---


@pytest.mark.parametrize("address", [HTTP, "tcp://127.0.0.1:0"])
async def test_a_port_speaks_both(address):
    async with serving(Workshop(), address) as server:
        assert server.addresses[0].partition(":")[0] == address.partition(":")[0]
        port = port_of(server)
        assert await answers(f"tcp://127.0.0.1:{port}")
        assert await answers(f"http://127.0.0.1:{port}")
        assert await answers(f"http://localhost:{port}/any/path")
        answer = await ask(server, get("/healthz"))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\nok\n")
        answer = await ask(server, get("/"))
        assert answer.endswith(f"\r\n\r\ndruvarpc {druvarpc.__version__}\n".encode())


async def test_unix_sockets_speak_http_too(tmp_path):
    async with serving(Workshop(), f"unix://{tmp_path}/socket"):
        async with await trio.open_unix_socket(f"{tmp_path}/socket") as stream:
            await stream.send_all(get("/healthz"))
            assert (await read_all(stream)).endswith(b"\r\n\r\nok\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/nothing"), "404 Not Found"),
        (get("/healthz/"), "404 Not Found"),
        (get("/", method="POST"), "405 Method Not Allowed"),
        (get("/healthz", method="DELETE"), "405 Method Not Allowed"),
        (get("x:443", method="CONNECT"), "405 Method Not Allowed"),
        (get("/healthz?full=1"), "200 OK"),
        (get("/healthz", "Content-Length: 0"), "200 OK"),
        (get("/healthz", "Content-Length: 5"), "400 Bad Request"),
        (get("/", "Transfer-Encoding: chunked", method="POST"), "400 Bad Request"),
        (get("/", "Content-Length: 5", "Content-Length: 6"), "400 Bad Request"),
        (get("/", "Host: y"), "400 Bad Request"),
        (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", "400 Bad Request"),
        (get("/", "Na me: x"), "400 Bad Request"),
        (b"GET /\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.1\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.0\r\n\r\n", "200 OK"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "505 HTTP Version Not Supported"),
        (b"Z\0\xff\r\n\r\n", "400 Bad Request"),
        (get("/healthz", "Upgrade: websocket"), "200 OK"),
        (get("/", "Upgrade: druvarpc/1"), "400 Bad Request"),
        (UPGRADE.replace(b"GET", b"POST"), "405 Method Not Allowed"),
        (UPGRADE.replace(b"1.1", b"1.0"), "400 Bad Request"),
        (UPGRADE.replace(b"Connection: Upgrade\r\n", b""), "400 Bad Request"),
        (UPGRADE.replace(b"druvarpc/1", b"druvarpc/2"), "426 Upgrade Required"),
        (UPGRADE.replace(b"druvarpc/1", b"druvarpc/1, websocket"), "426 Upgrade Required"),
        (UPGRADE.replace(b"Upgrade: d", b"Upgrade: druvarpc/1\r\nUpgrade: d"), "400 Bad Request"),
        (
            UPGRADE.replace(b"Upgrade: d", b"Upgrade: websocket\r\nUpgrade: d"),
            "400 Bad Request",
        ),
        (
            UPGRADE.replace(b"Upgrade: d", b"Connection: keep-alive\r\nUpgrade: d"),
            "400 Bad Request",
        ),
        (UPGRADE.replace(b"Host: x", b"Host: x\r\nHost: y"), "400 Bad Request"),
        (UPGRADE.replace(b"Host: x", b"Host: x\r\nContent-Length: 3") + b"abc", "400 Bad Request"),
        (
            UPGRADE.replace(b"Host: x", b"Host: x\r\nTransfer-Encoding: chunked") + b"0\r\n\r\n",
            "400 Bad Request",
        ),
        (UPGRADE + HELLO, "400 Bad Request"),
        (UPGRADE + b"\x8b", "400 Bad Request"),
        (UPGRADE + get("/healthz"), "400 Bad Request"),
    ],
)
async def test_the_status_of_an_answer(request_, status):
    workshop = Workshop()
    async with serving(workshop) as server:
        answer = await ask(server, request_)
        assert answer.startswith(f"HTTP/1.1 {status}\r\n".encode())
        assert answer.count(b"\r\n\r\n") == 1
        assert PREFACE not in answer
        assert server.statistics().connections == 0
        assert await answers(server.addresses[0])


async def test_head_is_get_without_a_body():
    async with serving(Workshop()) as server:
        answer = await ask(server, get("/healthz", method="HEAD"))
        assert b"Content-Length: 3\r\n" in answer
        assert answer.endswith(b"\r\n\r\n")


async def test_several_requests_on_a_connection():
    keep = get("/healthz").replace(b"Connection: close\r\n", b"")
    async with serving(Workshop()) as server:
        async with open_stream(server) as stream:
            for _ in range(3):
                await stream.send_all(keep)
                assert b" 200 OK" in await read_until(stream, b"ok\n")
            await stream.send_all(keep * 100 + UPGRADE)
            assert (await read_until(stream, b"101 Switching")).count(b" 200 OK") == 100
            await stream.send_all(HELLO)


async def test_the_time_for_a_handshake_begins_with_the_upgrade():
    limits = druvarpc.Limits(handshake_timeout=0.4)
    keep = get("/healthz").replace(b"Connection: close\r\n", b"")
    async with serving(Workshop(), limits=limits) as server, open_stream(server) as stream:
        start = trio.current_time()
        while trio.current_time() < start + 0.5:
            await stream.send_all(keep)
            await read_until(stream, b"ok\n")
            await trio.sleep(0.05)
        await stream.send_all(UPGRADE)
        _, _, rest = (await read_until(stream, b"\r\n\r\n")).partition(b"\r\n\r\n")
        await stream.send_all(HELLO + call(1, "Work.echo", b"x"))
        assert b"x" in (await RawPeer(stream, rest).until(0x11)).body


async def test_metrics_are_what_the_statistics_say():
    async with serving(Workshop()) as server, druvarpc.connect(server.addresses[0]) as client:
        await client.stub(Work).echo(b"x")
        head, _, body = (await ask(server, get("/metrics"))).decode().partition("\r\n\r\n")
        assert "Content-Type: text/plain; version=0.0.4" in head
        lines = body.splitlines()
        figures = dict(line.split(" ") for line in lines if not line.startswith("#"))
        assert figures["druvarpc_connections"] == "1"
        assert figures["druvarpc_calls_started_total"] == "1"
        assert figures["druvarpc_bytes_received_total"] == str(server.statistics().bytes_received)
        for name in figures:
            kind = "counter" if name.endswith("_total") else "gauge"
            assert f"# TYPE {name} {kind}" in lines


async def test_metrics_count_the_calls_that_a_busy_server_refuses():
    workshop = Workshop()
    async with (
        serving(workshop, limits=druvarpc.Limits(total_calls=1)) as server,
        druvarpc.connect(server.addresses[0], retry=None) as client,
        trio.open_nursery() as nursery,
    ):
        work = client.stub(Work)
        nursery.start_soon(work.hold)
        await workshop.until(lambda: workshop.running == 1)
        for _ in range(3):
            with pytest.raises(druvarpc.RpcError, match="the server is busy"):
                await work.hold()
        page = await ask(server, get("/metrics"))
        assert b"\n# TYPE druvarpc_calls_refused_total counter\n" in page
        assert b"\ndruvarpc_calls_refused_total 3\n" in page
        workshop.release.set()


async def test_a_draining_server_is_not_healthy():
    workshop = Workshop()
    keep = get("/healthz").replace(b"Connection: close\r\n", b"")
    async with (
        serving(workshop) as server,
        druvarpc.connect(server.addresses[0]) as client,
        trio.open_nursery() as nursery,
        open_stream(server) as stream,
    ):
        nursery.start_soon(client.stub(Work).hold)
        await workshop.until(lambda: workshop.running == 1)
        await stream.send_all(keep)
        await read_until(stream, b"ok\n")
        nursery.start_soon(server.drain)
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(keep)
        answer = await read_all(stream)
        assert b" 503 Service Unavailable" in answer
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.endswith(b"draining\n")
        workshop.release.set()


@pytest.mark.once
@pytest.mark.parametrize("begun", [b"", b"G", get("/healthz"), get("/healthz") + b"GET /"])
async def test_who_keeps_a_connection_does_not_hold_up_a_drain(begun):
    """Not even a server that is asked again and again."""
    begun = begun.replace(b"Connection: close\r\n", b"")
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [Workshop()], HTTP)
        async with open_stream(server) as stream:
            await stream.send_all(begun)
            if b"/healthz" in begun:
                await read_until(stream, b"ok\n")
            else:
                assert await answers(server.addresses[0])  # so this one has been accepted
            with trio.fail_after(5):
                await server.drain(timeout=60)


async def test_a_drain_ends_for_who_asks_often_after_the_next_answer():
    keep = get("/healthz").replace(b"Connection: close\r\n", b"")
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [Workshop()], HTTP)
        async with open_stream(server) as stream:
            await stream.send_all(keep)
            received = await read_until(stream, b"ok\n")
            nursery.start_soon(partial(server.drain, timeout=60))
            with trio.fail_after(5):
                while b"Connection: close" not in received:
                    await stream.send_all(keep)
                    received = await read_until(stream, b"\n")
                await read_all(stream)


# --- the upgrade ---


async def test_the_protocol_follows_the_upgrade():
    async with serving(Workshop()) as server, open_stream(server) as stream:
        await stream.send_all(UPGRADE)
        head, end, rest = (await read_until(stream, b"\r\n\r\n")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"\r\nUpgrade: druvarpc/1\r\n" in head + end
        await stream.send_all(HELLO + call(1, "Work.echo", b"x"))
        peer = RawPeer(stream, rest)
        assert b"x" in (await peer.until(0x11)).body
        # From here on HTTP is as good as any garbage.
        await stream.send_all(UPGRADE)
        assert (await peer.last()).reason[0] in (
            CloseCode.PROTOCOL_ERROR,
            CloseCode.FRAME_TOO_LARGE,
        )


async def test_the_upgrade_is_where_the_address_says():
    async with serving(Workshop(), f"{HTTP}/rpc/v1") as server:
        assert server.addresses[0].endswith("/rpc/v1")
        assert await answers(server.addresses[0])
        with pytest.raises(druvarpc.ConnectionLost, match="answered 404 Not Found to the upgrade"):
            await answers(server.addresses[0].removesuffix("/v1"))
        assert b" 426 Upgrade Required" in await ask(server, get("/rpc/v1"))
        assert (await ask(server, get("/"))).startswith(b"HTTP/1.1 200 OK")


async def test_bulk_both_ways_after_an_upgrade():
    async with (
        serving(Workshop(), HTTP) as server,
        druvarpc.connect(server.addresses[0]) as client,
    ):

        async def pieces():
            for _ in range(100):
                yield bytes(100_000)

        assert sum([len(piece) async for piece in client.stub(Work).chat(pieces())]) == 10_000_000


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "answered 403 Forbidden to the upgrade"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnot here\n", "answered 200 OK to the upg"),
        (b"HTTP/1.1 502 \x85\xff\r\n\r\n", r"answered 502 .* to the upgrade"),
        (b"HTTP/1.1 101 X\r\nUpgrade: h2c\r\n\r\n", "an upgrade to something else"),
        (b"HTTP/1.1 101 X\r\n\r\n", "an upgrade to something else"),
        (
            b"HTTP/1.1 101 X\r\nUpgrade: druvarpc/1\r\nUpgrade: druvarpc/1\r\n\r\n",
            "an upgrade to something else",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 100, "answered without an end"),
        (b"HTTP/1.1 101 X\r\nUpgrade: druv", "something else than HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "something else than HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "something else than HTTP"),
        (b"", "something else than HTTP|closed"),
    ],
)
async def test_an_upgrade_that_is_refused(answer, complaint):
    async def web(peer: RawPeer) -> None:
        await read_until(peer.stream, b"\r\n\r\n")
        await peer.send(answer)
        await peer.stream.aclose()

    async with raw_server(web) as address:
        address = address.replace("tcp", "http")
        with pytest.raises(druvarpc.ConnectionLost, match=complaint) as lost:
            await answers(address)
    assert lost.value.not_started
    assert lost.value.message.startswith(f"can't connect to {address}: ")
    assert lost.value.message.isprintable()


async def test_a_server_that_is_in_a_hurry_loses_nothing():
    """What follows the head of the 101 in one packet is the protocol's."""
    head = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 101 X\r\nUpgrade: druvarpc/1\r\n\r\n"
    asked = b""

    async def hasty(peer: RawPeer) -> None:
        nonlocal asked
        asked = await read_until(peer.stream, b"\r\n\r\n")
        await peer.send(head + HELLO)
        await read_all(peer.stream)

    async with raw_server(hasty) as address:
        async with druvarpc.connect(f"{address.replace('tcp', 'http')}/rpc"):
            pass
    port = address.rpartition(":")[2]
    assert asked.split(b"\r\n")[:2] == [b"GET /rpc HTTP/1.1", b"Host: 127.0.0.1:%s" % port.encode()]


async def test_a_server_that_never_answers_the_upgrade():
    async def silent(peer: RawPeer) -> None:
        await trio.sleep_forever()

    async with raw_server(silent) as address:
        with pytest.raises(druvarpc.ConnectionLost, match=r"no answer within 0\.2 s"):
            await answers(address.replace("tcp", "http"), connect_timeout=0.2)


# --- abuse ---


async def test_an_endless_head_is_refused():
    async with serving(Workshop()) as server, open_stream(server) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n")
        try:
            for _ in range(1000):
                await stream.send_all(b"X: " + b"y" * 1000 + b"\r\n")
        except trio.BrokenResourceError:
            pass
        assert (await read_all(stream))[:13] in (b"HTTP/1.1 431 ", b"")
        await settled(lambda: server.statistics().connections == 0)


@pytest.mark.parametrize("rest", [b"", b"T / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1000])
async def test_a_head_that_takes_too_long_is_cut(rest):
    """However steadily its bytes come."""
    limits = druvarpc.Limits(handshake_timeout=0.3)
    async with serving(Workshop(), limits=limits) as server, open_stream(server) as stream:
        start = trio.current_time()
        try:
            for byte in b"GE" + rest:
                await stream.send_all(bytes([byte]))
                await trio.sleep(0.02)
            with trio.fail_after(2):
                assert not await stream.receive_some(1000)
        except trio.BrokenResourceError:
            pass
        assert 0.25 < trio.current_time() - start < 3


async def test_a_connection_that_is_kept_and_not_used_is_cut():
    limits = druvarpc.Limits(handshake_timeout=0.2)
    async with serving(Workshop(), limits=limits) as server, open_stream(server) as stream:
        await stream.send_all(get("/healthz").replace(b"Connection: close\r\n", b""))
        await read_until(stream, b"ok\n")
        assert await read_all(stream) == b""


async def test_a_client_that_asks_much_and_takes_nothing_is_cut():
    limits = druvarpc.Limits(handshake_timeout=0.3)
    asking = get("/metrics").replace(b"Connection: close\r\n", b"") * 1000
    async with serving(Workshop(), limits=limits) as server, open_stream(server) as stream:
        with pytest.raises(trio.BrokenResourceError):
            with trio.fail_after(5):
                while True:
                    await stream.send_all(asking)
        assert await answers(server.addresses[0])


async def test_silence_is_answered_in_the_protocol():
    limits = druvarpc.Limits(handshake_timeout=0.2)
    async with serving(Workshop(), limits=limits) as server, raw_client(server, b"") as peer:
        assert (await peer.last()).reason[0] == CloseCode.TIMEOUT


async def test_an_upgrade_inside_tls_is_the_only_one_there(tmp_path):
    ca = authority(tmp_path)
    async with serving(Workshop(), "https://127.0.0.1:0", tls=ca.server()) as server:
        assert await answers(server.addresses[0], tls=ca.client())
        assert await answers(server.addresses[0].replace("https", "tls"), tls=ca.client())
        assert b" 400 Bad Request" in await ask(server, UPGRADE)
        assert server.statistics().connections == 0


# --- any bytes ---

# Parts that matter to a parser of HTTP, to be strung together.
SCRAPS = [
    b"GET / HTTP/1.1\r\n",
    b"GET /metrics HTTP/1.1\r\n",
    b"CONNECT a:1 HTTP/1.1\r\n",
    b"HTTP/1.1 101 X\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 100 X\r\n",
    b"HTTP/1.1 204 \r\n",
    b"Host: x\r\n",
    b"Connection: Upgrade\r\n",
    b"Upgrade: druvarpc/1\r\n",
    b"Expect: 100-continue\r\n",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    *(b"\r\n", b"\n", b"\r", b" ", b":", b"\0", b"\xff", b"3\r\nabc\r\n"),
    *(UPGRADE, get("/healthz"), PREFACE),
]
INPUT = st.lists(st.sampled_from(SCRAPS) | st.binary(max_size=20), max_size=12)


def site() -> Site:
    server = druvarpc.Server([], druvarpc.Limits())
    return Site("test", "", lambda: True, server.statistics)


@given(INPUT)
def test_any_bytes_are_answered_upgraded_or_the_end(scraps):
    async def main() -> None:
        near, far = memory_transports()
        for scrap in scraps:
            near.send_nowait([scrap])
        near.send_eof()
        with trio.fail_after(5):
            upgraded = await answer(far, site(), Arrivals(1))
        received = await near_end(far, near)
        assert received.startswith(b"HTTP/1.1 ") or not received
        # Once, and nothing of what came before it is left for the protocol.
        assert received.count(b"HTTP/1.1 101 ") == upgraded

    async def near_end(far: MemoryTransport, near: MemoryTransport) -> bytes:
        far.close()
        received = b""
        while data := await near.receive():
            received += data
        return received

    trio.run(main)


@given(INPUT)
def test_any_bytes_are_an_upgrade_or_break_the_connection(scraps):
    async def main() -> None:
        near, far = memory_transports()
        sent = b"".join(scraps)
        far.send_nowait([sent])
        far.send_eof()
        with trio.fail_after(5):
            try:
                await upgrade(near, "x", "/")
            except trio.BrokenResourceError:
                return
        # What follows the head, to the byte, is what comes next.
        rest = await near.receive()
        assert sent.endswith(rest)
        assert sent[: len(sent) - len(rest)].endswith((b"\r\n\r\n", b"\n\n", b"\n\r\n"))

    trio.run(main)
