"""`druvarpc serve` as a process, a module for it to serve, and what the tests see of both."""

# mypy: disable-error-code="empty-body"
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

import druvarpc
from tests.io.peers import ROOT, TCP, settled

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


async def ask(address: str, method: str = "pid") -> object:
    async with druvarpc.connect(address) as client:
        return await getattr(client.stub(Where), method)()


def answers(address: str) -> bool:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True
