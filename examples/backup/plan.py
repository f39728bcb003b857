"""What a restore does with a snapshot's entries: checks, selects, makes directories, plans loads.

The server is not trusted: entries must come in the order of a tree (so no path twice), sizes are
checked before anything is asked for, and `target` keeps everything inside the destination.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from .chunks import LIMIT, Codec
from .errors import RestoreError
from .loads import Load, Planner, Slice
from .target import Target
from .tree import HOLE, Entry, Kind, check_last, check_next


@dataclass
class Restoring:
    """How far a restore is. Read by others while it changes.

    Attributes:
        files: Files that are as they should be.
        size: Their size, in bytes.
        unchanged: How many of them were so before.
        path: The last one.
    """

    files: int = 0
    size: int = 0
    unchanged: int = 0
    path: bytes = b""

    def count(self, entry: Entry) -> None:
        """Counts a file."""
        self.files += 1
        self.size += entry.size
        self.path = entry.path


class Selection:
    """Which paths are restored.

    Args:
        paths: These, all below them, and the directories on the way. Everything if there are none.
    """

    def __init__(self, paths: Sequence[bytes] = ()) -> None:
        self._paths = [path.strip(b"/") for path in paths]
        self._unseen = set(self._paths)

    def takes(self, path: bytes) -> bool:
        """Whether a path is restored."""
        if not self._paths:
            return True
        self._unseen.discard(path)
        return any(
            not wanted or path == wanted or path.startswith(wanted + b"/") for wanted in self._paths
        )

    def leads(self, path: bytes) -> bool:
        """Whether a path that is not restored itself leads to one that is."""
        return not path or any(wanted.startswith(path + b"/") for wanted in self._paths)

    def check(self) -> None:
        """Checks that all paths were there.

        Raises:
            RestoreError: One was not.
        """
        for path in sorted(self._unseen - {b""}):
            raise RestoreError(path, "not in the snapshot")


class Plan:
    """Turns entries into directories and loads. For one thread at a time.

    Args:
        target: Where to.
        selection: What.
        codec: Names chunks.
        check_contents: Whether files that are there are read, to see if they are equal; else their
            size and time tell.
    """

    def __init__(
        self, target: Target, selection: Selection, codec: Codec, *, check_contents: bool = False
    ) -> None:
        self._target = target
        self._selection = selection
        self._id = codec.id
        self._check_contents = check_contents
        self._planner = Planner()
        self._last: Entry | None = None
        # A file whose further parts need not be written.
        self._skipping = False
        self._orphans: dict[bytes, list[Entry]] = {}
        self.progress = Restoring()

    def add(self, entries: Sequence[Entry]) -> list[Load]:
        """Takes the next entries; returns the loads that they complete.

        Raises:
            BackupError: They are no tree, or cannot be restored.
        """
        loads: list[Load] = []
        for entry in entries:
            check_next(self._last, entry)
            self._last = entry
            if self._selection.takes(entry.path):
                loads.extend(self._take(entry))
            elif entry.kind is Kind.DIRECTORY and self._selection.leads(entry.path):
                with self._target.going_on():
                    self._target.add(entry)
        return loads

    def end(self) -> bool:
        """Tells that there are no more entries; returns whether `adopt` has to see them all again.

        So it is if hard links are restored, and the file that they are links of is not.

        Raises:
            BackupError: The last file is incomplete; a path was not there.
        """
        check_last(self._last)
        self._selection.check()
        return bool(self._orphans)

    def adopt(self, entries: Sequence[Entry]) -> list[Load]:
        """Takes the next entries once more; returns the loads of files that are needed as links."""
        loads: list[Load] = []
        for entry in entries:
            links = self._orphans.get(entry.path, ())
            if links and entry.kind is Kind.FILE and not entry.link:
                path = links[0].path
                loads.extend(self._planner.add(entry._replace(path=path)))
                for other in links[1:] if entry.complete else ():
                    with self._target.going_on():
                        self._target.add(other._replace(link=path))
                        self.progress.count(other)
        return loads

    def finish(self) -> Load:
        """Returns the last load, which may be empty."""
        return self._planner.finish()

    def close(self) -> None:
        """Closes files that were begun and not finished."""
        self._planner.close()

    def _take(self, entry: Entry) -> Iterator[Load]:
        if entry.kind is not Kind.FILE:
            with self._target.going_on():
                self._target.add(entry)
        elif entry.link:
            if self._selection.takes(entry.link):
                with self._target.going_on():
                    self._target.add(entry)
                    self.progress.count(entry)
            else:
                self._orphans.setdefault(entry.link, []).append(entry)
        else:
            if entry.offset == 0:
                self._skipping = not self._target.is_new and self._is_there(entry)
            if not self._skipping:
                yield from self._planner.add(entry)
            elif entry.complete:
                self.progress.count(entry)
                self.progress.unchanged += 1

    def _is_there(self, entry: Entry) -> bool:
        with self._target.existing(entry) as fd:
            if fd is None:
                return False
            if self._check_contents:
                # Of a file in several parts only the first is known here.
                same = entry.complete and self._is_equal(fd, entry)
            else:
                same = os.fstat(fd).st_mtime_ns == entry.mtime_ns
            if same:
                with self._target.going_on():
                    return self._target.refresh(fd, entry)
            return same

    def _is_equal(self, fd: int, entry: Entry) -> bool:
        with suppress(OSError):
            for id, size in zip(entry.chunks, entry.sizes, strict=True):
                left = size
                if id == HOLE:
                    while left:
                        block = os.read(fd, min(left, LIMIT))
                        if not block or any(block):
                            return False
                        left -= len(block)
                elif size > LIMIT or self._id(os.read(fd, size)) != id:
                    return False
            return True
        return False


def write(load: Load, target: Target, progress: Restoring, lock: threading.Lock) -> None:
    """Writes a load. Several may be written at a time.

    Raises:
        RestoreError: A file cannot be restored, nor could others: see `Target.going_on`.
    """
    for part in load.slices:
        done = None
        with target.going_on():
            done = _write_slice(load, part, target)
        if done is not None:
            with lock:
                progress.count(done)


def _write_slice(load: Load, part: Slice, target: Target) -> Entry | None:
    entry, spread = part.entry, part.spread
    output = spread.output(target) if spread else target.open(entry)
    if output is None:
        return None
    try:
        offset = part.offset
        for index in range(part.start, part.stop):
            id, size = entry.chunks[index], entry.sizes[index]
            if id == HOLE:
                output.skip(offset, size)
            else:
                output.write(offset, load.content(id))
            offset += size
        if spread:
            return spread.written(offset - part.offset)
        output.finish()
        return entry
    except RestoreError:
        if spread:
            spread.fail()
        raise
    finally:
        if not spread:
            output.close()
