# mypy: disable-error-code="empty-body"
"""Calls of which another copy is sent when no reply comes in time."""

from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
import trio

import druvarpc
from druvarpc import Hedge, Retry, RpcError, Status
from druvarpc.testing import connected
from tests.io.networks import Network
from tests.io.services import Gate

now = trio.current_time


class Store(druvarpc.Service):
    @druvarpc.rpc(idempotent=True)
    async def get(self, name: str) -> str: ...

    @druvarpc.rpc
    async def put(self, name: str) -> str: ...


class SlowStore(Store):
    """Takes each of `seconds` for a call, then none; or fails with an error among them."""

    def __init__(self, *seconds: float | RpcError) -> None:
        self.seconds = list(seconds)
        self.begun: list[float] = []
        self.cancelled = 0

    async def get(self, name: str) -> str:
        self.begun.append(now())
        count = len(self.begun)
        wanted = self.seconds.pop(0) if self.seconds else 0
        if isinstance(wanted, RpcError):
            raise wanted
        try:
            await trio.sleep(wanted)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        return f"{name} by {count}"

    put = get


async def test_the_first_success_counts_and_others_are_abandoned(autojump_clock):
    store = SlowStore(10, 0.1)
    async with connected([store]) as client:
        assert await client.stub(Store, hedge=Hedge(0.5)).get("x") == "x by 2"
        assert now() == pytest.approx(0.6)
        await trio.sleep(1)
        assert store.cancelled == 1
        assert client.statistics().calls_hedged == 1
        assert client.statistics().calls_active == 0


async def test_a_reply_in_time_needs_no_copy(autojump_clock):
    store = SlowStore(0.4)
    async with connected([store]) as client:
        assert await client.stub(Store, hedge=Hedge(0.5)).get("x") == "x by 1"
        assert client.statistics().calls_hedged == 0
        assert len(store.begun) == 1


async def test_the_first_may_still_win(autojump_clock):
    store = SlowStore(1, 10)
    async with connected([store]) as client:
        assert await client.stub(Store, hedge=Hedge(0.5)).get("x") == "x by 1"
        assert now() == pytest.approx(1)


async def test_as_many_copies_as_asked_for(autojump_clock):
    store = SlowStore(*[100] * 10)
    async with connected([store]) as client:
        with trio.move_on_after(50):
            await client.stub(Store, hedge=Hedge(0.5, attempts=4)).get("x")
        assert store.begun == pytest.approx([0, 0.5, 1.0, 1.5])
        await trio.sleep(1)
        assert store.cancelled == 4
        assert client.statistics().calls_active == 0


async def test_copies_go_to_other_connections(autojump_clock, nursery):
    store = SlowStore(100, 100, 0)
    there = Network(nursery, store)
    async with there.connect(3) as client:
        await client.stub(Store, hedge=Hedge(0.5, attempts=3)).get("x")
        assert sorted(there.calls) in ([0, 1, 2], [1, 1, 1])
        assert max(there.active) <= 1


async def test_one_that_fails_leaves_it_to_the_other(autojump_clock):
    store = SlowStore(2, RpcError(Status.UNAVAILABLE, "ill"))
    async with connected([store]) as client:
        assert await client.stub(Store, hedge=Hedge(0.5)).get("x") == "x by 1"
    store = SlowStore(RpcError(Status.UNAVAILABLE, "ill"), 0)
    async with connected([store]) as client:
        assert await client.stub(Store, hedge=Hedge(0.5)).get("x") == "x by 2"
        assert client.statistics().calls_hedged == 0
        assert client.statistics().calls_retried == 1


async def test_an_answer_is_an_answer(autojump_clock):
    store = SlowStore(100, RpcError(Status.NOT_FOUND, "no x"))
    async with connected([store]) as client:
        with pytest.raises(RpcError, match="no x"):
            await client.stub(Store, hedge=Hedge(0.5)).get("x")
        assert now() == pytest.approx(0.5)
        await trio.sleep(1)
        assert store.cancelled == 1


@pytest.mark.parametrize(
    "status", [Status.INTERNAL, Status.UNAUTHENTICATED, Status.PERMISSION_DENIED, Status.UNKNOWN]
)
async def test_a_copy_that_fails_is_no_reason_to_give_up_the_original(autojump_clock, status):
    store = SlowStore(2, RpcError(status, "ill"))
    async with connected([store]) as client:
        assert await client.stub(Store, hedge=Hedge(0.5)).get("x") == "x by 1"
        assert now() == pytest.approx(2)


async def test_when_all_copies_fail_the_last_failure_is_the_calls(autojump_clock):
    store = SlowStore(RpcError(Status.INTERNAL, "at once"), 0)
    async with connected([store]) as client:
        with pytest.raises(RpcError, match="at once"):
            await client.stub(Store, hedge=Hedge(0.5)).get("x")
        assert now() == 0
    store = FailsLate()
    async with connected([store]) as client:
        with pytest.raises(RpcError, match="INTERNAL: after 2"):
            await client.stub(Store, hedge=Hedge(0.5)).get("x")


class FailsLate(Store):
    """Says when it failed: the first call last."""

    def __init__(self) -> None:
        self.seconds = [2, 1]

    async def get(self, name: str) -> str:
        seconds = self.seconds.pop(0)
        await trio.sleep(seconds)
        raise RpcError(Status.INTERNAL, f"after {seconds}")


class Signed(Store):
    """Sends trailers with what it returns, and with what it fails with."""

    async def get(self, name: str) -> str:
        druvarpc.current_call().send_metadata({"ahead": "yes"})
        if name == "none":
            raise RpcError(Status.NOT_FOUND, "none", trailers={"by": "the error"})
        druvarpc.current_call().trailers["by"] = "me"
        return name


async def test_metadata_and_trailers_of_the_call_that_counts(autojump_clock):
    seen: list[str | bytes] = []

    async def look(call: druvarpc.OutgoingCall, proceed: druvarpc.Proceed) -> Any:
        result = await proceed()
        seen.append(call.trailers["by"])
        return result

    async with connected([Signed()]) as client:
        stub = client.stub(Store, hedge=Hedge(0.5))
        with druvarpc.reply_metadata() as found:
            await stub.get("x")
            assert (found.metadata, found.trailers) == ({"ahead": "yes"}, {"by": "me"})
            with pytest.raises(RpcError, match="none"):
                await stub.get("none")
            assert found.trailers["by"] == "the error"
        await client.stub(Store, hedge=Hedge(0.5), interceptors=[look]).get("x")
    assert seen == ["me"]


async def test_copies_are_charged_to_the_retry_budget(autojump_clock):
    store = SlowStore(*[1.0] * 10_000)
    retry = Retry(budget=0.1, least=1.0)
    async with connected([store], retry=retry) as client:
        stub = client.stub(Store, hedge=Hedge(0.0))
        for _ in range(100):
            await stub.get("x")
        hedged = client.statistics().calls_hedged
        assert 100 <= len(store.begun) - hedged <= 100
        assert hedged <= 10 + 100 * 1.1


async def test_without_a_budget_nothing_is_hedged_and_nothing_spins(autojump_clock):
    store = SlowStore(*[1.0] * 10)
    async with connected([store], retry=Retry(budget=0, least=0)) as client:
        await client.stub(Store, hedge=Hedge(0.0, attempts=10)).get("x")
        assert client.statistics().calls_hedged == 0


async def test_only_idempotent_unary_methods(autojump_clock):
    store = SlowStore(3, 3)
    async with connected([store]) as client:
        stub = client.stub(Store, hedge=Hedge(0.5))
        assert await stub.put("x") == "x by 1"
        assert len(store.begun) == 1
        with pytest.raises(ValueError, match="Gate has no unary method that is idempotent"):
            client.stub(Gate, hedge=Hedge(0.5))


async def test_clubs_and_windows_are_not_hedged(autojump_clock):
    store = SlowStore(3, 3)
    async with connected([store]) as client:
        stub = client.stub(Store, hedge=Hedge(0.5))
        async with client.club() as club:
            club.call(stub.get, "x")
        async with aclosing(druvarpc.windowed(stub.get, ["y"])) as names:
            assert [name async for name in names] == ["y by 2"]
        assert len(store.begun) == 2


@pytest.mark.parametrize("step", range(12))
async def test_cancelled_at_any_time(autojump_clock, step):
    store = SlowStore(2, RpcError(Status.UNAVAILABLE, "ill"), 3)
    async with connected([store]) as client:
        stub = client.stub(Store, hedge=Hedge(0.5, attempts=3))
        with trio.move_on_after(0.21 * step):
            await stub.get("x")
        await trio.sleep(10)
        assert client.statistics().calls_active == 0
        assert await stub.get("y")


@pytest.mark.parametrize("make", [partial(Hedge, -1), partial(Hedge, 1, attempts=1)])
def test_hedges_that_are_none(make):
    with pytest.raises(ValueError, match="must be"):
        make()
