"""rpyc: a thread for each connection; several calls in flight are its async results.

A streaming call would hold its connection's one thread, so that bulk goes as calls of a piece each,
several in flight, and there are no open streams. Objects of a class of one's own are passed by
reference, not as messages. rpyc compresses what is larger than 3,000 bytes.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import rpyc
from rpyc.utils.server import ThreadedServer

from benchmarks.measure import (
    FIRST,
    Load,
    Measured,
    Stopwatch,
    noise,
    settled_bytes,
    until,
)

NAME = "rpyc"
PACKAGE = "rpyc"

# Pieces in flight in a transfer.
AHEAD = 16


class Bench(rpyc.Service):
    def on_connect(self, conn: Any) -> None:
        self._piece = b""

    def exposed_echo(self, data: bytes) -> bytes:
        return data

    def exposed_write(self, piece: bytes) -> int:
        return len(piece)

    def exposed_read(self, size: int) -> bytes:
        if len(self._piece) != size:
            self._piece = noise(size)
        return self._piece


def serve(announce: Callable[[int], None]) -> None:
    server = ThreadedServer(Bench, hostname="127.0.0.1", port=0)
    announce(server.port)
    server.start()


def connect(load: Load) -> Any:
    return closing(rpyc.connect("127.0.0.1", load.port))


def repeat(call: Callable[[], object], seconds: float) -> int:
    more, count = until(seconds), 0
    while more():
        call()
        count += 1
    return count


def one_at_a_time(load: Load, call: Callable[[], object]) -> Measured:
    repeat(call, load.warm_up)
    watch = Stopwatch(load)
    return watch.rate(repeat(call, load.seconds))


def ahead(load: Load, start: Callable[[], Any], window: int, worth: int = 1) -> Measured:
    """Measure with `window` async results in flight; each is worth so many of what is counted."""

    def phase(seconds: float) -> int:
        more, count = until(seconds), 0
        flying: deque[Any] = deque()
        while more():
            while len(flying) < window:
                flying.append(start())
            flying.popleft().wait()
            count += 1
        for result in flying:
            result.wait()
        return count + len(flying)

    phase(load.warm_up)
    watch = Stopwatch(load)
    return watch.rate(phase(load.seconds) * worth)


def echo(load: Load) -> Measured:
    with connect(load) as connection:
        return one_at_a_time(load, partial(connection.root.echo, load.payload))


def echo_ahead(load: Load) -> Measured:
    with connect(load) as connection:
        start = partial(rpyc.async_(connection.root.echo), load.payload)
        return ahead(load, start, load.count)


def upload(load: Load) -> Measured:
    with connect(load) as connection:
        start = partial(rpyc.async_(connection.root.write), load.payload)
        return ahead(load, start, AHEAD, load.size)


def download(load: Load) -> Measured:
    with connect(load) as connection:
        start = partial(rpyc.async_(connection.root.read), load.size)
        return ahead(load, start, AHEAD, load.size)


def echo_connections(load: Load) -> Measured:
    with ExitStack() as stack:
        roots = [stack.enter_context(connect(load)).root for _ in range(load.count)]
        calls = [partial(root.echo, load.payload) for root in roots]

        def phase(seconds: float) -> int:
            counts: list[int] = []
            threads = [
                threading.Thread(target=lambda call=call: counts.append(repeat(call, seconds)))
                for call in calls
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return sum(counts)

        phase(load.warm_up)
        watch = Stopwatch(load)
        return watch.rate(phase(load.seconds))


def connects(load: Load) -> Measured:
    payload = load.payload

    def call() -> None:
        with connect(load) as connection:
            connection.root.echo(payload)

    return one_at_a_time(load, call)


def idle_connections(load: Load) -> Measured:
    payload = load.payload
    with ExitStack() as stack:

        def open_some(number: int) -> int:
            for _ in range(number):
                stack.enter_context(connect(load)).root.echo(payload)
            return settled_bytes(load.server)

        before = open_some(int(load.count * FIRST))
        return Measured((open_some(load.count) - before) / load.count)


OPERATIONS = {
    "echo": echo,
    "echo_tasks": echo_ahead,
    "echo_ahead": echo_ahead,
    "echo_connections": echo_connections,
    "upload": upload,
    "download": download,
    "connects": connects,
    "idle_connections": idle_connections,
}
