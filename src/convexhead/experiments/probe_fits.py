"""The fits of a probe: each method on each budget of train images, chosen by cross-validation on all of them.

=====================  =============================================================================================
method                 what is chosen, on the same folds of the train images
=====================  =============================================================================================
a head                 ``β/β_max`` and the metric of the tokens, by the mean score over the folds
                       (`ConvexHeadClassifierCV`; see `convexhead.experiments.probe_tasks` for the score)
``k-nn``               ``k``, by the same; neighbours of the mean token by cosine, weighted by distance
``attentive-probe``    learning rate and weight decay, by the score on the first fold alone, for it is dear
=====================  =============================================================================================

Then each is trained on all train images. A smaller budget takes over what all images chose, and k is at most the
images of a class. Every fit is a piece in the run's folder, and its name holds a hash of its data and
settings: the same fit is never made twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from convexhead.dense import pixel_scores
from convexhead.errors import InputError
from convexhead.estimator_choice import estimator_for, settings_for
from convexhead.experiments.probe_baselines import OF_ALL, Baselines
from convexhead.experiments.probe_data import Budget, ProbeData
from convexhead.experiments.probe_outcomes import OUTCOMES, OfClasses, OfPixels, Outcome
from convexhead.experiments.probe_tasks import BASELINES, MASKS, NUMBERS
from convexhead.experiments.query_settings import QuerySettings
from convexhead.metrics import Predictions
from convexhead.persistence import load
from convexhead.runtime.clock import now
from convexhead.runtime.run_folder import Piece, RunFolder
from convexhead.tokens.fit_reduction import check_whiten
from convexhead.tokens.store.fit import whitened
from convexhead.tokens.store.manifest import digest_json
from convexhead.tokens.store.view import SplitView

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

    Attributes
    ----------
    unseen : float or None
        Of masks, the share of the test pixels with a label that the backbone does not see.
    """

    def __init__(self, data: ProbeData, settings: ProbeSettings, folder: RunFolder, device: str) -> None:
        self.data, self.settings, self.folder, self._device = data, settings, folder, device
        self._folds = data.folds(settings.cv, settings.seed)
        self._baselines = Baselines(data, self._folds, folder, settings.seed)
        self._reductions: dict[float, Any] = {}
        self.unseen: float | None = None

    def fit(self, method: str, budget: Budget, of_all: Fit | None, told: Told) -> Fit:
        """Train ``method``; ``of_all`` is its fit on all images, from which a smaller budget takes what was chosen."""
        rows = budget.rows(self.data.labels, len(self.data.train), self.settings.seed, self.data.groups)
        view = self.data.train if budget.is_all else self.data.train.subset(rows)
        chosen = None if of_all is None else of_all.piece.record["chosen"]
        metrics = self.settings.whiten if of_all is None else (of_all.piece.record.get("whiten", 0.0),)
        facts = {
            **asdict(self.settings), "method": method, "train": view.identity, "chosen": chosen,
            "whiten": () if method in BASELINES else metrics,
        }  # fmt: skip
        if self.data.grouping is not None:
            facts["groups"] = self.data.grouping
        if method != "attentive":
            del facts["queries"]
        slug = budget.title.replace(" ", "-").replace("%", "-percent")
        name = f"{method}-{slug}-{digest_json(facts)[:10]}"

        def make() -> Piece:
            if method in BASELINES:
                return self._baselines.fit(method, view, chosen, name)
            return self._head(method, view, chosen, metrics, name, told)

        piece = self.folder.once(name, make)
        self._kept(name).remove()
        return Fit(method, budget, rows, piece)

    def _kept(self, name: str) -> RunFolder:
        """Where the fits of the folds of a head are kept until it is finished."""
        return RunFolder(self.folder.path / "folds" / name)

    # -- the methods ------------------------------------------------------------------------------------------------
    def _head(
        self, head: str, view: SplitView, ratio: float | None, metrics: Sequence[float], name: str, told: Told
    ) -> Piece:
        began = now() - self._kept(name).seconds()  # of an earlier run that was stopped
        views = {each: view.reduced(self._reduction(each)) for each in metrics}
        common = settings_for(view, None, self._common())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the table shows every gap
            if ratio is None:
                choice = {"beta_ratios": self.settings.beta_ratios, "scoring": self.data.task.scoring}
                found: dict[float, Any] = {
                    whiten: estimator_for({**common, "head": head, **choice}, self._folds).fit(
                        each, callback=told, checkpoint=self._kept(name).path
                    )
                    for whiten, each in views.items()
                }
                best = max(found, key=lambda each: (found[each].scores_.mean(0).max(), -each))
                model, metrics = found[best], (best,)
                ratio, score = model.beta_ratio_, float(model.scores_.mean(0).max())
                record = {"chosen_by": f"{len(self._folds)}-fold cross-validation", "cv_score": score}
            else:
                model = estimator_for({**common, "head": head, "beta_ratio": ratio}, None)
                model.fit(views[metrics[0]], callback=told)
                record = dict(OF_ALL)
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

    def _common(self) -> dict[str, Any]:
        """Settings of every head."""
        return {
            "tol": self.settings.tol, "random_state": self.settings.seed, "device": self._device,
            **asdict(self.settings.queries), **self.data.task.settings,
        }  # fmt: skip

    # -- the test images --------------------------------------------------------------------------------------------
    def outcome(self, fit: Fit) -> Outcome:
        """What a fit says of the test images; kept, so that these are read once for each fit."""
        test = self.data.test
        name = f"test/{fit.piece.name}-{digest_json({'test': test.identity})[:10]}"

        def make() -> Piece:
            outcome, unseen = self._outcome(fit, test)
            return Piece({"images": len(test), "unseen": unseen}, outcome.tensors())

        piece = self.folder.once(name, make)
        self.unseen = piece.record.get("unseen")
        return OUTCOMES[self.data.task.name].restored(piece.tensors)

    def _outcome(self, fit: Fit, test: SplitView) -> tuple[Outcome, float | None]:
        if fit.method in BASELINES:
            train = self.data.train.subset(fit.rows)
            said, classes = self._baselines.says(fit.method, fit.piece, train, test)
        else:
            model: Any = load(self.folder.path / fit.piece.record["run"])
            if hasattr(model, "classes_") == (self.data.task.name == NUMBERS):
                raise InputError(f"{self.folder.path / fit.piece.record['run']} is of another task: delete the folder")
            if self.data.task.name == MASKS:
                scores = pixel_scores(model, test, self.data.images or self.data.store.manifest.source)
                return OfPixels(scores.confusions), scores.unseen
            if self.data.task.name == NUMBERS:
                said, classes = model.predict(test).reshape(test.known.shape), None
            else:
                said, classes = model.predict_proba(test), np.asarray(model.classes_)
        if test.known.ndim > 1:
            return OUTCOMES[self.data.task.name](np.asarray(said, float), test.known), None
        return OfClasses(Predictions.of(said, np.asarray(classes), test.known)), None
