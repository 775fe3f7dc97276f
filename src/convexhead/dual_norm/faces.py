"""The largest norm of a piecewise linear function on the unit sphere, exactly, face by face.

    max_{‖u‖ ≤ 1} ‖g(u)‖,      g(u) = Lᵀ u + Σ_h c_h max(k_hᵀ u, 0)

The hyperplanes ``k_h^⊥`` cut space into faces, from open cells down to rays. A maximiser lies in the relative interior
of exactly one. On the closure of a cell ``g`` is linear, ``M_Dᵀ u``, and so, on the span ``B`` of a face, the maximiser
is a local, hence a global maximiser of ``‖(B M_D)ᵀ w‖`` over unit ``w``: a leading left singular vector of ``B M_D``.
The maximum is therefore the largest ``σ_max(B M_D)`` over those faces that hold their leading singular vector.

Everything is known up to rounding: a flat, the common zero set of some hyperplanes, up to an angle (its *doubt*) that
grows where they are nearly dependent, and with it singular vectors. A face is counted unless its vector is outside of
it beyond doubt, which can only raise the bound. Faces thinner than the doubt may be missed: a point of one is that
close to a point of another, and ``g`` changes by at most ``(‖L‖ + Σ_h ‖c_h‖)`` times the distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.dual_norm.scores import Form
from convexhead.program.patterns import EPSILON, cells_and_doubt, most_arrangements, most_cells
from convexhead.runtime.clock import OutOfTimeError, never

LIMITS = (100_000, 2_500, 6_000)
"""Largest numbers of faces to enumerate, of intersections of hyperplanes, and of arrangements gone through on the way.
Chosen by hand: some seconds."""


@dataclass(frozen=True)
class FacesOfDimension:
    """The faces of one dimension.

    Attributes
    ----------
    span : Tensor (f, m, w)
        Orthonormal rows.
    signs : Tensor (f, h)
        Of every row of ``K`` on the face; 0 where it vanishes.
    doubt : float
        Angle up to which flats are known, and thinnest face that is sure to be among these.
    """

    span: Float[Tensor, "f m w"]
    signs: Float[Tensor, "f h"]
    doubt: float


def count_faces(n_planes: int, dimension: int) -> tuple[int, int, int]:
    """The most ``(faces, flats, arrangements)`` of so many hyperplanes: ``Σ_k C(N, k) · cells(N − k, ρ − k)`` faces.

    An arrangement is one whose cells are listed: those of the flats, and those of `most_arrangements` on the way.
    """
    flats = [math.comb(n_planes, k) for k in range(dimension)]
    within = [(n_planes - k, dimension - k) for k in range(dimension)]
    return (
        sum(m * max(2, most_cells(*of)) for m, of in zip(flats, within, strict=True)),
        sum(flats),
        sum(m * most_arrangements(*of) for m, of in zip(flats, within, strict=True)),
    )


def faces(K: Float[Tensor, "h w"], *, late: Callable[[], bool] = never) -> list[FacesOfDimension]:
    """All faces of the arrangement of the distinct unit rows ``K``, grouped by dimension; none where there is none.

    Raises
    ------
    UnreliableError
        The hyperplanes are too close to degenerate to be sure of all faces.
    OutOfTimeError
        It was late.
    """
    h, w = K.shape
    found: dict[int, tuple[list[Tensor], list[Tensor]]] = {m: ([], []) for m in range(1, w + 1)}
    doubts = dict.fromkeys(found, 0.0)
    seen: set[bytes] = set()
    todo = [(torch.eye(w, dtype=K.dtype, device=K.device), -1, 0.0)] if w else []
    while todo:
        if late():
            raise OutOfTimeError
        span, last, error = todo.pop()
        seen_by = K @ span.T  # each row within the flat
        size, row_error = seen_by.norm(dim=1), error + 4 * EPSILON
        vanish = size <= 8 * row_error
        key = vanish.cpu().numpy().tobytes()
        if key in seen:
            continue
        seen.add(key)
        inside, doubt = torch.eye(1, len(span), dtype=K.dtype, device=K.device), 0.0
        if not bool(vanish.all()):
            rows = seen_by[~vanish]
            inside, doubt = cells_and_doubt(rows, rows.new_full((len(rows),), row_error), late=late)
        signs = (inside @ seen_by.T).sign()
        signs[:, vanish] = 0.0
        spans, all_signs = found[len(span)]
        spans.append(span.expand(len(signs), -1, -1))
        all_signs.append(signs)
        doubts[len(span)] = max(doubts[len(span)], doubt, 8 * row_error)
        if len(span) > 1:
            for i in range(last + 1, h):
                if not vanish[i]:
                    _, _, basis = torch.linalg.svd(seen_by[i : i + 1])
                    todo.append((basis[1:] @ span, i, error + row_error / float(size[i])))
    return [FacesOfDimension(torch.cat(a), torch.cat(b), doubts[m]) for m, (a, b) in found.items() if a]


def doubt_of(form: Form, arrangement: list[FacesOfDimension]) -> float:
    """Bound how far the maximum may lie above the maximum over these faces."""
    return form.size * max((group.doubt for group in arrangement), default=0.0)


def largest_norm_on_faces(
    form: Form, arrangement: list[FacesOfDimension], *, several: int = 16
) -> tuple[float, Float[Tensor, "k w"]]:
    """The maximum over these faces, up to rounding, and the unit maximisers of ``several``, best first.

    Faces in doubt are counted; `doubt_of` charges for those that may be missing.
    """
    h, (w, q) = len(form.K), form.L.shape
    outer = (form.K.unsqueeze(2) * form.c.unsqueeze(1)).view(h, w * q)
    values_found, found = [form.L.new_zeros(1)], [form.L.new_zeros(1, w)]
    for group in arrangement:
        M = ((group.signs > 0).to(outer) @ outer).view(-1, w, q) + form.L
        inner = group.span @ M
        values, vectors = torch.linalg.eigh(inner @ inner.mT)
        top = (inner.mT @ vectors[..., -1:]).squeeze(-1).norm(dim=1)
        u = torch.einsum("fm,fmw->fw", vectors[..., -1], group.span)
        along = (u @ form.K.T) * group.signs
        outside = torch.zeros_like(top)
        if h:
            outside = torch.minimum(along.amin(1).neg(), along.amax(1)).clamp_min(0)
        off = form.size * (group.doubt + EPSILON * (h + w))  # of the matrix, and so of its leading vector
        turned = torch.zeros_like(top)
        if values.shape[1] > 1:
            turned = 4 * off * (top + off) / (values[:, -1] - values[:, -2]).clamp_min(1e-300)
        counted = outside <= 2 * turned + 16 * (group.doubt + EPSILON)
        top, u = top[counted], u[counted] * torch.where(along[counted].sum(1, keepdim=True) >= 0, 1.0, -1.0)
        first = top.topk(min(several, len(top))).indices
        values_found.append(top[first])
        found.append(u[first])
    best = torch.cat(values_found).sort(descending=True)
    return float(best.values[0]), torch.cat(found)[best.indices[:several]]
