"""What is seen of a backup while it runs: on a terminal, by a program, in a log."""

import json
import os
import pty
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import trio
from trio.testing import MockClock

from examples.backup.progress import JSON_INTERVAL, LOG_INTERVAL, Reporter, size
from examples.backup.reader import Progress
from examples.backup.tree import Skipped

AT = Progress(files=1234, size=56_000_000, unchanged=1000, path=b"a/path")


async def reported(reporter: Reporter, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await reporter.run()


async def test_a_program_gets_an_object_a_line(capsys, autojump_clock: MockClock):
    reporter = Reporter("backup", as_json=True)
    reporter.watch(AT)
    reporter.watch(Skipped(b"odd\n\xff", "a socket"))
    await reported(reporter, 2.5 * JSON_INTERVAL)
    out, err = capsys.readouterr()
    skipped, *progress = map(json.loads, out.splitlines())
    assert skipped == {"event": "skipped", "path": "odd\\n\\xff", "reason": "a socket"}
    assert len(progress) == 2
    del progress[0]["seconds"]
    assert progress[0] == {
        "event": "progress",
        "files": 1234,
        "unchanged": 1000,
        "bytes": 56_000_000,
    }
    assert err == "skipped odd\\n\\xff: a socket\n"


async def test_a_log_gets_a_line_now_and_then(capsys, autojump_clock: MockClock):
    reporter = Reporter("restore", as_json=False)
    await reported(reporter, 1.5 * LOG_INTERVAL)
    assert capsys.readouterr() == ("", "")
    reporter.watch(AT)
    await reported(reporter, 1.5 * LOG_INTERVAL)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"restore: 1,234 files, 56\.0 MB, in \d+ s \(.+/s\)\n", err)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[bytearray]:
    """Makes stderr a terminal for the block; what it showed is there after the block."""

    def read() -> None:
        with suppress(OSError):  # which says that the other end was closed
            while data := os.read(near, 1 << 16):
                shown.extend(data)

    shown = bytearray()
    near, far = pty.openpty()
    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(far, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "120")
        yield shown
    reader.join()
    os.close(near)


async def test_a_terminal_shows_a_bar_with_rate_and_remaining_time(monkeypatch, autojump_clock):
    with terminal(monkeypatch) as shown:
        reporter = Reporter("backup", as_json=False)
        assert reporter.wants_total
        now = Progress()
        reporter.watch(now)
        reporter.expect(2468, 112_000_000)

        async def work() -> None:
            for step in range(20):
                now.files, now.size = 61 * step, 2_800_000 * step
                await trio.sleep(0.1)
                if step == 10:
                    reporter.watch(Skipped(b"file", "Permission denied"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reporter.run)
            await work()
            nursery.cancel_scope.cancel()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "skipped file: Permission denied" in text
    assert re.search(r"backup .*53\.2/112\.0 MB .* 1,159/2,468 files", text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (10**19, "10.0 EB")],
)
def test_sizes_for_people(count, text):
    assert size(count) == text
