"""`druvarpc serve`: real processes, real signals, real modules."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

import druvarpc
from druvarpc.cli import main
from druvarpc.worker import NotServable, load
from tests.io.peers import ROOT, TCP, settled

pytestmark = pytest.mark.once

SERVICE = """
import os
from functools import partial
import trio
import druvarpc


class Where(druvarpc.Service):
    @druvarpc.rpc(idempotent=True)
    async def pid(self) -> int: ...

    @druvarpc.rpc(idempotent=True)
    async def version(self) -> str: ...

    @druvarpc.rpc
    async def hold(self, seconds: float) -> int: ...

    @druvarpc.rpc
    async def die(self) -> None: ...


class Here(Where):
    async def pid(self) -> int:
        return os.getpid()

    async def version(self) -> str:
        return VERSION

    async def hold(self, seconds: float) -> int:
        await trio.sleep(seconds)
        return os.getpid()

    async def die(self) -> None:
        os._exit(3)


VERSION = "1"
one = Here()
several = [Here()]
empty = []
number = 3
limited = partial(druvarpc.serve, [Here()], limits=druvarpc.Limits(total_calls=1))



def nonsense():
    return [Here(), 3]


def made():
    return Here()


def made_several():
    return (Here(),)


async def by_hand(*addresses, task_status):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        task_status.started(await nursery.start(druvarpc.serve, [Here()], *addresses))
"""

FAILING = """
async def one(*addresses, task_status):
    raise ValueError("not today")
"""
SERVERLESS = """
async def one(*addresses, task_status):
    task_status.started()
"""


class Where(druvarpc.Service):
    @druvarpc.rpc(idempotent=True)
    async def pid(self) -> int: ...

    @druvarpc.rpc(idempotent=True)
    async def version(self) -> str: ...

    @druvarpc.rpc
    async def hold(self, seconds: float) -> int: ...

    @druvarpc.rpc
    async def die(self) -> None: ...


class Command:
    """A running `druvarpc serve`; what it prints and logs is kept."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.printed = ""
        self.log = ""
        self._changed = trio.Event()

    async def read(self, stream: trio.abc.ReceiveStream, name: str) -> None:
        while more := await stream.receive_some(65536):
            setattr(self, name, getattr(self, name) + more.decode())
            self._changed.set()
            self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.move_on_after(30) as scope:
            while not condition():
                await self._changed.wait()
        assert not scope.cancelled_caught, f"{self.printed}\n{self.log}"

    async def logged(self, pattern: str, times: int = 1) -> None:
        await self.until(lambda: len(re.findall(pattern, self.log)) >= times)

    async def address(self) -> str:
        await self.until(lambda: "\n" in self.printed)
        return self.printed.partition("\n")[0].removeprefix("listening on ")

    @property
    def pids(self) -> list[int]:
        """Of all processes that have served so far."""
        return [int(pid) for pid in re.findall(r"worker (\d+) serves", self.log)]

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        with trio.fail_after(30):
            return await self.process.wait()


@asynccontextmanager
async def serve_command(
    folder: Path, target: str, *options: str, listen: str = TCP, **more: object
) -> AsyncGenerator[Command, None]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "druvarpc", "serve", target, "--listen", listen, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )
    command = Command(process)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(command.read, process.stdout, "printed")
        nursery.start_soon(command.read, process.stderr, "log")
        try:
            yield command
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()
                # Workers hold the pipes open until they have ended.
                with trio.move_on_after(10) as scope:
                    await settled(lambda: not any(map(alive, command.pids)), within=9)
            nursery.cancel_scope.cancel()
    assert not scope.cancelled_caught, "nothing survives the parent"


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return False


@pytest.fixture
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "where", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "where.py").write_text(SERVICE)
    return tmp_path


async def ask(address: str, method: str = "pid") -> object:
    async with druvarpc.connect(address) as client:
        return await getattr(client.stub(Where), method)()


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
            await client.ping()
            command.send(signal.SIGTERM)
            await command.logged("SIGTERM: draining")
            # Nobody new is taken while the call ends.
            await settled(lambda: not answers(address))
        assert held == [pid]
        assert await command.ended() == 0
        assert command.printed == f"listening on {address}\n"
        assert "Traceback" not in command.log


def answers(address: str) -> bool:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


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
            await client.ping()
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
            await client.ping()
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
                await client.ping()
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
