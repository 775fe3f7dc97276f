"""Every head on the same tokens: certified, tuned on a validation split, beside Adam's runs of it and probes.

1. Every cell (`cells`) and every probe (`probes`) is trained and tuned without the test images.
2. At the very end these are read, once, and everything that was chosen is scored on them.

Each piece of work is kept in the run's folder, from which the same command goes on.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from convexhead.baselines.probes import fit_probe, probe_scores
from convexhead.experiments.cells import network_scores, restore_network, top
from convexhead.experiments.piece_log import PieceLog, Track
from convexhead.experiments.rows import Results, results_of
from convexhead.experiments.splits import Splits
from convexhead.experiments.training import Settings, Trained, train_cell, train_in_processes
from convexhead.experiments.tuning import Tuned
from convexhead.persistence import load
from convexhead.runtime.progress import Notify, silent
from convexhead.runtime.run_folder import Piece, RunFolder
from convexhead.tokens.store.files import make_folder, writer_lock


def run(
    splits: Splits,
    settings: Settings,
    out: Path,
    *,
    title: str,
    jobs: int = 1,
    notify: Notify = silent,
    track: Track = lambda row: None,
) -> Results:
    """Run everything that ``out`` does not hold yet, and return the results as `convexhead.report` takes them.

    Parameters
    ----------
    splits : Splits
    settings : Settings
    out : Path
        Folder of the run; see `convexhead.runtime.run_folder`.
    title : str
        Of the page.
    jobs : int
        Cells trained at a time, in processes that share the cores; seconds are then those of the processor.
    notify : callable
        Told of progress, see `convexhead.runtime.progress`.
    track : callable (row)
        Told of every finished training, see `convexhead.experiments.piece_log`.

    Raises
    ------
    FileFormatError
        ``out`` holds something else, or a run with other settings.
    StoreWriteError
        ``out`` cannot be written, or another process is writing it.
    """
    total = settings.pieces()

    def tell(what: str) -> None:
        notify(what, folder.count(), total)
        log.update()

    folder = RunFolder(out, tell)
    log = PieceLog(folder, track, title)
    make_folder(out)
    with writer_lock(out):
        folder.begin({**asdict(settings), "images": splits.name, "data": splits.identity})
        tell("training")
        if jobs > 1:
            train_in_processes(splits, settings, folder, jobs, lambda: tell("training"))
        probes = {name: fit_probe(name, splits, settings.adam, folder) for name in settings.probes}
        trained = [train_cell(splits, settings, folder, cell) for cell in settings.cells]
        tell("test images")
        test = folder.once("test", lambda: score_test(splits, folder, probes, trained))
        notify("done", total, total)
    clock = "wall" if jobs == 1 else f"processor, {jobs} cells at a time"
    return results_of(splits, settings, probes, trained, test.record, title, clock)


def score_test(splits: Splits, folder: RunFolder, probes: dict[str, Tuned], trained: list[Trained]) -> Piece:
    """Read the test images and score everything that was chosen: ``{name of the piece: [top-1, top-5]}``."""
    test = splits.load_test()
    classes = np.unique(splits.train.labels)
    scores: dict[str, list[float | None]] = {"images": [len(test.labels)]}

    def keep(name: str, outputs: Any) -> None:
        top1 = top(outputs, classes, test.labels)
        scores[name] = [top1, top(outputs, classes, test.labels, 5) if len(classes) > 5 else None]

    for probe, tuned in probes.items():
        for piece in tuned.runs:
            keep(piece.name, probe_scores(probe, piece, splits.train, test))
    for each in trained:
        model = load(folder.model(each.cell.name))
        keep(each.path.name, model.predict_proba(test.tokens))
        for adam in each.adam:
            for piece in adam.tuned.runs:
                keep(piece.name, network_scores(restore_network(model, piece.tensors), test.tokens))
    return Piece(scores)
