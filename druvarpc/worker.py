"""One process of `druvarpc serve`: offers what a module has, on sockets that its parent has opened.

Its parent (`druvarpc.workers`) gives it one more socket, to which it writes one line: "ready" once
it serves, or "failed" and why. Nothing comes the other way: that the parent is gone is seen from
the end of that connection. Then, and on SIGTERM, the process drains and ends.
"""

import argparse
import importlib
import inspect
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, cast

import trio

from druvarpc.addresses import parse_address
from druvarpc.codec import printable
from druvarpc.server import Server, serve
from druvarpc.service import Service

READY: Final = "ready"
FAILED: Final = "failed"

logger = logging.getLogger("druvarpc")

Start = Callable[..., Awaitable[object]]


class NotServable(Exception):
    """What was named isn't there, or is nothing that can be served."""


def configure_log() -> None:
    """Write the log to stderr, unless the program that is served has its own idea of that."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"
    )


def load(target: str) -> Start:
    """Return a function that serves what "module:object" names.

    It is called like `druvarpc.serve` without services: with addresses and `task_status`.

    Raises:
        NotServable: there is no such object, or it is none that can be served.
        Exception: whatever the module raises when it is imported, or the object when called.
    """
    module, _, path = target.partition(":")
    if not module or not path:
        raise NotServable(f"{target!r}: what to serve is named as module:object")
    try:
        found: object = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module and not module.startswith(f"{missing}."):
            raise  # a bug of the module's
        raise NotServable(f"{target!r}: {error}") from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise NotServable(f"{target!r}: {module} has no {path}")
        found = getattr(found, name)
    return _start_of(found, target)


def _start_of(found: object, target: str) -> Start:
    if callable(found) and not isinstance(found, Service):
        if "task_status" in inspect.signature(found).parameters:
            return cast("Start", found)
        found = found()
    services = [found] if isinstance(found, Service) else found
    if isinstance(services, Iterable):
        services = list(cast("Iterable[object]", services))
        if services and all(isinstance(one, Service) for one in services):
            return partial(serve, cast("list[Service]", services))
    raise NotServable(
        f"{target!r} is no Service, no sequence of them, no function that returns those, and none "
        "that takes addresses and task_status"
    )


class _Control:
    """What the parent is told, and how it is seen to be gone."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)

    def say(self, *words: str) -> None:
        with suppress(OSError):  # nobody is there to hear it: `wait_for_end` finds out
            self._socket.sendall((" ".join(words) + "\n").encode())

    async def wait_for_end(self) -> None:
        # Nothing comes but the end; or an error, which is one too.
        await trio.lowlevel.wait_readable(self._socket)


async def run(start: Start, addresses: Sequence[str], control: _Control, timeout: float) -> int:
    """Serve until asked to end; return the exit status."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def serve_all(*, task_status: trio.TaskStatus[object]) -> None:
                await start(*addresses, task_status=task_status)
                nursery.cancel_scope.cancel()

            try:
                server = await nursery.start(serve_all)
            except Exception as error:
                return _fail(control, error)
            if not isinstance(server, Server):
                nursery.cancel_scope.cancel()
                return _fail(control, NotServable(f"{start!r} started {server!r}, not a Server"))
            _close_inherited(addresses)  # what is served are duplicates
            control.say(READY)
            async with trio.open_nursery() as waiting:
                for wait in (partial(anext, signals), control.wait_for_end):
                    waiting.start_soon(_then_cancel, wait, waiting.cancel_scope)
            await server.drain(timeout)
            nursery.cancel_scope.cancel()
    return 0


async def _then_cancel(wait: Callable[[], Awaitable[object]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()


def _close_inherited(addresses: Sequence[str]) -> None:
    for address in addresses:
        fd = parse_address(address).fd
        if fd is not None:
            os.close(fd)


def _fail(control: _Control, error: Exception) -> int:
    """Say why this process doesn't serve; return its exit status."""
    if isinstance(error, NotServable):
        reason = str(error)
    else:
        logger.error("the server doesn't start", exc_info=error)
        reason = f"{type(error).__name__}: {error}"
    control.say(FAILED, printable(reason))
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the process; return its exit status."""
    parser = argparse.ArgumentParser(prog="druvarpc.worker", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--drain-timeout", type=float, required=True)
    options = parser.parse_args(arguments)
    control = _Control(options.control)
    for address in options.addresses:
        fd = parse_address(address).fd
        if fd is not None:
            os.set_inheritable(fd, False)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        start = load(options.target)
    except Exception as error:
        configure_log()
        return _fail(control, error)
    configure_log()
    return trio.run(run, start, options.addresses, control, options.drain_timeout)


if __name__ == "__main__":
    sys.exit(main())
