"""What both sides share."""

# The bodies are the server's; mypy can't know that a stub has others.
# mypy: disable-error-code="empty-body"

import druvarpc

ADDRESS = "tls://127.0.0.1:7423"


class Fleet(druvarpc.Service):
    """Agents report, operators read."""

    @druvarpc.rpc
    async def report(self, text: str) -> None: ...

    @druvarpc.rpc(idempotent=True)
    async def reports(self) -> dict[str, str]: ...
