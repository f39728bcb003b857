"""The block of a client: what goes in and what comes out."""

import abc
import inspect
from contextlib import aclosing

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc.testing import Link, connected
from tests.io.services import ClosedGate, Gate, MemoryVault, Vault, served


class Mine(Exception):
    pass


class Abstract(druvarpc.Service, abc.ABC):
    @druvarpc.rpc
    @abc.abstractmethod
    async def double(self, number: int) -> int: ...


class Concrete(Abstract):
    async def double(self, number: int) -> int:
        return 2 * number


async def test_an_abstract_service_has_stubs():
    async with connected([Concrete()]) as client:
        stub = client.stub(Abstract)
        assert isinstance(stub, Abstract)
        assert await stub.double(4) == 8


def test_connected_takes_the_options_of_connect():
    """But for those of sockets, and with the same defaults."""
    of_sockets = {"address", "tls", "proxy", "congestion_control"}
    ours = inspect.signature(connected).parameters
    for name, option in inspect.signature(druvarpc.connect).parameters.items():
        if name not in of_sockets:
            assert ours[name].default == option.default, name


async def test_connected_with_options_of_connect(autojump_clock):
    link = Link(rtt=0.1)
    link.stall(100)
    with pytest.raises(druvarpc.ConnectionLost, match="no answer within 3 s"):
        async with connected([MemoryVault()], link=link, connect_timeout=3):
            pass
    assert trio.current_time() == pytest.approx(3)
    async with connected(
        [MemoryVault()],
        balance=druvarpc.Balance.ROUND_ROBIN,
        outliers=druvarpc.Outliers(failures=1),
        connect_timeout=1,
    ) as client:
        assert await client.stub(Vault).add(1) == 2


async def test_pings_without_pause_are_no_abuse(autojump_clock):
    async with connected([]) as client:
        for _ in range(25_000):
            await client.ping()


async def test_an_exception_of_the_block_leaves_as_it_is(reach_plainly):
    error = Mine("own")
    with pytest.raises(Mine) as caught:
        async with reach_plainly([MemoryVault()]) as client:
            await client.stub(Vault).add(1)
            raise error
    assert caught.value is error


async def test_a_group_of_the_block_leaves_as_it_is(reach_plainly):
    error = ExceptionGroup("own", [Mine(), ValueError()])
    with pytest.raises(ExceptionGroup) as caught:
        async with reach_plainly([MemoryVault()]):
            raise error
    assert caught.value is error


async def test_an_error_of_a_call_leaves_the_block_as_it_is(reach_plainly):
    with pytest.raises(druvarpc.RpcError) as caught:
        async with reach_plainly([MemoryVault()]) as client:
            await client.stub(Vault).missing()
    assert caught.value.status is druvarpc.Status.UNIMPLEMENTED


async def test_an_exception_of_the_block_has_no_context_of_ours(reach_plainly):
    with pytest.raises(Mine) as caught:
        async with reach_plainly([MemoryVault()]):
            raise Mine
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


async def test_cancellation_leaves_the_block(reach_plainly):
    gate = ClosedGate()
    with trio.CancelScope() as scope:
        async with reach_plainly([gate]) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.stub(Gate).enter)
                await gate.until_inside()
                scope.cancel()
    assert scope.cancelled_caught
    await gate.until_empty()


async def test_an_exception_beside_cancellation_leaves_as_it_is(reach_plainly):
    with pytest.raises(Mine), trio.CancelScope() as scope:
        async with reach_plainly([MemoryVault()]):
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                raise Mine


async def test_a_return_and_a_break_leave_the_block(reach_plainly):
    async def add():
        async with reach_plainly([MemoryVault()]) as client:
            return await client.stub(Vault).add(40, 2)

    assert await add() == 42


@pytest.mark.parametrize("kind", ["memory", "tcp"])
async def test_no_task_survives_the_block(kind):
    async def source():
        yield b"one"
        await trio.sleep_forever()

    gate = ClosedGate()
    async with served([MemoryVault(), gate]) as server:
        await trio.testing.wait_all_tasks_blocked()
        before = trio.lowlevel.current_statistics().tasks_living
        async with (
            connected([MemoryVault(), gate])
            if kind == "memory"
            else druvarpc.connect(server.addresses[0])
        ) as client:
            vault = client.stub(Vault)
            async with aclosing(vault.sync(source())) as pieces:
                await anext(pieces)
            async with aclosing(druvarpc.windowed(vault.echo, source())) as echoes:
                await anext(echoes)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.stub(Gate).enter)
                await gate.until_inside()
                nursery.cancel_scope.cancel()
        await gate.until_empty()
        if kind == "tcp":
            with trio.fail_after(10):
                while server.statistics().connections:
                    await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == before


async def test_calls_after_the_block_are_lost():
    async with connected([MemoryVault()]) as client:
        vault = client.stub(Vault)
    with pytest.raises(druvarpc.ConnectionLost) as caught:
        await vault.add(1, 2)
    assert caught.value.not_started
    with pytest.raises(druvarpc.ConnectionLost):
        await anext(vault.download([1]))
    with pytest.raises(druvarpc.ConnectionLost):
        await client.ping()
    assert client.statistics().connections == 0


async def test_calls_of_other_tasks_are_lost_when_the_block_ends(reach_plainly):
    gate = ClosedGate()
    errors = []

    async def enter(client):
        try:
            await client.stub(Gate).enter()
        except druvarpc.ConnectionLost as error:
            errors.append(error)

    async def watch(client):
        try:
            async with aclosing(client.stub(Gate).watch()) as sights:
                async for _ in sights:
                    pass
        except druvarpc.ConnectionLost as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        async with reach_plainly([gate]) as client:
            nursery.start_soon(enter, client)
            nursery.start_soon(watch, client)
            await gate.until_inside(2)
    assert [error.status for error in errors] == [druvarpc.Status.UNAVAILABLE] * 2


async def test_a_ping_takes_a_round_trip(reach_plainly):
    async with reach_plainly([]) as client:
        assert 0 <= await client.ping() < 10


async def test_pings_of_several_tasks():
    times = []

    async def ping(client):
        times.append(await client.ping())

    async with connected([]) as client, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ping, client)
    assert len(times) == 20


async def test_several_clients_of_one_server(reach_plainly):
    async with reach_plainly([MemoryVault()]) as one, reach_plainly([MemoryVault()]) as other:
        assert await one.stub(Vault).add(1, 2) == 3
        assert await other.stub(Vault).add(3, 4) == 7


async def test_a_stub_keeps_working_in_other_tasks():
    async with connected([MemoryVault()]) as client, trio.open_nursery() as nursery:
        vault = client.stub(Vault)
        for _ in range(5):
            nursery.start_soon(vault.add, 1, 2)
