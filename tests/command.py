"""The command line, run in this process."""

from __future__ import annotations

import sys

from convexhead import cli


def call(*arguments: object) -> int:
    """Run a command; its exit code."""
    sys.argv = ["convexhead", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
