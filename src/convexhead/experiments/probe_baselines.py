"""The probes of the field beside the heads: neighbours of the mean token, and an attentive probe trained by AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convexhead.baselines.attentive_probe import OPTIONS, AttentiveProbe, fit_attentive_probe
from convexhead.baselines.probes import NEIGHBOURS, neighbours, neighbours_mean
from convexhead.experiments.cells import network_scores
from convexhead.experiments.probe_data import ProbeData, Rows
from convexhead.experiments.probe_tasks import NUMBERS, positions
from convexhead.runtime.clock import now
from convexhead.runtime.run_folder import Piece, RunFolder
from convexhead.tokens.store.view import SplitView

Array = NDArray[Any]
EPOCHS, MOST_IN_BATCH, LEAST_IN_BATCH, BATCHES = 100, 256, 16, 8
"""Of the attentive probe: epochs, and images of a batch: an eighth of all, within these bounds. Chosen by hand: some
hundred steps on small data."""
OF_ALL = {"chosen_by": "all train images"}
"""How a smaller budget chose."""


@dataclass
class Baselines:
    """Trains them, and says what they say.

    Parameters
    ----------
    data : ProbeData
    folds : list of (train, test)
        Of the train images.
    folder : RunFolder
        Where trials of the attentive probe are kept.
    seed : int
    """

    data: ProbeData
    folds: list[tuple[Rows, Rows]]
    folder: RunFolder
    seed: int

    def fit(self, method: str, view: SplitView, chosen: Any, name: str) -> Piece:
        """Train one; ``chosen`` is what all train images chose, or None: choose."""
        return self._neighbours(view, chosen) if method == "k-nn" else self._attentive(view, chosen, name)

    def says(self, method: str, piece: Piece, train: SplitView, test: SplitView) -> tuple[Array, Array | None]:
        """What one says of ``test`` ``(n, c)``, and the classes ``(c,)`` of the columns where there are classes."""
        if method == "k-nn":
            return self._near(piece.record["chosen"], train, test)
        logits = network_scores(AttentiveProbe.restored(piece.tensors), test)
        return self.data.task.said(logits), positions(train.known)[2]

    # -- neighbours -------------------------------------------------------------------------------------------------
    def _neighbours(self, view: SplitView, k: int | None) -> Piece:
        began = now()
        if k is not None:
            y = view.known
            most = int(np.unique(y, return_counts=True)[1].min()) if y.ndim == 1 else len(y)
            return Piece({**OF_ALL, "chosen": min(k, most), "seconds": now() - began})
        least = min(len(train) for train, _ in self.folds)
        parts = [(view.subset(a), view.subset(b)) for a, b in self.folds]
        scores = {
            each: float(np.mean([self._score(*self._near(each, a, b), b.known) for a, b in parts]))
            for each in NEIGHBOURS
            if each <= least
        }
        k = max(scores, key=lambda each: (scores[each], -each))
        record = {"chosen_by": f"{len(self.folds)}-fold cross-validation", "cv_score": scores[k]}
        return Piece(record | {"chosen": k, "seconds": now() - began})

    def _near(self, k: int, train: SplitView, test: SplitView) -> tuple[Array, Array | None]:
        X, y, X_test = self.data.vectors(train), train.known, self.data.vectors(test)
        if y.ndim == 1:
            voting = neighbours(k).fit(X, y)
            return voting.predict_proba(X_test), voting.classes_
        return neighbours_mean(k).fit(X, y).predict(X_test), None

    def _score(self, said: Array, classes: Array | None, y: Array) -> float:
        if classes is None:
            return self.data.task.score(said, y)
        place = {label: k for k, label in enumerate(classes.tolist())}
        return self.data.task.score(said, np.array([place.get(label, -1) for label in y.tolist()]))  # −1: never right

    # -- the attentive probe ----------------------------------------------------------------------------------------
    def _attentive(self, view: SplitView, option: list[float] | None, name: str) -> Piece:
        began, seconds, record = now(), 0.0, dict(OF_ALL)
        if option is None:
            a, b = self.folds[0]
            kept, held = view.subset(a), view.subset(b)
            tried = {
                each: self.folder.once(
                    f"tried/{name}-lr{each[0]:g}-decay{each[1]:g}", partial(self._try, kept, held, each)
                )
                for each in OPTIONS
            }
            seconds = sum(piece.record["seconds"] for piece in tried.values())
            scores = {each: piece.record["score"] for each, piece in tried.items()}
            best = max(OPTIONS, key=lambda each: -np.inf if scores[each] is None else scores[each])
            option, record = list(best), {"chosen_by": "the first fold", "cv_score": scores[best]}
            began = now()
        weights = {key: value.detach().cpu() for key, value in self._trained(view, *option).state_dict().items()}
        return Piece(record | {"chosen": option, "seconds": seconds + now() - began}, weights)

    def _try(self, kept: SplitView, held: SplitView, option: tuple[float, float]) -> Piece:
        began = now()
        logits = network_scores(self._trained(kept, *option), held)
        score = None
        if np.isfinite(logits).all():
            score = self._score(self.data.task.said(logits), positions(kept.known)[2], held.known)
        return Piece({"score": score, "seconds": now() - began})

    def _trained(self, view: SplitView, lr: float, weight_decay: float) -> AttentiveProbe:
        targets, c, _ = positions(view.known)
        mean, sd = torch.zeros(c), torch.ones(c)
        if self.data.task.name == NUMBERS:  # its start and learning rates are for numbers of size 1
            mean, sd = targets.mean(0), targets.std(0, correction=0)
            sd = torch.where(sd > 0, sd, torch.ones(c))
            targets = (targets - mean) / sd
        size = max(LEAST_IN_BATCH, min(MOST_IN_BATCH, len(view) // BATCHES))
        probe, _ = fit_attentive_probe(
            view, targets, c, self.data.task.loss, lr=lr, weight_decay=weight_decay, epochs=EPOCHS, batch_size=size,
            seed=self.seed,
        )  # fmt: skip
        last = probe.classifier
        with torch.no_grad():
            last.weight *= sd.to(last.weight)[:, None]
            last.bias.copy_(last.bias * sd.to(last.bias) + mean.to(last.bias))
        return probe
