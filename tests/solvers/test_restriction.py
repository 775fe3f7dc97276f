"""Solving over some mixing directions: its pieces against the whole problem, its solves against the other routes."""

import pytest
import torch

import convexhead as ch
from convexhead import drive, fitting
from convexhead.certificate.certify import certify_atoms
from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy, Huber
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.solvers import restriction
from convexhead.solvers.base import Stop
from convexhead.solvers.fista import Fista
from convexhead.solvers.monitor import Monitor
from convexhead.solvers.restriction import Restriction, all_directions, leading_left, solve_restricted

HEADS = [("mlp", "shared"), ("fno", "shared"), ("block-fno", "shared"), ("block-fno", "grouped")]


def data(n=80, s=6, d=4, c=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, s, d, generator=generator, dtype=torch.float64)
    y = (X.mean(1).relu() @ torch.randn(d, c, generator=generator, dtype=torch.float64)).argmax(1)
    return X, y


def build(name, outputs, activation):
    X, y = data()
    head = make_head(name, 6, 4, n_blocks=2, outputs=outputs)
    gates = sample_gates(head, 3, torch.Generator().manual_seed(1)) if activation == "gated-relu" else None
    Y = torch.eye(4, dtype=torch.float64)[y].unsqueeze(1)
    return Problem(Operator(X, head, make_activation(activation, head, gates)), Y, CrossEntropy())


@pytest.mark.parametrize("activation", ["linear", "gated-relu"])
@pytest.mark.parametrize(("name", "outputs"), HEADS)
def test_directions_are_all_singular_triples(name, outputs, activation):
    problem = build(name, outputs, activation)
    R = problem.residual(torch.zeros(80, 1, 4, dtype=torch.float64))
    sigma, left, right = all_directions(problem, R)
    G = problem.operator.gradient_matrices(R, torch.arange(problem.n_blocks))
    torch.testing.assert_close(left * sigma.unsqueeze(1) @ right.mT, G)
    torch.testing.assert_close(sigma[:, 0], torch.linalg.matrix_norm(G, 2))


@pytest.mark.parametrize("activation", ["linear", "gated-relu"])
@pytest.mark.parametrize(("name", "outputs"), HEADS)
def test_passes_are_those_of_the_problem(name, outputs, activation):
    problem = build(name, outputs, activation)
    generator = torch.Generator().manual_seed(2)
    p, j = problem.head.mixing_size, problem.n_blocks
    left = torch.linalg.qr(torch.randn(j, p, 2, generator=generator, dtype=torch.float64)).Q
    left[0, :, 1] = 0  # a block with fewer directions
    block = torch.arange(2 * j) % j
    inner = torch.randn(2 * j, 2, generator=generator, dtype=torch.float64)
    inner[block == 0, 1] = 0
    V = torch.randn(2 * j, 1, 4, generator=generator, dtype=torch.float64)
    passes = Restriction(problem, left, torch.float64)
    atoms = passes.leave(Atoms(inner, problem.mask_values(V, block), block, torch.zeros(4).double()))
    torch.testing.assert_close(passes.enter(atoms).U, inner)
    f = problem.outputs(atoms)
    torch.testing.assert_close(passes.outputs(passes.matrices(passes.enter(atoms)), atoms.intercept), f)
    R = problem.residual(f)
    whole = problem.operator.gradient_matrices(R, torch.arange(j))
    torch.testing.assert_close(passes.gradient(R), left.mT @ whole)


@pytest.mark.parametrize("first", [restriction.FIRST, 1])
def test_rounds_end_at_the_optimum_of_the_whole(first, monkeypatch):
    monkeypatch.setattr(restriction, "FIRST", first)  # 1: fewer than there are blocks
    problem = build("fno", "shared", "gated-relu")
    f = torch.zeros(80, 1, 4, dtype=torch.float64)
    beta = 0.1 * float(all_directions(problem, problem.residual(f)).sigma.max())
    atoms = problem.empty()
    past = None
    for _ in range(12):
        left = leading_left(all_directions(problem, problem.residual(problem.outputs(atoms))), beta)
        both = left if past is None else torch.cat([left, past], dim=2)
        atoms, past = solve_restricted(problem, atoms, both, beta, until=1e-8, monitor=Monitor()), left
    certificate = certify_atoms(problem, atoms, beta, tol=1e-5)
    assert certificate.converged


def test_what_rounding_hides_in_single_precision_is_found_in_double(monkeypatch):
    ends = []

    class Watched(Fista):
        def advance(self, target):
            longest = 1 / self.L
            stop = super().advance(target)
            ends.append((self.dense.features.dtype, stop))
            assert self.L * longest < 1e5  # rounding is not taken for curvature
            return stop

    monkeypatch.setattr(restriction, "Fista", Watched)
    monkeypatch.setattr(restriction, "SINGLE", 0.0)
    problem = build("fno", "shared", "gated-relu").astype(torch.float32)
    directions = all_directions(problem, problem.residual(torch.zeros(80, 1, 4)))
    beta = 0.002 * float(directions.sigma.max())
    solve_restricted(problem, problem.empty(), leading_left(directions, beta), beta, until=1e-10, monitor=Monitor())
    assert ends == [(torch.float32, Stop.STALLED), (torch.float64, Stop.CONVERGED)]


def test_single_precision_ends_where_rounding_hides_the_decrease():
    problem = build("fno", "shared", "gated-relu")
    directions = all_directions(problem, problem.residual(torch.zeros(80, 1, 4, dtype=torch.float64)))
    beta = 0.02 * float(directions.sigma.max())
    objectives = []
    for dtype in (torch.float32, torch.float64):
        passes = Restriction(problem, leading_left(directions, beta), dtype)
        method = Fista(passes.problem, beta, problem.empty(), Monitor(), dense=passes)
        method.most_steps = 400
        method.advance(0.0)
        atoms = method.atoms()
        objectives.append(problem.data_term(problem.outputs(atoms)) + beta * problem.penalty(atoms))
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-6)
    assert objectives[0] != objectives[1]


@pytest.mark.slow
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("activation", ["linear", "gated-relu"])
@pytest.mark.parametrize(("name", "outputs"), HEADS)
def test_every_route_ends_at_the_same_objective(name, outputs, activation, intercept, monkeypatch):
    X, y = data()

    def fit(solver):
        model = ch.ConvexHeadClassifier(
            head=name, outputs=outputs, activation=activation, n_blocks=2, n_gates=2, beta_ratio=0.1, tol=1e-3,
            fit_intercept=intercept, random_state=0, solver=solver,
        )  # fmt: skip
        return model.fit(X.numpy(), y.numpy()).certificate_

    dense = fit("fista")
    monkeypatch.setattr(fitting, "SMALL_TOKENS", 0)
    restricted = fit("column-generation")
    monkeypatch.setattr(restriction, "MOST_FEATURES", 0)
    factored = fit("column-generation")
    for certificate in (dense, restricted, factored):
        assert certificate.converged
        assert certificate.primal >= max(dense.dual, restricted.dual, factored.dual)


def test_a_certificate_does_not_suffer_from_dropping_what_is_negligible(monkeypatch):
    # A little of the nuclear norm, but much of the distance to the optimum where β is small.
    given = {}

    def certify(problem, model, beta, *, dual_point=None, **others):
        given["dual_point"] = dual_point
        given["own"] = certify_atoms(problem, model, beta, **others | {"known_dual": -torch.inf}).relative_gap
        return certify_atoms(problem, model, beta, dual_point=dual_point, **others)

    finish = drive.finish
    monkeypatch.setattr(drive, "certify_atoms", certify)
    monkeypatch.setattr(drive, "finish", lambda problem, atoms, _, most: finish(problem, atoms, 1e-3, most))
    X, y = data(n=300)
    model = ch.ConvexHeadClassifier(
        "block-fno", activation="gated-relu", n_gates=12, n_blocks=2, beta_ratio=0.005, tol=1e-2, random_state=0
    )
    model.fit(X, y)
    estimate = model.history_[-1]["gap"] / model.history_[-1]["objective"]
    assert given["dual_point"] is not None
    assert model.certificate_.relative_gap < 1.5 * estimate < given["own"]


@pytest.mark.parametrize("least", [0.0, 1e-165, 1e-153, 1e-140])
def test_features_that_are_all_nearly_0_leave_the_intercept_to_solve_for(least):
    head, gate = make_head("mlp", 6, 4), -torch.ones(1, 4, dtype=torch.float64)
    X = data()[0].abs()  # no token passes the gate, but for one
    X[0, 0] = -least
    Y = torch.arange(80.0, dtype=torch.float64).view(80, 1, 1)
    problem = Problem(Operator(X, head, make_activation("gated-relu", head, gate)), Y, Huber(0.01), fit_intercept=True)
    start = problem.empty()
    start.intercept.fill_(1e3)
    method = Fista(problem, 1.0, start, Monitor())
    method.advance(1e-8)
    certificate = certify_atoms(problem, method.atoms(), 1.0, tol=1e-6, generator=torch.Generator())
    assert certificate.converged
    assert torch.isfinite(method.Z).all()
