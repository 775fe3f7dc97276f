"""The network of a head is the same function as the library's passes, and autograd its gradient."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from convexhead.errors import InputError
from convexhead.modules import HeadModule
from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from kinds import cases, head_of, pooled

N, S, D, C = 6, 6, 4, 4
CASES = cases("linear", "gated-relu")
every_case = pytest.mark.parametrize(("name", "activation", "outputs"), CASES)
every_pooled_case = pytest.mark.parametrize(
    ("name", "activation", "outputs", "pool"), pooled(CASES, "mean", "cls", "none")
)


def build(name, activation, outputs, pool="mean", *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(N, S, D, generator=generator, dtype=dtype)
    head = head_of(name, S, D, pool=pool, grid=(2, 3), variant=outputs)
    gates = sample_gates(head, 3, generator) if activation == "gated-relu" else None
    Y = torch.softmax(torch.randn(N, head.r, C, generator=generator, dtype=torch.float64), -1)
    problem = Problem(
        Operator(X, head, make_activation(activation, head, gates)), Y, CrossEntropy(), fit_intercept=True
    )
    atoms = problem.empty()
    if head.learns_mixing:  # two atoms a block, but the last gate is left unused
        block = torch.arange(2 * problem.n_blocks) % problem.n_blocks
        block = block[block < max(1, problem.n_blocks - head.n_groups)]
        atoms.block = block
        atoms.U = torch.randn(len(block), *head.mixing_shape, generator=generator, dtype=torch.float64)
    V = torch.randn(len(atoms), *problem.value_shape, generator=generator, dtype=torch.float64)
    atoms.V = problem.mask_values(V, atoms.block)
    atoms.intercept = torch.randn(C, generator=generator, dtype=torch.float64)
    return problem, gates, atoms


def module_of(problem, gates, atoms, **options):
    name = "linear" if gates is None else "gated-relu"
    return HeadModule.from_atoms(problem.head, name, gates, atoms, **{"dtype": torch.float64, **options})


@every_pooled_case
def test_forward_is_the_librarys_function(name, activation, outputs, pool):
    problem, gates, atoms = build(name, activation, outputs, pool)
    f = module_of(problem, gates, atoms)(problem.operator.X)
    assert f.shape == ((N, S, C) if pool == "none" else (N, C))
    torch.testing.assert_close(f.view(N, -1, C), problem.outputs(atoms), rtol=1e-10, atol=1e-10)


@every_pooled_case
def test_tokens_may_lie_in_memory_as_they_like(name, activation, outputs, pool):
    problem, gates, atoms = build(name, activation, outputs, pool)
    module, X = module_of(problem, gates, atoms), problem.operator.X
    expected = module(X)
    for other in (X.mT.contiguous().mT, torch.stack([X, X], 1)[:, 0], X.repeat_interleave(2, 2)[:, :, ::2]):
        assert not other.is_contiguous()
        found = module(other)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        gradients = [torch.autograd.grad(f.square().sum(), module.values)[0] for f in (found, module(X))]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@every_pooled_case
def test_autograd_is_the_librarys_gradient(name, activation, outputs, pool):
    problem, gates, atoms = build(name, activation, outputs, pool)
    module = module_of(problem, gates, atoms)
    f = module(problem.operator.X).view(N, -1, C)
    objective = problem.loss.value(f, problem.Y).mean() + 0.3 * module.penalty()
    objective.backward()
    value, at, _ = problem.value_and_gradient(atoms, 0.3)
    assert float(objective.detach()) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(module.values.grad, at.V, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.intercept.grad, at.intercept, rtol=1e-9, atol=1e-9)
    if problem.head.learns_mixing:
        torch.testing.assert_close(module.mixing.grad, at.U, rtol=1e-9, atol=1e-9)
    else:
        assert [p for p, _ in module.named_parameters()] == ["values", "intercept"]


@every_case
def test_round_trips(name, activation, outputs):
    problem, gates, atoms = build(name, activation, outputs)
    module = module_of(problem, gates, atoms)
    back = module.to_atoms()
    for field in ("U", "V", "block", "intercept"):
        torch.testing.assert_close(getattr(back, field), getattr(atoms, field), rtol=0, atol=0)
    other = HeadModule(
        problem.head, activation, gates, torch.zeros_like(atoms.block), C, intercept=True, dtype=torch.float64
    )
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(problem.operator.X), module(problem.operator.X), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(module)(problem.operator.X), module(problem.operator.X), rtol=0, atol=0)


@every_case
def test_gradients_reach_the_tokens(name, activation, outputs):
    problem, gates, atoms = build(name, activation, outputs)
    X = problem.operator.X.clone().requires_grad_()
    module_of(problem, gates, atoms)(X).sum().backward()
    assert X.grad.isfinite().all()
    assert X.grad.abs().sum() > 0


def test_masks_do_not_depend_on_the_modules_precision():
    problem, gates, atoms = build("mlp", "gated-relu", "shared", dtype=torch.float32)
    exact = module_of(problem, gates, atoms)
    single = copy.deepcopy(exact).float()
    assert single.values.dtype == torch.float32
    assert single.gates.dtype == torch.float64
    torch.testing.assert_close(single.gates, gates, rtol=0, atol=0)
    torch.testing.assert_close(single(problem.operator.X), exact(problem.operator.X).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("with_basis", [False, True])
def test_reduction_is_applied_to_raw_tokens(constant, with_basis):
    problem, gates, atoms = build("self-attention", "gated-relu", "shared")
    raw, kept = 9, D - constant
    width = raw if with_basis else kept
    tokens = torch.randn(N, S, width)
    affine = SimpleNamespace(
        mean=torch.randn(width).numpy(),
        scale=torch.rand(width).numpy() + 0.5,
        basis=torch.linalg.qr(torch.randn(raw, kept))[0].numpy() if with_basis else None,
        constant=constant,
    )
    X = (tokens - torch.as_tensor(affine.mean)) * torch.as_tensor(affine.scale)
    X = X @ torch.as_tensor(affine.basis) if with_basis else X
    X = torch.cat([X, torch.ones(N, S, 1)], -1) if constant else X
    module = module_of(problem, gates, atoms, reduction=affine)
    torch.testing.assert_close(module(tokens), module_of(problem, gates, atoms)(X))
    assert module.reduction.mean.dtype == module.double().reduction.mean.dtype == torch.float32
    with pytest.raises(InputError, match="channels"):
        module(torch.randn(N, S, width + 1))


@every_case
def test_start_is_balanced_seeded_and_of_order_one(name, activation, outputs):
    head = head_of(name, 16, 8, variant=outputs)
    gates = None
    if activation == "gated-relu":
        gates = sample_gates(head, 5, torch.Generator().manual_seed(0))
    for scale in (1e-2, 1.0, 1e2):
        tokens = scale * torch.randn(40, 16, 8)
        first, same, other = (HeadModule(head, activation, gates, 20, C) for _ in range(3))
        first.reset_parameters(3, tokens)
        same.reset_parameters(3, tokens)
        other.reset_parameters(4, tokens)
        if not head.learns_mixing:
            assert not first.values.any()
            continue
        assert float(first(tokens).square().mean().sqrt().detach()) == pytest.approx(1, rel=1e-3)
        torch.testing.assert_close(first.mixing, same.mixing, rtol=0, atol=0)
        assert not torch.equal(first.mixing, other.mixing)
    if head.learns_mixing:
        counts = torch.bincount(first.block)
        assert counts.max() - counts.min() <= 1
        assert torch.equal(first.values, first.masked_values())


def test_no_atoms_and_one_token():
    problem, gates, atoms = build("block-fno", "gated-relu", "shared")
    none = atoms.select(torch.zeros(0, dtype=torch.int64))
    f = module_of(problem, gates, none)(problem.operator.X)
    torch.testing.assert_close(f, atoms.intercept.expand(N, C))
    flat = HeadModule(make_head("mlp", 1, D), "linear", None, 3, C)
    assert flat(torch.randn(N, D)).shape == (N, C)
    assert flat.intercept is None
    assert flat.to_atoms().intercept.shape == (C,)


def test_intercept_is_kept_where_there_is_one():
    problem, gates, atoms = build("mlp", "linear", "shared")
    assert module_of(problem, gates, atoms).intercept is not None
    zero = Atoms(atoms.U, atoms.V, atoms.block, torch.zeros(C, dtype=torch.float64))
    assert module_of(problem, gates, zero).intercept is None
    assert module_of(problem, gates, zero, intercept=True).intercept is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda h: HeadModule(h, "relu6", None, 2, C), "unknown activation"),
        (lambda h: HeadModule(h, "gated-relu", None, 2, C), "gates go with"),
        (lambda h: HeadModule(h, "linear", torch.ones(1, D), 2, C), "gates go with"),
        (lambda h: HeadModule(h, "linear", None, torch.tensor([1]), C), "blocks must lie"),
        (lambda h: HeadModule(h, "linear", None, 2, C)(torch.ones(2, S, D + 1)), r"takes \(b, 6, 4\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(InputError, match=message):
        make(make_head("mlp", S, D))
