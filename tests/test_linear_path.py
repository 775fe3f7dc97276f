"""A path of the linear head: where its fits begin, and its β as scikit-learn's C."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import convexhead as ch
from convexhead.certificate.certify import certify_atoms
from convexhead.fitting import pose
from convexhead.path import regularization_path
from convexhead.program import linear_passes
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.linear_passes import LinearPasses
from convexhead.program.moments import Moments
from convexhead.program.problem import Problem
from convexhead.program.recent_outputs import RecentOutputs
from convexhead.solvers.monitor import Monitor
from convexhead.solvers.ridge import RidgeNewton
from convexhead.solvers.span import Span
from convexhead.trail import Trail

X, Y = (part[:300] for part in load_digits(return_X_y=True))
X = X / 16
SETTINGS = {"head": "linear", "fit_intercept": True, "random_state": 0}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_path_tells_scikit_learns_C(classes, weighted):
    some = np.isin(Y, range(classes))
    x, y = X[some], Y[some]
    w = 1.0 + np.arange(len(y)) % 3 if weighted else None
    rows = regularization_path(x, y, w, Cs=[0.3, 0.01], tol=1e-8, **SETTINGS)
    np.testing.assert_allclose([row["C"] for row in rows], [0.01, 0.3], rtol=1e-12)
    for row in rows:
        theirs = LogisticRegression(C=row["C"], tol=1e-10, max_iter=10_000).fit(x, y, w)
        np.testing.assert_allclose(row["model"].predict_proba(x), theirs.predict_proba(x), atol=1e-4)
        wrong = LogisticRegression(C=2 * row["C"], tol=1e-10, max_iter=10_000).fit(x, y, w)
        assert np.abs(row["model"].predict_proba(x) - wrong.predict_proba(x)).max() > 1e-3


def test_other_heads_have_no_C():
    (row,) = regularization_path(X[:60], Y[:60], head="mlp", beta_ratios=[0.5], tol=0.1, random_state=0)
    assert "C" not in row
    (row,) = regularization_path(X[:60], 1.0 * Y[:60], loss="squared", beta_ratios=[0.5], **SETTINGS)
    assert "C" not in row


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"head": "mlp"}, "pass beta_ratios"),
        ({"head": "linear", "loss": "squared"}, "pass beta_ratios"),
        ({"head": "linear", "beta_ratios": [0.5]}, "pass one of them"),
        ({"head": "linear", "Cs": [1.0, 0.0]}, "Cs must be some positive numbers"),
        ({"head": "linear", "Cs": []}, "Cs must be some positive numbers"),
        ({"head": "linear", "Cs": 1.0}, "Cs must be some positive numbers"),
    ],
)
def test_Cs_that_say_nothing_are_refused(settings, told):
    with pytest.raises(ch.InputError, match=told):
        regularization_path(X[:60], 1.0 * Y[:60] if "loss" in settings else Y[:60], **{"Cs": [1.0], **settings})


def test_features_without_signal_have_no_path_over_C():
    with pytest.raises(ch.InputError, match="no feature is related to the targets"):
        regularization_path(np.array([[1.0], [-1.0]] * 4), np.repeat([0, 1], 4), Cs=[1.0], **SETTINGS)


def test_C_after_cross_validation():
    clf = ch.ConvexHeadClassifierCV("linear", fit_intercept=True, beta_ratios=[0.3, 0.1], cv=2, class_weight="balanced")
    clf.fit(X, Y)
    np.testing.assert_allclose(clf.C_, 1 / (len(Y) * clf.beta_))
    assert not hasattr(clf.set_params(refit=False).fit(X, Y), "C_")


def test_a_fit_begins_in_the_span_of_those_before():
    rows = regularization_path(X, Y, beta_ratios=0.3 * 1.8 ** -np.arange(6.0), tol=1e-6, **SETTINGS)
    models = [row["model"].model_ for row in rows]
    trail, problem = Trail(), linear_problem()
    assert trail.start(1.0, problem) is None
    trail.add(models[0])
    assert trail.start(models[1].beta, problem) is models[0].atoms
    for before, last, following in zip(models, models[1:], models[2:], strict=False):
        trail.add(last)
        start = trail.start(following.beta, problem)
        optimum, reached, line, from_last = (
            objective(problem, atoms, following.beta)
            for atoms in (following.atoms, start, combined(last.atoms, before.atoms, 2.0, -1.0), last.atoms)
        )
        assert optimum * (1 - 1e-6) <= reached <= line * (1 + 1e-6)
        assert reached - optimum < 0.1 * (from_last - optimum)
        basis = np.stack([model.atoms.V.numpy().ravel() for model in (before, last)], axis=1)
        V = start.V.numpy().ravel()
        residual = V - basis @ np.linalg.lstsq(basis, V, rcond=None)[0]
        assert np.linalg.norm(residual) < 1e-8 * np.linalg.norm(V)


@pytest.mark.parametrize("wrong", [10.0, -1.0, 1e3])
def test_no_start_is_worse_than_the_last_model(wrong):
    rows = regularization_path(X, Y, beta_ratios=[3e-3, 2e-3], tol=1e-2, **SETTINGS)
    before, last = (row["model"].model_ for row in rows)
    trail, problem = Trail(), linear_problem()
    trail.add(replace(before, atoms=combined(before.atoms, last.atoms, 0.0, wrong)))
    trail.add(last)
    for beta in (0.7 * last.beta, 1e-6 * last.beta, 1e3 * last.beta):
        start = trail.start(beta, problem)
        assert objective(problem, start, beta) <= objective(problem, last.atoms, beta) * (1 + 1e-6)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_path_on_targets_without_signal(target):
    targets = np.full(len(X), target)
    rows = regularization_path(X, targets, beta_ratios=[0.3, 0.1, 0.03], tol=1e-3, loss="squared", **SETTINGS)
    assert all(row["converged"] for row in rows)
    assert max(float(row["model"].model_.atoms.V.abs().max()) for row in rows) < 1e-9


def combined(first: Atoms, second: Atoms, of_first: float, of_second: float) -> Atoms:
    """A model in the span of two."""
    V, b = (of_first * getattr(first, name) + of_second * getattr(second, name) for name in ("V", "intercept"))
    return replace(first, V=V, intercept=b)


def objective(problem: Problem, atoms: Atoms, beta: float) -> float:
    exact, atoms = problem.astype(torch.float64), problem.enter(atoms)
    return exact.data_term(exact.outputs(atoms)) + problem.coordinates.beta(beta) * exact.penalty(atoms)


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_rounding_turns_go_on_in_float64(seed):
    rng = np.random.default_rng(seed)
    X, y = 7e3 * rng.normal(size=(235, 1, 29)), rng.integers(0, 5, 235)  # second moments are 1e17 times β
    steps: list = []
    clf = ch.ConvexHeadClassifier("linear", beta=3e-10, tol=1e-4, max_time=10).fit(X, y, callback=steps.append)
    assert clf.certificate_.converged
    assert len(steps) < 100


def test_classes_that_are_nearly_separable_take_few_steps():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 12, 800)
    means = 0.4 * rng.normal(size=(12, 40))
    X = means[y] + rng.normal(size=(800, 40)) * rng.uniform(0.3, 1.7, (12, 1))[y]
    X = (X - X.mean(0)) / X.std(0)
    rows = regularization_path(X, y, Cs=[1e2, 1e3, 3e3, 1e4], tol=1e-3, **SETTINGS)
    assert all(row["converged"] for row in rows)
    assert max(len(row["model"].history_) for row in rows) < 30


def test_one_token_is_not_copied():
    head, tokens = make_head("linear", 1, 5), torch.zeros(3, 1, 5)
    assert head.pool_tokens(tokens) is tokens


def linear_problem(dtype=torch.float32):
    task = pose(ch.ConvexHeadClassifier(beta=1e-3, **SETTINGS), X, Y, to_solve=True)
    return task.problem.astype(dtype)


def test_products_in_bfloat16_are_about_right():
    passes = LinearPasses(linear_problem())
    draw = torch.Generator().manual_seed(0)
    B, f = torch.randn(10, 65, generator=draw), torch.randn(len(X), 1, 10, generator=draw)
    exactly, roughly = passes.curved(f, B), passes.curved(f, B, rough=True)
    assert 1e-5 < float((roughly - exactly).norm() / exactly.norm()) < 0.02
    assert not passes.half_pays  # so few samples


@pytest.mark.parametrize("ratio", [0.1, 1e-6])
def test_a_fit_with_products_in_bfloat16_is_certified_as_well(ratio, monkeypatch):
    settings = {"beta_ratio": ratio, "tol": 1e-4, **SETTINGS}
    plain = ch.ConvexHeadClassifier(**settings).fit(X, Y)
    used = []
    curved = LinearPasses.curved

    def noted(*args, rough):
        used.extend([1] * rough)
        return curved(*args, rough=rough)

    monkeypatch.setattr(LinearPasses, "curved", noted)
    monkeypatch.setattr(linear_passes, "LARGE", 0)
    monkeypatch.setattr(linear_passes, "has_fast_bfloat16", lambda device: True)
    rough = ch.ConvexHeadClassifier(**settings).fit(X, Y)
    assert used
    assert plain.certificate_.converged
    assert rough.certificate_.converged
    assert rough.certificate_.dual <= plain.certificate_.primal <= rough.certificate_.primal * (1 + 1e-4)


def test_a_certificate_does_without_an_intercept_that_is_not_the_best():
    task = pose(ch.ConvexHeadClassifier(beta=1e-5, tol=1e-6, **SETTINGS), X, Y, to_solve=True)
    _, solution = task.solve()
    atoms = solution.atoms.to("cpu", torch.float64)
    atoms.intercept = atoms.intercept + 1e-3 * torch.linspace(-1, 1, 10)
    found = certify_atoms(task.problem, atoms, 1e-5, tol=1e-3)
    assert found.dual <= solution.certificate.primal < found.primal
    assert found.converged


@pytest.mark.parametrize("far", [0.0, 50.0])
def test_a_path_is_the_same_with_outputs_that_are_kept(monkeypatch, far):
    """Far tokens are solved in other coordinates, from which the intercept comes back rounded."""
    grid = {"beta_ratios": [0.3, 0.2, 0.1, 0.05], "tol": 1e-3, **SETTINGS}
    products, passes = [], LinearPasses.outputs
    monkeypatch.setattr(
        LinearPasses, "outputs", lambda self, *how, **into: products.append(1) or passes(self, *how, **into)
    )
    rows = regularization_path(X + far, Y, **grid)
    few = len(products)
    monkeypatch.setattr(RecentOutputs, "of", lambda self, atoms: None)
    plain = regularization_path(X + far, Y, **grid)
    assert len(products) - few >= few + 2 * 2 + 3  # two in each span, and one at each start but the first
    for row, other in zip(rows, plain, strict=True):
        assert row["converged"]
        assert row["train_score"] == other["train_score"]
        np.testing.assert_allclose(row["objective"], other["objective"], rtol=1e-3)


def test_recent_outputs_know_weights_and_forget_the_oldest():
    problem = linear_problem()
    passes, recent = LinearPasses(problem), RecentOutputs()
    models = [problem.empty() for _ in range(5)]
    for k, model in enumerate(models):
        model.V += torch.randn(model.V.shape, generator=torch.Generator().manual_seed(k), dtype=model.V.dtype)
        recent.keep(model, passes.outputs_of(model))
    assert recent.of(models[0]) is recent.of(models[1]) is None
    moved = replace(models[-1], intercept=models[-1].intercept + 1.0)
    torch.testing.assert_close(recent.of(moved), passes.outputs_of(moved))
    assert recent.of(models[-1]).dtype == torch.float64
    models[-1].V[0, 0, 0] += 1e-3
    assert recent.of(models[-1]) is None


def test_a_search_in_a_span_ends_where_rounding_hides_the_rest(monkeypatch):
    looks, problem = [], linear_problem()
    passes, draw = LinearPasses(problem), torch.Generator().manual_seed(0)
    weights = [torch.randn(10, 65, generator=draw, dtype=torch.float64) for _ in range(2)]
    span = Span(passes.problem, 1e-9, [passes.outputs(B.float()) for B in weights], weights)
    monkeypatch.setattr(Span, "value", lambda self, a: looks.append(1) or 1.0)  # as if nothing lower could be seen
    begin = torch.ones(2, dtype=torch.float64)
    shares, value = span.minimise(begin, 1.0)
    assert value == 1.0
    assert torch.equal(shares, begin)
    assert 1 < len(looks) <= 32  # 2⁻³² of the first decrease is far below what rounding leaves


def test_a_linear_head_whose_tokens_are_scaled_is_refused():
    model = ch.ConvexHeadClassifier(beta_ratio=0.1, **SETTINGS).fit(X, Y).model_
    wrong = replace(model.atoms, U=2 * model.atoms.U)
    with pytest.raises(ch.errors.InputError, match="mixing weight is 1"):
        certify_atoms(linear_problem(), wrong, model.beta, tol=1e-3)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_both_roots_are_those_of_the_inverse(intercept, diagonal):
    draw = torch.Generator().manual_seed(0)
    phi = torch.cat([3 + torch.randn(40, 7, generator=draw).double(), torch.ones(40, 1).double()], dim=1)
    second, h, beta = phi.T @ phi / 40, 0.3, 1e-3
    penalty = torch.tensor([beta] * 7 + [0.0]).double()
    M = h * (second.diagonal().diag() if diagonal else second) + penalty.diag()
    if not intercept:
        M[-1], M[:, -1] = 0.0, 0.0
        M[-1, -1] = 1.0
    moments = Moments(second.diagonal().clone() if diagonal else second, intercept=intercept)
    for many in (False, True):
        root = moments.root(h, beta, torch.float64, many=many)
        nudged = second[-1].clone() if many and not diagonal else torch.eye(8).double()[-1]  # with the mean, or without
        there = M + intercept * 1e-6 * (h + beta) * torch.outer(nudged, nudged)
        r = torch.randn(8, 3, generator=draw).double()
        torch.testing.assert_close(root.whole(root.half(r)), torch.linalg.solve(there, r), rtol=1e-6, atol=1e-8)
        u = torch.randn(8, 2, generator=draw).double()
        torch.testing.assert_close(root.half(r).T @ u, r.T @ root.whole(u))
    assert moments.squares == pytest.approx(float(phi[:, :-1].square().sum(1).mean()))


def test_the_gap_after_a_step_is_known_without_another_gradient(monkeypatch):
    """The first fit begins far away, and looks; the last steps of the others do not."""
    looks, gradient, ends = [], LinearPasses.gradient, RidgeNewton._is_near
    monkeypatch.setattr(LinearPasses, "gradient", lambda self, f: looks.append("look") or gradient(self, f))

    def is_near(self, *args):
        near = ends(self, *args)
        if near:
            at_f = gradient(self._passes, self._f + args[1].outputs)
            self._B = self._B + args[1].x
            true = self._missing(at_f, self.beta)
            self._B = self._B - args[1].x
            looks.append(true / (self.target * args[2]))
        return near

    monkeypatch.setattr(RidgeNewton, "_is_near", is_near)
    rows = regularization_path(X, Y, beta_ratios=0.3 * 1.8 ** -np.arange(16.0), tol=1e-3, **SETTINGS)
    assert all(row["converged"] for row in rows)
    true = [look for look in looks if look != "look"]
    assert len(true) > 5
    assert max(true) < 1.0
    assert looks.count("look") < len(rows) + 8


def test_a_system_leaves_less_than_the_iterates_of_conjugate_gradients():
    """Their residuals rise and fall; the combination that is returned is the smallest of all there are."""
    task = pose(ch.ConvexHeadClassifier(beta=1e-6, **SETTINGS), X, Y, to_solve=True)
    _, solution = task.solve()
    solver = task_solver(task, solution.atoms)
    at_f = solver._passes.gradient(solver._f)
    solver._stage, solver.target = 1e-7, 1e-3
    g = at_f.clone()
    g[:, :-1] += 1e-7 * solver._B[:, :-1]
    found = [solver._newton(g, 1e-6, asked) for asked in (1e-3, 3e-4, 1e-4, 3e-5)]
    assert [system.left for system in found] == sorted((system.left for system in found), reverse=True)
    for system, asked in zip(found, (1e-3, 3e-4, 1e-4, 3e-5), strict=True):
        assert system.left <= 0.6 * asked
        Hx = solver._passes.curved(solver._f.float(), system.x.float()).double()
        Hx[:, :-1] += 1e-7 * system.x[:, :-1]
        model = float((g * system.x).sum() + (Hx * system.x).sum() / 2)
        assert system.promised == pytest.approx(-model, rel=1e-3)


def task_solver(task, atoms):
    """A solver of its problem that begins at ``atoms``."""
    problem = task.problem.astype(torch.float32)
    return RidgeNewton(problem, task.beta, atoms.to("cpu", torch.float32), Monitor(None, None, problem.ranks))


def test_a_search_makes_outputs_of_each_model_once(monkeypatch):
    grid = {"beta_ratios": 0.3 * 1.8 ** -np.arange(12.0), "X_val": X[::3], "y_val": Y[::3], "tol": 1e-3, **SETTINGS}
    made, systems = [], []
    outputs, newton = LinearPasses.outputs, RidgeNewton._newton
    monkeypatch.setattr(
        LinearPasses, "outputs", lambda self, *how, **into: made.append(1) or outputs(self, *how, **into)
    )
    monkeypatch.setattr(RidgeNewton, "_newton", lambda self, *args: systems.append(1) or newton(self, *args))
    rows = regularization_path(X, Y, search_tol=1e-2, **grid)
    assert sum(row["converged"] for row in rows) == 1
    assert len(made) - len(systems) <= len(rows) + 4  # each model's, those of the first start, and of the last fit
    plain = regularization_path(X, Y, **grid)
    for row, other in zip(rows, plain, strict=True):
        np.testing.assert_allclose(row["objective"], other["objective"], rtol=1e-2)
        assert row["train_score"] == pytest.approx(other["train_score"], abs=0.02)
