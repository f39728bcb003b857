"""The processes of `druvarpc serve`, as their parent sees them.

Those that run the same code are a `Generation`. Each is kept by a task, which starts another in its
place when it ends of itself, and every process ends with the task that keeps it. It ends with the
parent, too: each holds one end of a socket pair, whose other end is closed when the parent dies,
however it dies. What runs in the process is `druvarpc.worker`.
"""

import logging
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from druvarpc.addresses import Address
from druvarpc.codec import printable
from druvarpc.resilience import Backoff
from druvarpc.session import GOODBYE
from druvarpc.worker import READY

logger = logging.getLogger("druvarpc")

# Seconds until a process that ended is started again, at most; doubled for each that ends within
# this time after its start.
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
# Processes in a row that have ended so soon, until that is called what it is.
_CRASHES: Final = 3
# Seconds that a process has to end once the time for draining is up, before it is killed.
_GRACE: Final = GOODBYE + 3.0
# Bytes that a process may say at most.
_MAX_LINE: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to run.

    Attributes:
        target: what to serve, "module:object".
        number: how many processes.
        drain_timeout: seconds that calls have to end when their process is to.
        start_timeout: seconds that a process has until it serves.
    """

    target: str
    number: int
    drain_timeout: float
    start_timeout: float


class StartError(Exception):
    """A process doesn't serve; the message says why."""


class Worker:
    """A process that serves.

    Args:
        process: that process.
        control: what it says comes here; its end is the process's.
    """

    def __init__(self, process: trio.Process, control: trio.SocketStream) -> None:
        self.pid = process.pid
        self._process = process
        self._control = control

    async def wait_ready(self) -> None:
        """Wait until it serves.

        Raises:
            StartError: it doesn't.
        """
        said = b""
        while not said.endswith(b"\n") and len(said) < _MAX_LINE:
            try:
                more = await self._control.receive_some(_MAX_LINE)
            except trio.BrokenResourceError:
                more = b""
            if not more:
                raise StartError(f"it {await self.wait()} before it served")
            said += more
        word, _, reason = said.decode(errors="replace").strip().partition(" ")
        if word != READY:
            raise StartError(printable(reason))

    async def wait(self) -> str:
        """Wait for its end; return how it ended."""
        status = await self._process.wait()
        if status >= 0:
            return f"ended with status {status}"
        return f"was killed by {signal.Signals(-status).name}"

    def terminate(self) -> None:
        """Ask it to drain."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


@asynccontextmanager
async def _running(plan: Plan, addresses: Sequence[Address]) -> AsyncGenerator[Worker, None]:
    """Start a process; it doesn't outlive the block."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "druvarpc.worker", plan.target, *map(str, addresses)]
    command += ["--control", str(theirs.fileno()), "--drain-timeout", str(plan.drain_timeout)]
    inherited = [theirs.fileno(), *(one.fd for one in addresses if one.fd is not None)]
    async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as control:
        with theirs:
            process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                # An interrupt at the terminal is the parent's to act on.
                process_group=0,
            )
        try:
            yield Worker(process, control)
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


class Generation:
    """Processes that run the same code.

    Args:
        plan: what they run.
        addresses: where they listen: descriptors.

    Attributes:
        failure: why one of them couldn't be started; None if all could.
    """

    def __init__(self, plan: Plan, addresses: Sequence[Address]) -> None:
        self.failure: str | None = None
        self._plan = plan
        self._addresses = addresses
        self._workers: dict[Worker, None] = {}
        self._ready = 0
        self._settled = trio.Event()
        self._ended = trio.Event()
        self._stopping = trio.Event()

    async def run(self) -> None:
        """Keep the processes until `stop`. Cancelled, they are killed."""
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._plan.number):
                    nursery.start_soon(self._keep)
        finally:
            self._ended.set()

    async def settle(self) -> bool:
        """Wait until all serve, or one can't; return whether they do."""
        await self._settled.wait()
        return self.failure is None

    async def stop(self) -> None:
        """Let all drain and end; kill those that take too long."""
        if not self._stopping.is_set():
            self._stopping.set()
            for worker in self._workers:
                worker.terminate()
        with trio.move_on_after(self._plan.drain_timeout + _GRACE):
            await self._ended.wait()
        for worker in self._workers:
            logger.error("worker %d doesn't end, so it is killed", worker.pid)
            worker.kill()
        await self._ended.wait()

    async def _keep(self) -> None:
        """Keep one process, and others in its place."""
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        crashes = 0
        while True:
            began = trio.current_time()
            backoff.attempt(began, random.random())
            how = await self._run_one()
            if self._stopping.is_set() or self.failure is not None:
                return
            now = trio.current_time()
            crashes = crashes + 1 if now < began + _LONGEST_PAUSE else 0
            pause = max(0.0, backoff.at - now)
            logger.error("%s; another is started in %.1f s", how, pause)
            if crashes >= _CRASHES:
                logger.critical("workers keep ending soon after their start: %d in a row", crashes)
            with trio.move_on_after(pause):
                await self._stopping.wait()
            if self._stopping.is_set():
                return

    async def _run_one(self) -> str:
        """Run one process to its end; return how it ended."""
        try:
            async with _running(self._plan, self._addresses) as worker:
                self._workers[worker] = None
                try:
                    how = f"worker {worker.pid} {await self._wait(worker)}"
                finally:
                    del self._workers[worker]
        except OSError as error:
            how = f"no worker can be started: {error}"
        if not self._settled.is_set():
            self.failure = how
            self._settled.set()
        return how

    async def _wait(self, worker: Worker) -> str:
        """Wait until a process serves, and then until it doesn't; return how it ended."""
        if self._stopping.is_set():
            worker.terminate()
        try:
            with trio.fail_after(self._plan.start_timeout):
                await worker.wait_ready()
        except StartError as error:
            return f"doesn't start: {error}"
        except trio.TooSlowError:
            return f"didn't serve within {self._plan.start_timeout:g} s"
        logger.info("worker %d serves", worker.pid)
        self._ready += 1
        if self._ready == self._plan.number:
            self._settled.set()
        return await worker.wait()
