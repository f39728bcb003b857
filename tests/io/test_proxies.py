"""Proxies: real ones in front of servers and of clients, what chooses them, and bad ones."""

import subprocess
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import trio

import druvarpc
from druvarpc.addresses import parse_address
from druvarpc.proxies import choose_proxy
from tests.io.certificates import Authority, authority
from tests.io.peers import HELLO, RawPeer, Work, Workshop, call, port_of, raw_server, serving
from tests.io.programs import free_ports, marks, needs, running
from tests.io.test_proxy_protocol import Mirror

STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"
# So often does an idle connection say that it lives.
LIVELY = druvarpc.Limits(keepalive_interval=0.25)


async def carries_bulk(address: str, **options) -> None:
    """Send 20 MB through a service and back, beside small calls."""
    async with druvarpc.connect(address, **options) as client:
        work = client.stub(Work)

        async def pieces() -> AsyncGenerator[bytes, None]:
            for _ in range(200):
                yield bytes(100_000)

        async def bulk() -> None:
            size = sum([len(piece) async for piece in work.chat(pieces())])
            assert size == 20_000_000

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk)
            for number in range(100):
                assert await work.echo(b"%d" % number) == b"%d" % number


async def refused(address: str, **options) -> str:
    """Return why a connection isn't made."""
    with trio.fail_after(5), pytest.raises(druvarpc.ConnectionLost) as lost:
        async with druvarpc.connect(address, **options):
            pass
    assert lost.value.not_started
    return lost.value.message


# --- nginx ---

NGINX = """
load_module {module};
daemon off; master_process off;
pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    map $http_upgrade $connection_upgrade {{ default upgrade; "" close; }}
    proxy_http_version 1.1;
    server {{
        listen 127.0.0.1:{plain};
        listen 127.0.0.1:{secure} ssl;
        ssl_certificate {certificate}; ssl_certificate_key {certificate};
        location / {{ proxy_pass http://127.0.0.1:{backend}; }}
        location /rpc {{
            proxy_pass http://127.0.0.1:{backend};
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_read_timeout 1s;
        }}
    }}
}}
stream {{
    server {{
        listen 127.0.0.1:{stream} ssl;
        ssl_certificate {certificate}; ssl_certificate_key {certificate};
        proxy_pass 127.0.0.1:{backend};
    }}
}}
"""


@asynccontextmanager
async def nginx(backend: int, folder: Path, ca: Authority) -> AsyncGenerator[list[str], None]:
    """Yield addresses behind which it is: of HTTP, of HTTPS, and of TLS alone."""
    ports = free_ports(3)
    config = NGINX.format(
        module=STREAM_MODULE,
        folder=folder,
        backend=backend,
        certificate=ca.certify("127.0.0.1"),
        **dict(zip(("plain", "secure", "stream"), ports, strict=True)),
    )
    (folder / "nginx.conf").write_text(config)
    start = ("nginx", "-p", folder, "-e", folder / "error.log", "-c", folder / "nginx.conf")
    async with running(*start, ports=ports, log=folder / "log"):
        plain, secure, stream = ports
        yield [
            f"http://127.0.0.1:{plain}/rpc",
            f"https://127.0.0.1:{secure}/rpc",
            f"tls://127.0.0.1:{stream}",
        ]


@needs("nginx", file=STREAM_MODULE)
async def test_nginx_passes_upgrades_on_and_ends_tls(tmp_path):
    ca = authority(tmp_path / "ca")
    async with (
        serving(Workshop(), "http://127.0.0.1:0/rpc") as server,
        nginx(port_of(server), tmp_path, ca) as addresses,
    ):
        plain, secure, stream = addresses
        await carries_bulk(plain)
        for address in (secure, stream):
            await carries_bulk(address, tls=ca.client())
            assert "certificate verify failed" in await refused(address)
        # Where nginx doesn't pass the upgrade on, it is an ordinary request.
        message = await refused(plain.removesuffix("/rpc"))
        assert "answered 200 OK to the upgrade" in message


@needs("nginx", file=STREAM_MODULE)
async def test_an_idle_connection_through_nginx_lives_on_its_pings(tmp_path):
    """nginx is told to end what is silent for a second."""
    workshop = Workshop()
    async with (
        serving(workshop) as server,
        nginx(port_of(server), tmp_path, authority(tmp_path / "ca")) as (plain, *_),
        trio.open_nursery() as nursery,
    ):

        async def silent() -> None:
            with pytest.raises(druvarpc.ConnectionLost):
                async with druvarpc.connect(plain) as client:
                    await client.stub(Work).hold()

        nursery.start_soon(silent)
        async with druvarpc.connect(plain, limits=LIVELY) as client:
            with trio.move_on_after(2.5):
                await client.stub(Work).hold()
            assert await client.stub(Work).echo(b"alive") == b"alive"


# --- HAProxy ---

HAPROXY = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen first
    bind 127.0.0.1:{first}
    server one 127.0.0.1:{backend} send-proxy check inter 100ms
listen second
    bind 127.0.0.1:{second}
    server one 127.0.0.1:{backend} send-proxy-v2 check inter 100ms
listen web
    mode http
    bind 127.0.0.1:{web}
    option httpchk GET /healthz
    server one 127.0.0.1:{backend} send-proxy-v2 check inter 100ms
"""


@needs("haproxy")
async def test_peers_behind_haproxy_are_known_by_their_own_addresses(tmp_path):
    ports = free_ports(3)
    async with serving(Mirror(), proxy_protocol=True) as server:
        names = dict(zip(("first", "second", "web"), ports, strict=True))
        (tmp_path / "cfg").write_text(HAPROXY.format(backend=port_of(server), **names))
        start = ("haproxy", "-db", "-f", tmp_path / "cfg")
        async with running(*start, ports=ports, log=tmp_path / "log"):
            for port in ports[:2]:
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    host, source = stream.socket.getsockname()
                    await stream.send_all(HELLO + call(1, "Mirror.peer"))
                    body = (await RawPeer(stream).until(0x11)).body
                    assert f"tcp://{host}:{source}".encode() in body
            for scheme, port in zip(("tcp", "tcp", "http"), ports, strict=True):
                async with druvarpc.connect(f"{scheme}://127.0.0.1:{port}") as client:
                    peer = await client.stub(Mirror).peer()
                    assert parse_address(peer).host == "127.0.0.1"


@needs("haproxy")
async def test_haproxy_carries_bulk_both_ways(tmp_path):
    ports = free_ports(3)
    async with serving(Workshop(), proxy_protocol=True) as server:
        names = dict(zip(("first", "second", "web"), ports, strict=True))
        (tmp_path / "cfg").write_text(HAPROXY.format(backend=port_of(server), **names))
        start = ("haproxy", "-db", "-f", tmp_path / "cfg")
        async with running(*start, ports=ports, log=tmp_path / "log"):
            await carries_bulk(f"tcp://127.0.0.1:{ports[1]}")
            await carries_bulk(f"http://127.0.0.1:{ports[2]}")


# --- squid and tinyproxy ---

SQUID = """
http_port 127.0.0.1:{port}
pid_filename none
access_log none
cache_log {folder}/cache.log
cache_store_log none
netdb_filename none
coredump_dir {folder}
shutdown_lifetime 0 seconds
{access}
http_access deny all
"""
SQUID_USERS = """
auth_param basic program /usr/lib/squid/basic_ncsa_auth {folder}/users
auth_param basic children 1
acl users proxy_auth REQUIRED
http_access allow users
"""
TINYPROXY = """
Port {port}
Listen 127.0.0.1
Timeout 60
MaxClients 10
{access}
"""


# tinyproxy's configuration takes letters and digits only.
PASSWORDS = {"squid": "p@ss:word", "tinyproxy": "passw0rd"}


@asynccontextmanager
async def proxy(kind: str, *, users: bool) -> AsyncGenerator[str, None]:
    """Yield where a proxy is, which lets through whom it knows, or everybody."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        command = configure(kind, Path(folder), port, users=users)
        async with running(*command, ports=[port], log=Path(folder) / "log"):
            yield f"127.0.0.1:{port}"


def configure(kind: str, folder: Path, port: int, *, users: bool) -> list[str | Path]:
    folder.chmod(0o777)  # squid takes another user's rights
    if kind == "tinyproxy":
        access = f"BasicAuth ann {PASSWORDS[kind]}" if users else ""
        (folder / "config").write_text(TINYPROXY.format(port=port, access=access))
        return ["tinyproxy", "-d", "-c", folder / "config"]
    access = "http_access allow all"
    if users:
        hashed = subprocess.run(
            ["openssl", "passwd", "-apr1", PASSWORDS[kind]],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        (folder / "users").write_text(f"ann:{hashed}")
        access = SQUID_USERS.format(folder=folder)
    (folder / "config").write_text(SQUID.format(port=port, folder=folder, access=access))
    return ["squid", "-N", "-f", folder / "config"]


KINDS = [
    pytest.param("squid", marks=marks("squid", "openssl")),
    pytest.param("tinyproxy", marks=marks("tinyproxy")),
]


@pytest.mark.parametrize("kind", KINDS)
async def test_connections_by_a_proxy(kind, tmp_path, monkeypatch):
    ca = authority(tmp_path / "ca")
    async with (
        serving(Workshop(), "tls://127.0.0.1:0", tls=ca.server()) as secure,
        serving(Workshop(), "http://127.0.0.1:0") as plain,
        proxy(kind, users=False) as place,
    ):
        url = f"http://{place}"
        await carries_bulk(secure.addresses[0], tls=ca.client(), proxy=url)
        await carries_bulk(plain.addresses[0].replace("http", "tcp"), proxy=url)
        await carries_bulk(plain.addresses[0], proxy=place)
        https = secure.addresses[0].replace("tls", "https")
        for name in ("HTTPS_PROXY", "ALL_PROXY", "http_proxy", "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTPS_PROXY", url)
        await carries_bulk(https, tls=ca.client())
        # The proxy is where nobody is, to see whether it is asked.
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
        assert "http://127.0.0.1:1" in await refused(https, tls=ca.client())
        monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.0/8")
        await carries_bulk(https, tls=ca.client())


@pytest.mark.parametrize("kind", KINDS)
async def test_a_proxy_that_wants_to_know_who_asks(kind, tmp_path):
    async with serving(Workshop()) as server, proxy(kind, users=True) as place:
        address = server.addresses[0]
        password = quote(PASSWORDS[kind], safe="")
        await carries_bulk(address, proxy=f"http://ann:{password}@{place}")
        for user in ("ann:wr0ng@", f"bob:{password}@", ""):
            message = await refused(address, proxy=f"http://{user}{place}")
            assert message.startswith(f"can't connect to {address} by way of http://{place}: ")
            assert "the proxy answered 40" in message
            assert "wr0ng" not in message
            assert password not in message


@pytest.mark.parametrize("kind", KINDS)
async def test_a_proxy_that_finds_nobody_there(kind):
    (nowhere,) = free_ports(1)
    async with proxy(kind, users=False) as place:
        message = await refused(f"tcp://127.0.0.1:{nowhere}", proxy=place)
        assert "the proxy answered 50" in message


# --- proxies that the test plays ---


async def read_head(peer: RawPeer) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        data = await peer.stream.receive_some(10_000)
        assert data
        head += data
    return head


async def asked(address: str, user: str = "") -> bytes:
    """Return what a proxy is asked."""
    heads = []

    async def take(peer: RawPeer) -> None:
        heads.append(await read_head(peer))
        await peer.send(b"HTTP/1.1 403 No\r\n\r\n")

    async with raw_server(take) as place:
        place = place.removeprefix("tcp://")
        assert "answered 403 No" in await refused(address, proxy=f"http://{user}{place}")
    return heads[0]


async def test_what_a_proxy_is_asked():
    assert await asked("tcp://service.example:7420") == (
        b"CONNECT service.example:7420 HTTP/1.1\r\nHost: service.example:7420\r\n\r\n"
    )
    assert (await asked("tls://[2001:db8::1]:443")).startswith(b"CONNECT [2001:db8::1]:443 HTTP")
    assert (await asked("http://b\u00fccher.example/x")).startswith(
        b"CONNECT xn--bcher-kva.example:80 HTTP/1.1\r\n"
    )
    head = await asked("https://service.example", "Aladdin:open%20sesame@")
    assert b"\r\nProxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n" in head
    # Nothing that a user writes begins a line of its own.
    head = await asked("tcp://service.example:7420", "a%0d%0aX:b%0d%0aY@")
    assert head.count(b"\r\n") == 4


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
        b"\x05\x00",
        b"",
    ],
)
async def test_a_proxy_that_does_not_connect(answer):
    async def bad(peer: RawPeer) -> None:
        await read_head(peer)
        await peer.send(answer)
        await peer.stream.aclose()

    async with raw_server(bad) as place:
        url = place.replace("tcp://", "http://ann:s3cret@")
        message = await refused("tls://service.example:1", proxy=url)
        assert message.startswith("can't connect to tls://service.example:1 by way of http://127.0")
        assert "s3cret" not in message
        assert message.isprintable()


async def test_a_proxy_that_is_in_a_hurry_loses_nothing():
    async def hasty(peer: RawPeer) -> None:
        await read_head(peer)
        await peer.send(b"HTTP/1.0 200 Connection established\r\n\r\n" + HELLO)
        while await peer.stream.receive_some(1000):
            pass

    async with raw_server(hasty) as place:
        async with druvarpc.connect("tcp://service.example:1", proxy=place[6:]):
            pass


async def test_a_proxy_that_is_spoken_to_by_tls(ca, monkeypatch):
    """TLS with the service goes through TLS with the proxy."""
    context = ca.server().context("server", ["http/1.1"])

    async def pass_on(source: trio.abc.ReceiveStream, target: trio.abc.SendStream) -> None:
        try:
            while data := await source.receive_some(65536):
                await target.send_all(data)
        except trio.BrokenResourceError:
            pass

    async def secure(peer: RawPeer) -> None:
        near = trio.SSLStream(peer.stream, context, server_side=True)
        head = await read_head(RawPeer(near))
        host, _, port = head.split()[1].decode().partition(":")
        await near.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        async with await trio.open_tcp_stream(host, int(port)) as far, trio.open_nursery() as pair:
            pair.start_soon(pass_on, near, far)
            await pass_on(far, near)
            pair.cancel_scope.cancel()

    monkeypatch.setenv("SSL_CERT_FILE", str(ca.file))
    async with (
        serving(Workshop(), "tls://127.0.0.1:0", tls=ca.server()) as server,
        raw_server(secure) as place,
    ):
        await carries_bulk(
            server.addresses[0], tls=ca.client(), proxy=place.replace("tcp", "https")
        )


# --- which one ---

ENVIRONMENT = {
    "HTTPS_PROXY": "http://secure:1",
    "http_proxy": "http://plain:2",
    "ALL_PROXY": "http://all:3",
    "NO_PROXY": "example.com, .example.org,10.0.0.0/8,host.example:99,2001:db8::/32",
}


@pytest.mark.parametrize(
    ("address", "dropped", "expected"),
    [
        ("tls://a:1", (), "http://secure:1"),
        ("https://a", (), "http://secure:1"),
        ("http://a", (), "http://plain:2"),
        ("https://a", ("HTTPS_PROXY",), "http://all:3"),
        ("http://a", ("http_proxy",), "http://all:3"),
        ("http://a", ("http_proxy", "ALL_PROXY"), None),
        ("tcp://a:1", (), None),
        ("unix:///a", (), None),
        ("tls://example.com:1", (), None),
        ("tls://EXAMPLE.com:1", (), None),
        ("tls://a.example.com:1", (), None),
        ("tls://notexample.com:1", (), "http://secure:1"),
        ("tls://a.example.org:1", (), None),
        ("tls://10.2.3.4:1", (), None),
        ("tls://11.2.3.4:1", (), "http://secure:1"),
        ("tls://[2001:db8::7]:1", (), None),
        ("tls://[2001:db9::7]:1", (), "http://secure:1"),
        ("tls://host.example:99", (), None),
        ("tls://host.example:98", (), "http://secure:1"),
    ],
)
def test_the_environment_chooses(monkeypatch, address, dropped, expected):
    clean(monkeypatch)
    for name in ENVIRONMENT.keys() - set(dropped):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    chosen = choose_proxy(parse_address(address), None)
    assert (chosen and str(chosen)) == expected
    assert choose_proxy(parse_address(address), "") is None


def clean(monkeypatch) -> None:
    for kind in ("http", "https", "all", "no"):
        for name in (f"{kind}_proxy", f"{kind}_proxy".upper()):
            monkeypatch.delenv(name, raising=False)


def test_everybody_is_an_exception(monkeypatch):
    clean(monkeypatch)
    monkeypatch.setenv("HTTPS_PROXY", "http://secure:1")
    monkeypatch.setenv("NO_PROXY", "*")
    assert choose_proxy(parse_address("tls://a:1"), None) is None


def test_http_proxy_in_capitals_is_a_header_of_cgi(monkeypatch):
    clean(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", "http://evil:1")
    assert choose_proxy(parse_address("http://a"), None) is None


@pytest.mark.parametrize(
    ("proxy", "written"),
    [
        ("http://a:3128", "http://a:3128"),
        ("https://a", "https://a:443"),
        ("a:3128", "http://a:3128"),
        ("a", "http://a:80"),
        ("http://u:s3cret@a:1/", "http://a:1"),
        ("http://u@a:1", "http://a:1"),
        ("http://u:s3cret%40@[::1]:1", "http://[::1]:1"),
    ],
)
def test_proxies(proxy, written):
    chosen = choose_proxy(parse_address("tls://b:1"), proxy)
    assert str(chosen) == written
    assert "s3cret" not in repr(chosen)


@pytest.mark.parametrize(
    "proxy",
    [
        "socks5://u:s3cret@a:1",
        "http://u:s3cret@",
        "http://u:s3cret@a:port",
        "http://u:s3cret@a:99999",
        "http://u:s3cret/x@a:1/b",
        "http://u:s3cret@a:1?q",
        "http://u:s3cret@a\r\nX: y:1",
        "http://u:s3cret@a b:1",
        "http://u:s3cret@[::1",
        "http://u%3A:s3cret@a:1",
        "u:s3cret@:1",
    ],
)
async def test_what_is_no_proxy_is_refused_without_its_password(proxy, monkeypatch):
    with pytest.raises(ValueError, match="proxy=: ") as refused:
        async with druvarpc.connect("tls://b:1", proxy=proxy):
            pass
    clean(monkeypatch)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ValueError, match="the environment's proxy for https: ") as again:
        async with druvarpc.connect("tls://b:1"):
            pass
    for error in (refused.value, again.value):
        assert "s3cret" not in str(error)
        assert error.__cause__ is None
        assert error.__suppress_context__ or error.__context__ is None


async def test_a_unix_socket_has_no_proxy():
    with pytest.raises(ValueError, match="no proxy for a Unix socket"):
        async with druvarpc.connect("unix:///a", proxy="http://a"):
            pass
