from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

import druvarpc
from druvarpc.testing import connected
from tests.io.services import Reach, reach_by


@pytest.fixture(params=["memory", "tcp", "unix"])
def reach(request: pytest.FixtureRequest, tmp_path) -> Reach:
    """Connect a client to services over each of the transports."""
    return reach_by(request.param, tmp_path)


@pytest.fixture(params=["memory", "tcp"])
async def reach_plainly(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Reach:
    """Likewise, but what the block of a client raises meets nothing of the test's own."""
    if request.param == "memory":
        return connected

    @asynccontextmanager
    async def reach(services: Sequence[druvarpc.Service]) -> AsyncGenerator[druvarpc.Client, None]:
        server: druvarpc.Server = await nursery.start(druvarpc.serve, services, "tcp://127.0.0.1:0")
        async with druvarpc.connect(server.addresses[0]) as client:
            yield client

    return reach
