"""Experiments read a store as a fit reads it, a part at a time, and what they save knows how its tokens were made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import convexhead as ch
from convexhead import runs
from convexhead.errors import InputError
from convexhead.experiments.cells import AdamSettings, Cell, PathSettings, fit_path
from convexhead.experiments.cifar100 import run_cifar100
from convexhead.experiments.compare import compare_heads
from convexhead.experiments.splits import TokenChoice, chosen_splits
from convexhead.interpret import head_lift, token_contributions
from convexhead.report import evidence
from convexhead.runtime.run_folder import RunFolder
from convexhead.tokens import SplitView, TokenStore, extract
from convexhead.tokens.store.gather import ShardedRows

N, SIDE = 800, 80
COMMANDS = ("fit", "path", "cv", "adam", "evaluate", "audit", "interpret", "report", "compare", "cifar100")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """800 and 40 images of two classes as 100 tokens of 192 channels: in float32 more than is read at a time."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", N), ("test", 40)):
        labels = np.arange(n) % 2
        images = rng.integers(0, 200, (n, SIDE, SIDE), dtype=np.uint8)
        images[labels == 1, :8] //= 2
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    folder = tmp_path_factory.mktemp("large")
    np.savez(folder / "images.npz", **arrays)
    extract(f"npz:{folder / 'images.npz'}", "patches:8", folder / "tokens")
    runs.fit(folder / "tokens", folder / "run", head="linear", beta_ratio=0.3)
    return folder


def start(command, folder, out):
    tokens, run = folder / "tokens", folder / "run"
    if command == "fit":
        runs.fit(tokens, out, head="mlp", beta_ratio=0.3)
    elif command == "path":
        runs.path(tokens, out, head="mlp", beta_ratios=(0.5, 0.3))
    elif command == "cv":
        split = TokenStore.open(tokens)["train"]
        ch.ConvexHeadClassifierCV("mlp", beta_ratios=(0.5, 0.3), cv=2).fit(split, np.asarray(split.labels))
    elif command == "adam":
        runs.adam(tokens, out, head="mlp", n_heads=2, epochs=1, beta_ratio=0.3)
    elif command == "evaluate":
        runs.evaluate(run, tokens)
    elif command == "audit":
        runs.audit(run, tokens)
    elif command == "interpret":
        model, split = ch.load(run), TokenStore.open(tokens)["train"]
        shares = token_contributions(model, split)
        assert shares.shape == (N, 100, 2)
        assert head_lift(model, split, torch.as_tensor(np.asarray(split.labels))).shape == (1, 2)
    elif command == "report":
        evidence.collect(ch.load(run), TokenStore.open(tokens))
    elif command == "compare":
        compare_heads(tokens, out, heads=("mlp",), activations=("linear",), beta_ratios=(0.5, 0.3), seeds=0)
    else:
        options = {"scale": "2k", "token_pool": 2, "heads": ("mlp",), "activations": ("linear",), "epochs": 1}
        run_cifar100(out, tokens=tokens, **options, jobs=1)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_reads_a_split_at_once(command, large, tmp_path, monkeypatch):
    """Whatever is kept is kept by the budget of a fit, and is brought there a part at a time."""
    taken, take = [], ShardedRows.take

    def counted(rows, name, index):
        values = take(rows, name, index)
        if name == "tokens":
            taken.append(len(values) if values.ndim == 3 else 1)
        return values

    monkeypatch.setattr(ShardedRows, "take", counted)
    monkeypatch.setattr(SplitView, "read", lambda view: pytest.fail("all of a split was read"))
    monkeypatch.setattr(SplitView, "__array__", lambda view, *_: pytest.fail("a split became an array"))
    start(command, large, tmp_path / "out")
    assert sum(taken) >= 40
    assert max(taken) <= 8_000_000 // SIDE**2 // 3 < 0.8 * N * 0.8


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """4 x 4 tokens of 4 channels; ten classes."""
    folder = tmp_path_factory.mktemp("digits") / "tokens"
    return extract("sklearn:digits", "patches:2", folder, channels=4)


CELL = Cell("self-attention", "linear")


def chosen_head(store, out, **choice):
    """The head that an experiment keeps for `CELL`, and what it was trained on."""
    splits = chosen_splits(store, TokenChoice(train=30, test=10, **choice))
    piece = fit_path(splits, PathSettings(beta_ratios=(0.3, 0.1)), CELL, RunFolder(out))
    return RunFolder(out).model(CELL.name), splits, piece.record


def test_a_head_of_pooled_tokens_is_scored_and_audited_on_the_store_itself(digits, tmp_path):
    folder, splits, record = chosen_head(digits, tmp_path, token_pool=2, channels=4)
    model = ch.load(folder)
    assert splits.train.tokens.shape[1:] == (4, 4)
    assert model.origin_.token_pool == (2, 2)
    test = splits.load_test()
    right = float((model.predict(test.tokens[:]) == test.labels).mean())
    assert model.score(digits["test"].subset(test.tokens.rows)) == pytest.approx(right)
    assert runs.evaluate(folder, digits.path)["images"] == 540
    audit = runs.audit(folder, digits.path, reference=folder)
    assert audit.certificate.identity == model.certificate_.identity
    assert audit.certificate.primal == pytest.approx(record["certificate"]["primal"], rel=1e-6)
    assert audit.certificate.dual == pytest.approx(record["certificate"]["dual"], rel=1e-6)
    with pytest.raises(InputError, match="grid of 2 x 2"):
        model.to_module(raw_tokens=True)


def test_heads_serve_classes_by_the_tokens_that_they_were_fitted_on(digits, tmp_path):
    """A store keeps every token; what a head of pooled tokens adds is told of the pooled ones."""
    folder, *_ = chosen_head(digits, tmp_path, token_pool=2, channels=4)
    model, test = ch.load(folder), digits["test"]
    y, pooled = torch.as_tensor(np.asarray(test.labels)), np.asarray(model.as_fitted_on(test)[:])
    assert pooled.shape[1] == 4 < test.shape[1]
    assert torch.allclose(head_lift(model, test, y), head_lift(model, pooled, y))


def test_new_images_like_those_of_a_pooled_head(digits, tmp_path):
    """Their store keeps every token; the head pools them itself."""
    folder, *_ = chosen_head(digits, tmp_path / "run", token_pool=2, channels=4)
    more = extract("sklearn:digits", None, tmp_path / "more", like=folder)
    assert more.grid == (4, 4)
    assert runs.evaluate(folder, more.path)["top1"] == runs.evaluate(folder, digits.path)["top1"]


def test_an_experiment_on_some_classes_does_not_answer_for_the_others(digits, tmp_path):
    folder, splits, _ = chosen_head(digits, tmp_path, classes=4)
    assert splits.class_names == ["0", "1", "2", "3"]
    assert ch.load(folder).class_names_ == splits.class_names
    with pytest.raises(InputError, match="classes that this head was not trained on"):
        runs.evaluate(folder, digits.path)


def test_what_was_read_before_is_what_is_read_now(digits):
    """The view's tokens are those of pooling and reducing the whole split as an array."""
    splits = chosen_splits(digits, TokenChoice(train=30, test=10, token_pool=2, channels=4))
    view = splits.train.tokens
    raw = digits["train"].unreduced()[view.rows]
    pooled = raw.reshape(len(raw), 2, 2, 2, 2, 4).mean((2, 4)).reshape(len(raw), 4, 4)
    np.testing.assert_allclose(view[:], view.reduction.apply(pooled), atol=1e-5)
    flat = pooled.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(view.reduction.mean, flat.mean(0), rtol=1e-6)


def test_adam_trains_on_pooled_tokens_of_the_same_problem(digits, tmp_path):
    from convexhead.experiments.cells import train_with_adam

    _, splits, record = chosen_head(digits, tmp_path, token_pool=2)
    settings = AdamSettings(heads=(3,), seeds=(0,), learning_rates=(0.03,), epochs=2, batch_size=64)
    (adam,) = train_with_adam(splits, settings, CELL, RunFolder(tmp_path))
    assert adam.tuned.runs[0].record["identity"] == record["certificate"]["identity"]
    assert adam.tuned.runs[0].record["convex_objective"] >= record["certificate"]["dual"]
