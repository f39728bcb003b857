"""What both sides share."""

# The bodies are the server's; mypy can't know that a stub has others.
# mypy: disable-error-code="empty-body"

from collections.abc import AsyncGenerator, AsyncIterator

import druvarpc

ADDRESS = "tcp://127.0.0.1:7421"


class Hello(druvarpc.Service):
    @druvarpc.rpc
    async def greet(self, name: str) -> str: ...

    @druvarpc.rpc
    async def total(self, numbers: AsyncIterator[int]) -> int: ...

    @druvarpc.rpc
    def countdown(self, start: int) -> AsyncGenerator[int, None]: ...

    @druvarpc.rpc
    def shout(self, words: AsyncIterator[str]) -> AsyncGenerator[str, None]: ...
