import gc
import math
import os
import socket
import struct
from contextlib import aclosing
from functools import partial

import pytest
import trio
from trio.testing import MockClock

import druvarpc
from druvarpc.testing import connected
from tests.io.peers import (
    TCP,
    Calls,
    CancelAt,
    RawPeer,
    Work,
    Workshop,
    endless,
    port_of,
    raw_server,
    serving,
    settled,
)


async def test_leaving_the_block_fails_the_calls_of_other_tasks():
    workshop = Workshop()
    async with serving(workshop) as server, trio.open_nursery() as nursery:
        with trio.fail_after(5):
            async with druvarpc.connect(server.addresses[0]) as client:
                calls = Calls(client)
                calls.start(nursery)
                await workshop.until(lambda: workshop.running == 5)
            await workshop.until(lambda: workshop.running == 0)
            await settled(lambda: len(calls.errors) == 5)
    assert_lost(calls.errors)
    assert workshop.cancelled == 5


def assert_lost(errors: list[BaseException | None]) -> None:
    assert errors
    for error in errors:
        if isinstance(error, ExceptionGroup):
            (error,) = error.exceptions
        assert isinstance(error, druvarpc.ConnectionLost)
        assert not error.not_started, "the server had begun it"


async def test_an_error_in_the_block_leaves_it_as_it_is():
    async with serving(Workshop()) as server:
        with pytest.raises(KeyError, match="mine"):
            async with druvarpc.connect(server.addresses[0]):
                raise KeyError("mine")
        with pytest.raises(ExceptionGroup) as group:
            async with druvarpc.connect(server.addresses[0]):
                raise ExceptionGroup("mine", [KeyError("mine")])
        assert group.value.message == "mine"


async def test_a_cancelled_server_ends_handlers_and_calls():
    workshop = Workshop()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [workshop], TCP)
        async with druvarpc.connect(server.addresses[0]) as client:
            calls = Calls(client)
            async with trio.open_nursery() as callers:
                calls.start(callers)
                await workshop.until(lambda: workshop.running == 5)
                with trio.fail_after(1):
                    nursery.cancel_scope.cancel()
                    await settled(lambda: len(calls.errors) == 5)
            assert_lost(calls.errors)
            assert workshop.cancelled == 5
            await assert_dead(client)
            assert client.statistics().connections == 0


async def assert_dead(client: druvarpc.Client) -> None:
    """Whatever is asked of a client whose connection has ended fails at once, and safely."""
    work = client.stub(Work)

    async def items(call) -> None:
        async with aclosing(call) as stream:
            async for _ in stream:
                pass

    async def club() -> None:
        async with client.club(raise_errors=False) as club:
            reply = club.call(work.echo, b"x")
        _ = reply.value

    for attempt in (
        partial(work.echo, b"x"),
        partial(work.gather, endless()),
        partial(items, work.pour(1, 1)),
        partial(items, work.chat(endless())),
        partial(items, druvarpc.windowed(work.echo, [b"a", b"b"])),
        club,
    ):
        with trio.fail_after(1), pytest.raises(druvarpc.ConnectionLost) as lost:
            await attempt()
        assert lost.value.not_started
    with trio.fail_after(1), pytest.raises(druvarpc.ConnectionLost):
        await client.ping()
    assert client.statistics().calls_active == 0


@pytest.mark.parametrize("how", ["close", "reset", "half-close", "garbage"])
async def test_a_connection_that_ends_fails_its_calls_at_once(how):
    """The client reaches the server by a relay, which breaks."""
    workshop = Workshop()
    broken = trio.Event()
    async with serving(workshop) as server:

        async def relay(peer: RawPeer) -> None:
            there = await trio.open_tcp_stream("127.0.0.1", port_of(server))

            async def forward(source, target) -> None:
                while data := await source.receive_some(65536):
                    await target.send_all(data)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(forward, peer.stream, there)
                nursery.start_soon(forward, there, peer.stream)
                await broken.wait()
                nursery.cancel_scope.cancel()
            if how == "reset":
                peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == "half-close":
                await peer.stream.send_eof()
            elif how == "garbage":
                await peer.send(b"\x7f" * 100)
            with trio.CancelScope(shield=True):
                await there.aclose()
                if how in ("half-close", "garbage"):
                    with trio.move_on_after(3):
                        await ended.wait()
                await peer.stream.aclose()

        ended = trio.Event()
        async with (
            raw_server(relay) as address,
            druvarpc.connect(address) as client,
            trio.open_nursery() as nursery,
        ):
            calls = Calls(client)
            calls.start(nursery)
            await workshop.until(lambda: workshop.running == 5)
            broken.set()
            await settled(lambda: len(calls.errors) == 5, within=0.5)
            await workshop.until(lambda: workshop.running == 0)
            assert_lost(calls.errors)
            await assert_dead(client)
            ended.set()
    assert workshop.cancelled == 5


async def test_the_server_forgets_the_calls_of_a_lost_connection():
    workshop = Workshop()
    async with serving(workshop) as server:
        async with (
            druvarpc.connect(server.addresses[0]) as client,
            trio.open_nursery() as nursery,
        ):
            Calls(client).start(nursery)
            await workshop.until(lambda: workshop.running == 5)
            nursery.cancel_scope.cancel()
            with pytest.raises(RuntimeError):
                raise RuntimeError
        await settled(lambda: server.statistics().connections == 0)
        assert server.statistics().calls_active == 0
        assert server.statistics().calls_started == 5


class Clumsy(Workshop):
    """Whose handlers fail while they are being cancelled."""

    async def hold(self) -> None:
        async def child() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("in the cleanup")

        with self.at_work():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child)
                nursery.start_soon(child)
                nursery.start_soon(trio.sleep_forever)

    async def drip(self):
        with self.at_work():
            try:
                yield b"x"
                await trio.sleep_forever()
            finally:
                raise ValueError("in the cleanup")


async def test_a_handler_that_fails_while_its_connection_ends_harms_nobody(caplog):
    workshop = Clumsy()
    async with serving(workshop) as server:
        async with druvarpc.connect(server.addresses[0]) as bystander:
            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    async with druvarpc.connect(server.addresses[0]) as client:
                        calls = Calls(client)
                        calls.start(nursery)
                        await workshop.until(lambda: workshop.running == 5)
                    await workshop.until(lambda: workshop.running == 0)
            assert await bystander.stub(Work).echo(b"well") == b"well"


async def test_a_handler_that_fails_while_its_call_is_cancelled_harms_nobody(caplog):
    workshop = Clumsy()
    async with connected([workshop]) as client:
        async with trio.open_nursery() as nursery:
            Calls(client).start(nursery)
            await workshop.until(lambda: workshop.running == 5)
            nursery.cancel_scope.cancel()
        await workshop.until(lambda: workshop.running == 0)
        assert await client.stub(Work).echo(b"well") == b"well"


async def test_a_thousand_calls_given_up_in_the_tick_they_began_in():
    async with connected([Workshop()]) as client:
        work = client.stub(Work)
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for _ in range(1000):
                    nursery.start_soon(work.hold)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert await work.echo(b"x") == b"x"


async def test_a_shielded_cleanup_is_waited_for():
    class Careful(Workshop):
        async def hold(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    cleaning.set()
                    await finish.wait()
                cleaned.append(True)

    cleaning, finish, cleaned = trio.Event(), trio.Event(), []
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [Careful()], TCP)
        async with druvarpc.connect(server.addresses[0]) as client:
            with trio.move_on_after(0.05):
                await client.stub(Work).hold()
            await cleaning.wait()
            # It cleans up; others don't wait for that.
            assert await client.stub(Work).echo(b"x") == b"x"
        nursery.cancel_scope.cancel()
        assert not cleaned
        finish.set()
    assert cleaned == [True]


# --- nothing is left ---


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_nothing_is_left_of_two_hundred_connections(kind, tmp_path):
    address = TCP if kind == "tcp" else f"unix://{tmp_path}/socket"
    workshop = Workshop()
    async with serving(workshop, address) as server:
        await trio.testing.wait_all_tasks_blocked()  # all of the server's have begun
        files, living = open_files(), tasks()
        for number in range(200):
            with trio.move_on_after(math.inf) as scope:
                async with druvarpc.connect(server.addresses[0]) as client:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(client.stub(Work).hold)
                        await client.stub(Work).echo(b"x")
                        if number % 2:
                            scope.cancel()
                            await trio.lowlevel.checkpoint()
                        nursery.cancel_scope.cancel()
        await settled(lambda: server.statistics().connections == 0)
        await settled(lambda: tasks() == living)
        assert open_files() == files
        assert server.statistics().calls_active == 0


async def test_nothing_is_left_of_attempts_to_connect():
    async def silent(peer: RawPeer) -> None:
        while await peer.stream.receive_some(1000):
            pass

    async with raw_server(silent) as address:
        files, living = open_files(), tasks()
        for _ in range(10):
            with pytest.raises(druvarpc.ConnectionLost):
                async with druvarpc.connect(address, connect_timeout=0.01):
                    pass
            with trio.move_on_after(0.01):
                async with druvarpc.connect(address):
                    pass
        await settled(lambda: tasks() == living)
        assert open_files() == files


# --- cancelled at every point ---


async def some_of_everything(client: druvarpc.Client) -> None:
    work = client.stub(Work)
    assert await work.echo(b"x" * 100_000) == b"x" * 100_000
    async with client.club() as club:
        first = club.call(work.echo, b"y")
        second = club.call(work.echo, first)
    assert second.value == b"y"

    async def three():
        for _ in range(3):
            yield b"z" * 50_000

    async def many():
        for _ in range(10):
            yield b"z" * 300_000

    assert await work.gather(three()) == 150_000
    # More than there is room for at once, so that senders wait.
    assert await work.gather(many()) == 3_000_000
    async with aclosing(work.pour(10, 300_000)) as items:
        assert [len(item) async for item in items] == [300_000] * 10
    async with aclosing(work.pour(3, 50_000)) as items:
        assert [len(item) async for item in items] == [50_000] * 3
    async with aclosing(work.pour(100, 50_000)) as items:
        async for _ in items:
            break
    async with aclosing(work.chat(three())) as items:
        assert [len(item) async for item in items] == [50_000] * 3
    async with aclosing(druvarpc.windowed(work.echo, [b"1", b"2"])) as results:
        assert [result async for result in results] == [b"1", b"2"]
    async with aclosing(druvarpc.windowed(work.echo, three(), ordered=False)) as results:
        assert [len(result) async for result in results] == [50_000] * 3
    with trio.move_on_after(1) as scope:
        await work.hold()
    assert scope.cancelled_caught
    await client.ping()


@pytest.fixture
def quick_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_calls_may_be_cancelled_at_any_point(quick_clock):
    workshop = Workshop()
    completed = False
    steps = 0
    async with connected([workshop]) as client:
        living = tasks()
        while not completed:
            steps += 1
            with trio.fail_after(100), trio.CancelScope() as scope:
                instrument = CancelAt(scope, steps)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await some_of_everything(client)
                    completed = not scope.cancel_called
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            with trio.fail_after(100):
                assert await client.stub(Work).echo(b"still") == b"still"
                await workshop.until(lambda: workshop.running == 0)
            assert client.statistics().calls_active == 0
            assert client.statistics().connections == 1
        assert tasks() <= living + 8, "a pool of idle workers is all that stays"
    assert steps > 100


async def test_a_connection_may_be_cancelled_at_any_point(tmp_path):
    workshop = Workshop()
    completed = False
    steps = 0
    async with serving(workshop, f"unix://{tmp_path}/socket") as server:
        files, living = open_files(), tasks()
        while not completed:
            steps += 1
            with trio.fail_after(10), trio.CancelScope() as scope:
                instrument = CancelAt(scope, steps)
                trio.lowlevel.add_instrument(instrument)
                try:
                    async with druvarpc.connect(server.addresses[0]) as client:
                        assert await client.stub(Work).echo(b"x") == b"x"
                        async with aclosing(client.stub(Work).pour(2, 1000)) as items:
                            assert len([item async for item in items]) == 2
                    completed = not scope.cancel_called
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            await settled(lambda: server.statistics().connections == 0)
        await settled(lambda: tasks() == living)
        assert open_files() == files
        async with druvarpc.connect(server.addresses[0]) as client:
            assert await client.stub(Work).echo(b"still") == b"still"
    assert steps > 20
