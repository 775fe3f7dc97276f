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
    from convexhead.audit import Audit
    from convexhead.certificate.certificate import Certificate
    from convexhead.tokens import TokenStore

LACKS = 1.01
"""Reward of a query, in units of its price, above which it is said to be missing. Chosen by hand."""

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


def several_processes() -> bool:
    """Whether torchrun started more processes than this one."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def gaps_are_shown() -> Iterator[None]:
    """A gap that was not reached stands in what is printed: no warning says it again."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def certificate_line(certificate: Certificate) -> str:
    """The certificate of a fit in words, and first of all whether it has the gap that was asked for."""
    mark = "[green]certified[/]"
    if certificate.scope == "estimated":
        mark = "[yellow]estimated[/]"
    elif not certificate.converged:
        asked = "" if certificate.tol is None else f" above the {100 * certificate.tol:.2g}% that was asked for"
        mark = f"[yellow]stopped early,{asked}[/]"
    return f"{mark}: {certificate}"


def audit_lines(audit: Audit, whose: str) -> list[str]:
    """What is proven from the weights alone, and the distance from a certified optimum, in words of their own.

    Parameters
    ----------
    whose : str
        Where the certified optimum comes from.
    """
    certificate, lines = audit.certificate, []
    if audit.told is not None:
        lines.append(f"audited: {escape(audit.told)}")
    if audit.reference is not None and audit.distance is not None:
        least, most = (f"{100 * share:.2g}%" for share in audit.distance)
        far = f"at most {most}" if least == "0%" else most if least == most else f"{least} to {most}"
        mark = "[green]at the optimum[/]" if certificate.converged else "[yellow]above the optimum[/]"
        lines.append(
            f"{mark}: of the objective {certificate.primal:.6g}, {far} lies above it; the certified optimum {whose} is "
            f"{audit.reference.primal:.6g}, the lower bound {certificate.dual:.6g}"
        )
    if audit.proven is not None:
        proven = audit.proven
        mark = "[green]certified[/]" if proven.converged else "proven from these weights alone"
        lines.append(f"{mark}: {proven}")
        if audit.reference is None and not proven.converged and proven.scope != "estimated":
            lines.append(
                "the true distance may be far smaller: this bound is loose for weights away from the optimum; "
                "fit the same problem and give that run with --reference to know it"
            )
    if audit.missing is not None:
        reward = audit.missing.reward
        lines.append(
            f"it lacks a query: one of its length is rewarded {reward:.3g} times its price"
            if reward > LACKS
            else f"no query of its length that a search found would lower the objective (the best: {reward:.3g})"
        )
    return lines


def show_store(store: TokenStore, as_json: bool, *lines: str) -> None:
    """What a store holds, and ``lines`` below it."""
    info = store.info()
    counts = ", ".join(f"{count} {split}" for split, count in info["images"].items())
    emit(
        info,
        as_json,
        f"[bold]{escape(info['path'])}[/]: {counts} images, {info['classes']} classes, "
        f"{'up to ' * info['lengths']}{info['tokens']} tokens x {info['channels']} channels, "
        f"{info['bytes'] / 1e6:.1f} MB",
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
