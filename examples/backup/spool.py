"""Things kept in a temporary file, to be taken again in either order."""

import tempfile
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import msgspec

T = TypeVar("T")

_encode = msgspec.msgpack.Encoder().encode

# In memory up to this many bytes: some thousand entries.
IN_MEMORY = 1024 * 1024


class Spool(Generic[T]):
    """A list of which memory holds 8 bytes for each item.

    Args:
        kind: What the items are.
    """

    def __init__(self, kind: type[T]) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 (see `close`)
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._ends = array("Q", [0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, item: T) -> None:
        """Adds an item."""
        data = _encode(item)
        self._file.seek(self._ends[-1])
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[T]:
        return (self._at(index) for index in range(len(self)))

    def __reversed__(self) -> Iterator[T]:
        return (self._at(index) for index in reversed(range(len(self))))

    def close(self) -> None:
        """Deletes the file."""
        self._file.close()

    def _at(self, index: int) -> T:
        self._file.seek(self._ends[index])
        return self._decode(self._file.read(self._ends[index + 1] - self._ends[index]))
