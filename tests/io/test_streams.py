# mypy: disable-error-code="empty-body"
import array
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc import RpcError, Status
from druvarpc.testing import connected
from tests.io.services import Chunk, ClosedGate, Gate, MemoryVault, Vault

MB = 1024 * 1024


async def each(*items):
    for item in items:
        yield item


async def test_client_streaming(reach):
    async with reach([MemoryVault()]) as client:
        assert await client.stub(Vault).upload(each(b"one", b"three")) == 8


async def test_server_streaming(reach):
    async with reach([MemoryVault()]) as client:
        async with aclosing(client.stub(Vault).download([3, 0, 1])) as pieces:
            assert [piece async for piece in pieces] == [bytes(3), b"", bytes(1)]


async def test_bidirectional_streaming(reach):
    async with reach([MemoryVault()]) as client:
        async with aclosing(client.stub(Vault).sync(each(b"a", b"", b"c"))) as pieces:
            assert [piece async for piece in pieces] == [b"A", b"", b"C"]


async def test_streams_of_typed_items(reach):
    async with reach([MemoryVault()]) as client:
        vault = client.stub(Vault)
        assert await vault.total(each(Chunk(b"1", b"abc"), Chunk(b"2", b""))) == 3
        async with aclosing(vault.chunks(2)) as chunks:
            assert [one async for one in chunks] == [Chunk(b"0", b"data"), Chunk(b"1", b"data")]
        async with aclosing(vault.double(each(1, 2, -3))) as numbers:
            assert [number async for number in numbers] == [2, 4, -6]


async def test_streams_of_nothing():
    async with connected([MemoryVault()]) as client:
        vault = client.stub(Vault)
        assert await vault.upload(each()) == 0
        async with aclosing(vault.download([])) as pieces:
            assert [piece async for piece in pieces] == []
        async with aclosing(vault.sync(each())) as pieces:
            assert [piece async for piece in pieces] == []


async def test_ten_thousand_items_each_way(reach):
    async with reach([MemoryVault()]) as client:
        vault = client.stub(Vault)
        numbers = list(range(10_000))
        async with aclosing(vault.double(each(*numbers))) as doubled:
            assert [number async for number in doubled] == [2 * number for number in numbers]


async def test_large_pieces_each_way(reach):
    class Echo(MemoryVault):
        async def sync(self, have):
            async for piece in have:
                yield piece

    sent = [bytes([number]) * (3 * MB) for number in range(4)]
    async with reach([Echo()]) as client:
        async with aclosing(client.stub(Vault).sync(each(*sent))) as pieces:
            assert [piece async for piece in pieces] == sent


BUFFERS = [
    b"bytes",
    bytearray(b"bytes"),
    memoryview(b"bytes"),
    memoryview(b"xbxyxtxexs")[1::2],
    array.array("B", b"bytes"),
]


@pytest.mark.parametrize("buffer", BUFFERS, ids=lambda buffer: type(buffer).__name__)
async def test_pieces_of_bytes_may_be_any_buffer(buffer):
    class Buffers(MemoryVault):
        async def download(self, sizes):
            yield buffer

    async with connected([Buffers()]) as client:
        vault = client.stub(Vault)
        assert await vault.upload(each(buffer)) == 5
        async with aclosing(vault.sync(each(buffer))) as pieces:
            assert [piece async for piece in pieces] == [b"BYTES"]
        async with aclosing(vault.download([])) as pieces:
            (piece,) = [piece async for piece in pieces]
            assert piece == b"bytes"
            assert type(piece) is bytes


async def test_a_buffer_may_be_used_again_once_it_was_sent():
    async def reused():
        buffer = bytearray(1000)
        for number in range(100):
            buffer[:] = bytes([number]) * 1000
            yield buffer

    class Collect(MemoryVault):
        async def upload(self, pieces):
            return sum([len(set(piece)) == 1 async for piece in pieces])

        async def sync(self, have):
            async for piece in have:
                yield piece

    async with connected([Collect()]) as client:
        vault = client.stub(Vault)
        assert await vault.upload(reused()) == 100
        async with aclosing(vault.sync(reused())) as pieces:
            assert [set(piece) async for piece in pieces] == [{number} for number in range(100)]


@pytest.mark.parametrize("piece", ["text", 3, None, [1]])
async def test_a_piece_that_is_no_buffer(piece):
    async with connected([MemoryVault()]) as client:
        with pytest.raises(RpcError, match=r"Vault\.upload: item of pieces") as caught:
            await client.stub(Vault).upload(each(piece))
        assert caught.value.status is Status.INVALID_ARGUMENT


async def test_pieces_of_all_sizes_keep_their_bounds(reach):
    sizes = [0, 1, 65_535, 65_536, 65_537, 0, 0, 300_000, 1, 0]
    seen = []

    class Sizes(MemoryVault):
        async def upload(self, pieces):
            seen.extend([len(piece) async for piece in pieces])
            return len(seen)

    async with reach([Sizes()]) as client:
        vault = client.stub(Vault)
        assert await vault.upload(each(*map(bytes, sizes))) == len(sizes)
        assert seen == sizes
        async with aclosing(vault.download(sizes)) as pieces:
            assert [len(piece) async for piece in pieces] == sizes


async def test_pieces_at_the_message_limit():
    limits = druvarpc.Limits(max_message=100_000)
    async with connected([MemoryVault()], limits=limits, server_limits=limits) as client:
        vault = client.stub(Vault)
        assert await vault.upload(each(bytes(100_000))) == 100_000
        async with aclosing(vault.download([100_000])) as pieces:
            assert [len(piece) async for piece in pieces] == [100_000]


async def test_an_uploaded_piece_above_the_limit():
    limits = druvarpc.Limits(max_message=100_000)
    async with connected([MemoryVault()], server_limits=limits) as client:
        vault = client.stub(Vault)
        with pytest.raises(RpcError) as caught:
            await vault.upload(each(b"small", bytes(100_001)))
        assert caught.value.status is Status.RESOURCE_EXHAUSTED
        assert await vault.add(1, 2) == 3


async def test_a_downloaded_piece_above_the_limit():
    limits = druvarpc.Limits(max_message=100_000)
    async with connected([MemoryVault()], limits=limits) as client:
        vault = client.stub(Vault)
        sizes = []
        with pytest.raises(RpcError) as caught:
            async with aclosing(vault.download([10, 100_001])) as pieces:
                async for piece in pieces:
                    sizes.append(len(piece))
        assert sizes == [10]
        assert caught.value.status is Status.RESOURCE_EXHAUSTED
        assert await vault.add(1, 2) == 3


async def test_an_item_of_the_wrong_type_is_refused_where_the_handler_reads_it():
    seen = []

    class Watched(MemoryVault):
        async def total(self, chunks):
            async for chunk in chunks:
                seen.append(chunk.digest)
            return 0

    async with connected([Watched()]) as client:
        with pytest.raises(RpcError, match=r"Vault\.total: item of chunks\.data") as caught:
            await client.stub(Vault).total(each(Chunk(b"good", b""), Chunk(b"bad", 7)))
        assert caught.value.status is Status.INVALID_ARGUMENT
        assert seen == [b"good"]


async def test_what_is_no_async_iterable_is_a_type_error_at_once():
    async with connected([MemoryVault()]) as client:
        with pytest.raises(TypeError, match=r"Vault\.upload"):
            client.stub(Vault).upload([b"a"])  # type: ignore[arg-type]


async def test_any_async_iterable_is_a_source():
    sender, receiver = trio.open_memory_channel[bytes](10)
    async with connected([MemoryVault()]) as client, sender, receiver:
        for _ in range(3):
            sender.send_nowait(b"abc")
        await sender.aclose()
        assert await client.stub(Vault).upload(receiver) == 9


async def test_a_stream_and_other_arguments_together():
    class Mixed(druvarpc.Service):
        @druvarpc.rpc
        async def join(self, before: str, words: AsyncIterator[str], after: str = "!") -> str: ...

    class MyMixed(Mixed):
        async def join(self, before: str, words: AsyncIterator[str], after: str = "!") -> str:
            return before + "".join([word async for word in words]) + after

    async with connected([MyMixed()]) as client:
        stub = client.stub(Mixed)
        assert await stub.join("<", each("a", "b")) == "<ab!"
        assert await stub.join("<", words=each("a"), after=">") == "<a>"


async def test_a_reply_that_comes_early_ends_the_upload(reach):
    taken = 0

    class Hasty(MemoryVault):
        async def upload(self, pieces):
            async for _ in pieces:
                return 42
            return 0

    async def endless():
        nonlocal taken
        while True:
            taken += 1
            yield bytes(10_000)

    async with reach([Hasty()]) as client:
        async with aclosing(endless()) as pieces:
            assert await client.stub(Vault).upload(pieces) == 42
        assert taken < 1000
        assert await client.stub(Vault).add(1, 2) == 3


async def test_a_reply_that_comes_early_wakes_a_source_that_waits():
    class Hasty(MemoryVault):
        async def upload(self, pieces):
            return 42

    async def silent():
        yield b"one"
        await trio.sleep_forever()

    async with connected([Hasty()]) as client:
        async with aclosing(silent()) as pieces:
            assert await client.stub(Vault).upload(pieces) == 42


async def test_an_error_that_comes_early_ends_the_upload():
    class Refusing(MemoryVault):
        async def upload(self, pieces):
            raise RpcError(Status.PERMISSION_DENIED, "not you")

    async def silent():
        yield b"one"
        await trio.sleep_forever()

    async with connected([Refusing()]) as client:
        async with aclosing(silent()) as pieces:
            with pytest.raises(RpcError, match="not you"):
                await client.stub(Vault).upload(pieces)


async def test_a_source_given_to_an_upload_is_closed_with_it():
    closed = []

    class Hasty(MemoryVault):
        async def upload(self, pieces):
            await anext(pieces)
            return 42

        async def sync(self, have):
            yield await anext(have)

    async def endless():
        try:
            while True:
                yield bytes(10_000)
        finally:
            closed.append(True)

    async with connected([Hasty()]) as client:
        vault = client.stub(Vault)
        assert await vault.upload(endless()) == 42
        assert closed == [True]
        async with aclosing(vault.sync(endless())) as pieces:
            assert len(await anext(pieces)) == 10_000
        assert closed == [True] * 2
        with pytest.raises(RpcError, match="item of pieces"):
            await vault.upload(source_of_nonsense(closed))
        assert closed == [True] * 3


async def source_of_nonsense(closed):
    try:
        yield 7
    finally:
        closed.append(True)


async def test_a_handler_that_ends_a_bidirectional_call_early():
    class Hasty(MemoryVault):
        async def sync(self, have):
            yield b"enough"

    async def silent():
        yield b"one"
        await trio.sleep_forever()

    async with connected([Hasty()]) as client:
        async with aclosing(client.stub(Vault).sync(silent())) as pieces:
            assert [piece async for piece in pieces] == [b"enough"]


async def test_ping_pong_where_each_needs_the_other(reach):
    class Counter(MemoryVault):
        async def double(self, numbers):
            async for number in numbers:
                yield 2 * number

    async with reach([Counter()]) as client:
        sender, receiver = trio.open_memory_channel[int](0)
        value = 1
        async with aclosing(client.stub(Vault).double(receiver)) as doubled, sender:
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(sender.send, value)
                    value = await anext(doubled)
            await sender.aclose()
            assert [number async for number in doubled] == []
        assert value == 2**20


class Broken(Exception):
    pass


async def breaks_after(count):
    for _ in range(count):
        yield b"piece"
    raise Broken


async def test_a_source_that_fails_during_an_upload(reach):
    outcomes = []

    class Watched(MemoryVault):
        async def upload(self, pieces):
            try:
                async for _ in pieces:
                    pass
                outcomes.append("complete")
            except trio.Cancelled:
                outcomes.append("cancelled")
                raise
            return 0

    async with reach([Watched()]) as client:
        with pytest.raises(Broken):
            await client.stub(Vault).upload(breaks_after(3))
        assert await client.stub(Vault).add(1, 2) == 3
    assert "complete" not in outcomes


@pytest.mark.parametrize("count", [0, 3])
async def test_a_source_that_fails_during_a_bidirectional_call(count):
    outcomes = []

    class Watched(MemoryVault):
        async def sync(self, have):
            try:
                async for piece in have:
                    yield piece
                outcomes.append("complete")
            finally:
                outcomes.append("over")

    async with connected([Watched()]) as client:
        with pytest.raises(Broken):
            async with aclosing(client.stub(Vault).sync(breaks_after(count))) as pieces:
                async for _ in pieces:
                    pass
        assert await client.stub(Vault).add(1, 2) == 3
    assert "complete" not in outcomes


async def test_a_source_that_fails_while_the_call_waits_for_a_place():
    gate = ClosedGate()
    limits = druvarpc.Limits(max_calls=64)
    async with connected([gate, MemoryVault()], server_limits=limits) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(client.stub(Gate).enter)
            await gate.until_inside(64)
            with pytest.raises(Broken):
                async with aclosing(client.stub(Vault).sync(breaks_after(3))) as pieces:
                    async for _ in pieces:
                        pass
            with pytest.raises(Broken):
                await client.stub(Vault).upload(breaks_after(3))
            gate.opened.set()


async def test_items_before_an_error_arrive(reach):
    class Breaking(MemoryVault):
        async def download(self, sizes):
            for size in sizes:
                yield bytes(size)
            raise RpcError(Status.DATA_LOSS, "the rest is gone", sizes)

    sizes = [1, 2, 200_000, 3]
    arrived = []
    async with reach([Breaking()]) as client:
        with pytest.raises(RpcError) as caught:
            async with aclosing(client.stub(Vault).download(sizes)) as pieces:
                async for piece in pieces:
                    arrived.append(len(piece))
    assert arrived == sizes
    assert caught.value.status is Status.DATA_LOSS
    assert caught.value.details == sizes


async def test_an_exception_in_the_middle_of_a_stream_is_internal(caplog):
    class Breaking(MemoryVault):
        async def chunks(self, count):
            yield Chunk(b"1", b"")
            raise ValueError("secret")

    async with connected([Breaking()]) as client:
        arrived = []
        with pytest.raises(RpcError) as caught:
            async with aclosing(client.stub(Vault).chunks(5)) as chunks:
                async for chunk in chunks:
                    arrived.append(chunk.digest)
    assert arrived == [b"1"]
    assert caught.value.status is Status.INTERNAL
    assert "secret" not in caught.value.message
    assert len([one for one in caplog.records if one.name == "druvarpc"]) == 1


async def test_a_streaming_handler_that_yields_the_wrong_type(caplog):
    class Wrong(MemoryVault):
        async def download(self, sizes):
            yield 7

        async def chunks(self, count):
            yield "no chunk"

    async with connected([Wrong()]) as client:
        vault = client.stub(Vault)
        with pytest.raises(RpcError) as caught:
            await anext(vault.download([]))
        assert caught.value.status is Status.INTERNAL
        with pytest.raises(RpcError, match=r"Vault\.chunks: item of the result"):
            await anext(vault.chunks(1))


async def test_a_download_that_is_left_early_cancels_the_handler_and_its_tasks(reach):
    ended = []
    over = trio.Event()

    class Busy(MemoryVault):
        async def download(self, sizes):
            async def work():
                try:
                    await trio.sleep_forever()
                finally:
                    ended.append("task")

            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(work)
                    nursery.start_soon(work)
                    sender, receiver = trio.open_memory_channel[bytes](0)
                    nursery.start_soon(self._produce, sender)
                    with receiver:
                        async for piece in receiver:
                            yield piece
            finally:
                ended.append("handler")
                over.set()

        async def _produce(self, sender):
            while True:
                await sender.send(b"piece")

    async with reach([Busy()]) as client:
        async with aclosing(client.stub(Vault).download([])) as pieces:
            async for _ in pieces:
                break
        with trio.fail_after(10):
            await over.wait()
        assert ended == ["task", "task", "handler"]
        assert await client.stub(Vault).add(1, 2) == 3


async def test_a_bidirectional_call_that_is_left_early_ends_its_source_and_its_handler():
    ended = []
    over = trio.Event()

    class Watched(MemoryVault):
        async def sync(self, have):
            try:
                async for piece in have:
                    yield piece
            finally:
                ended.append("handler")
                over.set()

    async def source():
        try:
            yield b"one"
            await trio.sleep_forever()
        finally:
            ended.append("source")

    async with connected([Watched()]) as client:
        async with aclosing(client.stub(Vault).sync(source())) as pieces:
            assert await anext(pieces) == b"one"
        assert "source" in ended
        await over.wait()
    assert sorted(ended) == ["handler", "source"]


async def test_a_generator_that_was_never_started_makes_no_call():
    async with connected([MemoryVault()]) as client:
        await client.stub(Vault).download([1]).aclose()
        assert client.statistics().calls_started == 0


async def test_the_cleanup_of_a_handler_may_wait(autojump_clock):
    cleaned = trio.Event()

    class Tidy(MemoryVault):
        async def download(self, sizes):
            try:
                while True:
                    yield b"piece"
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(5)
                cleaned.set()

    async with connected([Tidy()]) as client:
        async with aclosing(client.stub(Vault).download([])) as pieces:
            await anext(pieces)
        start = trio.current_time()
        await cleaned.wait()
        assert trio.current_time() - start == 5


async def test_a_handler_may_keep_reading_while_it_writes():
    class Both(MemoryVault):
        async def sync(self, have):
            async with trio.open_nursery() as nursery:
                sender, receiver = trio.open_memory_channel[bytes](0)

                async def read():
                    async with sender:
                        async for piece in have:
                            await sender.send(piece[::-1])

                nursery.start_soon(read)
                async for piece in receiver:
                    yield piece

    async with connected([Both()]) as client:
        async with aclosing(client.stub(Vault).sync(each(b"ab", b"cd"))) as pieces:
            assert [piece async for piece in pieces] == [b"ba", b"dc"]


async def test_two_tasks_of_a_handler_that_read_the_same_stream_are_told():
    busy = []

    class Greedy(MemoryVault):
        async def upload(self, pieces):
            async def read():
                try:
                    await anext(pieces)
                except trio.BusyResourceError:
                    busy.append(True)
                    started.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                nursery.start_soon(read)
            return 0

    started = trio.Event()

    async def late():
        await started.wait()
        yield b"one"

    async with connected([Greedy()]) as client:
        await client.stub(Vault).upload(late())
    assert busy == [True]


# Flow control.


class Fountain(MemoryVault):
    """Produces pieces without end, and counts them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.produced = 0
        self.read = 0
        self.go_on = trio.Event()

    async def download(self, sizes: list[int]) -> AsyncGenerator[bytes, None]:
        while True:
            self.produced += 1
            yield bytes(self.size)

    async def upload(self, pieces: AsyncIterator[bytes]) -> int:
        await self.go_on.wait()
        async for _ in pieces:
            self.read += 1
        return self.read


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000, 3 * MB])
async def test_a_client_that_stops_reading_stops_the_handler(size):
    fountain = Fountain(size)
    async with connected([fountain]) as client:
        async with aclosing(client.stub(Vault).download([])) as pieces:
            await anext(pieces)
            await trio.testing.wait_all_tasks_blocked()
            produced = fountain.produced
            assert produced * (size + 64) < 16 * MB
            # Nothing moves, but other calls do.
            for _ in range(10):
                assert await client.stub(Vault).add(1, 2) == 3
            await trio.testing.wait_all_tasks_blocked()
            assert fountain.produced == produced
            for _ in range(2 * produced):
                await anext(pieces)
            assert fountain.produced > 2 * produced


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000, 3 * MB])
async def test_a_handler_that_stops_reading_stops_the_clients_source(size):
    fountain = Fountain(size)
    taken = 0
    total = min(2 * (16 * MB // (size + 64)), 20_000)

    async def source():
        nonlocal taken
        for _ in range(total):
            taken += 1
            yield bytes(size)

    async with connected([fountain]) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.stub(Vault).upload, source())
        await trio.testing.wait_all_tasks_blocked()
        stopped = taken
        assert 0 < stopped < total
        for _ in range(10):
            assert await client.stub(Vault).add(1, 2) == 3
        await trio.testing.wait_all_tasks_blocked()
        assert taken == stopped
        fountain.go_on.set()
    assert fountain.read == taken == total


async def test_many_streams_that_nobody_reads_stop_none_that_somebody_reads():
    fountain = Fountain(10_000)
    async with connected([fountain]) as client, trio.open_nursery() as nursery:
        vault = client.stub(Vault)

        async def stuck():
            async with aclosing(vault.download([])) as pieces:
                await anext(pieces)
                await trio.sleep_forever()

        for _ in range(5):
            nursery.start_soon(stuck)
        await trio.testing.wait_all_tasks_blocked()
        async with aclosing(vault.chunks(1000)) as chunks:
            assert len([chunk async for chunk in chunks]) == 1000
        assert len(await vault.echo(bytes(MB))) == MB
        nursery.cancel_scope.cancel()


async def test_both_sides_only_write():
    taken = 0

    async def source():
        nonlocal taken
        while True:
            taken += 1
            yield bytes(10_000)

    class Deaf(MemoryVault):
        async def sync(self, have):
            while True:
                yield bytes(10_000)

    async with connected([Deaf()]) as client:
        async with aclosing(client.stub(Vault).sync(source())) as pieces:
            for _ in range(2000):
                await anext(pieces)
            assert taken < 1000
            assert await client.stub(Vault).add(1, 2) == 3


@pytest.mark.parametrize("size", [0, 1000])
async def test_a_stream_leaves_others_their_turn(size):
    """A consumer and a producer that never wait otherwise give way to other tasks."""
    turns = 0
    over = False

    async def count_turns():
        nonlocal turns
        while not over:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with connected([Fountain(size)]) as client, trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        async with aclosing(client.stub(Vault).download([])) as pieces:
            for _ in range(20_000):
                await anext(pieces)
        over = True
    assert turns > 20
