"""`python -m examples.mutual_tls.server DIR [URL]`, DIR as `certificates.sh` makes it."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

import druvarpc
from druvarpc import RpcError, Status

from .service import ADDRESS, Fleet

# Of the names in certificates, such as "laptop-7.agent.fleet.example".
SUFFIX = ".fleet.example"


@dataclass(frozen=True)
class Member:
    role: str
    name: str


async def authenticate(caller: druvarpc.Caller) -> Member:
    """Return who has shown a certificate. That it is a good one TLS has seen to."""
    certificate = caller.certificate
    for dns in () if certificate is None else certificate.dns:
        name, _, role = dns.removesuffix(SUFFIX).partition(".")
        if dns.endswith(SUFFIX) and role:
            return Member(role, name)
    raise RpcError(Status.UNAUTHENTICATED, "the certificate names no member of the fleet")


def is_a(role: str) -> druvarpc.Predicate:
    return lambda call: isinstance(call.identity, Member) and call.identity.role == role


class MyFleet(Fleet):
    def __init__(self) -> None:
        self.last: dict[str, str] = {}

    @druvarpc.authorize(is_a("agent"))
    async def report(self, text: str) -> None:
        agent = druvarpc.current_call().identity
        assert isinstance(agent, Member)
        self.last[agent.name] = text

    @druvarpc.authorize(is_a("operator"))
    async def reports(self) -> dict[str, str]:
        return self.last


async def main(folder: Path, address: str) -> None:
    tls = druvarpc.TLS(
        certificate=folder / "server.pem",
        key=folder / "server.key",
        client_authorities=folder / "authority.pem",
    )
    serve = partial(druvarpc.serve, [MyFleet()], address, tls=tls, authenticate=authenticate)
    async with trio.open_nursery() as nursery:
        server: druvarpc.Server = await nursery.start(serve)
        print("listening on", *server.addresses, flush=True)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), (*sys.argv[2:], ADDRESS)[0])
