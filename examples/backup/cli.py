"""The commands. A failure is one line on stderr and a status other than 0.

| status | meaning |
| --- | --- |
| 0 | all of it was done |
| 1 | it failed; or something could not be read, and the rest is backed up |
| 2 | the command line makes no sense |
| 130 | interrupted |
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import click
import trio

import druvarpc

from .client import back_up
from .errors import BackupError, display
from .restore import restore
from .server import serve_store
from .service import BackupStore
from .tree import Skipped

T = TypeVar("T")

# Of tasks that fail together, which one's status and line are told: a bug's before all.
PRECEDENCE = (0, 130, 2, 1)

server_option = click.option("--server", metavar="URL", required=True, help="Where the server is.")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object as the last line."
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,  # but an error, of one line
)
def cli() -> None:
    """Back up directories to a server that stores what they have in common once."""


@cli.command()
@click.option("--store", type=click.Path(path_type=Path), required=True, help="A directory.")
@click.option("--listen", metavar="URL", required=True, help="tcp://host:port or unix:///path")
def serve(store: Path, listen: str) -> None:
    """Serve a store, until SIGTERM or Ctrl-C."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_store, store, listen)
            for address in server.addresses:
                click.echo(f"listening on {address}")

    trio.run(main)


@cli.command()
@click.argument("path", type=click.Path(path_type=bytes))
@server_option
@click.option("--name", required=True, help="What the snapshot will be called.")
@json_option
def backup(path: bytes, server: str, name: str, as_json: bool) -> None:
    """Back up the directory PATH."""

    def complain(skipped: Skipped) -> None:
        click.echo(f"skipped {display(skipped.path)}: {skipped.reason}", err=True)

    # Before anything is sent, and with the system's own words.
    os.listdir(path)
    begin = time.perf_counter()
    did = run(server, lambda client: back_up(client, path, name, complain))
    seconds = time.perf_counter() - begin
    made = did.snapshot
    if as_json:
        figures = {
            "snapshot": made.id,
            "name": made.name,
            "files": made.files,
            "source_bytes": made.size,
            "chunks": made.chunks,
            "new_chunks": did.new_chunks,
            "new_bytes": did.new_bytes,
            "calls": did.calls,
            "round_trips": did.round_trips,
            "wire_bytes": did.wire_bytes,
            "skipped": did.skipped,
            "seconds": round(seconds, 4),
        }
        click.echo(json.dumps(figures))
    else:
        click.echo(f"snapshot {made.id} of {made.name}")
        click.echo(f"{made.files:,} files, {size(made.size)}, in {seconds:.1f} s")
        click.echo(
            f"{made.chunks:,} chunks, {did.new_chunks:,} of them new ({size(did.new_bytes)});"
            f" {size(did.wire_bytes)} over the network,"
            f" {did.calls:,} calls in {did.round_trips:,} frames"
        )
    if did.skipped:
        fail(f"{did.skipped} skipped, all else is in the snapshot")


@cli.command()
@server_option
@json_option
def snapshots(server: str, as_json: bool) -> None:
    """List the snapshots, the oldest first."""
    found = run(server, lambda client: client.stub(BackupStore).snapshots())
    if as_json:
        click.echo(json.dumps({"snapshots": [asdict(snapshot) for snapshot in found]}))
        return
    for snapshot in found:
        made = datetime.fromtimestamp(snapshot.created_ns / 1e9).astimezone()
        click.echo(
            f"{snapshot.id}  {made:%Y-%m-%d %H:%M:%S}  {snapshot.files:>9,} files"
            f"  {size(snapshot.size):>9}  {display(snapshot.name.encode())}"
        )


@cli.command("restore")
@click.argument("snapshot")
@click.argument("dest", type=click.Path(path_type=bytes))
@server_option
@json_option
def restore_command(snapshot: str, dest: bytes, server: str, as_json: bool) -> None:
    """Restore SNAPSHOT (an id, or a name for its newest) into the new or empty directory DEST."""
    begin = time.perf_counter()
    did = run(server, lambda client: restore(client, snapshot, dest))
    seconds = time.perf_counter() - begin
    if as_json:
        click.echo(json.dumps({**asdict(did), "seconds": round(seconds, 4)}))
        return
    click.echo(f"{did.files:,} files, {size(did.bytes)}, in {seconds:.1f} s")
    click.echo(
        f"{size(did.wire_bytes)} over the network,"
        f" {did.calls:,} calls in {did.round_trips:,} frames"
    )


class Interrupted(BackupError):
    """A signal told the process to stop."""


def run(server: str, act: Callable[[druvarpc.Client], Awaitable[T]]) -> T:
    """Returns act(client), with a client that is connected to the server.

    Raises:
        Interrupted: SIGINT or SIGTERM came, and what ran was cancelled.
    """
    return trio.run(_until_signal, partial(_connected, server, act))


async def _until_signal(act: Callable[[], Awaitable[T]]) -> T:
    # Python's KeyboardInterrupt would hit any task, and come with what that makes of the others.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await anext(aiter(signals))
                nursery.cancel_scope.cancel()

            nursery.start_soon(cancel)
            result = await act()
            nursery.cancel_scope.cancel()
            return result
    raise Interrupted("interrupted")


async def _connected(server: str, act: Callable[[druvarpc.Client], Awaitable[T]]) -> T:
    async with AsyncExitStack() as stack:
        try:
            client = await stack.enter_async_context(druvarpc.connect(server))
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        except druvarpc.ConnectionLost as error:
            raise BackupError(error.message) from error
        return await act(client)


def size(count: int) -> str:
    """Returns a number of bytes for people."""
    value, units = float(count), iter(("kB", "MB", "GB", "TB"))
    if value < 1000:
        return f"{count} B"
    while value >= 1000:
        value, unit = value / 1000, next(units)
    return f"{value:.1f} {unit}"


def main() -> None:
    """Runs the command line, and exits."""
    try:
        cli.main(standalone_mode=False, prog_name="python -m examples.backup")
    except BaseException as error:
        status, line = verdict(error)
        if not status:
            raise
        fail(line, status)


def verdict(error: BaseException) -> tuple[int, str]:
    """Returns the exit status and the line for an error; status 0 if nobody expected it."""
    match error:
        case BaseExceptionGroup():
            verdicts = map(verdict, error.exceptions)
            return min(verdicts, key=lambda found: PRECEDENCE.index(found[0]))
        case click.ClickException():
            return error.exit_code, error.format_message()
        case Interrupted() | click.Abort():
            return 130, "interrupted"
        case druvarpc.ConnectionLost():
            return 1, f"lost the server: {error.message}"
        case druvarpc.RpcError():
            return 1, error.message or error.status.name
        case OSError() if error.strerror:
            name = error.filename
            where = display(os.fsencode(name)) + ": " if isinstance(name, str | bytes) else ""
            return 1, where + error.strerror
        case BackupError() | druvarpc.ProtocolError() | OSError():
            return 1, str(error)
        case _:
            return 0, ""


def fail(line: str, status: int = 1) -> NoReturn:
    """Ends the process. The line may have a server's words in it, or the bytes of a name."""
    click.echo(f"error: {display(os.fsencode(line))}", err=True)
    sys.exit(status)
