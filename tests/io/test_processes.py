"""Where it is the point that the other side is a process of its own."""

import signal

import pytest
import trio

import druvarpc
from tests.io.peers import Calls, Work, Workshop, line_of, process, serving, settled


async def test_a_server_that_is_killed_fails_all_calls_at_once():
    async with process("process_server") as server:
        address = await line_of(server)
        async with druvarpc.connect(address) as client:
            calls = Calls(client)
            async with trio.open_nursery() as nursery:
                calls.start(nursery)
                await client.stub(Work).echo(b"all have come")
                server.kill()
                with trio.fail_after(2):
                    await server.wait()
                    await settled(lambda: len(calls.errors) == 5)
            for error in calls.errors:
                lost = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
                assert isinstance(lost, druvarpc.ConnectionLost)
                assert not lost.not_started
            with pytest.raises(druvarpc.ConnectionLost) as lost:
                await client.stub(Work).echo(b"later")
            assert lost.value.not_started
        with pytest.raises(druvarpc.ConnectionLost, match="refused"):
            async with druvarpc.connect(address):
                pass


async def test_a_client_that_is_killed_has_its_handlers_cancelled():
    workshop = Workshop()
    async with serving(workshop) as server:
        async with process("process_client", server.addresses[0]) as client:
            with trio.fail_after(20):
                await workshop.until(lambda: workshop.running == 5)
            client.kill()
            with trio.fail_after(2):
                await workshop.until(lambda: workshop.running == 0)
        assert workshop.cancelled == 5
        await settled(lambda: server.statistics().connections == 0)
        assert server.statistics().calls_active == 0


async def test_a_server_that_was_killed_leaves_a_socket_that_the_next_replaces(tmp_path):
    address = f"unix://{tmp_path}/socket"
    async with process("process_server", address) as first:
        await line_of(first)
        first.kill()
        await first.wait()
    assert (tmp_path / "socket").exists()
    async with (
        process("process_server", address) as second,
    ):
        await line_of(second)
        async with druvarpc.connect(address) as client:
            assert await client.stub(Work).echo(b"x") == b"x"


async def test_an_interrupted_server_ends_without_a_hang():
    async with process("process_server") as server:
        address = await line_of(server)
        async with druvarpc.connect(address) as client:
            calls = Calls(client)
            async with trio.open_nursery() as nursery:
                calls.start(nursery)
                await client.stub(Work).echo(b"all have come")
                server.send_signal(signal.SIGINT)
                with trio.fail_after(5):
                    await server.wait()
                    await settled(lambda: len(calls.errors) == 5)
        assert server.returncode != 0
        errors = b""
        while more := await server.stderr.receive_some(65536):
            errors += more
        assert b"KeyboardInterrupt" in errors
        assert b"Warning" not in errors, errors.decode()
        assert b"never awaited" not in errors


async def test_a_stopped_server_is_found_dead():
    """It answers nothing, and its kernel still takes what comes."""
    limits = druvarpc.Limits(keepalive_interval=0.2, keepalive_timeout=0.2)
    async with process("process_server") as server:
        address = await line_of(server)
        async with druvarpc.connect(address, limits=limits) as client:
            assert await client.stub(Work).echo(b"x") == b"x"
            server.send_signal(signal.SIGSTOP)
            with trio.fail_after(2), pytest.raises(druvarpc.ConnectionLost, match="PING"):
                await client.stub(Work).hold()
