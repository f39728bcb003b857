"""The stores of a server's tenants: opened when one is asked for, closed when many others are.

A store that is used stays open. Those that are not are closed, the one longest unused first, once
there are more of them than `KEPT`.
"""

from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from .store import Store
from .tenants import ANYBODY, Device, Tenants

# Stores that are open without being used. Each has a handful of files open, and 2 MB of memory.
KEPT = 64


@dataclass
class _Open:
    """A tenant's store, and who uses it."""

    opening: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0
    store: Store | None = None


class Tenancy:
    """Whose call gets which store. `at` and `of` make one.

    Args:
        path: The directory of the tenants' stores.
        tenants: Who they are; None if everybody is the same.
    """

    def __init__(self, path: Path, tenants: Tenants | None) -> None:
        self._path = path
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self.tenants = tenants

    @classmethod
    def of(cls, store: Store) -> "Tenancy":
        """Returns one that gives everybody this store, which is never closed by it."""
        tenancy = cls(Path(), None)
        tenancy._open[ANYBODY.tenant] = _Open(store=store)
        return tenancy

    @classmethod
    @asynccontextmanager
    async def at(cls, path: Path, tenants: Path | None) -> AsyncIterator["Tenancy"]:
        """Opens a directory; closes, in the end, what was opened in it.

        Args:
            path: The store of all; or, with tenants, the directory that has each one's store.
            tenants: The file of tenants.

        Raises:
            BackupError: The store, or the file of tenants, cannot be used.
            OSError: The directory cannot be used.
        """
        tenancy = cls(path, Tenants(tenants) if tenants else None)
        try:
            if tenants is None:
                async with tenancy.opened(ANYBODY):
                    pass  # What is wrong with it is to be told before anybody comes.
            yield tenancy
        finally:
            with trio.CancelScope(shield=True):
                for entry in tenancy._open.values():
                    if entry.store is not None:
                        await trio.to_thread.run_sync(entry.store.close)

    @asynccontextmanager
    async def opened(self, device: Device) -> AsyncGenerator[Store, None]:
        """Gives a device its tenant's store, open for as long as the block lasts.

        Raises:
            BackupError: It cannot be opened.
            OSError: Its directory cannot be used.
        """
        entry = self._open.setdefault(device.tenant, _Open())
        self._open.move_to_end(device.tenant)
        entry.users += 1
        try:
            async with entry.opening:
                if entry.store is None:
                    entry.store = await trio.to_thread.run_sync(Store, self._place(device))
            yield entry.store
        finally:
            entry.users -= 1
            with trio.CancelScope(shield=True):
                await self._close_unused()

    def _place(self, device: Device) -> Path:
        return self._path / "tenants" / device.tenant if self.tenants else self._path

    async def _close_unused(self) -> None:
        unused = [name for name, entry in self._open.items() if not entry.users]
        for name in unused[: max(0, len(unused) - KEPT)]:
            entry = self._open.get(name)
            if entry is None:
                continue
            # Whoever comes meanwhile waits, and opens it again.
            async with entry.opening:
                if not entry.users and entry.store is not None:
                    store, entry.store = entry.store, None
                    await trio.to_thread.run_sync(store.close)
            if not entry.users and entry.store is None:
                self._open.pop(name, None)
