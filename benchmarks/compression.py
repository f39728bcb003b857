"""What does compression cost, and what does it save? Pieces of several kinds, uploaded.

Only druvarpc and grpc.aio compress messages by themselves; each is measured beside itself without.
`python -m benchmarks.compression serve WAY` and `measure WAY KIND LOAD` are the processes of a
measurement, each of which prints one line of JSON.
"""

import asyncio
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from benchmarks.comparison import Pace
from benchmarks.measure import Load, Stopwatch, noise, until
from benchmarks.processes import PATIENCE, MeasurementError, first_line
from benchmarks.tables import byte_rate, ratio, table

SIZES = {"256 B": 256, "4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20}
KINDS = ("text", "JSON", "noise")
# The ways, and what compresses in each.
WAYS: dict[str, Literal["zlib", "zstd"] | None] = {
    "druvarpc": None,
    "druvarpc, zlib": "zlib",
    "druvarpc, zstd": "zstd",
    "grpc.aio": None,
    "grpc.aio, gzip": None,
}


def corpus(kind: str) -> bytes:
    """Return what pieces are cut from: Python's library, a log that is made up, or noise."""
    if kind == "noise":
        return noise(2 << 20)
    if kind == "text":
        return b"".join(
            path.read_bytes() for path in sorted(Path(json.__file__).parents[1].glob("*.py"))
        )
    chance = random.Random(1)
    records = (
        {
            "id": number,
            "host": f"host-{chance.randrange(1000)}",
            "ok": chance.random() < 0.9,
            "seconds": round(chance.random(), 6),
            "path": f"/var/log/{chance.randrange(100)}.log",
        }
        for number in range(25_000)
    )
    return b"\n".join(json.dumps(record).encode() for record in records)


def cut(kind: str, size: int) -> list[bytes]:
    """Return different pieces of a corpus."""
    whole = corpus(kind)
    step = (len(whole) - size) // 32
    return [whole[start : start + size] for start in range(0, 32 * step, step)]


def in_turn(pieces: list[bytes], seconds: float) -> Iterator[bytes]:
    more = until(seconds)
    for piece in cycle(pieces):
        yield piece
        if not more():
            return


def serve(way: str) -> None:
    if way.startswith("grpc"):
        from benchmarks.peers import grpc_aio

        grpc_aio.serve(_report)
        return
    import trio

    import druvarpc
    from benchmarks.peers.druvarpc import Server

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server: druvarpc.Server = await nursery.start(
                lambda task_status: druvarpc.serve(
                    [Server()],
                    "tcp://127.0.0.1:0",
                    compression=WAYS[way],
                    task_status=task_status,
                )
            )
            _report(int(server.addresses[0].rpartition(":")[2]))

    trio.run(main)


def upload_by_druvarpc(way: str, pieces: list[bytes], load: Load) -> dict[str, Any]:
    import trio

    import druvarpc
    from benchmarks.peers.druvarpc import Bench

    async def source(seconds: float) -> Any:
        for piece in in_turn(pieces, seconds):
            yield piece

    async def main() -> dict[str, Any]:
        address = f"tcp://127.0.0.1:{load.port}"
        async with druvarpc.connect(address, compression=WAYS[way]) as client:
            stub = client.stub(Bench)
            await stub.upload(source(load.warm_up))
            watch = Stopwatch(load)
            measured = watch.rate(await stub.upload(source(load.seconds)))
            done = client.statistics()
            shrunk = (done.bytes_sent + done.bytes_saved_sent) / done.bytes_sent
            return {**asdict(measured), "shrunk": shrunk}

    return trio.run(main)


def upload_by_grpc(way: str, pieces: list[bytes], load: Load) -> dict[str, Any]:
    import grpc

    from benchmarks.peers import grpc_aio

    algorithm = grpc.Compression.Gzip if way.endswith("gzip") else None

    async def main() -> dict[str, Any]:
        async with grpc_aio.connect(load) as channel:
            method = channel.stream_unary(f"/{grpc_aio.SERVICE}/Upload")

            async def phase(seconds: float) -> int:
                call = method(compression=algorithm)
                for piece in in_turn(pieces, seconds):
                    await call.write(piece)
                await call.done_writing()
                return int(await call)

            await phase(load.warm_up)
            watch = Stopwatch(load)
            return asdict(watch.rate(await phase(load.seconds)))

    return asyncio.run(main())


def measure(way: str, kind: str, load: Load) -> dict[str, Any]:
    """Return what one upload measured, by processes of its own."""
    module = (sys.executable, "-m", "benchmarks.compression")
    with first_line((*module, "serve", way), patience=PATIENCE) as (port, server):
        there = json.dumps(asdict(replace(load, port=json.loads(port), server=server)))
        patience = PATIENCE + load.warm_up + load.seconds
        with first_line((*module, "measure", way, kind, there), patience=patience) as (line, _):
            measured: dict[str, Any] = json.loads(line)
            return measured


class Compression:
    """The question; what `Comparison` is to the others."""

    title = "Compression"
    what = (
        "Uploads in one stream, in pieces of a size: bytes of pieces per second, and how many of "
        "them went over the wire as one."
    )
    headline = False

    def run(self, pace: Pace, progress: Callable[[str], None]) -> dict[str, Any]:
        cells: dict[str, Any] = {}
        for number in range(pace.rounds):
            for kind in KINDS:
                for title, size in SIZES.items():
                    for way in WAYS:
                        progress(f"{self.title}, round {number + 1}: {kind}, {title}, {way}")
                        load = Load(0, 0, pace.warm_up, pace.seconds, size)
                        cell = cells.setdefault(kind, {}).setdefault(title, {}).setdefault(way, [])
                        try:
                            cell.append(measure(way, kind, load))
                        except MeasurementError as error:
                            cell.append({"failure": str(error)})
        return cells

    def tables(self, results: dict[str, Any]) -> str:
        parts = [self.what]
        for kind, sizes in results.items():
            rows = [[way, *(_cell(sizes[title][way]) for title in sizes)] for way in WAYS]
            parts.append(table([kind, *sizes], rows))
        return "\n\n".join(parts)

    first_table = tables


def _cell(rounds: list[dict[str, Any]]) -> str:
    done = [one for one in rounds if "failure" not in one]
    if not done:
        return "failed"
    text = byte_rate(statistics.median(one["value"] for one in done))
    shrunk = statistics.median(one.get("shrunk", 1) for one in done)
    return f"{text}, {ratio(shrunk)} : 1" if shrunk > 1.005 else text


def _report(value: object) -> None:
    print(json.dumps(value), flush=True)


def main(command: str, way: str, *arguments: str) -> None:
    if command == "serve":
        serve(way)
        return
    kind, there = arguments
    load = Load(**json.loads(there))
    upload = upload_by_grpc if way.startswith("grpc") else upload_by_druvarpc
    _report(upload(way, cut(kind, load.size), load))


QUESTION = Compression()

if __name__ == "__main__":
    main(*sys.argv[1:])
