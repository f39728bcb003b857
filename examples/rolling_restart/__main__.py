"""`python -m examples.rolling_restart`: reload a server under load, and print what callers see."""

import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import click
import trio

from .load import HEAD, Load

SERVICE = "examples.rolling_restart.service:depot"


async def lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[str]:
    """Yield the lines that a process writes."""
    text = ""
    async for some in stream:
        *whole, text = (text + some.decode()).split("\n")
        for line in whole:
            yield line


class Supervisor:
    """A running `druvarpc serve`."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._printed = lines(process.stdout)
        self._logged = lines(process.stderr)
        self._start = 0.0

    async def address(self) -> str:
        """Wait until it serves; time counts from then on."""
        async for line in self._printed:
            self._start = trio.current_time()
            return line.removeprefix("listening on ")
        raise SystemExit(f"it doesn't start: {[line async for line in self._logged]}")

    async def watch(self, reloaded: trio.MemorySendChannel[str]) -> None:
        """Print its log; tell of each reload."""
        async for line in self._logged:
            event = line.partition(" druvarpc: ")[2]
            self.say(event)
            if "reloaded" in event:
                await reloaded.send(event)

    def say(self, event: str) -> None:
        """Print an event with its time."""
        print(f"{self.time:6.1f}  {event}", flush=True)

    @property
    def time(self) -> float:
        """Seconds since the start."""
        return trio.current_time() - self._start

    def reload(self) -> None:
        """Ask for other workers."""
        self.say("SIGHUP")
        self._process.send_signal(signal.SIGHUP)

    async def stop(self) -> int:
        """Let it drain; return its exit status."""
        self.say("SIGTERM")
        self._process.terminate()
        return await self._process.wait()


@asynccontextmanager
async def supervised(workers: int) -> AsyncGenerator[Supervisor, None]:
    """Run a supervisor for the time of a block."""
    command = [sys.executable, "-m", "druvarpc", "serve", SERVICE]
    command += ["--listen", "tcp://127.0.0.1:0", "--workers", str(workers)]
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield Supervisor(process)
    finally:
        if process.returncode is None:
            process.kill()


async def print_seconds(supervisor: Supervisor, load: Load) -> None:
    """Print a line a second."""
    print(HEAD)
    time, calls = supervisor.time, 0
    while True:
        await trio.sleep(1)
        before, time = time, supervisor.time
        print(load.line(time, before, calls), flush=True)
        calls = load.calls


async def run(workers: int, reloads: int, clients: int, tasks: int) -> int:
    """Reload a server under load; return the exit status."""
    told, reloaded = trio.open_memory_channel[str](1)
    async with supervised(workers) as supervisor, trio.open_nursery() as nursery:
        load = Load(await supervisor.address(), clients, tasks)
        nursery.start_soon(supervisor.watch, told)
        nursery.start_soon(print_seconds, supervisor, load)
        async with trio.open_nursery() as calling:
            calling.start_soon(load.run)
            for _ in range(reloads):
                await trio.sleep(1.2)
                supervisor.reload()
                await reloaded.receive()
            await trio.sleep(1.2)
            load.stop()
        status = await supervisor.stop()
        nursery.cancel_scope.cancel()
    for failure in load.failures[:20]:
        print(failure)
    print(f"{load.calls} calls, {load.streams} streams, {len(load.failures)} failed")
    print(f"{load.reconnects} reconnects, {load.retried} calls sent once more")
    return status or (1 if load.failures else 0)


@click.command()
@click.option("--workers", default=2, show_default=True, help="processes of the server")
@click.option("--reloads", default=3, show_default=True, help="how often to reload it")
@click.option("--clients", default=4, show_default=True, help="clients, a connection each")
@click.option("--tasks", default=16, show_default=True, help="tasks that call, in each client")
def main(workers: int, reloads: int, clients: int, tasks: int) -> None:
    """Reload a server under load, and print what its callers see, second by second.

    Exit status 0 if not one call failed.
    """
    sys.exit(trio.run(run, workers, reloads, clients, tasks))


if __name__ == "__main__":
    main()
