"""Entries kept in a temporary file, to be taken again in either order."""

import tempfile
from array import array
from collections.abc import Iterator

import msgspec

from .tree import Entry

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode

# In memory up to this many bytes: some thousand entries.
IN_MEMORY = 1024 * 1024


class Spool:
    """A list of entries of which memory holds 8 bytes each."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 (closed by `close`)
        self._ends = array("Q", [0])

    def append(self, entry: Entry) -> None:
        """Adds an entry."""
        data = _encode(entry)
        self._file.seek(self._ends[-1])
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Entry]:
        return (self._at(index) for index in range(len(self)))

    def __reversed__(self) -> Iterator[Entry]:
        return (self._at(index) for index in reversed(range(len(self))))

    def _at(self, index: int) -> Entry:
        self._file.seek(self._ends[index])
        return _decode(self._file.read(self._ends[index + 1] - self._ends[index]))

    def close(self) -> None:
        """Deletes the file."""
        self._file.close()
