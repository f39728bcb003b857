"""TLS: the transport, who is trusted, files that change, and peers that don't speak it."""

import logging
import shutil
import socket
import ssl
from collections.abc import Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
import trio
import trustme
from hypothesis import given
from hypothesis import strategies as st

import druvarpc
from druvarpc.client import connect_by
from druvarpc.errors import CloseCode
from druvarpc.protocol.frames import PREFACE
from druvarpc.testing import Link
from druvarpc.tls_transport import TLSTransport
from druvarpc.transports import Buffer, Transport, accepted_transport, memory_transports
from tests.io.certificates import Authority, authority
from tests.io.peers import (
    HELLO,
    RawPeer,
    Work,
    Workshop,
    buffers_of_all_sizes,
    carried,
    port_of,
    raw_server,
    send_all,
    serving,
)
from tests.io.programs import free_ports, needs, running

ADDRESS = "tls://127.0.0.1:0"


async def answers(address: str, **options) -> bool:
    async with druvarpc.connect(address, **options) as client:
        return await client.stub(Work).echo(b"x") == b"x"


async def refused(address: str, **options) -> str:
    """Return why a connection isn't made."""
    with trio.fail_after(5), pytest.raises(druvarpc.ConnectionLost) as lost:
        await answers(address, **options)
    assert lost.value.not_started
    return lost.value.message


# --- the transport ---


async def secured(
    ca: Authority,
    ends: tuple[Transport, Transport],
    server: druvarpc.TLS | None = None,
    client: druvarpc.TLS | None = None,
) -> tuple[TLSTransport, TLSTransport]:
    """Put TLS over both ends of a connection: the client's, then the server's."""
    near = TLSTransport(
        ends[0], (client or ca.client()).context("client", ["druvarpc/1"]), "client", "localhost"
    )
    far = TLSTransport(
        ends[1], (server or ca.server()).context("server", ["druvarpc/1", "http/1.1"]), "server"
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.handshake)
        nursery.start_soon(far.handshake)
    return near, far


class Reluctant:
    """A transport that takes and gives as few bytes at a time as its appetites say."""

    def __init__(self, inner: Transport, appetites: Sequence[int]) -> None:
        self._inner = inner
        self._appetites = appetites
        self._turn = 0
        self._held = b""
        self.peer, self.who, self.write_size = inner.peer, inner.who, inner.write_size
        self.hold_back, self.has_room = inner.hold_back, inner.has_room
        self.send_eof, self.close = inner.send_eof, inner.close

    def _appetite(self) -> int:
        self._turn += 1
        return self._appetites[self._turn % len(self._appetites)]

    def send_nowait(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        data = b"".join(buffers)
        taken = data[: self._appetite()]
        assert not self._inner.send_nowait([taken])
        return [data[len(taken) :]] if len(taken) < len(data) else ()

    async def receive(self) -> bytes:
        if self._held:
            await trio.lowlevel.checkpoint()
        else:
            self._held = await self._inner.receive()
        size = max(1, self._appetite())
        data, self._held = self._held[:size], self._held[size:]
        return data

    async def wait_writable(self) -> None:
        await self._inner.wait_writable()


async def test_buffers_of_all_sizes_cross_memory(ca):
    near, far = await secured(ca, memory_transports())
    buffers = buffers_of_all_sizes()
    assert await carried(near, far, buffers) == b"".join(buffers)
    assert not far.send_nowait([b"the", b"", b" end"])
    assert await near.receive() == b"the end"


async def test_buffers_of_all_sizes_cross_a_socket_that_takes_little_at_a_time(ca):
    sockets = trio.socket.socketpair()
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
    ends = tuple(accepted_transport(trio.SocketStream(end)) for end in sockets)
    near, far = await secured(ca, ends)
    buffers = buffers_of_all_sizes()
    assert await carried(near, far, buffers) == b"".join(buffers)
    near.close()
    far.close()
    for use in (near.receive, far.wait_writable):
        with pytest.raises(trio.ClosedResourceError):
            await use()
    with pytest.raises(trio.ClosedResourceError):
        far.send_nowait([b"x"])


@given(
    st.lists(st.integers(0, 40_000), min_size=1, max_size=8),
    st.lists(st.sampled_from([0, 1, 100, 5_000, 50_000]), min_size=1, max_size=5),
)
def test_nothing_is_lost_between_ends_that_take_part_of_a_record(ca, sizes, appetites):
    async def main() -> None:
        near, far = (Reluctant(end, [*appetites, 5_000]) for end in memory_transports())
        client, server = await secured(ca, (near, far))
        buffers = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, client, buffers)
            received = b""
            while len(received) < sum(sizes):
                received += await server.receive()
        assert received == b"".join(buffers)
        client.send_eof()
        await send_all(client, [b""])
        assert await server.receive() == b""

    trio.run(main)


async def test_a_slow_link_is_filled_and_what_waits_for_it_is_bounded(ca, autojump_clock):
    link = Link(rtt=0.1, bandwidth=1e6)
    near, far = await secured(ca, link.connect())
    start = trio.current_time()
    data = bytes(5_000_000)
    assert await carried(near, far, [data]) == data
    assert trio.current_time() - start == pytest.approx(5.05, rel=0.02)


async def test_the_end_is_told_apart_from_a_cut(ca):
    inner = memory_transports()
    near, far = await secured(ca, inner)
    near.send_nowait([b"all"])
    near.send_eof()
    assert await far.receive() == b"all"
    assert await far.receive() == b""
    assert await far.receive() == b""

    inner = memory_transports()
    near, far = await secured(ca, inner)
    near.send_nowait([b"not all"])
    inner[0].send_eof()
    assert await far.receive() == b"not all"
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match="without TLS's end"):
            await far.receive()


async def test_bytes_that_are_no_record_break_it_after_what_came_before(ca):
    inner = memory_transports()
    near, far = await secured(ca, inner)
    near.send_nowait([b"good"])
    inner[0].send_nowait([b"\x17\x03\x03\x00\x20" + bytes(32)])
    assert await far.receive() == b"good"
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match="TLS: decryption failed or bad record"):
            await far.receive()


async def test_a_cancelled_read_has_read_nothing(ca):
    near, far = await secured(ca, memory_transports())
    with trio.move_on_after(0) as scope:
        await far.receive()
    assert scope.cancelled_caught
    near.send_nowait([b"data"])
    with trio.CancelScope() as scope:
        scope.cancel()
        await far.receive()
    assert await far.receive() == b"data"
    far.unread(b"da")
    near.send_nowait([b"ta"])
    assert await far.receive() + await far.receive() == b"data"


async def test_who_is_at_the_other_end(ca, tmp_path):
    people = authority(tmp_path / "people")
    shown = druvarpc.TLS(
        authorities=ca.file,
        certificate=people.certify(
            "laptop.example", "10.1.2.3", "ann@example.com", to="ann", common_name="Ann"
        ),
    )
    near, far = await secured(
        ca, memory_transports(), ca.server(client_authorities=people.file), shown
    )
    certificate = far.who.certificate
    assert certificate is not None
    assert (certificate.subject, certificate.dns) == ("Ann", ("laptop.example",))
    assert certificate.ip == ("10.1.2.3",)
    assert certificate.email == ("ann@example.com",)
    assert certificate.uri == ()
    assert certificate.not_before < datetime.now(UTC) < certificate.not_after
    assert certificate.serial
    pem = (tmp_path / "people" / "ann.pem").read_text()
    assert certificate.der == ssl.PEM_cert_to_DER_cert(pem[pem.index("-----BEGIN CERT") :])
    assert "der" not in repr(certificate)
    assert near.who.certificate.dns == ("localhost",)
    assert near.protocol == far.protocol == "druvarpc/1"
    _, anonymous = await secured(ca, memory_transports())
    assert anonymous.who == druvarpc.Peer("memory")


# --- services ---


async def test_calls_of_all_kinds_over_tls(ca):
    async with (
        serving(Workshop(), ADDRESS, tls=ca.server()) as server,
        druvarpc.connect(server.addresses[0], tls=ca.client()) as client,
    ):
        assert server.addresses[0].startswith("tls://127.0.0.1:")
        work = client.stub(Work)
        big = bytes(range(256)) * 20_000
        assert await work.echo(big) == big
        assert sum([len(piece) async for piece in work.pour(100, 70_000)]) == 7_000_000

        async def pieces():
            for _ in range(100):
                yield bytes(70_000)

        assert await work.gather(pieces()) == 7_000_000


async def test_a_context_is_used_as_it_is(ca):
    """Ones without ALPN, too."""
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    theirs.load_cert_chain(ca.certify("127.0.0.1"))
    ours = ssl.create_default_context(cafile=ca.file)
    async with serving(Workshop(), ADDRESS, tls=theirs) as server:
        assert await answers(server.addresses[0], tls=ours)
        assert await answers(server.addresses[0].replace("tls:", "https:"), tls=ours)


async def test_arguments_that_do_not_fit(ca, tmp_path):
    for address in ("tcp://127.0.0.1:1", "http://127.0.0.1:1", "unix:///nowhere"):
        with pytest.raises(ValueError, match="TLS is for tls:// and https://"):
            await answers(address, tls=ca.client())
        with pytest.raises(ValueError, match="is for tls:// and https:// addresses, and there is"):
            await druvarpc.serve([Workshop()], address, tls=ca.server())
    with pytest.raises(ValueError, match="TLS needs tls="):
        await druvarpc.serve([Workshop()], ADDRESS)
    with pytest.raises(ValueError, match="a server needs a certificate"):
        await druvarpc.serve([Workshop()], ADDRESS, tls=ca.client())
    with pytest.raises(OSError, match="No such file"):
        await druvarpc.serve([Workshop()], ADDRESS, tls=druvarpc.TLS(certificate="/nowhere"))
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match="PEM"):
        await answers("tls://127.0.0.1:1", tls=druvarpc.TLS(certificate=tmp_path / "empty"))


async def test_an_encrypted_key_is_refused_and_nobody_is_asked(ca, tmp_path):
    from cryptography.hazmat.primitives import serialization

    leaf = ca.ca.issue_cert("localhost")
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "key.pem").write_bytes(encrypted)
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    tls = druvarpc.TLS(certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    with pytest.raises(OSError, match="the key is encrypted"):
        await druvarpc.serve([Workshop()], ADDRESS, tls=tls)


# --- trust ---


async def test_a_server_that_cannot_be_trusted(ca, tmp_path):
    other = authority(tmp_path / "other")
    async with serving(Workshop(), ADDRESS, tls=ca.server()) as server:
        address = server.addresses[0]
        message = await refused(address, tls=other.client())
        assert message.startswith(f"can't connect to {address}: TLS: certificate verify failed: ")
        assert "issuer" in message
        assert "issuer" in await refused(address)  # nor does the system
        message = await refused(address, tls=ca.client(server_name="example.com"))
        assert "certificate verify failed: Hostname mismatch" in message
        assert "not valid for 'example.com'" in message
    late = ca.ca.issue_cert("127.0.0.1", not_after=datetime.now(UTC) - timedelta(days=1))
    late.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "late.pem"))
    expired = druvarpc.TLS(certificate=tmp_path / "late.pem")
    async with serving(Workshop(), ADDRESS, tls=expired) as server:
        message = await refused(server.addresses[0], tls=ca.client())
        assert "certificate verify failed: certificate has expired" in message


async def test_the_name_of_a_server_can_be_another_than_that_of_the_address(ca):
    async with serving(Workshop(), ADDRESS, tls=ca.server("vault.example")) as server:
        assert "mismatch" in await refused(server.addresses[0], tls=ca.client())
        assert await answers(server.addresses[0], tls=ca.client(server_name="vault.example"))


async def test_a_client_must_show_a_certificate_where_that_is_demanded(ca, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "druvarpc")
    people = authority(tmp_path / "people")
    ann = people.certify("ann@example.com", to="ann")
    stranger = authority(tmp_path / "strangers").certify("ann@example.com", to="ann")
    demanding = ca.server(client_authorities=people.file)
    async with serving(Workshop(), ADDRESS, tls=demanding) as server:
        address = server.addresses[0]
        assert await answers(address, tls=ca.client(certificate=ann))
        assert "certificate required" in await refused(address, tls=ca.client())
        message = await refused(address, tls=ca.client(certificate=stranger))
        assert "TLS: tlsv1 alert unknown ca" in message
        refusals = [one.getMessage() for one in caplog.records]
        assert "not admitted: TLS: peer did not return a certificate" in refusals[0]
        assert "not admitted: TLS: certificate verify failed: unable to get" in refusals[1]
    asking = ca.server(client_authorities=people.file, require_client_certificate=False)
    async with serving(Workshop(), ADDRESS, tls=asking) as server:
        address = server.addresses[0]
        assert await answers(address, tls=ca.client())
        assert await answers(address, tls=ca.client(certificate=ann))
        assert "unknown ca" in await refused(address, tls=ca.client(certificate=stranger))


# --- files that change ---


async def serial(address: str, ca: Authority) -> int:
    """Return the serial number of the certificate that a server shows now."""
    context = ssl.create_default_context(cafile=ca.file)

    def ask() -> int:
        with (
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            return int(secure.getpeercert()["serialNumber"], 16)

    return await trio.to_thread.run_sync(ask)


async def test_a_server_shows_its_new_certificate_and_open_connections_stay(tmp_path):
    ca = authority(tmp_path)
    async with (
        serving(Workshop(), ADDRESS, tls=ca.server()) as server,
        druvarpc.connect(server.addresses[0], tls=ca.client()) as client,
    ):
        before = await serial(server.addresses[0], ca)
        assert await serial(server.addresses[0], ca) == before
        ca.certify("127.0.0.1")
        after = await serial(server.addresses[0], ca)
        assert after != before
        assert await client.stub(Work).echo(b"still") == b"still"
        assert await answers(server.addresses[0], tls=ca.client())


async def test_files_that_do_not_fit_leave_the_old_ones_in_use(tmp_path, caplog):
    ca = authority(tmp_path)
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    old, new = ca.ca.issue_cert("127.0.0.1"), ca.ca.issue_cert("127.0.0.1")

    def write(certified: trustme.LeafCert, *, whole: bool) -> None:
        chain.write_bytes(certified.cert_chain_pems[0].bytes())
        if whole:
            key.write_bytes(certified.private_key_pem.bytes())

    write(old, whole=True)
    tls = druvarpc.TLS(certificate=chain, key=key)
    async with serving(Workshop(), ADDRESS, tls=tls) as server:
        before = await serial(server.addresses[0], ca)
        write(new, whole=False)  # a certificate that belongs to another key
        with caplog.at_level(logging.ERROR, "druvarpc"):
            for _ in range(3):
                assert await serial(server.addresses[0], ca) == before
        assert [record.getMessage() for record in caplog.records] == [
            "the TLS files have changed and can't be used, those before stay in use: "
            "key values mismatch"
        ]
        chain.unlink()
        assert await serial(server.addresses[0], ca) == before
        assert "No such file" in caplog.records[-1].getMessage()
        write(new, whole=True)
        assert await serial(server.addresses[0], ca) != before
        assert len(caplog.records) == 2


async def test_a_client_reads_its_files_again(ca, tmp_path):
    other = authority(tmp_path)
    trusted = tmp_path / "trusted.pem"
    shutil.copy(ca.file, trusted)
    tls = druvarpc.TLS(authorities=trusted)
    async with (
        serving(Workshop(), ADDRESS, tls=ca.server()) as first,
        druvarpc.connect(first.addresses[0], tls=tls, connections=2) as client,
    ):
        assert await client.stub(Work).echo(b"x") == b"x"
        shutil.copy(other.file, trusted)
        assert "issuer" in await refused(first.addresses[0], tls=tls)


# --- peers that don't speak it, or badly ---


async def test_plaintext_is_refused_where_tls_is_demanded(ca):
    async with serving(Workshop(), ADDRESS, tls=ca.server()) as server:
        port = port_of(server)
        message = await refused(f"tcp://127.0.0.1:{port}")
        assert "TLS is demanded here" in message
        message = await refused(f"http://127.0.0.1:{port}")
        assert "answered 400 Bad Request to the upgrade" in message
        for sent in (b"\0", b"\x17\x03\x03", b"hello"):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(sent)
                with trio.fail_after(1):
                    assert await stream.receive_some(100) == b""
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(HELLO)
            with trio.fail_after(1):
                last = await RawPeer(stream).last()
            assert last.reason == (CloseCode.PROTOCOL_ERROR, "TLS is demanded here")
        assert server.statistics().connections == 0
        assert await answers(server.addresses[0], tls=ca.client())


async def test_a_client_never_falls_back_to_plaintext(ca):
    async with serving(Workshop()) as server:
        port = port_of(server)
        message = await refused(f"tls://127.0.0.1:{port}", tls=ca.client())
        assert "TLS: " in message

    seen = bytearray()

    async def plain(peer: RawPeer) -> None:
        await peer.send(HELLO)
        while data := await peer.stream.receive_some(1000):
            seen.extend(data)

    async with raw_server(plain) as address:
        assert "TLS: wrong version" in await refused(address.replace("tcp", "tls"), tls=ca.client())
    assert seen[:1] == b"\x16"
    assert PREFACE not in seen


@asynccontextmanager
async def connection_to(server: druvarpc.Server):
    async with await trio.open_tcp_stream("127.0.0.1", port_of(server)) as stream:
        yield stream


def client_hello(ca: Authority) -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ca.client().context("client", ["druvarpc/1"])
    hello = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("size", [0, 1, 100, None])
async def test_a_handshake_that_takes_too_long_is_cut(ca, size):
    """However steadily its bytes come."""
    limits = druvarpc.Limits(handshake_timeout=0.3)
    async with (
        serving(Workshop(), ADDRESS, tls=ca.server(), limits=limits) as server,
        connection_to(server) as stream,
    ):
        start = trio.current_time()
        try:
            for byte in client_hello(ca)[:size]:
                await stream.send_all(bytes([byte]))
                await trio.sleep(0.05 if size else 0.001)
            with trio.fail_after(2):
                while await stream.receive_some(10_000):
                    pass
        except trio.BrokenResourceError:
            pass
        assert 0.25 < trio.current_time() - start < 3


async def test_silence_after_the_handshake_is_answered_in_the_protocol(ca):
    limits = druvarpc.Limits(handshake_timeout=0.2)
    async with (
        serving(Workshop(), ADDRESS, tls=ca.server(), limits=limits) as server,
        connection_to(server) as stream,
    ):
        secure = trio.SSLStream(
            stream, ssl.create_default_context(cafile=ca.file), server_hostname="127.0.0.1"
        )
        await secure.do_handshake()
        with trio.fail_after(2):
            assert (await RawPeer(secure).last()).reason[0] == CloseCode.TIMEOUT


# --- openssl ---


@needs("openssl")
async def test_openssl_as_a_client(ca):
    async with serving(Workshop(), ADDRESS, tls=ca.server()) as server:
        for alpn in ("druvarpc/1", "http/1.1", "h2"):
            ran = await trio.run_process(
                [
                    *("openssl", "s_client", "-connect", f"127.0.0.1:{port_of(server)}"),
                    *("-CAfile", str(ca.file), "-verify_return_error", "-ign_eof", "-alpn", alpn),
                ],
                stdin=b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
                capture_stdout=True,
                capture_stderr=True,
            )
            output = ran.stdout.decode()
            assert "Verify return code: 0 (ok)" in output
            assert "HTTP/1.1 200" in output
            assert "\r\n\r\nok\n" in output
            told = f"ALPN protocol: {alpn}" if alpn != "h2" else "No ALPN negotiated"
            assert told in output


@needs("openssl")
async def test_openssl_as_a_server(ca, tmp_path):
    (port,) = free_ports(1)
    certificate = ca.certify("127.0.0.1")
    arguments = ["-accept", f"127.0.0.1:{port}", "-cert", certificate, "-key", certificate, "-www"]
    async with running("openssl", "s_server", *arguments, ports=[port], log=tmp_path / "log"):
        message = await refused(f"https://127.0.0.1:{port}", tls=ca.client())
        assert "answered 200 ok to the upgrade" in message


# --- over a distance ---


async def worst_wait_beside_bulk(ca: Authority | None) -> float:
    """Return the longest of 20 small calls over 2 MB/s and 40 ms, while bulk goes up."""
    link = Link(rtt=0.04, bandwidth=2e6)
    server = druvarpc.Server([Workshop()], druvarpc.Limits())
    waits: list[float] = []
    async with trio.open_nursery() as nursery:

        async def accept(far: Transport) -> None:
            if ca is not None:
                far = TLSTransport(far, ca.server().context("server", ["druvarpc/1"]), "server")
                await far.handshake()
            await server.serve_transport(far)

        async def dial() -> Transport:
            near, far = link.connect()
            nursery.start_soon(accept, far)
            if ca is not None:
                context = ca.client().context("client", ["druvarpc/1"])
                near = TLSTransport(near, context, "client", "localhost")
                await near.handshake()
            return near

        async def pieces():
            while True:
                yield bytes(65_536)

        async with connect_by(dial, "link") as client:
            work = client.stub(Work)
            nursery.start_soon(work.gather, pieces())
            await trio.sleep(1)
            for _ in range(20):
                start = trio.current_time()
                await work.echo(b"small")
                waits.append(trio.current_time() - start)
            nursery.cancel_scope.cancel()
    return max(waits)


async def test_small_calls_beside_bulk_wait_no_longer_for_tls(ca, autojump_clock):
    plainly = await worst_wait_beside_bulk(None)
    assert await worst_wait_beside_bulk(ca) < plainly + 0.01


# --- any bytes ---


@given(st.sampled_from([b"", b"\x16\x03\x01\x00\x05", b"\x16\x03\x01\x40\x00\x01"]), st.binary())
def test_any_bytes_instead_of_a_handshake_break_it(ca, start, rest):
    async def main() -> None:
        for role in ("server", "client"):
            near, far = memory_transports()
            tls = ca.server() if role == "server" else ca.client()
            context = tls.context(role, ["druvarpc/1"])
            secured = TLSTransport(far, context, role, "localhost" if role == "client" else None)
            near.send_nowait([start + rest])
            near.send_eof()
            with pytest.raises(trio.BrokenResourceError, match="TLS: "):
                await secured.handshake()

    trio.run(main)
