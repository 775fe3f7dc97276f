"""A bound belongs to its problem: nothing of another problem, and nothing guessed, is ever taken for a proof."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import Parameter

import convexhead as ch
from command import call
from convexhead.certificate.certify import Certificate
from convexhead.drive import solve
from convexhead.modules import HeadModule
from convexhead.program.activations import make_activation
from convexhead.program.heads import make_head
from convexhead.program.identity import PARTS, describe_loss, digest_rows
from convexhead.program.losses import Huber, Squared
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.runtime.checkpoint import Checkpoint
from convexhead.runtime.ranks import Ranks

RNG = np.random.default_rng(7)
N, S, D = 24, 6, 4
X = RNG.normal(size=(N, S, D)).astype(np.float32)
LABELS = np.arange(N) % 4
GATES = RNG.normal(size=(2, D, D))
MEANS = X[:, :, 0].mean(1)
BASE = {"head": "self-attention", "beta": 0.02, "tol": 0.05, "random_state": 0}


def fit(X=X, y=LABELS, **settings):
    return ch.ConvexHeadClassifier(**{**BASE, **settings}).fit(X, y)


def regress(X=X, y=MEANS, **settings):
    return ch.ConvexHeadRegressor(**{**BASE, "beta": 0.001, **settings}).fit(X, y)


def audit(weights, X=X, y=LABELS, **options):
    return ch.certify(weights, X, y, **{"beta": BASE["beta"], "random_state": 0, **options})


def assert_no_worse(audited, reference):
    """An audit with a reference has its bound at least, but for rounding."""
    assert audited.dual >= reference.dual - 1e-9 * abs(reference.primal)


# -- which problem ----------------------------------------------------------------------------------------------------
GATED = {"activation": "gated-relu", "gates": GATES}
QUERIES = RNG.normal(size=(2, D))
ASKED = {"head": "attentive", "queries": QUERIES}
BLOCKS = {"head": "block-fno", "n_blocks": 2}
CASES = {  # settings of the reference, what is other, and how the message names it
    "head": ({}, {"head": "mlp"}, "another head: self-attention instead of mlp"),
    "pool": ({}, {"pool": "cls"}, "another pool: mean instead of cls"),
    "intercept": ({}, {"fit_intercept": True}, "another intercept: none instead of fitted"),
    "no intercept": ({"fit_intercept": True}, {"fit_intercept": False}, "another intercept: fitted instead of none"),
    "activation": ({"head": "mlp"}, {"activation": "gated-relu", "n_gates": 3}, "another activation: linear instead"),
    "gates": (GATED, {"gates": GATES * (1 + 1e-12)}, "other gates"),
    "fewer gates": (GATED, {"gates": GATES[:1]}, "other gates: 2x4x4 instead of 1x4x4"),
    "seed of gates": ({"activation": "gated-relu", "n_gates": 3}, {"random_state": 1}, "other gates"),
    "queries": (ASKED, {"queries": QUERIES * (1 + 1e-12)}, "other queries"),
    "seed of queries": ({"head": "attentive", "n_queries": 3}, {"random_state": 1}, "other queries"),
    "norm of queries": (ASKED, {"query_norm": "each"}, "another number of channel groups: 1 instead of 2"),
    "blocks": (BLOCKS, {"n_blocks": 4}, "another number of channel groups: 2 instead of 4"),
    "outputs": (BLOCKS, {"outputs": "grouped"}, "another kind of outputs: shared instead of grouped"),
    "grid": ({"head": "fno", "grid": (2, 3)}, {"grid": (3, 2)}, "another token grid: 2x3 instead of 3x2"),
    "beta": ({}, {"beta": 0.02 * (1 + 1e-9)}, "another beta: 0.02 instead of 0.02000000002"),
    "labels": ({}, {"y": np.roll(LABELS, 1)}, "other labels or targets"),
    "fewer classes": ({}, {"y": LABELS % 2}, "other labels or targets: 24x1x4 instead of 24x1x2"),
    "tokens": ({}, {"X": X * np.float32(1 + 1e-6)}, "other tokens"),
    "one number": ({}, {"X": np.where(np.arange(D) + np.arange(S)[:, None] == 7, X + 1e-7, X)}, "other tokens"),
    "fewer tokens": ({}, {"X": X[:, :5]}, "other tokens: 24x6x4 instead of 24x5x4"),
    "order": ({}, {"X": X[::-1].copy(), "y": LABELS[::-1].copy()}, "other tokens; other labels or targets"),
    "half the samples": ({}, {"X": X[:12], "y": LABELS[:12]}, "other tokens: 24x6x4 instead of 12x6x4"),
}  # fmt: skip


def both(settings, other):
    data = {key: other[key] for key in ("X", "y") if key in other}
    settings_of_other = {**settings, **{key: value for key, value in other.items() if key not in data}}
    return fit(**settings), fit(**data, **settings_of_other), data


@pytest.mark.parametrize("name", CASES)
def test_a_bound_of_another_problem_is_refused_and_what_differs_is_named(name):
    settings, other, message = CASES[name]
    reference, weights, data = both(settings, other)
    with pytest.raises(ch.InputError, match="the reference was certified for another problem") as caught:
        audit(weights, **data, beta=weights.beta_, lower_bound=reference.certificate_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # and its own bound is taken
    own = audit(weights, **data, beta=weights.beta_, lower_bound=weights.certificate_)
    assert_no_worse(own, weights.certificate_)
    # each part alone is enough
    parts = {part for part in PARTS if reference.certificate_.identity[part] != weights.certificate_.identity[part]}
    assert parts or reference.beta_ != weights.beta_


LOSSES = {
    "another loss": ("squared", "huber", "another loss: squared instead of huber"),
    "parameter": (Huber(0.5), Huber(0.25), r"another loss: huber(delta=0.5) instead of huber(delta=0.25)"),
    "own parameter": (Squared(), "huber", "another loss: squared"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_bound_of_another_loss_is_refused(name):
    one, two, message = LOSSES[name]
    reference, weights = regress(loss=one), regress(loss=two)
    with pytest.raises(ch.InputError) as caught:
        audit(weights, y=MEANS, beta=weights.beta_, lower_bound=reference.certificate_)
    assert message in str(caught.value)
    assert_no_worse(audit(weights, y=MEANS, beta=weights.beta_, lower_bound=weights.certificate_), weights.certificate_)


def scaled(factor, width=None):
    class Scaled(Squared):
        name = "scaled"
        twice = 1.0

        def value(self, f, y):
            return factor * super().value(f, y)

    loss = Scaled()
    loss.width = width
    return loss


def test_a_loss_of_ones_own_is_known_by_its_code_and_all_that_it_reads():
    assert describe_loss(scaled(2.0)) == describe_loss(scaled(2.0))
    assert describe_loss(scaled(2.0)) != describe_loss(scaled(3.0))  # a closure
    assert describe_loss(scaled(2.0, np.ones(3))) == describe_loss(scaled(2.0, np.ones(3)))
    assert describe_loss(scaled(2.0, np.ones(2000))) != describe_loss(scaled(2.0, np.ones(2000) + 1e-9))
    assert describe_loss(scaled(2.0, [1, {"a": 2}])) != describe_loss(scaled(2.0, [1, {"a": 3}]))
    other = scaled(2.0)
    type(other).twice = 2.0  # a class attribute
    assert describe_loss(other) != describe_loss(scaled(2.0))
    type(other).twice = 1.0
    assert describe_loss(other) == describe_loss(scaled(2.0))
    type(other).residual = lambda self, f, y: 2 * (f - y)  # code
    assert describe_loss(other) != describe_loss(scaled(2.0))
    assert describe_loss(Squared()) == "squared"


def test_the_same_problem_in_other_words_is_the_same():
    reference = fit().certificate_
    names = np.array(["ash", "birch", "cedar", "elm"])[LABELS]
    for tokens, labels in (
        (X.astype(np.float64), LABELS),
        (torch.tensor(X), torch.tensor(LABELS)),
        (X, LABELS.astype(float)),
        (X, names),
        (np.where(X == 0, -0.0, X), LABELS.tolist()),
    ):
        assert fit(tokens, labels).certificate_.identity == reference.identity
    # what does not matter does not count: the grid of attention, the working precision, the seed where nothing is drawn
    for other in ({"grid": (2, 3)}, {"tol": 1e-5}, {"random_state": 5}, {"n_blocks": 2}, {"gates": None, "n_gates": 7}):
        assert fit(**other).certificate_.identity == reference.identity
    half = torch.tensor(X).half()
    assert fit(half).certificate_.identity == fit(half.double()).certificate_.identity != reference.identity


def test_a_number_is_no_bound_and_neither_is_a_certificate_without_identity():
    clf = fit()
    with pytest.raises(ch.InputError, match="lower_bound must be a Certificate, got float"):
        audit(clf, lower_bound=0.1)
    for lost in ({"identity": None}, {"beta": None}):
        with pytest.raises(ch.InputError, match=r"does not say which problem it was certified for.*fit it again"):
            audit(clf, lower_bound=replace(clf.certificate_, **lost))


def test_a_false_bound_of_the_same_problem_is_a_sentence():
    clf = fit()
    high = clf.certificate_.primal + 1
    false = replace(clf.certificate_, primal=high, dual=high, gap=0.0, relative_gap=0.0, converged=True)
    with pytest.raises(ch.InputError, match="it is false: fit the reference again"):
        audit(clf, lower_bound=false)


def test_whose_bound_it_was_is_told():
    clf = fit()
    factors = (clf.mixing_[0] * 1.5, clf.values_[0])
    certificate = audit(factors, lower_bound=clf.certificate_)
    assert_no_worse(certificate, clf.certificate_)
    assert certificate.bound.startswith("that of the reference: ")


# -- processes, chunks, checkpoints -----------------------------------------------------------------------------------
class Several(Ranks):
    """One of several processes, here threads."""

    def __init__(self, rank, size, shared):
        super().__init__(rank, size)
        self.sent, self.barrier = shared

    def sum(self, *parts):
        self.sent[self.rank] = parts
        self.barrier.wait(60)
        totals = tuple(sum(pieces) for pieces in zip(*self.sent, strict=True))
        self.barrier.wait(60)
        return totals


def hashed_by(size, values):
    shared = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as threads:
        shares = [values[Ranks(k, size).share(len(values))] for k in range(size)]
        return list(threads.map(lambda k: digest_rows(shares[k], Several(k, size, shared)), range(size)))


@pytest.mark.parametrize("shape", [(23, 1, 7), (23, 40, 64), (5000, 1, 40), (5, 300, 300)])
def test_every_number_of_processes_finds_the_same_hash(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = digest_rows(values)
    for size in (2, 3, 5):
        assert hashed_by(size, values) == [whole] * size
    changed = values.clone()
    changed[-1, -1, -1] += 1e-12
    assert digest_rows(changed) != whole
    assert digest_rows(values.flip(0)) != whole
    assert digest_rows(values.float()) == digest_rows(values.float().double()) != whole


def test_tokens_on_disk_are_the_tokens_in_memory(tmp_path):
    on_disk = np.memmap(tmp_path / "tokens", np.float32, "w+", shape=X.shape)
    on_disk[:] = X
    reference = fit(on_disk, max_memory=1000.0).certificate_
    assert_no_worse(audit(fit(), lower_bound=reference), reference)


def test_a_checkpoint_of_another_problem_lends_no_bound(tmp_path):
    """Settings may be equal where the problems are not: then the identity tells."""

    def run(targets, minutes=0.0, **limits):
        head = make_head("mlp", S, D)
        problem = Problem(
            Operator(torch.tensor(X).double(), head, make_activation("linear", head, None)), targets, Squared()
        )
        generator = torch.Generator().manual_seed(0)
        checkpoint = Checkpoint(tmp_path / "checkpoint", {"same": True}, minutes=minutes)
        return solve(problem, 0.001, tol=1e-7, max_heads=2, generator=generator, checkpoint=checkpoint, **limits)

    targets = torch.tensor(X).double()[:, :, :2].mean(1, keepdim=True)
    first = run(targets)
    assert (tmp_path / "checkpoint" / "checkpoint.json").exists()
    again = run(targets)
    assert again.certificate.primal == pytest.approx(first.certificate.primal, rel=1e-6)
    with pytest.raises(ch.InputError, match=r"the checkpoint is of another problem .*other labels or targets"):
        run(targets / 2)


# -- nothing is inferred from values ----------------------------------------------------------------------------------
RARE = np.random.default_rng(0).normal(size=(60, 1, 3)), (np.arange(60) < 6).astype(int)
ENTROPY = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))


def zero_head(intercept):
    module = HeadModule(
        make_head("mlp", 1, 3), "linear", None, 2, 2, intercept=intercept, dtype=torch.float64, seed=None
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def with_zero_intercept(clf):
    atoms = replace(clf.model_.atoms, intercept=torch.zeros(2, dtype=torch.float64))
    return clf.from_model(replace(clf.model_, atoms=atoms))


def test_a_bias_of_zero_is_a_bias():
    X, y = RARE
    factors = (np.zeros((1, 3)), np.zeros((1, 1, 2)))
    clf = ch.ConvexHeadClassifier("mlp", beta=5.0, fit_intercept=True, random_state=0).fit(X, y)
    assert clf.certificate_.primal == pytest.approx(ENTROPY, rel=1e-6)
    clf = with_zero_intercept(clf)
    with_bias = [
        audit(zero_head(True), X, y, beta=5.0),
        audit(factors, X, y, beta=5.0, head="mlp", intercept=np.zeros(2)),
        audit(clf, X, y, beta=5.0),
    ]
    for certificate in with_bias:
        assert certificate.primal == pytest.approx(math.log(2))
        assert certificate.dual <= ENTROPY * (1 + 1e-12)
        assert not certificate.converged
    for weights in (zero_head(False), factors):
        certificate = audit(weights, X, y, beta=5.0, head="mlp")
        assert certificate.converged
        assert certificate.dual == pytest.approx(math.log(2))


def test_an_exported_module_has_an_intercept_if_the_head_was_fitted_with_one():
    X, y = RARE
    with_it = ch.ConvexHeadClassifier("mlp", beta=5.0, fit_intercept=True, random_state=0).fit(X, y)
    with_it = with_zero_intercept(with_it)
    without = ch.ConvexHeadClassifier("mlp", beta=5.0, random_state=0).fit(X, y)
    assert with_it.to_module().intercept is not None
    assert without.to_module().intercept is None


def with_bias(value):
    module = zero_head(True)
    module.intercept = Parameter(torch.as_tensor(value, dtype=torch.float64))
    return module


@pytest.mark.parametrize("b", [0.0, [0.0], [[0.0, 0.0]], [[0.0], [0.0]], [0.0, 0.0, 0.0]])
def test_a_bias_of_another_shape_is_refused(b):
    X, y = RARE
    with pytest.raises(ch.InputError, match=r"the intercept has shape .*2 outputs need"):
        audit((np.zeros((1, 3)), np.zeros((1, 1, 2))), X, y, beta=5.0, head="mlp", intercept=np.array(b))
    with pytest.raises(ch.InputError, match=r"the intercept has shape .*2 outputs need"):
        audit(with_bias(b), X, y, beta=5.0)
    with pytest.raises(ch.InputError, match="the intercept has shape"):
        with_bias(b)(torch.zeros(2, 1, 3, dtype=torch.float64))


FITTED = fit()
FACTORS = (FITTED.mixing_[0], FITTED.values_[0])
TARGETS = RNG.normal(size=(N, 2))
TWO = regress(y=TARGETS)
EVERY = regress(y=RNG.normal(size=(N, S, 2)), pool=None)
WORDS = fit(y=np.array(["b", "c", "d", "a"])[LABELS])
REFUSED = {
    "foreign label": (lambda: audit(FITTED, y=LABELS + 1), "labels 4 are not among the classes of this head"),
    "other names": (lambda: audit(WORDS, y=LABELS), "labels 0, 1, 2, 3 are not among the classes"),
    "absent class": (lambda: audit(FITTED, y=np.minimum(LABELS, 2)), "3 classes, but the weights have 4"),
    "float labels": (lambda: audit(FACTORS, y=RNG.normal(size=N)), "Unknown label type"),
    "targets of another layout": (lambda: audit(TWO, y=TARGETS.T.copy()), "inconsistent numbers of samples"),
    "flat targets": (lambda: audit(TWO, y=TARGETS.reshape(-1), loss="squared"), "numbers of samples"),
    "targets with a dimension more": (lambda: audit(TWO, y=TARGETS[:, None]), r"must be \(n,\) or \(n, c\)"),
    "one column for two": (lambda: audit(TWO, y=TARGETS[:, :1]), "do not fit outputs"),
    "tokens behind outputs": (lambda: audit(EVERY, y=np.ones((N, 2, S))), r"must be \(n, s, c\)"),
    "flat targets of tokens": (lambda: audit(EVERY, y=np.ones((N, 2 * S))), r"must be \(n, s, c\)"),
    "NaN target": (lambda: audit(TWO, y=TARGETS * np.nan), "NaN"),
    "labels for every token": (lambda: audit(EVERY, loss="cross-entropy"), r"y must be labels \(n, 6\)"),
    "gates for a linear head": (lambda: audit(FACTORS, gates=GATES), "gates go with activation='gated-relu'"),
    "gates of another shape": (lambda: audit(FACTORS, activation="gated-relu", gates=GATES[0]), "gates have shape"),
    "gates beside a module": (lambda: audit(FITTED, gates=GATES), "has its own"),
    "intercept beside an estimator": (lambda: audit(FITTED, intercept=np.zeros(4)), "has its own"),
    "complex weights": (lambda: audit((FACTORS[0] + 1j, FACTORS[1])), "must be real numbers"),
    "complex intercept": (lambda: audit(FACTORS, intercept=np.zeros(4) + 1j), "must be real numbers"),
    "ragged weights": (lambda: audit(([[1.0], [1.0, 2.0]], FACTORS[1])), "blocks|cannot be read|needed are"),
    "mixing of a linear head": (lambda: audit((np.ones(3), np.ones((D, 4))), head="linear"), "no mixing weights"),
    "beta of True": (lambda: audit(FITTED, beta=True), "beta must be a positive number"),
    "tol of NaN": (lambda: audit(FITTED, tol=math.nan), "tol must be a positive number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_guessed(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_labels_are_matched_by_name():
    """``classes_`` is sorted, and so are labels: what is matched by place would look right here, and be wrong below."""
    assert WORDS.classes_.tolist() == ["a", "b", "c", "d"]
    names = np.array(["b", "c", "d", "a"])[LABELS]
    assert audit(WORDS, y=names).primal == pytest.approx(WORDS.certificate_.primal, rel=1e-9)
    reordered = replace(WORDS.model_, classes=np.array(["d", "a", "b", "c"]))  # as another program may order them
    moved = np.array(["a", "b", "c", "d"])[LABELS]
    assert audit(reordered, y=moved).primal == pytest.approx(WORDS.certificate_.primal, rel=1e-9)


def test_tensors_that_are_still_trained_can_be_audited():
    mixing, values = (Parameter(torch.tensor(w)) for w in FACTORS)
    assert audit((mixing, values)).primal == pytest.approx(FITTED.certificate_.primal, rel=1e-9)


def test_a_module_of_raw_tokens_is_not_audited_on_reduced_ones():
    class Affine:
        mean, scale, basis, constant = np.zeros(D), 2 * np.ones(D), None, False

    module = HeadModule(make_head("mlp", S, D), "linear", None, 2, 4, reduction=Affine())
    with pytest.raises(ch.InputError, match="takes raw tokens"):
        audit(module)


# -- saved models -----------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    FITTED.save(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change, *, old=False):
    """Change the config as an editor would; ``old``: of the first format, which has no checksum to give it away."""
    config = json.loads((folder / "config.json").read_text())
    if old:
        config = {key: value for key, value in config.items() if key not in ("checksum", "weights_sha256")}
        config["version"] = 1
        for name in ("identity", "beta", "tol"):
            config["certificate"].pop(name)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def certificate_of(**fields):
    return lambda config: config["certificate"].update(fields)


def test_what_was_saved_is_read(saved):
    assert ch.load(saved).certificate_ == FITTED.certificate_
    assert_no_worse(audit(ch.load(saved), lower_bound=ch.load(saved).certificate_), FITTED.certificate_)


@pytest.mark.parametrize(
    "change",
    [
        certificate_of(dual=FITTED.certificate_.primal, gap=0.0, relative_gap=0.0),
        certificate_of(beta=0.1),
        lambda config: config["certificate"]["identity"].update(head="mlp"),
        lambda config: config["parameters"].update(pool="cls"),
        lambda config: config.update(beta_=0.1),
        lambda config: config.pop("checksum"),
        lambda config: config["history_"].clear(),
    ],
)
def test_an_edited_config_is_refused(saved, change):
    edit(saved, change)
    with pytest.raises(ch.FileFormatError, match=r"checksum of config\.json differs"):
        ch.load(saved)


def test_exchanged_weights_are_refused(saved, tmp_path):
    fit(beta=0.0201).save(tmp_path / "other")
    other = (tmp_path / "other" / "weights.safetensors").read_bytes()
    (saved / "weights.safetensors").write_bytes(other)
    with pytest.raises(ch.FileFormatError, match="other weights than were saved"):
        ch.load(saved)


CONTRADICTIONS = {
    "NaN dual": certificate_of(dual=math.nan),
    "infinite primal": certificate_of(primal=math.inf, gap=math.inf),
    "NaN gap": certificate_of(gap=math.nan),
    "NaN relative gap": certificate_of(relative_gap=math.nan),
    "text": certificate_of(dual="0.3"),
    "unknown scope": certificate_of(scope="everything"),
    "scope of gates": certificate_of(scope="sampled-gates"),
    "gap": certificate_of(gap=0.0),
    "relative gap": certificate_of(relative_gap=1e-9),
    "negative gap": certificate_of(dual=10.0, gap=FITTED.certificate_.primal - 10.0),
    "converged beyond tol": lambda config: config["parameters"].update(tol=FITTED.certificate_.relative_gap / 2),
    "converged estimate": certificate_of(scope="estimated"),
    "probability": certificate_of(failure_probability=2.0),
    "missing field": lambda config: config["certificate"].pop("dual"),
    "foreign field": certificate_of(proof="yes"),
    "classes": lambda config: config["classes"]["values"].pop(),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_refused_without_a_checksum_too(saved, name):
    edit(saved, CONTRADICTIONS[name], old=True)
    with pytest.raises(ch.FileFormatError, match="complete model"):
        ch.load(saved)


@pytest.mark.parametrize("change", ["intercept", "block", "values", "NaN"])
def test_weights_of_other_shapes_are_refused_without_a_checksum_too(saved, change):
    edit(saved, lambda config: None, old=True)
    tensors = load_file(saved / "weights.safetensors")
    tensors |= {
        "intercept": {"intercept": np.zeros(1)},
        "block": {"block": tensors["block"] + 1},
        "values": {"values": tensors["values"][:, :, :1].copy()},
        "NaN": {"values": tensors["values"] * np.nan},
    }[change]
    save_file(tensors, saved / "weights.safetensors")
    with pytest.raises(ch.FileFormatError, match="complete model"):
        ch.load(saved)


def test_an_old_model_is_read_but_is_no_reference(saved):
    edit(saved, lambda config: None, old=True)
    old = ch.load(saved)
    np.testing.assert_array_equal(old.predict(X), FITTED.predict(X))
    assert old.certificate_.dual == FITTED.certificate_.dual
    assert old.certificate_.identity is None
    with pytest.raises(ch.InputError, match="fit it again"):
        audit(FITTED, lower_bound=old.certificate_)
    # what somebody writes into it does not make it one
    edit(saved, certificate_of(identity=FITTED.certificate_.identity, beta=FITTED.beta_))
    assert ch.load(saved).certificate_.identity is None


@pytest.mark.parametrize(
    "fields", [{"identity": {"head": "mlp"}}, {"identity": "all"}, {"beta": math.nan}, {"tol": -1e-9}]
)
def test_a_certificate_checks_itself(fields):
    with pytest.raises(Exception, match=r"not a certificate|identity"):  # beartype's own error names the field
        replace(FITTED.certificate_, **fields)
    assert Certificate(**FITTED.certificate_.to_dict()) == FITTED.certificate_


# -- the command line -------------------------------------------------------------------------------------------------
def test_the_command_line_names_what_differs(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(0, 120 + 100 * (name == "a"), (8, 8, 3)).astype(np.uint8)
                image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.png")
    store = tmp_path / "tokens"
    extract = ("extract", tmp_path / "photos", "--backbone", "patches:4", "--channels", 5, "--reduce", "pca")
    assert call(*extract, "--out", store) == 0
    assert call("fit", store, "--out", tmp_path / "one", "--beta", 0.05, "--head", "mlp") == 0
    assert call("fit", store, "--out", tmp_path / "two", "--beta", 0.04, "--fit-intercept", "--head", "mlp") == 0
    capsys.readouterr()
    assert call("audit", tmp_path / "one", store, "--reference", tmp_path / "two") == 1
    told = capsys.readouterr().err
    assert "another intercept: fitted instead of none" in told
    assert "another beta: 0.04 instead of 0.05" in told
    assert "bug" not in told
    assert call("audit", tmp_path / "one", store, "--reference", tmp_path / "one") == 0
    assert "lower bound" in capsys.readouterr().out.replace("\n", " ")
    assert call("audit", tmp_path / "one", store, "--reference", tmp_path / "one", "--json") == 0
    assert json.loads(capsys.readouterr().out)["reference"]["dual"] == ch.load(tmp_path / "one").certificate_.dual
    assert call("audit", tmp_path / "one", store, "--beta", 0) == 1
    assert "beta must be a positive number" in capsys.readouterr().err
    # principal components are known by their files, whoever reads them and however much at a time
    train, one = ch.TokenStore.open(store)["train"], ch.load(tmp_path / "one").certificate_
    again = ch.ConvexHeadClassifier("mlp", beta=0.05, max_memory=2000.0).fit(train)
    assert again.certificate_.identity == one.identity
    with pytest.raises(ch.InputError, match="pass the store, not an array"):
        audit(again, train.read(), train.labels, beta=0.05, lower_bound=one)
