"""Rounding is charged: bounds hold where features cancel, losses vanish, intercepts are far and numbers overflow.

Objectives are recomputed in extended precision (`mpmath`) from the features as given, so that the truth does not round.
"""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import convexhead as ch
import convexhead.certificate.certify
from convexhead.certificate.certify import certify_atoms
from convexhead.certificate.dual import DualPoint
from convexhead.certificate.spectral_bound import KrylovBound
from convexhead.drive import solve
from convexhead.errors import InputError
from convexhead.linalg.gradient_matrices import GradientMatrices, formed_norm
from convexhead.program.activations import make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.heads import HEADS, Head, make_head
from convexhead.program.loss_check import check_loss
from convexhead.program.losses import CrossEntropy, Huber, Loss, Squared, make_loss
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.program.sample_losses import pairwise_additions, pairwise_sum
from kinds import head_of, pooled
from reference import attend, mix, pool


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(60):
        yield


def exact(value: float) -> mpmath.mpf:
    return mpmath.mpf(float(value))


def exact_loss(loss: str, f: list[mpmath.mpf], y: np.ndarray) -> mpmath.mpf:
    """One row's."""
    if loss == "cross-entropy":
        return mpmath.log(sum(mpmath.exp(x) for x in f)) - sum(exact(t) * x for t, x in zip(y, f, strict=True))
    off = [abs(x - exact(t)) for t, x in zip(y, f, strict=True)]
    if loss == "squared":
        return sum(t * t for t in off) / 2
    return sum(t * t / 2 if t <= 1 else t - mpmath.mpf(1) / 2 for t in off)


def exact_objective(
    X: np.ndarray, Y: np.ndarray, loss: str, beta: float, W: np.ndarray, b: list[mpmath.mpf], *, ridge: bool
) -> mpmath.mpf:
    """Of ``f = X W + b`` with one token a sample; the nuclear norm of a ``W`` of one atom."""
    total = mpmath.mpf(0)
    for x, y in zip(X, Y, strict=True):
        f = [
            sum(exact(a) * exact(w) for a, w in zip(x, column, strict=True)) + c
            for column, c in zip(W.T, b, strict=True)
        ]
        total += exact_loss(loss, f, y)
    square = sum(exact(w) ** 2 for w in W.ravel())
    return total / len(X) + exact(beta) * (square / 2 if ridge else mpmath.sqrt(square))


def offset_problem(head: str, loss: str, offset: float, seed: int) -> tuple[Problem, Problem]:
    """Two classes or one target, two features far from 0; and the same program with features less a constant."""
    rng = np.random.default_rng(seed)
    X = torch.as_tensor(rng.normal(size=(9, 1, 2)) + offset)
    z = rng.normal(size=9) + (X - X.mean(0))[:, 0, 0].numpy()
    Y = np.eye(2)[(z > 0).astype(int)] if loss == "cross-entropy" else z[:, None]
    made = make_head(head, 1, 2)

    def problem(X: torch.Tensor) -> Problem:
        Z = torch.as_tensor(Y)[:, None]
        return Problem(Operator(X, made, make_activation("linear", made, None)), Z, make_loss(loss), fit_intercept=True)

    return problem(X), problem(X - X[:1])  # of near numbers: exact, or nearly so


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross-entropy", "squared", "huber"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_bounds_hold_whatever_the_offset_of_the_features(head, loss):
    """The optimal intercept is ``−offset · w``: no box holds it, and offsets multiply what rounding leaves."""
    for i, exponent in enumerate((0, 4, 7, 9, 12, 14)):
        far, near = offset_problem(head, loss, 10.0**exponent, seed=i)
        beta = 1e-3
        solved = solve(near, beta, tol=1e-9, max_time=2.0, generator=torch.Generator().manual_seed(0)).atoms
        # One matrix W of rank one or two, in the far coordinates with an intercept in many digits
        mixing = solved.U if head == "mlp" else torch.ones(len(solved), 1).double()
        W = sum(torch.outer(u, v[0]) if head == "mlp" else v for u, v in zip(mixing, solved.V, strict=True)).numpy()
        origin = far.operator.X[0, 0].numpy()
        b = [
            exact(c) - sum(exact(o) * exact(w) for o, w in zip(origin, column, strict=True))
            for c, column in zip(solved.intercept.tolist(), W.T, strict=True)
        ]
        targets = far.Y[:, 0].numpy()
        if head == "linear":
            attained = exact_objective(far.operator.X[:, 0].numpy(), targets, loss, beta, W, b, ridge=True)
        else:
            nuclear = mpmath.fsum(mpmath.svd_r(mpmath.matrix(W.tolist()), compute_uv=False))
            single = exact_objective(far.operator.X[:, 0].numpy(), targets, loss, 0.0, W, b, ridge=False)
            attained = single + exact(beta) * nuclear
        for dual_point in (None, near.outputs(solved)):
            certificate = certify_atoms(far, far.empty(), beta, tol=1e-6, dual_point=dual_point)
            assert exact(certificate.dual) <= attained
            assert math.isfinite(certificate.dual)
        if exponent <= 4:  # and it is tight there
            assert attained - exact(certificate.dual) <= 1e-6 * attained


@pytest.mark.parametrize(
    ("name", "pool_name"), pooled([(name,) for name in HEADS if name != "linear"], "mean", "cls", "none")
)
def test_the_raised_norm_covers_what_cancels(name, pool_name):
    """``σ`` of features with a common offset whose residuals sum to nearly 0, against sums in long double."""
    rng = np.random.default_rng(3)
    n, s, d, c = 7, 4, 2, 2
    head = head_of(name, s, d, pool=pool_name, grid=(2, 2), n_blocks=1)
    X = rng.normal(size=(n, s, d)) + 1e6
    R = rng.normal(size=(n, head.r, c))
    Y = torch.as_tensor(R - R.mean((0, 1)))  # f = 0: the residual is −Y
    problem = Problem(
        Operator(torch.as_tensor(X), head, make_activation("linear", head, None)), Y, Squared(), fit_intercept=True
    )
    point = DualPoint(problem, torch.zeros_like(Y), 1.0)
    sigma = formed_norm(GradientMatrices(problem.operator, point.R))
    basis = np.eye(head.mixing_size, dtype=np.longdouble).reshape(-1, *head.mixing_shape)
    truth = np.zeros((head.mixing_size, head.value_rows * c), np.longdouble)
    for x, r in zip(X.astype(np.longdouble), point.R.numpy().astype(np.longdouble), strict=True):
        truth += np.array([(pool(in_long_double(head, x, U), pool_name).T @ r).ravel() for U in basis])
    gram = mpmath.matrix((truth.T @ truth).tolist())
    exactly = mpmath.sqrt(max(mpmath.eigsy(gram, eigvals_only=True)))
    assert exact(sigma) * (1 - exact(1e-9)) - exact(point.raised) <= exactly
    assert exactly <= exact(point.bound(sigma))
    assert point.size >= exactly
    # It matters: the difference is more than the relative amount for decompositions, and the charge is not absurd.
    # Scores of a softmax that are a million large are known to ten digits only.
    assert point.raised <= (1e-7 if name == "attentive" else 1e-9) * point.size


def in_long_double(head: Head, X: np.ndarray, U: np.ndarray) -> np.ndarray:
    """`reference.mix` keeps the type of its input but for circulants."""
    if head.name == "attentive":
        return attend(X, U, head.queries.numpy(), 0)
    if "fno" not in head.name:
        return mix(head.name, X, U, grid=(2, 2))
    return np.array([[sum((X[shift(a, t)] * U[t]).sum() for t in range(4))] for a in range(4)])


def shift(a: int, t: int) -> int:
    """``a − t`` on the 2 × 2 grid."""
    return (a // 2 - t // 2) % 2 * 2 + (a % 2 - t % 2) % 2


@pytest.mark.parametrize("name", ["self-attention", "mlp-mixer", "fno", "block-fno", "mlp"])
def test_small_heads_are_certified_to_ten_digits(name):
    """Of decompositions that are known to be better than `DECOMPOSED`."""
    images = load_digits()
    X = images.images[:120].reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4) / 16
    settings = {"head": name, "beta_ratio": 0.3, "random_state": 0}
    loose, tight = (
        ch.ConvexHeadClassifier(**settings, tol=tol).fit(X, images.target[:120]).certificate_ for tol in (1e-6, 1e-10)
    )
    assert tight.converged
    assert tight.relative_gap <= 1e-10
    assert loose.dual <= tight.dual <= tight.primal <= loose.primal


# -- losses that vanish, probabilities near 0 and 1 ---------------------------------------------------------------
@pytest.mark.parametrize("margin", [1.0, 20.0, 30.0, 36.0, 50.0, 300.0])
@pytest.mark.parametrize("n_classes", [3, 40])
def test_cross_entropy_of_confident_outputs_has_all_its_digits(margin, n_classes):
    loss = CrossEntropy()
    rng = np.random.default_rng(0)
    f = torch.as_tensor(rng.normal(size=(4, 1, n_classes)))
    y = torch.zeros_like(f)
    y[:, :, 1] = 1
    f[:, :, 1] += margin
    g = loss.residual(f, y)
    for i in range(4):
        row = [exact(x) for x in f[i, 0].tolist()]
        # all from the differences: log(1 + small) in 60 digits is not enough for margins of 300
        with mpmath.workdps(200):
            small = sum(mpmath.exp(x - row[1]) for k, x in enumerate(row) if k != 1)
            value = mpmath.log1p(small)
            p = [mpmath.exp(x - row[1]) / (1 + small) for x in row]
            entropy = sum(x * mpmath.log(x) for x in p)
            residual = [p[k] if k != 1 else -small / (1 + small) for k in range(n_classes)]
        assert float(loss.value(f, y)[i]) == pytest.approx(float(value), rel=1e-13, abs=0)
        np.testing.assert_allclose(g[i, 0].numpy(), [float(x) for x in residual], rtol=1e-12)
        assert float(loss.conjugate(g, y)[i]) == pytest.approx(float(entropy), rel=1e-12, abs=0)


def test_the_gap_of_separable_data_is_right_relative_to_a_tiny_objective():
    """At ``β = 1e-14`` the optimum is about 1e-12: what entropies and logarithms lose would be most of it."""
    X = np.array([[-1.0], [1.0], [-2.0], [1.5]])
    beta = 1e-14
    head = make_head("mlp", 1, 1)
    targets = torch.as_tensor(np.eye(2)[(X[:, 0] > 0).astype(int)])[:, None]
    problem = Problem(
        Operator(torch.as_tensor(X)[:, None], head, make_activation("linear", head, None)), targets, CrossEntropy()
    )

    # With v = t (−1, 1)/√2 and u = 1 the penalty is βt, and the classes' outputs are √2 x t apart.
    def objective(t: mpmath.mpf) -> mpmath.mpf:
        losses = [mpmath.log1p(mpmath.exp(-mpmath.sqrt(2) * abs(exact(x)) * t)) for x in X[:, 0]]
        return mpmath.fsum(losses) / len(losses) + exact(beta) * t

    def slope(t: mpmath.mpf) -> mpmath.mpf:
        rates = [mpmath.sqrt(2) * abs(exact(x)) for x in X[:, 0]]
        return exact(beta) - mpmath.fsum(r / (1 + mpmath.exp(r * t)) for r in rates) / len(rates)

    t = mpmath.findroot(slope, (20, 25), solver="bisect", tol=1e-50)
    optimum = objective(t)
    root = float(t) ** 0.5
    V = torch.tensor([[[-1.0, 1.0]]]).double() * root / 2**0.5
    atoms = Atoms(torch.full((1, 1), root).double(), V, torch.zeros(1, dtype=torch.int64), torch.zeros(2).double())
    certificate = certify_atoms(problem, atoms, beta, tol=1e-6)
    assert float(optimum) < 1e-12
    assert certificate.primal == pytest.approx(float(optimum), rel=1e-11, abs=0)
    assert exact(certificate.dual) <= optimum
    assert certificate.converged


# -- numbers that are none ----------------------------------------------------------------------------------------
def tokens_problem(name: str, scale: float, *, dtype: torch.dtype = torch.float64, offset: float = 0.0) -> Problem:
    rng = np.random.default_rng(0)
    X = torch.as_tensor(scale * (rng.normal(size=(12, 4, 3)) + offset), dtype=dtype)
    Y = torch.as_tensor(np.eye(2)[rng.integers(0, 2, 12)])[:, None]
    head = head_of(name, 4, 3)
    return Problem(
        Operator(X, head, make_activation("linear", head, None), dtype=dtype), Y, CrossEntropy(), fit_intercept=True
    )


@pytest.mark.parametrize("krylov", [False, True])
@pytest.mark.parametrize("scale", [1e-150, 1e-60, 1e60, 1e120, 1e150])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "block-fno"])
def test_tokens_beyond_the_range_of_their_products_give_honest_bounds(name, scale, krylov, monkeypatch):
    if krylov:
        monkeypatch.setattr(convexhead.certificate.certify, "worth_decomposing", lambda *_: False)
    problem = tokens_problem(name, scale)
    certificate = certify_atoms(problem, problem.empty(), 1.0, tol=1e-3)
    # At Z = 0 and the best intercept the objective is the entropy of the classes: no optimum is above.
    classes = problem.Y.mean((0, 1))
    assert math.isfinite(certificate.dual)
    assert -1e-12 <= certificate.dual <= float(-(classes * classes.log()).sum()) * (1 + 1e-12)
    if scale >= 1e60 and name != "linear":  # β = 1 is nothing there: the optimum is nearly 0
        assert certificate.dual <= 1e-3


def test_single_precision_directions_that_overflow_do_not_reach_the_bound(monkeypatch):
    monkeypatch.setattr(convexhead.certificate.certify, "worth_decomposing", lambda *_: False)
    problem = tokens_problem("self-attention", 1e13, dtype=torch.float32)  # cubes beyond float32
    atoms = problem.empty().to("cpu", torch.float64)
    atoms = replace(
        atoms,
        U=1e-20 * torch.ones(1, 3, 3).double(),
        V=1e-20 * torch.ones(1, 3, 2).double(),
        block=torch.zeros(1).long(),
    )
    beta = 1e39
    certificate = certify_atoms(problem, atoms, beta, tol=1e-3, generator=torch.Generator().manual_seed(0))
    assert -1e-9 <= certificate.dual <= certificate.primal


def test_krylov_spaces_of_no_numbers_bound_nothing():
    problem = tokens_problem("self-attention", 1.0)
    G = GradientMatrices(problem.operator, torch.full_like(problem.Y, math.nan), form=False)
    whole = GradientMatrices(problem.operator, problem.residual(torch.zeros_like(problem.Y)), form=False)
    bound = KrylovBound(whole, whole, problem.empty(), 1e-3, 1e-6, torch.Generator().manual_seed(0))
    bound.deflated.G.R = G.R
    try:
        going = bound.step()
    except torch.linalg.LinAlgError:
        going = False
    assert not going
    assert bound.upper == math.inf


def test_objectives_that_are_no_numbers_are_refused():
    problem = tokens_problem("mlp", 1.0)
    atoms = replace(problem.empty(), intercept=torch.tensor([math.nan, 0.0]).double())
    with pytest.raises(InputError, match="objective"):
        certify_atoms(problem, atoms, 1.0, tol=1e-3)
    with pytest.raises(InputError, match="NaN"):
        certify_atoms(problem, problem.empty(), 1.0, tol=1e-3, known_dual=math.nan)


def test_a_foreign_bound_is_refused_in_words():
    problem = tokens_problem("mlp", 1.0)
    with pytest.raises(InputError, match="known before"):
        certify_atoms(problem, problem.empty(), 1.0, tol=1e-3, known_dual=5.0)


# -- residuals without a sum ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", [CrossEntropy(), Squared(), Huber(0.5)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_residuals_lose_their_sum_and_stay_in_the_domain(loss, size):
    rng = np.random.default_rng(1)
    Y = torch.as_tensor(np.eye(3)[rng.integers(0, 2, 30)])[:, None]  # the third class never occurs
    f = torch.as_tensor(size * rng.normal(size=(30, 1, 3)))
    head = make_head("linear", 1, 2)
    problem = Problem(
        Operator(torch.as_tensor(rng.normal(size=(30, 1, 2))), head, make_activation("linear", head, None)),
        Y,
        loss,
        fit_intercept=True,
    )
    point = DualPoint(problem, f, 1.0)
    sums = [mpmath.fsum(exact(g) for g in column) for column in point.R[:, 0].T.tolist()]
    assert all(abs(s) * 30 <= exact(left) for s, left in zip(sums, point._left.tolist(), strict=True))
    assert float(point._left.sum()) <= 1e-12 * float((30 * point.R).abs().sum())
    assert math.isfinite(point.value(min(1.0, point.domain)))
    assert not point.assumed


def test_pairwise_sums_have_a_short_chain():
    x = torch.full((2**20 + 3,), 0.1, dtype=torch.float64)
    truth = exact(0.1) * (2**20 + 3)
    assert abs(exact(float(pairwise_sum(x))) - truth) <= pairwise_additions(len(x)) * exact(2.0**-53) * truth
    columns = torch.stack([x, x]).T
    assert abs(exact(float(pairwise_sum(columns)[1])) - truth) <= pairwise_additions(len(x)) * exact(2.0**-53) * truth
    assert pairwise_additions(2**20 + 3) == 56
    for m in range(1, 200):
        x = torch.arange(1.0, m + 1, dtype=torch.float64)
        for both in (torch.stack([x, -x], dim=1), torch.stack([x, -x]).T):  # row by row, and column by column
            assert pairwise_sum(both).tolist() == [m * (m + 1) / 2, -m * (m + 1) / 2]
        assert x.tolist() == list(range(1, m + 1))  # as it was


# -- a loss of the user's own -----------------------------------------------------------------------------------------
class LogCosh(Loss):
    """Right in everything."""

    name = "log-cosh"

    def value(self, f, y):
        t = (f - y).abs()
        return (t + torch.log1p(torch.exp(-2 * t)) - math.log(2)).sum((-2, -1))

    def residual(self, f, y):
        return torch.tanh(f - y)

    def conjugate(self, g, y):
        inside = (g.abs() <= 1).all(-1).all(-1)
        g = g.clamp(-1, 1)
        own = torch.xlogy(1 + g, 1 + g) / 2 + torch.xlogy(1 - g, 1 - g) / 2 + g * y
        return torch.where(inside, own.sum((-2, -1)), math.inf)


def broken(**methods) -> Loss:
    return type("Broken", (LogCosh,), {"name": "broken", **methods})()


BROKEN = {
    "conjugate": broken(conjugate=lambda self, g, y: LogCosh.conjugate(self, g, y) - 0.1),
    "below": broken(conjugate=lambda self, g, y: 0.99 * LogCosh.conjugate(self, g, y)),
    "gradient": broken(residual=lambda self, f, y: 1.01 * torch.tanh(f - y)),
    "convex": broken(
        value=lambda self, f, y: torch.sin(f - y).sum((-2, -1)), residual=lambda self, f, y: torch.cos(f - y)
    ),
    "finite": broken(conjugate=lambda self, g, y: torch.full((len(g),), math.inf).double()),
    "scaled_domain": broken(scaled_domain=lambda self, f, y: 0.5),
    "returned": broken(value=lambda self, f, y: (f - y).square()),
    "fails": broken(conjugate=lambda self, g, y: g.no_such_method()),
    "value_and_residual": broken(value_and_residual=lambda self, f, y: (self.value(f, y), -self.residual(f, y))),
}


def test_a_right_loss_passes_and_is_certified():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 3)), rng.normal(size=40)
    head = ch.ConvexHeadRegressor("mlp", loss=LogCosh(), beta=0.05, tol=1e-5, random_state=0).fit(X, y)
    assert head.certificate_.converged
    for loss in (CrossEntropy(), Squared(), Huber(0.3), LogCosh()):
        check_loss(
            type("Own", (type(loss),), {"__init__": lambda self: self.__dict__.update(delta=0.3)})(),
            torch.eye(3)[:, None],
        )


@pytest.mark.parametrize("what", BROKEN)
def test_a_wrong_loss_is_refused_at_fit_and_certify_with_what_is_wrong(what):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(20, 3)), rng.normal(size=20)
    words = {"below": "conjugate", "gradient": "gradient", "convex": "convex"}.get(what, what)
    with pytest.raises(InputError, match=words):
        ch.ConvexHeadRegressor("mlp", loss=BROKEN[what], beta=0.05).fit(X, y)
    head = make_head("mlp", 1, 3)
    problem = Problem(
        Operator(torch.as_tensor(X)[:, None], head, make_activation("linear", head, None)),
        torch.as_tensor(y)[:, None, None],
        BROKEN[what],
    )
    with pytest.raises(InputError, match="Broken"):
        certify_atoms(problem, problem.empty(), 0.05, tol=1e-3)
