"""``python -m convexhead``."""

from convexhead.cli import main

main()
