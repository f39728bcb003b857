"""The typed message: ten fields, as an agent might send them for a file that it has seen.

`peers/record.proto` and `peers/bench.capnp` define the same message. In every peer the client makes
a new message for each call, the server reads all ten fields and makes the reply of them, and the
client reads the ten fields of the reply.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    path: str
    size: int
    modified: float
    mode: int
    owner: str
    digest: bytes
    hidden: bool
    version: int
    tags: list[str]
    parts: list[int]


FIELDS: dict[str, Any] = {
    "path": "Documents/2024/plans/annual report.odt",
    "size": 1_482_113,
    "modified": 1_718_031_532.25,
    "mode": 0o644,
    "owner": "amelia",
    "digest": bytes(range(32)),
    "hidden": False,
    "version": 7,
    "tags": ["report", "finance", "draft"],
    "parts": [65_536, 131_072, 98_304, 70_001],
}

# What the client does with a reply.
read_fields = attrgetter(*FIELDS)


def revised(record: Any) -> dict[str, Any]:
    """Return the fields of the server's reply, from those of any peer's message."""
    return {
        "path": record.path,
        "size": record.size,
        "modified": record.modified,
        "mode": record.mode,
        "owner": record.owner,
        "digest": record.digest,
        "hidden": record.hidden,
        "version": record.version + 1,
        "tags": record.tags,
        "parts": record.parts,
    }
