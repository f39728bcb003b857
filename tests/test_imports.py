"""Imports point one way: the layers of druvarpc, and what its pure core may know of.

The checks read the source and import nothing of it, so an import that only type checkers see
counts as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# The modules of druvarpc, highest layer first. What stands lower may import what stands above it.
# Modules on one line know nothing of each other. A new module needs its name here, nothing more.
LAYERS = (
    "version",
    "errors",
    "protocol.frames",
    "protocol.buffer protocol.compression",
    "protocol.limits",
    "protocol.times",
    "protocol.concurrency protocol.goodput protocol.liveness protocol.windows protocol.lanes",
    "protocol.streams",
    "protocol.clubs",
    "protocol.events",
    "protocol.inflow protocol.outflow",
    "protocol.wire",
    "protocol.caller protocol.callee",
    "protocol.connection",
    "protocol",  # its __init__, which re-exports
    "zstd",
    "compression",
    "unions",
    "codec",
    "signatures",
    "service",
    "addresses",
    "tcp peers proxies proxy_protocol",
    "transports",
    "session",
    "timings resilience load",
    "pipe statistics",
    "interceptors replies tokens",
    "outgoing current",
    "calls",
    "clubbed",
    "parts",
    "authorization",
    "handlers",
    "identity",
    "client_connection",
    "dialing",
    "connections",
    "endpoints",
    "retries",
    "streaming",
    "stubs dispatch windowed_within",
    "sending flight",
    "club windowed",
    "arrivals",
    "tls http",
    "tls_transport",
    "routes entrance",
    "client server",
    "links",
    "testing worker",
    "workers",
    "supervisor",
    "cli",
    "__main__",
)
RANKS = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}

# druvarpc/__init__ re-exports the public names: it may import all, and only these may import it.
MAY_IMPORT_THE_PACKAGE = {"cli", "__main__"}

# The pure core does no I/O, reads no clock, and draws no random numbers; nor does what it imports.
PURE = "errors", "protocol"
IMPURE = {
    *("trio", "anyio", "asyncio", "concurrent", "multiprocessing", "subprocess", "threading"),
    *("http", "os", "select", "selectors", "signal", "socket", "ssl", "urllib"),
    *("datetime", "logging", "random", "secrets", "time", "uuid"),
}

# Examples show what a user can do, so they use what a user may.
PUBLIC = {"druvarpc", "druvarpc.testing"}


class Import(NamedTuple):
    """One imported module, by its full name, and the line that imports it."""

    target: str
    line: int


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[Import]:
    """Yields what a file imports; for `from a import b`, a.b if that is a module, else a."""
    modules = {f"druvarpc.{name}" for name in RANKS}
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                file = root.joinpath(*name.split("."))
                is_module = name in modules or file.with_suffix(".py").exists() or file.is_dir()
                yield Import(name if is_module else base, node.lineno)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def refusal(module: str, target: str) -> str | None:
    """Says why a module of druvarpc may not import target, or None if it may.

    Both are full names, of which the module's is in LAYERS.
    """
    name = module.removeprefix("druvarpc.")
    pure = within(name, PURE)
    top, _, rest = target.partition(".")
    if top != "druvarpc":
        return f"the pure core may not import {top}" if pure and top in IMPURE else None
    if not rest:
        if name in MAY_IMPORT_THE_PACKAGE:
            return None
        return "only the command line may import the package itself"
    if rest not in RANKS:
        return f"{target} is not in LAYERS of tests/test_imports.py"
    if pure and not within(rest, PURE):
        return f"the pure core may not import {target}"
    if RANKS[rest] >= RANKS[name]:
        return f"{target} does not stand above {module}"
    return None


def violations(root: Path) -> list[str]:
    """Returns one line for each import that breaks a rule, in the tree that starts at root."""
    found = []
    for path in sorted(root.glob("druvarpc/**/*.py")):
        where = path.relative_to(root)
        module = module_name(path, root)
        if module == "druvarpc":
            continue
        if module.removeprefix("druvarpc.") not in RANKS:
            found.append(f"{where}: {module} is not in LAYERS of tests/test_imports.py: add it")
            continue
        for target, line in imports(path, root):
            if why := refusal(module, target):
                found.append(f"{where}:{line}: {why}")
    for path in sorted(root.glob("examples/**/*.py")):
        where = path.relative_to(root)
        found += [
            f"{where}:{line}: {target} is not public"
            for target, line in imports(path, root)
            if within(target, ("druvarpc",)) and target not in PUBLIC
        ]
    # A line that imports many names from one module is one violation.
    return list(dict.fromkeys(found))


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("druvarpc/__init__.py", "from druvarpc.cli import main\nfrom .errors import Status"),
        ("druvarpc/protocol/__init__.py", "from druvarpc.protocol.connection import Connection"),
        ("druvarpc/protocol/connection.py", "import struct\nfrom . import frames\nimport msgpack"),
        ("druvarpc/protocol/windows.py", "from ..errors import Status"),
        ("druvarpc/protocol/lanes.py", "from druvarpc import errors"),
        ("druvarpc/session.py", "import trio\nfrom druvarpc.protocol import Connection"),
        ("druvarpc/testing.py", "from druvarpc import client, server"),
        ("druvarpc/cli.py", "import druvarpc\nfrom druvarpc.testing import Link"),
        ("examples/hello/client.py", "import druvarpc\nfrom druvarpc import connect, testing"),
        ("examples/hello/server.py", "import time\nfrom .client import greet\nimport trio"),
    ],
)
def test_allowed(tmp_path: Path, path: str, source: str) -> None:
    plant(tmp_path, path, source)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("druvarpc/service.py", "import druvarpc.session", "session does not stand above"),
        ("druvarpc/client.py", "from .server import serve", "server does not stand above"),
        ("druvarpc/server.py", "from druvarpc import client", "client does not stand above"),
        ("druvarpc/http.py", "from druvarpc import Limits", "only the command line"),
        ("druvarpc/protocol/frames.py", "from . import buffer", "buffer does not stand above"),
        ("druvarpc/protocol/lanes.py", "from . import Frame", "protocol does not stand above"),
        ("druvarpc/protocol/lanes.py", "import trio.lowlevel", "may not import trio"),
        ("druvarpc/protocol/streams.py", "from time import monotonic", "may not import time"),
        ("druvarpc/protocol/clubs.py", "def f():\n    import os", "may not import os"),
        ("druvarpc/protocol/__init__.py", "from .. import service", "may not import druvarpc.serv"),
        ("druvarpc/errors.py", "import logging", "may not import logging"),
        ("druvarpc/new.py", "", "druvarpc.new is not in LAYERS"),
        ("druvarpc/cli.py", "from druvarpc.new import x", "druvarpc.new is not in LAYERS"),
        (
            "druvarpc/transports.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .session import Session",
            "session does not stand above",
        ),
        ("examples/hello/client.py", "from druvarpc.session import S", "session is not public"),
        ("examples/hello/client.py", "from druvarpc import session", "session is not public"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    plant(tmp_path, path, source)
    (line,) = violations(tmp_path)
    assert line.startswith(path)
    assert complaint in line


def plant(root: Path, path: str, source: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(source, "utf-8")
