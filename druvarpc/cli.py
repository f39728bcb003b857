"""The command `druvarpc`."""

import argparse
import math
import sys
from collections.abc import Sequence

import trio

from druvarpc import RpcError, __version__, connect
from druvarpc.codec import printable
from druvarpc.supervisor import supervise
from druvarpc.worker import configure_log
from druvarpc.workers import Plan, StartError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="druvarpc", description="Talk to a druvarpc server, or run one."
    )
    parser.add_argument("--version", action="version", version=f"druvarpc {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    ping = commands.add_parser("ping", help="measure the round trip to a server")
    ping.add_argument("url", help="tcp://host:port, tls://host:port, http(s)://host, unix:///path")
    ping.add_argument("--count", type=_positive, default=4, help="how often (default: %(default)s)")
    ping.set_defaults(command=_ping)
    _add_serve(
        commands.add_parser("serve", help="serve what a module offers, by several processes")
    )
    options = parser.parse_args(arguments)
    try:
        status: int = trio.run(options.command, options)
    except (RpcError, ValueError, OSError, StartError) as error:
        # What a server sent mustn't move the cursor of a terminal.
        print(f"druvarpc: {printable(str(error))}", file=sys.stderr)
        return 1
    return status


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.description = (
        "Serve what a module offers, by one or more processes that share the sockets. Prints "
        '"listening on URL" once all of them serve. SIGHUP starts others with new code, and lets '
        "the old ones finish their calls once the new ones serve. SIGTERM and SIGINT let all "
        "finish; a second one ends them at once."
    )
    serve.epilog = (
        "Exit status: 0 once all have finished, 1 if it isn't possible to serve, 2 for arguments "
        "that are wrong, 128 and the number of the signal if that ended it at once."
    )
    serve.add_argument(
        "target",
        metavar="MODULE:OBJECT",
        help="a Service, a sequence of them, a function that returns those, or what takes "
        "addresses and task_status, as functools.partial(druvarpc.serve, services, limits=...)",
    )
    serve.add_argument(
        "--listen",
        metavar="URL",
        action="append",
        required=True,
        help="tcp://host:port, tls://host:port, http://host:port, https://host:port, "
        "unix:///path, or fd://number; may be given several times",
    )
    serve.add_argument(
        "--workers",
        metavar="N",
        type=_positive,
        default=1,
        help="processes (default: %(default)s)",
    )
    serve.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=30.0,
        help="how long calls may go on in a process that is to end (default: %(default)g)",
    )
    serve.add_argument(
        "--start-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=60.0,
        help="how long a process may take until it serves (default: %(default)g)",
    )
    serve.set_defaults(command=_serve)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


async def _ping(options: argparse.Namespace) -> int:
    async with connect(options.url) as client:
        for _ in range(options.count):
            print(f"{options.url}: {await client.ping() * 1000:.3f} ms")
    return 0


async def _serve(options: argparse.Namespace) -> int:
    configure_log()
    plan = Plan(
        target=options.target,
        number=options.workers,
        drain_timeout=options.drain_timeout,
        start_timeout=options.start_timeout,
    )
    return await supervise(
        plan, options.listen, lambda address: print(f"listening on {address}", flush=True)
    )
