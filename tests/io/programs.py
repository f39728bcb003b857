"""Real proxies, started with a configuration of the test's on free ports."""

import os
import shutil
import socket
import subprocess
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

F = TypeVar("F", bound=Callable[..., Any])
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"


def marks(*programs: str, file: str = "/") -> list[pytest.MarkDecorator]:
    """Return marks for what runs programs: once is enough, and not at all where one is missing."""
    missing = [name for name in programs if not shutil.which(name, path=PATH)]
    if not Path(file).exists():
        missing.append(file)
    skip = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed here")
    return [pytest.mark.once, skip]


def needs(*programs: str, file: str = "/") -> Callable[[F], F]:
    """Put these marks on a test."""

    def mark(test: F) -> F:
        for one in marks(*programs, file=file):
            test = one(test)
        return test

    return mark


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@asynccontextmanager
async def running(*command: str | Path, ports: list[int], log: Path) -> AsyncGenerator[None, None]:
    """Run a program until it listens on its ports, and for the time of a block."""
    program = shutil.which(str(command[0]), path=PATH)
    with log.open("wb") as output:
        process = await trio.lowlevel.open_process(
            [program, *map(str, command[1:])], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        with trio.move_on_after(20) as scope:
            for port in ports:
                while not await listens(port):
                    assert process.poll() is None, _text(log)
                    await trio.sleep(0.01)
        assert not scope.cancelled_caught, _text(log)
        yield
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(5):
                await process.wait()
            if process.poll() is None:
                process.kill()
            await process.wait()


def _text(log: Path) -> str:
    return log.read_text("utf-8", "replace")


async def listens(port: int) -> bool:
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        return False
    await stream.aclose()
    return True
