"""`python -m examples.backup`."""

from .cli import main

main()
