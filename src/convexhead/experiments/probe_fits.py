"""The fits of a probe: each method on each budget of train images, chosen by cross-validation on all of them.

=====================  =============================================================================================
method                 what is chosen, on the same stratified folds of the train images
=====================  =============================================================================================
a head                 ``β/β_max`` and the metric of the tokens, by the mean accuracy over the folds
                       (`ConvexHeadClassifierCV`)
``k-nn``               ``k``, by the same; neighbours of the mean token by cosine, weighted by distance
``attentive-probe``    learning rate and weight decay, by the accuracy on the first fold alone, for it is dear
=====================  =============================================================================================

Then each is trained on all train images. A smaller budget takes over what all images chose, and k is at most the
images of a class. Every fit is a piece in the run's folder, and its name holds a hash of its data and
settings: the same fit is never made twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning

from convexhead.baselines.attentive_probe import OPTIONS, AttentiveProbe, fit_attentive_probe
from convexhead.baselines.probes import NEIGHBOURS, neighbours
from convexhead.errors import InputError
from convexhead.estimators import ConvexHeadClassifier
from convexhead.estimators_cv import ConvexHeadClassifierCV
from convexhead.experiments.cells import network_scores, top
from convexhead.experiments.probe_data import Budget, ProbeData
from convexhead.experiments.query_settings import QuerySettings
from convexhead.experiments.run_folder import Piece, RunFolder
from convexhead.experiments.splits import Part
from convexhead.metrics import Predictions
from convexhead.persistence import load
from convexhead.runtime.clock import now
from convexhead.tokens.fit_reduction import check_whiten
from convexhead.tokens.store.fit import whitened
from convexhead.tokens.store.manifest import digest_json
from convexhead.tokens.store.view import SplitView

BASELINES = ("k-nn", "attentive-probe")
EPOCHS, MOST_IN_BATCH, LEAST_IN_BATCH, BATCHES = 100, 256, 16, 8
"""Of the attentive probe: epochs, and images of a batch: an eighth of all, within these bounds. Chosen by hand: some
hundred steps on small data."""

Told = Callable[[Any], None]


RATIOS = (0.3, 0.1, 0.03, 0.01)
"""The grid of ``β/β_max``. Chosen by hand: a factor of 3 changes accuracy little, and each value costs a fit a fold."""


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe trains; everything that a fit depends on beside its images.

    Attributes
    ----------
    cv : int
        Folds.
    beta_ratios : tuple of float
        The grid of ``β/β_max``, which goes on where the best lies at its edge.
    whiten : tuple of float
        Metrics of the tokens to choose from, see `convexhead.tokens.whitened`; each costs all the fits of one.
    tol : float
        Certified relative gap.
    seed : int
        Of folds, held-out images, smaller budgets, random starts and bootstrap.
    queries : QuerySettings
        Of the attentive head.
    """

    cv: int = 3
    beta_ratios: tuple[float, ...] = RATIOS
    whiten: tuple[float, ...] = (0.0,)
    tol: float = 1e-3
    seed: int = 0
    queries: QuerySettings = field(default_factory=QuerySettings)

    def __post_init__(self) -> None:
        if not self.whiten:
            raise InputError("whiten=() names no metric to choose from: give 0 for the tokens as they are")
        for each in self.whiten:
            check_whiten(each)


@dataclass
class Fit:
    """A trained method.

    Attributes
    ----------
    method : str
        A head, or one of `BASELINES`.
    budget : Budget
    rows : int array
        Its images among the train images.
    piece : Piece
        Whose record says what was chosen.
    """

    method: str
    budget: Budget
    rows: np.ndarray[Any, Any]
    piece: Piece


class Fits:
    """Makes the fits of a probe and scores them.

    Parameters
    ----------
    data, settings
    folder : RunFolder
    device : str
    """

    def __init__(self, data: ProbeData, settings: ProbeSettings, folder: RunFolder, device: str) -> None:
        self.data, self.settings, self.folder, self._device = data, settings, folder, device
        self._folds = data.folds(settings.cv, settings.seed)
        self._reductions: dict[float, Any] = {}

    def fit(self, method: str, budget: Budget, of_all: Fit | None, told: Told) -> Fit:
        """Train ``method``; ``of_all`` is its fit on all images, from which a smaller budget takes what was chosen."""
        rows = budget.rows(self.data.labels, self.settings.seed)
        view = self.data.train if budget.is_all else self.data.train.subset(rows)
        chosen = None if of_all is None else of_all.piece.record["chosen"]
        metrics = self.settings.whiten if of_all is None else (of_all.piece.record.get("whiten", 0.0),)
        facts = {
            **asdict(self.settings), "method": method, "train": view.identity, "chosen": chosen,
            "whiten": () if method in BASELINES else metrics,
        }  # fmt: skip
        if method != "attentive":
            del facts["queries"]
        slug = budget.title.replace(" ", "-").replace("%", "-percent")
        name = f"{method}-{slug}-{digest_json(facts)[:10]}"

        def make() -> Piece:
            if method == "k-nn":
                return self._neighbours(view, chosen)
            if method == "attentive-probe":
                return self._attentive(view, chosen, name)
            return self._head(method, view, chosen, metrics, name, told)

        return Fit(method, budget, rows, self.folder.once(name, make))

    # -- the methods ------------------------------------------------------------------------------------------------
    def _head(
        self, head: str, view: SplitView, ratio: float | None, metrics: Sequence[float], name: str, told: Told
    ) -> Piece:
        began = now()
        views = {each: view.reduced(self._reduction(each)) for each in metrics}
        common: dict[str, Any] = {
            "tol": self.settings.tol, "random_state": self.settings.seed, "device": self._device,
            **asdict(self.settings.queries),
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the table shows every gap
            model: ConvexHeadClassifier
            if ratio is None:
                found = {
                    whiten: ConvexHeadClassifierCV(
                        head, beta_ratios=self.settings.beta_ratios, cv=self._folds, **common
                    ).fit(each, callback=told)
                    for whiten, each in views.items()
                }  # fmt: skip
                best = max(found, key=lambda each: (found[each].scores_.mean(0).max(), -each))
                model, metrics = found[best], (best,)
                ratio, record = model.beta_ratio_, self._by_folds(float(model.scores_.mean(0).max()))
            else:
                model = ConvexHeadClassifier(head, beta_ratio=ratio, **common).fit(views[metrics[0]], callback=told)
                record = {"chosen_by": "all train images"}
        model.save(self.folder.model(name))
        return Piece(
            record
            | {
                "chosen": ratio,
                "whiten": metrics[0],
                "beta": model.beta_,
                "beta_max": model.beta_max_,
                "heads": model.n_heads_,
                "certificate": model.certificate_.to_dict(),
                "run": str(self.folder.model(name).relative_to(self.folder.path)),
                "seconds": now() - began,
            }
        )

    def _reduction(self, whiten: float) -> Any:
        """Of the tokens in a metric, which is fitted on all train images, as the standardisation is."""
        if whiten not in self._reductions:
            self._reductions[whiten] = whitened(self.data.train, whiten).reduction
        return self._reductions[whiten]

    def _neighbours(self, view: SplitView, k: int | None) -> Piece:
        began, X, y = now(), self.data.vectors(view), np.asarray(view.labels)
        if k is None:
            least = min(len(train) for train, _ in self._folds)
            scores = {
                each: float(np.mean([neighbours(each).fit(X[a], y[a]).score(X[b], y[b]) for a, b in self._folds]))
                for each in NEIGHBOURS
                if each <= least
            }
            k = max(scores, key=lambda each: (scores[each], -each))
            record = self._by_folds(scores[k])
        else:
            k, record = min(k, int(np.unique(y, return_counts=True)[1].min())), {"chosen_by": "all train images"}
        return Piece(record | {"chosen": k, "seconds": now() - began})

    def _attentive(self, view: SplitView, option: list[float] | None, name: str) -> Piece:
        began, seconds, record = now(), 0.0, {"chosen_by": "all train images"}
        if option is None:
            a, b = self._folds[0]
            kept, held = Part.of(view.subset(a)), Part.of(view.subset(b))
            tried = {
                each: self.folder.once(
                    f"tried/{name}-lr{each[0]:g}-decay{each[1]:g}", partial(self._try, kept, held, each)
                )
                for each in OPTIONS
            }
            seconds = sum(piece.record["seconds"] for piece in tried.values())
            best = max(OPTIONS, key=lambda each: tried[each].record["accuracy"])
            option, record = list(best), {"chosen_by": "the first fold", "cv_accuracy": tried[best].record["accuracy"]}
            began = now()
        probe = self._trained(Part.of(view), option[0], option[1])
        weights = {key: value.detach().cpu() for key, value in probe.state_dict().items()}
        return Piece(record | {"chosen": option, "seconds": seconds + now() - began}, weights)

    def _try(self, kept: Part, held: Part, option: tuple[float, float]) -> Piece:
        began = now()
        scores = network_scores(self._trained(kept, *option), held.tokens)
        accuracy = top(scores, np.unique(kept.labels), held.labels) if np.isfinite(scores).all() else -1.0
        return Piece({"accuracy": accuracy, "seconds": now() - began})

    def _trained(self, part: Part, lr: float, weight_decay: float) -> AttentiveProbe:
        size = max(LEAST_IN_BATCH, min(MOST_IN_BATCH, len(part.labels) // BATCHES))
        return fit_attentive_probe(
            part, lr=lr, weight_decay=weight_decay, epochs=EPOCHS, batch_size=size, seed=self.settings.seed
        )[0]

    def _by_folds(self, accuracy: float) -> dict[str, Any]:
        return {"chosen_by": f"{len(self._folds)}-fold cross-validation", "cv_accuracy": accuracy}

    # -- the test images --------------------------------------------------------------------------------------------
    def predictions(self, fit: Fit) -> Predictions:
        """What a fit says of the test images; kept, so that these are read once for each fit."""
        test = self.data.test
        name = f"test/{fit.piece.name}-{digest_json({'test': test.identity})[:10]}"

        def make() -> Piece:
            probabilities, classes = self._probabilities(fit, test)
            said = Predictions.of(probabilities, classes, np.asarray(test.labels))
            return Piece({"images": len(test)}, {key: torch.from_numpy(value) for key, value in vars(said).items()})

        return Predictions(**{key: value.numpy() for key, value in self.folder.once(name, make).tensors.items()})

    def _probabilities(self, fit: Fit, test: SplitView) -> tuple[Any, Any]:
        """Probabilities ``(n, c)``, and the classes ``(c,)``."""
        train = self.data.train.subset(fit.rows)
        if fit.method == "k-nn":
            near = neighbours(fit.piece.record["chosen"]).fit(self.data.vectors(train), train.labels)
            return near.predict_proba(self.data.vectors(test)), near.classes_
        if fit.method == "attentive-probe":
            logits = network_scores(AttentiveProbe.restored(fit.piece.tensors), test)
            return softmax(logits, axis=1), np.unique(train.labels)
        model = load(self.folder.path / fit.piece.record["run"])
        if not isinstance(model, ConvexHeadClassifier):
            raise InputError(f"{self.folder.path / fit.piece.record['run']} holds no classifier: delete the folder")
        return model.predict_proba(test), np.asarray(model.classes_)
