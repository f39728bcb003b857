# mypy: disable-error-code="empty-body"
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc.testing import connected
from tests.io.services import Chunk, ClosedGate, Gate, MemoryVault, Session, Vault

MB = 1024 * 1024


async def test_a_call_returns_what_the_handler_returned(reach):
    async with reach([MemoryVault()]) as client:
        assert await client.stub(Vault).add(40, 2) == 42


async def test_large_arguments_and_results(reach):
    data = bytes(range(256)) * (3 * MB // 256)
    async with reach([MemoryVault()]) as client:
        vault = client.stub(Vault)
        assert await vault.put(Chunk(b"large", data)) == 3 * MB
        assert await vault.echo(data) == data


@pytest.mark.parametrize("size", [0, 1, 4096, 16 * 1024 - 10, 16 * 1024 + 10, 64 * 1024])
async def test_sizes_around_what_rides_in_a_club(size):
    async with connected([MemoryVault()]) as client:
        assert await client.stub(Vault).echo(b"x" * size) == b"x" * size


async def test_large_calls_of_many_tasks_at_once():
    results = []

    async def echo(vault, number):
        data = bytes([number]) * MB
        results.append(await vault.echo(data) == data)

    async with connected([MemoryVault()]) as client, trio.open_nursery() as nursery:
        for number in range(24):
            nursery.start_soon(echo, client.stub(Vault), number)
    assert results == [True] * 24


async def test_an_argument_above_the_message_limit_is_refused():
    limits = druvarpc.Limits(max_message=100_000, stream_window=128 * 1024)
    async with connected([MemoryVault()], server_limits=limits) as client:
        vault = client.stub(Vault)
        with pytest.raises(druvarpc.RpcError) as caught:
            await vault.put(Chunk(b"large", bytes(200_000)))
        assert caught.value.status is druvarpc.Status.RESOURCE_EXHAUSTED
        assert await vault.add(1, 2) == 3


async def test_a_result_above_the_message_limit_is_refused():
    limits = druvarpc.Limits(max_message=100_000, stream_window=128 * 1024)
    async with connected([MemoryVault()], limits=limits) as client:
        vault = client.stub(Vault)
        with pytest.raises(druvarpc.RpcError) as caught:
            await vault.echo(bytes(200_000))
        assert caught.value.status is druvarpc.Status.RESOURCE_EXHAUSTED
        assert "Vault.echo" in caught.value.message
        assert await vault.add(1, 2) == 3


@pytest.mark.parametrize("beyond", [1, 5, 100])
async def test_a_result_a_little_above_the_message_limit_harms_nothing_else(beyond):
    limits = druvarpc.Limits(max_message=65_536)
    async with connected([MemoryVault()], limits=limits) as client:
        vault = client.stub(Vault)
        # Encoded, the bytes take three more than they are; data and reply come in one read.
        with pytest.raises(druvarpc.RpcError) as caught:
            await vault.echo(bytes(65_536 - 3 + beyond))
        assert caught.value.status is druvarpc.Status.RESOURCE_EXHAUSTED
        assert len(await vault.echo(bytes(65_536 - 3))) == 65_536 - 3


async def test_keyword_arguments_and_defaults():
    async with connected([MemoryVault()]) as client:
        vault = client.stub(Vault)
        assert await vault.add(1) == 2
        assert await vault.add(1, b=5) == 6
        assert await vault.add(b=5, a=2) == 7


async def test_the_default_is_the_servers():
    class Newer(MemoryVault):
        async def add(self, a: int, b: int = 100) -> int:
            return a + b

    async with connected([Newer()]) as client:
        assert await client.stub(Vault).add(1) == 101


async def test_wrong_arguments_are_a_type_error_at_once():
    async with connected([MemoryVault()]) as client:
        vault = client.stub(Vault)
        with pytest.raises(TypeError, match=r"Vault\.add"):
            vault.add()
        with pytest.raises(TypeError, match=r"Vault\.add"):
            vault.add(1, 2, 3)
        with pytest.raises(TypeError, match=r"Vault\.add"):
            vault.add(1, size=3)
        assert client.statistics().calls_started == 0


async def test_an_argument_that_cannot_be_encoded_is_refused_here():
    async with connected([MemoryVault()]) as client:
        with pytest.raises(druvarpc.RpcError, match=r"Vault\.put: argument chunk") as caught:
            await client.stub(Vault).put(object())
        assert caught.value.status is druvarpc.Status.INVALID_ARGUMENT
        assert client.statistics().calls_started == 0


async def test_an_argument_of_the_wrong_type_never_reaches_the_handler():
    ran = []

    class Watched(MemoryVault):
        async def put(self, chunk: Chunk) -> int:
            ran.append(chunk)
            return 0

    async with connected([Watched()]) as client:
        vault = client.stub(Vault)
        with pytest.raises(druvarpc.RpcError) as caught:
            await vault.put(Chunk(b"digest", "not bytes"))  # type: ignore[arg-type]
        assert caught.value.status is druvarpc.Status.INVALID_ARGUMENT
        assert "chunk.data" in caught.value.message
        with pytest.raises(druvarpc.RpcError, match="argument b"):
            await vault.add(1, "two")  # type: ignore[arg-type]
    assert ran == []


async def test_a_result_of_the_wrong_type_is_an_error_here():
    class Liar(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            return "three"  # type: ignore[return-value]

    async with connected([Liar()]) as client:
        with pytest.raises(druvarpc.RpcError, match=r"Vault\.add: result"):
            await client.stub(Vault).add(1, 2)


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Everything:
    colour: Colour
    when: datetime
    chunk: Chunk | None
    nested: dict[str, list[tuple[int, float]]]
    names: frozenset[str]


class Typed(druvarpc.Service, name="test.Typed"):
    @druvarpc.rpc
    async def same(self, value: Everything) -> Everything: ...

    @druvarpc.rpc
    async def nothing(self) -> None: ...


class MyTyped(Typed):
    async def same(self, value: Everything) -> Everything:
        assert isinstance(value, Everything)
        return value

    async def nothing(self) -> None:
        pass


async def test_values_arrive_as_what_they_were():
    value = Everything(
        Colour.RED,
        datetime(2025, 6, 1, 12, 30, tzinfo=UTC),
        Chunk(b"1", b"2"),
        {"a": [(1, 0.5), (2, 1.5)], "b": []},
        frozenset({"x", "y"}),
    )
    async with connected([MyTyped()]) as client:
        typed = client.stub(Typed)
        assert await typed.same(value) == value
        assert await typed.nothing() is None


async def test_several_services_on_one_connection():
    async with connected([MemoryVault(), MyTyped()]) as client:
        assert await client.stub(Vault).add(1, 1) == 2
        assert await client.stub(Typed).nothing() is None


async def test_a_stub_is_of_the_services_type_and_does_not_construct_it():
    class Costly(MemoryVault):
        def __init__(self) -> None:
            raise AssertionError("constructed")

    async with connected([MemoryVault()]) as client:
        assert isinstance(client.stub(Vault), Vault)
        assert await client.stub(Costly).add(1, 2) == 3


async def test_a_stub_of_something_else_is_a_type_error():
    async with connected([]) as client:
        with pytest.raises(TypeError):
            client.stub(int)  # type: ignore[type-var]
        with pytest.raises(TypeError):
            client.stub(MemoryVault())  # type: ignore[arg-type]


async def test_a_handler_that_blocks_delays_nobody(reach):
    gate = ClosedGate()
    async with reach([gate, MemoryVault()]) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.stub(Gate).enter)
        await gate.until_inside()
        for number in range(100):
            assert await client.stub(Vault).add(number) == number + 1
        gate.opened.set()


async def test_one_that_blocks_delays_nobody_in_its_own_club():
    gate = ClosedGate()
    results = []

    async def add(vault, number):
        results.append(await vault.add(number, 0))
        if len(results) == 20:
            gate.opened.set()

    async with connected([gate, MemoryVault()]) as client, trio.open_nursery() as nursery:
        vault = client.stub(Vault)
        for number in range(20):
            nursery.start_soon(client.stub(Gate).enter)
            nursery.start_soon(add, vault, number)
    assert sorted(results) == list(range(20))


async def test_a_thousand_handlers_block_at_once(reach):
    gate = ClosedGate()
    names = []

    async def enter(stub, name):
        names.append(await stub.enter(name))

    async with reach([gate]) as client, trio.open_nursery() as nursery:
        for number in range(1000):
            nursery.start_soon(enter, client.stub(Gate), str(number))
        await gate.until_inside(1000)
        assert client.statistics().calls_active == 1000
        gate.opened.set()
    assert sorted(map(int, names)) == list(range(1000))


async def test_calls_above_the_servers_limit_wait_and_then_run(reach):
    gate = ClosedGate()
    names = []
    most = 0

    async def enter(stub, name):
        nonlocal most
        most = max(most, len(gate.inside))
        names.append(await stub.enter(name))
        most = max(most, len(gate.inside))

    limits = druvarpc.Limits(max_calls=64)
    async with reach([gate], server_limits=limits) as client, trio.open_nursery() as nursery:
        for number in range(500):
            nursery.start_soon(enter, client.stub(Gate), str(number))
        await gate.until_inside(64)
        await trio.testing.wait_all_tasks_blocked()
        assert len(gate.inside) == 64
        gate.opened.set()
    assert most <= 64
    assert sorted(map(int, names)) == list(range(500))


setting: ContextVar[str] = ContextVar("setting", default="unset")


class Settings(druvarpc.Service):
    @druvarpc.rpc
    async def change(self, value: str, pause: bool) -> tuple[str, str]: ...


class MySettings(Settings):
    async def change(self, value: str, pause: bool) -> tuple[str, str]:
        before = setting.get()
        setting.set(value)
        if pause:
            await trio.lowlevel.checkpoint()
        return before, setting.get()


@pytest.mark.parametrize("pause", [False, True])
async def test_a_context_variable_set_by_one_handler_is_not_seen_by_the_next(pause):
    async with connected([MySettings()]) as client:
        stub = client.stub(Settings)
        assert await stub.change("one", pause) == ("unset", "one")
        assert await stub.change("two", pause) == ("unset", "two")
    assert setting.get() == "unset"


class Seen(druvarpc.Service):
    @druvarpc.rpc
    async def look(self) -> list[str]: ...


class MySeen(Seen):
    def __init__(self) -> None:
        self.calls: list[druvarpc.CurrentCall] = []

    async def look(self) -> list[str]:
        async def note() -> None:
            self.calls.append(druvarpc.current_call())

        await note()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(note)
        await trio.to_thread.run_sync(lambda: self.calls.append(druvarpc.current_call()))
        return [call.method for call in self.calls]


async def test_the_current_call_is_known_to_the_handler_its_tasks_and_threads(reach):
    seen = MySeen()
    async with reach([seen]) as client:
        assert await client.stub(Seen).look() == ["Seen.look"] * 3
    call = seen.calls[0]
    assert call.method == "Seen.look"
    assert isinstance(call.peer, str)
    assert call.identity is None
    assert call.metadata == {}
    assert call.deadline == float("inf")
    assert seen.calls == [call] * 3


async def test_there_is_no_current_call_outside_a_handler():
    async with connected([MySeen()]) as client:
        await client.stub(Seen).look()
        with pytest.raises(LookupError):
            druvarpc.current_call()


@pytest.mark.parametrize("priority", druvarpc.Priority)
async def test_metadata_of_a_stub_arrive_in_every_lane(priority):
    seen = MySeen()
    metadata = {"name": "laptop", "key": b"\x00\xff"}
    async with connected([seen]) as client:
        await client.stub(Seen, metadata=metadata, priority=priority).look()
        assert seen.calls[0].metadata == metadata
        seen.calls.clear()
        await client.stub(Seen).look()
        assert seen.calls[0].metadata == {}


async def test_metadata_above_the_limit_are_refused():
    async with connected([MySeen()]) as client:
        with pytest.raises(druvarpc.RpcError) as caught:
            await client.stub(Seen, metadata={"name": "x" * 100_000}).look()
        assert caught.value.status is druvarpc.Status.INVALID_ARGUMENT
        assert await client.stub(Seen).look()


async def test_an_urgent_call_overtakes_bulk():
    order = []

    class Ordered(MemoryVault):
        async def put(self, chunk: Chunk) -> int:
            order.append(chunk.digest)
            return 0

    async with connected([Ordered()]) as client, trio.open_nursery() as nursery:
        bulk = client.stub(Vault, priority=druvarpc.Priority.BULK)
        urgent = client.stub(Vault, priority=druvarpc.Priority.INTERACTIVE)
        for _ in range(8):
            nursery.start_soon(bulk.put, Chunk(b"bulk", bytes(MB)))
        await trio.lowlevel.checkpoint()
        nursery.start_soon(urgent.put, Chunk(b"urgent", b""))
    assert order.index(b"urgent") == 0


async def test_a_dataclass_with_everything_in_it_comes_back():
    async with connected([MemoryVault()]) as client:
        session = await client.stub(Vault).begin("me")
        assert session == Session(7, "me", ["first", "second"], Chunk(b"id", b"data"))
