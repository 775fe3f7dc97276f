"""An operator: outputs without targets, in any precision, and it never changes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from convexhead.errors import InputError
from convexhead.program.activations import GatedReLU, make_activation, sample_gates
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.identity import differences
from convexhead.program.losses import Squared
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from passes import CASES, C, D, N, S, problem_on

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(N, S, D))


def normal(*shape):
    return torch.from_numpy(GENERATOR.normal(size=shape))


def attention(c, dtype=torch.float64, **options):
    """An operator of gated self-attention, and atoms of ``c`` outputs for it."""
    head = make_head("self-attention", S, D)
    gates = sample_gates(head, 2, torch.Generator().manual_seed(0))
    operator = Operator(torch.from_numpy(X), head, GatedReLU(head, gates), dtype=dtype, **options)
    return operator, Atoms(normal(3, D, D), normal(3, D, c), torch.tensor([0, 1, 1]), normal(c))


@pytest.mark.parametrize("c", [1, 5])
def test_outputs_need_nothing_but_weights(c):
    operator, atoms = attention(c, reuse=False)
    expected = np.zeros((N, c))
    for x, f in zip(X, expected, strict=True):
        for U, V, j in zip(atoms.U.numpy(), atoms.V.numpy(), atoms.block.tolist(), strict=True):
            mask = x @ operator.activation.gates[j].numpy() @ x.T >= 0
            f += ((mask * (x @ U @ x.T)) @ x @ V / S).mean(0)
        f += atoms.intercept.numpy()
    np.testing.assert_allclose(operator.outputs(atoms)[:, 0].numpy(), expected, rtol=1e-11, atol=1e-12)
    none = atoms.select(torch.zeros(3, dtype=torch.bool))
    assert torch.equal(operator.outputs(none), atoms.intercept.expand(N, 1, c))


def test_astype_makes_another_and_leaves_the_first_as_it_is():
    operator, atoms = attention(C)
    before = operator.outputs(atoms)
    single = operator.astype(torch.float32, reuse=True)
    assert (operator.dtype, single.dtype) == (torch.float64, torch.float32)
    assert single.outputs(atoms.to("cpu", torch.float32)).dtype == torch.float32
    assert torch.equal(operator.outputs(atoms), before)
    assert single.budget is operator.budget
    assert operator.astype(torch.float64) is operator
    again = single.astype(torch.float64)
    assert torch.equal(again.outputs(atoms), before)  # from the tokens as they came, not from rounded ones
    with pytest.raises(FrozenInstanceError):
        operator.n = 1


def test_masks_are_the_same_in_all_precisions():
    """A token whose score is 0 but for rounding must not be on one side in float64 and on the other in float32."""
    double, atoms = attention(C)
    single, _ = attention(C, dtype=torch.float32)
    assert torch.equal(single.masks, double.masks)
    assert torch.equal(double.astype(torch.float32).masks, double.masks)
    near = single.outputs(atoms.to("cpu", torch.float32)).double()
    torch.testing.assert_close(near, double.outputs(atoms), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_some_samples_have_their_own_outputs(name, activation, reuse):
    whole = problem_on(torch.from_numpy(X), name, activation, reuse=reuse)
    k = len(whole.empty()) or 4
    block = torch.arange(k) % whole.n_blocks
    U = normal(k, *whole.head.mixing_shape) if whole.head.learns_mixing else torch.ones(k).double()
    atoms = replace(whole.empty(), U=U, V=normal(k, *whole.value_shape), block=block)
    index, identity = torch.tensor([5, 1, 40]), whole.identity
    part = whole.take(index)
    assert differences(identity, part.identity)  # a bound on the whole is none on a part
    assert (part.n, len(part.operator)) == (3, 3)
    torch.testing.assert_close(part.outputs(atoms), whole.outputs(atoms)[index], rtol=1e-12, atol=1e-12)
    expected = whole.loss.value(whole.outputs(atoms)[index], whole.Y[index]).mean() + 0.1 * whole.penalty(atoms)
    assert part.value_and_gradient(atoms, 0.1).value == pytest.approx(float(expected), rel=1e-12)
    assert whole.n == N


@pytest.mark.parametrize(("name", "activation"), CASES)
def test_an_evaluation_leaves_nothing_behind(name, activation):
    problem = problem_on(torch.from_numpy(X), name, activation)
    k = len(problem.empty()) or 4
    block = torch.arange(k) % problem.n_blocks
    U = normal(k, *problem.head.mixing_shape) if problem.head.learns_mixing else torch.ones(k).double()
    atoms = Atoms(U, normal(k, *problem.value_shape), block, normal(C))
    held = set(vars(problem)), set(vars(problem.operator))
    first = problem.value_and_gradient(atoms, 0.1)
    outputs = first.outputs.clone()
    problem.value_and_gradient(replace(atoms, V=2 * atoms.V), 0.1)
    assert torch.equal(first.outputs, outputs)
    torch.testing.assert_close(outputs, problem.outputs(atoms), rtol=1e-12, atol=1e-12)
    assert (set(vars(problem)), set(vars(problem.operator))) == held


def test_a_head_without_gates_takes_no_masks():
    head = make_head("mlp", S, D)
    assert Operator(torch.from_numpy(X), head, make_activation("linear", head, None)).masks is None


@pytest.mark.parametrize("shape", [(N - 1, 1, C), (1, 1, C), (N, S, C)])
def test_targets_are_those_of_the_outputs(shape):
    """Else they would be broadcast over samples or rows without a word."""
    operator, _ = attention(C)
    with pytest.raises(InputError, match=r"but outputs are \(61, 1, c\)"):
        Problem(operator, torch.zeros(shape), Squared())
