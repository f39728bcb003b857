"""What does the protocol's core cost without sockets? Two cores in one process, bytes carried over.

There are no peers: none has a core that makes calls without I/O. Seconds are of processor time, as
nothing is waited for. Frames are counted in a shorter run of the same work, so that counting them
isn't measured.
"""

import gc
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from benchmarks.comparison import Pace
from benchmarks.measure import noise, until
from benchmarks.tables import byte_rate, count, table
from druvarpc.protocol import CallsReceived, Connection, Readable, RepliesReceived, Stream

METHOD = "Bench.echo"
PAYLOAD = b"\x91\xc4\x40" + noise(64)  # MessagePack: an array of one, 64 bytes
CLUBS = (1, 16, 256)
PIECES = {"4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20}
OPEN_CALLS = 1_000
# docs/protocol.md: what each side sends first, and the head of a frame.
PREFACE, HEAD = 8, 12

# Does some work for so many seconds; returns how much: calls, or bytes of pieces.
Work = Callable[[float], int]


class Pair:
    """A client's core and a server's, whose bytes are carried over; nothing waits for the clock.

    Attributes:
        frames: that went over, both ways; counted if `counting`.
        bytes: that went over, both ways.
        replies: that the client was told of.
    """

    def __init__(self) -> None:
        self.frames = self.bytes = self.replies = 0
        self.counting = False
        self.client = Connection("client", now=0)
        self.server = Connection("server", now=0)
        self.carry(answering=True)

    def carry(self, *, answering: bool) -> None:
        """Carry bytes until neither has more to say; answer calls by their own payload."""
        client, server = self.client, self.server
        while client.wants_to_send or server.wants_to_send:
            self._pass_on(client, server)
            while (event := server.next_event()) is not None:
                if isinstance(event, CallsReceived):
                    for call in event.calls:
                        if call.more:
                            server.take(call, 0)
                        elif answering:
                            server.reply(call, 0, call.payload)
                elif isinstance(event, Readable):
                    while server.take(event.stream, 0) is not None:
                        pass
            self._pass_on(server, client)
            while (event := client.next_event()) is not None:
                if isinstance(event, RepliesReceived):
                    self.replies += len(event.replies)

    def _pass_on(self, source: Connection, target: Connection) -> None:
        data = b"".join(source.data_to_send(0))
        self.bytes += len(data)
        if self.counting:
            position = 0
            while position < len(data):
                position += HEAD + int.from_bytes(data[position + 1 : position + 4])
                self.frames += 1
        target.receive_data(data, 0)


def calling(pair: Pair, club: int) -> Work:
    """Make calls, so many at a time."""

    def work(seconds: float) -> int:
        more, before = until(seconds), pair.replies
        while more():
            for _ in range(club):
                pair.client.call(Stream(METHOD, PAYLOAD), 0)
            pair.carry(answering=True)
        return pair.replies - before

    return work


def sending(pair: Pair, piece: bytes) -> Work:
    """Send pieces in one stream."""
    stream = Stream("Bench.upload", b"\x90", more=True)
    pair.client.call(stream, 0)
    pair.carry(answering=False)

    def work(seconds: float) -> int:
        more, total = until(seconds), 0
        while more():
            while pair.client.send(stream, piece):
                total += len(piece)
            total += len(piece)
            pair.carry(answering=False)
        return total

    return work


def rates(make: Callable[[Pair], Work], pace: Pace) -> dict[str, Any]:
    """Return medians per second of processor time: what the work counts, frames, bytes sent."""
    rounds = []
    for _ in range(pace.rounds):
        pair = Pair()
        work = make(pair)
        work(pace.warm_up)
        start, size = time.process_time(), pair.bytes
        done = work(pace.seconds)
        used = time.process_time() - start
        rounds.append((done / used, (pair.bytes - size) / used))
    pair.counting = True
    frames = pair.frames
    sample = work(pace.warm_up)
    done, wire = (statistics.median(column) for column in zip(*rounds, strict=True))
    per_unit = (pair.frames - frames) / sample
    return {"rate": done, "frames": done * per_unit, "wire": wire, "rounds": rounds}


def held() -> dict[str, float]:
    """Return what an open call takes in both cores together, from its submission to its reply."""

    def opened(pair: Pair) -> list[Stream]:
        calls = [Stream(METHOD, PAYLOAD) for _ in range(OPEN_CALLS)]
        for call in calls:
            pair.client.call(call, 0)
        pair.carry(answering=False)
        return calls

    pair = Pair()
    gc.collect()
    before = sys.getallocatedblocks()
    calls = opened(pair)
    gc.collect()
    blocks = sys.getallocatedblocks() - before
    tracemalloc.start()
    another = Pair()
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    calls += opened(another)
    gc.collect()
    size = tracemalloc.get_traced_memory()[0] - size
    tracemalloc.stop()
    return {"blocks": blocks / OPEN_CALLS, "bytes": size / OPEN_CALLS}


class Core:
    """The question; what `Comparison` is to the others."""

    title = "The core without sockets"
    what = (
        "Both ends in one thread, per second of processor time: echo calls of 64 bytes, and pieces "
        "upwards."
    )
    headline = False

    def run(self, pace: Pace, progress: Callable[[str], None]) -> dict[str, Any]:
        results: dict[str, Any] = {"calls": {}, "data": {}}
        for club in CLUBS:
            progress(f"{self.title}: clubs of {club}")
            results["calls"][str(club)] = rates(lambda pair, club=club: calling(pair, club), pace)
        for title, size in PIECES.items():
            progress(f"{self.title}: pieces of {title}")
            piece = noise(size)
            results["data"][title] = rates(lambda pair, piece=piece: sending(pair, piece), pace)
        results["held"] = held()
        return results

    def tables(self, results: dict[str, Any]) -> str:
        calls = table(
            ["calls submitted together", "calls/s", "frames/s", "bytes on the wire"],
            [
                [number, count(one["rate"]), count(one["frames"]), byte_rate(one["wire"])]
                for number, one in results["calls"].items()
            ],
        )
        data = table(
            ["pieces in one stream", "bytes of pieces", "frames/s"],
            [
                [title, byte_rate(one["rate"]), count(one["frames"])]
                for title, one in results["data"].items()
            ],
        )
        held = results["held"]
        return (
            f"{self.what}\n\n{calls}\n\n{data}\n\n"
            f"An open call takes {held['blocks']:.1f} allocated blocks and "
            f"{held['bytes']:.0f} bytes in both cores together."
        )

    first_table = tables


QUESTION = Core()
