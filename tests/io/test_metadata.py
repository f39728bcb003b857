"""What travels beside arguments and results: metadata both ways, trailers, details of errors."""

import datetime as dt
import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

import druvarpc
from druvarpc import LocalProtocolError, RpcError, Status, current_call, reply_metadata
from druvarpc.testing import connected
from tests.io.services import MemoryVault, Vault
from tests.io.test_interceptors import CALLS, all_calls, download, stream, unary, upload


class Telling(MemoryVault):
    """Sends metadata ahead of each reply and trailers with it."""

    def tell(self) -> None:
        call = current_call()
        call.send_metadata({"served-by": "one", "raw": b"\xff"})
        call.trailers["rows"] = "7"

    async def add(self, a: int, b: int = 1) -> int:
        self.tell()
        return a + b

    async def upload(self, pieces: AsyncIterator[bytes]) -> int:
        self.tell()
        return await super().upload(pieces)

    async def download(self, sizes: list[int]) -> Any:
        self.tell()
        for size in sizes:
            yield bytes(size)

    async def sync(self, have: AsyncIterator[bytes]) -> Any:
        self.tell()
        async for piece in have:
            yield piece.upper()


@all_calls
async def test_a_server_sends_metadata_and_trailers(reach, make, answer):
    async with reach([Telling()]) as client:
        with reply_metadata() as got:
            assert (got.metadata, got.trailers) == ({}, {})
            assert await make(client.stub(Vault)) == answer
        assert got.metadata == {"served-by": "one", "raw": b"\xff"}
        assert got.trailers == {"rows": "7"}


@all_calls
async def test_interceptors_see_and_send_them(make, answer):
    seen: list[Any] = []

    async def client_side(call: druvarpc.OutgoingCall, proceed: druvarpc.Proceed) -> Any:
        result = await proceed()
        seen.append((call.reply_metadata, call.trailers))
        return result

    async def server_side(call: druvarpc.CurrentCall, proceed: druvarpc.Proceed) -> Any:
        call.send_metadata({"from": "interceptor"})
        result = await proceed()
        call.trailers["took"] = "1 ms"
        return result

    async with connected(
        [MemoryVault()], interceptors=[client_side], server_interceptors=[server_side]
    ) as client:
        with reply_metadata() as got:
            assert await make(client.stub(Vault)) == answer
    assert seen == [({"from": "interceptor"}, {"took": "1 ms"})]
    assert (got.metadata, got.trailers) == seen[0]


async def test_metadata_are_there_with_the_first_item_and_trailers_at_the_end():
    async with connected([Telling()]) as client:
        with reply_metadata() as got:
            items = client.stub(Vault).download([1, 2])
            await anext(items)
            assert got.metadata == {"served-by": "one", "raw": b"\xff"}
            assert got.trailers == {}
            async for _ in items:
                pass
            assert got.trailers == {"rows": "7"}


async def test_blocks_may_be_nested_and_know_the_last_call():
    async with connected([Telling()]) as client:
        vault = client.stub(Vault)
        with reply_metadata() as outer:
            with reply_metadata() as inner:
                await vault.add(1)
                assert inner.trailers == outer.trailers == {"rows": "7"}
            await vault.echo(b"")
            assert outer.trailers == outer.metadata == {}
            assert inner.trailers == {"rows": "7"}
        await vault.add(1)
        assert outer.trailers == {}


async def test_calls_of_other_tasks_are_not_of_the_block():
    async with connected([Telling()]) as client:
        async with trio.open_nursery() as nursery:
            with reply_metadata() as got:
                await client.stub(Vault).echo(b"")
            nursery.start_soon(client.stub(Vault).add, 1)
        assert got.trailers == {}


async def test_calls_of_a_club_have_their_own():
    async with connected([Telling()]) as client:
        vault = client.stub(Vault)
        async with client.club() as club:
            one, two = club.call(vault.add, 1), club.call(vault.echo, b"")
            assert one.metadata == one.trailers == {}
        assert one.metadata == {"served-by": "one", "raw": b"\xff"}
        assert one.trailers == {"rows": "7"}
        assert two.metadata == two.trailers == {}


class Failing(Telling):
    async def add(self, a: int, b: int = 1) -> int:
        current_call().trailers["of"] = "the call"
        raise RpcError(Status.NOT_FOUND, "no", trailers={"of": "the error", "error": b"\0"})

    async def download(self, sizes: list[int]) -> Any:
        yield b""
        current_call().trailers["rows"] = "1"
        raise KeyError("bug")


async def test_errors_have_trailers():
    async with connected([Failing()]) as client:
        with reply_metadata() as got:
            with pytest.raises(RpcError) as caught:
                await client.stub(Vault).add(1)
            assert caught.value.trailers == {"of": "the call", "error": b"\0"}
            assert got.trailers == caught.value.trailers
            with pytest.raises(RpcError, match="INTERNAL") as caught:
                await download(client.stub(Vault))
            assert caught.value.trailers == got.trailers == {"rows": "1"}
    assert RpcError(Status.ABORTED).trailers == {}


async def test_metadata_come_once_and_first():
    class TooLate(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            current_call().send_metadata({"a": "b"})
            with pytest.raises(LocalProtocolError, match=r"Vault\.add: .*too late"):
                current_call().send_metadata({"a": "b"})
            with pytest.raises(LocalProtocolError, match="metadata above"):
                current_call().send_metadata({"a": "b" * 10_000})
            return 1

        async def download(self, sizes: list[int]) -> Any:
            yield b""
            with pytest.raises(LocalProtocolError, match="too late"):
                current_call().send_metadata({"a": "b"})

        async def echo(self, data: bytes) -> bytes:
            with pytest.raises(LocalProtocolError, match="metadata above"):
                current_call().send_metadata({"a": "b" * 10_000})
            return data

    async with connected([TooLate()]) as client:
        vault = client.stub(Vault)
        assert await vault.echo(b"x") == b"x"
        assert [item async for item in vault.download([])] == [b""]
    # And what is too late is found before what is too much.
    with pytest.raises(RpcError):
        async with connected([TooLate()]) as client:
            await client.stub(Vault).add(1)


async def test_trailers_that_cant_be_sent_fail_the_call(caplog):
    class TooMuch(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            current_call().trailers["a"] = "b" * 10_000
            return 1

    async with connected([TooMuch()]) as client:
        with pytest.raises(RpcError, match="INTERNAL: the server failed"):
            await client.stub(Vault).add(1)
    assert "metadata above" in caplog.text


async def test_repeated_keys_arrive_in_order():
    seen: list[Any] = []

    class Look(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            seen.append((current_call().metadata, current_call().metadata_pairs))
            return 1

    pairs = [("k", "1"), ("other", b"x"), ("k", "2")]
    async with connected([Look()]) as client:
        await client.stub(Vault, metadata=pairs).add(1)
    assert seen == [({"k": "2", "other": b"x"}, tuple(pairs))]


async def test_a_task_that_outlives_its_call_keeps_nothing_of_it(nursery):
    """It may still look at its call; what it sets reaches nobody."""
    ended, looked = trio.Event(), trio.Event()

    class Outlived(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            nursery.start_soon(self.stay)
            return a + b

        async def stay(self) -> None:
            await ended.wait()
            current_call().trailers["late"] = "yes"
            assert current_call().trailers == {}
            with pytest.raises(LocalProtocolError):
                current_call().send_metadata({"late": "yes"})
            looked.set()

    async with connected([Outlived()]) as client:
        with reply_metadata() as got:
            await client.stub(Vault).add(1)
            ended.set()
            await looked.wait()
            await client.stub(Vault).echo(b"")
        assert got.trailers == {}


async def test_what_is_sent_to_a_caller_that_left_is_dropped():
    began, abandoned = trio.Event(), trio.Event()

    class Slow(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            began.set()
            try:
                await trio.sleep_forever()
            finally:
                current_call().send_metadata({"too": "late"})
                current_call().trailers["too"] = "late"
                abandoned.set()

    async with connected([Slow()]) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stub(Vault).add, 1)
            await began.wait()
            nursery.cancel_scope.cancel()
        await abandoned.wait()
        assert await client.stub(Vault).echo(b"x") == b"x"


async def test_the_block_doesnt_change_what_calls_do():
    async with connected([MemoryVault()]) as client:
        with reply_metadata() as got:
            for make, answer in CALLS:
                assert await make(client.stub(Vault)) == answer
            assert await unary(client.stub(Vault)) == 3
            assert await upload(client.stub(Vault)) == 3
            assert [n async for n in client.stub(Vault).double(stream(1, 2))] == [2, 4]
        assert (got.metadata, got.trailers) == ({}, {})
        assert repr(got) == "<ReplyMetadata {}, trailers {}>"


# Details.


class Unit(enum.Enum):
    BYTES = "bytes"
    CALLS = "calls"


@dataclass(frozen=True)
class Quota:
    unit: Unit
    left: int
    renewed: dt.datetime
    by: list[str] = field(default_factory=list)


QUOTA = Quota(Unit.BYTES, 12, dt.datetime(2026, 11, 26, 8, tzinfo=dt.UTC), ["disk"])


class Limited(MemoryVault):
    async def add(self, a: int, b: int = 1) -> int:
        raise RpcError(Status.RESOURCE_EXHAUSTED, "no room", QUOTA)

    async def echo(self, data: bytes) -> bytes:
        raise RpcError(Status.RESOURCE_EXHAUSTED, "no room", [QUOTA, QUOTA])


async def test_details_are_typed_values():
    async with connected([Limited()]) as client:
        with pytest.raises(RpcError) as caught:
            await client.stub(Vault).add(1)
        assert caught.value.details_as(Quota) == QUOTA
        assert caught.value.details_as(dict) == caught.value.details
        with pytest.raises(ValueError, match=r"the details of RESOURCE_EXHAUSTED: no room: Expec"):
            caught.value.details_as(list[int])
        with pytest.raises(RpcError) as caught:
            await client.stub(Vault).echo(b"")
        assert caught.value.details_as(list[Quota]) == [QUOTA, QUOTA]


def test_details_of_an_error_that_didnt_travel_are_what_they_are():
    error = RpcError(Status.ABORTED, "here", QUOTA)
    assert error.details_as(Quota) is QUOTA
    with pytest.raises(ValueError, match="the details of ABORTED: none"):
        RpcError(Status.ABORTED, "none").details_as(Quota)
