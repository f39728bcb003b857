"""`python -m benchmarks.backup.screenshot`: draw a backup in progress into docs/images/backup.svg.

A real one: the command runs in a pseudo-terminal, over the region's link, as root. What it prints
is fed to a terminal emulator, and the screen is drawn as it was when some of the work was done.
"""

import fcntl
import os
import pty
import re
import select
import struct
import tempfile
import termios
import time
from pathlib import Path

import pyte
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from benchmarks.backup.measured import serving
from benchmarks.backup.places import Place, at
from benchmarks.backup.programs import Ours, Scene
from benchmarks.backup.trees import build, installation
from benchmarks.processes import ROOT
from benchmarks.wan.link import CLIENT

IMAGE = ROOT / "docs" / "images" / "backup.svg"
COLUMNS, LINES = 96, 12
# Share of the time after which the picture is taken.
MOMENT = 0.6


def recorded(command: list[str], cwd: Path) -> list[tuple[float, bytes]]:
    """Run a command in a terminal; return what it printed, with the seconds until then."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(cwd)
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    began = time.monotonic()
    printed: list[tuple[float, bytes]] = []
    try:
        while select.select([terminal], [], [], 60)[0]:
            printed.append((time.monotonic() - began, os.read(terminal, 1 << 16)))
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    os.waitpid(child, 0)
    return printed


def screen(printed: list[tuple[float, bytes]], until: float) -> list[Text]:
    """Return the lines of the screen as they were at that time."""
    shown = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(shown)
    for when, data in printed:
        if when <= until:
            stream.feed(data)
    lines = []
    for row in range(LINES):
        line = Text()
        for column in range(COLUMNS):
            cell = shown.buffer[row][column]
            line.append(cell.data, Style(color=color(cell.fg), bold=cell.bold))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def color(name: str) -> Color | None:
    """Return a colour of the emulator's: a name, or six hexadecimal digits."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return Color.parse(f"#{name}")
    return Color.parse({"brown": "yellow"}.get(name, name).replace("bright", "bright_"))


def draw(lines: list[Text], typed: str) -> None:
    """Draw a screen below the command that was typed."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text.assemble(("$ ", "bold green"), typed))
        for line in lines:
            console.print(line, no_wrap=True)
    image = console.export_svg(title="examples.backup, 40 ms away at 200 Mbit/s")
    # It is to look the same without fetching anything.
    IMAGE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", image, flags=re.DOTALL))


def take(place: Place, work: Path) -> None:
    """Back up a tree at that place, and draw it."""
    tree = build(installation(), work / "tree")
    scene = Scene(place.host, tree.path, work)
    program = Ours()
    for folder in (scene.store, scene.cache):
        folder.mkdir()
    with serving(program.serve(scene), place):
        command = program.back_up(scene, 1)
        printed = recorded(place.inside(CLIENT, command.argv), command.cwd)
    end = printed[-1][0]
    typed = f"python -m examples.backup backup ~/lib --server tcp://{place.host}:7420 --name lib"
    draw(screen(printed, end * MOMENT), typed)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="druvarpc-backup-") as work, at("region", 1) as place:
        take(place, Path(work))
    print(IMAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
