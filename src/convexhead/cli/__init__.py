"""The command line: ``convexhead extract | fit | path | evaluate | predict | export | audit | probe | report``, …

Each command parses its options, calls one public function of the package, and prints what that returns: a table for
people or, with ``--json``, one JSON object for machines. Exit codes: 0 done, 1 failed (one line on standard error that
says what to do), 2 wrong usage, 130 interrupted.
"""

# Importing a module registers its commands; `--help` lists them in this order.
from convexhead.cli import extract, fit, audit, predict, export, finetune, hub, adam, compare, probe, report, store
from convexhead.cli.entry import app, main

__all__ = ["app", "main"]
