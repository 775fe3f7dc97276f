"""The published experiment: every head, convex and non-convex, on frozen tokens of CIFAR-100.

Sahiner et al. (ICML 2022) train self-attention, MLP-Mixer, FNO, block-FNO, MLP and linear heads on the tokens of a
frozen gMLP-S/16, 100 classes, 50 gates. Here every convex head comes with a certificate, every non-convex one with its
spread over seeds and with what tuning it cost, and nothing is chosen on test images.

    images -> tokens -> [ path over β -> Adam at that β ] for every cell, probes -> test images, once -> page
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convexhead.errors import InputError, choose, require
from convexhead.experiments.cells import AdamSettings, Cell, PathSettings
from convexhead.experiments.comparison import run
from convexhead.experiments.results import write_results
from convexhead.experiments.rows import Results
from convexhead.experiments.splits import Subset, TokenChoice, check_test_split, chosen_splits
from convexhead.experiments.training import Settings, cells_of
from convexhead.program.heads import HEADS
from convexhead.runtime.progress import Notify, silent
from convexhead.runtime.run_folder import RunFolder
from convexhead.runtime.trackers import tracking
from convexhead.tokens import TokenStore, extract, open_source
from convexhead.tokens.backbones.base import Layer
from convexhead.tokens.progress import told_to

BACKBONE = "timm:gmlp_s16_224.ra3_in1k"
"""Backbone of the publication."""
PRIORITY = ("self-attention", "mlp", "linear", "fno", "mlp-mixer", "block-fno")
"""Order in which heads are trained: a long run that is stopped early has the most informative ones."""
ON_REQUEST = (Cell("attentive", "linear"),)
"""Cells of no scale: they are trained after the others where their head is named."""
SIZES = (2, 8, 32, 128, 500)
"""Numbers of train images of a class (held-out ones included) at which the main heads are compared."""
MAIN = (Cell("self-attention", "linear"), Cell("mlp", "linear"), Cell("linear", "linear"))


@dataclass(frozen=True)
class Scale:
    """How much of CIFAR-100 is used, and how each cell is trained on it."""

    images: TokenChoice
    cells: tuple[Cell, ...]
    path: PathSettings
    adam: AdamSettings
    jobs: int


LINEAR = cells_of(PRIORITY, ["linear"])
GATED = cells_of(PRIORITY, ["gated-relu"])
RELU = cells_of(PRIORITY, ["relu"])
RATIOS = (0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001)
ADAM = AdamSettings(
    spare_heads=20,
    learning_rates=(0.001, 0.003, 0.01, 0.03, 0.1),
    chosen_by="validation",
    epochs=100,
    batch_size=128,
)
SCALES = {
    "2k": Scale(
        TokenChoice(classes=20, train=80, test=20, token_pool=7, channels=64),
        cells=(*LINEAR, *GATED),
        path=PathSettings(RATIOS, patience=1, n_gates=4),
        adam=ADAM,
        jobs=2,
    ),
    "10k": Scale(
        TokenChoice(train=80, test=20, token_pool=7, channels=100),
        cells=(*LINEAR, *cells_of(("self-attention", "mlp", "fno"), ["gated-relu"])),
        path=PathSettings(RATIOS, patience=1, n_gates=8),
        adam=ADAM,
        jobs=2,
    ),
    "full": Scale(
        TokenChoice(validation=0.1, token_pool=7, channels=100),
        cells=tuple(LINEAR),
        path=PathSettings(RATIOS, patience=1, n_gates=50, tol=5e-3),
        adam=replace(ADAM, epochs=30, batch_size=256),
        jobs=1,
    ),
}


def run_cifar100(
    out: Path,
    *,
    images: str | None = None,
    backbone: str = BACKBONE,
    layer: Layer = None,
    image_size: int | None = None,
    tokens: Path | None = None,
    scale: str = "full",
    every_cell: bool = False,
    heads: tuple[str, ...] = (),
    activations: tuple[str, ...] = (),
    token_pool: int | None = None,
    channels: int | None = None,
    n_gates: int | None = None,
    epochs: int | None = None,
    tuning_seeds: int | None = None,
    sizes: bool = False,
    jobs: int | None = None,
    log: str | Path | None = None,
    notify: Notify = silent,
    command: Sequence[str] = (),
) -> Results:
    """Run the experiment into the folder ``out``, or go on with it, and write tables, figures and the page.

    Parameters
    ----------
    images, backbone, layer, image_size
        An image source, and what makes tokens of it, as for `convexhead.tokens.extract`; kept in ``out/tokens``.
    tokens : Path or None
        A token store to use instead of images.
    scale : {"full", "10k", "2k"}
        50,000 + 10,000 images; 80 + 20 of each class; 80 + 20 of each of the first 20 classes.
    every_cell : bool
        Every head with every activation, and for Adam each learning rate with each seed and 5, 20 and 50 atoms;
        by AdamW too, with the number of atoms that validation prefers.
    heads, activations
        Cells to keep; none: the scale's own.
    token_pool, channels, n_gates, epochs, tuning_seeds
        Instead of the scale's own. Each learning rate is tried with `tuning_seeds` of Adam's seeds.
    sizes : bool
        Also train the main heads on fewer images.
    jobs : int or None
        Cells trained at a time.
    log : str, path or None
        Where a row of each training goes (see `convexhead.runtime.trackers`), when it is finished. A run that goes on
        writes those of before, too.
    notify : callable
        Told of progress, see `convexhead.runtime.progress`.
    command : sequence of str
        What the page tells to type to have it again.

    Raises
    ------
    InputError, FileFormatError, StoreWriteError, HubError, MissingExtraError
        One line that says what to do.
    """
    require("jinja2", "report")
    require("matplotlib", "report")
    chosen = SCALES[choose("scale", scale, SCALES)]
    choice = replace(chosen.images, **_given(token_pool=token_pool, channels=channels))
    adam = _given(epochs=epochs, tuning_seeds=tuning_seeds)
    settings = _settings(chosen, every_cell, heads, activations, _given(n_gates=n_gates), adam)

    RunFolder(out).check()
    with tracking(log) as track:
        store = _open_tokens(out, images, backbone, layer, image_size, tokens, choice, notify)
        splits = chosen_splits(store, choice)
        if not splits.train.has_class_tokens:
            settings = replace(settings, probes=tuple(name for name in settings.probes if name != "class-token"))
        how: dict[str, Any] = {"jobs": jobs or chosen.jobs, "notify": notify, "track": track}
        results = run(splits, settings, out, title="CIFAR-100, every head", **how)
        if sizes:
            results["sizes"] = _sizes(store, choice, settings, out, how)
    results["dataset"]["name"] = f"CIFAR-100 ({scale})"
    results["settings"] |= {"scale": scale, "every_cell": every_cell, "tokens": asdict(choice)}
    results["reproduce"] = [list(command)] if command else []
    write_results(results, out)
    return results


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _settings(
    scale: Scale,
    every_cell: bool,
    heads: tuple[str, ...],
    activations: tuple[str, ...],
    path: dict[str, Any],
    adam: dict[str, Any],
) -> Settings:
    """Cells, probes and how they are trained."""
    cells, tuning = scale.cells, scale.adam
    if every_cell:
        grouped = [Cell("block-fno", activation, "grouped") for activation in ("linear", "gated-relu", "relu")]
        cells = (*LINEAR, *GATED, *RELU, *grouped)
        tuning = replace(tuning, heads=(5, 20, 50), tuning_seeds=len(tuning.seeds), adamw=True)
    tuning = replace(tuning, **adam)
    if not 1 <= tuning.tuning_seeds <= len(tuning.seeds):
        raise InputError(f"tuning_seeds must be 1 to {len(tuning.seeds)} (Adam's seeds), got {tuning.tuning_seeds}")
    for head in heads:
        choose("head", head, HEADS)
    for activation in activations:
        choose("activation", activation, ("linear", "gated-relu", "relu"))
    wanted = (*LINEAR, *GATED, *RELU) if activations and not every_cell else cells
    wanted = (*wanted, *(cell for cell in ON_REQUEST if cell.head in heads))
    cells = tuple(
        cell
        for cell in wanted
        if cell.head in (heads or HEADS) and cell.activation in (activations or (cell.activation,))
    )
    if not cells:
        raise InputError("no head is left with these --heads and --activations")
    probes = ("mean-token", "class-token", "k-nn", "attentive-probe")
    return Settings(cells, probes, replace(scale.path, **path), tuning)


def _open_tokens(
    out: Path,
    images: str | None,
    backbone: str,
    layer: Layer,
    image_size: int | None,
    tokens: Path | None,
    choice: TokenChoice,
    notify: Notify,
) -> TokenStore:
    """The store that was given, or that of the chosen images, extracted as far as it is not there."""
    if tokens is not None:
        if images is not None:
            raise InputError("give either --images or --tokens")
        store = TokenStore.open(tokens)
        check_test_split(store)
        return store
    if images is None:
        raise InputError("give --images (a folder with train/ and test/, or torchvision:CIFAR100), or --tokens")
    source = open_source(images)
    if "test" not in source.splits:
        raise InputError(f"{images} has no test images: it needs train/ and test/ beside each other")
    wanted: dict[str, int | None] = {"train": choice.train, "test": choice.test}
    return extract(
        Subset(source, classes=choice.classes, per_class=wanted, seed=choice.seed),
        backbone,
        out / "tokens",
        layer=layer,
        image_size=image_size,
        # 32 pixels have no margin to cut off; raw patches take the image as it is.
        crop_pct=None if backbone.startswith("patches:") else 1.0,
        progress=told_to(notify),
    )


def _sizes(
    store: TokenStore, choice: TokenChoice, settings: Settings, out: Path, how: dict[str, Any]
) -> list[dict[str, Any]]:
    """The main heads and the linear probe on few images of each class, each size a run of its own."""
    available = int(np.unique(store["train"].labels, return_counts=True)[1].min())
    largest = min(choice.train or available, available)
    fewer = replace(settings, cells=MAIN, probes=("mean-token", "attentive-probe"))
    curve = []
    for size in sorted({min(size, largest) for size in SIZES}):
        some = replace(choice, train=size, validation=max(choice.validation, 1 / size))
        results = run(chosen_splits(store, some), fewer, out / "sizes" / str(size), title=f"{size} a class", **how)
        curve.append({"images_per_class": size, "methods": results["methods"]})
    return curve
