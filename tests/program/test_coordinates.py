"""Solved at any offset and scale: coordinates that change nothing, against independent optima of the moved data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_iris
from sklearn.linear_model import Ridge

import convexhead as ch
from convexhead.program.activations import make_activation
from convexhead.program.coordinates import Coordinates
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy, Huber, Squared
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem

rng = np.random.default_rng(0)
X3, LABELS = rng.normal(size=(60, 9, 4)), np.arange(60) % 3
IRIS = load_iris(return_X_y=True)


def ridge_logistic(X, y, beta):
    """``min (1/n) Σ ℓ + β/2 ‖W‖²`` with a free intercept, by scipy on tokens that are centred."""
    n, (d, c) = len(X), (X.shape[1], y.max() + 1)
    Y = np.eye(c)[y]

    def value(x):
        W, b = x[: d * c].reshape(d, c), x[d * c :]
        f = X @ W + b
        f = f - f.max(1, keepdims=True)
        logs = np.log(np.exp(f).sum(1, keepdims=True))
        R = (np.exp(f - logs) - Y) / n
        gradient = np.concatenate([(X.T @ R + beta * W).ravel(), R.sum(0)])
        return -(Y * (f - logs)).sum() / n + beta / 2 * (W**2).sum(), gradient

    return minimize(value, np.zeros((d + 1) * c), jac=True, method="BFGS", options={"gtol": 1e-9}).fun


@pytest.mark.parametrize("scale", [1e-16, 1e10, 1e13, 1e16, 1e20])
def test_a_linear_head_is_solved_where_its_weight_is_tiny_beside_its_tokens(scale):
    """The gap is then far below what rounding leaves of the objective, in float32 and in float64."""
    rng = np.random.default_rng(0)
    model = ch.ConvexHeadClassifier("linear", beta_ratio=0.1, max_time=30.0)
    model.fit(rng.normal(size=(20, 3, 4)) * scale, np.arange(20) % 2)
    assert model.certificate_.converged


def test_a_linear_head_that_rounding_hides_ends_with_an_honest_gap():
    """At 1e30 the gradient that would prove the optimum is below rounding: no more steps are taken than find any."""
    X, y = np.random.default_rng(0).normal(size=(20, 3, 4)), np.arange(20) % 2
    big = ch.ConvexHeadClassifier("linear", beta_ratio=0.1).fit(X * 1e30, y)
    same = ch.ConvexHeadClassifier("linear", beta_ratio=0.1).fit(X * 1e16, y)
    assert big.certificate_.dual <= same.certificate_.primal == pytest.approx(big.certificate_.primal, rel=1e-9)
    assert not big.certificate_.converged
    assert len(big.history_) < 1000


@pytest.mark.parametrize("offset", [0, 1e4, 1e8])
def test_a_linear_head_is_solved_wherever_its_tokens_lie(offset):
    X, y = IRIS
    model = ch.ConvexHeadClassifier("linear", beta=0.05, fit_intercept=True, tol=1e-6).fit(X + offset, y)
    certificate, best = model.certificate_, ridge_logistic(X - X.mean(0), y, 0.05)
    assert certificate.converged
    # At 1e8 the sum itself loses digits of the tokens.
    assert certificate.primal == pytest.approx(best, rel=2e-6 if offset < 1e8 else 1e-5)
    assert certificate.dual <= best * (1 + 1e-6 * (offset == 1e8))
    assert (model.predict(X + offset) == y).mean() > 0.95
    audit = ch.certify(model, X + offset, y, beta=0.05, tol=1e-4)
    assert audit.primal == pytest.approx(certificate.primal, rel=1e-9)
    assert audit.converged


def test_single_precision_tokens_are_moved_in_double():
    X = rng.normal(size=(2000, 16)).astype(np.float32) + np.float32(1e4)
    y = (X[:, 0] > 1e4).astype(int)
    model = ch.ConvexHeadClassifier("linear", beta=0.01, fit_intercept=True, tol=1e-5).fit(X, y)
    centred = X.astype(np.float64) - X.astype(np.float64).mean(0)
    assert model.certificate_.converged
    assert model.certificate_.primal == pytest.approx(ridge_logistic(centred, y, 0.01), rel=2e-5)


@pytest.mark.parametrize("mean", [0, 1e3, 1e6, 1e9])
def test_targets_far_from_zero_cost_nothing(mean):
    X = rng.normal(size=(100, 5))
    y = X @ np.ones(5) + 0.1 * rng.normal(size=100)
    y = (y + mean) - mean  # what the targets keep of it
    model = ch.ConvexHeadRegressor("linear", beta=0.05, fit_intercept=True, tol=1e-6).fit(X, y + mean)
    ridge = Ridge(alpha=100 * 0.05, tol=1e-12).fit(X, y)
    best = np.square(y - ridge.predict(X)).mean() / 2 + 0.025 * np.square(ridge.coef_).sum()
    assert model.certificate_.converged
    assert model.certificate_.primal == pytest.approx(best, rel=1e-6)
    np.testing.assert_allclose(model.coef_[:, 0], ridge.coef_, atol=2e-3)
    assert model.intercept_[0] - mean == pytest.approx(ridge.intercept_, abs=2e-3)


@pytest.mark.parametrize("activation", ["linear", "gated-relu"])
@pytest.mark.parametrize("head", ["self-attention", "mlp-mixer", "fno", "block-fno", "mlp"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_head_with_an_intercept_is_solved_at_an_offset(head, activation, pool):
    options = {"n_blocks": 2, "activation": activation, "n_gates": 3, "random_state": 0, "pool": pool}
    model = ch.ConvexHeadClassifier(head, beta_ratio=0.1, fit_intercept=True, **options).fit(X3 + 30, LABELS)
    assert model.certificate_.converged
    if activation == "linear" and head != "self-attention":
        plain = ch.ConvexHeadClassifier(head, beta=model.beta_, fit_intercept=True, **options).fit(X3, LABELS)
        assert model.certificate_.primal == pytest.approx(plain.certificate_.primal, rel=1e-3)
        np.testing.assert_allclose(model.beta_max_, plain.beta_max_, rtol=1e-6)
        np.testing.assert_allclose(model.predict_proba(X3 + 30), plain.predict_proba(X3), atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e3, 2e4, 1e30])
@pytest.mark.parametrize(
    ("head", "activation"),
    [
        (head, activation)
        for head in ("self-attention", "mlp-mixer", "fno", "mlp")
        for activation in ("linear", "gated-relu")
    ]
    + [("linear", "linear"), ("mlp", "relu")],
)
def test_any_scale_of_tokens_is_the_same_problem(head, activation, scale):
    X, y = (X3[:5, :1, :2], LABELS[:5] % 2) if activation == "relu" else (X3, LABELS)

    def fitted(X, scale=1.0):
        options = {"activation": activation, "n_gates": 3, "random_state": 0, "beta_ratio": 0.5}
        if head == "linear":  # W/c costs 1/c² times as much
            options["beta"] = 0.01 * scale**2
        return ch.ConvexHeadClassifier(head, **options).fit(X, y)

    degree = 3 if head == "self-attention" else 1
    with np.errstate(all="raise"):
        one, other = fitted(X), fitted(X * scale, scale)
    assert other.certificate_.primal == pytest.approx(one.certificate_.primal, rel=2e-3)
    assert other.certificate_.converged == one.certificate_.converged
    assert math.log(other.beta_max_) == pytest.approx(math.log(one.beta_max_) + degree * math.log(scale), abs=1e-2)
    np.testing.assert_allclose(other.predict_proba(X * scale), one.predict_proba(X), atol=0.02)


def test_weights_beyond_float64_are_named():
    with pytest.raises(ch.InputError, match="beta_max is about 1e"):
        ch.beta_max(X3 * 1e150, LABELS)
    with pytest.raises(ch.InputError, match="beta_max is about 1e-"):
        ch.ConvexHeadClassifier("self-attention").fit(X3 * 1e-150, LABELS)


def test_channels_of_unequal_scales_are_solved():
    X = rng.normal(size=(500, 16))
    y = (X @ rng.normal(size=(16, 3))).argmax(1)
    X = X * 10 ** rng.uniform(-3, 3, 16)
    for beta_ratio in (1e-2, 1e-5):
        model = ch.ConvexHeadClassifier("linear", beta_ratio=beta_ratio, fit_intercept=True).fit(X, y)
        assert model.certificate_.converged


@pytest.mark.parametrize("delta", [1e-2, 1e-4, 1e-6])
def test_a_huber_loss_of_tiny_delta_is_solved(delta):
    X = rng.normal(size=(60, 3))
    y = X @ np.ones(3) + 5 + 0.1 * rng.normal(size=60)
    model = ch.ConvexHeadRegressor("linear", loss=Huber(delta), beta_ratio=0.1, fit_intercept=True).fit(X, y)
    assert model.certificate_.converged
    assert model.intercept_[0] == pytest.approx(5, abs=0.2)


@pytest.mark.parametrize("loss", [Squared(), Huber(1e-3), Huber(1e-8)])
def test_intercepts_of_regressions_are_exact(loss):
    from convexhead.program.intercept import solve_intercept

    Y = torch.from_numpy(rng.normal(size=(41, 1, 3)) * [1, 1e-3, 1e3] + [0, 5, 1e6])
    head = make_head("linear", 1, 2)
    problem = Problem(Operator(torch.zeros(41, 1, 2).double(), head, make_activation("linear", head, None)), Y, loss)
    b = solve_intercept(problem, torch.zeros_like(Y))
    if isinstance(loss, Squared):
        torch.testing.assert_close(b, Y.mean((0, 1)), rtol=1e-14, atol=1e-14)
    for k in range(3):  # convex in each: no step to either side is better
        for step in (1e-6, -1e-6):
            moved = b.clone()
            moved[k] += step * (1 + abs(float(b[k])))
            lowest, other = (problem.data_term(x.expand_as(Y)) for x in (b, moved))
            assert lowest <= other * (1 + 1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_an_intercept_of_saturated_outputs_is_found(seed):
    """Newton's first step leads where the residual is small since probabilities are 0 and 1, and the loss is large."""
    from convexhead.program.intercept import solve_intercept

    generator = torch.Generator().manual_seed(seed)
    f = 20 * torch.randn(11, 1, 3, generator=generator, dtype=torch.float64)
    Y = torch.nn.functional.one_hot(torch.randint(3, (11, 1), generator=generator), 3)
    head = make_head("linear", 1, 2)
    operator = Operator(torch.zeros(11, 1, 2).double(), head, make_activation("linear", head, None))
    problem = Problem(operator, Y, CrossEntropy(), fit_intercept=True)
    b = solve_intercept(problem, f)
    assert float(problem.residual(f + b).sum((0, 1)).abs().sum()) < 1e-8
    assert problem.data_term(f + b) <= problem.data_term(f)


@pytest.mark.parametrize("pool", ["mean", "cls", "none"])
@pytest.mark.parametrize("outputs", ["shared", "grouped"])
@pytest.mark.parametrize("name", ["linear", "mlp", "fno", "block-fno", "mlp-mixer", "self-attention"])
def test_coordinates_keep_outputs_and_objective(name, pool, outputs):
    torch.manual_seed(0)
    head = make_head(name, 6, 4, pool=pool, grid=(2, 3), n_blocks=2, outputs=outputs)
    activation = make_activation("linear", head, None)
    X = 1000 * (torch.randn(9, 6, 4).double() + torch.tensor([50.0, 0, -3, 7]))
    Y = torch.randn(9, head.r, 4).double() + 40
    stated = Problem(Operator(X, head, activation), Y, Squared(), fit_intercept=True)
    coordinates = Coordinates.of(X, Y, head, activation, Squared(), True)
    assert (coordinates.origin is None) == (name == "self-attention" or (name == "mlp-mixer" and pool == "none"))
    assert coordinates.exponent
    assert coordinates.target_origin is not None
    inner, atoms = stated.in_coordinates(coordinates), stated.empty()
    k, block = (1, torch.zeros(1)) if name == "linear" else (3, torch.tensor([0, 1, 1]) % activation.n_blocks)
    U = torch.randn(k, *head.mixing_shape).double() if head.learns_mixing else torch.ones(1).double()
    V = stated.mask_values(torch.randn(k, *stated.value_shape).double(), block.long())
    atoms = type(atoms)(U, V, block.long(), torch.randn(4).double())
    entered = inner.enter(atoms)
    f, g = stated.outputs(atoms), inner.outputs(entered)
    g = g if coordinates.target_origin is None else g + coordinates.target_origin
    torch.testing.assert_close(g, f, rtol=1e-9, atol=1e-9 * float(f.abs().max()))
    penalties = stated.penalty(atoms) * 2.5, inner.penalty(entered) * coordinates.beta(2.5)
    assert penalties[1] == pytest.approx(penalties[0], rel=1e-12)
    for part, again in zip(vars(atoms).values(), vars(inner.leave(entered)).values(), strict=True):
        torch.testing.assert_close(part, again, rtol=1e-9, atol=1e-9 * (1 + float(part.abs().max())))


def test_masks_and_other_losses_keep_their_origin():
    head = make_head("mlp", 1, 4)
    X, Y = torch.randn(9, 1, 4).double() + 50, torch.randn(9, 1, 1).double() + 50
    gated = make_activation("gated-relu", head, torch.randn(2, 4).double())

    class Own(Squared):
        def value(self, f, y):
            return super().value(f, y) * (1 + y.abs().sum((1, 2)))

    assert not Coordinates.of(X, Y, head, gated, CrossEntropy(), True)
    assert Coordinates.of(X, Y, head, make_activation("linear", head, None), Own(), True).target_origin is None
    assert not Coordinates.of(X, Y, head, make_activation("linear", head, None), Squared(), False)


def test_weights_that_rounding_spoils_are_charged():
    """At an offset of 1e13 the intercept in float64 keeps some three digits, and the certificate knows."""
    X, y = np.round(rng.normal(size=(50, 1)) * 64) / 64, np.arange(50) % 2
    model = ch.ConvexHeadClassifier("linear", beta=1e-3, fit_intercept=True).fit(X + 1e13, y)
    offset = [float((model.coef_[0, k] * (X[0, 0] + 1e13)) + model.intercept_[k]) for k in range(2)]
    assert all(map(math.isfinite, offset))
    plain = ch.ConvexHeadClassifier("linear", beta=1e-3, fit_intercept=True, tol=1e-9).fit(X, y).certificate_
    assert model.certificate_.dual <= plain.primal
    assert model.certificate_.primal >= plain.dual


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("value", [0.0, 7.3, 1e9])
def test_constant_targets_are_met_exactly(head, value):
    X = rng.normal(size=(20, 3))
    model = ch.ConvexHeadRegressor(head, fit_intercept=True).fit(X, np.full(20, value))
    assert model.certificate_.converged
    assert model.certificate_.gap == 0
    np.testing.assert_allclose(model.predict(X), value, rtol=1e-12)


def test_two_samples_duplicates_and_beta_beyond_beta_max():
    X, y = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0, 1])
    for beta in (1e-8, 1e-2, 1e3):
        model = ch.ConvexHeadClassifier("linear", beta=beta, fit_intercept=True, tol=1e-6).fit(X, y)
        assert model.certificate_.converged
        assert model.certificate_.primal == pytest.approx(ridge_logistic(X - 0.5, y, beta), rel=1e-5, abs=1e-9)
    X, y = np.repeat(X3[:, 0], 2, 0), np.repeat(LABELS, 2)
    once = ch.ConvexHeadClassifier("mlp", beta=0.02, tol=1e-6).fit(X3[:, 0], LABELS).certificate_
    twice = ch.ConvexHeadClassifier("mlp", beta=0.02, tol=1e-6).fit(X, y).certificate_
    assert twice.primal == pytest.approx(once.primal, rel=2e-6)
    largest = ch.beta_max(X, y, head="mlp", fit_intercept=True)
    zero = ch.ConvexHeadClassifier("mlp", beta=100 * largest, fit_intercept=True).fit(X, y)
    assert zero.n_heads_ == 0
    assert zero.certificate_.primal == pytest.approx(math.log(3), rel=1e-12)
    assert zero.certificate_.converged
