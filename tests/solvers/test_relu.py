"""Whole ReLU networks: certified optima against CVXPY, restarts and each other; estimates that say so."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

import convexhead as ch
import oracle
from convexhead.baselines.adam import make_network, train_adam
from convexhead.baselines.passes import objectives
from convexhead.drive import solve
from convexhead.dual_norm.norm import NormOracle
from convexhead.dual_norm.scores import scores_of
from convexhead.program.activations import ReLU
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy, Squared
from convexhead.program.operator import Operator
from convexhead.program.patterns import all_gates, sample_patterns
from convexhead.program.problem import Problem
from convexhead.solvers import Stop, base, relu
from convexhead.solvers.cones import descend_in_cones
from convexhead.solvers.monitor import Monitor
from kinds import MASKED


def build(name, seed, *, c=1, n=6, s=1, d=2, pool="mean", intercept=False):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, s, d, generator=generator, dtype=torch.float64)
    head = make_head(name, s, d, pool=pool, n_blocks=2)
    if c > 1 and seed % 2:
        Y = torch.nn.functional.one_hot(torch.arange(n) % c, c).double().unsqueeze(1)
        return Problem(Operator(X, head, ReLU(head)), Y, CrossEntropy(), fit_intercept=intercept)
    Y = torch.randn(n, 1, c, generator=generator, dtype=torch.float64)
    return Problem(Operator(X, head, ReLU(head)), Y, Squared(), fit_intercept=intercept)


def run(problem, beta, **options):
    options = {"tol": 1e-3, "max_time": 120.0, "generator": torch.Generator().manual_seed(0)} | options
    return solve(problem, beta, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9))
def test_scalar_optimum_is_cvxpys(seed):
    name, s, d = [("mlp", 1, 2), ("mlp", 2, 2), ("fno", 2, 1)][seed % 3]
    problem = build(name, seed, s=s, d=d, n=6 + seed % 3)
    beta = (0.05, 0.02)[seed % 2]
    certificate = run(problem, beta, tol=1e-6).certificate
    X = problem.operator.X
    gates = all_gates(problem.head, X).numpy()
    truth = oracle.relu_optimum(
        name,
        X.numpy(),
        problem.Y[:, 0, 0].numpy(),
        gates,
        pool="mean",
        grid=problem.head.grid,
        beta=beta,
    )
    assert certificate.scope == "global"
    assert certificate.converged
    assert certificate.primal == pytest.approx(truth, rel=1e-5)
    assert certificate.dual <= truth * (1 + 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_descent_in_cones_keeps_the_pattern(name):
    """Nothing crosses a hyperplane, the objective falls, and the weights are stationary where no constraint binds."""
    problem, beta = build(name, 0, c=2, s=2, d=2), 0.05
    scores = scores_of(problem.operator)
    U = torch.randn(4, *problem.head.mixing_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    span = problem.head.mixing_span()
    U = U if span is None else (U.flatten(1) @ span.T @ span).view_as(U)
    block = torch.arange(4) % problem.n_blocks
    V = torch.randn(4, *problem.value_shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start = Atoms(U, problem.mask_values(V, block), block, torch.zeros(2, dtype=torch.float64))
    found = descend_in_cones(problem, start, scores, beta, lambda: False)
    assert problem.value_and_gradient(found, beta).value < problem.value_and_gradient(start, beta).value
    assert float(problem.value_and_gradient(found, beta).gradient.V.abs().max()) <= 2e-3  # values are free
    for before, after, j in zip(start.U.flatten(1), found.U.flatten(1), block.tolist(), strict=True):
        sides = (scores[j].planes @ (scores[j].basis @ before)).sign()
        assert (
            float((sides * (scores[j].planes @ (scores[j].basis @ after))).min()) >= -1e-5
        )  # also of weights that vanish
    same = descend_in_cones(problem, start, scores, beta, lambda: True)
    torch.testing.assert_close(same.U, start.U)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_no_training_run_is_below_the_bound(seed):
    """Several outputs: the rigorous bound, Adam from three starts, and our network from two."""
    name, s, d = [("mlp", 2, 2), ("fno", 2, 1), ("mlp-mixer", 2, 2), ("self-attention", 1, 2), ("block-fno", 2, 2)][
        seed % 5
    ]
    problem = build(name, seed, c=2 + seed % 3, s=s, d=d, pool=("mean", "cls")[seed % 2])
    beta = 0.04
    solution = run(problem, beta, tol=0.01)
    bound = solution.certificate.dual
    assert solution.certificate.scope == "global"
    assert solution.certificate.relative_gap <= 0.01
    assert bound <= solution.certificate.primal
    for start in range(3):
        trained = train_adam(problem, beta, n_heads=6, lr=0.03, epochs=150, seed=start)
        assert trained.objective < trained.history[0].objective
        assert trained.convex_objective >= bound * (1 - 1e-12)
    again = run(problem, beta, tol=0.1, generator=torch.Generator().manual_seed(1)).certificate
    assert again.primal >= bound
    assert solution.certificate.primal >= again.dual


@pytest.mark.slow
def test_weights_at_and_above_beta_max_give_the_zero_model():
    problem = build("mlp", 0, c=3)
    solution = run(problem, 10.0)
    assert len(solution.atoms) == 0
    assert solution.certificate.converged
    X, y = np.random.default_rng(0).normal(size=(30, 3, 2)), np.arange(30) % 3
    clf = ch.ConvexHeadClassifier("mlp", activation="relu", beta_ratio=1.001).fit(X, y)
    assert clf.n_heads_ == 0
    assert ch.ConvexHeadClassifier("mlp", activation="relu", beta_ratio=0.9).fit(X, y).n_heads_ > 0


@pytest.mark.slow
def test_gated_relaxation_lies_below():
    """``val(G) ≤ val(R)`` when all patterns are gates."""
    X, y = np.random.default_rng(3).normal(size=(7, 1, 2)), np.arange(7) % 2
    relu = ch.ConvexHeadClassifier("mlp", activation="relu", beta=0.02).fit(X, y).certificate_
    gated = ch.ConvexHeadClassifier("mlp", activation="gated-relu", n_gates="all", beta=0.02).fit(X, y)
    assert gated.certificate_.dual <= relu.primal


@pytest.mark.slow
def test_intercept():
    problem = build("mlp", 1, c=3, n=9, intercept=True)
    certificate = run(problem, 0.02, tol=0.01).certificate
    assert certificate.relative_gap <= 0.01
    assert certificate.scope == "global"


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_large_problems_are_estimated_and_say_so(name, tmp_path):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 9, 8)), np.arange(60) % 3
    clf = ch.ConvexHeadClassifier(name, activation="relu", beta_ratio=0.2, tol=0.05, max_time=1, random_state=0)
    with pytest.warns(ConvergenceWarning, match="estimated relative gap"):
        clf.fit(X, y)
    certificate = clf.certificate_
    assert certificate.scope == "estimated"
    assert not certificate.converged
    assert certificate.ascents >= 32
    assert 0 <= certificate.estimated_gap <= certificate.relative_gap
    assert sorted(certificate.rewards, reverse=True) == certificate.rewards
    assert 0 <= certificate.dual <= certificate.primal
    assert "estimate" in str(certificate)
    assert "not proven" in str(certificate)
    assert clf.certificate_.primal < math.log(3)
    # ‖U_k‖‖V_k‖, balanced
    for U, V, size in zip(clf.mixing_, clf.values_, clf.singular_values_, strict=True):
        norms = [np.sqrt((w**2).sum(tuple(range(1, w.ndim)))) for w in (U, V)]
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)
        np.testing.assert_allclose(norms[0] * norms[1], size, rtol=1e-6)
    # the same function as a module and from disk
    module = clf.to_module(torch.float64)
    np.testing.assert_allclose(module(torch.from_numpy(X)).detach().numpy(), clf.model_.outputs(X)[:, 0], atol=1e-10)
    clf.save(tmp_path / "run")
    loaded = ch.load(tmp_path / "run")
    np.testing.assert_allclose(loaded.predict_proba(X), clf.predict_proba(X), atol=1e-12)
    assert loaded.certificate_ == certificate
    json.dumps(certificate.to_dict())
    # an estimate is no lower bound for anybody else
    audit = ch.certify(module, X, y, beta=clf.beta_, lower_bound=certificate, random_state=0)
    assert audit.scope == "estimated"
    assert audit.primal == pytest.approx(certificate.primal, rel=1e-6)
    assert audit.dual <= audit.primal


def searched(problem, beta):
    oracle, generator = NormOracle(problem), torch.Generator().manual_seed(0)
    assert not oracle.tight
    return relu.SearchedRounds(problem, beta, problem.empty(), Monitor(), generator=generator, oracle=oracle)


@pytest.mark.slow
def test_dual_point_is_taken_at_the_best_round(monkeypatch):
    """Rewards do not fall from round to round, so the last round need not have the best dual point."""
    problem = build("block-fno", 1, c=3, n=60, s=9, d=8)
    tried = []

    def scaled_dual(problem, f, *rest):
        tried.append((base.scaled_dual(problem, f, *rest), f))
        return tried[-1][0]

    monkeypatch.setattr(relu, "scaled_dual", scaled_dual)
    method = searched(problem, 0.01)
    method.most_steps = 6
    method.advance(1e-3)
    assert len(tried) > 2
    assert torch.equal(method.dual_point(), max(tried, key=lambda pair: pair[0])[1])


@pytest.mark.parametrize(("name", "most"), [("mlp", 256), ("mlp-mixer", 32)])
def test_a_large_problem_begins_with_many_heads(name, most):
    problem = build(name, 1, c=3, n=60, s=9, d=8)
    method = searched(problem, 1e-3)
    f = problem.outputs(problem.empty())
    maxima, _ = method._price(f, problem.data_term(f))
    assert len(maxima.values) <= method.batch
    first = method._new_atoms(f, maxima.merge(method._scattered(f)), method.widest)
    assert method.batch < len(first) <= most == method.widest
    assert problem.data_term(f + problem.outputs(first)) < problem.data_term(f)


@pytest.mark.slow
def test_audit_of_weights_that_others_trained():
    problem = build("mlp", 2, c=2, n=8)
    trained = train_adam(problem, 0.02, n_heads=4, lr=0.03, epochs=100)
    atoms = trained.module.to_atoms()
    X, y = problem.operator.X.numpy(), problem.Y[:, 0].numpy()
    ours = run(problem, 0.02).certificate
    factors = ([atoms.U.numpy()], [atoms.V.numpy()])
    for weights in (trained.module, factors):
        audit = ch.certify(weights, X, y, beta=0.02, head="mlp", activation="relu", loss="squared", lower_bound=ours)
        assert audit.scope == "global"
        assert audit.primal == pytest.approx(trained.convex_objective, rel=1e-9)
        assert audit.dual <= ours.primal <= audit.primal * (1 + 1e-9)


@pytest.mark.parametrize("name", MASKED)
def test_network_is_the_same_function(name):
    problem = build(name, 0, c=2, s=4, d=2)
    module = make_network(problem, 4, seed=0)
    assert module.activation_name == "relu"
    f = module(problem.operator.X).detach()
    torch.testing.assert_close(f, problem.outputs(module.to_atoms())[:, 0])
    loss = problem.loss.value(module(problem.operator.X).unsqueeze(1), problem.Y).mean() + 0.1 * module.penalty()
    loss.backward()
    value, at, _ = problem.value_and_gradient(module.to_atoms(), 0.1)
    assert float(loss.detach()) == pytest.approx(value)
    torch.testing.assert_close(module.mixing.grad, at.U)
    torch.testing.assert_close(module.values.grad, at.V)
    full, balanced = objectives(problem, module.to_atoms(), 0.1)
    assert balanced <= full == pytest.approx(value)


DEGENERATE = ["duplicate tokens", "zero tokens", "rank-deficient", "one sample a class"]


def degenerate(what, n=6, s=4, d=2):
    X, y = np.random.default_rng(1).normal(size=(n, s, d)), np.arange(n) % 2
    if what == "duplicate tokens":
        X[:, 1:] = X[:, :1]
        X[-1] = X[0]  # the same sample with both labels
    elif what == "zero tokens":
        X[:, s // 2 :] = 0.0
        X[0] = 0.0
    elif what == "rank-deficient":
        X[:, :, 1] = 2 * X[:, :, 0]
    else:
        X, y = X[:2], y[:2]
    return X, y


def check_fit(X, y, name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        options = {"beta_ratio": 0.3, "n_blocks": 2, "tol": 0.05, "random_state": 0} | options
        clf = ch.ConvexHeadClassifier(name, **options).fit(X, y)
    certificate = clf.certificate_
    assert np.isfinite(clf.decision_function(X)).all()
    assert certificate.dual <= certificate.primal <= math.log(2) + 1e-12
    return clf


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("what", DEGENERATE)
def test_degenerate_inputs(name, what):
    X, y = degenerate(what)
    check_fit(X, y, name, activation="relu", max_time=1)
    gated = check_fit(X, y, name, activation="gated-relu", n_gates=5)
    assert gated.certificate_.converged
    assert 1 <= len(gated.gates_) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("what", DEGENERATE)
def test_degenerate_inputs_with_all_patterns(name, what):
    """Every pattern once, also where few are left; drawing cannot find more."""
    X, y = degenerate(what, n=4, s=2)
    every = check_fit(X, y, name, activation="gated-relu", n_gates="all")
    assert every.certificate_.converged
    if name != "block-fno":  # whose gates combine the patterns of its channel groups
        drawn = sample_patterns(make_head(name, 2, 2), torch.from_numpy(X), 300, torch.Generator().manual_seed(0))
        assert len(drawn) <= len(every.gates_)
        many = check_fit(X, y, name, activation="gated-relu", n_gates=100)
        assert many.certificate_.converged
        assert len(many.gates_) <= len(every.gates_)
    relu = check_fit(X, y, name, activation="relu", beta=every.beta_, max_time=1)
    assert every.certificate_.dual <= relu.certificate_.primal


def test_the_linear_head_has_no_relu():
    with pytest.raises(ch.InputError, match="activation='linear' only"):
        ch.ConvexHeadClassifier("linear", activation="relu").fit(np.eye(6), np.arange(6) % 2)


@pytest.mark.slow
def test_a_run_may_be_bounded():
    problem = build("mlp", 4, c=3, n=10)
    solution = run(problem, 0.005, max_heads=1, tol=1e-6, max_time=2.0)
    assert len(solution.atoms) <= 1
    assert solution.stop in (Stop.HEADS, Stop.TIME)
    assert not solution.certificate.converged
    assert solution.certificate.dual <= run(problem, 0.005, tol=0.1).certificate.primal
