# mypy: disable-error-code="empty-body"
"""Several servers: which of them calls go to, and which are left alone."""

import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    suppress,
)
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc import Balance, Breaker, CircuitOpen, Outliers, Retry, RpcError, Status
from druvarpc.client import Client, connect_to
from druvarpc.dialing import Target, Terms
from druvarpc.transports import Transport, memory_transports
from tests.io.networks import Network, refuse
from tests.io.peers import CancelAt
from tests.io.services import served

now = trio.current_time
ROUND_ROBIN = Balance.ROUND_ROBIN


class Site(druvarpc.Service):
    @druvarpc.rpc(idempotent=True)
    async def name(self) -> str: ...

    @druvarpc.rpc
    async def touch(self) -> str: ...

    @druvarpc.rpc
    async def count(self, pieces: AsyncIterator[bytes]) -> str: ...


class MySite(Site):
    """Tells its name, or fails as it is told."""

    def __init__(self, name: str) -> None:
        self.answer: str | RpcError = name
        self.calls = 0
        self.pause = 0.0

    async def name(self) -> str:
        self.calls += 1
        await trio.sleep(self.pause)
        if isinstance(self.answer, RpcError):
            raise self.answer
        return self.answer

    touch = name

    async def count(self, pieces: AsyncIterator[bytes]) -> str:
        async for _ in pieces:
            pass
        return await self.name()


class Sites:
    """Servers, each with its network."""

    def __init__(self, nursery: trio.Nursery, names: Sequence[str]) -> None:
        self.names = names
        self.sites = [MySite(name) for name in names]
        self.networks = [Network(nursery, site) for site in self.sites]

    def connect(
        self, number: int = 1, timeout: float = 10, reconnect: bool = True, **options: Any
    ) -> AbstractAsyncContextManager[Client]:
        targets = [
            Target(name, network.dial)
            for name, network in zip(self.names, self.networks, strict=True)
        ]
        terms = Terms(number, timeout=timeout, reconnect=reconnect)
        return connect_to(targets, terms, **options)

    def fail(self, index: int, status: Status = Status.UNAVAILABLE) -> None:
        self.sites[index].answer = RpcError(status, "ill")


@pytest.fixture
def sites(nursery: trio.Nursery) -> partial[Sites]:
    return partial(Sites, nursery)


async def names(client: Client, count: int) -> Counter[str]:
    stub = client.stub(Site)
    return Counter([await stub.name() for _ in range(count)])


# --- pick first ---


async def test_the_first_that_answers_gets_all(autojump_clock, sites):
    there = sites("abc")
    there.networks[0].answer = refuse
    async with there.connect() as client:
        assert now() == 0
        assert await names(client, 10) == {"b": 10}
        assert [len(network.dials) for network in there.networks] == [1, 1, 0]


async def test_when_it_is_lost_the_next_takes_over(autojump_clock, sites):
    there = sites("abc")
    async with there.connect() as client:
        assert await names(client, 5) == {"a": 5}
        there.networks[0].answer = refuse
        there.networks[0].lose(0)
        assert await names(client, 5) == {"b": 5}
        there.networks[0].answer = trio.lowlevel.checkpoint
        there.networks[1].lose(0)
        await trio.sleep(1)
        assert await names(client, 5) == {"a": 5}
        assert client.statistics().reconnects == 2


async def test_one_that_hangs_keeps_the_next_for_a_moment(autojump_clock, sites):
    there = sites("abcd")
    there.networks[0].answer = there.networks[1].answer = trio.sleep_forever
    async with there.connect(timeout=9) as client:
        assert now() == pytest.approx(0.5)
        assert await names(client, 5) == {"c": 5}
    assert [network.dials for network in there.networks] == [[0], [0.25], [0.5], []]


async def test_one_that_takes_a_connection_and_says_nothing(autojump_clock, sites):
    """Its connection is closed when the next has answered."""
    there = sites("b")
    near, far = memory_transports()

    async def dial() -> Transport:
        return near

    targets = [Target("a", dial), Target("b", there.networks[0].dial)]
    async with connect_to(targets, Terms()) as client:
        assert now() == pytest.approx(0.25)
        assert await names(client, 5) == {"b": 5}
        await trio.testing.wait_all_tasks_blocked()
        assert client.statistics().connections == 1
        with trio.fail_after(0.001), suppress(trio.BrokenResourceError):
            while await far.receive():
                pass


@pytest.mark.parametrize(
    ("times", "first", "at"),
    [
        ((0.2, 0.0), "a", 0.2),
        ((0.4, 1.0), "a", 0.4),
        ((0.5, 0.1), "b", 0.35),
        ((0.25, 0.0), None, 0.25),
        ((2.0, 1.75), None, 2.0),
        ((4.0, 4.0, 0.5), "c", 1.0),
    ],
)
async def test_who_answers_first_has_all_and_the_others_nothing(
    autojump_clock, nursery, sites, times, first, at
):
    there = sites("abc"[: len(times)])
    for network, time in zip(there.networks, times, strict=True):
        network.answer = partial(trio.sleep, time)
    async with there.connect() as client:
        assert now() == pytest.approx(at)
        (name,) = await names(client, 5)
        assert first in (name, None)
        await trio.sleep(10)
        assert client.statistics().connections == 1
        open_ = [
            server.statistics().connections
            for network in there.networks
            for server in network.servers
        ]
        assert sum(open_) == 1
        assert await names(client, 5) == {name: 5}


async def test_a_failure_lets_the_next_begin_at_once(autojump_clock, sites):
    there = sites("abc")

    async def refuse_late() -> None:
        await trio.sleep(0.1)
        await refuse()

    there.networks[0].answer = there.networks[1].answer = refuse_late
    async with there.connect() as client:
        assert now() == pytest.approx(0.2)
        assert await names(client, 5) == {"c": 5}


async def test_of_many_that_hang_each_gets_its_turn(autojump_clock, sites):
    there = sites("abcdefghij")
    for network in there.networks[:-1]:
        network.answer = trio.sleep_forever
    async with there.connect(timeout=1) as client:
        assert now() == pytest.approx(0.9)
        assert await names(client, 5) == {"j": 5}


async def test_the_time_is_that_of_all_together(autojump_clock, sites):
    there = sites("abc")
    for network in there.networks:
        network.answer = trio.sleep_forever
    with pytest.raises(druvarpc.ConnectionLost) as lost:
        async with there.connect(timeout=9):
            pass
    assert now() == pytest.approx(9)
    assert lost.value.message == "; ".join(
        f"can't connect to {name}: no answer within 9 s" for name in "abc"
    )


async def test_a_token_is_waited_for_before_anybody_is_dialed(autojump_clock, sites):
    async def fetch() -> str:
        await trio.sleep(3)
        return "me"

    there = sites("abc")
    async with there.connect(token=fetch) as client:
        assert await names(client, 5) == {"a": 5}
        assert [network.dials for network in there.networks] == [[3], [], []]


async def test_connecting_may_be_cancelled_at_any_point(autojump_clock, nursery):
    steps = 0
    while True:
        steps += 1
        before = trio.lowlevel.current_statistics().tasks_living
        there = Sites(nursery, "ab")
        for network in there.networks:
            network.answer = partial(trio.sleep, 0.3)
        with trio.CancelScope() as scope:
            cancel = CancelAt(scope, steps)
            trio.lowlevel.add_instrument(cancel)
            try:
                async with there.connect():
                    trio.lowlevel.remove_instrument(cancel)
                    cancel = None
            finally:
                if cancel is not None:
                    trio.lowlevel.remove_instrument(cancel)
        await trio.sleep(10)
        assert trio.lowlevel.current_statistics().tasks_living == before
        if not scope.cancelled_caught:
            break
    assert steps > 10


async def test_a_real_server_behind_one_that_accepts_nothing():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, ExitStack() as stack:
        for _ in range(3):  # the queue is full then
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        silent = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        async with served([MySite("b")]) as server:
            start = now()
            async with druvarpc.connect([silent, server.addresses[0]]) as client:
                assert now() - start < 4
                assert await names(client, 5) == {"b": 5}


async def test_nobody_answers(autojump_clock, sites):
    there = sites("abc")
    there.networks[0].answer = trio.sleep_forever
    there.networks[1].answer = refuse
    there.networks[2].answer = refuse
    for balance in Balance:
        start = now()
        with pytest.raises(druvarpc.ConnectionLost, match=r"no answer within .* s") as lost:
            async with there.connect(timeout=9, balance=balance):
                pass
        assert lost.value.not_started
        assert now() - start <= 9 + 1e-6


# --- round robin ---


async def test_one_call_after_the_other_to_each(autojump_clock, sites):
    there = sites("abc")
    async with there.connect(balance=ROUND_ROBIN) as client:
        assert client.statistics().connections == 3
        assert await names(client, 30) == {"a": 10, "b": 10, "c": 10}

        async def pieces():
            yield b"x"

        stub = client.stub(Site)
        assert sorted([await stub.count(pieces()) for _ in range(3)]) == ["a", "b", "c"]
        assert client.statistics().calls_started == 33


async def test_several_connections_to_each(autojump_clock, sites):
    there = sites("ab")
    async with there.connect(3, balance=ROUND_ROBIN) as client:
        await trio.sleep(1)
        assert client.statistics().connections == 6
        assert await names(client, 10) == {"a": 5, "b": 5}


async def test_those_that_are_there_get_the_calls_of_those_that_are_not(autojump_clock, sites):
    there = sites("abc")
    there.networks[1].answer = refuse
    async with there.connect(balance=ROUND_ROBIN) as client:
        assert await names(client, 10) == {"a": 5, "c": 5}
        there.networks[1].answer = trio.lowlevel.checkpoint
        await trio.sleep(30)
        assert await names(client, 9) == {"a": 3, "b": 3, "c": 3}
        there.networks[0].answer = there.networks[1].answer = refuse
        there.networks[0].lose(0)
        there.networks[1].lose(0)
        assert await names(client, 9) == {"c": 9}
        there.networks[2].answer = refuse
        there.networks[2].lose(0)
        with pytest.raises(druvarpc.ConnectionLost):
            await names(client, 1)
        for network in there.networks:
            network.answer = trio.lowlevel.checkpoint
        await trio.sleep(30)
        assert await names(client, 9) == {"a": 3, "b": 3, "c": 3}


async def test_a_slow_one_does_not_keep_connect(autojump_clock, sites):
    there = sites("abc")
    there.networks[2].answer = trio.sleep_forever
    async with there.connect(balance=ROUND_ROBIN) as client:
        assert now() == pytest.approx(0.25)
        assert await names(client, 4) == {"a": 2, "b": 2}


async def test_a_call_is_made_again_elsewhere(autojump_clock, sites):
    there = sites("ab")
    there.fail(0)
    async with there.connect(balance=ROUND_ROBIN) as client:
        assert await names(client, 4) == {"b": 4}
        assert client.statistics().calls_retried == there.sites[0].calls


async def test_a_drained_server_gets_no_calls_and_loses_none(autojump_clock, nursery, sites):
    there = sites("abc")
    async with there.connect(balance=ROUND_ROBIN) as client:
        stub = client.stub(Site)
        answers: Counter[str] = Counter()

        async def call() -> None:
            for _ in range(20):
                answers[await stub.touch()] += 1
                await trio.sleep(0.01)

        for site in there.sites:
            site.pause = 0.02
        async with trio.open_nursery() as callers:
            for _ in range(10):
                callers.start_soon(call)
            for network in there.networks:
                await trio.sleep(0.1)
                nursery.start_soon(network.servers[0].drain, 10)
        assert answers.total() == 200
        assert client.statistics().calls_failed == client.statistics().calls_retried


async def test_without_reconnect(autojump_clock, sites):
    there = sites("ab")
    async with there.connect(balance=ROUND_ROBIN, reconnect=False) as client:
        there.networks[0].lose(0)
        await trio.sleep(1)
        assert await names(client, 4) == {"b": 4}
        there.networks[1].lose(0)
        await trio.sleep(1)
        with pytest.raises(druvarpc.ConnectionLost):
            await names(client, 1)
        await trio.sleep(100)
        assert [len(network.dials) for network in there.networks] == [1, 1]


# --- outliers ---

PLAIN = {"balance": ROUND_ROBIN, "retry": None}


async def try_names(client: Client, count: int) -> Counter[str]:
    answers: Counter[str] = Counter()
    stub = client.stub(Site)
    for _ in range(count):
        try:
            answers[await stub.name()] += 1
        except RpcError as error:
            answers[error.status.name] += 1
    return answers


async def test_a_server_that_only_fails_is_ejected(autojump_clock, sites):
    there = sites("abc")
    there.fail(1)
    async with there.connect(**PLAIN) as client:
        assert (await try_names(client, 150))["UNAVAILABLE"] == 5
        await trio.sleep(29)
        assert (await try_names(client, 150))["UNAVAILABLE"] == 0
        await trio.sleep(2)
        assert (await try_names(client, 150))["UNAVAILABLE"] == 1, "tried, and out again"
        await trio.sleep(59)
        assert (await try_names(client, 150))["UNAVAILABLE"] == 0, "for twice as long"
        there.sites[1].answer = "b"
        await trio.sleep(2)
        assert (await try_names(client, 150))["b"] >= 49


async def test_a_server_that_fails_more_often_than_others_is_ejected(autojump_clock, sites):
    there = sites("abcd")
    async with there.connect(**PLAIN) as client:
        for count in range(200):
            if count % 4 == 0:
                there.sites[3].answer = "d"
            if count % 4 == 2:
                there.fail(3)
            await try_names(client, 2)
        assert there.sites[3].calls < 50
        assert there.sites[0].calls > 110


async def test_no_more_than_half_are_ejected(autojump_clock, sites):
    there = sites("abcd")
    for index in range(4):
        there.fail(index)
    async with there.connect(**PLAIN) as client:
        assert (await try_names(client, 400))["UNAVAILABLE"] == 400
        ejected = [site for site in there.sites if site.calls < 10]
        assert len(ejected) == 2
    there = sites("ab")
    there.fail(0)
    async with there.connect(**PLAIN, outliers=Outliers(most=0.0)) as client:
        assert (await try_names(client, 100))["UNAVAILABLE"] == 50
    there = sites("ab")
    there.fail(0)
    async with there.connect(**PLAIN, outliers=None) as client:
        assert (await try_names(client, 100))["UNAVAILABLE"] == 50


async def test_a_bad_server_is_better_than_none(autojump_clock, sites):
    there = sites("ab")
    there.fail(0)
    async with there.connect(**PLAIN) as client:
        await try_names(client, 20)
        there.sites[0].answer = "a"
        assert await try_names(client, 4) == {"b": 4}
        there.networks[1].answer = refuse
        there.networks[1].lose(0)
        await trio.sleep(1)
        assert await try_names(client, 4) == {"a": 4}


async def test_what_the_application_says_is_no_failure(autojump_clock, sites):
    for status in (Status.NOT_FOUND, Status.INVALID_ARGUMENT, Status.RESOURCE_EXHAUSTED):
        there = sites("ab")
        there.fail(0, status)
        async with there.connect(**PLAIN) as client:
            assert (await try_names(client, 100))[status.name] == 50


# --- the circuit breaker ---

BREAKER = Breaker(failures=3, pause=5.0)


@pytest.mark.parametrize("status", [Status.UNAVAILABLE, Status.INTERNAL, Status.DEADLINE_EXCEEDED])
async def test_after_failures_calls_are_not_made(autojump_clock, sites, status):
    there = sites("a")
    there.fail(0, status)
    async with there.connect(retry=None, breaker=BREAKER) as client:
        assert (await try_names(client, 3))[status.name] == 3
        opened = now()
        for _ in range(10):
            with pytest.raises(CircuitOpen, match="calls to a fail; it is tried again in") as open_:
                await client.stub(Site).name()
            assert open_.value.status is Status.UNAVAILABLE
            assert open_.value.not_started
            assert open_.value.retry_after == pytest.approx(opened + 5 - now())
            await trio.sleep(0.4)
        assert there.sites[0].calls == 3
        await trio.sleep_until(opened + 5)
        await try_names(client, 10)
        assert there.sites[0].calls == 4, "one tries it"
        there.sites[0].answer = "a"
        await trio.sleep(9)
        await try_names(client, 10)
        assert there.sites[0].calls == 4, "longer after the second time"
        await trio.sleep(1)
        assert await try_names(client, 10) == {"a": 10}
        there.fail(0, status)
        assert (await try_names(client, 3))[status.name] == 3
        assert there.sites[0].calls == 17


async def test_half_open_lets_one_call_through(autojump_clock, sites):
    there = sites("a")
    there.fail(0)
    async with there.connect(retry=None, breaker=BREAKER) as client:
        await try_names(client, 3)
        await trio.sleep(5)
        there.sites[0].answer = "a"
        there.sites[0].pause = 2.0
        results: Counter[str] = Counter()

        async def call() -> None:
            results.update(await try_names(client, 1))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(call)
        assert results == {"a": 1, "UNAVAILABLE": 9}
        assert there.sites[0].calls == 4
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(call)
        assert results["a"] == 11


async def test_a_probe_that_is_given_up_leaves_its_place_to_another(autojump_clock, sites):
    there = sites("a")
    there.fail(0)
    async with there.connect(retry=None, breaker=BREAKER) as client:
        await try_names(client, 3)
        await trio.sleep(5)
        there.sites[0].answer = "a"
        there.sites[0].pause = 2.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stub(Site).name)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert await try_names(client, 1) == {"a": 1}


async def test_a_probe_that_is_never_sent_is_not_waited_for(autojump_clock, sites):
    there = sites("a")
    there.fail(0)
    async with there.connect(retry=None, breaker=BREAKER) as client:
        await try_names(client, 3)
        there.sites[0].answer = "a"
        await trio.sleep(5)
        bad = client.stub(Site, metadata={"key": "x" * 10**6})
        with pytest.raises(RpcError) as failed:
            await bad.name()
        assert failed.value.status is Status.INVALID_ARGUMENT
        await trio.sleep(5)
        assert await try_names(client, 10) == {"a": 10}


async def test_a_bad_server_that_was_used_for_lack_of_others_is_tried_again(autojump_clock, sites):
    there = sites("ab")
    there.fail(0)
    async with there.connect(**PLAIN) as client:
        await try_names(client, 20)
        there.networks[1].answer = refuse
        there.networks[1].lose(0)
        await trio.sleep(1)
        await try_names(client, 4)
        there.networks[1].answer = trio.lowlevel.checkpoint
        there.sites[0].answer = "a"
        await trio.sleep(60)
        assert (await try_names(client, 20))["a"] >= 9


async def test_a_deadline_that_passes_counts(autojump_clock, sites):
    there = sites("a")
    there.sites[0].pause = 100
    async with there.connect(breaker=BREAKER) as client:
        for _ in range(3):
            with trio.move_on_after(1) as scope:
                await client.stub(Site).name()
            assert scope.cancelled_caught
        with pytest.raises(CircuitOpen):
            await client.stub(Site).name()


async def test_calls_that_their_caller_gives_up_do_not_count(autojump_clock, sites):
    there = sites("a")
    there.sites[0].pause = 100
    async with there.connect(breaker=BREAKER) as client:
        for _ in range(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.stub(Site).name)
                await trio.sleep(1)
                nursery.cancel_scope.cancel()
        there.sites[0].pause = 0
        assert await names(client, 1) == {"a": 1}


async def test_a_rate_of_failures_opens_it_too(autojump_clock, sites):
    there = sites("a")
    breaker = Breaker(failures=1000, rate=0.25, least_calls=40)
    async with there.connect(retry=None, breaker=breaker) as client:
        for _ in range(20):
            there.sites[0].answer = "a"
            await try_names(client, 2)
            there.fail(0)
            await try_names(client, 1)
        assert 40 <= there.sites[0].calls <= 42


async def test_with_a_breaker_all_servers_may_be_out(autojump_clock, sites):
    there = sites("ab")
    there.fail(0)
    there.fail(1)
    async with there.connect(retry=None, breaker=BREAKER, balance=ROUND_ROBIN) as client:
        assert (await try_names(client, 100))["UNAVAILABLE"] == 100
        assert [site.calls for site in there.sites] == [3, 3]
        there.sites[1].answer = "b"
        await trio.sleep(5)
        answers = await try_names(client, 20)
        assert answers["b"] >= 18


async def test_a_lost_connection_counts_once_however_many_calls_it_had(autojump_clock, sites):
    there = sites("a")
    there.sites[0].pause = 10
    async with there.connect(retry=None, breaker=BREAKER) as client:

        async def call() -> None:
            with suppress(druvarpc.ConnectionLost):
                await client.stub(Site).name()

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(call)
            await trio.sleep(1)
            there.networks[0].lose(0)
        there.sites[0].pause = 0
        assert await names(client, 1) == {"a": 1}


async def test_an_open_circuit_is_not_retried(autojump_clock, sites):
    there = sites("a")
    there.fail(0)
    async with there.connect(breaker=BREAKER, retry=Retry(attempts=10)) as client:
        with pytest.raises(CircuitOpen):
            await client.stub(Site).name()
        assert there.sites[0].calls == 3


# --- addresses ---


@asynccontextmanager
async def real_sites(*names: str):
    async with AsyncExitStack() as stack:
        yield [
            (await stack.enter_async_context(served([MySite(name)]))).addresses[0] for name in names
        ]


async def test_addresses_of_real_servers():
    async with real_sites("a", "b", "c") as addresses:
        async with druvarpc.connect(addresses) as client:
            assert await names(client, 6) == {"a": 6}
        async with druvarpc.connect(["tcp://127.0.0.1:1", *addresses]) as client:
            assert await names(client, 6) == {"a": 6}
        async with druvarpc.connect(addresses, balance=ROUND_ROBIN) as client:
            assert await names(client, 6) == {"a": 2, "b": 2, "c": 2}


async def test_no_address():
    with pytest.raises(ValueError, match="no address"):
        async with druvarpc.connect([]):
            pass
    with pytest.raises(ValueError, match="unix"):
        async with druvarpc.connect(["tcp://127.0.0.1:1", "nothing"]):
            pass
