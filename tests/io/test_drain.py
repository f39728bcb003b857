import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import pytest
import trio

import druvarpc
from druvarpc.protocol.frames import GOAWAY
from tests.io.peers import HELLO, TCP, Work, Workshop, raw_client, serving, settled


async def refused(work: Work) -> None:
    """A call on a draining connection fails in a way that says that it may be sent elsewhere."""
    with trio.fail_after(1), pytest.raises(druvarpc.ConnectionLost) as lost:
        await work.echo(b"late")
    assert lost.value.status is druvarpc.Status.UNAVAILABLE
    assert lost.value.not_started
    assert "drain" in lost.value.message


async def test_accepted_calls_finish_and_later_ones_are_refused():
    workshop = Workshop()
    results = []
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [workshop], TCP)
        async with druvarpc.connect(server.addresses[0], reconnect=False) as client:
            work = client.stub(Work)
            ready, go_on = trio.Event(), trio.Event()

            async def pieces():
                yield b"before"
                ready.set()
                await go_on.wait()
                yield b"after"

            async def collect(call) -> None:
                async with aclosing(call) as items:
                    results.append([bytes(item) async for item in items])

            async def gather() -> None:
                results.append(await work.gather(pieces()))

            async def hold() -> None:
                results.append(await work.hold())

            async with trio.open_nursery() as callers:
                callers.start_soon(collect, work.drip())
                callers.start_soon(collect, work.chat(pieces()))
                callers.start_soon(gather)
                callers.start_soon(hold)
                await workshop.until(lambda: workshop.running == 4)
                await ready.wait()
                callers.start_soon(server.drain)
                await client.ping()
                await refused(work)
                with pytest.raises(druvarpc.ConnectionLost, match="refused"):
                    async with druvarpc.connect(server.addresses[0]):
                        pass
                assert not results
                workshop.release.set()
                go_on.set()
                callers.cancel_scope.deadline = trio.current_time() + 1
            assert not callers.cancel_scope.cancelled_caught
            await refused(work)
        nursery.cancel_scope.deadline = trio.current_time() + 1
    assert not nursery.cancel_scope.cancelled_caught, "serve returned by itself"
    assert len(results) == 4
    assert [b"drop", b"drop"] in results
    assert [b"before", b"after"] in results
    assert len(b"beforeafter") in results
    assert workshop.cancelled == 0
    assert server.statistics().calls_active == 0


async def test_a_drain_without_calls_takes_no_time():
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        server = await nursery.start(druvarpc.serve, [Workshop()], TCP)
        async with (
            druvarpc.connect(server.addresses[0], reconnect=False) as one,
            druvarpc.connect(server.addresses[0], reconnect=False) as other,
        ):
            assert await one.stub(Work).echo(b"x") == b"x"
            await server.drain()
            await refused(one.stub(Work))
            await refused(other.stub(Work))
    assert not nursery.cancel_scope.cancelled_caught


async def test_a_drain_without_connections():
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        server = await nursery.start(druvarpc.serve, [Workshop()], TCP)
        await server.drain()
        await server.drain()
    assert not nursery.cancel_scope.cancelled_caught


async def test_a_drain_that_takes_too_long_cancels_what_still_runs():
    workshop = Workshop()
    failed = []
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [workshop], TCP)
        async with druvarpc.connect(server.addresses[0]) as client:

            async def hold() -> None:
                with pytest.raises(druvarpc.ConnectionLost) as lost:
                    await client.stub(Work).hold()
                failed.append(lost.value)

            nursery.start_soon(hold)
            await workshop.until(lambda: workshop.running == 1)
            with trio.fail_after(1):
                await server.drain(timeout=0.05)
            await settled(lambda: len(failed) == 1)
            assert workshop.cancelled == 1
    assert not failed[0].not_started
    assert "time for draining is up" in failed[0].message


async def test_drained_by_two_at_once():
    workshop = Workshop()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [workshop], TCP)
        async with druvarpc.connect(server.addresses[0]) as client:
            with trio.fail_after(2):
                async with trio.open_nursery() as drains:
                    drains.start_soon(client.stub(Work).hold)
                    await workshop.until(lambda: workshop.running == 1)
                    drains.start_soon(server.drain)
                    drains.start_soon(server.drain)
                    await client.ping()
                    workshop.release.set()
    assert workshop.finished == 1


async def test_a_cancelled_drain_leaves_the_server_draining():
    workshop = Workshop()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [workshop], TCP)
        async with druvarpc.connect(server.addresses[0], reconnect=False) as client:
            nursery.start_soon(client.stub(Work).hold)
            await workshop.until(lambda: workshop.running == 1)
            with trio.move_on_after(0.01) as scope:
                await server.drain()
            assert scope.cancelled_caught
            await refused(client.stub(Work))
            assert workshop.running == 1
            workshop.release.set()
            with trio.fail_after(1):
                await server.drain()
    assert workshop.finished == 1


async def test_a_server_cancelled_while_it_drains():
    workshop = Workshop()
    drained = trio.Event()
    async with trio.open_nursery() as outside:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(druvarpc.serve, [workshop], TCP)
            async with druvarpc.connect(server.addresses[0]) as client:

                async def hold() -> None:
                    with pytest.raises(druvarpc.ConnectionLost):
                        await client.stub(Work).hold()

                async def drain() -> None:
                    await server.drain()
                    drained.set()

                outside.start_soon(hold)
                await workshop.until(lambda: workshop.running == 1)
                outside.start_soon(drain)
                await client.ping()
                nursery.cancel_scope.cancel()
        with trio.fail_after(1):
            await drained.wait()
    assert workshop.cancelled == 1


@pytest.mark.parametrize("direction", ["argument", "result", "stream"])
async def test_megabytes_under_way_arrive(direction):
    size = 12_000_000
    workshop = Workshop()
    done = []
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [workshop], TCP)
        async with druvarpc.connect(server.addresses[0]) as client:
            work = client.stub(Work)

            async def large() -> None:
                if direction == "stream":
                    async with aclosing(work.pour(100, size // 100)) as items:
                        done.append(sum([len(item) async for item in items]))
                else:
                    done.append(len(await work.echo(bytes(size))))

            async with trio.open_nursery() as callers:
                callers.start_soon(large)
                seen = server.statistics
                if direction == "argument":
                    await settled(lambda: seen().bytes_received > 200_000)
                    assert seen().bytes_received < size
                else:
                    await settled(lambda: seen().bytes_sent > 200_000)
                    assert seen().bytes_sent < size
                with trio.fail_after(5):
                    await server.drain()
    assert done == [size]


async def test_no_call_is_lost_or_in_doubt_when_a_busy_server_drains():
    handled = []
    outcomes = []
    in_doubt = []

    class Counting(Workshop):
        async def echo(self, data: bytes) -> bytes:
            handled.append(data)
            await trio.lowlevel.checkpoint()
            return data

    async def call_until_refused(work: Work, number: int) -> None:
        count = 0
        while True:
            count += 1
            data = b"%d.%d" % (number, count)
            try:
                outcomes.append(await work.echo(data))
            except druvarpc.ConnectionLost as error:
                in_doubt.append(not error.not_started)
                return

    async def be_a_client(address: str, first: int) -> None:
        async with druvarpc.connect(address) as client, trio.open_nursery() as callers:
            for number in range(20):
                callers.start_soon(call_until_refused, client.stub(Work), first + number)

    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [Counting()], TCP)
        with trio.fail_after(10):
            async with trio.open_nursery() as clients:
                for first in range(0, 100, 20):
                    clients.start_soon(be_a_client, server.addresses[0], first)
                await settled(lambda: len(outcomes) > 1000)
                await server.drain()
    assert sorted(handled) == sorted(outcomes)
    assert len(in_doubt) == 100
    assert not any(in_doubt)


async def test_a_server_can_be_served_again_on_the_same_address():
    workshop = Workshop()
    async with trio.open_nursery() as nursery:
        first = await nursery.start(druvarpc.serve, [workshop], TCP)
        async with druvarpc.connect(first.addresses[0]) as client:
            nursery.start_soon(client.stub(Work).hold)
            await workshop.until(lambda: workshop.running == 1)
            nursery.start_soon(partial(first.drain, timeout=5))
            await client.ping()
            async with (
                serving(Workshop(), first.addresses[0]) as second,
                druvarpc.connect(second.addresses[0]) as other,
            ):
                assert await other.stub(Work).echo(b"new") == b"new"
                workshop.release.set()
    assert workshop.finished == 1


async def test_a_connection_that_has_not_spoken_yet_is_told():
    workshop = Workshop()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(druvarpc.serve, [workshop], TCP)
        async with raw_client(server, hello=b"") as peer:
            async with druvarpc.connect(server.addresses[0]) as later:
                await later.ping()  # so the first has been accepted
            with trio.fail_after(5):
                async with trio.open_nursery() as draining:
                    draining.start_soon(server.drain)
                    await settled(lambda: server.statistics().connections == 0)
                    await peer.send(HELLO)
                    assert (await peer.until(GOAWAY)).reason[0] == 0
                    await peer.stream.send_eof()


class Counter(Workshop):
    """Notes what its handlers got, and lets others run meanwhile."""

    def __init__(self, handled: list[bytes]) -> None:
        super().__init__()
        self.handled = handled

    async def echo(self, data: bytes) -> bytes:
        self.handled.append(data)
        await trio.lowlevel.checkpoint()
        return data

    async def gather(self, pieces) -> int:
        return sum([len(piece) async for piece in pieces])


async def test_nothing_fails_while_servers_that_share_a_socket_drain_in_turn():
    """Calls of all kinds, most of them not idempotent; each of them is handled exactly once."""
    handled: list[bytes] = []
    made: list[bytes] = []
    streams = []
    over = False

    async def pieces() -> AsyncGenerator[bytes, None]:
        for _ in range(5):
            yield bytes(3000)

    async def call(work: Work, name: str) -> None:
        while not over:
            data = b"%s.%d" % (name.encode(), len(made))
            made.append(data)
            assert await work.echo(data) == data

    async def stream(work: Work) -> None:
        while not over:
            assert await work.gather(pieces()) == 15_000
            async with aclosing(work.pour(5, 3000)) as items:
                assert sum([len(item) async for item in items]) == 15_000
            async with aclosing(work.chat(pieces())) as items:
                assert sum([len(item) async for item in items]) == 15_000
            streams.append(1)

    async def club(client: druvarpc.Client, work: Work, name: str) -> None:
        while not over:
            data = b"%s.%d" % (name.encode(), len(made))
            made.extend([data, data])
            async with client.club() as together:
                first = together.call(work.echo, data)
                second = together.call(work.echo, first)
            assert second.value == data

    async def many(work: Work, name: str) -> None:
        while not over:
            sent = [b"%s.%d.%d" % (name.encode(), len(made), count) for count in range(50)]
            made.extend(sent)
            async with aclosing(druvarpc.windowed(work.echo, sent)) as results:
                assert [result async for result in results] == sent

    async def be_a_client(address: str, name: str) -> None:
        async with druvarpc.connect(address) as client, trio.open_nursery() as callers:
            work = client.stub(Work)
            for number in range(5):
                callers.start_soon(call, work, f"{name}.call{number}")
                callers.start_soon(stream, work)
            callers.start_soon(club, client, work, f"{name}.club")
            callers.start_soon(many, work, f"{name}.many")

    async def come_and_go(address: str, name: str) -> None:
        while not over:
            async with druvarpc.connect(address) as client:
                for _ in range(3):
                    data = b"%s.%d" % (name.encode(), len(made))
                    made.append(data)
                    assert await client.stub(Work).echo(data) == data

    with socket.create_server(("127.0.0.1", 0)) as listening, trio.fail_after(20):
        start = partial(druvarpc.serve, [Counter(handled)], f"fd://{listening.fileno()}")
        async with trio.open_nursery() as servers:
            server = await servers.start(start)
            async with trio.open_nursery() as clients:
                for number in range(3):
                    clients.start_soon(be_a_client, server.addresses[0], str(number))
                    clients.start_soon(come_and_go, server.addresses[0], f"{number}.brief")
                for _ in range(5):
                    calls, streamed = len(handled), len(streams)
                    await settled(
                        lambda: len(handled) > calls + 300 and len(streams) > streamed + 5  # noqa: B023
                    )
                    old, server = server, await servers.start(start)
                    await old.drain()
                over = True
            servers.cancel_scope.cancel()
    assert sorted(handled) == sorted(made)
