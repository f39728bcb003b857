"""Servers that are replaced, and killed, while real clients call them without a pause."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import pytest
import trio

import druvarpc
from tests.io.peers import ROOT, Work, settled
from tests.io.supervised import SERVICE, Where, serve_command

pytestmark = pytest.mark.once


@asynccontextmanager
async def plain_server(listening: socket.socket) -> AsyncGenerator[trio.Process, None]:
    """A server on a socket that it inherits; it is killed in the end, if it hasn't ended."""
    fd = listening.fileno()
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.io.rolling_server", f"fd://{fd}"],
        cwd=ROOT,
        pass_fds=[fd],
        stdout=subprocess.PIPE,
    )
    try:
        with trio.fail_after(30):
            assert process.stdout is not None
            assert (await process.stdout.receive_some(100)).startswith(b"serving")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def test_a_plain_server_hands_over_to_its_successor():
    """Whoever supervises it starts the successor on the same socket, then sends SIGTERM."""
    calls, streams, pids, over = 0, 0, set(), False

    async def pieces() -> AsyncGenerator[bytes, None]:
        for _ in range(8):
            yield bytes(10_000)

    async def echo(work: Work) -> None:
        nonlocal calls
        while not over:
            text, _, pid = (await work.echo(b"%d" % calls)).partition(b" ")
            assert text.isdigit()
            pids.add(int(pid))
            calls += 1

    async def stream(work: Work) -> None:
        nonlocal streams
        while not over:
            assert await work.gather(pieces()) == 80_000
            async with aclosing(work.pour(8, 10_000)) as items:
                assert sum([len(item) async for item in items]) == 80_000
            async with aclosing(work.chat(pieces())) as items:
                assert sum([len(item) async for item in items]) == 80_000
            streams += 1

    async def be_a_client(address: str) -> None:
        async with druvarpc.connect(address) as client, trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(echo, client.stub(Work))
            nursery.start_soon(stream, client.stub(Work))

    async def come_and_go(address: str) -> None:
        while not over:
            async with druvarpc.connect(address) as client:
                assert await client.stub(Work).gather(pieces()) == 80_000

    servers = []
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            servers.append(await stack.enter_async_context(plain_server(listening)))
            for _ in range(3):
                nursery.start_soon(be_a_client, address)
                nursery.start_soon(come_and_go, address)
            for _ in range(3):
                before = calls, streams
                await settled(
                    lambda: calls > before[0] + 200 and streams > before[1] + 3,  # noqa: B023
                    within=20,
                )
                servers.append(await stack.enter_async_context(plain_server(listening)))
                servers[-2].send_signal(signal.SIGTERM)
                with trio.fail_after(20):
                    assert await servers[-2].wait() == 0
                assert servers[-2].pid in pids
            await settled(lambda: servers[-1].pid in pids, within=20)
            over = True
    assert pids == {server.pid for server in servers}
    print(f"{calls} calls and {3 * streams} streams by {len(servers)} servers in turn")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "where.py").write_text(SERVICE)
    return tmp_path


async def test_a_supervised_reload_costs_no_call_whether_or_not_it_may_be_made_again(folder):
    """Thousands of them, of which each is begun by one worker, and each worker begins some."""
    safe, unsafe, pids, over = 0, 0, set(), False

    async def call_safely(where: Where) -> None:
        nonlocal safe
        while not over:
            pids.add(await where.pid())
            safe += 1

    async def call(where: Where) -> None:
        nonlocal unsafe
        while not over:
            pids.add(await where.hold(0.001))
            unsafe += 1

    async def be_a_client(address: str) -> None:
        async with druvarpc.connect(address) as client, trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(call_safely, client.stub(Where))
                nursery.start_soon(call, client.stub(Where))

    async with serve_command(folder, "where:one", "--workers", "2") as command:
        address = await command.address()
        start = trio.current_time()
        # An error of any call ends the test: nobody catches it.
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(be_a_client, address)
            for reloads in range(4):
                before = safe, unsafe
                await settled(
                    lambda: safe > before[0] + 500 and unsafe > before[1] + 500,  # noqa: B023
                    within=20,
                )
                if reloads < 3:
                    command.send(signal.SIGHUP)
                    await command.logged("reloaded", reloads + 1)
            over = True
        seconds = trio.current_time() - start
        command.send(signal.SIGTERM)
        assert await command.ended() == 0
    assert len(command.pids) == 8
    # One of two may get all connections, but the calls of each reload were answered by its workers.
    for first in range(0, 8, 2):
        assert pids & set(command.pids[first : first + 2])
    assert pids <= set(command.pids)
    rate = (safe + unsafe) / seconds
    print(f"{safe} idempotent calls and {unsafe} others, {rate:.0f} a second, none lost")
    assert rate > 200


async def test_workers_that_are_killed_take_no_more_with_them_than_they_must(folder):
    """Calls that may be made again survive; of the others, those fail that were in flight."""
    safe, unsafe, errors, over = 0, 0, [], False

    async def call_safely(where: Where) -> None:
        nonlocal safe
        while not over:
            assert await where.pid() > 0
            safe += 1

    async def call(where: Where) -> None:
        nonlocal unsafe
        while not over:
            try:
                await where.hold(0.001)
            except druvarpc.ConnectionLost as error:
                errors.append(error)
            else:
                unsafe += 1

    async def be_a_client(address: str) -> None:
        async with druvarpc.connect(address) as client, trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(call_safely, client.stub(Where))
                nursery.start_soon(call, client.stub(Where))

    async with serve_command(folder, "where:one", "--workers", "2") as command:
        address = await command.address()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(be_a_client, address)
            for count in range(3):
                before = safe, unsafe
                await settled(
                    lambda: safe > before[0] + 500 and unsafe > before[1] + 200,  # noqa: B023
                    within=20,
                )
                os.kill(command.pids[count], signal.SIGKILL)
                await command.until(lambda: len(command.pids) == 3 + count)  # noqa: B023
            over = True
        command.send(signal.SIGTERM)
        assert await command.ended() == 0
    assert all(not error.not_started for error in errors)
    # Of each client the calls in flight when its connection died, at most.
    assert len(errors) <= 3 * 4 * 8
    print(f"{safe} idempotent calls, {unsafe} others and {len(errors)} lost, by 3 killed workers")
