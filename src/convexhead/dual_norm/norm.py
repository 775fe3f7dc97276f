"""The dual norm of a ReLU head is

    h(R) = max_{‖u‖ ≤ 1} ‖Σ_i (P mix(X_i, u))ᵀ R_i‖_F

the largest reward that any mixing weight can have. Two statements, never mixed: an *upper bound*, a proof, and the
largest value that a *search* has found. How the bound is had depends on the size of the problem:

``faces``              every face of the arrangement of scores is gone through (`faces`): exact, for few samples;
``branch and bound``   the sphere is covered (`bound`): as tight as asked for, where few mixing dimensions are seen;
``patterns``           every activation pattern is gone through, where they can be enumerated: the norm of the gradient
                       matrix of each, for scalar values restricted to the pattern's own cone, which makes it exact;
``product of norms``   ``max(t, 0) = (t + |t|)/2`` gives ``½‖Kᵀ C‖₂ + ½‖K‖₂‖C‖₂``: always valid, never tight;
``none``               the problem is too large to write its scores out.

Faces and patterns are listed only where float64 can tell hyperplanes apart; where not, the next method serves. All
charge what was dropped, merged and rounded (`scores`). A search is the last check: a value that it attained above a
bound refutes the bound, which then gives way to the product of norms, or to none (``refuted``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls
from torch import Tensor

from convexhead.dual_norm.ascent import LocalMaxima, ascend, starts
from convexhead.dual_norm.bound import MAX_DIMENSION, ROUNDING, largest_norm
from convexhead.dual_norm.faces import LIMITS, FacesOfDimension, count_faces, doubt_of, faces, largest_norm_on_faces
from convexhead.dual_norm.query_ascent import QueryMaxima
from convexhead.dual_norm.scores import TINY, Form, Scores, scores_of
from convexhead.program.atoms import Atoms
from convexhead.program.patterns import EPSILON, MAX_PATTERNS, UnreliableError, cells_and_doubt, most_cells
from convexhead.program.problem import Problem
from convexhead.runtime.clock import OutOfTimeError, never

WRITTEN_OUT = 2e6
"""Float64 numbers that the scores may take as explicit functions of the mixing weights. Chosen by hand: 16 MB."""
WIDE = 16
"""Ratio to `WRITTEN_OUT` of the numbers that unit weights and values may take, which are read to write scores out."""
WORK = 6e7
"""Scores that one branch and bound may compute. Chosen by hand: some seconds; fewer after one that stayed loose."""
FEW_PLANES = 1_000
"""Largest number of hyperplanes for repeated branch and bound in more than three dimensions. Chosen by hand."""
LOOSE = 1.05
"""Ratio of a bound to the value that a search attained above which the bound counts as loose. Chosen by hand."""


@dataclass(frozen=True)
class DualNorm:
    """Bounds ``maxima.values[0] ≤ h(R) ≤ upper``; an ``upper`` that the maxima exceed becomes infinite.

    Attributes
    ----------
    upper : float
        Proven, rounding included; infinite where nothing is known.
    method : str
        How it was had; see the module's text.
    maxima : LocalMaxima or QueryMaxima
        What the search found.
    ascents : int
        Starts of the search.
    refuted : bool
        Whether a search attained more than a bound allowed, which was discarded: rounding was larger than it charged.
    """

    upper: float
    method: str
    maxima: LocalMaxima | QueryMaxima
    ascents: int
    refuted: bool = False

    def __post_init__(self) -> None:
        if not self.upper >= self.lower:
            object.__setattr__(self, "upper", math.inf)
            object.__setattr__(self, "refuted", True)

    @property
    def loose(self) -> bool:
        """Whether the bound is far above what the search found: better searches will not close the gap."""
        return self.upper > LOOSE * self.lower

    @property
    def lower(self) -> float:
        """Return the largest value found."""
        return float(self.maxima.values[0]) if len(self.maxima.values) else 0.0


class NormOracle:
    """``h(R)`` of one problem, for any residuals: what depends on the tokens alone is found once.

    Parameters
    ----------
    problem : Problem
        With a ReLU. Searches run in its precision, bounds always in float64.
    late : callable () -> bool
        Whether to give up preparing a method and take the next one, which is less tight.

    Attributes
    ----------
    scores : list of Scores or None
        Of each channel group; None where they would take too much memory.
    method : str
        How bounds are had; see the module's text.
    work : float
        Scores that the next branch and bound may compute.
    """

    def __init__(self, problem: Problem, *, late: Callable[[], bool] = never) -> None:
        self.operator = problem.operator
        head = problem.head
        rows = problem.n * head.p * head.score_width
        widest = max(head.mixing_size, problem.value_shape[0] * problem.c)
        small = widest * max(rows * head.n_groups, widest / WIDE) <= WRITTEN_OUT
        self.scores = scores_of(self.operator) if small else None
        self.work = WORK
        self._faces: list[list[FacesOfDimension]] = []
        self._cells: list[tuple[Tensor, float]] = []
        self.method = "none" if self.scores is None else self._prepare(self.scores, late)

    def on(self, problem: Problem) -> NormOracle:
        """The same oracle for the same problem in another precision, that of its searches."""
        other = copy.copy(self)
        other.operator = problem.operator
        return other

    def _prepare(self, scores: list[Scores], late: Callable[[], bool]) -> str:
        """The tightest method that can be had and relied upon."""
        for method in _affordable(scores):
            try:
                if method == "faces":
                    self._faces = [faces(s.planes, late=late) for s in scores]
                elif method == "patterns":
                    self._cells = [cells_and_doubt(s.planes, late=late) for s in scores]
            except (UnreliableError, OutOfTimeError):
                continue
            return method
        return "product of norms"

    @property
    def tight(self) -> bool:
        """Whether a solver can afford tight bounds."""
        if self.method == "branch and bound":
            return all(s.dimension <= 3 or len(s.planes) <= FEW_PLANES for s in self.scores or [])
        return self.method in ("faces", "patterns")

    def seen(self, U: Float[Tensor, "k ..."], block: Int[Tensor, " k"]) -> Float[Tensor, "k w"] | None:
        """Unit vectors whose angles are those between mixing weights as the data sees them; None where not known.

        Where all rows nearly agree, weights that differ by little score them quite differently.
        """
        if self.scores is None:
            return None
        flat = U.flatten(1).double()
        found = flat.new_zeros(len(flat), max(scores.dimension for scores in self.scores))
        for scores in self.scores:
            mine = block == scores.group
            found[mine, : scores.dimension] = flat[mine] @ scores.basis.T * scores.spread
        return torch.nn.functional.normalize(found, eps=TINY)

    def strength(self, U: Float[Tensor, "k ..."], block: Int[Tensor, " k"]) -> Float[Tensor, " k"] | None:
        """``‖K u‖``, the norm of all scores of mixing weights; None where not known."""
        if self.scores is None:
            return None
        flat = U.flatten(1).double()
        found = flat.new_zeros(len(flat))
        for scores in self.scores:
            mine = block == scores.group
            along = flat[mine] @ scores.basis.T @ scores.planes.T
            found[mine] = (along[:, scores.plane] * scores.scale).norm(dim=1) if along.numel() else 0.0
        return found

    def search(
        self,
        R: Float[Tensor, "n r c"],
        *,
        warm: Atoms | None = None,
        generator: torch.Generator,
        n_starts: int = 16,
        iterations: int = 30,
        rtol: float = 1e-7,
        ascents: int | None = None,
        late: Callable[[], bool] = never,
    ) -> LocalMaxima:
        """Ascend from ``n_starts`` random starts for each channel group and from ``warm``; return the maxima.

        With ``ascents`` only so many of either are made, from the starts that are highest. They end where they are when
        it is ``late``.
        """
        search = partial(ascend, self.operator, R.to(self.operator.dtype), iterations=iterations, rtol=rtol, late=late)
        maxima = search(*starts(self.operator, n_starts, generator), ascents=ascents)
        if warm is None or not len(warm):
            return maxima
        return maxima.merge(search(warm.U.to(self.operator.dtype), warm.block, ascents=ascents))

    def bound(
        self,
        R: Float[Tensor, "n r c"],
        maxima: LocalMaxima,
        *,
        rtol: float = 1e-6,
        enough: float = 0.0,
        late: Callable[[], bool] = never,
    ) -> DualNorm:
        """Prove a bound beside the ``maxima`` of a search, and add to them what the proof has found.

        Parameters
        ----------
        rtol : float
            Relative width at which branch and bound ends.
        enough : float
            A bound that need not be improved on.
        late : callable () -> bool
            Whether to end with the bound at hand.
        """
        ascents = len(maxima.values)
        maxima = self._in_double(R, maxima)
        lower = float(maxima.values[:1].sum())
        if self.scores is None:
            return DualNorm(math.inf, self.method, maxima, ascents)
        upper, method = 0.0, self.method
        best: list[Tensor] = []
        forms = [scores.weights(self.operator, R.double()).narrow() for scores in self.scores]
        for scores, form in zip(self.scores, forms, strict=True):
            if method == "faces":
                bound, u = largest_norm_on_faces(form, self._faces[scores.group])
                bound = bound * (1 + ROUNDING) + doubt_of(form, self._faces[scores.group]) + form.neglected
                best.append(u @ scores.basis)
            elif method == "branch and bound":
                work = self.work / len(forms)
                bound, _, u = largest_norm(
                    form, lower=lower * (1 - ROUNDING), rtol=rtol, enough=enough, work=work, late=late
                )
                best.append(u.unsqueeze(0) @ scores.basis)
            elif method == "patterns":
                gates, doubt = self._cells[scores.group]
                bound = _over_patterns(form, gates, late) + form.size * doubt
            else:
                bound = math.inf
            upper = max(upper, bound) if math.isfinite(bound) else math.inf
        if best:
            U = torch.cat(best).to(maxima.U).view(-1, *self.operator.head.mixing_shape)
            block = torch.cat([torch.full((len(u),), group, device=U.device) for group, u in enumerate(best)])
            found = U.flatten(1).norm(dim=1) > 0
            if bool(found.any()):
                own = R.to(self.operator.dtype)
                more = ascend(self.operator, own, U[found], block[found], iterations=30, late=late)
                maxima = maxima.merge(self._in_double(R, more))
        known = DualNorm(upper, method, maxima, ascents)
        if known.loose and upper > enough:  # as much work would leave the next bound as loose
            self.work = max(self.work / 4, WORK / 64)
        if known.refuted or known.loose:
            upper = max(map(product_of_norms, forms))
            if upper < known.upper:
                return DualNorm(upper, "product of norms", maxima, ascents, known.refuted)
        return known

    def _in_double(self, R: Float[Tensor, "n r c"], maxima: LocalMaxima) -> LocalMaxima:
        """Values that a search in single precision found, as they are in double precision."""
        if self.operator.dtype == torch.float64:
            return maxima
        U = torch.nn.functional.normalize(maxima.U.double().flatten(1)).view_as(maxima.U)
        G = self.operator.astype(torch.float64, reuse=True).adjoint_times_mixing(R.double(), U, maxima.block)
        values = G.flatten(1).norm(dim=1)
        return LocalMaxima(values, maxima.U, maxima.G, maxima.block).select(values.argsort(descending=True))


def _affordable(scores: list[Scores]) -> list[str]:
    """Methods that can be paid for, the tightest first."""
    sizes = [(len(s.planes), s.dimension) for s in scores]
    faces_of_all = [sum(counts) for counts in zip(*(count_faces(*size) for size in sizes), strict=True)]
    within = {
        "faces": all(n <= limit for n, limit in zip(faces_of_all, LIMITS, strict=True)),
        "branch and bound": all(dimension <= MAX_DIMENSION for _, dimension in sizes),
        "patterns": sum(most_cells(*size) for size in sizes) <= MAX_PATTERNS,
    }
    return [method for method, affordable in within.items() if affordable]


def product_of_norms(form: Form) -> float:
    """``‖(L + ½ Kᵀ c)ᵀ‖₂ + ½ ‖K‖₂ ‖c‖₂``."""
    if not all(bool(part.isfinite().all()) for part in (form.L, form.c)):
        return math.inf
    linear = torch.linalg.matrix_norm(form.L + form.K.T @ form.c / 2, 2)
    rest = torch.linalg.matrix_norm(form.K, 2) * torch.linalg.matrix_norm(form.c, 2) / 2
    return float(linear + rest) * (1 + ROUNDING) + form.neglected


def _over_patterns(form: Form, gates: Float[Tensor, "J w"], late: Callable[[], bool] = never) -> float:
    """The largest, over patterns ``D``, of the norm of ``M_D = L + Kᵀ D c``; for scalar values in the pattern's cone.

    For one column ``m`` and ``K_D = (2D − I) K``: ``max{±mᵀu : K_D u ≥ 0, ‖u‖ ≤ 1} = min_{λ ≥ 0} ‖±m + K_Dᵀ λ‖``,
    so that every ``λ ≥ 0`` gives a bound, whatever a solver made of it. When it is ``late`` the rest goes by its norms.
    """
    signs = (gates @ form.K.T >= 0).double()
    M = torch.einsum("jh,hw,hq->jwq", signs, form.K, form.c) + form.L
    norms = torch.linalg.matrix_norm(M, 2)
    upper = 0.0
    order = norms.argsort(descending=True)
    for j in order.tolist():
        if float(norms[j]) <= upper:
            break  # the rest cannot be larger
        if M.shape[2] == 1 and not late():
            upper = max(upper, _in_cone(M[j, :, 0], (2 * signs[j] - 1).unsqueeze(1) * form.K))
        else:
            upper = float(norms[j])
    return upper * (1 + ROUNDING) + form.neglected


def _in_cone(m: Float[Tensor, " w"], K: Float[Tensor, "h w"]) -> float:
    """``max |mᵀu|`` over ``K u ≥ 0``, ``‖u‖ ≤ 1``."""
    if not len(K):
        return float(m.norm())
    A = K.T.numpy(force=True)
    bounds = []
    for sign in (1.0, -1.0):
        target = -sign * m.numpy(force=True)
        try:
            lam = np.maximum(nnls(A, target)[0], 0.0)
        except RuntimeError:  # it did not converge
            lam = np.zeros(A.shape[1])
        rounding = EPSILON * sum(A.shape) * lam.sum()
        bounds.append(float(np.linalg.norm(A @ lam - target) + rounding))
    return max(bounds)
