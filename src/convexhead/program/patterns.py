"""Activation patterns: random ones, all different, and all of a small problem, the cells of a hyperplane arrangement.

A pre-activation is linear in the mixing weights, ``K u`` with one row for every entry of every sample's score. Gates in
general position have as patterns ``1[K g ≥ 0]`` the open cells of the arrangement of hyperplanes ``K_i^⊥``:

    2 Σ_{k<ρ} C(N − 1, k) ≤ 2ρ (e(N − 1)/ρ)^ρ

of them when ``N`` rows of rank ``ρ`` are in general position, fewer otherwise (Cover 1965).

They are found one hyperplane after the other, by deletion and restriction. A new hyperplane cuts exactly those cells
that the older ones leave on it, an arrangement of one dimension less; a point ``w`` of such a cell gives the points
``w ± ε K_i`` of the two that it becomes. No linear program is solved, and every cell comes with a point inside it, the
gate. The number of cells must grow by one for each cell that a new hyperplane is cut into; where rounding breaks that
count, or could, the arrangement is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.errors import InputError
from convexhead.program.activations import GatedReLU, sample_gates
from convexhead.program.heads.base import Head
from convexhead.runtime.clock import OutOfTimeError, never
from convexhead.runtime.stored_tokens import Tokens

PARALLEL = 1e-14
"""Distance up to which unit rows are one hyperplane. Derived: some units in the last place of float64."""
RELIABLE = 1e-9
"""Largest error of a hyperplane within a flat, as an angle in radians, at which its cells are listed. Chosen by
hand."""
FEW, FAR = 256, 1e-6
"""Number of rows up to which all pairs are compared first, and the amount by which the cosines of rows that are no
plane twice stay below 1. Derived: rounding of a cosine is far less, and angles of 1e-3 are far above `RELIABLE`."""
MAX_PATTERNS = 20_000
"""Largest number of patterns to enumerate. Chosen by hand."""
EPSILON = torch.finfo(torch.float64).eps


class UnreliableError(InputError):
    """Hyperplanes that float64 cannot tell apart well enough to list their cells."""


def all_gates(head: Head, X: Float[Tensor, "n s d"], *, max_patterns: int = MAX_PATTERNS) -> Float[Tensor, "J ..."]:
    """One gate for every activation pattern that weights in general position can have on the tokens.

    Parameters
    ----------
    head : Head
        Decides what a pre-activation is.
    X : Tensor (n, s, d)
        Tokens.
    max_patterns : int
        What is too many.

    Returns
    -------
    Tensor (J, *head.gate_shape)
        float64. Channel groups have patterns of their own; a group with fewer repeats its last.

    Raises
    ------
    InputError
        There may be more patterns than ``max_patterns``, or their cells cannot be told apart in float64.
    """
    of_group = []
    for group in range(head.n_groups):
        K = preactivation_rows(head, X.double(), group)
        of_group.append(cells(K, max_cells=max_patterns))
    most = max(map(len, of_group))
    padded = [torch.cat([points, points[-1:].expand(most - len(points), -1)]) for points in of_group]
    return torch.stack(padded, dim=1).reshape(most, *head.gate_shape)


def sample_patterns(
    head: Head, X: Tokens, n_gates: int, generator: torch.Generator, *, data_driven: bool = False
) -> Float[Tensor, "J ..."]:
    """Random gates whose patterns on the tokens are all different, ``n_gates`` of them or as many as are found.

    Parameters
    ----------
    head : Head
        Decides what a pre-activation is.
    X : Tensor (n, s, d) or StoredTokens
        Tokens.
    generator : torch.Generator
        Decides everything: equal states give equal gates.
    data_driven : bool
        Draw gates in the metric of the data instead of standard normal ones; see `sample_gates`.

    Returns
    -------
    Tensor (J, *head.gate_shape)
        float64. Fewer than ``n_gates`` where so many draws in a row brought no new pattern.
    """
    gates = torch.zeros(0, *head.gate_shape, dtype=torch.float64)
    while len(gates) < n_gates:
        more = sample_gates(head, n_gates, generator, X[:] if data_driven else None)
        found = _distinct_gates(head, X, torch.cat([gates, more]))
        if len(found) == len(gates):
            break
        gates = found
    return gates[:n_gates]


def _distinct_gates(head: Head, X: Tokens, gates: Float[Tensor, "J ..."]) -> Float[Tensor, "l ..."]:
    """The first gate of each pattern."""
    rows = 64  # nearly always enough to tell all of them apart
    while True:
        masks = GatedReLU(head, gates).pack_masks(X[:rows])  # (n, J · groups, bytes)
        patterns = masks.transpose(0, 1).reshape(len(gates), -1)
        first: dict[bytes, int] = {}
        for j, pattern in enumerate(pack_signs(patterns)):
            first.setdefault(pattern, j)
        if len(first) == len(gates) or rows >= len(X):
            return gates[list(first.values())]
        rows = len(X)


def preactivation_rows(head: Head, X: Float[Tensor, "n s d"], group: int = 0) -> Float[Tensor, "m u"]:
    """``K (n·p·q, mixing_size)``: every entry of every pre-activation as a linear function of the mixing weights."""
    basis = torch.eye(head.mixing_size, dtype=X.dtype, device=X.device).view(-1, *head.mixing_shape)
    which = torch.full((len(basis),), group, device=X.device)
    return head.preactivation(head.prepare(X), basis, which).movedim(1, -1).flatten(0, -2)


def most_cells(n_rows: int, rank: int) -> int:
    """``2 Σ_{k<ρ} C(N − 1, k)``: the cells of ``n_rows`` central hyperplanes of ``rank`` in general position."""
    return 2 * sum(math.comb(n_rows - 1, k) for k in range(rank)) if n_rows > 0 else 1


def most_arrangements(n_rows: int, rank: int) -> int:
    """The arrangements that deletion and restriction go through to list those cells.

    ``A(N, ρ) = 1 + Σ_{i<N} A(i, ρ − 1)``, and 1 where rows are independent or ``ρ ≤ 2``. With ``k = N − ρ`` it is
    ``Σ_{m ≤ ρ−3} (ρ − m) C(k + m − 1, m) + C(k + ρ − 3, ρ − 2)``.
    """
    k = n_rows - rank
    if k <= 0 or rank <= 2:
        return 1
    return sum((rank - m) * math.comb(k + m - 1, m) for m in range(rank - 2)) + math.comb(k + rank - 3, rank - 2)


def cells(K: Float[Tensor, "m u"], *, max_cells: int = MAX_PATTERNS) -> Float[Tensor, "J u"]:
    """A unit vector inside each open cell of the arrangement of the hyperplanes ``{g : K_i g = 0}``.

    Raises
    ------
    InputError
        There may be more than ``max_cells``.
    UnreliableError
        The hyperplanes are too close to degenerate to be sure of all cells.
    """
    return cells_and_doubt(K, max_cells=max_cells)[0]


def cells_and_doubt(
    K: Float[Tensor, "m u"],
    error: Float[Tensor, " m"] | None = None,
    *,
    max_cells: int = MAX_PATTERNS,
    late: Callable[[], bool] = never,
) -> tuple[Float[Tensor, "J u"], float]:
    """`cells`, and how far a unit vector can be from the closure of all of them that were found.

    Rows that lie within rounding of each other, or of zero, count as equal: cells between them are thinner than that.

    Parameters
    ----------
    K : Tensor (m, u)
    error : Tensor (m,) or None
        Bounds on the error of each row; None: rounding of the unit rows.
    late : callable () -> bool
        Whether to give up.

    Raises
    ------
    OutOfTimeError
        It was late.
    """
    norm = K.norm(dim=1)
    error = torch.zeros_like(norm) if error is None else error
    seen = norm > 8 * error
    dropped = float((8 * error[~seen]).max()) if not bool(seen.all()) else 0.0
    if not bool(seen.any()):
        return torch.eye(1, K.shape[1], dtype=K.dtype, device=K.device), dropped
    if K.shape[1] == 1:  # only signs matter on a line
        return K.new_tensor([[1.0], [-1.0]]), dropped
    error = error[seen] / norm[seen] + 4 * EPSILON
    worst = float(error.max())
    if worst > RELIABLE:
        raise _unreliable()
    tolerance = max(PARALLEL, 8 * worst)
    planes, of, _ = hyperplanes_of(K[seen], tolerance)
    error = error.new_zeros(len(planes)).scatter_reduce_(0, of, error, "amax")
    # In coordinates of their span; the rest of the space changes no sign.
    _, sigma, span = torch.linalg.svd(planes, full_matrices=False)
    span = span[sigma > tolerance * math.sqrt(len(planes))]
    bound = most_cells(len(planes), len(span))
    if bound > max_cells:
        raise InputError(
            f"{len(planes)} distinct pre-activations of rank {len(span)} may have {bound:.2g} patterns, more than "
            f"{max_cells}: sample them with n_gates=50, or take fewer samples or tokens"
        )
    within = planes @ span.T
    points, doubt = _cells(within, error, late)
    # Every sign is certain: no cell that was found is empty.
    if bool(((points @ within.T).abs() <= 2 * error).any()):
        raise _unreliable()
    return points @ span, max(doubt, tolerance * math.sqrt(len(planes)), dropped)


def hyperplanes(K: Float[Tensor, "m u"]) -> Float[Tensor, "N u"]:
    """The distinct hyperplanes as unit rows: zero rows dropped, parallel ones kept once."""
    return hyperplanes_of(K)[0]


def hyperplanes_of(
    K: Float[Tensor, "m u"], tolerance: float = PARALLEL
) -> tuple[Float[Tensor, "N u"], Int[Tensor, " m"], Float[Tensor, " m"]]:
    """The distinct hyperplanes as unit rows, the one of each row, and the signed scale: ``K_i ≈ scale_i planes[of_i]``.

    Zero rows have scale 0 and belong to the first. No other unit row is farther than ``tolerance`` from ± its plane.
    """
    norm = K.norm(dim=1)
    of, scale = torch.zeros(len(K), dtype=torch.int64, device=K.device), torch.zeros_like(norm)
    rows = norm.nonzero().squeeze(1)
    if not len(rows):
        return K[:0], of, scale
    unit = torch.nn.functional.normalize(K[rows] / norm[rows].unsqueeze(1))
    if len(rows) <= FEW and float((unit @ unit.T).abs().fill_diagonal_(0).max()) < 1 - FAR:
        of[rows], scale[rows] = torch.arange(len(rows), device=K.device), norm[rows]
        return unit, of, scale
    # Rows are parallel only if they agree, up to sign, along a few random directions: sorting finds those.
    directions = torch.randn(K.shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    along = unit @ (directions / directions.norm(dim=0)).to(unit)
    sign = torch.where(along[:, :1] < 0, -1.0, 1.0).to(unit)
    same = torch.zeros(len(rows), dtype=torch.int64, device=K.device)
    for t in (along * sign).T:
        order = torch.argsort(t)
        order = order[torch.argsort(same[order], stable=True)]
        differs = (same[order].diff() != 0) | (t[order].diff() > tolerance)
        same[order] = torch.nn.functional.pad(differs.long().cumsum(0), (1, 0))
    first = torch.full((int(same.max()) + 1,), len(rows), device=K.device)
    every = torch.arange(len(rows), device=K.device)
    leader = first.scatter_reduce(0, same, every, "amin")[same]
    # Of a chain of close rows those that are far from its first are planes of their own.
    close = (unit * sign - unit[leader] * sign[leader]).norm(dim=1) <= tolerance
    leaders, of[rows] = torch.unique(torch.where(close, leader, every), return_inverse=True)
    planes = unit[leaders]
    scale[rows] = norm[rows] * (unit * planes[of[rows]]).sum(1).sign()
    return planes, of, scale


def _unreliable() -> UnreliableError:
    return UnreliableError(
        "pre-activations are so close to parallel that their patterns cannot be listed in float64: centre and scale "
        "the features, or sample the patterns with n_gates=50"
    )


def _cells(
    K: Float[Tensor, "N r"], error: Float[Tensor, " N"], late: Callable[[], bool]
) -> tuple[Float[Tensor, "J r"], float]:
    """As `cells_and_doubt`, for distinct unit rows that span the space, each known up to its ``error``."""
    N, rank = K.shape
    if rank == 1:
        return K.new_tensor([[1.0], [-1.0]]), 0.0
    if rank == 2:  # a fan: the cells lie between neighbouring rays
        angles = torch.atan2(K[:, 0], -K[:, 1])
        rays = torch.cat([angles, angles + math.pi]).remainder(2 * math.pi).sort().values
        middle = (rays + torch.cat([rays[1:], rays[:1] + 2 * math.pi])) / 2
        return torch.stack([middle.cos(), middle.sin()], dim=1), 0.0
    if rank == N:  # independent: every sign occurs, and one point has it on all hyperplanes at one distance
        signs = 1.0 - 2.0 * (torch.arange(2**N).unsqueeze(1) >> torch.arange(N) & 1)
        points = torch.linalg.solve(K, signs.to(K).T).T
        if not torch.equal((points @ K.T).sign(), signs.to(K)):  # rounding put two of them into one cell
            raise _unreliable()
        return points / points.norm(dim=1, keepdim=True), 0.0
    points, doubt = K[:1] * K.new_tensor([[1.0], [-1.0]]), 0.0
    for i in range(1, N):
        if late():
            raise OutOfTimeError
        normal, older = K[i], K[:i]
        _, _, basis = torch.linalg.svd(normal.unsqueeze(0))
        on_it, more = cells_and_doubt(
            older @ basis[1:].T, error[:i] + error[i], max_cells=most_cells(i, rank), late=late
        )
        on_it, doubt = on_it @ basis[1:], max(doubt, more)
        across = (older @ on_it.T).abs()  # how far each point is from the older hyperplanes
        step = 0.5 * (across / (older @ normal).abs().clamp_min(1e-300).unsqueeze(1)).amin(0).clamp_max(1.0)
        moved = step.unsqueeze(1) * normal
        before = len(points)
        points = _distinct(torch.cat([on_it + moved, on_it - moved, points]), K[: i + 1])
        if len(points) != before + len(on_it):  # each cell on the new hyperplane cuts one in two
            raise _unreliable()
    return points / points.norm(dim=1, keepdim=True), doubt


def _distinct(points: Float[Tensor, "m r"], K: Float[Tensor, "i r"]) -> Float[Tensor, "J r"]:
    """One point of each cell, the first that comes."""
    signs = pack_signs(points @ K.T >= 0)
    first: dict[bytes, int] = {}
    for row, sign in enumerate(signs):
        first.setdefault(sign, row)
    return points[list(first.values())]


def pack_signs(signs: Tensor) -> list[bytes]:
    """Each row as bytes, to compare and to count."""
    return [row.tobytes() for row in signs.cpu().numpy()]
