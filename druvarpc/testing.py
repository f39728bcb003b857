"""For tests of services: a client wired in memory to a server.

Under trio's `MockClock` such tests take no real time and run the same every time.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import trio

from druvarpc.client import CONNECT_TIMEOUT, Client, connect_by
from druvarpc.protocol import Clubbing, Limits
from druvarpc.server import Server
from druvarpc.service import Service
from druvarpc.session import quiet_nursery
from druvarpc.transports import memory_transports

__all__ = ["connected"]


@asynccontextmanager
async def connected(
    services: Sequence[Service],
    *,
    clubbing: Clubbing = Clubbing(),
    limits: Limits = Limits(),
    server_limits: Limits = Limits(),
) -> AsyncGenerator[Client, None]:
    """Yield a client of a server that offers `services`, both in this process.

    Everything but the socket is real: two protocol cores, their bytes, handlers and tasks.

    Args:
        services: what the server offers.
        clubbing: how the client's calls gather.
        limits: what the client accepts from the server.
        server_limits: what the server accepts from the client.
    """
    near, far = memory_transports()
    server = Server(services, server_limits)
    async with quiet_nursery() as nursery:
        nursery.start_soon(server.serve_transport, far)
        async with connect_by(
            near,
            clubbing=clubbing,
            limits=limits,
            start=trio.current_time(),
            timeout=CONNECT_TIMEOUT,
        ) as client:
            yield client
        nursery.cancel_scope.cancel()
