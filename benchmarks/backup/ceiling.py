"""`python -m benchmarks.backup.ceiling TREE`: what cutting, hashing and compressing alone take.

The files are in memory before the clock starts, and nothing is kept: no program that cuts, hashes
and compresses with these libraries can use less processor time. Equal chunks are compressed once,
as in a backup. Work is on all cores, in threads, since that is what a backup does. Prints JSON.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zstandard
from blake3 import blake3
from pyfastcdc import FastCDC

from benchmarks.backup.trees import regular
from examples.backup.chunks import AVERAGE_SIZE, MAX_SIZE, MIN_SIZE, NORMALIZATION

LEVEL = 3
# Bytes of files in one thread's portion.
PORTION = 8 * 1024 * 1024


def portions(contents: Iterable[bytes]) -> list[list[bytes]]:
    """Return the contents in groups of about PORTION bytes."""
    groups: list[list[bytes]] = []
    size = PORTION
    for content in contents:
        if size >= PORTION:
            groups.append([])
            size = 0
        groups[-1].append(content)
        size += len(content)
    return groups


def process(contents: list[bytes], seen: set[bytes]) -> tuple[int, int]:
    """Cut, hash and compress; return the bytes that came out, and the chunks that were new."""
    cutter = FastCDC(
        AVERAGE_SIZE, min_size=MIN_SIZE, max_size=MAX_SIZE, normalized_chunking=NORMALIZATION
    )
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    size = new = 0
    for content in contents:
        cuts = (
            [content] if len(content) <= MIN_SIZE else [cut.data for cut in cutter.cut_buf(content)]
        )
        for cut in cuts:
            name = blake3(cut).digest()
            if name not in seen:
                # Two threads may both find it new: seldom, and to the ceiling's disadvantage.
                seen.add(name)
                size += len(compressor.compress(cut))
                new += 1
    return size, new


def main() -> None:
    contents = [path.read_bytes() for path, size in regular(Path(sys.argv[1])) if size]
    groups = portions(contents)
    seen: set[bytes] = set()
    used, began = time.process_time(), time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda group: process(group, seen), groups))
    figures = {
        "seconds": time.monotonic() - began,
        "processor": time.process_time() - used,
        "bytes": sum(map(len, contents)),
        "compressed": sum(size for size, _ in done),
        "chunks": sum(new for _, new in done),
    }
    print(json.dumps(figures))


main()
