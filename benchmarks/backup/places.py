"""Where client and server run: over the loopback interface, or at the two ends of a long link."""

import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from benchmarks.wan.link import (
    ADDRESSES,
    CLIENT,
    DEVICE,
    SERVER,
    Wire,
    laid,
    remove,
    remove_stale,
    run,
)
from benchmarks.wan.links import LINKS, METRO, Link

LOOPBACK = "loopback"
# By the names that the tables have.
PLACES: dict[str, Link | None] = {
    LOOPBACK: None,
    "region": LINKS["region"],
    "continent": LINKS["continent"],
    "metro": METRO,
    # What losses cost is seen beside it.
    "metro, no loss": replace(METRO, name="metro, no loss", loss=0.0),
}


@dataclass(frozen=True)
class Place:
    """Namespaces in which nothing else runs, so that what their devices count is ours.

    Attributes:
        host: the server's address.
        device: what the client's bytes go through.
        namespaces: by side.
        wire: the link; None for the loopback interface.
    """

    host: str
    device: str
    namespaces: dict[str, str]
    wire: Wire | None = None

    def inside(self, side: str, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on one side; it replaces `ip` in its process."""
        return ["ip", "netns", "exec", self.namespaces[side], *command]

    def counted(self) -> tuple[int, int]:
        """Return the bytes of IP packets that the client has sent, and received.

        Over the loopback interface each of them is both ways' sum.
        """
        name = self.namespaces[CLIENT]
        shown = run("ip", "-n", name, "-json", "-statistics", "link", "show", self.device)
        counts = json.loads(shown)[0]["stats64"]
        return counts["tx"]["bytes"], counts["rx"]["bytes"]


@contextmanager
def at(name: str, seed: int) -> Generator[Place, None, None]:
    """Make a place of PLACES; on leaving, remove it and end what still runs there."""
    link = PLACES[name]
    if link is None:
        with alone() as place:
            yield place
        return
    with laid(replace(link, seed=seed)) as wire:
        yield Place(ADDRESSES[SERVER], DEVICE, wire.namespaces, wire)


@contextmanager
def alone() -> Generator[Place, None, None]:
    """Make one namespace for both, with a loopback device of its own."""
    remove_stale()
    namespace = f"druvarpc-wan-{os.getpid()}-{CLIENT}"
    run("ip", "netns", "add", namespace)
    try:
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        yield Place("127.0.0.1", "lo", {CLIENT: namespace, SERVER: namespace})
    finally:
        remove(namespace)
