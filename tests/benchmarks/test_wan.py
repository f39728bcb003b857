"""Links of `benchmarks/wan` delay, limit and lose what they say, on machines that can have them."""

import re
import statistics
import subprocess

import pytest

from benchmarks.wan.controls import iperf
from benchmarks.wan.link import ADDRESSES, CLIENT, SERVER, laid, missing
from benchmarks.wan.links import Link

LINK = Link("tested", rtt=0.020, rate=50e6)

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(bool(missing()), reason=f"a long link needs {', '.join(missing())}"),
]


def pinged(link: Link, count: int) -> dict[int, float]:
    """Return the milliseconds in which each of a fixed train of packets came back, if it did."""
    command = ["ping", "-n", "-c", str(count), "-i", "0.01", "-W", "1", ADDRESSES[SERVER]]
    with laid(link) as wire:
        # The status says only that some were lost.
        done = subprocess.run(
            wire.inside(CLIENT, command), capture_output=True, text=True, check=False
        )
    found = re.findall(r"icmp_seq=(\d+) .* time=([\d.]+) ms", done.stdout)
    return {int(number): float(took) for number, took in found}


def test_a_link_takes_its_round_trip() -> None:
    took = pinged(LINK, 20)

    assert len(took) == 20
    assert min(took.values()) >= 20
    assert statistics.median(took.values()) < 30


def test_a_link_carries_its_rate() -> None:
    with laid(LINK) as wire:
        rate = iperf(wire, omit=1, seconds=3)["rate"] * 8

    assert 0.6 * LINK.rate < rate <= 1.05 * LINK.rate


def test_the_seed_says_which_packets_get_lost() -> None:
    lossy = Link("lossy", rtt=0.020, rate=50e6, loss=0.2, seed=1)
    other = Link("lossy", rtt=0.020, rate=50e6, loss=0.2, seed=2)

    first, again, different = (set(pinged(one, 120)) for one in (lossy, lossy, other))

    assert first == again
    assert first != different
    # A fifth each way: 77 of 120 come back, give or take 5.
    assert 50 < len(first) < 105
