"""Addresses, and the byte streams behind them: TCP, Unix sockets, memory.

A `Transport` carries bytes for one connection. It differs from a trio stream in that `send` takes a
list of buffers, which a socket writes without joining them, and in that nothing in it raises
anything but `trio.BrokenResourceError` and `trio.ClosedResourceError`.
"""

import socket
import stat
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

import trio

from druvarpc.errors import ConnectionLost

Buffer = bytes | bytearray | memoryview

# What is asked of a socket at once: the C library gives larger blocks back to the system on every
# release, which costs more than a second system call.
RECEIVE_SIZE: Final = 64 * 1024
# Below this, joining buffers costs less than handing a list of them to the kernel.
JOIN_SIZE: Final = 16 * 1024
# The kernel takes at most IOV_MAX buffers at once: 1,024 on Linux and macOS.
MAX_BUFFERS: Final = 512
# What a memory transport holds for a reader, like a socket's buffer.
MEMORY_BUFFER: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens.

    Attributes:
        scheme: "tcp" or "unix".
        host: name or number, for tcp.
        port: for tcp; 0 to let the system choose one to listen on.
        path: of the socket, for unix.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address that `text` is.

    Raises:
        ValueError: it is none: the message says what is wrong with it.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    has_more = "?" in text or "#" in text
    if parts.scheme == "unix":
        if parts.netloc or not parts.path or has_more:
            raise ValueError(f"{text!r}: a Unix address is unix:///path")
        return Address("unix", path=parts.path)
    if parts.scheme != "tcp":
        raise ValueError(f"{text!r}: an address is tcp://host:port or unix:///path")
    if not parts.hostname or port is None or parts.path or has_more or "@" in parts.netloc:
        raise ValueError(f"{text!r}: a TCP address is tcp://host:port")
    return Address("tcp", host=parts.hostname, port=port)


class Transport(Protocol):
    """A two-way stream of bytes; one task reads, one writes."""

    @property
    def peer(self) -> str:
        """The other end's address, as far as it is known."""
        ...

    async def receive(self) -> bytes:
        """Return what has come; b"" when the other end has closed.

        Raises:
            trio.BrokenResourceError: the connection is broken.
        """
        ...

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Write all buffers in their order. After cancellation the transport is of no more use.

        Raises:
            trio.BrokenResourceError: the connection is broken.
        """

    async def send_eof(self) -> None:
        """Tell the other end that nothing more comes."""

    def close(self) -> None:
        """Close at once. Twice does no harm."""


class SocketTransport:
    """A connected socket."""

    def __init__(self, stream: trio.SocketStream, peer: str) -> None:
        self.peer = peer
        self._stream = stream
        self._socket = stream.socket

    async def receive(self) -> bytes:
        """See `Transport`."""
        return bytes(await self._stream.receive_some(RECEIVE_SIZE))

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """See `Transport`."""
        if sum(map(len, buffers)) <= JOIN_SIZE or not hasattr(self._socket, "sendmsg"):
            await self._stream.send_all(b"".join(buffers))
            return
        rest = deque(buffers)
        try:
            while rest:
                sent = await self._socket.sendmsg(
                    [rest[i] for i in range(min(len(rest), MAX_BUFFERS))]
                )
                while rest and sent >= len(rest[0]):
                    sent -= len(rest.popleft())
                if sent:
                    rest[0] = memoryview(rest[0])[sent:]
        except OSError as error:
            raise trio.BrokenResourceError(f"socket connection broken: {error}") from error

    async def send_eof(self) -> None:
        """See `Transport`."""
        await self._stream.send_eof()

    def close(self) -> None:
        """See `Transport`."""
        self._socket.close()


class _Pipe:
    """One direction of a memory transport: bytes that one end wrote and the other hasn't read."""

    def __init__(self) -> None:
        self.buffers: deque[bytes] = deque()
        self.size = 0
        self.ended = False
        self.broken = False
        self.changed = trio.lowlevel.ParkingLot()

    def wake(self) -> None:
        self.changed.unpark_all()


class MemoryTransport:
    """One end of a connection within the process; made in pairs by `memory_transports`."""

    peer = "memory"

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    async def receive(self) -> bytes:
        """See `Transport`."""
        await trio.lowlevel.checkpoint()
        pipe = self._incoming
        while not pipe.buffers and not pipe.ended:
            await self._wait(pipe)
        if pipe.broken:
            raise trio.BrokenResourceError("the memory transport was closed")
        data = b"".join(pipe.buffers)
        pipe.buffers.clear()
        pipe.size = 0
        pipe.wake()
        return data

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """See `Transport`."""
        await trio.lowlevel.checkpoint()
        pipe = self._outgoing
        for buffer in buffers:
            while pipe.size >= MEMORY_BUFFER and not pipe.ended:
                await self._wait(pipe)
            if pipe.ended:
                raise trio.BrokenResourceError("the memory transport was closed")
            pipe.buffers.append(bytes(buffer))
            pipe.size += len(buffer)
            pipe.wake()

    async def send_eof(self) -> None:
        """See `Transport`."""
        self._outgoing.ended = True
        self._outgoing.wake()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """See `Transport`."""
        self._outgoing.ended = self._incoming.ended = self._incoming.broken = True
        self._outgoing.wake()
        self._incoming.wake()

    async def _wait(self, pipe: _Pipe) -> None:
        await pipe.changed.park()


def memory_transports() -> tuple[MemoryTransport, MemoryTransport]:
    """Return the two ends of a connection within the process."""
    one, other = _Pipe(), _Pipe()
    return MemoryTransport(one, other), MemoryTransport(other, one)


async def open_transport(address: Address) -> Transport:
    """Connect; for a name with several addresses by Happy Eyeballs (RFC 8305).

    Raises:
        ConnectionLost: nobody answers there; no call has been started.
    """
    try:
        if address.scheme == "unix":
            stream = await trio.open_unix_socket(address.path)
        else:
            stream = await trio.open_tcp_stream(address.host, address.port)
    except (OSError, RuntimeError, UnicodeError) as error:
        raise ConnectionLost(
            f"can't connect to {address}: {_reason(error)}", not_started=True
        ) from error
    return SocketTransport(stream, str(address))


async def open_listeners(address: Address) -> list[trio.SocketListener]:
    """Listen; for a name on all its addresses.

    Raises:
        OSError: that isn't possible.
    """
    if address.scheme == "tcp":
        return await trio.open_tcp_listeners(address.port, host=address.host)
    path = Path(address.path)
    _remove_stale_socket(path)
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await listening.bind(str(path))
        listening.listen(128)
    except BaseException:
        listening.close()
        raise
    return [trio.SocketListener(listening)]


def listening_address(listener: trio.SocketListener) -> Address:
    """Return where a listener listens, with the port that the system chose."""
    name = listener.socket.getsockname()
    if isinstance(name, str):
        return Address("unix", path=name)
    return Address("tcp", host=name[0], port=name[1])


def accepted_transport(stream: trio.SocketStream) -> SocketTransport:
    """Return the transport of a connection that a listener accepted."""
    return SocketTransport(stream, _peer_name(stream.socket))


def remove_socket(address: Address) -> None:
    """Remove the file of a Unix socket that is no longer listened on."""
    if address.scheme == "unix":
        Path(address.path).unlink(missing_ok=True)


def _remove_stale_socket(path: Path) -> None:
    """Remove a socket that a server left behind; one that still answers, and files, stay."""
    with suppress(OSError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a server that is slow to accept would hold us up
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


def _peer_name(connected: trio.socket.SocketType) -> str:
    try:
        name: str | tuple[str, int] = connected.getpeername()[:2]
    except OSError:
        return "unknown"
    if isinstance(name, str):
        return "unix://"
    return str(Address("tcp", host=name[0], port=name[1]))


def _reason(error: BaseException) -> str:
    """Return the first cause that says something: Happy Eyeballs wraps what each attempt met."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cast("BaseExceptionGroup[BaseException]", cause).exceptions[0]
    found = cause if isinstance(cause, OSError) else error
    return getattr(found, "strerror", None) or str(found)
