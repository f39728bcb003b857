"""What a link does to bare ping and TCP: the controls that figures are set against."""

import json
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from benchmarks.processes import MeasurementError
from benchmarks.wan.job import Figures, now
from benchmarks.wan.link import ADDRESSES, CLIENT, SERVER, Wire

PINGS = 15
# To reach an iperf3 server that is starting, 50 ms apart.
ATTEMPTS = 100
# Seconds beyond those of the measurement.
PATIENCE = 30.0


def ping(wire: Wire) -> float:
    """Return the median round trip of small packets over an idle link, in seconds."""
    command = ["ping", "-n", "-c", str(PINGS), "-i", "0.02", "-W", "2", ADDRESSES[SERVER]]
    printed = spoken(wire.inside(CLIENT, command), patience=PATIENCE, strict=False)
    times = [float(found) for found in re.findall(r"time=([\d.]+) ms", printed)]
    if not times:
        raise MeasurementError("ping: no answer")
    return statistics.median(times) / 1e3


@contextmanager
def pinging(wire: Wire, answers: list[tuple[float, float]]) -> Generator[None, None, None]:
    """Ping during a block; at its end, append when each answer came, and what it took, in seconds.

    The former is by `job.now`.
    """
    command = ["ping", "-n", "-D", "-i", "0.1", ADDRESSES[SERVER]]
    child = subprocess.Popen(wire.inside(CLIENT, command), stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        child.send_signal(signal.SIGINT)
        printed, _ = child.communicate()
    # ping has the wall's clock.
    ahead = time.time() - now()
    answers += [
        (float(at) - ahead, float(took) / 1e3)
        for at, took in re.findall(r"\[([\d.]+)\] .* time=([\d.]+) ms", printed)
    ]


def iperf(
    wire: Wire, omit: float, seconds: float, *, down: bool = False, connections: int = 1
) -> Figures:
    """Return the bytes per second that bare TCP connections carry together, once they run."""
    command = ["iperf3", "--client", ADDRESSES[SERVER], "--json", "--get-server-output"]
    command += ["--omit", f"{omit:.0f}", "--time", f"{seconds:.0f}"]
    command += ["--parallel", str(connections), *(["--reverse"] if down else [])]
    if wire.link.congestion_control:
        command += ["--congestion", wire.link.congestion_control]
    # In JSON, so that the client is given its figures; then it doesn't say when it listens.
    server = wire.inside(SERVER, ["iperf3", "--server", "--one-off", "--json"])
    with running(server):
        told = once_it_listens(wire.inside(CLIENT, command), patience=omit + seconds + PATIENCE)
    # Both tell of the receiver, but the sender divides what arrived by its own, shorter, time.
    receiver = told if down else told["server_output_json"]
    return {
        "rate": receiver["end"]["sum_received"]["bits_per_second"] / 8,
        "retransmits": told["end"]["sum_sent"]["retransmits"],
        "connections": connections,
    }


@contextmanager
def running(command: Sequence[str]) -> Generator[None, None, None]:
    """Run a command for the time of a block."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        child.kill()
        child.wait()


def once_it_listens(command: Sequence[str], patience: float) -> Figures:
    """Return what an iperf3 client tells, tried again while its server starts."""
    error = ""
    for _ in range(ATTEMPTS):
        told: Figures = json.loads(spoken(command, patience=patience, strict=False))
        error = told.get("error", "")
        if not error:
            return told
        if "refused" not in error:
            break
        time.sleep(0.05)
    raise MeasurementError(f"iperf3: {error}")


def best_iperf(wire: Wire, omit: float, seconds: float, *, down: bool = False) -> Figures:
    """Return the best of 1, 2, 4 and 8 connections."""
    tried = [iperf(wire, omit, seconds, down=down, connections=number) for number in (1, 2, 4, 8)]
    return max(tried, key=lambda one: float(one["rate"]))


def iperf_version() -> str:
    """Return which iperf3 is installed."""
    return " ".join(spoken(["iperf3", "--version"], patience=PATIENCE).split()[:2])


def spoken(command: Sequence[str], patience: float, *, strict: bool = True) -> str:
    """Return what a command prints; `strict` if its status counts."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=patience
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"{command[0]}: nothing within {patience:g} s") from error
    if done.returncode and strict:
        said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise MeasurementError(f"{command[0]}: {said:.200}")
    return done.stdout
