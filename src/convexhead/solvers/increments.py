"""The factored objective around an anchor, its large products in bfloat16 without bfloat16's errors.

With weights ``(U, V) = (U₀ + ΔU, V₀ + ΔV)`` and mixed tokens ``M = P mix(X, U)``, which are linear in ``U``,

    f = f₀ + M₀ ΔV + P mix(X, ΔU) V

    ∇V = ∇V₀ + M₀ᵀ (R − R₀) + (P mix(X, ΔU))ᵀ R          ∇U = ∇U₀ + mix_adjoint((R − R₀) V₀ᵀ + R ΔVᵀ)

Outputs, residuals and gradients at the anchor are made in full precision once, and every rounded product is
proportional to the distance from it: relative errors of 2⁻⁸ are errors of the step, and vanish with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexhead.program.atoms import Atoms
from convexhead.program.heads.base import Data
from convexhead.program.problem import Evaluation, Problem

MIXED_BYTES = {"cpu": 2e9, "cuda": math.inf}
"""Largest number of bytes that the mixed tokens of the anchor may take, whatever the budget. Chosen by hand."""


class Increments:
    """Passes over the data for `FactoredDescent`; see the module's text.

    Parameters
    ----------
    problem : Problem
        Gives what is needed at the anchor.
    rough : Problem
        The same with products in bfloat16.
    anchor : Atoms
        ``U₀, V₀``, any number of atoms.

    """

    def __init__(self, problem: Problem, rough: Problem, anchor: Atoms) -> None:
        self.problem, self.rough, self.anchor = problem, rough, anchor
        self.mixed = rough.operator.mixed(anchor.U, anchor.block)
        rough.operator.budget.lend(self.mixed.nbytes, self)
        _, self.gradient, self.outputs = problem.value_and_gradient(anchor, 0.0)
        self.residual = problem.residual(self.outputs)

    @staticmethod
    def affordable(problem: Problem, rough: Problem, anchor: Atoms) -> bool:
        """Whether there are cheaper products, and room for the anchor's mixed tokens."""
        if rough is problem:
            return False
        operator, most = rough.operator, MIXED_BYTES[problem.device.type]
        short = operator.mixed_bytes(len(anchor)) > min(most, operator.budget.left)
        return not problem.ranks.largest(short)[0]  # all processes must take the same passes

    def value_and_gradient(self, atoms: Atoms, beta: float) -> Evaluation:
        """As `Problem.value_and_gradient`."""
        problem, anchor, activation = self.problem, self.anchor, self.problem.activation
        half = self.rough.operator.product_dtype
        dU, dV = atoms.U - anchor.U, (atoms.V - anchor.V).flatten(0, 1).to(half)
        V, V0 = atoms.V.flatten(0, 1).to(half), anchor.V.flatten(0, 1).to(half)
        both = torch.cat([V0, dV], dim=1).T  # (2c, k·e)
        outputs = torch.empty_like(self.outputs)
        gU, gV, gb = torch.zeros_like(atoms.U), torch.zeros_like(atoms.V), torch.zeros_like(atoms.intercept)
        total = torch.zeros((), dtype=torch.float64, device=problem.device)

        def evaluate(rows: slice, data: Data) -> tuple[Tensor, ...]:
            M0 = self.mixed[rows].flatten(2).flatten(0, 1)  # (b·r, k·e)
            dM, pull_back = activation.mix_with_pull_back(data, dU, atoms.block)
            flat = dM.flatten(2).flatten(0, 1)
            df = (M0 @ dV).float() + flat @ V + (atoms.intercept - anchor.intercept)
            f = self.outputs[rows] + df.view(-1, problem.head.r, problem.c)
            outputs[rows] = f
            loss, R = problem.losses.at(rows).value_and_residual(f)
            R = R / problem.n
            dR = R - self.residual[rows]
            at_b = dR.sum((0, 1))
            R, dR = R.flatten(0, 1), dR.flatten(0, 1)
            at_V = ((M0.T @ dR).float() + flat.T @ R).view(gV.shape)
            at_U = pull_back((torch.cat([dR, R], dim=1) @ both).view(dM.shape))
            return loss.double().sum(), at_U, at_V, at_b

        self.rough.operator.over_batches(len(atoms), evaluate, total, gU, gV, gb)
        total, gU, gV, gb = problem.sum(total, gU, gV, gb)
        before = self.gradient
        gb = gb + before.intercept if problem.fit_intercept else torch.zeros_like(gb)
        gU, gV = gU + before.U + beta * atoms.U, problem.mask_values(gV + before.V + beta * atoms.V, atoms.block)
        value = float(total) / problem.n + beta * problem.penalty(atoms)
        return Evaluation(value, Atoms(gU, gV, atoms.block, gb), outputs)
