"""`python -m examples.mutual_tls.client DIR NAME [URL]`: report, and read what was reported."""

import sys
from pathlib import Path

import trio

import druvarpc

from .service import ADDRESS, Fleet


async def main(folder: Path, name: str, address: str) -> None:
    tls = druvarpc.TLS(
        certificate=folder / f"{name}.pem",
        key=folder / f"{name}.key",
        authorities=folder / "authority.pem",
    )
    async with druvarpc.connect(address, tls=tls) as client:
        fleet = client.stub(Fleet)
        try:
            await fleet.report(f"{name} is well")
            print("reported")
        except druvarpc.RpcError as error:
            print(error)
        try:
            print(await fleet.reports())
        except druvarpc.RpcError as error:
            print(error)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2], (*sys.argv[3:], ADDRESS)[0])
