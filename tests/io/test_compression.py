"""Compression as users meet it: chosen by both ends, on real sockets, and what it saves."""

import random
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial

import pytest
import trio

import druvarpc
from druvarpc.compression import Compression
from druvarpc.protocol import CallsReceived, Connection, Event, SettingsReceived, Stream
from druvarpc.protocol.frames import Buffer, pack
from druvarpc.testing import Link, connected
from tests.io.peers import ROOT, line_of, settled
from tests.io.services import Chunk, MemoryVault, Vault

TEXT = b"".join(b"%06d GET /index.html 200\n" % number for number in range(20_000))
NOISE = random.Random(1).randbytes(200_000)
EITHER = pytest.mark.parametrize("compression", ["zlib", "zstd", "auto"])


class Texts(druvarpc.Service):
    @druvarpc.rpc
    async def get(self, sizes: list[int]) -> list[bytes]: ...

    @druvarpc.rpc
    async def measure(self, text: bytes, other: bytes) -> int: ...

    @druvarpc.rpc
    def pour(self, sizes: list[int]) -> AsyncGenerator[bytes, None]: ...


class MyTexts(Texts):
    async def get(self, sizes: list[int]) -> list[bytes]:
        return [TEXT[:size] for size in sizes]

    async def measure(self, text: bytes, other: bytes) -> int:
        assert text == TEXT[: len(text)]
        return len(text) + len(other)

    async def pour(self, sizes: list[int]) -> AsyncGenerator[bytes, None]:
        for size in sizes:
            yield TEXT[:size]


@asynccontextmanager
async def between(
    mine: Compression | None,
    yours: Compression | None,
    *,
    limits: druvarpc.Limits = druvarpc.Limits(),
    server_limits: druvarpc.Limits = druvarpc.Limits(),
) -> AsyncGenerator[tuple[druvarpc.Client, druvarpc.Server], None]:
    """A client and a server that have been told of compression as given."""
    async with trio.open_nursery() as nursery:
        server: druvarpc.Server = await nursery.start(
            lambda task_status: druvarpc.serve(
                [MemoryVault(), MyTexts()],
                "tcp://127.0.0.1:0",
                limits=server_limits,
                compression=yours,
                task_status=task_status,
            )
        )
        address = server.addresses[0]
        async with druvarpc.connect(address, limits=limits, compression=mine) as client:
            yield client, server
        nursery.cancel_scope.cancel()


async def pieces_of(*pieces: Buffer) -> AsyncIterator[Buffer]:
    for piece in pieces:
        yield piece


def saved(client: druvarpc.Client) -> tuple[int, int]:
    statistics = client.statistics()
    return statistics.bytes_saved_sent, statistics.bytes_saved_received


@EITHER
async def test_all_cardinalities_both_ways(compression):
    async with between(compression, compression) as (client, server):
        vault, texts = client.stub(Vault), client.stub(Texts)
        before = saved(client)
        for size in (0, 100, 600, 10_000, len(TEXT)):
            assert await vault.echo(TEXT[:size]) == TEXT[:size]
        assert await vault.put(Chunk(b"id", TEXT)) == len(TEXT)
        said = [b"", b"x", TEXT[:700], memoryview(TEXT[:50_000]), bytearray(TEXT)]
        assert await vault.upload(pieces_of(*said)) == sum(map(len, said))
        async with aclosing(vault.sync(pieces_of(*said))) as pieces:
            assert [piece async for piece in pieces] == [bytes(one).upper() for one in said]
        async with aclosing(texts.pour([0, 5, 3000, len(TEXT)])) as pieces:
            assert [len(piece) async for piece in pieces] == [0, 5, 3000, len(TEXT)]
        near, far = client.statistics(), server.statistics()
    assert before == (0, 0)
    assert near.bytes_saved_sent == far.bytes_saved_received > near.bytes_sent
    assert near.bytes_saved_received == far.bytes_saved_sent > near.bytes_received
    # Gone connections count too.
    assert client.statistics().bytes_saved_sent == near.bytes_saved_sent


@pytest.mark.parametrize(
    ("mine", "yours"), [(None, "auto"), ("auto", None), (None, None), ("zlib", "zstd")]
)
async def test_where_they_have_nothing_in_common_all_goes_as_it_is(mine, yours):
    async with between(mine, yours) as (client, _):
        assert await client.stub(Vault).echo(TEXT) == TEXT
        assert saved(client) == (0, 0)
        assert client.statistics().bytes_sent > len(TEXT)


@pytest.mark.parametrize(("mine", "yours"), [("auto", "zlib"), ("zlib", "auto"), ("zstd", "auto")])
async def test_one_in_common_is_enough(mine, yours):
    async with between(mine, yours) as (client, _):
        assert await client.stub(Vault).echo(TEXT) == TEXT
        assert min(saved(client)) > len(TEXT) // 2


WITHOUT_ZSTANDARD = """
import sys
sys.modules["zstandard"] = None  # as if it weren't installed
import druvarpc, trio
from tests.io.services import MemoryVault

async def main():
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(lambda task_status: druvarpc.serve(
                [MemoryVault()], "tcp://127.0.0.1:0", compression="zstd", task_status=task_status))
        except* ImportError as group:
            print(group.exceptions[0], flush=True)
    async with trio.open_nursery() as nursery:
        server = await nursery.start(lambda task_status: druvarpc.serve(
            [MemoryVault()], "tcp://127.0.0.1:0", compression="auto", task_status=task_status))
        print(server.addresses[0], flush=True)

trio.run(main)
"""


@pytest.mark.once
async def test_a_side_without_zstandard_falls_back_to_zlib():
    command = [sys.executable, "-c", WITHOUT_ZSTANDARD]
    process = await trio.lowlevel.open_process(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        with trio.fail_after(30):
            assert "druvarpc[zstd]" in await line_of(process)
            address = await line_of(process)
        async with druvarpc.connect(address, compression="auto") as client:
            assert await client.stub(Vault).echo(TEXT) == TEXT
            assert min(saved(client)) > len(TEXT) // 2
        async with druvarpc.connect(address, compression="zstd") as client:
            assert await client.stub(Vault).echo(TEXT) == TEXT
            assert saved(client) == (0, 0)
    finally:
        process.kill()
        await process.wait()


async def test_an_algorithm_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'auto', 'zstd', 'zlib' or None"):
        async with druvarpc.connect("tcp://127.0.0.1:1", compression="gzip"):
            pass
    with pytest.raises(ValueError, match="'gzip'"):
        await druvarpc.serve([MyTexts()], "tcp://127.0.0.1:0", compression="gzip")


@EITHER
async def test_a_club_uses_results_that_travel_compressed(compression):
    async with between(compression, compression) as (client, _):
        texts = client.stub(Texts)
        async with client.club() as club:
            found = club.call(texts.get, [2000, 100_000])
            total = club.call(texts.measure, found[1], TEXT[:3000])
        assert total.value == 103_000
        assert found.value == [TEXT[:2000], TEXT[:100_000]]
        assert saved(client)[0] > 2000
        assert saved(client)[1] > 60_000


async def test_a_stub_can_go_without():
    async with between("auto", "auto") as (client, _):
        vault = client.stub(Vault, compress=False)
        assert await vault.put(Chunk(b"id", TEXT)) == len(TEXT)
        assert await vault.upload(pieces_of(TEXT, TEXT)) == 2 * len(TEXT)
        async with client.club() as club:
            club.call(vault.put, Chunk(b"id", TEXT))
        assert saved(client)[0] == 0
        assert client.statistics().bytes_sent > 4 * len(TEXT)
        assert await client.stub(Vault, timings=True).put(Chunk(b"id", TEXT)) == len(TEXT)
        assert saved(client)[0] > len(TEXT) // 2
        assert await client.stub(Vault, timings=True, compress=False).put(Chunk(b"", TEXT))
        assert client.statistics().bytes_sent > 5 * len(TEXT)
        assert client.statistics().times.keys() == {"Vault.put"}


async def test_noise_goes_as_it_is():
    async with between("auto", "auto") as (client, _):
        vault = client.stub(Vault)
        for _ in range(8):
            assert await vault.echo(NOISE) == NOISE
        near = client.statistics()
    assert (near.bytes_saved_sent, near.bytes_saved_received) == (0, 0)
    assert 8 * len(NOISE) < near.bytes_sent < 1.01 * 8 * len(NOISE)


async def test_a_message_counts_by_what_it_stands_for():
    small = druvarpc.Limits(max_message=100_000)
    async with between("auto", "auto", server_limits=small) as (client, _):
        vault = client.stub(Vault)
        with pytest.raises(druvarpc.RpcError) as caught:
            await vault.echo(TEXT[:200_000])
        assert caught.value.status is druvarpc.Status.RESOURCE_EXHAUSTED
        with pytest.raises(druvarpc.RpcError) as caught:
            await vault.upload(pieces_of(TEXT[:1000], TEXT[:200_000]))
        assert caught.value.status is druvarpc.Status.RESOURCE_EXHAUSTED
        assert await vault.echo(TEXT[:90_000]) == TEXT[:90_000]
    async with between("auto", "auto", limits=small) as (client, _):
        texts = client.stub(Texts)
        with pytest.raises(druvarpc.RpcError) as caught:
            await texts.get([200_000])
        assert caught.value.status is druvarpc.Status.RESOURCE_EXHAUSTED
        sizes = []
        with pytest.raises(druvarpc.RpcError) as caught:
            async with aclosing(texts.pour([1000, 200_000])) as pieces:
                async for piece in pieces:
                    sizes.append(len(piece))
        assert sizes == [1000]
        assert caught.value.status is druvarpc.Status.RESOURCE_EXHAUSTED
        assert await texts.get([90_000]) == [TEXT[:90_000]]


async def test_a_narrow_link_carries_more(autojump_clock):
    """5.2 MB over 1 MB/s, from one second of pieces to the next."""
    took = {}
    for compression in (None, "auto"):
        async with connected(
            [MemoryVault()], link=Link(rtt=0.05, bandwidth=1e6), compression=compression
        ) as client:
            start = trio.current_time()
            size = await client.stub(Vault).upload(pieces_of(*[TEXT] * 10))
            took[compression] = trio.current_time() - start
            assert size == 10 * len(TEXT)
    assert took["auto"] < took[None] / 3


# Peers whose compression is broken.


class Broken:
    """Says that it's zlib."""

    number = 1

    def compress(self, data: Buffer) -> bytes:
        return b"nonsense"

    def decompress(self, data: Buffer, most: int) -> bytes | None:
        raise AssertionError("nobody sends it anything compressed")


async def drive(
    core: Connection, stream: trio.SocketStream, handle: Callable[[Event], None]
) -> bytes:
    """Be a core's owner until the connection ends; return the last that was heard."""
    last = b""
    while True:
        while core.wants_to_send:
            await stream.send_all(b"".join(core.data_to_send(0.0)))
        data = await stream.receive_some()
        if not data:
            return last
        last = data
        core.receive_data(data, 0.0)
        while (event := core.next_event()) is not None:
            handle(event)


@pytest.mark.parametrize(
    ("method", "arguments", "item"),
    [
        ("Vault.echo", 3000, None),
        ("Vault.echo", 30_000, None),
        ("Vault.upload", 0, 3000),
    ],
    ids=["inline", "as data", "in a stream"],
)
async def test_a_client_that_compresses_wrongly_is_thrown_out(method, arguments, item):
    async with between("zlib", "zlib") as (client, server):
        host, port = server.addresses[0].removeprefix("tcp://").split(":")
        core = Connection("client", now=0.0, compression=[Broken()])
        stream = await trio.open_tcp_stream(host, int(port))

        def handle(event: Event) -> None:
            if isinstance(event, SettingsReceived):
                payload = pack([bytes(arguments)] if arguments else [])
                call = Stream(method, payload, more=item is not None)
                core.call(call, 0.0)
                if item:
                    core.send(call, bytes(item))

        with trio.fail_after(10):
            async with stream:
                last = await drive(core, stream, handle)
        assert b"compressed" in last
        assert await client.stub(Vault).add(1, 2) == 3, "others aren't harmed"
        await settled(lambda: not server.statistics().calls_active)


@pytest.mark.parametrize("size", [3000, 30_000], ids=["inline", "as data"])
async def test_a_server_that_compresses_wrongly_is_left(size):
    async def accept(stream: trio.SocketStream) -> None:
        core = Connection("server", now=0.0, compression=[Broken()])

        def handle(event: Event) -> None:
            if isinstance(event, CallsReceived):
                for call in event.calls:
                    if call.method == "Texts.pour":
                        core.send(call, bytes(size))
                        core.reply(call, 0.0, None)
                    else:
                        core.reply(call, 0.0, b"\xc4" + bytes(size))

        async with stream:
            await drive(core, stream, handle)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, accept, 0, host="127.0.0.1"))
        address = f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"
        with trio.fail_after(10):
            async with druvarpc.connect(address, compression="zlib", reconnect=False) as client:
                with pytest.raises(druvarpc.ConnectionLost, match="compressed"):
                    await client.stub(Texts).get([1])
            async with druvarpc.connect(address, compression="zlib", reconnect=False) as client:
                with pytest.raises(druvarpc.ConnectionLost, match="compressed"):
                    async with aclosing(client.stub(Texts).pour([1])) as pieces:
                        async for _ in pieces:
                            pass
        nursery.cancel_scope.cancel()
