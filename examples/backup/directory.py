"""A directory as a store: packs in files, the catalogue in SQLite, and a lock against others."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .catalogue import Catalogue
from .errors import StoreLocked
from .files import FILES, Files
from .packs import PACK_LIMIT, Packs

# Chunks that are in packs, and wait in memory to be in the catalogue: what a kill leaves to be read
# again at the start.
GATHERED = 1000


class Directory:
    """What a store in a directory is made of.

    Args:
        path: The directory, made if it does not exist.
        pack_limit: At how many bytes a new pack is begun.
        files: What reads and writes the packs.

    Raises:
        StoreLocked: Another process has it open.
        CatalogueError: Its catalogue cannot be used.
        OSError: The directory cannot be used.
    """

    def __init__(self, path: Path, *, pack_limit: int = PACK_LIMIT, files: Files = FILES) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(_locked(path / "lock"))
            self.catalogue = Catalogue(path / "catalogue.sqlite", files, gather=GATHERED)
            stack.callback(self.catalogue.close)
            self.packs = Packs(
                path / "packs",
                pack_limit,
                last=self.catalogue.last_pack(),
                register=self.catalogue.begin_pack,
                files=files,
            )
            stack.callback(self.packs.close)
            files.sync_directory(path)
            files.sync_directory(path.parent)
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Closes all of it, and lets others in. A second call does nothing."""
        self._resources.close()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreLocked(f"{path.parent} is used by another process") from error
        yield
    finally:
        os.close(fd)
