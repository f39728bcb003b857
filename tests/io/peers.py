"""What these tests talk to: a workshop whose calls last, and peers that send raw bytes."""

import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

import druvarpc
from druvarpc.addresses import parse_address
from druvarpc.client import connect_by
from druvarpc.protocol.frames import (
    CALLS,
    GOAWAY,
    HEADER_SIZE,
    MAX_ID,
    PREFACE,
    RESET,
    Settings,
    decode_reason,
    encode_settings,
    frame,
    pack,
    unpack_header,
)
from druvarpc.transports import Buffer, MemoryTransport, Transport, memory_transports

ROOT = Path(__file__).parents[2]
TCP = "tcp://127.0.0.1:0"


@asynccontextmanager
async def client_on(
    transport: Transport, limits: druvarpc.Limits, timeout: float = 10
) -> AsyncGenerator[druvarpc.Client, None]:
    """A client whose one connection is `transport`."""

    async def dial() -> Transport:
        return transport

    async with connect_by(
        dial, "memory", limits=limits, timeout=timeout, reconnect=False
    ) as client:
        yield client


class Work(druvarpc.Service):
    @druvarpc.rpc
    async def echo(self, data: bytes) -> bytes: ...

    @druvarpc.rpc
    async def hold(self) -> None: ...

    @druvarpc.rpc
    async def fail(self, reason: str) -> None: ...

    @druvarpc.rpc
    async def gather(self, pieces: AsyncIterator[bytes]) -> int: ...

    @druvarpc.rpc
    def pour(self, count: int, size: int) -> AsyncGenerator[bytes, None]: ...

    @druvarpc.rpc
    def drip(self) -> AsyncGenerator[bytes, None]: ...

    @druvarpc.rpc
    def chat(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]: ...


class Workshop(Work):
    """Counts its handlers; `hold` and `drip` end when `release` is set, or when it is cancelled."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.cancelled = 0
        self.finished = 0
        self.release = trio.Event()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._note(running=1)
        try:
            yield
        except (trio.Cancelled, GeneratorExit):
            self._note(cancelled=1)
            raise
        else:
            self._note(finished=1)
        finally:
            self._note(running=-1)

    def _note(self, running: int = 0, cancelled: int = 0, finished: int = 0) -> None:
        self.running += running
        self.most = max(self.most, self.running)
        self.cancelled += cancelled
        self.finished += finished
        self._changed.set()
        self._changed = trio.Event()

    async def echo(self, data: bytes) -> bytes:
        with self.at_work():
            return data

    async def hold(self) -> None:
        with self.at_work():
            await self.release.wait()

    async def fail(self, reason: str) -> None:
        raise ValueError(reason)

    async def gather(self, pieces: AsyncIterator[bytes]) -> int:
        with self.at_work():
            total = 0
            async for piece in pieces:
                total += len(piece)
            return total

    async def pour(self, count: int, size: int) -> AsyncGenerator[bytes, None]:
        with self.at_work():
            for _ in range(count):
                yield bytes(size)

    async def drip(self) -> AsyncGenerator[bytes, None]:
        with self.at_work():
            yield b"drop"
            await self.release.wait()
            yield b"drop"

    async def chat(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        with self.at_work():
            async for piece in pieces:
                yield piece


@asynccontextmanager
async def serving(
    service: druvarpc.Service, *addresses: str, **options: Any
) -> AsyncGenerator[druvarpc.Server, None]:
    """A server for the time of a block."""
    async with trio.open_nursery() as nursery:
        start = partial(druvarpc.serve, [service], *(addresses or (TCP,)), **options)
        server: druvarpc.Server = await nursery.start(start)
        yield server
        nursery.cancel_scope.cancel()


async def endless() -> AsyncGenerator[bytes, None]:
    """A stream that begins and doesn't go on."""
    yield b"first"
    await trio.sleep_forever()


async def settled(condition: Callable[[], bool], within: float = 5) -> None:
    """Wait for what no event tells of."""
    with trio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - sockets and other processes set no events
            await trio.sleep(0.001)


class Calls:
    """Calls of all cardinalities that last, each with what it ended with."""

    def __init__(self, client: druvarpc.Client) -> None:
        self._client = client
        self._work = client.stub(Work)
        self.errors: list[BaseException | None] = []

    def start(self, nursery: trio.Nursery) -> None:
        for call in (self._work.hold, self._gather, self._drip, self._chat, self._club):
            nursery.start_soon(self._note, partial(call))

    async def _note(self, call: Callable[[], Any]) -> None:
        try:
            await call()
        except Exception as error:
            self.errors.append(error)
        else:
            self.errors.append(None)

    async def _gather(self) -> None:
        await self._work.gather(endless())

    async def _drip(self) -> None:
        async for _ in self._work.drip():
            pass

    async def _chat(self) -> None:
        async for _ in self._work.chat(endless()):
            pass

    async def _club(self) -> None:
        async with self._client.club() as club:
            club.call(self._work.hold)


# --- raw peers ---

HELLO = PREFACE + encode_settings(Settings())


def call(id: int, method: str | int, *arguments: object, flags: int = 0) -> bytes:
    return frame(CALLS, pack([[method, flags, pack(arguments)]]), id=id)


def reset(id: int) -> bytes:
    return frame(RESET, pack([1]), id=id)


@dataclass(frozen=True)
class Seen:
    kind: int
    flags: int
    id: int
    body: bytes

    @property
    def reason(self) -> tuple[int, str]:
        assert self.kind == GOAWAY
        return decode_reason(self.body, "GOAWAY")


class RawPeer:
    """One end of a TCP connection that the test writes by hand."""

    def __init__(self, stream: trio.SocketStream, received: bytes = b"") -> None:
        self.stream = stream
        self._input = bytearray(received)
        self._greeted = False

    async def send(self, data: bytes) -> bool:
        """Send; False if the other end has closed."""
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError:
            return False
        return True

    async def next(self) -> Seen | None:
        """Return the next frame, None at the end."""
        while True:
            if not self._greeted and len(self._input) >= len(PREFACE):
                assert self._input.startswith(PREFACE)
                del self._input[: len(PREFACE)]
                self._greeted = True
            if self._greeted and len(self._input) >= HEADER_SIZE:
                head, tail = unpack_header(self._input)
                end = HEADER_SIZE + (head & 0xFFFFFF)
                if len(self._input) >= end:
                    body = bytes(self._input[HEADER_SIZE:end])
                    del self._input[:end]
                    return Seen(head >> 24, tail >> 56, tail & MAX_ID, body)
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return None
            self._input += data

    async def until(self, kind: int) -> Seen:
        while (seen := await self.next()) is not None:
            if seen.kind == kind:
                return seen
        raise AssertionError(f"no frame {kind:#x} came")

    async def last(self) -> Seen:
        """Return the last frame before the end."""
        last = None
        while (seen := await self.next()) is not None:
            last = seen
        assert last is not None
        return last


def port_of(server: druvarpc.Server) -> int:
    return parse_address(server.addresses[0]).port


@asynccontextmanager
async def raw_client(
    server: druvarpc.Server, hello: bytes = HELLO
) -> AsyncGenerator[RawPeer, None]:
    async with await trio.open_tcp_stream("127.0.0.1", port_of(server)) as stream:
        peer = RawPeer(stream)
        await peer.send(hello)
        yield peer


@asynccontextmanager
async def raw_server(handler: Callable[[RawPeer], Any]) -> AsyncGenerator[str, None]:
    """Yield the address of a listener that gives each connection to `handler`."""

    async def handle(stream: trio.SocketStream) -> None:
        await handler(RawPeer(stream))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        yield f"tcp://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


class Vanishing:
    """One end of a connection in memory that can go away without a word."""

    def __init__(self, inner: MemoryTransport) -> None:
        self.who = druvarpc.Peer("vanishing")
        self.peer = self.who.address
        self.write_size = inner.write_size
        self.gone = False
        self._inner = inner

    def has_room(self) -> bool:
        return self._inner.has_room()

    def hold_back(self, gentle: bool) -> None:
        self._inner.hold_back(gentle)

    async def receive(self) -> bytes:
        data = await self._inner.receive()
        if self.gone:
            await trio.sleep_forever()
        return data

    def send_nowait(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        return () if self.gone else self._inner.send_nowait(buffers)

    async def wait_writable(self) -> None:
        await self._inner.wait_writable()

    def send_eof(self) -> None:
        if not self.gone:
            self._inner.send_eof()

    def close(self) -> None:
        if not self.gone:
            self._inner.close()


def vanishing_pair() -> tuple[Vanishing, Vanishing]:
    near, far = memory_transports()
    return Vanishing(near), Vanishing(far)


# --- bytes ---


def buffers_of_all_sizes() -> list[Buffer]:
    sizes = [0, 1, 7, 1000, 0, 0, 70_000, 3] * 200 + [3_000_000, 0]
    kinds = (bytes, bytearray, lambda data: memoryview(bytearray(data)))
    return [kinds[i % 3](bytes([i % 251]) * size) for i, size in enumerate(sizes)]


async def send_all(transport: Transport, buffers: Sequence[Buffer]) -> None:
    while buffers := transport.send_nowait(buffers):
        await transport.wait_writable()


async def carried(sender: Transport, receiver: Transport, buffers: Sequence[Buffer]) -> bytes:
    """Return what the receiver gets when the sender sends these and its end."""
    received = bytearray()

    async def receive() -> None:
        while data := await receiver.receive():
            received.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await send_all(sender, buffers)
        sender.send_eof()
    return bytes(received)


# --- processes ---


@asynccontextmanager
async def process(module: str, *arguments: str) -> AsyncGenerator[trio.Process, None]:
    """Run a module of these tests; it is killed in the end."""
    started = await trio.lowlevel.open_process(
        [sys.executable, "-X", "dev", "-W", "error", "-m", f"tests.io.{module}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()
        await started.stdout.aclose()
        await started.stderr.aclose()


async def line_of(started: trio.Process) -> str:
    """Return the next line that a process prints."""
    line = b""
    with trio.fail_after(20):
        while not line.endswith(b"\n"):
            more = await started.stdout.receive_some(1)
            assert more, (await started.stderr.receive_some(65536)).decode()
            line += more
    return line.decode().strip()


# --- cancelled at every point ---


class CancelAt(trio.abc.Instrument):
    """Cancels a scope before the n-th step that any task takes."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self._scope = scope
        self._left = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self._scope.cancel()
