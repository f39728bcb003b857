"""The command `druvarpc`, as `python -m druvarpc`."""

import sys

from druvarpc.cli import main

sys.exit(main())
