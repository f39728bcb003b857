"""A client whose connections end, and come back."""

from contextlib import aclosing, suppress
from functools import partial

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

import druvarpc
from druvarpc.client import Client, connect_by
from druvarpc.testing import Link, connected
from druvarpc.transports import Transport, memory_transports
from tests.io.networks import Network, Outcomes, refuse
from tests.io.services import ClosedGate, Gate, MemoryVault, Vault, served

now = trio.current_time
ONCE = druvarpc.Retry(attempts=1)


@pytest.fixture
def network(nursery: trio.Nursery) -> partial[Network]:
    return partial(Network, nursery)


async def slowly() -> None:
    await trio.sleep(2)


# --- a connection is lost ---


async def test_calls_wait_for_the_first_attempt(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(retry=None) as client:
        there.answer = slowly
        there.lose(0)
        await trio.testing.wait_all_tasks_blocked()
        start = now()
        async with trio.open_nursery() as callers:
            for _ in range(100):
                callers.start_soon(client.stub(Vault).add, 1)
        assert now() - start == pytest.approx(2)
        assert len(there.dials) == 2, "one attempt for all of them"
        assert client.statistics().reconnects == 1
        assert client.statistics().calls_failed == 0


async def test_calls_of_all_kinds_wait(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(retry=None) as client:
        stub = client.stub(Vault)

        async def pieces():
            yield b"one"
            yield b"two"

        async def club() -> int:
            async with client.club() as club:
                first = club.call(stub.add, 1)
                second = club.call(stub.add, first)
            return second.value

        async def items(call):
            async with aclosing(call) as generator:
                return [item async for item in generator]

        async def each():
            for number in range(100):
                yield number

        for call, result in (
            (partial(stub.add, 1), 2),
            (lambda: stub.upload(pieces()), 6),
            (lambda: items(stub.download([1, 2])), [b"\0", b"\0\0"]),
            (lambda: items(stub.sync(pieces())), [b"ONE", b"TWO"]),
            (club, 3),
            (lambda: items(druvarpc.windowed(stub.add, range(100))), list(range(1, 101))),
            (lambda: items(druvarpc.windowed(stub.add, each())), list(range(1, 101))),
            (client.ping, pytest.approx(0)),
        ):
            there.answer = slowly
            there.lose(-1)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(3):
                assert await call() == result
            await trio.sleep(60)
        assert client.statistics().calls_retried == 0, "they were made for the first time"


async def test_calls_that_had_begun_are_lost(autojump_clock, network, nursery):
    gate = ClosedGate()
    there = network(MemoryVault(), gate)
    async with there.connect() as client:
        outcomes = Outcomes(nursery)
        outcomes.start(client.stub(Gate).enter)
        await gate.until_inside()
        there.lose(0)
        await gate.until_empty()
        await trio.testing.wait_all_tasks_blocked()
        (error,) = outcomes.errors
        assert isinstance(error, druvarpc.ConnectionLost)
        assert not error.not_started
        assert await client.stub(Vault).add(1) == 2


async def test_calls_fail_at_once_when_an_attempt_has_failed(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(retry=None) as client:
        there.answer = refuse
        there.lose(0)
        await trio.sleep(0.001)
        start = now()
        for _ in range(100):
            with pytest.raises(druvarpc.ConnectionLost, match="refused") as lost:
                await client.stub(Vault).add(1)
            assert lost.value.not_started
        assert now() == start
        assert client.statistics().connections == 0


async def test_it_comes_back_by_itself_and_becomes_patient(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect() as client:
        there.answer = refuse
        there.lose(0)
        lost = now()
        await trio.sleep(1000)
        attempts = [at - lost for at in there.dials[1:]]
        assert attempts[0] == 0
        assert 30 < len(attempts) < 200, "about one in 15 s"
        assert len([at for at in attempts if at < 2]) >= 3
        there.answer = trio.lowlevel.checkpoint
        await trio.sleep(30)
        assert client.statistics().connections == 1, "though nobody called"
        assert await client.stub(Vault).add(1) == 2


async def test_clients_that_lost_one_server_do_not_come_back_together(autojump_clock, network):
    """Full jitter: of what they wait, all lengths are as likely."""
    networks = [network(MemoryVault()) for _ in range(200)]
    async with trio.open_nursery() as clients:
        for there in networks:

            async def be_a_client(there: Network = there) -> None:
                async with there.connect():
                    there.answer = refuse
                    there.lose(0)
                    await trio.sleep(4)

            clients.start_soon(be_a_client)
        await trio.sleep(4)
    late = sorted(at for there in networks for at in there.dials if 0.2 < at < 2)
    assert len(late) > 200
    busiest = max(len([at for at in late if start <= at < start + 0.01]) for start in late)
    assert busiest < len(late) / 20


async def test_a_server_that_ends_each_connection_at_once_is_left_in_peace(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect() as client:

        async def lose_each() -> None:
            while True:
                await trio.sleep(0.03)
                there.lose(-1)

        async with trio.open_nursery() as losing:
            losing.start_soon(lose_each)
            with trio.move_on_after(100):
                while True:
                    with suppress(druvarpc.RpcError):
                        await client.stub(Vault).echo(b"x")
                    await trio.sleep(0.1)
            assert len(there.dials) < 100
            losing.cancel_scope.cancel()


async def test_a_hanging_dial_ends_in_time(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(timeout=7, retry=None) as client:
        there.answer = trio.sleep_forever
        there.lose(0)
        await trio.testing.wait_all_tasks_blocked()
        start = now()
        with pytest.raises(druvarpc.ConnectionLost, match="no answer within 7 s") as lost:
            await client.stub(Vault).add(1)
        assert lost.value.not_started
        assert now() - start == pytest.approx(7)


async def test_a_hanging_dial_does_not_keep_others_from_being_tried(autojump_clock, network):
    there = network(MemoryVault())
    async with there.connect(3) as client:
        there.answer = trio.sleep_forever
        there.lose(0)
        await trio.sleep(1)
        there.answer = trio.lowlevel.checkpoint
        there.lose(1)
        await trio.sleep(1)
        assert client.statistics().connections == 2
        await trio.sleep(30)
        assert client.statistics().connections == 3


# --- wait_for_ready ---


async def test_calls_that_wait_for_ready(autojump_clock, network, nursery):
    there = network(MemoryVault())
    async with there.connect() as client:
        there.answer = refuse
        there.lose(0)
        await trio.sleep(10)
        patient = client.stub(Vault, wait_for_ready=True)
        outcomes = Outcomes(nursery)
        outcomes.start(patient.add, 1)
        outcomes.start(lambda: patient.upload(pieces()))
        with pytest.raises(trio.TooSlowError):
            with trio.fail_after(100):
                await patient.add(1)
        assert not outcomes.errors
        there.answer = trio.lowlevel.checkpoint
        await trio.sleep(31)
        assert sorted(outcomes.results) == [2, 3]


async def pieces():
    yield b"one"


async def test_connect_raises_if_nobody_answers(autojump_clock, network):
    there = network(MemoryVault())
    there.answer = refuse
    with pytest.raises(druvarpc.ConnectionLost, match="refused"):
        async with there.connect():
            pass
    assert len(there.dials) == 1


async def test_connect_waits_for_ready(autojump_clock, network):
    there = network(MemoryVault())
    there.answer = refuse

    async def come_up() -> None:
        await trio.sleep(100)
        there.answer = trio.lowlevel.checkpoint

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_up)
        async with there.connect(wait_for_ready=True) as client:
            assert 100 <= now() <= 131
            assert await client.stub(Vault).add(1) == 2
    there.answer = refuse
    with pytest.raises(trio.TooSlowError):
        with trio.fail_after(100):
            async with there.connect(wait_for_ready=True):
                pass


# --- the server drains ---


async def test_a_drained_connection_finishes_its_calls_beside_the_new_one(
    autojump_clock, network, nursery
):
    gate = ClosedGate()
    there = network(MemoryVault(), gate)
    async with there.connect() as client:
        outcomes = Outcomes(nursery)
        outcomes.start(client.stub(Gate).enter, "old")
        await gate.until_inside()
        nursery.start_soon(there.servers[0].drain, 100)
        await trio.testing.wait_all_tasks_blocked()
        assert await client.stub(Vault).add(1) == 2
        assert client.statistics().connections == 2
        assert there.calls == [1, 1]
        gate.opened.set()
        await trio.sleep(3)
        assert client.statistics().connections == 1
    assert outcomes.results == ["old"]
    assert not outcomes.errors


async def test_many_drained_connections_that_still_have_calls_keep_no_new_one_away(
    autojump_clock, network, nursery
):
    gate = ClosedGate()
    there = network(MemoryVault(), gate)
    async with there.connect() as client:
        outcomes = Outcomes(nursery)
        for count in range(10):
            outcomes.start(client.stub(Gate).enter, f"{count}")
            await gate.until_inside(count + 1)
            nursery.start_soon(there.servers[-1].drain, 1000)
            await trio.sleep(40)
        assert await client.stub(Vault).add(1) == 2
        gate.opened.set()
        await gate.until_empty()
        await trio.sleep(3)
        assert client.statistics().connections == 1
    assert len(outcomes.results) == 10


async def test_a_server_that_drains_as_the_client_comes(autojump_clock, nursery):
    """Where several processes share a port, the next connection is another's."""
    servers = [druvarpc.Server([MemoryVault()], druvarpc.Limits()) for _ in range(3)]
    dials = 0

    async def dial() -> Transport:
        nonlocal dials
        near, far = memory_transports()
        nursery.start_soon(servers[min(dials, 2)].serve_transport, far)
        dials += 1
        return near

    await servers[0].drain()
    await servers[1].drain()
    async with connect_by(dial, "network") as client:
        assert await client.stub(Vault).add(1) == 2
    assert dials == 3
    assert now() == 0


# --- its end ---


async def test_leaving_the_block_ends_the_attempts(autojump_clock, network):
    there = network(MemoryVault())
    living = trio.lowlevel.current_statistics().tasks_living
    for answer in (refuse, trio.sleep_forever, slowly):
        there.answer = trio.lowlevel.checkpoint
        async with there.connect():
            there.answer = answer
            there.lose(-1)
            await trio.sleep(1)
        await trio.sleep(5)
        dials = len(there.dials)
        await trio.sleep(100)
        assert len(there.dials) == dials
        assert trio.lowlevel.current_statistics().tasks_living == living


async def test_calls_of_other_tasks_end_with_the_block(autojump_clock, network, nursery):
    there = network(MemoryVault())
    outcomes = Outcomes(nursery)
    async with there.connect() as client:
        there.answer = trio.sleep_forever
        there.lose(0)
        await trio.testing.wait_all_tasks_blocked()
        for wait in (False, True):
            stub = client.stub(Vault, wait_for_ready=wait)
            outcomes.start(stub.add, 1)
            outcomes.start(stub.upload, pieces())
        await trio.testing.wait_all_tasks_blocked()
    await trio.testing.wait_all_tasks_blocked()
    assert len(outcomes.errors) == 4
    for error in outcomes.errors:
        assert isinstance(error, druvarpc.ConnectionLost)
        assert "the client is closed" in error.message
    with pytest.raises(druvarpc.ConnectionLost, match="the client is closed"):
        await client.stub(Vault).add(1)


async def test_without_reconnect_the_client_ends_with_its_connection(autojump_clock):
    link = Link(rtt=0.1)
    async with connected([MemoryVault()], link=link, reconnect=False) as client:
        link.cut()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            with pytest.raises(druvarpc.ConnectionLost, match="cut") as lost:
                await client.stub(Vault).echo(b"x")
            assert lost.value.not_started
            await trio.sleep(100)


# --- cancelled at any time ---


@pytest.fixture
def quick_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def busy(client: Client) -> None:
    stub = client.stub(Vault)

    async def each():
        for number in range(10):
            await trio.sleep(0.003)
            yield b"%d" % number

    async def repeat(call) -> None:
        while True:
            try:
                await call()
            except (druvarpc.RpcError, ExceptionGroup):
                await trio.sleep(0.01)

    async def read(call) -> None:
        async with aclosing(call()) as items:
            async for _ in items:
                pass

    async def club() -> None:
        async with client.club() as club:
            club.call(stub.add, club.call(stub.add, 1))

    async with trio.open_nursery() as nursery:
        for call in (
            partial(stub.echo, b"x"),
            lambda: stub.upload(each()),
            partial(read, partial(stub.download, [10] * 10)),
            partial(read, lambda: stub.sync(each())),
            partial(read, lambda: druvarpc.windowed(stub.echo, [b"x"] * 50, window=8)),
            partial(read, lambda: druvarpc.windowed(stub.echo, each(), ordered=False)),
            club,
        ):
            nursery.start_soon(repeat, call)


async def test_calls_may_be_cancelled_at_any_time_while_connections_come_and_go(quick_clock):
    link = Link(rtt=0.01)
    async with connected([MemoryVault()], link=link) as client:

        async def break_things() -> None:
            while True:
                await trio.sleep(0.0417)
                link.cut()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(break_things)
            living = trio.lowlevel.current_statistics().tasks_living
            for step in range(100):
                with trio.move_on_after(0.00317 * step):
                    await busy(client)
                assert client.statistics().calls_active == 0
            nursery.cancel_scope.cancel()
        await trio.sleep(60)
        assert await client.stub(Vault).add(1) == 2
        # But for `break_things`, and what an open connection has.
        assert trio.lowlevel.current_statistics().tasks_living <= living


# --- real sockets ---


async def test_a_client_outlives_its_servers():
    address = "tcp://127.0.0.1:0"
    async with trio.open_nursery() as servers:

        async def serve_once(task_status=trio.TASK_STATUS_IGNORED) -> None:
            with trio.CancelScope() as scope:
                async with served([MemoryVault()], address) as server:
                    task_status.started((server, scope))
                    await trio.sleep_forever()

        server, scope = await servers.start(serve_once)
        address = server.addresses[0]
        async with druvarpc.connect(address, wait_for_ready=True) as client:
            stub = client.stub(Vault)
            for count in range(5):
                assert await stub.add(count) == count + 1
                scope.cancel()
                await trio.lowlevel.checkpoint()
                _, scope = await servers.start(serve_once)
            with trio.fail_after(5):
                assert await stub.echo(b"still") == b"still"
            assert client.statistics().reconnects >= 1
        servers.cancel_scope.cancel()
