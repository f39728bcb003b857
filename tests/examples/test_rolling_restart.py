"""The rolling restart: real processes, under load."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.once
def test_not_one_call_fails_while_the_server_is_reloaded():
    ran = subprocess.run(
        [sys.executable, "-m", "examples.rolling_restart", "--reloads", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == ""
    calls, streams = re.findall(r"^(\d+) calls, (\d+) streams, 0 failed$", ran.stdout, re.M)[0]
    assert int(calls) > 3000
    assert int(streams) > 100
    reconnects = int(re.findall(r"^(\d+) reconnects", ran.stdout, re.M)[0])
    assert reconnects >= 3 * 4
    # Four sets of two processes, each of which has answered calls.
    serving = re.findall(r"worker (\d+) serves", ran.stdout)
    assert len(set(serving)) == 8
    seconds = re.findall(
        r"^ +[\d.]+ +(\d+) +\d+ +\d+ +[\d.a-n]+ +[\d.a-n]+ +0  ([\d ]*)$", ran.stdout, re.M
    )
    assert len(seconds) > 4
    # In no second, of whatever a reload did in it, have the callers been kept waiting.
    assert min(int(rate) for rate, _ in seconds) > 100
    answered = {pid for _, pids in seconds for pid in pids.split()}
    for first in range(0, 8, 2):
        assert answered & set(serving[first : first + 2])
