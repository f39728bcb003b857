"""The command `druvarpc`."""

import argparse
import sys
from collections.abc import Sequence

import trio

from druvarpc import RpcError, __version__, connect
from druvarpc.codec import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="druvarpc", description="Talk to a druvarpc server.")
    parser.add_argument("--version", action="version", version=f"druvarpc {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    ping = commands.add_parser("ping", help="measure the round trip to a server")
    ping.add_argument("url", help="tcp://host:port, tls://host:port, http(s)://host, unix:///path")
    ping.add_argument("--count", type=_positive, default=4, help="how often (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        trio.run(_ping, options.url, options.count)
    except (RpcError, ValueError) as error:
        # What a server sent mustn't move the cursor of a terminal.
        print(f"druvarpc: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


async def _ping(url: str, count: int) -> None:
    async with connect(url) as client:
        for _ in range(count):
            print(f"{url}: {await client.ping() * 1000:.3f} ms")
