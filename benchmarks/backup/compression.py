"""What a probe before compressing saves and loses: `python -m benchmarks.backup.compression`.

The same chunks are compressed three times: always; unless the file's extension is on a list, as
many backup programs do; and after a probe (see `examples.backup.chunks`). The material is a mix
made of this Python's library, and of what is compressed already in different ways and under
different names; or the files below given paths. CPU time is the thread's own; the best of several
rounds, all three in each round.
"""

import argparse
import bz2
import gzip
import io
import os
import random
import sysconfig
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.backup.chunks import Codec, Compression, split

# Of restic's and duplicati's lists, what is common.
COMPRESSED = frozenset(
    f".{extension}"
    for extension in (
        *("7z", "bz2", "gz", "jpeg", "jpg", "lz4", "mkv", "mov", "mp3", "mp4", "png", "rar"),
        *("tgz", "webp", "whl", "xz", "zip", "zst"),
    )
)

ROUNDS = 3
# Bytes of each kind of material: together some 100 MB.
PORTION = 16_000_000


def sources(limit: int) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of files that differ in what compressing does to them."""
    library = Path(sysconfig.get_path("stdlib"))
    text: list[bytes] = []
    for path in sorted(library.rglob("*.py")):
        if sum(map(len, text)) > limit:
            break
        text.append(path.read_bytes())
    plain = b"".join(text)[:limit]
    binary = b"".join(path.read_bytes() for path in sorted(library.rglob("*.so")))[:limit]
    yield "module.py", plain
    yield "library.so", binary
    # Compressed, and their names say so; or do not, as with databases, caches and documents.
    yield "log.gz", gzip.compress(plain, 6)
    yield "report.docx", _zipped(plain)
    yield "archive.bz2", bz2.compress(binary)
    yield "blob", zlib.compress(binary, 9)
    yield "volume.luks", random.Random(1).randbytes(limit)
    # Named like what is compressed, but is not: raw images in a container, sparse media.
    yield "scan.mov", bytes(limit // 2) + random.Random(2).randbytes(limit // 2)


def _zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("document.xml", content)
    return file.getvalue()


def chunks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for chunk in split(file.fileno(), os.fstat(file.fileno()).st_size):
            yield bytes(chunk)


def material(paths: list[Path], limit: int) -> list[tuple[str, list[bytes]]]:
    """Returns files, as their extension and their chunks."""
    if paths:
        found = (path for root in paths for path in sorted(root.rglob("*")) if path.is_file())
        return [(path.suffix.lower(), list(chunks_of(path))) for path in found]
    made = []
    for name, content in sources(limit):
        with os.fdopen(os.memfd_create(name), "w+b") as file:
            file.write(content)
            file.flush()
            file.seek(0)
            made.append((Path(name).suffix, [bytes(c) for c in split(file.fileno(), len(content))]))
    return made


def measured(
    encode: Callable[[bytes, str], int], files: list[tuple[str, list[bytes]]]
) -> tuple[float, int]:
    """Returns the CPU seconds and the bytes that all chunks become."""
    begin = time.thread_time()
    size = sum(encode(chunk, suffix) for suffix, chunks in files for chunk in chunks)
    return time.thread_time() - begin, size


def main() -> None:
    """Measures, and prints a table for each algorithm."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backup.compression")
    parser.add_argument("path", nargs="*", type=Path, help="measure these files instead")
    parser.add_argument("--quick", action="store_true", help="less material, one round")
    options = parser.parse_args()
    files = material(options.path, PORTION // 16 if options.quick else PORTION)
    source = sum(len(chunk) for _, chunks in files for chunk in chunks)
    print(f"{sum(len(chunks) for _, chunks in files):,} chunks, {source / 1e6:,.1f} MB\n")
    print("| algorithm | when | CPU s | CPU saved | MB | bytes lost |")
    print("|---|---|---|---|---|---|")
    for algorithm, level in (("zstd", 3), ("zstd", 9), ("zlib", 6)):
        always = Codec(Compression(algorithm, level, probe=False))
        probing = Codec(Compression(algorithm, level, probe=True))
        raw = Codec(Compression("none", 0, probe=False))

        def encoded(codec: Codec) -> Callable[[bytes, str], int]:
            return lambda chunk, _: len(codec.encode(bytes(32), chunk).data)

        def listed(chunk: bytes, suffix: str, always: Codec = always, raw: Codec = raw) -> int:
            codec = raw if suffix in COMPRESSED else always
            return len(codec.encode(bytes(32), chunk).data)

        ways = {"always": encoded(always), "extension list": listed, "probe": encoded(probing)}
        best: dict[str, tuple[float, int]] = {}
        for _ in range(1 if options.quick else ROUNDS):
            for name, encode in ways.items():
                best[name] = min(best.get(name, (float("inf"), 0)), measured(encode, files))
        base_time, base_size = best["always"]
        for name, (seconds, size) in best.items():
            print(
                f"| {algorithm}:{level} | {name} | {seconds:.2f} | {1 - seconds / base_time:.0%}"
                f" | {size / 1e6:,.2f} | {(size - base_size) / base_size:.2%} |"
            )


if __name__ == "__main__":
    main()
