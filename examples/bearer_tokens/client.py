"""`python -m examples.bearer_tokens.client USER PASSWORD [URL]`."""

import sys

import trio

import druvarpc

from .service import ADDRESS, Login, Notes


class Tokens:
    """Logs in for each new token; asked ahead of the expiry of the last."""

    def __init__(self, address: str, user: str, password: str) -> None:
        self.address = address
        self.user = user
        self.password = password

    async def __call__(self) -> druvarpc.Token:
        async with druvarpc.connect(self.address) as client:
            ticket = await client.stub(Login).login(self.user, self.password)
        return druvarpc.Token(ticket.token, expires_in=ticket.seconds)


async def main(user: str, password: str, address: str) -> None:
    try:
        async with druvarpc.connect(address, token=Tokens(address, user, password)) as client:
            notes = client.stub(Notes)
            await notes.write("buy milk")
            print(user, "has", await notes.read())
            try:
                print("erased", await notes.erase("alice"))
            except druvarpc.RpcError as error:
                print(error)
    except druvarpc.ConnectionLost as error:
        sys.exit(error.message)


if __name__ == "__main__":
    user, password, *address = sys.argv[1:]
    trio.run(main, user, password, (*address, ADDRESS)[0])
