"""What a client asks of a store: the contract between `server` and `client`, `restore`.

Chunks travel as they are stored (see `chunks`), entries by the page (see `pages`). Few round trips
are what the methods are cut for: many ids in a question, many chunks in a put, and a whole tree's
entries in one stream.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import NamedTuple

import druvarpc

from .chunks import Chunk
from .pages import Page
from .reports import Checked, Collected, Usage
from .retention import Rule, Verdict
from .snapshots import Snapshot

# Ids in one call. 4,096 of them are 139 KB, and take the catalogue some 20 ms.
MAX_IDS = 4096

# Bytes of a snapshot's name, and of a tenant's wrapped key.
MAX_NAME = 255
MAX_KEY = 4096

# Encoded bytes that one `fetch` returns: a server's memory for a call. A chunk is at most a quarter
# of it, and what a client should ask for an eighth: so many bytes are worth a call.
MAX_FETCH = 4 * 1024 * 1024


class Piece(NamedTuple):
    """A piece of a snapshot in the making: pages of the base as they are, then a new page.

    Attributes:
        first: The first of the base's pages, counted from 0.
        copied: How many.
        page: The page that follows, or None.
    """

    first: int = 0
    copied: int = 0
    page: Page | None = None


class BackupStore(druvarpc.Service, name="backup.Store"):
    """A store of chunks and snapshots.

    What is wrong with a call is said by the status: INVALID_ARGUMENT if the caller contradicts
    itself, FAILED_PRECONDITION if it names chunks or a base that the store does not have, NOT_FOUND
    for snapshots, DATA_LOSS if the store is damaged, INTERNAL if it cannot be written.
    """

    @druvarpc.rpc(idempotent=True)
    async def missing(self, ids: list[bytes]) -> list[int]:
        """Returns the positions, in ascending order, of those ids that the store does not have.

        Chunks that are there stay there for those backups that `commit` had begun before.
        """
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    async def put(self, chunks: list[Chunk]) -> None:
        """Stores chunks, after checking that each is what it says; returns once all are durable."""
        raise NotImplementedError

    @druvarpc.rpc
    def commit(
        self, name: str, base: str, pieces: AsyncIterator[list[Piece]]
    ) -> AsyncGenerator[Snapshot | None, None]:
        """Makes a snapshot of these pieces: visible, whole, when it is yielded, and not before.

        Yields None at once: from then on until the call ends, nothing is removed that the caller
        has put or was told is there, nor what the base names. Yields the snapshot after the last
        piece, and ends. The chunks that a page names must be stored before the page is sent. A
        stream that breaks off leaves nothing.

        Args:
            name: The snapshot's name.
            base: The id of the snapshot whose pages are taken over; empty for none.
            pieces: The pages, in order.
        """
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    async def snapshots(self) -> list[Snapshot]:
        """Returns all snapshots, the oldest first."""
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    def pages(self, snapshot: str) -> AsyncGenerator[Page, None]:
        """Yields a snapshot's pages, in the order in which they were committed.

        Args:
            snapshot: Its id or the beginning of it, or a name for the newest of that name.
        """
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    def hold(self) -> AsyncGenerator[None, None]:
        """Yields None at once, and nothing more: until the call ends, no chunk that is there now
        is removed. A restore holds what it reads while others forget snapshots and collect.
        """
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    async def fetch(self, ids: list[bytes]) -> list[Chunk]:
        """Returns the chunks with these ids, in this order."""
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    async def key(self) -> bytes:
        """Returns the tenant's wrapped key; empty if it has none."""
        raise NotImplementedError

    @druvarpc.rpc
    async def set_key(self, wrapped: bytes) -> None:
        """Keeps the tenant's wrapped key. ALREADY_EXISTS if it has one."""
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    def verify(self) -> AsyncGenerator[Checked, None]:
        """Reads all that is stored; yields how far it is, and the damage found since the last time.

        Of what was damaged, the snapshots and paths that need it come at the end. Goes on to the
        end whatever it finds. The last one has `finished`.
        """
        raise NotImplementedError

    @druvarpc.rpc
    async def forget(self, snapshots: list[str]) -> list[Snapshot]:
        """Removes snapshots, all or none; returns them. What only they needed stays until `gc`.

        NOT_FOUND if one is not there. PERMISSION_DENIED to those who may only append.

        Args:
            snapshots: Ids or beginnings of them, or names for the newest of that name.
        """
        raise NotImplementedError

    @druvarpc.rpc
    async def forget_by_rule(self, rule: Rule, name: str, dry_run: bool) -> list[Verdict]:
        """Removes the snapshots that a rule does not keep; returns what it says of each.

        PERMISSION_DENIED to those who may only append.

        Args:
            rule: What to keep.
            name: Of which snapshots; empty for all names, each by itself.
            dry_run: Whether to remove none.
        """
        raise NotImplementedError

    @druvarpc.rpc
    def gc(self) -> AsyncGenerator[Collected, None]:
        """Removes what no snapshot needs, while others back up and restore; yields how far it is.

        What running backups and restores count on stays, to be removed the next time. Ended early,
        it leaves the rest to the next time. FAILED_PRECONDITION if another one is running,
        PERMISSION_DENIED to those who may only append.
        """
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    async def usage(self) -> Usage:
        """Returns what is stored, and what the server has taken for it."""
        raise NotImplementedError
