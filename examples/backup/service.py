"""What a client asks of a store: the contract between `server` and `client`, `restore`.

Chunks travel as they are stored (see `chunks`), entries as `tree` makes them. Few round trips are
what the methods are cut for: many ids in a question, many chunks in a put, and a whole tree's
entries in one stream.
"""

from collections.abc import AsyncGenerator, AsyncIterator

import druvarpc

from .chunks import Chunk
from .snapshots import Snapshot
from .tree import Entry

# Ids in one call. 4,096 of them are 139 KB, and take the catalogue some 20 ms.
MAX_IDS = 4096

# Encoded bytes that one `fetch` returns: a server's memory for a call. A chunk is at most a quarter
# of it, and what a client should ask for an eighth: so many bytes are worth a call.
MAX_FETCH = 4 * 1024 * 1024

# Entries in one piece of a stream. Paths are at most 4 KiB, and a part of a file 38 KiB, so that
# a piece stays below what druvarpc takes in one message by default (16 MiB).
MAX_ENTRIES = 1000


class BackupStore(druvarpc.Service, name="backup.Store"):
    """A store of chunks and snapshots.

    What is wrong with a call is said by the status: INVALID_ARGUMENT if the caller contradicts
    itself, FAILED_PRECONDITION if it names chunks that the store does not have, NOT_FOUND for
    snapshots, DATA_LOSS if the store is damaged, INTERNAL if it cannot be written.
    """

    @druvarpc.rpc(idempotent=True)
    async def missing(self, ids: list[bytes]) -> list[int]:
        """Returns the positions, in ascending order, of those ids that the store does not have."""
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    async def put(self, chunks: list[Chunk]) -> None:
        """Stores chunks, after checking that each is what it says; returns once all are durable."""
        raise NotImplementedError

    @druvarpc.rpc
    async def commit(self, name: str, entries: AsyncIterator[list[Entry]]) -> Snapshot:
        """Makes a snapshot of these entries: visible, whole, when this returns, and not before.

        The chunks of an entry must be stored before the entry is sent. A stream that breaks off
        leaves nothing.
        """
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    async def snapshots(self) -> list[Snapshot]:
        """Returns all snapshots, the oldest first."""
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    def entries(self, snapshot: str) -> AsyncGenerator[list[Entry], None]:
        """Yields a snapshot's entries, in the order in which they were committed.

        Args:
            snapshot: Its id or the beginning of it, or a name for the newest of that name.
        """
        raise NotImplementedError

    @druvarpc.rpc(idempotent=True)
    async def fetch(self, ids: list[bytes]) -> list[Chunk]:
        """Returns the chunks with these ids, in this order."""
        raise NotImplementedError
