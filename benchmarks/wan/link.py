"""A long link between two network namespaces of this machine, and what it takes to lay it.

`laid(link)` makes two namespaces, in which nothing is but a loopback device and `wan0`, and joins
their `wan0`s: by a veth pair with the kernel's netem where there is one, else by two TUN devices
and `forwarder.c`. What is to talk over the link runs inside: `wire.inside(CLIENT, command)`.

Nothing stays behind. The namespaces are removed on the way out, and with them their devices; the
forwarder ends with its parent. A run that was killed couldn't clean up: names have their process
in them, and the next run removes the namespaces of processes that are gone,
and ends what runs there.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.wan.links import Link

CLIENT, SERVER = "client", "server"
ADDRESSES = {CLIENT: "10.77.0.1", SERVER: "10.77.0.2"}
DEVICE = "wan0"
MTU = 1500
# Packets that a TUN device holds for the forwarder. Its own queue is the one that is to be felt:
# this one is long enough that it never is, 120 ms at 1 Gbit/s.
DEVICE_QUEUE = 10_000
NAME = re.compile(r"druvarpc-wan-(\d+)-(?:client|server)")
# Debian's packages, by the command that is missing.
PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "gcc": "gcc",
    "ping": "iputils-ping",
    "iperf3": "iperf3",
}


class CannotLayError(Exception):
    """There can be no link here; the message says what is missing."""


def missing() -> list[str]:
    """Return what is needed and isn't there, each as a phrase."""
    wanted = [] if os.geteuid() == 0 else ["root, for network namespaces"]
    if not Path("/dev/net/tun").exists() and not has_netem():
        wanted.append("/dev/net/tun, or sch_netem in the kernel")
    return wanted + [
        f"`{command}` (Debian's package {PACKAGES[command]})" for command in missing_commands()
    ]


def missing_commands() -> list[str]:
    """Return the commands of PACKAGES that aren't installed."""
    return [command for command in PACKAGES if shutil.which(command) is None]


def install() -> None:
    """Install what is missing, where that can be done: as root, and with apt-get."""
    packages = sorted({PACKAGES[command] for command in missing_commands()})
    if packages and os.geteuid() == 0 and shutil.which("apt-get") is not None:
        run("apt-get", "update", "-qq")
        # So that iperf3's package doesn't ask whether its server is to run: it isn't.
        quietly = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-qq", "-y")
        run(*quietly, "--no-install-recommends", *packages)


@dataclass(frozen=True)
class Wire:
    """A link that is laid.

    Attributes:
        link: what it is like.
        by: what makes it so: "netem" or "forwarder".
        namespaces: by side.
    """

    link: Link
    by: str
    namespaces: dict[str, str]

    def inside(self, side: str, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on one side; it replaces `ip` in its process."""
        return ["ip", "netns", "exec", self.namespaces[side], *command]

    def lost_by_devices(self) -> int:
        """Return the packets that got lost before the forwarder saw them: there should be none."""
        lost = 0
        for name in self.namespaces.values():
            shown = run("ip", "-n", name, "-json", "-statistics", "link", "show", DEVICE)
            lost += json.loads(shown)[0]["stats64"]["tx"]["dropped"]
        return lost


@contextmanager
def laid(link: Link, counts: dict[str, object] | None = None) -> Generator[Wire, None, None]:
    """Lay a link; on leaving, remove it, and put the forwarder's counts into `counts`.

    Raises:
        CannotLayError: root, a tool, or a device is missing.
    """
    if wanted := missing():
        raise CannotLayError(f"a long link needs {', '.join(wanted)}")
    remove_stale()
    namespaces = {side: f"druvarpc-wan-{os.getpid()}-{side}" for side in (CLIENT, SERVER)}
    wire = Wire(link, "netem" if has_netem() else "forwarder", namespaces)
    with contextlib.ExitStack() as stack:
        for name in namespaces.values():
            run("ip", "netns", "add", name)
            stack.callback(remove, name)
        if wire.by == "netem":
            join_by_netem(wire)
        else:
            stack.enter_context(forwarding(wire, counts if counts is not None else {}))
        if link.congestion_control:
            stack.enter_context(allowing(link.congestion_control))
        for side in (CLIENT, SERVER):
            raise_up(wire, side)
        yield wire


@contextmanager
def allowing(congestion_control: str) -> Generator[None, None, None]:
    """Let namespaces use a congestion control that only the system itself may use otherwise."""
    setting = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    before = setting.read_text()
    if congestion_control in before.split():
        yield
        return
    setting.write_text(f"{before.strip()} {congestion_control}")
    try:
        yield
    finally:
        setting.write_text(before)


def raise_up(wire: Wire, side: str) -> None:
    """Give one side its address and settings."""
    name = wire.namespaces[side]
    # What one connection learned of the path would give the next one a start.
    settings = {"net/ipv4/tcp_no_metrics_save": "1"}
    if wire.link.congestion_control:
        settings["net/ipv4/tcp_congestion_control"] = wire.link.congestion_control
    if Path("/proc/sys/net/ipv6").exists():
        # Packets that nobody sent on purpose would draw from the forwarder's random numbers.
        settings["net/ipv6/conf/all/disable_ipv6"] = "1"
    for setting, value in settings.items():
        run(*wire.inside(side, ["sh", "-c", f"echo {value} > /proc/sys/{setting}"]))
    run("ip", "-n", name, "link", "set", "lo", "up")
    run("ip", "-n", name, "address", "add", f"{ADDRESSES[side]}/30", "dev", DEVICE)
    run("ip", "-n", name, "link", "set", DEVICE, "mtu", str(MTU), "up")


# Joined by the forwarder.


@contextmanager
def forwarding(wire: Wire, counts: dict[str, object]) -> Generator[None, None, None]:
    """Run the forwarder between both namespaces."""
    link = wire.link
    with tempfile.TemporaryDirectory(prefix="druvarpc-wan-") as folder:
        program = compiled(Path(folder))
        options = {
            "-A": wire.namespaces[CLIENT],
            "-B": wire.namespaces[SERVER],
            "-d": round(link.rtt / 2 * 1e9),
            "-r": link.rate,
            "-q": link.queue_bytes,
            "-l": link.loss,
            "-L": link.burst_loss,
            "-n": link.burst_length,
            "-s": link.seed,
        }
        arguments = [str(part) for option in options.items() for part in option]
        child = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        try:
            if child.stdout.readline() != "ready\n":
                raise CannotLayError("the forwarder ended at once; it said why")
            for name in wire.namespaces.values():
                run("ip", "-n", name, "link", "set", DEVICE, "txqueuelen", str(DEVICE_QUEUE))
            yield
        finally:
            with contextlib.suppress(CannotLayError):
                counts["lost by the devices"] = wire.lost_by_devices()
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(ValueError):
                counts |= json.loads(child.stdout.read())
            child.stdout.close()
            child.wait()


def compiled(folder: Path) -> Path:
    """Compile the forwarder into a folder."""
    program = folder / "forwarder"
    source = Path(__file__).with_name("forwarder.c")
    run("gcc", "-O2", "-Wall", "-Wextra", "-o", str(program), str(source))
    return program


# Joined by the kernel.


@cache
def has_netem() -> bool:
    """Return whether the kernel has netem; tried out in a namespace."""
    if os.geteuid() != 0 or shutil.which("tc") is None:
        return False
    name = f"druvarpc-wan-{os.getpid()}-{CLIENT}"
    try:
        run("ip", "netns", "add", name)
        try:
            run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        finally:
            remove(name)
    except CannotLayError:
        return False
    return True


def join_by_netem(wire: Wire) -> None:
    """Join both namespaces by a veth pair, with netem on both ends."""
    link, (client, server) = wire.link, wire.namespaces.values()
    run(
        *("ip", "-n", client, "link", "add", DEVICE, "type", "veth"),
        *("peer", "name", DEVICE, "netns", server),
    )
    # netem counts packets, and those on the way as well.
    limit = (link.queue_bytes + link.rate / 8 * link.rtt / 2) / MTU
    options = ["delay", f"{link.rtt / 2 * 1e6:.0f}us", "rate", f"{link.rate:.0f}bit"]
    options += ["limit", f"{limit:.0f}"]
    if link.burst_loss:
        ends = 100 / link.burst_length
        begins = ends * link.burst_loss / (1 - link.burst_loss)
        options += ["loss", "gemodel", f"{begins:.6f}%", f"{ends:.6f}%", "100%"]
        options += [f"{link.loss * 100:.6f}%"]
    elif link.loss:
        options += ["loss", "random", f"{link.loss * 100:.6f}%"]
    for name in (client, server):
        # One packet is one packet: netem would hold and lose those that are still to be cut.
        limits = ("gso_max_segs", "1", "gro_max_size", str(MTU))
        run("ip", "-n", name, "link", "set", DEVICE, *limits)
        run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", "netem", *options)


# Commands, and what earlier runs left behind.


def run(*command: str) -> str:
    """Run a command; return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "without a word").splitlines()[-1]
        raise CannotLayError(f"`{' '.join(command)}` failed: {said}")
    return done.stdout


def remove(namespace: str) -> None:
    """Remove a namespace, and end what still runs inside."""
    for process in run("ip", "netns", "pids", namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    run("ip", "netns", "delete", namespace)


def remove_stale() -> None:
    """Remove the namespaces of runs that are gone."""
    for line in run("ip", "netns", "list").splitlines():
        found = NAME.match(line)
        if found and not Path("/proc", found[1]).exists():
            remove(found[0])
