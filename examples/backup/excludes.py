"""What is left out of a backup: patterns as in .gitignore."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import BackupError


def excluding(
    patterns: Sequence[str], files: Sequence[Path] = ()
) -> Callable[[bytes, bool], bool] | None:
    """Returns what tells if a path is left out, given it and whether it is a directory.

    Args:
        patterns: As the lines of a .gitignore in the tree's root. Later ones override.
        files: Files with such lines, which come before.

    Raises:
        BackupError: A pattern makes no sense.
        OSError: A file cannot be read.
    """
    lines = [line for path in files for line in os.fsdecode(path.read_bytes()).splitlines()]
    lines.extend(patterns)
    if not lines:
        return None
    # Here, since most backups do without.
    from pathspec import GitIgnoreSpec

    try:
        spec = GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise BackupError(f"exclude: {error}") from error

    def excluded(path: bytes, directory: bool) -> bool:
        name = os.fsdecode(path)
        return spec.match_file(name + "/" if directory else name)

    return excluded
