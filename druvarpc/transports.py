"""The byte streams of connections: TCP, Unix sockets, memory.

A `Transport` carries bytes for one connection. It differs from a trio stream in what a call costs:
`send_nowait` writes a list of buffers, without joining them, from whatever task has them, and
`receive` gives up the task's turn once for each read, not twice. Nothing in it raises anything but
`trio.BrokenResourceError` and `trio.ClosedResourceError`.
"""

import math
import os
import socket
import stat
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol, cast

import trio

from druvarpc.addresses import Address
from druvarpc.errors import ConnectionLost
from druvarpc.peers import Peer, credentials_of
from druvarpc.protocol.connection import WRITE_SIZE
from druvarpc.protocol.outflow import QUANTUM
from druvarpc.tcp import send_buffer, set_congestion_control

Buffer = bytes | bytearray | memoryview

# What is asked of a socket at once: the C library gives larger blocks back to the system on every
# release, which costs more than a second system call.
RECEIVE_SIZE: Final = 64 * 1024
# Below this, joining buffers costs less than handing a list of them to the kernel.
JOIN_SIZE: Final = 16 * 1024
# Seconds between two questions to the kernel whether it has room.
LONGEST_PATIENCE: Final = 0.25
# The kernel takes at most IOV_MAX buffers at once: 1,024 on Linux and macOS.
MAX_BUFFERS: Final = 512
# What is offered to a socket at once is `WRITE_SIZE` at first, `QUANTUM` once the kernel has taken
# less than that, and on a slow link, where what isn't taken delays what comes after it, this:
LEAST_WRITE: Final = 16 * 1024
# What a memory transport holds for a reader, like a socket's buffer.
MEMORY_BUFFER: Final = 256 * 1024
# Seconds that a process leaves a shared socket to others after each connection: longer than they
# take to wake up, and short enough that one alone still accepts 500 connections a second.
TURN: Final = 0.002


class Transport(Protocol):
    """A two-way stream of bytes; one task reads."""

    @property
    def peer(self) -> str:
        """The other end's address, as far as it is known."""
        ...

    @property
    def who(self) -> Peer:
        """All that is known of the other end; `peer` is its address."""
        ...

    @property
    def write_size(self) -> int:
        """Bytes that are worth offering at once; what isn't taken of them can't be overtaken."""
        ...

    def hold_back(self, gentle: bool) -> None:
        """Say whether what is sent should leave the link to others and make no queue there."""
        ...

    async def receive(self) -> bytes:
        """Wait for bytes and return what has come; b"" when the other end has closed.

        Cancelled, it has read nothing.

        Raises:
            trio.BrokenResourceError: the connection is broken.
            trio.ClosedResourceError: this end was closed.
        """
        ...

    def send_nowait(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """Write what there is room for; return the rest, to be sent before anything else.

        Raises:
            trio.BrokenResourceError: the connection is broken.
            trio.ClosedResourceError: this end was closed.
        """
        ...

    async def wait_writable(self) -> None:
        """Wait until there is room again, or the connection is broken; for one task at a time."""

    def has_room(self) -> bool:
        """Whether more should be written now, after what was written has been taken."""
        ...

    def send_eof(self) -> None:
        """Tell the other end that nothing more comes.

        Raises:
            trio.BrokenResourceError: the connection is broken.
            trio.ClosedResourceError: this end was closed.
        """

    def close(self) -> None:
        """Close at once. Twice does no harm."""


class SocketTransport:
    """A connected socket.

    Args:
        stream: the socket, which is this transport's from now on, with the options that trio sets:
            TCP_NODELAY, and little unsent in the kernel (TCP_NOTSENT_LOWAT).
        who: the other end.
    """

    __slots__ = ("_eager", "_send_buffer", "_socket", "_unread", "peer", "who", "write_size")

    def __init__(self, stream: trio.SocketStream, who: Peer) -> None:
        self.peer = who.address
        self.who = who
        # Out of trio's wrapper, whose methods give up the task's turn after each system call.
        self._socket = socket.socket(fileno=stream.socket.detach())
        self._socket.setblocking(False)
        self.write_size = WRITE_SIZE
        self._send_buffer = send_buffer(self._socket)
        self._eager = False  # the last read was a full one: there is more
        self._unread = b""

    def hold_back(self, gentle: bool) -> None:
        """See `Transport`."""
        if self._send_buffer is not None:
            self._send_buffer.gentle = gentle

    async def receive(self) -> bytes:
        """See `Transport`."""
        connected = self._socket
        eager = self._eager
        while True:
            if connected.fileno() < 0:
                raise trio.ClosedResourceError("this end was closed")
            if eager:
                await trio.lowlevel.checkpoint()
                if self._unread:
                    return self._take_unread()
            else:
                await trio.lowlevel.wait_readable(connected)
            try:
                data = connected.recv(RECEIVE_SIZE)
            except BlockingIOError:
                eager = False
            except OSError as error:
                raise self._broken(error) from error
            else:
                self._eager = len(data) == RECEIVE_SIZE
                return data

    def unread(self, data: bytes) -> None:
        """Let the next `receive` return this, which an earlier one has read too much."""
        self._unread = data
        self._eager = self._eager or bool(data)

    def name_peer(self, who: Peer) -> None:
        """Say who is at the other end, of which another than the kernel knows."""
        self.who = who
        self.peer = who.address

    def _take_unread(self) -> bytes:
        data, self._unread = self._unread, b""
        return data

    def send_nowait(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """See `Transport`."""
        rest = buffers
        while rest:
            size = sum(map(len, rest))
            try:
                if size <= JOIN_SIZE or not hasattr(self._socket, "sendmsg"):
                    sent = self._socket.send(rest[0] if len(rest) == 1 else b"".join(rest))
                else:
                    sent = self._socket.sendmsg(rest[:MAX_BUFFERS])
            except BlockingIOError:
                self.write_size = min(self.write_size, QUANTUM)
                return rest
            except OSError as error:
                raise self._broken(error) from error
            if sent == size:
                return ()
            full = len(rest) <= MAX_BUFFERS  # all was offered, and not all taken
            rest = _after(rest, sent)
            if full:
                self.write_size = min(self.write_size, QUANTUM)
                return rest
        return rest

    def has_room(self) -> bool:
        """See `Transport`."""
        return self._send_buffer is not None and self._send_buffer.has_room()

    async def wait_writable(self) -> None:
        """See `Transport`."""
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError("this end was closed")
        buffer = self._send_buffer
        if buffer is None:
            await trio.lowlevel.wait_writable(self._socket)
            return
        patience = buffer.patience
        while True:
            with trio.move_on_after(patience) as scope:
                await trio.lowlevel.wait_writable(self._socket)
            if not scope.cancelled_caught or buffer.has_room():
                break
            # A peer that takes nothing for long is asked about less and less often.
            patience = min(2 * patience, LONGEST_PATIENCE)
        buffer.tune()
        if buffer.patience < math.inf:
            self.write_size = max(LEAST_WRITE, min(buffer.unsent // 2, QUANTUM))

    def send_eof(self) -> None:
        """See `Transport`."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise self._broken(error) from error

    def close(self) -> None:
        """See `Transport`."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def _broken(self, error: OSError) -> Exception:
        if self._socket.fileno() < 0:
            return trio.ClosedResourceError("this end was closed")
        return trio.BrokenResourceError(f"socket connection broken: {error}")


def _after(buffers: Sequence[Buffer], sent: int) -> Sequence[Buffer]:
    """Return what is left of buffers when the first `sent` bytes have gone."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return ()


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
    who = Peer("memory")
    write_size = WRITE_SIZE

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    def hold_back(self, gentle: bool) -> None:
        """See `Transport`."""

    def unread(self, data: bytes) -> None:
        """Let the next `receive` return this first, which an earlier one has read too much."""
        if data:
            self._incoming.buffers.appendleft(data)

    async def receive(self) -> bytes:
        """See `Transport`."""
        await trio.lowlevel.checkpoint()
        pipe = self._incoming
        while not pipe.buffers and not pipe.ended:
            await pipe.changed.park()
        if pipe.broken:
            raise trio.BrokenResourceError("the memory transport was closed")
        data = b"".join(pipe.buffers)
        pipe.buffers.clear()
        pipe.size = 0
        pipe.wake()
        return data

    def send_nowait(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """See `Transport`."""
        pipe = self._outgoing
        for index, buffer in enumerate(buffers):
            if pipe.ended:
                raise trio.BrokenResourceError("the memory transport was closed")
            if pipe.size >= MEMORY_BUFFER:
                return buffers[index:]
            pipe.buffers.append(bytes(buffer))
            pipe.size += len(buffer)
            pipe.wake()
        return ()

    def has_room(self) -> bool:
        """See `Transport`."""
        return self._outgoing.size < MEMORY_BUFFER

    async def wait_writable(self) -> None:
        """See `Transport`."""
        pipe = self._outgoing
        while pipe.size >= MEMORY_BUFFER and not pipe.ended:
            await pipe.changed.park()

    def send_eof(self) -> None:
        """See `Transport`."""
        self._outgoing.ended = True
        self._outgoing.wake()

    def close(self) -> None:
        """See `Transport`."""
        self._outgoing.ended = self._incoming.ended = self._incoming.broken = True
        self._outgoing.wake()
        self._incoming.wake()


def memory_transports() -> tuple[MemoryTransport, MemoryTransport]:
    """Return the two ends of a connection within the process."""
    one, other = _Pipe(), _Pipe()
    return MemoryTransport(one, other), MemoryTransport(other, one)


def check_congestion_control(name: str, addresses: Sequence[Address]) -> None:
    """See to it that sockets for `addresses` can use a congestion control.

    Raises:
        ValueError: they can't.
    """
    if any(address.scheme == "unix" for address in addresses):
        raise ValueError(f"congestion control {name!r}: only TCP has one")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        set_congestion_control(probe, name)


async def open_transport(
    address: Address, congestion_control: str | None = None
) -> SocketTransport:
    """Connect; for a name with several addresses by Happy Eyeballs (RFC 8305).

    Args:
        address: where to.
        congestion_control: that of TCP, see `check_congestion_control`; None for the default.

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
    if congestion_control is not None:
        try:
            set_congestion_control(stream.socket, congestion_control)
        except ValueError as error:  # it was there a moment ago
            stream.socket.close()
            raise ConnectionLost(
                f"can't connect to {address}: {error}", not_started=True
            ) from error
    return SocketTransport(stream, Peer(str(address), None, credentials_of(stream.socket)))


async def open_listeners(
    address: Address, congestion_control: str | None = None
) -> list[trio.SocketListener]:
    """Listen; for a name on all its addresses.

    Args:
        address: where.
        congestion_control: that of TCP for what is accepted; None for the default.

    Raises:
        ValueError: a descriptor is that of something else.
        OSError: that isn't possible.
    """
    if address.fd is not None or address.scheme != "unix":
        if address.fd is not None:
            listeners = [_inherited_listener(address.fd)]
        else:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host)
        if congestion_control is not None:
            for listener in listeners:
                set_congestion_control(listener.socket, congestion_control)
        return listeners
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


def _inherited_listener(fd: int) -> trio.SocketListener:
    """Return a listener on a duplicate of a descriptor, which stays open as its owner's.

    Whether its reads block is told to all that share the socket: they don't from now on.
    """
    duplicate = os.dup(fd)
    try:
        listening = socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise
    try:
        if listening.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            raise ValueError(f"descriptor {fd} is a socket of another kind than TCP and Unix")
        return trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    except ValueError as error:
        listening.close()
        raise ValueError(f"fd://{fd}: {error}") from None


class SharedListener(trio.abc.Listener[trio.SocketStream]):
    """A listener on a socket on which other processes listen, too.

    Who has accepted a connection leaves the next one to others for a moment. Otherwise the process
    that was the first to wake up takes all of a burst, while the others are still on their way.
    """

    def __init__(self, inner: trio.SocketListener) -> None:
        self._inner = inner
        self._again_at = -math.inf

    async def accept(self) -> trio.SocketStream:
        """Wait for a connection; cancelled, it has accepted none."""
        await trio.sleep_until(self._again_at)
        accepted = await self._inner.accept()
        self._again_at = trio.current_time() + TURN
        return accepted

    async def aclose(self) -> None:
        """Close it in this process."""
        await self._inner.aclose()


def listening_address(listener: trio.SocketListener, address: Address) -> Address:
    """Return where a listener for `address` listens, with the port that the system chose."""
    name = listener.socket.getsockname()
    if isinstance(name, str):
        return Address("unix", path=name)
    return replace(address, host=name[0], port=name[1], fd=None)


def accepted_transport(stream: trio.SocketStream) -> SocketTransport:
    """Return the transport of a connection that a listener accepted."""
    who = Peer(_peer_name(stream.socket), None, credentials_of(stream.socket))
    return SocketTransport(stream, who)


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
