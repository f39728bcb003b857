from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

import druvarpc
from druvarpc.testing import connected
from tests.io.certificates import Authority, authority
from tests.io.services import Reach, reach_by


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority whose files no test changes."""
    return authority(tmp_path_factory.mktemp("ca"))


# An upgraded connection of HTTP is one of TCP from then on: tests/io/test_http.py is enough for it.
@pytest.fixture(params=["memory", "tcp", "unix", "tls"])
def reach(request: pytest.FixtureRequest, tmp_path, ca: Authority) -> Reach:
    """Connect a client to services over each of the transports."""
    return reach_by(request.param, tmp_path, ca)


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
