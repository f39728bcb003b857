"""What both sides share."""

# The bodies are the server's; mypy can't know that a stub has others.
# mypy: disable-error-code="empty-body"

from dataclasses import dataclass

import druvarpc

ADDRESS = "tcp://127.0.0.1:7422"


@dataclass(frozen=True)
class Ticket:
    token: str
    seconds: float


class Login(druvarpc.Service):
    """Open to everybody."""

    @druvarpc.rpc
    async def login(self, user: str, password: str) -> Ticket: ...


class Notes(druvarpc.Service):
    """For who has a token."""

    @druvarpc.rpc
    async def write(self, text: str) -> int: ...

    @druvarpc.rpc(idempotent=True)
    async def read(self) -> list[str]: ...

    @druvarpc.rpc
    async def erase(self, user: str) -> int: ...
