"""What the figures were measured on and with."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison import Pace
from benchmarks.peers import PEERS
from benchmarks.processes import ROOT, describe


def environment(pace: Pace, peers: Sequence[str] = PEERS) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": [one.version for one in map(describe, peers) if one.version],
        "revision": revision(),
        "rounds": pace.rounds,
        "seconds": pace.seconds,
    }


def processor() -> str:
    """Return the processor's model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def revision() -> str:
    """Return the commit that is measured, if this is a working tree; marked if it has changes."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def sentence(kept: dict[str, Any]) -> str:
    """Return an environment as a sentence for readers."""
    packages = ", ".join(kept["versions"])
    at = f" (at {kept['revision']})" if kept["revision"] else ""
    return (
        f"{kept['date']}, {kept['processor']}, {kept['cores']} cores, {kept['kernel']}, "
        f"{kept['python']}; {packages}{at}; medians of {kept['rounds']} rounds of "
        f"{kept['seconds']:g} s; load average at the start {kept['load_average']:g}."
    )
