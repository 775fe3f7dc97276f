"""What solvers take for curvature, against Hessians and gradients by automatic differentiation."""

from dataclasses import fields, replace

import pytest
import torch

from convexhead.program.activations import make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.linear_passes import LinearPasses
from convexhead.program.losses import LOSSES, make_loss
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.solvers.base import scaled_dual
from convexhead.solvers.linear_curvature import BlockCurvature, LinearCurvature
from convexhead.solvers.pricing import Directions
from convexhead.solvers.subspace import Subspace, most_coefficients
from convexhead.solvers.whitening import Whitening, curvatures


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(n=40, loss="cross-entropy"):
    head = make_head("self-attention", 4, 3)
    Y = torch.eye(3, dtype=torch.float64)[torch.arange(n) % 3].unsqueeze(1)
    problem = Problem(Operator(normal(n, 4, 3), head, make_activation("linear", head, None)), Y, make_loss(loss))
    block = torch.zeros(2, dtype=torch.int64)
    return problem, Atoms(normal(2, 3, 3, seed=1), normal(2, 3, 3, seed=2), block, torch.zeros(3).double())


@pytest.mark.parametrize("n_classes", [3, 40])
def test_cross_entropy_in_either_layout_of_outputs(n_classes):
    loss, f = make_loss("cross-entropy"), normal(7, 2, n_classes)
    y = torch.eye(n_classes, dtype=torch.float64)[torch.randint(n_classes, (7, 2))]
    columns = [part.movedim(2, 0).contiguous().movedim(0, 2) for part in (f, y)]
    for expected, *found in zip(
        (-(y * torch.log_softmax(f, -1)).sum((1, 2)), torch.softmax(f, -1) - y),
        loss.value_and_residual(f, y),
        loss.value_and_residual(*columns),
        (loss.value(*columns), loss.residual(*columns)),
        strict=True,
    ):
        for part in found:
            torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_root_of_the_hessian(name):
    loss, f, y = make_loss(name), normal(1, 1, 5), torch.eye(5, dtype=torch.float64)[None, :1]
    hessian = torch.func.hessian(lambda v: loss.value(v.view(1, 1, 5), y).sum())(f.flatten())
    root = torch.cat([loss.hessian_root(f, y, e.view(1, 1, 5)).view(1, 5) for e in torch.eye(5).double()]).T
    torch.testing.assert_close(root @ root.T, hessian)


def test_whitening_is_a_change_of_coordinates():
    problem, atoms = build()
    whitening, other = Whitening(problem, atoms, problem.outputs(atoms), 0.1), build()[1]
    back = whitening.weights(whitening.whiten(other))
    for field in fields(Atoms):
        torch.testing.assert_close(getattr(back, field.name), getattr(other, field.name))

    def product(a, b):
        return sum((getattr(a, part) * getattr(b, part)).sum() for part in ("U", "V", "intercept"))

    # <gradient, weights(x)> = <pull(gradient), x>
    torch.testing.assert_close(product(atoms, whitening.weights(other)), product(whitening.pull(atoms), other))
    gram = problem.operator.value_grams(atoms, [torch.arange(2)])[0]
    mixed = problem.operator.mixed(atoms.U, atoms.block).flatten(2).flatten(0, 1)
    torch.testing.assert_close(gram, mixed.T @ mixed / problem.n)


def test_whitened_classes_are_stretched_along_what_is_in_doubt():
    problem, atoms = build()
    f = problem.outputs(atoms)
    whitening, w = Whitening(problem, atoms, f, 0.1), curvatures(problem, f)
    assert (whitening.stretch > 0).any()
    for o in range(3):
        assert float(torch.linalg.vector_norm(whitening.along[:, :, o])) == pytest.approx(1)
        unit = torch.zeros_like(atoms.V)
        unit[:, :, o] = whitening.along[:, :, o]
        zero = replace(atoms, U=0 * atoms.U, V=unit, intercept=torch.zeros(3).double())
        V = whitening.weights(zero).V
        change = problem.outputs(replace(atoms, V=V, intercept=torch.zeros(3).double()))
        curvature = float((w * change.square()).sum() / problem.n + 0.1 * V.square().sum())
        assert curvature == pytest.approx(1) if whitening.stretch[o] > 0 else curvature <= 1


def test_drawn_curvatures_average_to_the_diagonal():
    problem, atoms = build(n=3000)
    f = problem.outputs(atoms)
    p = torch.softmax(f, 2)
    torch.testing.assert_close(curvatures(problem, f).mean(0), (p * (1 - p)).mean(0), rtol=0.1, atol=0)


def test_a_subspace_has_the_gradient_and_hessian_of_the_data_term():
    problem, atoms = build()
    left, right = (torch.linalg.qr(normal(1, 9, 1, seed=s)).Q for s in (3, 4))
    f = problem.outputs(atoms)
    subspace = Subspace(problem, problem, atoms, f, Directions(normal(1, 1), left, right))
    M = subspace.start
    torch.testing.assert_close(subspace.change(M) + atoms.intercept, f)

    def value(m):
        V = torch.bmm(m.view_as(M), subspace.right.mT).view(subspace.basis.V.shape)
        return problem.loss.value(subspace.mixed.flatten(2) @ V.flatten(0, 1), problem.Y).mean()

    torch.testing.assert_close(subspace.gradient(f).flatten(), torch.func.grad(value)(M.flatten()))
    exact = torch.func.hessian(value)(M.flatten())
    generator = torch.Generator().manual_seed(0)
    drawn = sum(subspace.hessian(f, generator) for _ in range(300)) / 300
    assert torch.linalg.matrix_norm(drawn - exact, 2) < 0.05 * torch.linalg.matrix_norm(exact, 2)

    def objective(m):
        return float(value(m.flatten())) + 0.05 * float(torch.linalg.svdvals(m).sum())

    best = subspace.solve(0.05, until=1e-4, generator=generator)
    assert objective(best) < objective(M)


def test_soft_labels_in_single_precision_have_a_bound():
    """In float32 probabilities do not sum to 1 in float64, outside of the domain of the conjugate."""
    problem, atoms = build()
    Y = torch.softmax(normal(40, 1, 3, seed=5), 2)
    bounds = []
    for dtype in (torch.float64, torch.float32):
        soft = Problem(problem.operator.astype(dtype), Y, problem.loss, weights=normal(40, 1, 1, seed=6).abs())
        bounds.append(scaled_dual(soft, soft.outputs(atoms.to("cpu", dtype)), 1.0, 0.5, atoms.intercept))
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-5)


def test_more_samples_leave_room_for_more_coefficients():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    room = {n: most_coefficients(n, cpu) for n in (200, 8_000, 50_000, 10**6)}
    assert room == {200: 3000, 8_000: 3000, 50_000: 7500, 10**6: 8000}
    assert most_coefficients(50_000, cuda) == 10_000


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("name", ["cross-entropy", "binary-cross-entropy"])
def test_rows_in_doubt_are_in_the_curvature_of_the_linear_head(name, intercept):
    """Of 60 rows all but 2 have outputs without doubt: what is left is the Hessian, in all outputs together."""
    n, d, c, beta = 60, 40, 3, 1e-3
    head = make_head("linear", 1, d)
    X, Y = normal(n, 1, d), torch.eye(c, dtype=torch.float64)[torch.arange(n) % c].unsqueeze(1)
    operator = Operator(X, head, make_activation("linear", head, None))
    passes = LinearPasses(Problem(operator, Y, make_loss(name), fit_intercept=intercept))
    f = torch.where(torch.arange(n).view(n, 1, 1) < 2, 0.3 * normal(n, 1, c, seed=1), 60 * (Y - 0.5))
    M = LinearCurvature(passes, passes.moments(diagonal=False), f, beta)

    def hessian(q):
        product = passes.curved(f, q)
        product[:, :-1] += beta * q[:, :-1]
        return product

    units = torch.eye(c * (d + 1), dtype=torch.float64).view(-1, c, d + 1)
    kept = slice(None) if intercept else slice(0, d)
    product = torch.stack([M.solve(hessian(q))[:, kept].flatten() for q in units[units[:, :, kept].any(2).any(1)]])
    found = torch.linalg.eigvals(product)
    if intercept and name == "cross-entropy":  # a shift of all outputs changes nothing
        found = found[found.abs() > 1e-6]
    torch.testing.assert_close(found.real, torch.ones_like(found.real), rtol=0, atol=1e-3)
    assert M.spread > 10


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("name", ["cross-entropy", "binary-cross-entropy"])
def test_blocks_are_those_of_the_hessian(name, intercept, weighted):
    n, d, c, beta = 40, 5, 3, 1e-3
    head = make_head("linear", n_tokens=1, n_channels=d)
    X, Y = normal(n, 1, d), torch.eye(c, dtype=torch.float64)[torch.arange(n) % c].unsqueeze(1)
    weights = normal(n, 1, 1, seed=2).abs() if weighted else None
    operator = Operator(X, head, make_activation("linear", head, None))
    problem = Problem(operator, Y, make_loss(name), weights=weights, fit_intercept=intercept)
    passes, f = LinearPasses(problem), normal(n, 1, c, seed=1)
    M = BlockCurvature(passes, f, beta)
    kept = d + 1 if intercept else d
    for k in range(c):
        units = torch.zeros(kept, c, d + 1, dtype=torch.float64)
        units[torch.arange(kept), k, torch.arange(kept)] = 1.0
        block = torch.stack([passes.curved(f, q)[k] for q in units])[:, :kept]
        block[:d, :d] += beta * torch.eye(d, dtype=torch.float64)
        inverse = torch.stack([M.solve(q)[k] for q in units])[:, :kept]
        torch.testing.assert_close(inverse @ block, torch.eye(kept, dtype=torch.float64), rtol=0, atol=1e-4)


def test_blocks_are_formed_where_they_pay():
    head = make_head("linear", n_tokens=1, n_channels=40)
    operator = Operator(normal(8, 1, 40), head, make_activation("linear", head, None))
    passes = LinearPasses(Problem(operator, torch.ones(8, 1, 2), make_loss("squared")))
    assert not BlockCurvature.pays(passes, 20)
    assert BlockCurvature.pays(passes, 21)
    passes.d = 5000
    assert not BlockCurvature.pays(passes, 10_000)  # too large
