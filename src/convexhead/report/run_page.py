"""``convexhead report``: one self-contained HTML page about one or several runs."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexhead.errors import InputError, require
from convexhead.report import drawing, run_figures
from convexhead.report.gallery import BUDGET, clusters, gallery, strongest_queries
from convexhead.report.page import environment, inline_svg
from convexhead.report.pictures import thumbnails
from convexhead.report.runs import distances_in_words, read_run
from convexhead.report.tables import gap as gap_in_words
from convexhead.tokens.store.files import make_folder, write_atomic
from convexhead.tokens.store.store import TokenStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Figures:
    """Draws the figures of a page: inline in it, and each as files in a folder where one is given."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.count = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, caption: str, figure: Figure, words: str) -> dict[str, Any]:
        """``svg`` for the page with ``words`` for those who cannot see it, and its numbers as a data URI."""
        self.count += 1
        # Before `save`, which lays the figure out again: the page is the same with and without a folder.
        drawn = inline_svg(figure, f"f{self.count}-", words)
        numbers = json.dumps(drawing.numbers(figure)).encode()
        if self.folder is not None:
            drawing.save(figure, self.folder / name)
        return {
            "name": name,
            "caption": caption,
            "svg": require("markupsafe", "report").Markup(drawn),
            "numbers": f"data:application/json;base64,{base64.b64encode(numbers).decode()}",
        }


def render_runs(
    folders: Sequence[Path],
    *,
    store: TokenStore | None = None,
    images: str | None = None,
    size: int = 64,
    figure_folder: Path | None = None,
) -> str:
    """The page as text; the same runs give the same text, byte for byte.

    Parameters
    ----------
    folders : sequence of Path
        Runs of `convexhead fit`, `path` or `adam`.
    store : TokenStore or None
        Scores all runs anew, for models that were saved without evidence, or on another store.
    images : str or None
        Where the images are, if not where they were when the tokens were extracted.
    size : int
        Images of each gallery at most.
    figure_folder : Path or None
        Where every figure is written as SVG, PDF and PNG, with a JSON of its numbers beside it.

    Raises
    ------
    InputError, FileFormatError
        See `runs.read_run`.
    """
    if not folders:
        raise InputError("give at least one run")
    if size < 1:
        raise InputError(f"a gallery must show at least 1 image, got {size}")
    template = environment().get_template("run.html")
    draw = Figures(figure_folder)
    runs = []
    for i, folder in enumerate(folders):
        run, model, evidence = read_run(Path(folder), store, images)
        run["id"] = f"run-{i + 1}"
        run["chosen_step"] = _nearest([step["beta_ratio"] for step in run["path"]], run["beta_ratio"])
        run["gallery"], run["clusters"], run["pictures"], run["missing"] = None, None, {}, ""
        if run["scores"] is not None and evidence is not None:
            run["gallery"] = gallery(model, evidence, size=size, budget=BUDGET // len(folders))
            run["clusters"] = clusters(model, evidence, size=size)
            run["gallery"]["clusters"] = {key: run["clusters"][key] for key in ("head", "raw", "n")}
            run["pictures"], run["missing"] = thumbnails(evidence.about, images)
            if model.head == "attentive" and model.n_heads_:
                run["queries"] = strongest_queries(model, evidence)
        runs.append(run)
    _tell_apart(runs)
    _number_problems(runs)
    distances_in_words(runs)
    for run in runs:
        run["figures"] = _figures(run, draw)
    return template.render(runs=runs, comparison=_comparison(runs, draw) if len(runs) > 1 else None)


def _tell_apart(runs: list[dict[str, Any]]) -> None:
    """Folders of the same name get numbers."""
    names = [run["name"] for run in runs]
    for i, run in enumerate(runs):
        if names.count(run["name"]) > 1:
            run["name"] = f"{run['name']} ({i + 1})"


def _number_problems(runs: list[dict[str, Any]]) -> None:
    """Runs get the same number as ``problem`` if they are of one problem at one β; None where a run does not say."""
    met: list[tuple[Any, Any]] = []
    for run in runs:
        problem = (run["certificate"]["identity"], run["certificate"]["beta"])
        if problem[0] is not None and problem not in met:
            met.append(problem)
        run["problem"] = None if problem[0] is None else met.index(problem) + 1


def _figures(run: dict[str, Any], draw: Figures) -> dict[str, Any]:
    """Every figure of one run, in groups that the template names."""
    own, gap = run["id"], gap_in_words(run["certificate"])
    made: dict[str, Any] = {
        "curves": [],
        "spectra": [],
        "along": [],
        "lift": None,
        "confusion": None,
    }
    if run["history"]:
        first, last = run["history"][0]["objective"], run["history"][-1]["objective"]
        made["curves"] = [
            draw.add(
                f"{own}-objective",
                "Objective against seconds; dotted: the certified lower bound",
                run_figures.objective([run]),
                f"The objective falls from {first:.4g} to {last:.4g}; lower bound {run['certificate']['dual']:.4g}.",
            ),
            draw.add(
                f"{own}-gap",
                "Relative gap as the solver estimates it; diamond: certified at the end",
                run_figures.gap([run]),
                f"The relative gap over time; at the end: {gap}.",
            ),
        ]
    steps = run["path"] or [run]
    for axis in run["spectra"]:
        series = [(_beta(step["beta_ratio"]), step["spectra"][axis]) for step in steps]
        ranks = ", ".join(
            f"{step['effective_ranks'][axis]:.1f} at β/β_max {_beta(step['beta_ratio'])}" for step in steps
        )
        made["spectra"].append(
            draw.add(
                f"{own}-spectrum-{axis.replace(' ', '-')}",
                "Singular values of Z" if axis == "Z" else f"Singular values along {axis}",
                run_figures.spectrum(axis, series, along_beta=True),
                f"Singular values, {axis}. Effective rank: {ranks}.",
            )
        )
    if run["path"]:
        made["along"] = [
            draw.add(f"{own}-ranks", "Effective rank along β", run_figures.ranks(run), "See the table of β below."),
            draw.add(f"{own}-scores", "Accuracy along β", run_figures.scores_along(run), "See the table of β below."),
        ]
    if run.get("lift"):
        made["lift"] = draw.add(
            f"{own}-lift",
            "How much each head lifts the logit of each class where it is the true one (red), against (blue)",
            run_figures.lift(run),
            f"A matrix of {len(run['lift'])} heads by {len(run['classes'])} classes; "
            "the table of heads names the classes that each serves most.",
        )
    if "confusion" in run:
        made["confusion"] = draw.add(
            f"{own}-confusion",
            "Share of each true class (row) that is predicted as each class (column)",
            run_figures.confusion(run),
            f"Confusion matrix of {len(run['classes'])} classes; see the table beside it.",
        )
    made["positions"] = _positions(run, draw)
    return made


def _positions(run: dict[str, Any], draw: Figures) -> dict[str, Any] | None:
    """What the head does to positions, if it is one that can be drawn."""
    own = run["id"]
    if "mixing_matrix" in run:
        return draw.add(
            f"{own}-mixing",
            "Left: how strongly each token (column) feeds each token (row); right: all that a token feeds, on the grid",
            run_figures.mixing(run),
            "Token-to-token weights of the Mixer.",
        )
    if "filters" in run and run["n_heads"]:
        return draw.add(
            f"{own}-filters",
            "Filters of the strongest heads: above at every shift, below at every frequency (zero in the middle)",
            run_figures.filters(run),
            "Strength of the filters over channels, in both domains.",
        )
    if run["queries"]:
        told = run["queries"]
        shares = zip(told["queries"], told["shares"], strict=True)
        return draw.add(
            f"{own}-queries",
            "Weights of the patches: a row for an image of each of a few classes, a column for each of these queries",
            run_figures.queries(run),
            "Shares of the queries: " + ", ".join(f"{j} {drawing.percent(round(share, 3))}" for j, share in shares),
        )
    return None


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    tokens: Path | None = None,
    images: str | None = None,
    size: int = 64,
    figure_folder: Path | None = None,
) -> None:
    """Write the page of `render_runs` into the file ``out``; ``tokens`` is the folder of its store."""
    require("jinja2", "report")
    require("matplotlib", "report")
    store = None if tokens is None else TokenStore.open(tokens)
    page = render_runs(folders, store=store, images=images, size=size, figure_folder=figure_folder)
    make_folder(out.parent)
    write_atomic(out, page.encode())


def _comparison(runs: list[dict[str, Any]], draw: Figures) -> list[dict[str, Any]]:
    """Figures of all runs together."""
    trained = [run for run in runs if run["history"]]
    made = []
    for number in sorted({run["problem"] for run in trained} - {None}):
        same = [run for run in trained if run["problem"] == number]
        if len(same) > 1:  # objectives and bounds of different problems have nothing to do with each other
            names = ", ".join(f"{run['name']} ends at {run['certificate']['primal']:.5g}" for run in same)
            caption = f"Objective against seconds, problem {number}"
            made.append(draw.add(f"objectives-{number}", caption, run_figures.objective(same), f"{names}."))
    if trained:
        made.append(draw.add("gaps", "Relative gap against seconds", run_figures.gap(trained), "See the table above."))
    for axis in [name for name in runs[0]["spectra"] if all(name in run["spectra"] for run in runs)]:
        made.append(
            draw.add(
                f"spectra-{axis.replace(' ', '-')}",
                "Singular values of Z" if axis == "Z" else f"Singular values along {axis}",
                run_figures.spectrum(axis, [(run["name"], run["spectra"][axis]) for run in runs], along_beta=False),
                "Effective rank: "
                + ", ".join(f"{run['name']} {run['effective_ranks'][axis]:.1f}" for run in runs)
                + ".",
            )
        )
    return made


def _nearest(ratios: list[float], ratio: float | None) -> int:
    """The step of the path that the model is from."""
    return min(range(len(ratios)), key=lambda i: abs(ratios[i] - (ratio or 0.0)), default=0)


def _beta(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3g}"
