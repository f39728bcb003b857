"""When what is to be sent is written, and the clock is set: seen by a client's core in memory."""

import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest
import trio

import druvarpc
from druvarpc.protocol import Connection, Event, Reference, RepliesReceived, Stream
from druvarpc.protocol.frames import pack
from druvarpc.server import Server
from druvarpc.testing import connected
from druvarpc.transports import memory_transports
from tests.io.peers import Work, Workshop, client_on
from tests.io.services import MemoryVault, Vault

QUIET = druvarpc.Limits(keepalive_interval=10_000)


class ByHand:
    """A client's core, whose bytes are carried over memory; data is not read."""

    def __init__(self) -> None:
        self.core = Connection("client", now=trio.current_time(), limits=QUIET)
        self.events: list[tuple[float, Event]] = []
        self._near, self.far = memory_transports()

    def send(self) -> None:
        rest = self._near.send_nowait(self.core.data_to_send(trio.current_time()))
        assert not rest

    async def read(self) -> None:
        while data := await self._near.receive():
            self.core.receive_data(data, trio.current_time())
            while (event := self.core.next_event()) is not None:
                self.events.append((trio.current_time(), event))
            self.send()

    def replied(self) -> list[float]:
        """Return when each of the replies came."""
        return [at for at, event in self.events if isinstance(event, RepliesReceived)]


@asynccontextmanager
async def by_hand(
    workshop: druvarpc.Service, limits: druvarpc.Limits = QUIET
) -> AsyncGenerator[ByHand, None]:
    peer = ByHand()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Server([workshop], limits).serve_transport, peer.far)
        nursery.start_soon(peer.read)
        peer.send()
        await trio.sleep(1)
        yield peer
        nursery.cancel_scope.cancel()


async def test_calls_one_after_the_other_linger_each(autojump_clock):
    clubbing = druvarpc.Clubbing(linger=0.5)
    async with connected([MemoryVault()], clubbing=clubbing) as client:
        for _ in range(4):
            start = trio.current_time()
            await client.stub(Vault).add(1)
            assert trio.current_time() - start == pytest.approx(0.5)


@pytest.mark.parametrize("waiting", [1, 2])
async def test_a_reply_goes_out_while_calls_that_needed_it_block(waiting, autojump_clock):
    seconds = [1, 100, 100]

    class Slow(Workshop):
        async def echo(self, data: bytes) -> bytes:
            await trio.sleep(seconds.pop(0))
            return data

    async with by_hand(Slow()) as peer:
        first = Stream("Work.echo", pack([b"x"]))
        others = [
            Stream("Work.echo", pack([None]), references=(Reference(0, 0),)) for _ in range(waiting)
        ]
        start = trio.current_time()
        peer.core.club([first, *others], 0.0)
        peer.send()
        await trio.sleep(50)
        assert [at - start for at in peer.replied()] == pytest.approx([1])


async def test_a_stream_whose_reader_gives_no_credit_is_given_up_in_time(autojump_clock):
    stopped = []

    class Pouring(Workshop):
        async def pour(self, count: int, size: int) -> AsyncGenerator[bytes, None]:
            try:
                await trio.lowlevel.checkpoint()
                for _ in range(count):
                    yield bytes(size)
            finally:
                stopped.append(trio.current_time())

    limits = druvarpc.Limits(stall_timeout=5, keepalive_interval=10_000)
    async with by_hand(Pouring(), limits) as peer:
        start = trio.current_time()
        peer.core.call(Stream("Work.pour", pack([30, 2**20])), start)
        peer.send()
        await trio.sleep(100)
        assert [at - start for at in stopped] == pytest.approx([5])


async def test_a_server_that_does_not_close_after_a_drain_changes_no_reason(autojump_clock):
    near, far = memory_transports()
    core = Connection("server", now=trio.current_time())

    async def serve() -> None:
        while data := await far.receive():
            core.receive_data(data, trio.current_time())
            while core.next_event() is not None:
                pass
            assert not far.send_nowait(core.data_to_send(trio.current_time()))
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with client_on(near, QUIET, timeout=5) as client:
            core.drain()
            assert not far.send_nowait(core.data_to_send(trio.current_time()))
            for _ in range(2):
                await trio.sleep(5)
                with pytest.raises(druvarpc.ConnectionLost, match="goes away: draining"):
                    await client.stub(Work).echo(b"x")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_cancelled_window_yields_no_more_though_results_are_there(ordered, autojump_clock):
    results = []
    async with connected([MemoryVault()]) as client:
        with trio.CancelScope() as scope:
            calls = druvarpc.windowed(client.stub(Vault).add, range(500), ordered=ordered)
            async with aclosing(calls) as sums:
                async for one in sums:
                    if not results:
                        await trio.sleep(1)
                        scope.cancel()
                    results.append(one)
    assert len(results) == 1


class Interrupt:
    """Raises KeyboardInterrupt by a signal, at a point where a transport writes."""

    def __init__(self, inner: object, raise_signal: Callable[[], None]) -> None:
        self._inner = inner
        self._raise_signal = raise_signal
        self.armed = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def send_nowait(self, buffers):
        if self.armed:
            self.armed = False
            self._raise_signal()
        return self._inner.send_nowait(buffers)


def test_an_interrupt_leaves_no_half_of_a_write_behind():
    answers = []

    async def main() -> None:
        near, far = memory_transports()
        transport = Interrupt(near, lambda: signal.raise_signal(signal.SIGINT))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server([MemoryVault()], QUIET).serve_transport, far)
            async with client_on(transport, QUIET, timeout=5) as client:
                vault = client.stub(Vault)
                for number in range(3):
                    answers.append(await vault.add(number))
                transport.armed = True
                with pytest.raises(KeyboardInterrupt):
                    while True:
                        answers.append(await vault.add(3))
                answers.append(await vault.add(4))
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert answers[-1] == 5


class Full:
    """Takes a first half of a write, then whole writes, but never says that there is room."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.write_size = 16 * 1024
        self.halves = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def send_nowait(self, buffers):
        size = sum(map(len, buffers))
        if size > 8 * 1024 and not self.halves:
            self.halves += 1
            whole = b"".join(buffers)
            self._inner.send_nowait([whole[: size // 2]])
            return [whole[size // 2 :]]
        return self._inner.send_nowait(buffers)

    def has_room(self) -> bool:
        return False

    async def wait_writable(self) -> None:
        if self.halves == 1:
            self.halves += 1
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep_forever()


async def test_a_transport_that_never_has_room_again_is_given_up_in_time(autojump_clock):
    near, far = memory_transports()
    limits = druvarpc.Limits(stall_timeout=5, keepalive_interval=10_000)
    async with trio.open_nursery() as nursery:
        server = Server([Workshop()], druvarpc.Limits())
        nursery.start_soon(server.serve_transport, far)
        async with client_on(Full(near), limits) as client:

            async def pieces() -> AsyncGenerator[bytes, None]:
                while True:
                    yield bytes(16 * 1024)

            start = trio.current_time()
            with pytest.raises(druvarpc.ConnectionLost, match="didn't take"):
                await client.stub(Work).gather(pieces())
            assert trio.current_time() - start == pytest.approx(5)
        nursery.cancel_scope.cancel()
