"""What ``convexhead probe`` does: from images, or a store, to a table of certified heads beside the field's probes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convexhead.errors import InputError, choose, require
from convexhead.experiments import leaderboard as board
from convexhead.experiments.probe_data import Budget, ProbeData, budgets_of, is_store, open_data
from convexhead.experiments.probe_fits import RATIOS, Fit, Fits, ProbeSettings
from convexhead.experiments.probe_outcomes import OUTCOMES
from convexhead.experiments.probe_rows import row_of
from convexhead.experiments.probe_tasks import BASELINES, lacking
from convexhead.experiments.query_settings import QuerySettings
from convexhead.experiments.results import write_csv
from convexhead.experiments.splits import backbone_of
from convexhead.program.heads import HEADS
from convexhead.runtime.hardware import environment
from convexhead.runtime.progress import Notify, silent, solver_detail
from convexhead.runtime.run_folder import RunFolder
from convexhead.runtime.trackers import tracking
from convexhead.tokens.store.files import make_folder, write_atomic, writer_lock
from convexhead.tokens.store.manifest import digest_json

Results = dict[str, Any]
REFERENCE = "linear"
"""The head that the paired tests are against. It is always trained."""
PROBED = ("linear", "self-attention", "mlp-mixer", "mlp")


def probe(
    images: str | Path,
    out: str | Path,
    *,
    heads: Sequence[str] = PROBED,
    baselines: Sequence[str] = BASELINES,
    cv: int = 3,
    beta_ratios: Sequence[float] = RATIOS,
    whiten: Sequence[float] = (0.0,),
    tol: float = 1e-3,
    n_queries: int = 192,
    query_scale: float = 2.0,
    query_position: bool = True,
    key_dim: int | None = None,
    query_norm: str = "all",
    shots: Sequence[int] = (),
    fractions: Sequence[float] = (),
    draws: int = 3,
    groups: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    leaderboard: str | Path | None = None,
    log: str | Path | None = None,
    notify: Notify = silent,
    command: Sequence[str] = (),
    **extraction: Any,
) -> Results:
    """Probe a frozen backbone on images: each head chosen on train by cross-validation, certified, tested once.

    The same call goes on where it was stopped. A call with other heads, budgets or settings uses what is there.

    Parameters
    ----------
    images : path or str
        A source of images with one class each, several, numbers or masks, see `convexhead.tokens.extract`; or a token
        store. Where there is no test split the val split is tested on, and where there is neither a fifth is held out.
    out : path
        Folder of tokens, trained heads, tables and page.
    heads, baselines : sequence of str
        The linear head is always one of them: the others are tested against it. Baselines: ``"k-nn"``,
        ``"attentive-probe"``. Methods that cannot do the task are left out, and ``left_out`` of the result says why.
    cv, beta_ratios, whiten, tol, seed, device
        See `ProbeSettings`; the device is for backbone and heads.
    n_queries, query_scale, query_position, key_dim, query_norm
        See `QuerySettings`.
    shots, fractions, draws : sequence of int, sequence of float, int
        Label efficiency: train on so many images of each class too, or on such shares of each or of all, at what all
        train images chose; ``draws`` random choices of each.
    groups : path or None
        Table of images that folds, held-out parts and smaller budgets keep together, see `read_groups`.
    leaderboard, log : path, str or None
        File to append a JSON line a row to; where a row of each fit goes (see `convexhead.runtime.trackers`).
    notify, command
        As for `compare_heads`.
    **extraction
        Of `extract`, such as ``backbone`` (``packaged:efficientnet-lite0``) and ``layer``; a constant channel is
        appended. Nothing for a store.

    Returns
    -------
    dict
        ``rows`` (see `convexhead.experiments.probe_rows`), what they are of, ``page``, and ``added``, the number of new
        lines of the leaderboard.
    """
    chosen = _methods(heads, baselines)
    budgets = budgets_of(shots, fractions, draws)
    queries = QuerySettings(n_queries, query_scale, query_position, key_dim, query_norm)
    queries.check_used(chosen)
    settings = ProbeSettings(cv, tuple(beta_ratios), tuple(whiten), tol, seed, queries)
    if leaderboard is not None:
        board.known_ids(Path(leaderboard))
    out = Path(out)
    folder = _folder(out)
    with tracking(log) as track:
        data = open_data(
            images, out, budgets, seed=seed, device=device, notify=notify, groups=groups, options=extraction
        )
        told = _Told(notify, track, command)
        return _run(Fits(data, settings, folder, device), chosen, budgets, draws, leaderboard, told)


class _Told(NamedTuple):
    """Who is told of a probe as it goes, and what the page tells to type to have it again."""

    notify: Notify
    track: Callable[[dict[str, Any]], None]
    command: Sequence[str]


def _run(
    fits: Fits,
    chosen: Sequence[str],
    budgets: Sequence[Budget],
    draws: int,
    leaderboard: str | Path | None,
    told: _Told,
) -> Results:
    """Make what the folder does not hold yet, and write tables and page."""
    out = fits.folder.path
    make_folder(out)
    with writer_lock(out):
        fits.folder.begin({"run": "probe"})
        results = _results(fits, chosen, budgets, told)
        results["settings"]["draws"] = draws
        added = 0 if leaderboard is None else board.append(Path(leaderboard), _entries(results, fits.data))
        _write(results, out)
    return results | {"page": str(out / "index.html"), "added": added}


def _folder(out: Path) -> RunFolder:
    require("jinja2", "report")
    require("matplotlib", "report")
    if is_store(out):
        raise InputError(f"{str(out)!r} is a token store: give it in place of the images, and another folder as out")
    folder = RunFolder(out)
    folder.check()
    return folder


def _results(fits: Fits, chosen: Sequence[str], budgets: Sequence[Budget], told: _Told) -> Results:
    data = fits.data
    lacks = lacking(data.task, data.train.lengths is not None, fits.settings.queries.query_position)
    rows = _rows(fits, [method for method in chosen if method not in lacks], budgets, told)
    return {
        "title": f"Probe of {backbone_of(data.store)}",
        "task": data.task.name,
        "score": OUTCOMES[data.task.name].score,
        "choice": data.task.choice,
        "dataset": _dataset(data),
        "settings": asdict(fits.settings),
        "reproduce": [list(told.command)] if told.command else [],
        "environment": environment(),
        "rows": rows,
        "left_out": {method: lacks[method] for method in chosen if method in lacks},
        "unseen": fits.unseen,
    }


def _methods(heads: Sequence[str], baselines: Sequence[str]) -> list[str]:
    named = [choose("head", head, HEADS) for head in heads] + [choose("baseline", b, BASELINES) for b in baselines]
    return list(dict.fromkeys([REFERENCE, *named]))


def _rows(fits: Fits, methods: Sequence[str], budgets: Sequence[Budget], told: _Told) -> list[dict[str, Any]]:
    """Every method on every budget; the test images are read when all are trained."""
    total, made = 2 * len(methods) * len(budgets), list[Fit]()
    of_all: dict[str, Fit] = {}
    for budget in budgets:
        for method in methods:
            what = method if budget.is_all else f"{method}, {budget.title}, draw {budget.draw + 1}"
            told.notify(what, len(made), total)

            def step(row: Any, what: str = what) -> None:
                told.notify(what, len(made), total, solver_detail(row))

            fit = fits.fit(method, budget, of_all.get(method), step)
            of_all.setdefault(method, fit)
            made.append(fit)
            told.track(_tracked(fit))
    rows = []
    said = {}
    for i, fit in enumerate(made):
        told.notify("test images", len(made) + i, total)
        said[fit.method, fit.budget] = fits.outcome(fit)
        rows.append(row_of(fit, said[fit.method, fit.budget], said[REFERENCE, fit.budget], fits.data, fits.settings))
    told.notify("done", total, total)
    return rows


def _tracked(fit: Fit) -> dict[str, Any]:
    """A finished fit as a row of a tracker."""
    record = fit.piece.record
    proof = record.get("certificate") or {}
    return {
        "method": fit.method,
        "budget": fit.budget.title,
        "draw": None if fit.budget.is_all else fit.budget.draw,
        "objective": proof.get("primal"),
        "relative_gap": proof.get("relative_gap"),
        "heads": record.get("heads"),
        "cv_score": record.get("cv_score"),
        "seconds": record["seconds"],
    }


def _dataset(data: ProbeData) -> dict[str, Any]:
    n, s, d = data.train.shape
    manifest = data.store.manifest
    return {
        "name": manifest.source,
        "train": n,
        "test": len(data.test),
        "test_is": data.test_is,
        "classes": len(data.store.class_names),
        "groups": None if data.groups is None else len(np.unique(data.groups)),
        "grouping": data.grouping,
        "test_groups": None if data.test_groups is None else len(np.unique(data.test_groups)),
        "tokens": s,
        "tokens_differ": data.train.lengths is not None,
        "channels": d,
        "backbone": backbone_of(data.store),
        "weights": manifest.config["weights"],
        "store": manifest.config_hash,
        "train_identity": data.train.identity,
        "test_identity": data.test.identity,
    }


def _entries(results: Results, data: ProbeData) -> list[dict[str, Any]]:
    """The lines of the leaderboard: each has everything that it takes to run it again."""
    about = {key: results[key] for key in ("task", "dataset", "settings", "environment")}
    about["command"] = results["reproduce"][0] if results["reproduce"] else None
    about["extraction"] = data.store.manifest.config | {"reduction": data.store.reduction.options}
    about["reduction_sha256"] = data.train.reduction.identity if data.train.reduction else None
    entries = []
    for row in results["rows"]:
        facts = {key: value for key, value in row.items() if key not in ("seconds", "run")}
        entries.append({"id": digest_json({"row": facts, "dataset": results["dataset"]})[:16], **row, **about})
    return entries


def _write(results: Results, out: Path) -> None:
    from convexhead.report import probe_page

    write_atomic(out / "table.json", json.dumps(results, indent=1).encode())
    write_csv([probe_page.csv_row(row) | results["environment"] for row in results["rows"]], out / "table.csv")
    write_csv(probe_page.class_rows(results), out / "classes.csv")
    write_atomic(out / "table.md", probe_page.markdown(results).encode())
    write_atomic(out / "index.html", probe_page.render(results).encode())
