"""`python -m examples.bearer_tokens.server [URL]`."""

import hashlib
import hmac
import secrets
import sys
import time

import trio

import druvarpc
from druvarpc import RpcError, Status

from .service import ADDRESS, Login, Notes, Ticket
from .tickets import sign, verify

# Seconds that a token holds.
LIFETIME = 60.0


def digest(user: str, password: str) -> bytes:
    return hashlib.scrypt(password.encode(), salt=user.encode(), n=2**12, r=8, p=1)


# A real server has these in a file, and never the passwords.
USERS = {"alice": digest("alice", "wonderland"), "admin": digest("admin", "looking-glass")}


class MyLogin(Login):
    def __init__(self, key: bytes, lifetime: float = LIFETIME) -> None:
        self.key = key
        self.lifetime = lifetime

    async def login(self, user: str, password: str) -> Ticket:
        given = await trio.to_thread.run_sync(digest, user, password)
        if not hmac.compare_digest(USERS.get(user, b""), given):
            raise RpcError(Status.UNAUTHENTICATED, "no such user, or another password")
        return Ticket(sign(self.key, user, time.time() + self.lifetime), self.lifetime)


class Authenticate:
    """Who a token is for; None without a token, since `Login` is for everybody."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    async def __call__(self, caller: druvarpc.Caller) -> druvarpc.Identity | None:
        if caller.token is None:
            return None
        try:
            user, expires = verify(self.key, caller.token)
        except ValueError as error:
            raise RpcError(Status.UNAUTHENTICATED, str(error)) from None
        left = expires - time.time()
        if left <= 0:
            raise RpcError(Status.UNAUTHENTICATED, "the token has expired")
        # When it has, the calls that follow are refused.
        return druvarpc.Identity(user, expires_in=left)


def logged_in(call: druvarpc.CurrentCall) -> bool:
    if call.identity is None:
        raise RpcError(Status.UNAUTHENTICATED, "log in first")
    return True


def owner_or_admin(call: druvarpc.CurrentCall) -> bool:
    return call.identity in (call.arguments[0], "admin")


@druvarpc.authorize(logged_in)
class MyNotes(Notes):
    def __init__(self) -> None:
        self.notes: dict[str, list[str]] = {}

    def mine(self) -> list[str]:
        return self.notes.setdefault(str(druvarpc.current_call().identity), [])

    async def write(self, text: str) -> int:
        self.mine().append(text)
        return len(self.mine())

    async def read(self) -> list[str]:
        return self.mine()

    @druvarpc.authorize(owner_or_admin)
    async def erase(self, user: str) -> int:
        return len(self.notes.pop(user, []))


async def main(address: str) -> None:
    key = secrets.token_bytes(32)  # a real server keeps it, so that tokens outlive it

    async def serve(task_status: trio.TaskStatus[druvarpc.Server]) -> None:
        await druvarpc.serve(
            [MyLogin(key), MyNotes()],
            address,
            authenticate=Authenticate(key),
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        server: druvarpc.Server = await nursery.start(serve)
        print("listening on", *server.addresses, flush=True)


if __name__ == "__main__":
    trio.run(main, (*sys.argv[1:], ADDRESS)[0])
