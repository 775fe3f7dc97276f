"""What commands print: a table for people, or one JSON object for machines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from convexhead.certificate.certificate import Certificate
    from convexhead.tokens import TokenStore

errors = Console(stderr=True, highlight=False)


def emit(result: dict[str, Any], as_json: bool, *lines: Any) -> None:
    """The result for machines, or ``lines`` (text or tables) for people."""
    if as_json:
        print(json.dumps(result, default=str))
        return
    console = Console(highlight=False)
    for line in lines:
        console.print(line)


def typed_command() -> list[str]:
    """What the user typed, for reports to repeat."""
    return ["convexhead", *sys.argv[1:]]


def speaks_for_all() -> bool:
    """Whether this process prints: under torchrun the first one does, for all."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def gaps_are_shown() -> Iterator[None]:
    """A gap that was not reached stands in what is printed: no warning says it again."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def certificate_line(certificate: Certificate) -> str:
    """The certificate in words, and first of all whether it has the gap that was asked for."""
    mark = "[green]certified[/]" if certificate.converged else "[yellow]not converged[/]"
    return f"{mark}: {certificate}"


def show_store(store: TokenStore, as_json: bool, *lines: str) -> None:
    """What a store holds, and ``lines`` below it."""
    info = store.info()
    counts = ", ".join(f"{count} {split}" for split, count in info["images"].items())
    emit(
        info,
        as_json,
        f"[bold]{escape(info['path'])}[/]: {counts} images, {info['classes']} classes, "
        f"{info['tokens']} tokens x {info['channels']} channels, {info['bytes'] / 1e6:.1f} MB",
        *lines,
    )


def show_comparison(results: dict[str, Any], as_json: bool) -> None:
    """The table of a comparison, and where its page lies."""
    from convexhead.report import terminal_table

    page = Path(results["page"]).resolve()
    emit(
        {key: results[key] for key in ("dataset", "rows", "baseline", "methods", "page")},
        as_json,
        terminal_table(results),
        f"\nThe page: [bold]{escape(str(page))}[/]  (open it in any browser)",
    )
