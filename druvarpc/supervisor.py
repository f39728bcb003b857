"""The parent of processes that serve on the same sockets: it keeps them, and acts on signals.

It opens the sockets, starts the processes (`druvarpc.workers`), and does nothing else: it imports
none of the code that is served, so new code is taken up by starting new processes. To reload,
another generation of them is started; once all of its processes serve, the one before drains.

All listen on the same sockets, whose queues they share. With SO_REUSEPORT each process would have a
queue of its own, and what waits in that of a process that ends is reset by the kernel: a restart
would lose connections that clients take for open.
"""

import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from druvarpc.addresses import Address, parse_address
from druvarpc.transports import listening_address, open_listeners, remove_socket
from druvarpc.workers import Generation, Plan, StartError

logger = logging.getLogger("druvarpc")


class Sockets:
    """What the processes listen on.

    Attributes:
        names: their addresses.
        inherited: the same for who inherits them: descriptors.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.inherited: list[Address] = []
        self._bound: list[Address] = []
        self._listeners: list[trio.SocketListener] = []

    async def open(self, addresses: Sequence[str]) -> None:
        """Listen.

        Raises:
            ValueError: an address isn't one.
            OSError: it isn't possible to listen there.
        """
        for address in [parse_address(one) for one in addresses]:
            opened = await open_listeners(address)
            self._listeners += opened
            if address.fd is None:
                self._bound.append(address)
            for one in opened:
                self.names.append(str(listening_address(one, address)))
                fd = one.socket.fileno()
                unix = address.scheme == "unix"
                self.inherited.append(
                    Address("tcp", fd=fd)
                    if unix
                    else Address(address.scheme, "", 0, address.path, fd)
                )

    def close(self) -> None:
        """Listen no more, as far as this process goes."""
        while self._bound:
            remove_socket(self._bound.pop())
        for listener in self._listeners:
            listener.socket.close()


class Supervisor:
    """Keeps the generations of one server.

    Args:
        plan: what they run.
        sockets: where they listen.
        announce: called with each address, once all serve.

    Attributes:
        status: the exit status.
        failure: why nothing could be served at all.
    """

    def __init__(self, plan: Plan, sockets: Sockets, announce: Callable[[str], None]) -> None:
        self.status = 0
        self.failure: str | None = None
        self._plan = plan
        self._sockets = sockets
        self._announce = announce
        self._generations: dict[Generation, None] = {}
        self._reload = trio.Event()
        self._serving = trio.CancelScope()

    async def run(self, signals: AsyncIterator[int]) -> None:
        """Serve until a signal says to end. Cancelled, all processes are killed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._obey, signals, nursery.cancel_scope)
            with self._serving:
                await self._serve(nursery)
            # Who connects from now on is refused, rather than left waiting for nobody.
            self._sockets.close()
            async with trio.open_nursery() as stopping:
                for generation in self._generations:
                    stopping.start_soon(generation.stop)
            nursery.cancel_scope.cancel()

    async def _obey(self, signals: AsyncIterator[int], all_of_it: trio.CancelScope) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                self._reload.set()
            elif not self._serving.cancel_called:
                logger.info("%s: draining", signal.Signals(number).name)
                self._serving.cancel()
            else:
                logger.warning("%s again: ending at once", signal.Signals(number).name)
                self.status = 128 + number  # as if the signal had ended this process
                all_of_it.cancel()

    async def _serve(self, nursery: trio.Nursery) -> None:
        """Start a generation, and others in its place; return only if the first can't be."""
        current = self._begin(nursery)
        if not await current.settle():
            self.failure = current.failure
            return
        for name in self._sockets.names:
            self._announce(name)
        while True:
            await self._reload.wait()
            self._reload = trio.Event()
            logger.info("reloading")
            new = self._begin(nursery)
            if await new.settle():
                logger.info("reloaded; the workers of before drain")
                current, old = new, current
            else:
                logger.error("not reloaded, the workers of before go on: %s", new.failure)
                old = new
            nursery.start_soon(old.stop)

    def _begin(self, nursery: trio.Nursery) -> Generation:
        generation = Generation(self._plan, self._sockets.inherited)
        self._generations[generation] = None
        nursery.start_soon(self._run, generation)
        return generation

    async def _run(self, generation: Generation) -> None:
        try:
            await generation.run()
        finally:
            del self._generations[generation]


async def supervise(plan: Plan, addresses: Sequence[str], announce: Callable[[str], None]) -> int:
    """Keep processes that serve, until a signal says to end; return the exit status.

    SIGHUP reloads; SIGTERM and SIGINT drain, and the second of them ends all at once.

    Args:
        plan: what they run.
        addresses: where they listen; see `druvarpc.serve`.
        announce: called with each address, port included, once all serve.

    Raises:
        ValueError: an address isn't one.
        OSError: it isn't possible to listen there.
        StartError: what is to be served can't be.
    """
    sockets = Sockets()
    try:
        with trio.open_signal_receiver(signal.SIGHUP, signal.SIGTERM, signal.SIGINT) as signals:
            await sockets.open(addresses)
            supervisor = Supervisor(plan, sockets, announce)
            await supervisor.run(signals)
    finally:
        sockets.close()
    if supervisor.failure is not None:
        raise StartError(supervisor.failure)
    return supervisor.status
