"""Several connections that are one client: which carries what, how many, and what becomes of them.

On simulated links, by their own clock; at the end of the file over real sockets.
"""

import gc
import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import (
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    suppress,
)
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import druvarpc
from druvarpc.client import Client, connect_by
from druvarpc.dialing import Target, Terms
from druvarpc.endpoints import Endpoints
from druvarpc.testing import Link, connected
from druvarpc.transports import Transport, memory_transports
from tests.io.networks import Network, Outcomes, refuse
from tests.io.services import Chunk, ClosedGate, Gate, MemoryVault, Vault, served

KB, MB = 1000, 1000 * 1000
BULK = druvarpc.Priority.BULK
now = trio.current_time


@pytest.fixture
def network(nursery: trio.Nursery) -> Callable[..., Network]:
    return partial(Network, nursery)


async def read(items: AsyncGenerator[Any, None]) -> int:
    total = 0
    async with aclosing(items):
        async for item in items:
            total += len(item)
    return total


# --- which connection carries what ---


async def test_as_many_as_were_asked_for(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(4) as client:
        assert client.statistics().connections == 4
        assert await client.stub(Vault).add(1, 2) == 3
        assert await client.ping() >= 0
    assert len(there.dials) == 4
    await trio.testing.wait_all_tasks_blocked()
    assert [server.statistics().connections for server in there.servers] == [0] * 4


@pytest.mark.parametrize("number", [0, -1, "many", "", 1.5])
async def test_a_number_that_is_none(number):
    with pytest.raises(ValueError, match=f"connections={number!r}"):
        async with connected([MemoryVault()], connections=number):
            pass
    with pytest.raises(ValueError, match=f"connections={number!r}"):
        async with druvarpc.connect("tcp://127.0.0.1:1", connections=number):
            pass


async def test_streams_are_spread(autojump_clock, network, nursery):
    gate = ClosedGate()
    there = network(gate)
    async with there.connect(4) as client:
        stub = client.stub(Gate)
        outcomes = Outcomes(nursery)
        for _ in range(4):
            outcomes.start(read, stub.watch("a"))
            outcomes.start(stub.enter_with, forever())
        await gate.until_inside(8)
        assert there.active == [2] * 4
        nursery.cancel_scope.cancel()


async def forever() -> AsyncGenerator[str, None]:
    yield "one"
    await trio.sleep_forever()


async def test_large_arguments_are_spread(autojump_clock, network):
    there = network(MemoryVault(), link=Link(rtt=0.1, bandwidth=1e6))
    async with there.connect(4) as client, trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(client.stub(Vault).echo, bytes(100 * KB))
    assert there.calls == [2] * 4


async def test_few_small_calls_ride_in_one_club(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(4) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(client.stub(Vault).add, 1)
        assert client.statistics().clubs_sent == 1
        assert sorted(there.calls) == [0, 0, 0, 8]


async def test_many_small_calls_are_spread(autojump_clock, network):
    gate = ClosedGate()
    there = network(gate)
    async with there.connect(4) as client, trio.open_nursery() as nursery:
        for _ in range(400):
            nursery.start_soon(client.stub(Gate).enter)
        await gate.until_inside(400)
        assert min(there.active) >= 90
        gate.opened.set()


async def test_windows_and_clubs(autojump_clock, network):
    there = network(MemoryVault(), link=Link(rtt=0.05, bandwidth=12.5e6))
    async with there.connect(4) as client:
        stub = client.stub(Vault)
        chunks = [Chunk(b"%d" % size, bytes(size)) for size in range(0, 50_000, 499)]
        for ordered in (True, False):
            async with aclosing(druvarpc.windowed(stub.put, chunks, ordered=ordered)) as sizes:
                got = [size async for size in sizes]
            assert sorted(got) == [len(chunk.data) for chunk in chunks]
            assert not ordered or got == sorted(got)
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(one_club, client)
        async with client.club() as large:
            replies = [large.call(stub.echo, bytes(50 * KB)) for _ in range(10)]
        assert [len(reply.value) for reply in replies] == [50 * KB] * 10
        assert client.statistics().calls_active == 0
        assert sum(there.calls) == client.statistics().calls_started
        assert min(there.calls) > 0


async def one_club(client: Client) -> None:
    stub = client.stub(Vault)
    async with client.club() as club:
        first = club.call(stub.add, 1, 2)
        second = club.call(stub.add, first, first)
    assert second.value == 6


async def test_calls_that_have_ended_weigh_nothing(autojump_clock, network):
    """However they ended; what comes after them is placed as if they had never been."""
    gate = ClosedGate()
    there = network(MemoryVault(), gate)
    async with trio.open_nursery() as background:
        connections = Endpoints(
            [Target("network", there.dial)], Terms(2, reconnect=False), background
        )
        await connections.start(now(), wait=False)
        client = Client(connections)
        vault, closed = client.stub(Vault), client.stub(Gate)
        with trio.move_on_after(1):
            async with trio.open_nursery() as nursery:
                for _ in range(6):
                    nursery.start_soon(read, closed.watch("a"))
                    nursery.start_soon(closed.enter_with, forever())
                    nursery.start_soon(vault.echo, bytes(20 * KB))
                await gate.until_inside(7)
                assert connections.roomiest().load > 0
                await trio.sleep_forever()
        assert await vault.echo(bytes(20 * KB)) == bytes(20 * KB)
        async with aclosing(druvarpc.windowed(vault.echo, [bytes(20 * KB)] * 9)) as results:
            await anext(results)
        async with aclosing(vault.sync(pieces(30))) as results:
            await anext(results)
        await connections.close()
        # Of either connection: the least is that of the other when one has more.
        assert connections.only is not None
        assert connections.only.load == 0
        assert client.statistics().calls_active == 0
        background.cancel_scope.cancel()


async def pieces(count: int, size: int = 50 * KB) -> AsyncGenerator[bytes, None]:
    for _ in range(count):
        yield bytes(size)


# --- connections end ---


@pytest.mark.parametrize("number", [2, 4])
async def test_a_lost_connection_takes_no_others_calls_with_it(
    autojump_clock, network, nursery, number
):
    gate = ClosedGate()
    there = network(MemoryVault(), gate)
    async with there.connect(number) as client:
        outcomes = Outcomes(nursery)
        for _ in range(number):
            outcomes.start(read, client.stub(Gate).watch("a"))
        await gate.until_inside(number)
        there.lose(1)
        await gate.until(lambda: len(gate.inside) == number - 1)
        await trio.testing.wait_all_tasks_blocked()
        (error,) = outcomes.errors
        assert isinstance(error, druvarpc.ConnectionLost)
        assert not error.not_started
        assert "the peer closed the connection" in error.message
        for _ in range(20):
            assert await client.stub(Vault).add(1) == 2
            await trio.sleep(0.01)
        await trio.sleep(1)
        assert client.statistics().connections == number
        assert len(there.dials) == number + 1
        outcomes.start(read, client.stub(Gate).watch("a"))
        await gate.until_inside(number)
        assert there.active == [1, 0] + [1] * (number - 1), "the new one has the most room"
        gate.opened.set()
        await trio.sleep(1)
    assert len(outcomes.errors) == 1
    assert len(outcomes.results) == number


async def test_attempts_to_replace_a_connection_become_rare(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(3) as client:
        there.answer = refuse
        start = now()
        there.lose(0)
        there.lose(2)
        await trio.sleep(0.01)
        while now() < start + 600:
            await client.stub(Vault).add(1)
            await trio.sleep(1)
        assert client.statistics().connections == 1
        # Two at a time, for each of a pause of up to 30 s.
        attempts = [at - start for at in there.dials[3:]]
        assert 2 * 20 <= len(attempts) <= 2 * 120
        assert len([at for at in attempts if at < 2]) >= 2 * 3
        there.answer = trio.lowlevel.checkpoint
        await trio.sleep(31)
        assert client.statistics().connections == 3


@pytest.mark.parametrize("number", [2, "auto"])
async def test_a_server_that_ends_every_connection_is_left_in_peace(
    autojump_clock, nursery, number
):
    """Also if it seems well at first."""
    there = Network(nursery, MemoryVault(), link=Link(rtt=0.01, window=2 * KB))

    async def lose_others() -> None:
        while True:
            await trio.sleep(0.02)
            for index in range(1, len(there.ends)):
                there.lose(index)

    async with there.connect(number) as client, trio.open_nursery() as callers:
        nursery.start_soon(lose_others)
        callers.start_soon(short_downloads, client, 16, 100.0)
        await trio.sleep(100)
        assert len(there.dials) < 200
        callers.cancel_scope.cancel()


async def short_downloads(client: Client, tasks: int, seconds: float) -> None:
    """Keep so many streams busy, each of 40 KB."""
    end = now() + seconds

    async def one() -> None:
        while now() < end:
            try:
                await read(client.stub(Vault).download([10 * KB] * 4))
            except druvarpc.ConnectionLost:
                await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(one)


async def test_a_connection_that_the_server_drains(autojump_clock, network, nursery):
    gate = ClosedGate()
    there = network(MemoryVault(), gate)
    async with there.connect(2) as client:
        outcomes = Outcomes(nursery)
        outcomes.start(read, client.stub(Gate).watch("a"))
        outcomes.start(read, client.stub(Gate).watch("b"))
        await gate.until_inside(2)
        nursery.start_soon(there.servers[0].drain, 100)
        await trio.sleep(1)
        assert client.statistics().connections == 3, "one of them still has its call"
        assert there.active == [1, 1, 0]
        for _ in range(10):
            assert await client.stub(Vault).add(1) == 2
        gate.opened.set()
        await gate.until_empty()
        await trio.sleep(3)
        assert client.statistics().connections == 2
    assert outcomes.results == [len("a is inside" + "a leaves")] * 2
    assert not outcomes.errors
    assert there.calls[0] == 1


@pytest.mark.parametrize("number", [1, 3, "auto"])
async def test_when_all_are_lost_so_is_the_client(autojump_clock, nursery, number):
    """If it isn't to reconnect."""
    gate = ClosedGate()
    link = Link(rtt=0.1)
    there = Network(nursery, MemoryVault(), gate, link=link)
    async with there.connect(number, reconnect=False) as client:
        stub = client.stub(Gate)
        outcomes = Outcomes(nursery)
        for _ in range(6):
            outcomes.start(stub.enter)
            outcomes.start(read, stub.watch("a"))
            outcomes.start(stub.enter_with, forever())
        await gate.until_inside(18)
        dials = len(there.dials)
        link.cut()
        await gate.until_empty()
        await trio.sleep(1)
        assert len(outcomes.errors) == 18
        for error in outcomes.errors:
            assert isinstance(error, druvarpc.ConnectionLost)
            assert not error.not_started
            assert "the link was cut" in error.message
        for call in (
            partial(stub.enter, "x"),
            partial(stub.enter_with, forever()),
            partial(read, stub.watch("x")),
            partial(one_club, client),
            partial(read, druvarpc.windowed(client.stub(Vault).echo, [b"x"])),
        ):
            with pytest.raises((druvarpc.ConnectionLost, ExceptionGroup)) as lost:
                await call()
            error = lost.value
            if isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            assert isinstance(error, druvarpc.ConnectionLost)
            assert error.not_started
            assert "the link was cut" in error.message
        with pytest.raises(druvarpc.ConnectionLost, match="the link was cut"):
            await client.ping()
        await trio.sleep(100)
        assert client.statistics().connections == 0
        assert client.statistics().calls_active == 0
    assert len(there.dials) == dials


async def test_the_reason_is_that_of_the_last_one_lost(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(3, reconnect=False) as client:
        there.answer = refuse
        there.lose(2)
        await trio.sleep(1)
        there.lose(1)
        await trio.sleep(1)
        await there.servers[0].drain()
        await trio.sleep(60)
        with pytest.raises(druvarpc.ConnectionLost, match="the server goes away") as lost:
            await client.stub(Vault).add(1)
        assert lost.value.not_started


async def test_all_must_open_in_time(autojump_clock, network):
    there = network(MemoryVault())

    async def third_refused() -> None:
        if len(there.dials) == 3:
            await refuse()

    there.answer = third_refused
    with pytest.raises(druvarpc.ConnectionLost, match="refused") as lost:
        async with there.connect(4):
            pass
    assert lost.value.not_started

    async def fourth_hangs() -> None:
        if len(there.dials) == 4:
            await trio.sleep_forever()

    there.dials.clear()
    there.answer = fourth_hangs
    start = now()
    with pytest.raises(druvarpc.ConnectionLost, match="no answer within 7 s") as lost:
        async with there.connect(4, timeout=7):
            pass
    assert lost.value.not_started
    assert now() - start == pytest.approx(7)
    await trio.testing.wait_all_tasks_blocked()
    assert sum(server.statistics().connections for server in there.servers) == 0


async def test_a_server_that_drains_from_the_start(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(1):
        await there.servers[0].drain()
    server = there.servers[0]
    async with trio.open_nursery() as nursery:

        async def dial() -> Transport:
            near, far = memory_transports()
            nursery.start_soon(server.serve_transport, far)
            return near

        for number in (1, 2, "auto"):
            with pytest.raises(druvarpc.ConnectionLost) as lost:
                async with connect_by(dial, "network", connections=number):
                    pass
            assert lost.value.not_started


# --- as many as pay ---


async def rate_of(link: Link, start: float, end: float, *, up: bool = False) -> float:
    """Return the bytes a second that a link carries between two times."""
    await trio.sleep_until(start)
    before = link.bytes_up if up else link.bytes_down
    await trio.sleep_until(end)
    return ((link.bytes_up if up else link.bytes_down) - before) / (end - start)


async def put_all(client: Client, seconds: float) -> None:
    """Send chunks as unary calls for so long."""
    end = now() + seconds
    put, chunk = client.stub(Vault).put, Chunk(b"id", bytes(20 * KB))

    def chunks():
        while now() < end:
            yield chunk

    async with aclosing(druvarpc.windowed(put, chunks(), window=64)) as sizes:
        async for _ in sizes:
            pass


@pytest.mark.parametrize(
    ("window", "least", "upwards"), [(24 * KB, 4, True), (24 * KB, 4, False), (11 * KB, 8, True)]
)
async def test_opens_as_many_as_fill_the_link(autojump_clock, window, least, upwards):
    """Each connection is held to a part of the link's rate, here a quarter or an eighth."""
    link = Link(rtt=0.08, bandwidth=1e6, window=window)
    async with connected([MemoryVault()], connections="auto", link=link) as client:
        assert client.statistics().connections == 1
        async with trio.open_nursery() as nursery:
            if upwards:
                nursery.start_soon(put_all, client, 24.0)
            else:
                nursery.start_soon(short_downloads, client, 24, 24.0)
            rate = await rate_of(link, now() + 18, now() + 22, up=upwards)
            assert client.statistics().connections >= least
            nursery.cancel_scope.cancel()
    assert rate >= 0.85 * 1e6


async def test_stays_with_one_where_that_is_enough(autojump_clock):
    link = Link(rtt=0.08, bandwidth=500 * KB)
    async with connected([MemoryVault()], connections="auto", link=link) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(short_downloads, client, 8, 30.0)
            rate = await rate_of(link, now() + 3, now() + 30)
        assert rate >= 0.85 * 500 * KB
        assert client.statistics().connections == 1


async def test_goes_back_to_one_when_there_is_nothing_to_do(autojump_clock):
    link = Link(rtt=0.04, window=4 * KB)
    async with connected([MemoryVault()], connections="auto", link=link) as client:
        await short_downloads(client, 32, 6.0)
        assert client.statistics().connections >= 4
        await trio.sleep(13)
        assert client.statistics().connections == 1
        assert await client.stub(Vault).add(1) == 2


async def test_one_long_stream_needs_one_connection(autojump_clock):
    link = Link(rtt=0.04, window=4 * KB)
    async with connected([MemoryVault()], connections="auto", link=link) as client:
        await read(client.stub(Vault).download([10 * KB] * 200))
        assert client.statistics().connections == 1


@pytest.mark.parametrize("answer", [refuse, trio.sleep_forever])
async def test_auto_does_with_what_it_can_get(autojump_clock, network, answer):
    there = network(MemoryVault(), link=Link(rtt=0.04, window=4 * KB))
    async with there.connect("auto", 2) as client:
        there.answer = answer
        async with trio.open_nursery() as nursery:
            nursery.start_soon(short_downloads, client, 16, 100.0)
            await trio.sleep(99)
            assert client.statistics().connections == 1
            assert 3 <= len(there.dials) <= 10
            nursery.cancel_scope.cancel()


async def test_auto_replaces_what_it_lost(autojump_clock, network):
    there = network(MemoryVault(), link=Link(rtt=0.04, window=4 * KB))
    async with there.connect("auto") as client, trio.open_nursery() as nursery:
        nursery.start_soon(short_downloads, client, 16, 100.0)
        await trio.sleep(25)
        before = client.statistics().connections
        assert before == 8
        there.lose(3)
        await trio.sleep(0.5)
        assert client.statistics().connections == before
        nursery.cancel_scope.cancel()


# --- small calls beside bulk ---


@asynccontextmanager
async def bulk(client: Client, *, upwards: bool) -> AsyncGenerator[None, None]:
    """Saturate the link as long as the block lasts, in the one direction or the other."""
    stub = client.stub(Vault, priority=BULK)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            if upwards:
                nursery.start_soon(stub.upload, pieces(10**6))
            else:
                nursery.start_soon(read, stub.download([64 * KB] * 10**5))
        yield
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("upwards", [True, False])
@pytest.mark.parametrize("number", [1, "auto"])
async def test_small_calls_beside_bulk_take_little_more_than_a_round_trip(
    autojump_clock, number, upwards
):
    rtt = 0.08
    link = Link(rtt=rtt, bandwidth=12.5e6)
    async with connected([MemoryVault()], connections=number, link=link) as client:
        async with bulk(client, upwards=upwards):
            await trio.sleep(1)
            start = now()
            before = link.bytes_up if upwards else link.bytes_down
            times = []
            for _ in range(15):
                began = now()
                assert await client.stub(Vault).add(1) == 2
                times.append(now() - began)
                await trio.sleep(0.0137)
            carried = (link.bytes_up if upwards else link.bytes_down) - before
            assert carried >= 0.85 * 12.5e6 * (now() - start), "it is saturated"
    assert max(times) <= 1.3 * rtt
    assert min(times) >= rtt


@pytest.mark.parametrize("upwards", [True, False])
async def test_small_calls_beside_bulk_get_a_connection_of_their_own(
    autojump_clock, network, upwards
):
    there = network(MemoryVault(), link=Link(rtt=0.04, bandwidth=300 * KB))
    async with there.connect("auto") as client:
        stub = client.stub(Vault)
        async with bulk(client, upwards=upwards):
            await trio.sleep(8)
            assert len(there.dials) <= 2, "bulk alone needs none, though a trial may be made"
            for _ in range(10):
                await stub.add(1)
                await trio.sleep(0.1)
            quiet = there.servers[-1]
            before = there.calls
            for _ in range(10):
                await stub.add(1)
            assert quiet.statistics().calls_started - before[-1] == 10
            assert sum(there.calls) - sum(before) == 10
            # What is bulk goes where bulk goes, though it is small.
            await client.stub(Vault, priority=BULK).add(1)
            assert quiet.statistics().calls_started - before[-1] == 10
            await trio.sleep(60)
            assert quiet.statistics().connections == 1, "as long as there is bulk"
        await trio.sleep(9)
        assert quiet.statistics().connections == 1
        await trio.sleep(3)
        assert quiet.statistics().connections == 0
        assert client.statistics().connections == 1
        assert await stub.add(1) == 2


async def test_the_quiet_connection_drains_when_it_goes(autojump_clock, network, nursery):
    gate = ClosedGate()
    there = network(MemoryVault(), gate, link=Link(rtt=0.04, bandwidth=300 * KB))
    async with there.connect("auto") as client:
        outcomes = Outcomes(nursery)
        async with bulk(client, upwards=False):
            await small_calls(client, 3)
            outcomes.start(client.stub(Gate).enter, "slow")
            await gate.until_inside()
        await trio.sleep(60)
        assert client.statistics().connections == 2
        gate.opened.set()
        await trio.sleep(3)
        assert client.statistics().connections == 1
    assert outcomes.results == ["slow"]


async def small_calls(client: Client, seconds: float) -> None:
    end = now() + seconds
    while now() < end:
        # One that is lost with its connection; the others take calls.
        with suppress(druvarpc.ConnectionLost):
            await client.stub(Vault).add(1)
        await trio.sleep(0.05)


async def test_the_quiet_connection_may_be_lost(autojump_clock, network):
    there = network(MemoryVault(), link=Link(rtt=0.04, bandwidth=300 * KB))
    async with there.connect("auto") as client:
        async with bulk(client, upwards=False):
            await small_calls(client, 3)
            there.lose(-1)
            made = len(there.dials)
            await small_calls(client, 25)
            assert len(there.dials) > made, "there is another"


@pytest.mark.parametrize("answer", [refuse, trio.sleep_forever])
async def test_small_calls_go_on_where_no_quiet_connection_can_be_had(
    autojump_clock, network, answer
):
    there = network(MemoryVault(), link=Link(rtt=0.04, bandwidth=300 * KB))
    async with there.connect("auto") as client:
        there.answer = answer
        stub = client.stub(Vault, priority=BULK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, stub.download([64 * KB] * 10**5))
            await trio.sleep(1)
            for _ in range(100):
                began = now()
                await client.stub(Vault).add(1)
                # Beside what the link has taken ahead of it: 16 KiB, or a little more.
                assert now() - began <= 0.04 + 2 * 16 / 300
                await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
        assert 4 <= len(there.dials) <= 13, "each ten seconds, and for some trials"


# --- nothing is left ---


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


@pytest.mark.parametrize("answer", [trio.sleep_forever, partial(trio.sleep, 1), refuse])
async def test_a_client_may_be_closed_while_it_opens_connections(autojump_clock, network, answer):
    there = network(MemoryVault(), link=Link(rtt=0.04))
    for pause in (0.0, 0.01, 0.5, 0.99, 1.0, 1.01, 1.02, 1.04, 1.06):
        living = tasks()
        there.answer = trio.lowlevel.checkpoint
        async with there.connect(3) as client:
            there.answer = answer
            there.lose(-1)
            there.lose(-2)
            await trio.sleep(0.1)
            await trio.sleep(pause)
            start = now()
        assert now() - start < 3
        await trio.sleep(10)
        assert tasks() == living
        assert client.statistics().connections == 0
    assert sum(server.statistics().connections for server in there.servers) == 0


class CancelAt(trio.abc.Instrument):
    """Cancels a scope before the n-th step that any task takes."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self._scope = scope
        self._left = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self._scope.cancel()


@pytest.mark.parametrize("number", [3, "auto"])
async def test_several_connections_may_be_cancelled_at_any_point(nursery, number):
    """That steps of the virtual clock take no time makes them many: only some are tried."""
    there = Network(nursery, MemoryVault())
    living = tasks()
    completed = False
    steps = 1
    while not completed:
        with trio.CancelScope() as scope:
            instrument = CancelAt(scope, steps)
            trio.lowlevel.add_instrument(instrument)
            try:
                async with there.connect(number) as client:
                    stub = client.stub(Vault)
                    assert await stub.add(1) == 2
                    there.lose(-1 if number == 3 else -2 if len(there.ends) > 1 else 0)
                    async with aclosing(stub.download([1000, 1000])) as items:
                        async for _ in items:
                            pass
                completed = not scope.cancel_called
            except druvarpc.ConnectionLost:
                completed = not scope.cancel_called
            finally:
                trio.lowlevel.remove_instrument(instrument)
        for _ in range(50):
            await trio.lowlevel.checkpoint()
        assert tasks() == living
        assert sum(server.statistics().connections for server in there.servers) == 0
        there.servers.clear()
        there.ends.clear()
        steps += 1
    assert steps > 15


@pytest.fixture
def quick_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_calls_over_several_connections_may_be_cancelled_at_any_time(quick_clock, network):
    there = network(MemoryVault(), link=Link(rtt=0.04, window=4 * KB))
    async with there.connect("auto") as client:
        stub = client.stub(Vault)
        for step in range(25):
            with trio.move_on_after(0.0711 * step):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(short_downloads, client, 16, 100.0)
                    nursery.start_soon(put_all, client, 100.0)
                    nursery.start_soon(small_calls, client, 100.0)
            assert await stub.add(1) == 2
            assert client.statistics().calls_active == 0
        await trio.sleep(30)
        assert client.statistics().connections == 1
    await trio.sleep(5)
    assert sum(server.statistics().connections for server in there.servers) == 0
    assert sum(there.active) == 0


# --- real sockets ---


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_four_connections_to_a_real_server(kind, tmp_path):
    address = "tcp://127.0.0.1:0" if kind == "tcp" else f"unix://{tmp_path}/socket"
    async with served([MemoryVault()], address) as server:
        files = open_files()
        async with druvarpc.connect(server.addresses[0], connections=4) as client:
            assert server.statistics().connections == client.statistics().connections == 4
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(read, client.stub(Vault).download([MB]))
                    nursery.start_soon(client.stub(Vault).upload, pieces(20))
                    nursery.start_soon(client.stub(Vault).echo, bytes(MB))
            assert client.statistics().bytes_received > 16 * MB
        with trio.fail_after(5):
            while server.statistics().connections:  # noqa: ASYNC110 - sockets set no events
                await trio.sleep(0.001)
        assert open_files() == files


has_choice = pytest.mark.skipif(
    not hasattr(socket, "TCP_CONGESTION"), reason="this system has no choice"
)


def congestion_controls(port: int) -> list[tuple[bool, str]]:
    """Return whether it is the server's, and its congestion control, of this port's sockets."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # no socket, or closed by now
        with copy:
            if copy.family == socket.AF_INET:
                try:
                    ports = copy.getpeername()[1], copy.getsockname()[1]
                except OSError:
                    continue  # it listens
                if port in ports:
                    value = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
                    found.append((ports[1] == port, value.rstrip(b"\0").decode()))
    return found


def available() -> list[str]:
    with open("/proc/sys/net/ipv4/tcp_available_congestion_control") as names:
        return names.read().split()


@has_choice
@pytest.mark.parametrize("ours", ["reno", "cubic", None])
@pytest.mark.parametrize("theirs", ["reno", "cubic", None])
async def test_congestion_control(ours, theirs):
    if not {ours, theirs} <= {None, *available()}:
        pytest.skip("not on this system")
    with socket.socket() as plain:
        option = plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        default = option.rstrip(b"\0").decode()
    async with trio.open_nursery() as nursery:
        start = partial(
            druvarpc.serve, [MemoryVault()], "tcp://127.0.0.1:0", congestion_control=theirs
        )
        server: druvarpc.Server = await nursery.start(start)
        address = server.addresses[0]
        async with druvarpc.connect(address, congestion_control=ours, connections=2) as client:
            assert await client.stub(Vault).upload(pieces(20)) == 20 * 50 * KB
            found = congestion_controls(int(address.rpartition(":")[2]))
        nursery.cancel_scope.cancel()
    assert sorted(found) == [(False, ours or default)] * 2 + [(True, theirs or default)] * 2


async def test_congestion_control_that_is_none():
    for address in ("tcp://127.0.0.1:1", "unix:///nowhere"):
        with pytest.raises(ValueError, match="congestion control 'swift'"):
            async with druvarpc.connect(address, congestion_control="swift"):
                pass
        with pytest.raises(ValueError, match="congestion control 'swift'"):
            await druvarpc.serve([MemoryVault()], address, congestion_control="swift")
    with pytest.raises(ValueError, match="only TCP"):
        async with druvarpc.connect("unix:///nowhere", congestion_control="reno"):
            pass


async def test_a_client_that_lost_its_connections_while_dialing_is_lost(autojump_clock, network):
    there = network(MemoryVault())

    async def slowly() -> None:
        await trio.sleep(2)

    async with there.connect(2, reconnect=False) as client:
        there.answer = slowly
        there.lose(0)
        await trio.sleep(1)
        there.lose(1)
        await trio.sleep(10)
        with pytest.raises(druvarpc.ConnectionLost):
            await client.stub(Vault).echo(b"x")
        assert client.statistics().connections == 0


async def test_an_idle_stream_is_no_bulk(autojump_clock):
    """Else small calls with large results would all go to the quiet connection."""
    gate = ClosedGate()
    async with (
        connected([MemoryVault(), gate], connections="auto", link=Link(rtt=0.04)) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(read, client.stub(Gate).watch("x"))
        for _ in range(100):
            await client.stub(Vault).echo(b"x")
            await trio.sleep(0.1)
        assert client.statistics().connections == 1
        nursery.cancel_scope.cancel()


async def test_a_window_whose_source_is_cut_off_is_not_taken_for_complete(autojump_clock):
    async def two_and_no_end() -> AsyncGenerator[bytes, None]:
        yield b"1"
        yield b"2"
        await trio.sleep_forever()

    async with AsyncExitStack() as block:
        client = await block.enter_async_context(connected([MemoryVault()]))
        results = druvarpc.windowed(client.stub(Vault).echo, two_and_no_end())
        async with aclosing(results):
            assert [await anext(results), await anext(results)] == [b"1", b"2"]
            await block.aclose()
            with pytest.raises(druvarpc.ConnectionLost, match="closed"):
                await anext(results)
