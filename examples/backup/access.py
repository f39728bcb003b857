"""How a command reaches the server: the connection, the tenant's token and keys, and signals."""

import logging
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

import druvarpc
from druvarpc import RpcError, Status

from .crypt import Keys, new_key, unwrap
from .errors import BackupError, BadAddress, Interrupted, KeyRefused
from .service import BackupStore

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """Where the server is, and what it takes to use it.

    Attributes:
        server: The server's URL.
        token_file: Where the tenant's token is, if there is one.
        passphrase_file: Where the passphrase of its key is, if there is one.
        tls_ca: Who may have signed the server's certificate; None for those the system trusts.
        cache: The directory for what is kept from one backup to the next; None for the usual one.
    """

    server: str
    token_file: Path | None = None
    passphrase_file: Path | None = None
    tls_ca: Path | None = None
    cache: Path | None = None

    def token(self) -> str | None:
        """Returns the tenant's token, if there is one."""
        return _secret(self.token_file, "DRUVARPC_BACKUP_TOKEN")

    def passphrase(self) -> str | None:
        """Returns the passphrase, if there is one."""
        return _secret(self.passphrase_file, "DRUVARPC_BACKUP_PASSPHRASE")

    def cache_directory(self) -> Path:
        """Returns where to keep what is kept."""
        if self.cache is not None:
            return self.cache
        usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(usual) / "druvarpc-backup"

    def check(self, *, encrypt: bool = False) -> None:
        """Checks, before anything else is done, that the secrets can be had.

        Raises:
            KeyRefused: There is to be encrypted, and no passphrase.
            BackupError: A file has none.
            OSError: A file cannot be read.
        """
        self.token()
        if self.passphrase() is None and encrypt:
            raise KeyRefused("to encrypt takes --passphrase-file or DRUVARPC_BACKUP_PASSPHRASE")


def _secret(path: Path | None, variable: str) -> str | None:
    if path is None:
        return os.environ.get(variable) or None
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BackupError(f"{path}: is not UTF-8") from error
    if not lines or not lines[0]:
        raise BackupError(f"{path}: is empty")
    return lines[0]


def run(access: Access, act: Callable[[druvarpc.Client], Awaitable[T]]) -> T:
    """Returns act(client), with a client that is connected to the server.

    Raises:
        Interrupted: SIGINT or SIGTERM came, and what ran was cancelled.
        BackupError: The server's URL is none, or nobody answers there; or a secret is missing.
    """
    access.check()
    # What the library logs of lost connections ends as an error, which is told once.
    logging.getLogger("druvarpc").addHandler(logging.NullHandler())
    return trio.run(_until_signal, partial(_connected, access, act))


async def keys(access: Access, client: druvarpc.Client, *, create: bool = False) -> Keys | None:
    """Returns the tenant's keys; None if there is no passphrase.

    Args:
        access: Has the passphrase.
        client: Connected to the server, which has the wrapped key.
        create: Whether to make a key if there is none.

    Raises:
        KeyRefused: There is no key, or the passphrase is not the one for it.
    """
    passphrase = access.passphrase()
    if passphrase is None:
        return None
    store = client.stub(BackupStore)
    wrapped = await store.key()
    if not wrapped:
        if not create:
            raise KeyRefused("there is a passphrase, but no key yet: back up with --encrypt first")
        master, wrapped = await trio.to_thread.run_sync(new_key, os.fsencode(passphrase))
        try:
            await store.set_key(wrapped)
            return Keys(master)
        except RpcError as error:
            if error.status is not Status.ALREADY_EXISTS:
                raise
            wrapped = await store.key()  # another client was quicker
    return Keys(await trio.to_thread.run_sync(unwrap, wrapped, os.fsencode(passphrase)))


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


async def _connected(access: Access, act: Callable[[druvarpc.Client], Awaitable[T]]) -> T:
    async with AsyncExitStack() as stack:
        try:
            tls = druvarpc.TLS(authorities=access.tls_ca) if access.tls_ca else None
            connecting = druvarpc.connect(access.server, token=access.token(), tls=tls)
            client = await stack.enter_async_context(connecting)
        except ValueError as error:
            raise BadAddress(str(error)) from error
        except druvarpc.ConnectionLost as error:
            raise BackupError(error.message) from error
        return await act(client)
