"""A server at its limit of handlers refuses calls at once, and says when to come again."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

import druvarpc
from druvarpc.load import LONGEST, SHORTEST, Load
from druvarpc.testing import connected
from tests.io.peers import Work, Workshop, serving, settled


def limits(most: int) -> druvarpc.Limits:
    return druvarpc.Limits(total_calls=most)


async def refusal(work: Work) -> druvarpc.RpcError:
    with pytest.raises(druvarpc.RpcError) as caught:
        await work.hold()
    error = caught.value
    assert error.status is druvarpc.Status.RESOURCE_EXHAUSTED
    assert error.not_started
    assert error.retry_after is not None
    assert SHORTEST <= error.retry_after <= LONGEST
    return error


async def test_the_limit_is_that_of_all_connections_together():
    workshop = Workshop()
    async with serving(workshop, limits=limits(3)) as server, AsyncExitStack() as stack:
        address = server.addresses[0]
        clients = [
            await stack.enter_async_context(druvarpc.connect(address, retry=None)) for _ in range(4)
        ]
        async with trio.open_nursery() as nursery:
            for client in clients[:3]:
                nursery.start_soon(client.stub(Work).hold)
            await workshop.until(lambda: workshop.running == 3)
            for client in clients:
                await refusal(client.stub(Work))
            assert workshop.most == 3
            workshop.release.set()
        assert server.statistics().calls_refused == 4
        assert await clients[3].stub(Work).echo(b"again") == b"again"
        await clients[3].stub(Work).hold()


async def test_a_stream_is_one_call():
    workshop = Workshop()
    async with connected([workshop], server_limits=limits(2), retry=None) as client:
        work = client.stub(Work)
        async with aclosing(work.drip()) as one, aclosing(work.drip()) as other:
            assert bytes(await anext(one)) == bytes(await anext(other)) == b"drop"
            await refusal(work)
            async with aclosing(work.drip()) as third:
                with pytest.raises(druvarpc.RpcError, match="busy"):
                    await anext(third)
            with pytest.raises(druvarpc.RpcError, match="busy"):
                await work.gather(iter_bytes())
            workshop.release.set()
            assert [bytes(item) async for item in one] == [b"drop"]
        await work.hold()


async def iter_bytes() -> AsyncGenerator[bytes, None]:
    yield b"x"


async def test_a_cancelled_handler_holds_its_place_until_it_has_ended():
    cleaned_up, cleaning = trio.Event(), trio.Event()

    class Slow(Workshop):
        async def hold(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                cleaning.set()
                with trio.CancelScope(shield=True):
                    await cleaned_up.wait()

    async with connected([Slow()], server_limits=limits(1), retry=None) as client:
        work = client.stub(Work)
        with trio.move_on_after(0.01):
            await work.hold()
        await cleaning.wait()
        for _ in range(3):
            await refusal(work)
        cleaned_up.set()
        await trio.testing.wait_all_tasks_blocked()
        assert await work.echo(b"x") == b"x"


async def test_handlers_never_pass_the_limit(autojump_clock):
    class Brief(Workshop):
        async def hold(self) -> None:
            with self.at_work():
                await trio.sleep(0.001)

    workshop, refused, done = Brief(), [], []

    async def call(work: Work) -> None:
        for _ in range(10):
            try:
                await work.hold()
            except druvarpc.RpcError as error:
                refused.append(error.retry_after)
            else:
                done.append(1)

    async with connected([workshop], server_limits=limits(20), retry=None) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(call, client.stub(Work))
    assert workshop.most == 20
    assert done
    assert len(refused) + len(done) == 2000


async def test_of_a_club_as_many_run_as_there_is_room_for():
    workshop = Workshop()
    async with connected([workshop], server_limits=limits(2), retry=None) as client:
        work = client.stub(Work)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work.hold)
            await workshop.until(lambda: workshop.running == 1)
            async with client.club(raise_errors=False) as club:
                fits = club.call(work.hold)
                refused = [club.call(work.hold) for _ in range(3)]
                nursery.start_soon(release_when_refused, client, workshop)
        assert fits.value is None
        for reply in refused:
            with pytest.raises(druvarpc.RpcError, match="busy") as caught:
                _ = reply.value
            assert caught.value.not_started


async def release_when_refused(client: druvarpc.Client, workshop: Workshop) -> None:
    await settled(lambda: client.statistics().calls_failed == 3)
    workshop.release.set()


async def test_refused_callers_are_told_to_come_one_after_the_other(autojump_clock):
    """With handlers of 1 s, ten at once, a place becomes free every 0.1 s."""

    class Steady(Workshop):
        async def hold(self) -> None:
            with self.at_work():
                await trio.sleep(1)

    workshop = Steady()
    async with connected([workshop], server_limits=limits(10), retry=None) as client:
        work = client.stub(Work)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(work.hold)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(work.hold)
            await workshop.until(lambda: workshop.running == 10)
            delays = [(await refusal(work)).retry_after for _ in range(70)]
            assert delays[:50] == pytest.approx([0.1 * count for count in range(1, 51)])
            assert set(delays[50:]) == {LONGEST}


async def test_clients_obey(autojump_clock):
    """By default they come again when they are told to, and so all calls are done in the end."""
    begun = []

    class Steady(Workshop):
        async def hold(self) -> None:
            with self.at_work():
                begun.append(trio.current_time())
                await trio.sleep(0.2)

    workshop = Steady()
    async with connected([workshop], server_limits=limits(10)) as client:
        work = client.stub(Work)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(work.hold)
        start = trio.current_time()
        begun.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(work.hold)
        took = trio.current_time() - start
        retried = client.statistics().calls_retried
    assert workshop.finished == 60
    assert workshop.most == 10
    # Without a plan each of the 40 would have come back many times, until one had luck.
    assert 40 <= retried <= 80
    assert 1.0 <= took <= 2.5
    assert min(sorted(begun)[10:]) >= start + 0.2


async def test_a_deadline_before_the_delay_ends_the_call_at_once(autojump_clock):
    workshop = Workshop()
    async with connected([workshop], server_limits=limits(1)) as client:
        work = client.stub(Work)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work.hold)
            await workshop.until(lambda: workshop.running == 1)
            start = trio.current_time()
            with trio.fail_after(0.005):
                await refusal(work)
            assert trio.current_time() == start
            workshop.release.set()


async def test_a_handler_can_ask_for_a_pause_by_hand(autojump_clock):
    times = []

    class Tired(druvarpc.Service):
        @druvarpc.rpc(idempotent=True)
        async def work(self) -> str:
            times.append(trio.current_time())
            if len(times) == 1:
                raise druvarpc.RpcError(
                    druvarpc.Status.RESOURCE_EXHAUSTED, "tired", {"retry_after": 0.5}
                )
            return "done"

    async with connected([Tired()]) as client:
        assert await client.stub(Tired).work() == "done"
    assert times[1] - times[0] >= 0.5


@pytest.mark.parametrize("most", [0, -1])
def test_the_limit_is_a_positive_number(most):
    with pytest.raises(ValueError, match="total_calls"):
        limits(most)


@given(
    most=st.integers(1, 1000),
    steps=st.lists(
        st.tuples(st.sampled_from(["enter", "leave", "refuse"]), st.floats(0, 1000)), max_size=60
    ),
)
def test_delays_are_bounded_and_refused_calls_come_in_turn(most, steps):
    load, now, running, last = Load(most), 0.0, 0, 0.0
    for what, seconds in steps:
        now += seconds / 100
        if what == "enter" and not load.full:
            load.enter()
            running += 1
        elif what == "leave" and running:
            load.leave(seconds)
            running -= 1
        elif what == "refuse":
            delay = load.refuse(now)
            assert SHORTEST <= delay <= LONGEST
            assert now + delay >= last or delay == LONGEST
            last = now + delay if delay > SHORTEST else last
        assert load.running == running <= most
        assert load.full == (running == most)
