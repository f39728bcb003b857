"""The command line. A failure is one line on stderr and a status other than 0.

| status | meaning |
| --- | --- |
| 0 | all of it was done |
| 1 | it failed; or something was skipped or is damaged, and the rest is done |
| 2 | the command line makes no sense |
| 130 | interrupted |

What the commands do is in `commands`, which is imported when one of them runs: importing all that
takes longer than backing up a tree that has not changed.
"""

import os
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from .errors import BackupError, BadAddress, Interrupted, display

if TYPE_CHECKING:
    from .access import Access

# Of tasks that fail together, which one's status and line are told: a bug's before all.
PRECEDENCE = (0, 130, 2, 1)


def _with_access(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that say where the server is, as one argument `access`."""

    @wraps(command)
    def wrapped(
        server: str,
        token_file: Path | None,
        passphrase_file: Path | None,
        tls_ca: Path | None,
        cache: Path | None,
        **others: object,
    ) -> None:
        from .access import Access

        command(Access(server, token_file, passphrase_file, tls_ca, cache), **others)

    for option in (
        click.option(
            "--cache",
            type=click.Path(path_type=Path),
            help="Where to keep what is known of the last backup; by default in ~/.cache.",
        ),
        click.option(
            "--tls-ca",
            type=click.Path(path_type=Path),
            help="A PEM file with who may have signed the server's certificate.",
        ),
        click.option(
            "--passphrase-file",
            type=click.Path(path_type=Path),
            help="A file with the passphrase of encrypted backups, in its first line; or set"
            " DRUVARPC_BACKUP_PASSPHRASE.",
        ),
        click.option(
            "--token-file",
            type=click.Path(path_type=Path),
            help="A file with the tenant's token; or set DRUVARPC_BACKUP_TOKEN.",
        ),
        click.option("--server", metavar="URL", required=True, help="Where the server is."),
    ):
        wrapped = option(wrapped)
    return wrapped


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON, one object a line; the last tells all.",
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,  # but an error, of one line
)
def cli() -> None:
    """Back up directories to a server that stores what they have in common once."""


@cli.command()
@click.option("--store", type=click.Path(path_type=Path), required=True, help="A directory.")
@click.option(
    "--listen", metavar="URL", required=True, help="tcp://host:port, tls://... or unix:///path"
)
@click.option(
    "--tenants",
    type=click.Path(path_type=Path),
    help="A file of tokens, see `tenants add`; without it there is one tenant, who needs none.",
)
@click.option("--tls-certificate", type=click.Path(path_type=Path), help="For tls: a PEM file.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key, if not in that file.")
def serve(
    store: Path,
    listen: str,
    tenants: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> None:
    """Serve a store, until SIGTERM or Ctrl-C."""
    import logging

    import trio

    import druvarpc

    from .server import serve_store

    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s")

    tls = druvarpc.TLS(certificate=tls_certificate, key=tls_key) if tls_certificate else None
    serving = partial(serve_store, store, listen, tenants=tenants, tls=tls)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serving)
            for address in server.addresses:
                click.echo(f"listening on {address}")

    trio.run(main)


@cli.group()
def tenants() -> None:
    """Look after a server's file of tenants."""


@tenants.command()
@click.argument("name")
@click.option("--append-only", is_flag=True, help="It may back up and restore, but remove nothing.")
@click.option("--tenants", "file", type=click.Path(path_type=Path), required=True, help="The file.")
def add(name: str, append_only: bool, file: Path) -> None:
    """Make a token for one more device of the tenant NAME, and print it: it is kept nowhere."""
    from .tenants import Role, add_token

    click.echo(add_token(file, name, Role.APPEND_ONLY if append_only else Role.FULL))


@cli.command()
@click.argument("path", type=click.Path(path_type=bytes))
@click.option("--name", required=True, help="What the snapshot will be called.")
@click.option("--exclude", metavar="PATTERN", multiple=True, help="Leave out, as .gitignore would.")
@click.option(
    "--exclude-from",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A file of such patterns.",
)
@click.option(
    "--compression",
    default="auto",
    help="auto (zstd:3 where a sample shrinks), none, zstd:LEVEL, zlib:LEVEL or lzma:LEVEL.",
)
@click.option("--encrypt", is_flag=True, help="Make the tenant's key, if there is none.")
@click.option("--no-cache", is_flag=True, help="Read all files, whether they changed or not.")
@_with_access
@json_option
def backup(
    access: "Access",
    path: bytes,
    name: str,
    exclude: tuple[str, ...],
    exclude_from: tuple[Path, ...],
    compression: str,
    encrypt: bool,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Back up the directory PATH."""
    from . import commands

    request = commands.BackupRequest(
        path, name, exclude, exclude_from, compression, encrypt, not no_cache
    )
    if skipped := commands.backup(access, request, as_json):
        fail(f"{skipped} skipped, all else is in the snapshot")


@cli.command("restore")
@click.argument("snapshot")
@click.argument("dest", type=click.Path(path_type=bytes))
@click.option("--path", "paths", type=click.Path(path_type=bytes), multiple=True, help="Only this.")
@click.option("--check-contents", is_flag=True, help="Compare existing files by their contents.")
@click.option(
    "--owner/--no-owner", default=None, help="Restore owners; the default if root restores."
)
@click.option("--setuid", is_flag=True, help="Restore setuid, setgid, sticky, capabilities.")
@click.option("--devices", is_flag=True, help="Restore device nodes.")
@_with_access
@json_option
def restore_command(
    access: "Access",
    snapshot: str,
    dest: bytes,
    paths: tuple[bytes, ...],
    check_contents: bool,
    owner: bool | None,
    setuid: bool,
    devices: bool,
    as_json: bool,
) -> None:
    """Restore SNAPSHOT (an id, or a name for its newest) into the directory DEST.

    Files that are there and equal are left alone; others that are in the way are replaced.
    """
    from . import commands

    request = commands.RestoreRequest(snapshot, dest, paths, check_contents, owner, setuid, devices)
    if reported := commands.restore(access, request, as_json):
        fail(f"{reported} skipped, all else is restored")


@cli.command()
@_with_access
@json_option
def snapshots(
    access: "Access",
    as_json: bool,
) -> None:
    """List the snapshots, the oldest first."""
    from . import listings

    listings.snapshots(access, as_json)


@cli.command()
@click.argument("snapshot")
@click.option("--path", "paths", type=click.Path(path_type=bytes), multiple=True, help="Only this.")
@_with_access
@json_option
def ls(
    access: "Access",
    snapshot: str,
    paths: tuple[bytes, ...],
    as_json: bool,
) -> None:
    """List what is in SNAPSHOT."""
    from . import listings

    listings.entries(access, snapshot, paths, as_json)


@cli.command()
@click.argument("before")
@click.argument("after")
@_with_access
@json_option
def diff(
    access: "Access",
    before: str,
    after: str,
    as_json: bool,
) -> None:
    """Show what differs between the snapshots BEFORE and AFTER."""
    from . import listings

    listings.differences(access, before, after, as_json)


@cli.command()
@_with_access
@json_option
def stats(
    access: "Access",
    as_json: bool,
) -> None:
    """Show what is stored, and what it took."""
    from . import listings

    listings.usage(access, as_json)


@cli.command()
@_with_access
@json_option
def verify(
    access: "Access",
    as_json: bool,
) -> None:
    """Read all that is stored, and report damage."""
    from . import upkeep

    if found := upkeep.verify(access, as_json):
        fail(f"{found} damaged")


@cli.command()
@click.argument("snapshot", nargs=-1)
@click.option("--keep-last", type=click.IntRange(0), default=0, help="Keep the newest ones.")
@click.option("--keep-daily", type=click.IntRange(0), default=0, help="Keep one of each day.")
@click.option("--keep-weekly", type=click.IntRange(0), default=0, help="Keep one of each week.")
@click.option("--keep-monthly", type=click.IntRange(0), default=0, help="Keep one of each month.")
@click.option("--keep-yearly", type=click.IntRange(0), default=0, help="Keep one of each year.")
@click.option("--name", default="", help="Apply the rule to the snapshots of this name only.")
@click.option("--dry-run", is_flag=True, help="Say what the rule would forget, and forget nothing.")
@_with_access
@json_option
def forget(
    access: "Access",
    snapshot: tuple[str, ...],
    keep_last: int,
    keep_daily: int,
    keep_weekly: int,
    keep_monthly: int,
    keep_yearly: int,
    name: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Forget SNAPSHOTs (ids, or names for their newest), or those that a rule does not keep."""
    from . import upkeep

    keep = (keep_last, keep_daily, keep_weekly, keep_monthly, keep_yearly)
    if any(keep) == bool(snapshot):
        raise click.UsageError("forget needs either snapshots or a rule: --keep-last, --keep-daily")
    if snapshot:
        if dry_run or name:
            raise click.UsageError("--dry-run and --name go with a rule")
        upkeep.forget(access, snapshot, as_json)
    else:
        upkeep.forget_by_rule(access, keep, name, dry_run, as_json)


@cli.command()
@_with_access
@json_option
def gc(
    access: "Access",
    as_json: bool,
) -> None:
    """Remove what no snapshot needs any more."""
    from . import upkeep

    upkeep.collect(access, as_json)


def main() -> None:
    """Runs the command line, and exits."""
    try:
        cli.main(standalone_mode=False, prog_name="python -m examples.backup")
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except BaseException as error:
        status, line = verdict(error)
        if not status:
            raise
        fail(line, status)


def verdict(error: BaseException) -> tuple[int, str]:
    """Returns the exit status and the line for an error; status 0 if nobody expected it."""
    import druvarpc

    match error:
        case BaseExceptionGroup():
            verdicts = map(verdict, error.exceptions)
            return min(verdicts, key=lambda found: PRECEDENCE.index(found[0]))
        case click.ClickException():
            return error.exit_code, error.format_message()
        case BadAddress():
            return 2, str(error)
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
