# Declarations have no bodies.
# mypy: disable-error-code="empty-body"
"""Where the time of calls went: each part is caused alone, and found where it belongs."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import fields

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc.testing import Link, connected
from tests.io.services import served

RTT = 0.1
PARTS = [field.name for field in fields(druvarpc.CallTimes)][2:]


class Work(druvarpc.Service):
    @druvarpc.rpc
    async def sleep(self, seconds: float) -> float: ...

    @druvarpc.rpc
    async def size(self, data: bytes) -> int: ...

    @druvarpc.rpc
    async def other(self) -> None: ...

    @druvarpc.rpc
    async def upload(self, pieces: AsyncIterator[bytes], seconds: float = 0.0) -> int: ...

    @druvarpc.rpc
    def download(
        self, count: int, size: int, seconds: float = 0.0
    ) -> AsyncGenerator[bytes, None]: ...

    @druvarpc.rpc
    def echo(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]: ...

    @druvarpc.rpc
    async def missing(self) -> None: ...


class Worker(Work):
    async def sleep(self, seconds: float) -> float:
        await trio.sleep(seconds)
        return seconds

    async def size(self, data: bytes) -> int:
        return len(data)

    async def other(self) -> None:
        pass

    async def upload(self, pieces: AsyncIterator[bytes], seconds: float = 0.0) -> int:
        size = 0
        async for piece in pieces:
            size += len(piece)
            await trio.sleep(seconds)
        return size

    async def download(
        self, count: int, size: int, seconds: float = 0.0
    ) -> AsyncGenerator[bytes, None]:
        for _ in range(count):
            await trio.sleep(seconds)
            yield bytes(size)

    async def echo(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for piece in pieces:
            yield piece


async def pieces(count: int, size: int, seconds: float = 0.0) -> AsyncGenerator[bytes, None]:
    for _ in range(count):
        await trio.sleep(seconds)
        yield bytes(size)


def check(found: druvarpc.CallTimes, total: float, **parts: float) -> None:
    """Parts that aren't named took no time."""
    assert found.total == pytest.approx(total, rel=0.02, abs=0.001)
    for name in PARTS:
        expected = parts.get(name, 0.0)
        assert getattr(found, name) == pytest.approx(expected, rel=0.02, abs=0.001), (name, found)
    assert sum(getattr(found, name) for name in PARTS) == pytest.approx(found.total)


async def test_the_way(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT)) as client:
        await client.stub(Work, timings=took.append).size(b"")
    [one] = took
    assert one.method == "Work.size"
    check(one, RTT, way=RTT)


async def test_a_slow_handler(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT)) as client:
        await client.stub(Work, timings=took.append).sleep(2.0)
    check(took[0], 2 + RTT, way=RTT, handler=2)


async def test_a_club_that_lingers(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    clubbing = druvarpc.Clubbing(linger=0.5)
    async with connected([Worker()], link=Link(rtt=RTT), clubbing=clubbing) as client:
        await client.stub(Work, timings=took.append).size(b"")
    check(took[0], 0.5 + RTT, club=0.5, way=RTT)


async def test_a_server_that_takes_no_more_calls(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    limits = druvarpc.Limits(max_calls=64)
    async with connected([Worker()], link=Link(rtt=RTT), server_limits=limits) as client:
        work = client.stub(Work)
        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(work.sleep, 3.0)
            await trio.sleep(1)
            await client.stub(Work, timings=took.append).size(b"")
    check(took[0], 2 + 2 * RTT, club=2 + RTT, way=RTT)


async def test_a_slow_link(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    link = Link(rtt=RTT, bandwidth=100_000, queue=10_000)
    async with connected([Worker()], link=link) as client:
        await client.ping()
        work = client.stub(Work, timings=took.append)
        async with client.club() as club:
            for _ in range(15):
                club.call(work.size, bytes(4000))
    # The last of the 60,000 bytes was taken when 10,000 were still to leave.
    for one in took:
        assert one.total == pytest.approx(0.6 + RTT, abs=0.01)
        assert one.socket == pytest.approx(0.5, abs=0.02)
        assert one.way == pytest.approx(0.1 + RTT, abs=0.02)
        assert one.socket + one.way == pytest.approx(one.total)


async def test_a_small_window(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    limits = druvarpc.Limits(stream_window=65_536, memory=1)
    link = Link(rtt=1.0)
    async with connected([Worker()], link=link, server_limits=limits) as client:
        await client.ping()
        await trio.sleep(10)
        await client.stub(Work, timings=took.append).upload(pieces(10, 60_000))
    [one] = took
    assert one.way == pytest.approx(1.0, rel=0.1)
    assert one.credit == pytest.approx(one.total - 1, rel=0.02)
    assert one.credit > 4


async def test_a_slow_handler_of_an_upload_is_not_taken_for_lack_of_credit(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT)) as client:
        work = client.stub(Work, timings=took.append)
        await work.upload(pieces(100, 100_000), 0.1)
    [one] = took
    assert one.total == pytest.approx(10 + RTT, rel=0.01)
    assert one.handler == pytest.approx(10, rel=0.01)


async def test_an_upload_over_a_slow_link_is_on_the_way(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT, bandwidth=1e6)) as client:
        work = client.stub(Work, timings=took.append)
        await work.upload(pieces(100, 100_000))
    [one] = took
    assert one.total == pytest.approx(10 + RTT, rel=0.02)
    assert one.way > 0.95 * one.total


async def test_a_caller_that_is_slow_itself(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT)) as client:
        work = client.stub(Work, timings=took.append)
        await work.upload(pieces(10, 1000, 1.0))
    check(took[0], 10 + RTT, caller=10, way=RTT)


async def test_a_reply_that_comes_while_the_caller_is_asked_for_more(autojump_clock):
    class Hasty(Worker):
        async def upload(self, pieces: AsyncIterator[bytes], seconds: float = 0.0) -> int:
            await trio.sleep(1)
            return 0

    took: list[druvarpc.CallTimes] = []
    async with connected([Hasty()], link=Link(rtt=RTT)) as client:
        await client.stub(Work, timings=took.append).upload(pieces(1, 1, 100.0))
    check(took[0], 1 + RTT, handler=1, caller=RTT)


async def test_a_download_whose_caller_takes_its_time(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT)) as client:
        work = client.stub(Work, timings=took.append)
        async with aclosing(work.download(300, 100_000)) as found:
            async for _ in found:
                await trio.sleep(0.1)
    [one] = took
    assert one.total > 15
    assert one.credit > 0.95 * one.total
    assert one.handler < 0.001


async def test_a_download_whose_handler_takes_its_time(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT)) as client:
        work = client.stub(Work, timings=took.append)
        async with aclosing(work.download(10, 1000, 1.0)) as found:
            assert len([piece async for piece in found]) == 10
    check(took[0], 10 + RTT, handler=10, way=RTT)


async def test_a_bidirectional_call(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT)) as client:
        work = client.stub(Work, timings=took.append)
        async with aclosing(work.echo(pieces(5, 1000, 1.0))) as found:
            assert len([piece async for piece in found]) == 5
    check(took[0], 5 + RTT, caller=5, way=RTT)


async def test_a_chain_in_a_club(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT)) as client:
        work = client.stub(Work, timings=took.append)
        async with client.club() as club:
            first = club.call(work.sleep, 2.0)
            club.call(work.sleep, first)
    check(took[0], 2 + RTT, handler=2, way=RTT)
    check(took[1], 4 + RTT, queue=2, handler=2, way=RTT)


async def test_handlers_that_keep_the_server_busy(autojump_clock):
    class Busy(Worker):
        async def size(self, data: bytes) -> int:
            autojump_clock.jump(1.0)  # it computes
            return 0

    took: list[druvarpc.CallTimes] = []
    async with connected([Busy()], link=Link(rtt=RTT)) as client:
        work = client.stub(Work, timings=took.append)
        async with client.club() as club:
            for _ in range(3):
                club.call(work.size, b"")
    assert [one.queue for one in took] == pytest.approx([0, 1, 2], abs=0.001)
    assert [one.handler for one in took] == pytest.approx([1, 1, 1], abs=0.001)


async def test_windowed_calls_have_times_too(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], link=Link(rtt=RTT), timings=took.append) as client:
        work = client.stub(Work)
        async with aclosing(druvarpc.windowed(work.sleep, [1.0] * 20, window=10)) as found:
            assert len([one async for one in found]) == 20
    for one in took:
        check(one, 1 + RTT, handler=1, way=RTT)
    assert len(took) == 20


# Who asks, and who is told.


async def test_a_stub_decides_for_itself(autojump_clock):
    took: list[druvarpc.CallTimes] = []
    async with connected([Worker()], timings=took.append) as client:
        await client.stub(Work).other()
        await client.stub(Work, timings=False).other()
        assert not (await client.stub(Work, timings=True).other())
        assert [one.method for one in took] == ["Work.other"]
        assert client.statistics().times["Work.other"].count == 2


async def test_nobody_asks_by_default():
    async with connected([Worker()]) as client:
        await client.stub(Work).other()
        assert client.statistics().times == {}


@pytest.mark.parametrize("connections", [1, 2])
async def test_both_sides_sum_up_by_method(connections, autojump_clock):
    async with served([Worker()]) as server:
        async with druvarpc.connect(
            server.addresses[0], timings=True, connections=connections
        ) as client:
            work = client.stub(Work)
            await work.sleep(1.0)
            await work.sleep(3.0)
            with pytest.raises(druvarpc.RpcError):
                await work.missing()
        near, far = client.statistics().times, server.statistics().times
    for side in (near, far):
        assert set(side) == {"Work.sleep", "Work.missing"}
        assert side["Work.sleep"].count == 2
        assert side["Work.sleep"].handler == pytest.approx(4, abs=0.01)
        assert side["Work.sleep"].mean.handler == pytest.approx(2, abs=0.01)
        assert side["Work.sleep"].mean.method == "Work.sleep"
        assert type(side["Work.sleep"].mean) is druvarpc.CallTimes
        assert side["Work.missing"].count == 1


async def test_a_server_keeps_no_names_that_a_client_made_up(autojump_clock):
    class Unknown(druvarpc.Service, name="Made.up"):
        @druvarpc.rpc
        async def name(self) -> None: ...

    async with served([Worker()]) as server:
        async with druvarpc.connect(server.addresses[0], timings=True) as client:
            with pytest.raises(druvarpc.RpcError):
                await client.stub(Unknown).name()
            assert client.statistics().times["Made.up.name"].count == 1
        assert server.statistics().times == {}


async def test_a_call_that_its_caller_gives_up_has_no_times(autojump_clock):
    async with served([Worker()]) as server:
        async with druvarpc.connect(server.addresses[0], timings=True) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.stub(Work).sleep, 100)
                await trio.sleep(1)
                nursery.cancel_scope.cancel()
            await client.ping()
            while server.statistics().calls_active:
                await trio.testing.wait_all_tasks_blocked()
            assert client.statistics().times == server.statistics().times == {}


async def test_a_call_that_fails_has_times(autojump_clock):
    class Failing(Worker):
        async def sleep(self, seconds: float) -> float:
            await trio.sleep(seconds)
            raise druvarpc.RpcError(druvarpc.Status.NOT_FOUND, "nothing")

    took: list[druvarpc.CallTimes] = []
    async with connected([Failing()], link=Link(rtt=RTT), timings=took.append) as client:
        with pytest.raises(druvarpc.RpcError):
            await client.stub(Work).sleep(1.0)
    check(took[0], 1 + RTT, handler=1, way=RTT)


async def test_what_takes_times_may_fail(caplog):
    def fail(_: druvarpc.CallTimes) -> None:
        raise ValueError("no more room")

    async with connected([Worker()], timings=fail) as client:
        work = client.stub(Work)
        with caplog.at_level(logging.ERROR, logger="druvarpc"):
            assert await work.size(b"123") == 3
            assert await work.size(b"1234") == 4
        assert client.statistics().times["Work.size"].count == 2
    assert [record.exc_info[0] for record in caplog.records] == [ValueError, ValueError]


# Which calls rode together.


async def test_statistics_tell_which_calls_rode_together(autojump_clock):
    async with connected([Worker()], link=Link(rtt=RTT)) as client:
        work = client.stub(Work)
        await work.other()
        for _ in range(3):
            async with client.club() as club:
                club.call(work.size, b"")
                club.call(work.other)
                club.call(work.size, b"")
        assert client.statistics().clubs == {
            ("Work.other",): (1, 1),
            ("Work.other", "Work.size"): (3, 9),
        }
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(work.other)
        clubs = client.statistics().clubs
        assert clubs["Work.other",] == druvarpc.ClubCount(frames=2, calls=6)
    assert client.statistics().clubs == clubs


async def test_the_clubs_of_all_connections_are_summed_up():
    async with served([Worker()]) as server:
        async with druvarpc.connect(server.addresses[0], connections=2) as client:
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(client.stub(Work).other)
            clubs = client.statistics().clubs
            assert clubs["Work.other",].calls == 100
            assert clubs["Work.other",].frames == client.statistics().clubs_sent
        assert client.statistics().clubs == clubs
        assert server.statistics().clubs == {}
