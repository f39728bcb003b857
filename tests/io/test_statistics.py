from contextlib import aclosing

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc.testing import connected
from tests.io.services import ClosedGate, Gate, MemoryVault, Vault, served


async def until(condition):
    with trio.fail_after(10):
        while not condition():
            await trio.testing.wait_all_tasks_blocked()


async def test_both_sides_count_the_same():
    async with served([MemoryVault()]) as server:
        async with druvarpc.connect(server.addresses[0]) as client:
            vault = client.stub(Vault)
            for number in range(10):
                await vault.add(number)
            async with aclosing(vault.download([1000, 2000])) as pieces:
                assert len([piece async for piece in pieces]) == 2
            for _ in range(3):
                with pytest.raises(druvarpc.RpcError):
                    await vault.missing()
            await client.ping()
            near, far = client.statistics(), server.statistics()
        for side in (near, far):
            assert side.connections == 1
            assert side.calls_started == 14
            assert side.calls_active == 0
            assert side.calls_failed == 3
            assert side.clubs_sent == 14
            assert side.calls_clubbed == 0
            assert side.rtt is not None
            assert 0 < side.rtt < 10
            assert side.send_window > 0
            assert side.receive_window >= 4 * 1024 * 1024
        assert near.bytes_sent == far.bytes_received > 14 * 12
        assert near.bytes_received == far.bytes_sent > 3000


async def test_sums_outlive_the_connection():
    async with served([MemoryVault()]) as server:
        for _ in range(3):
            async with druvarpc.connect(server.addresses[0]) as client:
                await client.stub(Vault).add(1)
        await until(lambda: not server.statistics().connections)
        after = client.statistics()
        assert after.connections == 0
        assert after.calls_started == 1
        assert after.clubs_sent == 1
        assert after.bytes_sent > 0
        assert after.rtt is None
        assert after.send_window == after.receive_window == 0
        total = server.statistics()
        assert total.calls_started == 3
        assert total.clubs_sent == 3
        assert total.bytes_received > 2 * after.bytes_sent
        assert total.calls_failed == total.calls_active == 0


async def test_a_snapshot_does_not_change():
    async with connected([MemoryVault()]) as client:
        before = client.statistics()
        await client.stub(Vault).add(1)
        assert before.calls_started == 0
        with pytest.raises(AttributeError):
            before.calls_started = 3  # type: ignore[misc]


async def test_calls_that_run_are_active():
    gate = ClosedGate()
    async with served([gate]) as server, druvarpc.connect(server.addresses[0]) as client:
        await client.ping()
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(client.stub(Gate).enter)
            await gate.until_inside(5)
            assert client.statistics().calls_active == 5
            assert server.statistics().calls_active == 5
            assert client.statistics().calls_clubbed == 5
            gate.opened.set()
        assert client.statistics().calls_active == 0
        await until(lambda: not server.statistics().calls_active)


async def test_calls_that_their_caller_cancels_have_not_failed():
    gate = ClosedGate()
    async with served([gate]) as server, druvarpc.connect(server.addresses[0]) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(client.stub(Gate).enter)
            await gate.until_inside(5)
            nursery.cancel_scope.cancel()
        await gate.until_empty()
        await until(lambda: not server.statistics().calls_active)
        for side in (client.statistics(), server.statistics()):
            assert side.calls_started == 5
            assert side.calls_active == 0
            assert side.calls_failed == 0


async def test_a_download_that_is_left_has_not_failed():
    async with connected([MemoryVault()]) as client:
        async with aclosing(client.stub(Vault).chunks(1000)) as chunks:
            await anext(chunks)
        statistics = client.statistics()
        assert statistics.calls_active == statistics.calls_failed == 0


async def test_calls_that_end_with_their_connection_have_failed():
    gate = ClosedGate()

    async def enter(client):
        with pytest.raises(druvarpc.ConnectionLost):
            await client.stub(Gate).enter()

    async with served([gate]) as server:
        async with trio.open_nursery() as nursery:
            async with druvarpc.connect(server.addresses[0]) as client:
                for _ in range(5):
                    nursery.start_soon(enter, client)
                await gate.until_inside(5)
        await gate.until_empty()
        await until(lambda: not server.statistics().connections)
        for side in (client.statistics(), server.statistics()):
            assert side.calls_started == 5
            assert side.calls_active == 0
            assert side.calls_failed == 5


async def test_calls_of_a_club_are_counted_alone():
    async with connected([MemoryVault()]) as client:
        vault = client.stub(Vault)
        async with client.club(raise_errors=False) as club:
            one = club.call(vault.add, 1)
            club.call(vault.add, one)
            club.call(vault.missing)
        statistics = client.statistics()
        assert statistics.calls_started == 3
        assert statistics.calls_failed == 1
        assert statistics.clubs_sent == 1
        assert statistics.calls_clubbed == 3


async def test_a_window_grows_with_what_it_has_to_carry():
    async with served([MemoryVault()]) as server, druvarpc.connect(server.addresses[0]) as client:
        before = client.statistics().receive_window
        async with aclosing(client.stub(Vault).download([100_000] * 2000)) as pieces:
            assert len([piece async for piece in pieces]) == 2000
        assert client.statistics().receive_window >= before


async def test_a_server_counts_its_connections():
    async with served([MemoryVault()]) as server:
        assert server.statistics().connections == 0
        assert server.statistics().rtt is None
        async with (
            druvarpc.connect(server.addresses[0]),
            druvarpc.connect(server.addresses[0]),
        ):
            assert server.statistics().connections == 2
        await until(lambda: not server.statistics().connections)
