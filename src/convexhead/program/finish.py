"""Models before the first step of a solver and after its last."""

from __future__ import annotations

import torch
from torch import Tensor

from convexhead.program.atoms import Atoms
from convexhead.program.intercept import solve_intercept
from convexhead.program.problem import Problem


def zero_model(problem: Problem) -> Atoms:
    """Return no atoms, and the intercept that is best without any."""
    model = problem.empty()
    if problem.fit_intercept:
        exact = problem.astype(torch.float64)
        f = torch.zeros(len(problem.losses), problem.head.r, problem.c, dtype=torch.float64, device=problem.device)
        model.intercept = solve_intercept(exact, f).to(problem.dtype)
    return model


def finish(problem: Problem, atoms: Atoms, negligible: float, max_heads: int | None) -> Atoms:
    """Return the model that is certified and kept: float64, balanced, no negligible atoms, its intercept solved for.

    Atoms are negligible that together carry the share ``negligible`` of the nuclear norm. The linear head's one atom
    and its intercept were found together, and stay as they are.
    """
    atoms = atoms.to(problem.device, torch.float64)
    if not problem.head.learns_mixing:
        return atoms
    atoms, singular_values = problem.balance(atoms)
    atoms.V = problem.mask_values(atoms.V, atoms.block)  # balancing leaves rounding there
    if len(atoms):
        atoms = _without_negligible(problem, atoms, torch.cat(singular_values), negligible, max_heads)
    if problem.fit_intercept:
        exact = problem.astype(torch.float64)
        # Not from the intercept at hand: where it is not unique, one that does not depend on the way there.
        atoms.intercept = solve_intercept(exact, exact.outputs(atoms) - atoms.intercept)
    return atoms


def _without_negligible(
    problem: Problem, atoms: Atoms, sigma: Tensor, negligible: float, max_heads: int | None
) -> Atoms:
    order = sigma.argsort()
    dropped = torch.cumsum(sigma[order], 0) <= negligible * sigma.sum()
    if max_heads is not None:
        dropped[: max(0, len(sigma) - max_heads)] = True
    keep = torch.ones_like(dropped)
    keep[order[dropped]] = False
    # Where tokens are far from 0 a small ReLU atom may move outputs far.
    if max_heads is None and not problem.activation.convex and not bool(keep.all()):
        exact = problem.astype(torch.float64)
        before, after = (exact.data_term(exact.outputs(part)) for part in (atoms, atoms.select(keep)))
        keep |= after > before + negligible * abs(before)
    return atoms.select(keep)
