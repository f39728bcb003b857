"""What a server says beside its results: metadata ahead of the reply, and trailers with it."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Final, Protocol

__all__ = ["NOTHING", "Collector", "Pairs", "ReplyMetadata", "collecting", "reply_metadata"]

Pairs = Sequence[tuple[str, str | bytes]]
NOTHING: Final[Mapping[str, str | bytes]] = MappingProxyType({})


class Collector(Protocol):
    """What is told of replies."""

    def note(self, metadata: Pairs, trailers: Pairs = ()) -> None:
        """Take what came with a call."""
        ...


class ReplyMetadata:
    """What came beside the reply of the last call in a block of `reply_metadata`.

    Attributes:
        metadata: sent ahead of the reply and of all items; of equal keys, the last.
        trailers: sent with the reply, also one that failed; likewise.
    """

    def __init__(self, around: Collector | None = None) -> None:
        self.metadata: Mapping[str, str | bytes] = NOTHING
        self.trailers: Mapping[str, str | bytes] = NOTHING
        self._around = around

    def __repr__(self) -> str:
        return f"<ReplyMetadata {dict(self.metadata)!r}, trailers {dict(self.trailers)!r}>"

    def note(self, metadata: Pairs, trailers: Pairs = ()) -> None:
        """Take what came with a call, here and in the blocks around this one."""
        self.metadata = dict(metadata) if metadata else NOTHING
        self.trailers = dict(trailers) if trailers else NOTHING
        if self._around is not None:
            self._around.note(metadata, trailers)


collecting: ContextVar[Collector | None] = ContextVar("druvarpc_reply_metadata", default=None)


@contextmanager
def reply_metadata() -> Generator[ReplyMetadata, None, None]:
    """Tell what servers send beside the replies of the calls in a block.

    It has the metadata and the trailers of the call that ended last in the block or in tasks that
    were started there; metadata of a call that returns a stream are there with its first item, or
    when it ends. Calls of `windowed` are not among them, and those of a club have their own in
    `Reply.metadata` and `Reply.trailers`.
    """
    found = ReplyMetadata(collecting.get())
    token = collecting.set(found)
    try:
        yield found
    finally:
        collecting.reset(token)
