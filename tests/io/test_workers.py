"""`druvarpc serve`: real processes, real signals, real modules."""

import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme

import druvarpc
from druvarpc.cli import main
from druvarpc.worker import NotServable, load
from tests.io.peers import TCP, settled
from tests.io.supervised import SERVICE, Where, alive, answers, ask, serve_command

pytestmark = pytest.mark.once

FAILING = """
async def one(*addresses, task_status):
    raise ValueError("not today")
"""
SERVERLESS = """
async def one(*addresses, task_status):
    task_status.started()
"""


@pytest.fixture
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "where", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "where.py").write_text(SERVICE)
    return tmp_path


async def arrived(client: druvarpc.Client) -> None:
    """Wait until the server has the calls of the tasks that have been started."""
    await trio.testing.wait_all_tasks_blocked()
    await client.ping()


async def test_the_sockets_are_shared_and_sigterm_drains(folder):
    async with serve_command(folder, "where:one", "--workers", "2") as command:
        address = await command.address()
        assert len(command.pids) == 2
        assert command.process.pid not in command.pids
        async with druvarpc.connect(address) as client, trio.open_nursery() as nursery:
            pid = await client.stub(Where).pid()
            assert pid in command.pids
            held = []

            async def hold() -> None:
                held.append(await client.stub(Where).hold(0.5))

            nursery.start_soon(hold)
            await arrived(client)
            command.send(signal.SIGTERM)
            await command.logged("SIGTERM: draining")
            # Nobody new is taken while the call ends.
            await settled(lambda: not answers(address))
        assert held == [pid]
        assert await command.ended() == 0
        assert command.printed == f"listening on {address}\n"
        assert "Traceback" not in command.log


@pytest.mark.parametrize("target", ["one", "several", "made", "made_several", "Here", "by_hand"])
async def test_what_can_be_served(importable, target):
    async with trio.open_nursery() as nursery:
        server = await nursery.start(load(f"where:{target}"), TCP)
        assert await ask(server.addresses[0]) == os.getpid()
        nursery.cancel_scope.cancel()


async def test_options_of_serve_are_given_by_a_partial(folder):
    async with serve_command(folder, "where:limited") as command:
        async with druvarpc.connect(await command.address(), retry=None) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.stub(Where).hold, 0.3)
                with pytest.raises(druvarpc.RpcError, match="busy"):
                    while True:
                        await client.stub(Where).pid()
        command.send(signal.SIGTERM)
        assert await command.ended() == 0


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("where", "named as module:object"),
        (":one", "named as module:object"),
        ("nowhere:one", "No module named 'nowhere'"),
        ("where.nowhere:one", "No module named 'where.nowhere'"),
        ("where:nothing", "where has no nothing"),
        ("where:one.nothing", "where has no one.nothing"),
        ("where:number", "is no Service"),
        ("where:empty", "is no Service"),
        ("where:nonsense", "is no Service"),
    ],
)
def test_what_cannot_be_served(importable, target, complaint):
    with pytest.raises(NotServable, match=complaint) as refused:
        load(target)
    assert repr(target) in str(refused.value)


@pytest.mark.parametrize(
    ("source", "complaint", "traceback"),
    [
        ("import numpi", "No module named 'numpi'", True),
        ("one = 1 / 0", "ZeroDivisionError: division by zero", True),
        ("import os; os._exit(7)", "ended with status 7 before it served", False),
        (FAILING, "ValueError: not today", True),
        (SERVERLESS, "started None, not a Server", False),
    ],
)
async def test_a_failure_is_one_line_and_a_status(folder, source, complaint, traceback):
    (folder / "where.py").write_text(source)
    async with serve_command(folder, "where:one") as command:
        assert await command.ended() == 1
        await command.logged(r"(?m)^druvarpc: ")
        (line,) = [line for line in command.log.splitlines() if line.startswith("druvarpc: ")]
        assert re.fullmatch(r"druvarpc: worker \d+ .*", line)
        assert complaint in line
        assert command.printed == ""
        assert ("Traceback" in command.log) == traceback


async def test_a_worker_that_takes_too_long_to_start(folder):
    (folder / "slow.py").write_text("import time; time.sleep(60)")
    async with serve_command(folder, "slow:one", "--start-timeout", "0.5") as command:
        assert await command.ended() == 1
        await command.logged(r"didn't serve within 0.5 s")


async def test_reload_takes_up_new_code_and_lets_calls_end(folder):
    async with serve_command(folder, "where:one", "--workers", "2") as command:
        address = await command.address()
        async with druvarpc.connect(address) as client, trio.open_nursery() as nursery:
            where = client.stub(Where)
            before, held = await where.pid(), []

            async def hold() -> None:
                held.append(await where.hold(3))

            nursery.start_soon(hold)
            await arrived(client)
            (folder / "where.py").write_text(SERVICE.replace('VERSION = "1"', 'VERSION = "two"'))
            command.send(signal.SIGHUP)
            await command.logged("reloaded")
            await settled(lambda: client.statistics().reconnects == 1)
            assert await where.version() == "two"
            assert await where.pid() in command.pids[2:]
            assert not held
            assert alive(before)
        assert held == [before]
        await settled(lambda: not any(map(alive, command.pids[:2])))
        assert all(map(alive, command.pids[2:]))
        command.send(signal.SIGTERM)
        assert await command.ended() == 0


async def test_a_reload_that_fails_changes_nothing(folder):
    async with serve_command(folder, "where:one", "--workers", "2") as command:
        address = await command.address()
        before = list(command.pids)
        async with druvarpc.connect(address, reconnect=False) as client:
            (folder / "where.py").write_text("import nonsense")
            command.send(signal.SIGHUP)
            await command.logged("not reloaded, the workers of before go on: .*nonsense")
            assert await client.stub(Where).version() == "1"
            assert all(map(alive, before))
            (folder / "where.py").write_text(SERVICE)
            command.send(signal.SIGHUP)
            await command.logged(r"reloaded; ")
            assert not set(before) & set(command.pids[2:])
        command.send(signal.SIGTERM)
        assert await command.ended() == 0


async def test_a_worker_that_dies_is_replaced(folder):
    async with serve_command(folder, "where:one", "--workers", "2") as command:
        address = await command.address()
        victim = command.pids[0]
        os.kill(victim, signal.SIGKILL)
        await command.logged(f"worker {victim} was killed by SIGKILL; another is started in")
        await command.until(lambda: len(command.pids) == 3)
        assert alive(command.pids[2])
        async with druvarpc.connect(address) as client:
            with pytest.raises(druvarpc.ConnectionLost):
                await client.stub(Where).die()
            await command.logged(r"worker \d+ ended with status 3")
            assert await client.stub(Where).pid()
        command.send(signal.SIGTERM)
        assert await command.ended() == 0


async def test_a_crash_loop_is_slowed_down_and_reported(folder):
    counter = folder / "starts"
    (folder / "crash.py").write_text(
        SERVICE
        + f"""
async def main(*addresses, task_status):
    with open({str(counter)!r}, "a") as file:
        print("start", file=file)
    async with trio.open_nursery() as nursery:
        task_status.started(await nursery.start(druvarpc.serve, [Here()], *addresses))
        await trio.sleep(0.05)
        os._exit(3)
"""
    )
    async with serve_command(folder, "crash:main") as command:
        await command.logged("workers keep ending soon after their start: 3 in a row")
        pauses = [float(pause) for pause in re.findall(r"started in ([\d.]+) s", command.log)]
        assert len(pauses) == len(counter.read_text().split())
        assert command.process.returncode is None
        command.send(signal.SIGTERM)
        assert await command.ended() == 0


async def test_a_parent_that_is_killed_takes_its_workers_with_it(folder):
    async with serve_command(folder, "where:one", "--workers", "2") as command:
        address = await command.address()
        command.process.kill()
        await command.ended()
        await settled(lambda: not any(map(alive, command.pids)))
        assert not answers(address)


async def test_a_second_signal_ends_all_at_once(folder):
    async with serve_command(folder, "where:one", "--workers", "2") as command:
        address = await command.address()
        async with druvarpc.connect(address) as client, trio.open_nursery() as nursery:

            async def hold() -> None:
                with pytest.raises(druvarpc.ConnectionLost):
                    await client.stub(Where).hold(600)

            nursery.start_soon(hold)
            await arrived(client)
            command.send(signal.SIGTERM)
            await command.logged("SIGTERM: draining")
            command.send(signal.SIGTERM)
            assert await command.ended() == 128 + signal.SIGTERM
            assert not any(map(alive, command.pids))


async def test_what_takes_longer_than_the_drain_timeout_is_cut_short(folder):
    async with serve_command(folder, "where:one", "--drain-timeout", "0.3") as command:
        async with druvarpc.connect(await command.address()) as client:
            async with trio.open_nursery() as nursery:

                async def hold() -> None:
                    with pytest.raises(druvarpc.ConnectionLost, match="time for draining"):
                        await client.stub(Where).hold(600)

                nursery.start_soon(hold)
                await arrived(client)
                command.send(signal.SIGTERM)
                assert await command.ended() == 0


async def test_unix_sockets_and_inherited_ones(folder):
    path = folder / "socket"
    async with serve_command(folder, "where:one", listen=f"unix://{path}") as command:
        assert await command.address() == f"unix://{path}"
        assert await ask(f"unix://{path}") in command.pids
        command.send(signal.SIGHUP)
        await command.logged("reloaded")
        assert await ask(f"unix://{path}") in command.pids
        command.send(signal.SIGTERM)
        assert await command.ended() == 0
    assert not path.exists()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = listening.fileno()
        async with serve_command(
            folder, "where:one", listen=f"fd+http://{fd}/rpc", pass_fds=(fd,)
        ) as command:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}/rpc"
            assert await command.address() == address
            assert await ask(address) in command.pids
            command.send(signal.SIGTERM)
            assert await command.ended() == 0


async def test_tls_on_sockets_that_are_inherited(folder):
    """The parent opens the socket, and its workers read the certificate."""
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    certified = authority.issue_cert("127.0.0.1")
    certified.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    source = (
        'secure = partial(druvarpc.serve, [Here()], tls=druvarpc.TLS(certificate="server.pem"))'
    )
    (folder / "where.py").write_text(f"{SERVICE}\n{source}\n")
    listen = "tls://127.0.0.1:0"
    async with serve_command(folder, "where:secure", "--workers", "2", listen=listen) as command:
        address = await command.address()
        assert address.startswith("tls://127.0.0.1:")
        tls = druvarpc.TLS(authorities=folder / "authority.pem")
        async with druvarpc.connect(address, tls=tls) as client:
            first = await client.stub(Where).pid()
            command.send(signal.SIGHUP)
            await command.logged("reloaded")
            await settled(lambda: client.statistics().reconnects == 1)
            assert await client.stub(Where).pid() != first
        command.send(signal.SIGTERM)
        assert await command.ended() == 0
    async with serve_command(folder, "where:one", listen=listen) as command:
        assert await command.ended() == 1
        await command.logged("ValueError: fd[+]tls://.*: TLS needs tls=")


async def test_an_address_that_is_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        async with serve_command(folder, "where:one", listen=address) as command:
            assert await command.ended() == 1
            await command.logged(r"^druvarpc: .*[Aa]ddress already in use")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["where:one"], "--listen"),
        (["--listen", TCP], "MODULE:OBJECT"),
        (["where:one", "--listen", TCP, "--workers", "0"], "positive number"),
        (["where:one", "--listen", TCP, "--drain-timeout", "x"], "number of seconds"),
        (["where:one", "--listen", TCP, "--drain-timeout", "inf"], "number of seconds"),
    ],
)
def test_arguments_that_are_wrong(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


async def test_an_address_that_is_none(folder):
    async with serve_command(folder, "where:one", listen="localhost") as command:
        assert await command.ended() == 1
        await command.logged(r"^druvarpc: 'localhost': an address is tcp://host:port")
