"""What is served: `druvarpc serve examples.rolling_restart.service:depot`."""

# The bodies are the server's; mypy can't know that a stub has others.
# mypy: disable-error-code="empty-body"

import os
from collections.abc import AsyncGenerator, AsyncIterator

import druvarpc


class Depot(druvarpc.Service):
    """None of these is idempotent: a call is made again only if it is known not to have begun."""

    @druvarpc.rpc
    async def add(self, left: int, right: int) -> tuple[int, int]: ...  # the sum, and its maker

    @druvarpc.rpc
    async def store(self, pieces: AsyncIterator[bytes]) -> int: ...

    @druvarpc.rpc
    def fetch(self, pieces: int, size: int) -> AsyncGenerator[bytes, None]: ...


class DepotServer(Depot):
    async def add(self, left: int, right: int) -> tuple[int, int]:
        return left + right, os.getpid()

    async def store(self, pieces: AsyncIterator[bytes]) -> int:
        return sum([len(piece) async for piece in pieces])

    async def fetch(self, pieces: int, size: int) -> AsyncGenerator[bytes, None]:
        for _ in range(pieces):
            yield bytes(size)


depot = DepotServer()
