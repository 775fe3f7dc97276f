"""Passes that begin with the values are those that mix first, and cost less where they are chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convexhead.linalg.gradient_matrices import GradientMatrices
from convexhead.program.activations import LinearActivation
from convexhead.program.atoms import Atoms
from convexhead.program.contraction import MixFirst, ValuesFirst
from convexhead.program.heads import make_head
from convexhead.program.operator import Operator

HEADS = ("self-attention", "mlp-mixer")
N, S, D, C, K = 5, 12, 7, 3, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name, *, s=S, d=D, c=C, reuse=True):
    head = make_head(name, s, d, pool="none")
    operator = Operator(normal(N, s, d), head, LinearActivation(head), reuse=reuse)
    block = torch.zeros(K, dtype=torch.int64)
    atoms = Atoms(normal(K, *head.mixing_shape, seed=1), normal(K, d, c, seed=2), block, torch.zeros(c).double())
    (_, data), *rest = operator.samples.batches(N)
    assert not rest
    return operator, data, atoms, normal(N, s, c, seed=3)


@pytest.mark.parametrize("reuse", [True, False], ids=["gram", "tokens"])
@pytest.mark.parametrize("name", HEADS)
def test_both_orders_say_the_same(name, reuse):
    operator, data, atoms, R = build(name, reuse=reuse)
    mix, values = MixFirst(operator.activation), ValuesFirst(operator.head, C)
    U, V, block = atoms.U, atoms.V, atoms.block
    torch.testing.assert_close(values.outputs(data, U, V, block), mix.outputs(data, U, V, block))
    torch.testing.assert_close(values.times_values(data, R, V, block, None), mix.times_values(data, R, V, block, None))
    torch.testing.assert_close(values.times_mixing(data, R, U, block), mix.times_mixing(data, R, U, block))
    draws = torch.stack([R, R.flip(0)])
    pairs = [sorted(each.pairs(data, atoms, draws, 1).tolist()) for each in (values, mix)]  # whatever their order
    np.testing.assert_allclose(*pairs)
    (f, back), (g, other) = (each.with_pull_back(data, U, V, block) for each in (values, mix))
    torch.testing.assert_close(f, g)
    for mine, theirs in zip(back(R), other(R), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", HEADS)
def test_few_classes_and_many_tokens_are_cheaper_that_way(name):
    """At a segmentation's sizes; the operator takes it there, and not where it would cost more."""
    operator, data, atoms, R = build(name, s=48, d=32, c=4)
    counted = []
    for contraction in (operator.contraction(4), MixFirst(operator.activation)):
        with FlopCounterMode(display=False) as counter:
            _, pull_back = contraction.with_pull_back(data, atoms.U, atoms.V, atoms.block)
            pull_back(R)
        counted.append(counter.get_total_flops())
    assert counted[0] < counted[1] / 3
    assert not operator.activation.values_first(48)
    head = make_head(name, 48, 32, pool="mean")
    assert not LinearActivation(head).values_first(4)


@pytest.mark.parametrize("name", HEADS)
def test_gradient_matrices_are_formed_outright(name):
    operator, _, _, R = build(name)
    assert operator.gradient_cost(C) is not None
    blocks = torch.zeros(1, dtype=torch.int64)
    products = GradientMatrices(operator, R, form=False)
    every = torch.eye(products.q, dtype=torch.float64).unsqueeze(0)
    torch.testing.assert_close(operator.gradient_matrices(R, blocks), products.times(every, blocks))


@pytest.mark.parametrize("name", HEADS)
def test_grams_of_values_are_estimated_from_enough_rows(name):
    head = make_head(name, S, D, pool="none")
    X, U = normal(400, S, D), normal(2, *head.mixing_shape, seed=1)
    operator = Operator(X, head, LinearActivation(head))
    block = torch.zeros(2, dtype=torch.int64)
    M = operator.mixed(U, block).flatten(2).flatten(0, 1)
    atoms = Atoms(U, normal(2, D, C, seed=2), block, torch.zeros(C).double())
    (estimate,) = operator.value_grams(atoms, [torch.arange(2)])
    exact = M.T @ M / 400
    assert not torch.equal(estimate, exact)
    relative = torch.linalg.eigvals(torch.linalg.solve(exact, estimate)).real
    assert 0.3 < float(relative.min()) < float(relative.max()) < 3
