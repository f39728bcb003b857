"""The commands of the reference backup for tests: as processes, and in this one.

What is to be killed is a process of its own. What only looks at the outcome runs in this process,
which saves half a second of imports for each command.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from examples.backup.cli import cli, verdict

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "examples.backup"]


def start(*arguments: object, environment: Mapping[str, str] = os.environ) -> subprocess.Popen[str]:
    """Starts a command as a process."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
    )


@dataclass(frozen=True)
class Done:
    """What a command did: its exit status, and what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The object in the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


def ended(process: subprocess.Popen[str]) -> Done:
    """Waits for a process."""
    with process:
        stdout, stderr = process.communicate(timeout=60)
    return Done(process.returncode, stdout, stderr)


def run(*arguments: object) -> Done:
    """Runs a command to its end, as a process."""
    return ended(start(*arguments))


def here(*arguments: object) -> Done:
    """Runs a command to its end, in this process. An error that nobody expected is raised."""
    done = CliRunner().invoke(cli, [*map(str, arguments)])
    if done.exception is None or isinstance(done.exception, SystemExit):
        return Done(done.exit_code, done.stdout, done.stderr)
    status, line = verdict(done.exception)
    if not status:
        raise done.exception
    return Done(status, done.stdout, f"{done.stderr}error: {line}\n")


def succeed(*arguments: object) -> Any:
    """Runs a command in this process, that has nothing to complain about; returns its object."""
    done = here(*arguments, "--json")
    assert done.status == 0, (arguments, done)
    return done.json


class Serving:
    """A server's process, and where it listens."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def stop(self) -> Done:
        """Tells it to end, and waits until it has."""
        self.process.send_signal(signal.SIGTERM)
        return ended(self.process)

    def kill(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(
    store: Path, *options: object, environment: Mapping[str, str] = os.environ
) -> Iterator[Serving]:
    """Serves a store; the server is killed in the end, if it still runs."""
    listen = ("--listen", "tcp://127.0.0.1:0")
    with start("serve", "--store", store, *listen, *options, environment=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                process.kill()
                raise AssertionError(ended(process))
            yield Serving(process, line.removeprefix("listening on ").strip())
        finally:
            process.kill()


def same(left: Path, right: Path) -> bool:
    """Whether two trees are equal, in names, kinds and contents."""
    compare = ["diff", "--recursive", "--no-dereference", str(left), str(right)]
    return subprocess.run(compare, check=False, capture_output=True).returncode == 0
