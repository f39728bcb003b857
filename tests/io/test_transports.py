import os
import socket
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

import druvarpc
from druvarpc.addresses import Address, parse_address
from druvarpc.protocol.frames import PREFACE
from druvarpc.transports import accepted_transport, memory_transports, open_transport
from tests.io.peers import (
    TCP,
    RawPeer,
    Work,
    Workshop,
    buffers_of_all_sizes,
    carried,
    port_of,
    raw_server,
    serving,
)


async def answers(address: str) -> bool:
    async with druvarpc.connect(address) as client:
        return await client.stub(Work).echo(b"x") == b"x"


# --- addresses ---


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("", "an address is tcp://host:port, tls://host:port, http://host"),
        ("localhost:7420", "an address is"),
        ("127.0.0.1:7420", "an address is"),
        ("udp://localhost:7420", "an address is"),
        ("tcp://localhost", "a TCP address is tcp://host:port"),
        ("tcp://:7420", "a TCP address is tcp://host:port"),
        ("tcp://localhost:7420/path", "a TCP address is"),
        ("tcp://localhost:7420?x=1", "a TCP address is"),
        ("tcp://localhost:7420#x", "a TCP address is"),
        ("tcp://me:secret@localhost:7420", "a TCP address is"),
        ("tcp://localhost:70000", "[Pp]ort"),
        ("tcp://localhost:http", "[Pp]ort"),
        ("tcp://[::1:7420", "IPv6"),
        ("tcp://::1:7420", "[Pp]ort|brackets|a TCP address is"),
        ("tcp://a b:7420", "no spaces"),
        ("tcp://a\r\nX: y:7420", "no spaces"),
        ("tcp://a\tb:7420", "no spaces"),
        ("tcp://a\0:7420", "no spaces"),
        ("tcp://[::1%25x/y]:7420", "a TCP address is|IP"),
        ("tcp://a%0d%0a:7420", "a TCP address is"),
        ("tls://localhost", "an address of tls is tls://host:port"),
        ("tls://localhost:1/path", "an address of tls is"),
        ("http://", "an address of http is http://host, "),
        ("http://me:secret@localhost", "an address of http is"),
        ("https://localhost/a?b", "an address of https is"),
        ("https://localhost/\u00e4", "an address of https is"),
        ("https://local\\host", "an address of https is"),
        ("unix://relative/path", "a Unix address is unix:///path"),
        ("unix://", "a Unix address is"),
        ("unix:///a?b", "a Unix address is"),
        ("unix:///a#b", "a Unix address is"),
        ("unix:///a\0b", "a Unix address is"),
        ("fd://", "an inherited socket is fd://number"),
        ("fd://x", "an inherited socket is"),
        ("fd://-1", "an inherited socket is"),
        ("fd://3:4", "an inherited socket is"),
        ("fd+unix://3", "an inherited socket is"),
        ("fd+ftp://3", "an inherited socket is"),
        ("fd://3/path", "only fd\\+http://number and fd\\+https://number have a path"),
        ("fd+tls://3/path", "only fd\\+http"),
        ("fd+http://3/a b", "only fd\\+http|no spaces"),
    ],
)
async def test_an_address_that_is_none_is_refused_with_what_is_wrong(address, complaint):
    with pytest.raises(ValueError, match=complaint) as refused:
        async with druvarpc.connect(address):
            pass
    assert repr(address) in str(refused.value)
    with trio.fail_after(1), pytest.raises(ValueError, match=complaint):
        await druvarpc.serve([Workshop()], address)


@pytest.mark.parametrize(
    ("text", "address", "written"),
    [
        ("tcp://a:1", Address("tcp", "a", 1), "tcp://a:1"),
        ("tls://[::1]:0", Address("tls", "::1", 0), "tls://[::1]:0"),
        ("http://a", Address("http", "a", 80), "http://a:80"),
        ("https://a/", Address("https", "a", 443), "https://a:443"),
        ("https://a_b-c.de:8/rpc/x", Address("https", "a_b-c.de", 8, "/rpc/x"), None),
        ("http://b\u00fccher.example:80", Address("http", "b\u00fccher.example", 80), None),
        ("unix:///a b", Address("unix", path="/a b"), None),
        ("fd://3", Address("tcp", fd=3), None),
        ("fd+tcp://3", Address("tcp", fd=3), "fd://3"),
        ("fd+tls://17", Address("tls", fd=17), None),
        ("fd+http://3/rpc", Address("http", path="/rpc", fd=3), None),
        ("fd+https://3/", Address("https", fd=3), "fd+https://3"),
    ],
)
def test_addresses(text, address, written):
    assert parse_address(text) == address
    assert str(address) == (written or text)
    assert parse_address(str(address)) == address


async def test_a_server_needs_an_address():
    with pytest.raises(ValueError, match="needs an address"):
        await druvarpc.serve([Workshop()])


async def test_ipv6_stands_in_brackets():
    try:
        async with serving(Workshop(), "tcp://[::1]:0") as server:
            assert server.addresses[0].startswith("tcp://[::1]:")
            assert await answers(server.addresses[0])
    except* OSError:
        pytest.skip("no IPv6 here")


async def test_a_server_listens_on_several_addresses(tmp_path):
    async with serving(Workshop(), TCP, TCP, f"unix://{tmp_path}/socket") as server:
        assert len(set(server.addresses)) == 3
        assert not any(address.endswith(":0") for address in server.addresses)
        for address in server.addresses:
            assert await answers(address)


# --- inherited sockets ---


async def test_a_socket_that_listens_already():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        expected = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        for _ in range(2):  # the server's end leaves it as it was
            async with serving(Workshop(), f"fd://{listening.fileno()}") as server:
                assert server.addresses == [expected]
                assert await answers(expected)
        async with serving(Workshop(), f"fd+http://{listening.fileno()}/rpc") as server:
            assert server.addresses == [f"http{expected.removeprefix('tcp')}/rpc"]
            assert await answers(server.addresses[0])


async def test_an_inherited_unix_socket_keeps_its_file(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        async with serving(Workshop(), f"fd://{listening.fileno()}") as server:
            assert server.addresses == [f"unix://{path}"]
            assert await answers(server.addresses[0])
            await server.drain()
        assert path.exists()
        async with serving(Workshop(), f"fd://{listening.fileno()}") as server:
            assert await answers(server.addresses[0])


async def test_what_is_no_listening_socket_is_refused(tmp_path):
    with socket.socket() as idle, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        for one in (idle, datagrams):
            with pytest.raises(ValueError, match=f"^fd://{one.fileno()}: "):
                await druvarpc.serve([Workshop()], f"fd://{one.fileno()}")
            assert one.fileno() >= 0
            one.getsockname()
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(OSError, match=r"[Ss]ocket"):
            await druvarpc.serve([Workshop()], f"fd://{file.fileno()}")
    with pytest.raises(OSError, match=r"[Dd]escriptor"):
        await druvarpc.serve([Workshop()], "fd://999999")


async def test_clients_connect_to_no_descriptor():
    with pytest.raises(ValueError, match="for servers to listen on"):
        async with druvarpc.connect("fd://3"):
            pass


# --- Unix sockets ---


async def test_a_socket_file_is_there_while_the_server_is(tmp_path):
    path = tmp_path / "socket"
    async with serving(Workshop(), f"unix://{path}") as server:
        assert server.addresses == [f"unix://{path}"]
        assert stat.S_ISSOCK(path.lstat().st_mode)
    assert not path.exists()


def leave_a_socket_behind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as forgotten:
        forgotten.bind(str(path))


async def test_a_socket_that_a_server_left_behind_is_replaced(tmp_path):
    leave_a_socket_behind(tmp_path / "socket")
    async with serving(Workshop(), f"unix://{tmp_path}/socket") as server:
        assert await answers(server.addresses[0])


async def test_a_socket_that_is_listened_on_is_not_taken_over(tmp_path):
    address = f"unix://{tmp_path}/socket"
    async with serving(Workshop(), address):
        with pytest.raises(OSError, match="in use"):
            await druvarpc.serve([Workshop()], address)
        assert await answers(address)


async def test_a_socket_whose_server_is_too_busy_to_accept_is_not_taken_over(tmp_path):
    path = tmp_path / "socket"
    with ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(path))
        busy.listen(0)
        for _ in range(10):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect_ex(str(path))
        with trio.fail_after(5), pytest.raises(OSError, match="in use"):
            await druvarpc.serve([Workshop()], f"unix://{path}")
        assert path.exists()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="in use"):
        await druvarpc.serve([Workshop()], f"unix://{path}")
    assert path.read_text() == "data"


async def test_a_server_that_cannot_listen_everywhere_listens_nowhere(tmp_path):
    async with serving(Workshop()) as other:
        with pytest.raises(OSError, match="in use"):
            await druvarpc.serve([Workshop()], f"unix://{tmp_path}/socket", other.addresses[0])
    assert not (tmp_path / "socket").exists()


async def test_a_draining_server_leaves_the_socket_of_its_successor_alone(tmp_path):
    address = f"unix://{tmp_path}/socket"
    old = Workshop()
    async with trio.open_nursery() as nursery:
        first = await nursery.start(druvarpc.serve, [old], address)
        async with druvarpc.connect(address) as client:
            nursery.start_soon(client.stub(Work).hold)
            await old.until(lambda: old.running == 1)
            nursery.start_soon(first.drain)
            with pytest.raises(druvarpc.ConnectionLost):
                while True:
                    await answers(address)
            async with serving(Workshop(), address):
                old.release.set()
                await old.until(lambda: old.running == 0)
                with trio.fail_after(5):
                    await first.drain()
                assert await answers(address)


async def test_a_server_that_ends_slowly_leaves_the_socket_of_its_successor_alone(tmp_path):
    class Slow(Workshop):
        async def hold(self) -> None:
            with self.at_work(), trio.CancelScope(shield=True):
                await self.release.wait()

    address = f"unix://{tmp_path}/socket"
    slow = Slow()
    async with trio.open_nursery() as nursery:
        first = await nursery.start(druvarpc.serve, [slow], address)
        with trio.move_on_after(0.05):
            async with druvarpc.connect(first.addresses[0]) as client:
                await client.stub(Work).hold()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
            async with serving(Workshop(), address):
                slow.release.set()
                await trio.testing.wait_all_tasks_blocked()
                assert await answers(address)


async def test_the_kernel_vouches_for_who_connects(tmp_path):
    ends = [accepted_transport(trio.SocketStream(end)) for end in trio.socket.socketpair()]
    for transport in ends:
        assert transport.who == druvarpc.Peer(
            "unix://",
            credentials=druvarpc.UnixCredentials(os.getpid(), os.getuid(), os.getgid()),
        )
        transport.close()
    async with serving(Workshop()) as server:
        transport = await open_transport(parse_address(server.addresses[0]))
        assert transport.who == druvarpc.Peer(server.addresses[0])
        transport.close()


# --- connecting ---


class Names(trio.abc.HostnameResolver):
    """A name server of one name."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))
            for address in self._addresses
        ]

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


async def test_a_name_is_reached_by_the_address_that_answers():
    async with serving(Workshop()) as server:
        trio.socket.set_custom_hostname_resolver(Names("127.0.0.9", "127.0.0.8", "127.0.0.1"))
        assert await answers(f"tcp://service.example:{port_of(server)}")


async def test_a_name_whose_addresses_all_refuse():
    async with serving(Workshop()) as server:
        trio.socket.set_custom_hostname_resolver(Names("127.0.0.9", "127.0.0.8"))
        address = f"tcp://service.example:{port_of(server)}"
        with pytest.raises(druvarpc.ConnectionLost, match="refused") as lost:
            await answers(address)
    assert address in lost.value.message


def deaf_listener(stack: ExitStack) -> str:
    """A listener whose queue is full: the kernel answers no more connections."""
    listener = stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    for _ in range(3):
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(listener.getsockname())
    return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


async def refused(address: str, **options: float) -> druvarpc.ConnectionLost:
    """Return why a connection isn't made."""
    with trio.fail_after(3), pytest.raises(druvarpc.ConnectionLost) as lost:
        async with druvarpc.connect(address, **options):
            pass
    assert lost.value.not_started
    assert lost.value.status is druvarpc.Status.UNAVAILABLE
    assert address in lost.value.message
    return lost.value


async def test_nobody_listens(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert "refused" in (await refused(f"tcp://127.0.0.1:{port}")).message
    assert "No such file" in (await refused(f"unix://{tmp_path}/nothing")).message
    leave_a_socket_behind(tmp_path / "stale")
    assert "refused" in (await refused(f"unix://{tmp_path}/stale")).message


async def test_nobody_answers():
    with ExitStack() as stack:
        address = deaf_listener(stack)
        assert "within 0.2 s" in (await refused(address, connect_timeout=0.2)).message


async def silent(peer: RawPeer) -> None:
    await trio.sleep_forever()


async def test_a_listener_that_says_nothing():
    async with raw_server(silent) as address:
        assert "within 0.2 s" in (await refused(address, connect_timeout=0.2)).message


async def test_a_listener_that_says_hello_and_nothing_more():
    async def hello(peer: RawPeer) -> None:
        await peer.send(PREFACE)
        await trio.sleep_forever()

    async with raw_server(hello) as address:
        assert "within 0.2 s" in (await refused(address, connect_timeout=0.2)).message


async def test_a_listener_that_closes():
    async def close(peer: RawPeer) -> None:
        await peer.stream.aclose()

    async with raw_server(close) as address:
        assert "clos" in (await refused(address)).message


async def test_a_web_server():
    async def http(peer: RawPeer) -> None:
        await peer.stream.receive_some(1000)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        await silent(peer)

    async with raw_server(http) as address:
        assert "not a druvarpc" in (await refused(address)).message


async def test_no_time_to_connect():
    async with serving(Workshop()) as server:
        assert "within 0 s" in (await refused(server.addresses[0], connect_timeout=0)).message


# --- bytes ---


async def test_buffers_of_all_sizes_cross_a_socket_that_takes_little_at_a_time():
    sockets = trio.socket.socketpair()
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
    near, far = (accepted_transport(trio.SocketStream(end)) for end in sockets)
    buffers = buffers_of_all_sizes()
    assert not near.send_nowait([])
    assert not near.send_nowait([b"", b""])
    assert await carried(near, far, buffers) == b"".join(buffers)
    assert not far.send_nowait([b"the", b"", b" end"])
    far.close()
    assert await near.receive() == b"the end"
    assert await near.receive() == b""
    near.close()
    near.close()


async def test_a_closed_socket_transport_says_so_and_wakes_who_waits():
    sockets = trio.socket.socketpair()
    near, far = (accepted_transport(trio.SocketStream(end)) for end in sockets)

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await near.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        near.close()
    for use in (near.receive, near.wait_writable):
        with pytest.raises(trio.ClosedResourceError):
            await use()
    with pytest.raises(trio.ClosedResourceError):
        near.send_nowait([b"x"])
    with pytest.raises(trio.ClosedResourceError):
        near.send_eof()
    assert await far.receive() == b""
    far.close()


async def test_a_transport_whose_peer_is_gone_is_broken():
    sockets = trio.socket.socketpair()
    near, far = (accepted_transport(trio.SocketStream(end)) for end in sockets)
    far.send_nowait([b"unread"])
    near.send_nowait([b"unread"])
    far.close()
    with pytest.raises(trio.BrokenResourceError):
        while True:
            near.send_nowait([b"x"])
    near.close()


async def test_buffers_of_all_sizes_cross_memory():
    buffers = buffers_of_all_sizes()
    near, far = memory_transports()
    assert await carried(near, far, buffers) == b"".join(buffers)


@pytest.mark.parametrize("end", [0, 1])
async def test_a_closed_memory_transport_is_broken_for_both(end):
    ends = memory_transports()
    ends[end].close()
    for transport in ends:
        with pytest.raises(trio.BrokenResourceError):
            transport.send_nowait([b"x"])
    with pytest.raises(trio.BrokenResourceError):
        await ends[end].receive()
    assert await ends[1 - end].receive() == b""
