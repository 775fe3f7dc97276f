"""Weights, soft and several labels, masks: against CVXPY, against repeated samples, and against losses written out."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convexhead as ch
from convexhead.program.losses import BinaryCrossEntropy, CrossEntropy, Huber, Squared, with_positive_weights
from convexhead.program.sample_losses import SampleLosses

N, S, D, C = 14, 3, 2, 3
RNG = np.random.default_rng(7)
X = RNG.normal(size=(N, S, D))
LABELS = np.arange(N) % C
SOFT = RNG.dirichlet(np.ones(C), size=N)
MANY = (RNG.random((N, C)) < 0.4).astype(float)
TOKEN_LABELS = RNG.integers(-1, C, size=(N, S))
TOKEN_SOFT = RNG.dirichlet(np.ones(C), size=(N, S))
NUMBERS = RNG.normal(size=(N, C)) + 2
DEPTHS = RNG.normal(size=(N, S, 1)) - 3
W = RNG.integers(0, 4, size=N) * 0.7
W[:3] = 1.0
TOKEN_W = RNG.random((N, S)) * (RNG.random((N, S)) < 0.7)
ENTRY_W = RNG.random((N, C)) * (RNG.random((N, C)) < 0.8)
BETA = 0.03


# -- the programs in CVXPY, from the formulas -------------------------------------------------------------------------
def cross_entropy(f, y):
    return cp.log_sum_exp(f, axis=1) - cp.sum(cp.multiply(y, f), axis=1)


def binary(pos_weight=1.0):
    def entries(f, y):
        ones, zeros = cp.multiply(pos_weight * y, cp.logistic(-f)), cp.multiply(1 - y, cp.logistic(f))
        return ones + zeros

    return entries


def squared(f, y):
    return cp.square(f - y) / 2


def huber(f, y):
    return cp.huber(f - y, 1.0) / 2


def optimum(features, y, w, loss, *, ridge=False):
    """``min (1/W) Σ w ℓ + β ‖Z‖`` over outputs ``features @ Z + b``; ``w`` of rows or of entries."""
    Z, b = cp.Variable((features.shape[1], y.shape[1])), cp.Variable((1, y.shape[1]))
    f = features @ Z + np.ones((len(features), 1)) @ b
    total = loss(f, y)
    w = np.asarray(w, float)
    if total.ndim == 2 and w.ndim == 1:
        total = cp.sum(total, axis=1)
    penalty = cp.sum_squares(Z) / 2 if ridge else cp.normNuc(Z)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(w, total)) / w.sum() + BETA * penalty))
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return problem.value


MEAN, TOKENS = X.mean(1), X.reshape(N * S, D)
BALANCED = N / (C * np.bincount(LABELS))[LABELS]
SMOOTH = 0.8 * np.eye(C)[LABELS] + 0.2 / C
COUNTED = (TOKEN_LABELS >= 0).ravel()
CLASSES, ONE_HOT = ch.ConvexHeadClassifier, np.eye(C)
PROBLEMS = {
    "labels": (CLASSES(), LABELS, W, MEAN, ONE_HOT[LABELS], W, cross_entropy),
    "balanced": (CLASSES(class_weight="balanced"), LABELS, None, MEAN, ONE_HOT[LABELS], BALANCED, cross_entropy),
    "smoothed": (CLASSES(label_smoothing=0.2), LABELS, W, MEAN, SMOOTH, W, cross_entropy),
    "soft": (CLASSES(), SOFT, W, MEAN, SOFT, W, cross_entropy),
    "several": (CLASSES(loss="binary-cross-entropy"), MANY, W, MEAN, MANY, W, binary()),
    "several, soft": (CLASSES(loss="binary-cross-entropy"), SOFT, W, MEAN, SOFT, W, binary()),
    "several, positive": (
        CLASSES(loss="binary-cross-entropy", pos_weight=2.5),
        MANY,
        W,
        MEAN,
        MANY,
        W,
        binary(2.5),
    ),
    "several, entries": (CLASSES(loss="binary-cross-entropy"), MANY, ENTRY_W, MEAN, MANY, ENTRY_W, binary()),
    "tokens": (
        CLASSES(pool=None),
        TOKEN_LABELS,
        None,
        TOKENS,
        ONE_HOT[TOKEN_LABELS.ravel()],
        COUNTED,
        cross_entropy,
    ),
    "tokens, weighed": (
        CLASSES(pool=None),
        TOKEN_LABELS,
        TOKEN_W,
        TOKENS,
        ONE_HOT[TOKEN_LABELS.ravel()],
        COUNTED * TOKEN_W.ravel(),
        cross_entropy,
    ),
    "tokens, soft": (
        CLASSES(pool=None),
        TOKEN_SOFT,
        TOKEN_W,
        TOKENS,
        TOKEN_SOFT.reshape(-1, C),
        TOKEN_W.ravel(),
        cross_entropy,
    ),
    "numbers": (ch.ConvexHeadRegressor(), NUMBERS, W, MEAN, NUMBERS, W, squared),
    "numbers, entries": (ch.ConvexHeadRegressor(loss="huber"), NUMBERS, ENTRY_W, MEAN, NUMBERS, ENTRY_W, huber),
    "depth": (
        ch.ConvexHeadRegressor(pool=None),
        DEPTHS,
        TOKEN_W,
        TOKENS,
        DEPTHS.reshape(-1, 1),
        TOKEN_W.ravel(),
        squared,
    ),
    "depth, huber": (
        ch.ConvexHeadRegressor(pool=None, loss="huber"),
        DEPTHS,
        TOKEN_W[..., None],
        TOKENS,
        DEPTHS.reshape(-1, 1),
        TOKEN_W.reshape(-1, 1),
        huber,
    ),
}


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_optimum_is_that_of_an_independent_solver(name, head):
    estimator, y, sample_weight, features, Y, w, loss = PROBLEMS[name]
    estimator.set_params(head=head, beta=BETA, tol=1e-9, fit_intercept=True)
    certificate = estimator.fit(X, y, sample_weight).certificate_
    truth = optimum(features, Y, w, loss, ridge=head == "linear")
    assert certificate.converged
    assert certificate.primal == pytest.approx(truth, rel=1e-6)
    assert certificate.dual <= truth * (1 + 1e-8)
    again = ch.certify(estimator, X, y, sample_weight, beta=BETA)
    assert again.identity == certificate.identity
    assert again.primal == pytest.approx(certificate.primal, rel=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_module_and_saved_model_are_the_same_function(name, tmp_path):
    estimator, y, sample_weight, *_ = PROBLEMS[name]
    estimator.set_params(head="self-attention", beta=BETA, tol=1e-6, fit_intercept=True).fit(X, y, sample_weight)
    estimator.save(tmp_path / "model")
    read = ch.load(tmp_path / "model")
    assert np.array_equal(read.predict(X), estimator.predict(X))
    f = estimator.to_module(torch.float64)(torch.from_numpy(X)).detach().numpy()
    assert np.allclose(f.reshape(N, -1), estimator.model_.outputs(X).reshape(N, -1), atol=1e-12)
    assert read.score(X, y, sample_weight) == pytest.approx(estimator.score(X, y, sample_weight))


# -- weights are repetitions ------------------------------------------------------------------------------------------
HEADS = ["self-attention", "mlp-mixer", "fno", "block-fno", "mlp", "linear", "attentive"]
TIMES = np.array([1, 2, 0, 3, 1, 0, 1, 2, 1, 0, 1, 3, 1, 1])
REPEATED = np.repeat(np.arange(N), TIMES)
KINDS = {
    "labels": (ch.ConvexHeadClassifier, {}, LABELS),
    "balanced": (ch.ConvexHeadClassifier, {"class_weight": "balanced"}, LABELS),
    "several": (ch.ConvexHeadClassifier, {"loss": "binary-cross-entropy", "pos_weight": 0.5}, MANY),
    "tokens": (ch.ConvexHeadClassifier, {"pool": None}, TOKEN_LABELS),
    "depth": (ch.ConvexHeadRegressor, {"pool": None, "loss": "huber"}, DEPTHS),
}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_two_is_twice_and_of_zero_is_not_there(head, kind):
    estimator, options, y = KINDS[kind]
    if head == "block-fno":
        options = {**options, "n_blocks": 2}
    if head == "attentive" and "pool" in options:
        pytest.skip("it pools tokens by its queries")
    settings = {"head": head, "beta": 0.02, "tol": 2e-9, "fit_intercept": True, "random_state": 0, **options}
    weighed = estimator(**settings).fit(X, y, TIMES)
    repeated = estimator(**settings).fit(X[REPEATED], y[REPEATED])
    assert weighed.certificate_.primal == pytest.approx(repeated.certificate_.primal, rel=1e-9)
    assert weighed.beta_max_ == pytest.approx(repeated.beta_max_, rel=1e-9)
    assert weighed.score(X, y, TIMES) == pytest.approx(repeated.score(X[REPEATED], y[REPEATED]), abs=1e-4)
    audit = ch.certify(weighed, X[REPEATED], y[REPEATED], beta=0.02)
    assert audit.primal == pytest.approx(weighed.certificate_.primal, rel=1e-9)


def test_gates_are_those_of_the_samples_that_count():
    settings = {"head": "mlp", "activation": "gated-relu", "n_gates": "all", "beta": 0.02, "random_state": 0}
    few, w = X[:6, :1], np.array([1, 0, 2, 1, 0, 1])
    weighed = ch.ConvexHeadClassifier(**settings).fit(few, LABELS[:6], w)
    left = ch.ConvexHeadClassifier(**settings).fit(few[w > 0], LABELS[:6][w > 0], w[w > 0])
    assert np.array_equal(weighed.gates_, left.gates_)
    assert weighed.certificate_.identity == left.certificate_.identity


def test_a_relu_head_is_certified_with_weights():
    y = np.maximum(X[:, 0, 0], 0)
    settings = {"head": "mlp", "activation": "relu", "beta": 1e-3, "random_state": 0}
    weighed = ch.ConvexHeadRegressor(**settings).fit(X[:, :1], y, TIMES).certificate_
    repeated = ch.ConvexHeadRegressor(**settings).fit(X[REPEATED][:, :1], y[REPEATED]).certificate_
    assert weighed.scope == "global"
    assert weighed.converged
    assert weighed.primal == pytest.approx(repeated.primal, rel=2e-3)
    assert weighed.dual <= repeated.primal * (1 + 1e-12)


def test_anything_may_stand_where_the_weight_is_zero():
    holes = DEPTHS.copy()
    holes[TOKEN_W == 0] = np.nan
    settings = {"pool": None, "beta": BETA, "tol": 1e-6}
    with_holes = ch.ConvexHeadRegressor(**settings).fit(X, holes, TOKEN_W)
    assert (
        with_holes.certificate_.primal == ch.ConvexHeadRegressor(**settings).fit(X, DEPTHS, TOKEN_W).certificate_.primal
    )
    with pytest.raises(ch.InputError, match="NaN"):
        ch.ConvexHeadRegressor(**settings).fit(X, holes)


def test_weights_belong_to_the_problem():
    clf = ch.ConvexHeadClassifier(beta=BETA).fit(X, LABELS, W)
    assert ch.ConvexHeadClassifier(beta=BETA).fit(X, LABELS, 4 * W).certificate_.identity == clf.certificate_.identity
    same = ch.certify(clf, X, LABELS, W, beta=BETA, lower_bound=clf.certificate_)
    assert same.dual >= clf.certificate_.dual
    for other in (None, np.roll(W, 1) + 0.1):
        with pytest.raises(ch.InputError, match="other sample weights"):
            ch.certify(clf, X, LABELS, other, beta=BETA, lower_bound=clf.certificate_)


def test_equal_weights_are_no_weights():
    plain = ch.ConvexHeadClassifier(beta=BETA).fit(X, LABELS).certificate_
    assert ch.ConvexHeadClassifier(beta=BETA).fit(X, LABELS, np.full(N, 3.0)).certificate_.to_dict() == plain.to_dict()
    assert ch.ConvexHeadClassifier(beta=BETA).fit(X, ONE_HOT[LABELS]).certificate_.primal == plain.primal


def test_a_path_is_weighed_too():
    rows = ch.regularization_path(X, LABELS, W, beta_ratios=[0.5, 0.1], tol=1e-6)
    for row in rows:
        alone = ch.ConvexHeadClassifier(beta=row["beta"], tol=1e-6).fit(X, LABELS, W)
        assert row["objective"] == pytest.approx(alone.certificate_.primal, rel=1e-5)
    assert rows[0]["beta"] == pytest.approx(0.5 * ch.beta_max(X, LABELS, W))


# -- the losses of samples --------------------------------------------------------------------------------------------
def weights_of(kind: str, shape: tuple[int, int, int], rng: np.random.Generator) -> torch.Tensor | None:
    n, r, c = shape
    sizes = {"none": None, "samples": (n, 1, 1), "rows": (n, r, 1), "entries": (n, r, c)}[kind]
    return None if sizes is None else torch.from_numpy(rng.random(sizes) * (rng.random(sizes) < 0.7))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["none", "samples", "rows", "entries"]), st.integers(0, 10**6))
def test_losses_of_samples_are_sums_written_out(kind, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 5, size=3).tolist())
    losses = [Squared(), Huber(0.5), BinaryCrossEntropy()] + [CrossEntropy()] * (kind != "entries")
    loss = losses[seed % len(losses)]
    f, Y = torch.from_numpy(rng.normal(size=shape)), torch.from_numpy(rng.dirichlet(np.ones(shape[2]), size=shape[:2]))
    omega = weights_of(kind, shape, rng)
    mine = SampleLosses(loss, Y, omega)
    full = torch.ones(1).double().expand(shape) if omega is None else omega.expand(shape)
    q = mine.dual_point(f)
    value, conjugate = torch.zeros(shape[0]).double(), torch.zeros(shape[0]).double()
    for i in range(shape[0]):
        for row in range(shape[1]):
            if loss.separates == "rows":
                w, part = full[i, row, 0], (slice(i, i + 1), slice(row, row + 1))
                value[i] += w * loss.value(f[part], Y[part])[0]
                conjugate[i] += w * loss.conjugate(q[part], Y[part])[0]
                continue
            for k in range(shape[2]):
                part = (slice(i, i + 1), slice(row, row + 1), slice(k, k + 1))
                value[i] += full[i, row, k] * loss.value(f[part], Y[part])[0]
                conjugate[i] += full[i, row, k] * loss.conjugate(q[part], Y[part])[0]
    torch.testing.assert_close(mine.value(f), value)
    torch.testing.assert_close(mine.conjugate(q), conjugate)
    assert torch.equal(mine.residual(f), mine.weigh(q))
    both = mine.value_and_residual(f)
    torch.testing.assert_close(both[0], value)
    torch.testing.assert_close(both[1], mine.residual(f))
    torch.testing.assert_close(value + conjugate, (f * mine.residual(f)).sum((1, 2)))
    z = torch.from_numpy(rng.normal(size=(2, *shape)))
    bent = torch.func.jvp(mine.residual, (f,), (z[1],))[1]
    torch.testing.assert_close(mine.hessian_times(f, z)[1], bent)
    units = [mine.hessian_times(f, e.expand(shape)).sum((0, 1)) for e in torch.eye(shape[2]).double()]
    torch.testing.assert_close(mine.summed_hessian(f), torch.stack(units))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_a_point_without_sum_stays_in_the_domain_and_costs_no_more_than_stated(seed, log_weight):
    """Of binary cross-entropy with any weights: the sum is taken away, and the conjugate rises by less than charged."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 7, size=3).tolist())
    Y = torch.from_numpy((rng.random(shape) < rng.random()).astype(float) if seed % 3 else rng.random(shape))
    omega = torch.from_numpy(np.exp(log_weight * rng.normal(size=shape)))
    q = torch.from_numpy(rng.random(shape)) - Y
    mine, loss = SampleLosses(BinaryCrossEntropy(), Y, omega), BinaryCrossEntropy()

    def total(x):
        return mine.weigh(x).sum((0, 1))

    moved = loss.without_sum(q, Y, total(q), total(Y), omega.sum((0, 1)))
    size = total(torch.ones_like(Y))
    assert (total(moved).abs() <= 1e-12 * size).all()
    assert torch.isfinite(mine.conjugate((1 - 1e-12) * moved)).all()
    before, after = (float(mine.conjugate(x).sum()) / shape[0] for x in ((1 - 1e-12) * q, (1 - 1e-12) * moved))
    left = total(q).abs()
    charged = loss.cost_of_sum(left, total(Y), size, abs(before), 0.0, shape[0])
    assert after <= before + charged + 1e-9 * abs(before)


def test_positive_weights_are_weights_of_entries():
    f, Y = torch.randn(5, 1, 4).double(), torch.rand(5, 1, 4).double()
    Y[0] = 1
    positive = torch.tensor([0.5, 1.0, 2.0, 7.0]).double()
    moved, weights = with_positive_weights(Y, positive)
    mine = SampleLosses(BinaryCrossEntropy(), moved, weights).value(f)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(f, Y, pos_weight=positive, reduction="none")
    torch.testing.assert_close(mine, theirs.sum((1, 2)))


# -- tokens that stay on disk ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_tokens_on_disk_are_weighed_as_in_memory(tmp_path):
    images = RNG.integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(40) % 3)
    ch.tokens.extract(f"npz:{tmp_path / 'images.npz'}", "patches:4", tmp_path / "store", shard_size=8, dtype="float32")
    stored = ch.TokenStore.open(tmp_path / "store")["train"]
    w = RNG.random(40) * (np.arange(40) % 4 > 0)
    settings = {"beta_ratio": 0.1, "tol": 1e-6, "fit_intercept": True, "random_state": 0}
    mapped = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", stored.dtype, stored.shape)
    mapped[:] = np.asarray(stored)
    inside = ch.ConvexHeadClassifier(**settings).fit(np.asarray(stored), stored.labels, w)
    for outside in (stored, np.load(tmp_path / "X.npy", mmap_mode="r")):
        clf = ch.ConvexHeadClassifier(max_memory=2e4, **settings).fit(outside, stored.labels, w)
        assert clf.certificate_.identity == inside.certificate_.identity
        assert clf.certificate_.primal == pytest.approx(inside.certificate_.primal, rel=1e-6)
        assert clf.score(outside, stored.labels, w) == inside.score(np.asarray(stored), stored.labels, w)
        again = ch.certify(clf, outside, stored.labels, w, beta=clf.beta_, lower_bound=clf.certificate_)
        assert again.identity == clf.certificate_.identity
