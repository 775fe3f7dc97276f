"""Scores of held-out samples along a path, with what the head makes of their tokens kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

import convexhead as ch
from convexhead import held_out
from convexhead.estimators import ConvexHeadClassifier
from convexhead.fitting import pose
from convexhead.held_out import HeldOut

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 4, 5)), RNG.integers(3, size=60)
HELD, TRUE = RNG.normal(size=(41, 4, 5)), RNG.integers(3, size=41)
HEADS = {
    "attentive": {"n_queries": 6},
    "self-attention": {},
    "mlp-mixer": {},
    "mlp": {"activation": "gated-relu", "n_gates": 4},
    "linear": {},
}


def models(head: str, **settings: object) -> list[ConvexHeadClassifier]:
    """Those of a path, with their rows' scores."""
    rows = ch.regularization_path(
        X, Y, X_val=HELD, y_val=TRUE, beta_ratios=(0.5, 0.1), head=head, random_state=0, **HEADS[head], **settings
    )
    for row in rows:
        row["model"].scored = row["val_score"]
    return [row["model"] for row in rows]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("memory", [None, 1e4, 1e5])
def test_a_path_scores_as_its_models_do(head: str, memory: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "LEAST", -math.inf)  # however little there is: some samples are kept, or none
    for model in models(head, max_memory=memory):
        assert model.scored == model.score(HELD, TRUE) == np.mean(model.predict(HELD) == TRUE)


@pytest.mark.parametrize("kind", ["array", "float32", "memory map", "list"])
def test_tokens_may_come_in_any_form(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    held: NDArray[np.float64] | list[NDArray[np.float64]] = HELD.astype(np.float32)
    if kind == "memory map":
        file = tmp_path_factory.mktemp("held") / "X.npy"
        np.save(file, held)
        held = np.load(file, mmap_mode="r")
    elif kind != "float32":
        held = list(HELD) if kind == "list" else HELD
    for model in models("attentive"):
        task = pose(ConvexHeadClassifier("attentive", n_queries=6, random_state=0), X, Y, to_solve=True)
        assert HeldOut(task, held, TRUE).score(model) == model.score(held, TRUE)


def test_tokens_are_prepared_once_and_the_memory_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clf = ConvexHeadClassifier("attentive", n_queries=6, random_state=0, max_memory=1e9)
    task = pose(clf, X, Y, to_solve=True)
    first, second = models("attentive")
    left, prepared = task.problem.operator.budget.left, []
    make = type(first.model_.head).prepare_linear

    def counted(self: object, tokens: object, **options: bool) -> object:
        prepared.append(len(tokens))  # type: ignore[arg-type]
        return make(self, tokens, **options)

    held = HeldOut(task, HELD, TRUE)
    monkeypatch.setattr(type(first.model_.head), "prepare_linear", counted)
    scores = [held.score(model) for model in (first, second)]
    assert sorted(prepared) == [1, len(HELD)]  # one sample tells how much memory the others take
    monkeypatch.undo()
    assert scores == [model.score(HELD, TRUE) for model in (first, second)]
    assert task.problem.operator.budget.left < left - HELD.shape[0] * 6 * 5 * 8 + 1
    held.rest()
    assert task.problem.operator.budget.left == left


def test_tokens_of_another_width_are_refused() -> None:
    with pytest.raises(ch.InputError, match="features"):
        ch.regularization_path(
            X, Y, X_val=HELD[:, :, :4], y_val=TRUE, beta_ratios=(0.5,), head="attentive", n_queries=3
        )


@pytest.mark.parametrize("dtype", [int, float, str, object])
def test_many_classes_are_remarked_on_once_and_not_with_every_score(dtype: type) -> None:
    labels = np.arange(40).astype(str).astype(dtype)
    tokens = RNG.normal(size=(72, 4, 5))
    with pytest.warns(UserWarning, match="unique classes") as told:
        ch.regularization_path(
            tokens[:40], labels, X_val=tokens[40:], y_val=labels[:32], head="linear", beta_ratios=(0.5, 0.2)
        )
    assert len(told) == 1


def test_arrays_that_would_take_too_much_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    task = pose(ConvexHeadClassifier("attentive", n_queries=6, random_state=0, max_memory=1e9), X, Y, to_solve=True)
    (first, _), left = models("attentive"), task.problem.operator.budget.left
    monkeypatch.setattr(held_out, "SHARE", left / (8 * HELD.size - 1))
    monkeypatch.setattr(held_out, "LEAST", 0)
    assert HeldOut(task, HELD, TRUE).score(first) == first.score(HELD, TRUE)
    assert task.problem.operator.budget.left == left
    monkeypatch.setattr(held_out, "SHARE", left / (8 * HELD.size))
    held = HeldOut(task, HELD, TRUE)
    assert held.score(first) == first.score(HELD, TRUE)
    assert task.problem.operator.budget.left < left
