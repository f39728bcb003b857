"""The PROXY protocol: its headers, and the peers that a server takes from them."""

import ipaddress
import struct
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import druvarpc
from druvarpc.errors import CloseCode
from druvarpc.proxy_protocol import Header, parse
from tests.io.certificates import authority
from tests.io.peers import HELLO, RawPeer, call, port_of, raw_client, serving

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
UNKNOWN = b"PROXY UNKNOWN\r\n"


def line(source: str, port: int, version: int = 4) -> bytes:
    other = "192.0.2.200" if version == 4 else "2001:db8::200"
    return f"PROXY TCP{version} {source} {other} {port} 443\r\n".encode()


def binary(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


def inet(source: str, port: int, extensions: bytes = b"") -> bytes:
    address = ipaddress.ip_address(source)
    size = len(address.packed)
    body = address.packed + bytes(size) + struct.pack("!HH", port, 443) + extensions
    return binary(0x21, 0x11 if size == 4 else 0x21, body)


# --- headers ---


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """Valid headers, with the address that they name."""
    kind = draw(st.sampled_from(["line", "inet", "local", "other", "unknown"]))
    extensions = draw(st.binary(max_size=300))
    if kind == "local":
        return binary(0x20, draw(st.integers(0, 255)), extensions), None
    if kind == "other":
        return binary(0x21, draw(st.sampled_from([0, 0x12, 0x22, 0x31, 0x32])), extensions), None
    if kind == "unknown":
        rest = draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80))
        return f"PROXY UNKNOWN {rest}\r\n".encode(), None
    version = draw(st.sampled_from([4, 6]))
    source, port = draw(st.ip_addresses(v=version)), draw(st.integers(0, 65535))
    host = f"[{source}]" if version == 6 else str(source)
    made = (
        line(str(source), port, version) if kind == "line" else inet(str(source), port, extensions)
    )
    return made, f"tcp://{host}:{port}"


@given(headers(), st.binary(max_size=50))
def test_headers_are_taken_from_whatever_follows_and_not_before_they_are_whole(header, rest):
    sent, source = header
    for size in range(len(sent)):
        assert parse(sent[:size]) is None
    found = parse(sent + rest)
    assert found is not None
    assert found.size == len(sent)
    if source is None:
        assert found.source is None
    else:
        assert found.source.rpartition(":")[2] == source.rpartition(":")[2]
        assert address_of(found.source) == address_of(source)


def address_of(url: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(url.removeprefix("tcp://").rpartition(":")[0].strip("[]"))


@given(
    st.one_of(st.binary(), st.binary().map(SIGNATURE.__add__), st.binary().map(b"PROXY ".__add__))
)
def test_any_bytes_are_a_header_a_part_of_one_or_refused(data):
    with suppress(ValueError):
        found = parse(data)
        assert found is None or found.size <= len(data)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n",
        HELLO,
        b"\x16\x03\x01",
        b"PROXY\r\n",
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP5 1.2.3.4 1.2.3.4 1 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 1\r\n",
        b"PROXY TCP4  1.2.3.4 1.2.3.4 1 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 01 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 -1 1\r\n",
        "PROXY TCP4 1.2.3.4 1.2.3.4 \u0661 1\r\n".encode(),
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 x\r\n",
        b"PROXY TCP4 1.2.3 1.2.3.4 1 1\r\n",
        b"PROXY TCP4 ::1 ::1 1 1\r\n",
        b"PROXY TCP6 1.2.3.4 1.2.3.4 1 1\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 1 1\r\n"[:27] + b"x" * 100,
        b"PROXY TCP6 fe80::1%eth0 ::1 1 1\r\n",
        b"PROXY TCP6 ::1 fe80::1%eth0 1 1\r\n",
        b"PROXY TCP6 ::1%\x1b[31m\0 ::1 1 1\r\n",
        b"PROXY UNKNOWN " + b"x" * 200,
        SIGNATURE + b"\x31\x11\0\x0c" + bytes(12),
        SIGNATURE + b"\x22\x11\0\x0c" + bytes(12),
        SIGNATURE + b"\x21\x41\0\x0c" + bytes(12),
        SIGNATURE + b"\x21\x13\0\x0c" + bytes(12),
        SIGNATURE + b"\x21\x11\0\x0b" + bytes(11),
        SIGNATURE + b"\x21\x21\0\x23" + bytes(35),
        SIGNATURE + b"\x21\x11\xff\xff",
    ],
)
def test_what_is_no_header(sent):
    with pytest.raises(ValueError, match="PROXY"):
        parse(sent)


def test_examples_of_the_specification():
    assert parse(b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n") == Header(
        "tcp://255.255.255.255:65535", 56
    )
    longest = ":".join(["ffff"] * 8)
    assert parse(f"PROXY TCP6 {longest} {longest} 65535 65535\r\n".encode()) == Header(
        f"tcp://[{longest}]:65535", 104
    )
    assert parse(UNKNOWN) == Header(None, 15)


# --- a server behind a proxy ---


class Mirror(druvarpc.Service):
    @druvarpc.rpc
    async def peer(self) -> str:
        return druvarpc.current_call().peer


async def peer_told(sent: bytes, *, piece: int = 1 << 20) -> tuple[bytes, str]:
    """Return what a handler's peer is, and what it really is."""
    async with (
        serving(Mirror(), proxy_protocol=True) as server,
        raw_client(server, b"") as peer,
    ):
        for start in range(0, len(sent), piece):
            await peer.send(sent[start : start + piece])
            await trio.testing.wait_all_tasks_blocked()
        await peer.send(HELLO + call(1, "Mirror.peer"))
        with trio.fail_after(5):
            body = (await peer.until(0x11)).body
        host, port = peer.stream.socket.getsockname()
        return body, f"tcp://{host}:{port}"


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize(
    ("header", "source"),
    [
        (line("192.0.2.1", 4711), "tcp://192.0.2.1:4711"),
        (line("2001:db8::1", 4711, 6), "tcp://[2001:db8::1]:4711"),
        (inet("192.0.2.1", 4711, b"\x04\0\x03abc"), "tcp://192.0.2.1:4711"),
        (inet("2001:db8::1", 4711), "tcp://[2001:db8::1]:4711"),
        (UNKNOWN, None),
        (binary(0x20, 0, b""), None),
        (binary(0x21, 0, b""), None),
    ],
)
async def test_the_peer_is_whom_the_header_names(header, source, piece):
    body, real = await peer_told(header, piece=piece)
    assert (source or real).encode() in body


async def test_the_header_and_the_first_call_in_one_packet():
    async with (
        serving(Mirror(), proxy_protocol=True) as server,
        raw_client(server, line("192.0.2.1", 4711) + HELLO + call(1, "Mirror.peer")) as peer,
    ):
        assert b"tcp://192.0.2.1:4711" in (await peer.until(0x11)).body


async def test_tls_and_http_come_after_the_header(tmp_path):
    ca = authority(tmp_path)
    async with (
        serving(Mirror(), "tls://127.0.0.1:0", tls=ca.server(), proxy_protocol=True) as server,
        raw_client(server, line("192.0.2.1", 4711)) as peer,
    ):
        context = ca.client().context("client", ["druvarpc/1"])
        secure = trio.SSLStream(peer.stream, context, server_hostname="127.0.0.1")
        await secure.send_all(HELLO + call(1, "Mirror.peer"))
        assert b"tcp://192.0.2.1:4711" in (await RawPeer(secure).until(0x11)).body
    async with (
        serving(Mirror(), proxy_protocol=True) as server,
        raw_client(server, UNKNOWN + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as peer,
    ):
        assert b"200 OK" in await peer.stream.receive_some(1000)


@pytest.mark.parametrize(
    "sent", [HELLO, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PROXY TCP4 me you 1 2\r\n", b""]
)
async def test_a_connection_without_a_header_is_ended(sent):
    limits = druvarpc.Limits(handshake_timeout=0.2)
    async with (
        serving(Mirror(), proxy_protocol=True, limits=limits) as server,
        raw_client(server, sent) as peer,
    ):
        with trio.fail_after(2):
            assert await peer.next() is None


async def test_a_header_that_takes_too_long_is_cut():
    limits = druvarpc.Limits(handshake_timeout=0.2)
    async with (
        serving(Mirror(), proxy_protocol=True, limits=limits) as server,
        raw_client(server, b"") as peer,
    ):
        start = trio.current_time()
        for byte in line("192.0.2.1", 4711):
            if not await peer.send(bytes([byte])):
                break
            await trio.sleep(0.02)
        assert await peer.next() is None
        assert trio.current_time() - start < 1


async def test_without_the_option_a_header_is_garbage():
    async with serving(Mirror()) as server:
        assert port_of(server)
        async with raw_client(server, binary(0x20, 0, b"")) as peer:
            assert (await peer.last()).reason[0] == CloseCode.PROTOCOL_ERROR
        async with raw_client(server, UNKNOWN + b"\r\n") as peer:
            assert b"400 Bad Request" in await peer.stream.receive_some(1000)
