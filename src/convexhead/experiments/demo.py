"""The main job on the embedded default: digits through a frozen EfficientNet-Lite0, every head, one page."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convexhead.errors import require
from convexhead.experiments.comparison import Notify, Settings, compare, splits_of_store
from convexhead.interpret import token_contributions

BACKBONE, SOURCE = "packaged:efficientnet-lite0", "sklearn:digits"
EXTRACTION = {
    # An inner block: later ones pool linearly what attention could have used. At 80 px it has 5 x 5 tokens.
    "layer": 4,
    "image_size": 80,
    "crop_pct": 1.0,
    "channels": 23,
    "reduce": "pca",
    "constant": True,
}
DEMO = Settings(
    beta_ratios=(0.1, 0.03, 0.01, 0.003),
    n_gates=4,
    patience=1,
)
N_MAPS = 12


def run_demo(out: Path, *, settings: Settings | None = None, notify: Notify | None = None) -> dict[str, Any]:
    """Extract, compare, and write the page; a second run reuses the tokens.

    Returns
    -------
    dict
        The results, with the path of the page as ``"page"``.
    """
    require("jinja2", "report")
    require("matplotlib", "report")
    from convexhead.tokens import extract, open_source

    say = notify or (lambda what, done, total: None)
    source = open_source(SOURCE)
    store = extract(
        source,
        BACKBONE,
        out / "tokens",
        progress=lambda p: say(f"tokens, {p.images_per_second:.0f} images/s", p.done, p.total),
        **EXTRACTION,  # type: ignore[arg-type]
    )
    settings = settings or DEMO
    splits = splits_of_store(store, settings)
    results = compare(splits, settings, title="Handwritten digits, every head", notify=notify)
    results["dataset"]["name"] = "scikit-learn digits"
    results["reproduce"] = ["make demo", f"convexhead demo --out {out.name}"]
    results["attention"] = attention_gallery(
        results, splits.grid, splits.class_names, splits.test_files, lambda i: source.load("test", i)
    )
    write_results(results, out)
    return results


def attention_gallery(
    results: dict[str, Any],
    grid: tuple[int, int],
    class_names: list[str],
    files: list[str],
    load: Callable[[int], Any],
) -> dict[str, Any] | None:
    """Maps of the linear self-attention head over the first test images of each class."""
    model = results["models"].get(("self-attention", "linear"))
    if model is None:
        return None
    X, y = results["test"]
    per_class = max(1, N_MAPS // len(class_names))
    picked = [i for c in np.unique(y) for i in np.flatnonzero(y == c)[:per_class]][:N_MAPS]
    contributions = token_contributions(model, X[picked]).numpy()
    predicted = model.predict(X[picked])
    images = []
    for row, i in enumerate(picked):
        column = int(np.flatnonzero(model.classes_ == predicted[row])[0])
        images.append(
            {
                "png": _png(load(int(i))),
                "label": class_names[int(y[i])],
                "predicted": class_names[int(predicted[row])],
                "map": contributions[row, :, column].reshape(grid).tolist(),
                "file": files[i],
            }
        )
    return {"images": images, "grid": list(grid)}


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_results(results: dict[str, Any], out: Path) -> None:
    """``results.json``, ``table.md``, ``table.csv``, ``figures/`` and ``index.html``; models under ``models/``."""
    from convexhead.report import csv_rows, figures, markdown_table, render

    out.mkdir(parents=True, exist_ok=True)
    models = results.pop("models")
    results.pop("test")
    for (head, activation), model in models.items():
        model.save(out / "models" / f"{head}-{activation}")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "table.md").write_text(markdown_table(results))
    rows = csv_rows(results)
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    drawn = [figures.excess, figures.convergence, figures.spectra, figures.path]
    if results["attention"]:
        drawn.append(figures.attention_maps)
    for draw in drawn:
        figures.save(draw(results), folder / draw.__name__.replace("_", "-"))
    page = out / "index.html"
    page.write_text(render(results))
    results["page"] = str(page)
