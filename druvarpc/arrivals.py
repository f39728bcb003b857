"""How long connections may take that aren't the protocol's yet; once the server drains, less."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import trio

__all__ = ["Arrivals"]

# Seconds for what is on its way when a drain begins: the first byte of a connection that was just
# accepted, the two round trips of TLS's handshake, the next request of one who asks often. Who has
# nothing on its way holds the drain up for as long.
GRACE: Final = 1.0


class Arrivals:
    """The waits for what comes before the protocol, at all addresses of a server.

    Args:
        patience: seconds that each of them may take.
    """

    __slots__ = ("_patience", "_scopes")

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._scopes: set[trio.CancelScope] = set()

    @contextmanager
    def limit(self) -> Generator[trio.CancelScope, None, None]:
        """A scope that is cancelled when the time is up."""
        with trio.move_on_after(self._patience) as scope:
            self._scopes.add(scope)
            try:
                yield scope
            finally:
                self._scopes.remove(scope)

    def hurry(self) -> None:
        """Give those that wait, and those to come, no more than `GRACE`."""
        self._patience = min(self._patience, GRACE)
        latest = trio.current_time() + GRACE
        for scope in self._scopes:
            scope.deadline = min(scope.deadline, latest)
