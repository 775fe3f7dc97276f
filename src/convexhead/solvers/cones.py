"""Descent of a small ReLU head within the cones of its own activation patterns, to high accuracy.

    min  Φ(U, V, b)    over    sign(K U_k) ⊙ K U_k ≥ 0    for every atom k

Within its cone each atom is bilinear in its weights: the objective is smooth there, and weights come to lie on the
cone's hyperplanes, as optimal ones often do, as active constraints. For scalar values this is the cone-constrained
group program of Pilanci & Ergen (2020) over the cones in use, in factored form. What another cone would be worth is
for pricing to find out.

Sequential quadratic programming (SLSQP), whose metric is dense: for problems with explicit scores only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize

from convexhead.dual_norm.scores import Scores
from convexhead.program.atoms import Atoms
from convexhead.runtime.clock import OutOfTimeError
from convexhead.solvers.factored import Passes, pack, unpack

ITERATIONS = 200
WORK = 3e7
"""Largest work of one iteration: constraints times the square of the number of variables. Chosen by hand."""
ACCURACY = 1e-15
"""Decrease of the objective, in units of its curvature, below which a descent ends. Chosen by hand: near rounding."""


def descend_in_cones(
    passes: Passes, atoms: Atoms, scores: list[Scores], beta: float, out_of_time: Callable[[], bool]
) -> Atoms:
    """The best weights found over the cones that ``atoms`` lie in, by the factored objective.

    Where the scores are too many to constrain them all, those stay free whose hyperplanes are farthest from an atom;
    where the weights are too many for even one each, ``atoms`` are returned.
    """
    x = pack(atoms).numpy(force=True)
    room = int(WORK / max(len(x), 1) ** 2 / max(len(atoms), 1))
    if room < 1 or not len(atoms):
        return atoms
    cones = _cones(atoms, scores, room)
    scale = 1.0 / beta  # the penalty then has curvature one
    best, best_x = math.inf, x

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, best_x
        if out_of_time():
            raise OutOfTimeError
        here = unpack(torch.from_numpy(x).to(atoms.V), atoms)
        value, gradient, _ = passes.value_and_gradient(here, beta)
        if value < best:
            best, best_x = value, x.copy()
        return scale * value, scale * pack(gradient).numpy(force=True)

    inside = {"type": "ineq", "fun": lambda x: cones @ x, "jac": lambda x: cones}
    with contextlib.suppress(OutOfTimeError):
        minimize(
            function, x, jac=True, method="SLSQP", constraints=inside, options={"maxiter": ITERATIONS, "ftol": ACCURACY}
        )
    return unpack(torch.from_numpy(best_x).to(atoms.V), atoms)


def _cones(atoms: Atoms, scores: list[Scores], room: int) -> Float[np.ndarray, "m x"]:
    """The ``room`` nearest hyperplanes of each atom as rows that are nonnegative on its side of them."""
    k, p = atoms.U.flatten(1).shape
    rows = []
    for i, (u, j) in enumerate(zip(atoms.U.flatten(1), atoms.block.tolist(), strict=True)):
        own = scores[j]
        along = own.planes @ (own.basis @ u)
        near = along.abs().argsort()[:room]
        sides = torch.where(along[near] >= 0, 1.0, -1.0).unsqueeze(1) * (own.planes[near] @ own.basis)
        row = sides.new_zeros(len(near), k, p)
        row[:, i] = sides
        rows.append(row.flatten(1))
    A = torch.cat(rows)
    return torch.cat([A, A.new_zeros(len(A), pack(atoms).numel() - k * p)], 1).numpy(force=True)
