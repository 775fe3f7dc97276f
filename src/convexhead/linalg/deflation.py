"""Singular directions split off the gradient matrices, and what then bounds the norm of the whole.

`Deflated` is the identity behind it. Directions come from a model's atoms (`split_off_model`), from a Krylov space that
begins at them (`split_off_leading`), and from what a Krylov space of the rest has found (`split_off_more`).
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.linalg.gradient_matrices import GradientMatrices, formed_norm, worth_decomposing
from convexhead.linalg.krylov import BlockKrylov, project_out
from convexhead.program.atoms import Atoms
from convexhead.program.operator import Operator

LEAST_STEPS = 4
"""Least number of Krylov steps before the remainder is judged: random vectors need some to find it. Chosen by hand."""


class Deflated:
    """``G_j`` with orthonormal directions ``A_j, B_j`` split off, for every block. In bases of ``A, B`` and the rest

        G = [ M  N ; P  Q ],   M = AᵀGB,   N = AᵀG(I − BBᵀ),   P = (I − AAᵀ)GB,   Q = (I − AAᵀ)G(I − BBᵀ).

    Only ``Q`` is large, and `gram` is its Gram operator. Whatever the directions are, for every ``η > 0``

        ‖G‖ ≤ ‖P‖ + √ max( λ_max(MMᵀ + (1 + 1/η) NNᵀ), (1 + η) ‖Q‖² ),

    since ``‖Mᵀa‖² + ‖Nᵀa + Qᵀb‖² ≤ aᵀ(MMᵀ + (1 + 1/η) NNᵀ)a + (1 + η) ‖Qᵀb‖²``. With ``A`` spanning ``G B``, ``P``
    vanishes; with the leading singular directions ``N`` nearly does, and where it does not, among the last of them,
    ``M`` is small. Where the Gram operator acts on the mixing side, ``B`` spans ``GᵀA`` and it is ``N`` that vanishes:
    there the bound is that of ``Gᵀ``, in which ``P`` and ``N`` change places.

    Parameters
    ----------
    G : GradientMatrices
    A, B : Tensor (j, p, m), (j, q, m)
        Orthonormal columns in each block; zero columns where a block has fewer.
    image : Tensor or None
        ``G B``, or ``GᵀA`` where the Gram operator acts on the mixing side, if that is at hand.
    """

    def __init__(
        self, G: GradientMatrices, A: Float[Tensor, "j p m"], B: Float[Tensor, "j q m"], image: Tensor | None = None
    ) -> None:
        self.G, self.A, self.B, self._image = G, A, B, image

    @cached_property
    def corners(self) -> tuple[Float[Tensor, "j m m"], Float[Tensor, "j m m"], Float[Tensor, " j"]]:
        """``MMᵀ``, ``NNᵀ`` and ``‖P‖`` of each block, of ``Gᵀ`` where the Gram operator acts on the mixing side."""
        operator, (j, _, m) = self.G.operator, self.A.shape
        AtG, GB = self.A.new_zeros(j, m, self.G.q), self.A.new_zeros(j, m, self.G.p)
        used = (self.A != 0).any(1)  # (j, m)
        block = used.nonzero()[:, 0]
        if len(block):
            known = None if self._image is None else self._image.mT[used]
            at_B, at_A = (known, None) if self.G.on_values else (None, known)
            if at_B is None:
                V = self.B.mT[used].view(-1, *self.G.value_shape)
                at_B = operator.adjoint_times_values(self.G.R, V, block).flatten(1)
            if at_A is None:
                U = self.A.mT[used].view(-1, *operator.head.mixing_shape)
                at_A = operator.adjoint_times_mixing(self.G.R, U, block).flatten(1)
            GB[used], AtG[used] = at_B, at_A
        M = AtG @ self.B
        N, P = AtG - M @ self.B.mT, (GB.mT - self.A @ M).mT
        if not self.G.on_values:
            M, N, P = M.mT, P, N
        largest = P @ P.mT if m else P.new_zeros(j, 1, 1)
        return M @ M.mT, N @ N.mT, torch.linalg.eigvalsh(largest)[:, -1].clamp_min(0).sqrt()

    @cached_property
    def inner(self) -> Float[Tensor, " j"]:
        """``‖M‖ ≤ ‖G‖`` of each block."""
        MM, *_ = self.corners
        return torch.linalg.eigvalsh(MM)[:, -1].clamp_min(0).sqrt() if MM.shape[1] else MM.new_zeros(len(MM))

    @cached_property
    def _top(self) -> tuple[Float[Tensor, " t"], Float[Tensor, "j t"]]:
        """Values of ``η``, and ``λ_max(MMᵀ + (1 + 1/η) NNᵀ)`` of each block at each."""
        MM, NN, _ = self.corners
        eta = _etas(MM)
        if MM.shape[1] == 0:
            return eta, MM.new_zeros(len(MM), len(eta))
        weighted = MM.unsqueeze(1) + (1 + 1 / eta).view(-1, 1, 1) * NN.unsqueeze(1)
        return eta, torch.linalg.eigvalsh(weighted)[..., -1].clamp_min(0)

    def gram(self, x: Float[Tensor, "j m b"], blocks: Int[Tensor, " j"]) -> Float[Tensor, "j m b"]:
        """Apply the Gram operator of ``Q`` on the smaller side."""
        y = self.half(x, blocks)
        x = self.G.transpose_times(y, blocks) if self.G.on_values else self.G.times(y, blocks)
        return project_out(x, (self.B if self.G.on_values else self.A)[blocks])

    def half(self, x: Float[Tensor, "j m b"], blocks: Int[Tensor, " j"]) -> Float[Tensor, "j other b"]:
        """Apply ``Q`` itself, from the smaller side to the other."""
        if self.G.on_values:
            return project_out(self.G.times(project_out(x, self.B[blocks]), blocks), self.A[blocks])
        return project_out(self.G.transpose_times(project_out(x, self.A[blocks]), blocks), self.B[blocks])

    def norm(self, rest: Float[Tensor, " j"], blocks: Int[Tensor, " j"]) -> Float[Tensor, " j"]:
        """The bound above for the named blocks, given ``‖Q‖``, at the best ``η``."""
        eta, top = self._top
        _, _, below = self.corners
        square = torch.maximum(top[blocks], (1 + eta) * rest.square().unsqueeze(1))
        return below[blocks] + square.amin(1).sqrt()


def _etas(like: Tensor) -> Float[Tensor, " t"]:
    """Values of ``η`` to choose from, 12% apart."""
    return torch.logspace(-8, 4, 241, dtype=like.dtype, device=like.device)


def split_off_nothing(G: GradientMatrices) -> Deflated:
    """Return ``G_j`` with nothing split off."""
    j = G.operator.n_blocks
    return Deflated(G, G.R.new_zeros(j, G.p, 0), G.R.new_zeros(j, G.q, 0))


def split_off_model(G: GradientMatrices, atoms: Atoms) -> Deflated:
    """Split off the directions of a model's atoms: ``G_j`` is then what the model lacks."""
    j = G.operator.n_blocks
    widest = int(torch.bincount(atoms.block, minlength=j).max()) if len(atoms) else 0
    A, B = G.R.new_zeros(j, G.p, widest), G.R.new_zeros(j, G.q, widest)
    for block in torch.unique(atoms.block).tolist():
        mine = atoms.block == block
        for basis, weights in ((A, atoms.U), (B, atoms.V)):
            Q = torch.linalg.qr(weights[mine].flatten(1).T.to(G.R.dtype)).Q
            basis[block, :, : Q.shape[1]] = Q
    return Deflated(G, A, B)


def leading(
    G: GradientMatrices, atoms: Atoms, *, extra: int, steps: int, generator: torch.Generator, rtol: float = 0.0
) -> tuple[BlockKrylov | None, Int[Tensor, " j"], Int[Tensor, " j"]]:
    """Krylov space of the leading singular directions, from a model's atoms and ``extra`` random vectors.

    Goes on for at most ``steps``, or until splitting directions off promises to bound the norm to within ``rtol`` of
    the largest singular value found (see `Deflated`).

    Returns
    -------
    krylov : BlockKrylov or None
        None where there are no atoms, or no room for the vectors.
    active : Tensor (j,)
        The blocks that have atoms, the only ones treated.
    count : Tensor (j,)
        How many Ritz vectors of each it pays to split off: the last have not converged, and what couples them to the
        rest would spoil the bound.
    """
    model = split_off_model(G, atoms)
    active = torch.unique(atoms.block)
    near = model.B if G.on_values else model.A
    if not len(active) or near.shape[2] + extra > G.order:
        return None, active, torch.zeros_like(active)
    start = torch.cat([near[active], G.random_start(active, extra, generator)], dim=2)
    krylov = BlockKrylov(G.gram, start, active, G.order)
    while True:
        krylov.step()
        count, good = _best_split(krylov, 2 * start.shape[2], rtol)
        if krylov.steps >= steps or not krylov.can_step() or (good and krylov.steps >= LEAST_STEPS):
            break
    return krylov, active, count


def _best_split(krylov: BlockKrylov, most: int, rtol: float) -> tuple[Int[Tensor, " j"], bool]:
    """How many Ritz vectors of each block to split off; whether this promises to bound the norm to within ``rtol``."""
    sigma, missed = krylov.leading(most)
    eta = _etas(sigma).view(-1, 1, 1)
    # 4: what is missed points the same way for many vectors, and adds up.
    top = (sigma.square() + 4 * (1 + 1 / eta) * missed.square()).cummax(2).values
    # What is left may have values as large as the Ritz values not split off, and farther than these are from any.
    rest = (sigma + missed).flip(1).cummax(1).values.flip(1)
    rest = torch.cat([rest[:, 1:], rest[:, -1:]], dim=1)
    # 4%: what the norm of the rest will be raised by for its failure probability.
    bound = torch.maximum(top, 1.04 * (1 + eta) * rest.square()).amin(0).sqrt()
    least = bound.amin(1, keepdim=True)
    enough = (1 + rtol) * krylov.values[:, -1].max().sqrt()
    # Of those that will do the most: the less is left, the sooner its norm is known.
    place = torch.arange(1, bound.shape[1] + 1, device=bound.device)
    count = (place * (bound <= torch.maximum(least, enough))).amax(1)
    return count, bool((least <= enough).all())


def split_off_leading(
    G: GradientMatrices,
    fast: GradientMatrices,
    atoms: Atoms,
    *,
    extra: int,
    steps: int,
    generator: torch.Generator,
    rtol: float,
) -> Deflated:
    """Split the `leading` singular directions off ``G_j`` in the blocks that have atoms.

    They are looked for in ``fast``, the same matrices in a precision that may be lower: whatever is split off, the
    bound of `Deflated` holds.
    """
    krylov, active, count = leading(
        fast, atoms.to(fast.R.device, fast.R.dtype), extra=extra, steps=steps, generator=generator, rtol=rtol
    )
    if krylov is None:
        return split_off_model(G, atoms)
    x = torch.linalg.qr(krylov.vectors(int(count.max())).to(G.R.dtype)).Q
    y = G.times(x, active) if G.on_values else G.transpose_times(x, active)
    other = torch.linalg.qr(y).Q  # of nested spans: dropping the tail of both sides keeps them matched
    kept = (torch.arange(x.shape[2], device=x.device) < count.unsqueeze(1)).unsqueeze(1)
    left, right = (other, x) if G.on_values else (x, other)
    A = G.R.new_zeros(G.operator.n_blocks, G.p, x.shape[2])
    B = G.R.new_zeros(G.operator.n_blocks, G.q, x.shape[2])
    A[active], B[active] = left * kept, right * kept
    image = y.new_zeros(G.operator.n_blocks, *y.shape[1:])
    image[active] = y * kept
    return Deflated(G, A, B, image)


def split_off_more(deflated: Deflated, krylov: BlockKrylov) -> Deflated:
    """Split off what a Krylov space of the remainder of ``deflated`` has found, in the blocks of that space."""
    G, blocks = deflated.G, krylov.blocks
    count, _ = _best_split(krylov, 4 * krylov.starts, rtol=0.0)
    x = krylov.vectors(int(count.max()))
    y = G.times(x, blocks) if G.on_values else G.transpose_times(x, blocks)
    left, right = (y, x) if G.on_values else (x, y)
    A, B = (torch.cat([old, old.new_zeros(*old.shape[:2], x.shape[2])], dim=2) for old in (deflated.A, deflated.B))
    for wider, more in ((A, left), (B, right)):
        for block, new, m in zip(blocks.tolist(), more, count.tolist(), strict=True):
            known = wider[block][:, wider[block].any(0)]
            Q = torch.linalg.qr(torch.cat([known, new[:, :m]], dim=1)).Q
            wider[block, :, : Q.shape[1]] = Q
    return Deflated(G, A, B)


def top_singular(
    deflated: Deflated, start: Float[Tensor, "j big b"], *, rtol: float, max_steps: int
) -> tuple[Float[Tensor, "j b"], Float[Tensor, "j p b"], Float[Tensor, "j q b"], Float[Tensor, "j big b"]]:
    """Leading singular triples of every deflated block, as many as ``start`` has vectors: an estimate.

    Stops when the largest singular value grows by less than ``rtol`` in a step.

    Returns
    -------
    sigma (j, b), left (j, p, b), right (j, q, b), next_start (j, N, b)
        Falling within each block; the last is what to start from next time.
    """
    blocks = torch.arange(len(start), device=start.device)
    krylov, previous = BlockKrylov(deflated.gram, start, blocks, deflated.G.order), 0.0
    for _ in range(max_steps):
        krylov.step()
        top = float(krylov.values[:, -1].max().sqrt())
        if not krylov.can_step() or top - previous <= rtol * top:
            break
        previous = top
    x = krylov.vectors(start.shape[2])
    y = deflated.half(x, blocks)
    sigma = y.norm(dim=1)
    order = sigma.argsort(dim=1, descending=True).unsqueeze(1)
    y = y / sigma.clamp_min(torch.finfo(sigma.dtype).tiny).unsqueeze(1)
    x, y = torch.take_along_dim(x, order, 2), torch.take_along_dim(y, order, 2)
    left, right = (y, x) if deflated.G.on_values else (x, y)
    return sigma.sort(dim=1, descending=True).values, left, right, x


def spectral_norm(
    operator: Operator, R: Float[Tensor, "n r c"], generator: torch.Generator, fast: Operator | None = None
) -> float:
    """Return ``max_j ‖𝒜_j*(R)‖₂`` to about six digits; from an SVD where the matrices are small.

    ``fast`` is the same operator in a lower precision, in which most of the search is done.
    """
    G = GradientMatrices(operator, R)
    if worth_decomposing(G):
        return formed_norm(G)
    blocks = torch.arange(operator.n_blocks, device=operator.device)
    start = G.random_start(blocks, min(4 if len(blocks) == 1 else 2, G.order), generator)
    if fast is not None and fast.dtype != operator.dtype:
        rough = split_off_nothing(GradientMatrices(fast, R.to(fast.dtype)))
        *_, start = top_singular(rough, start.to(fast.dtype), rtol=1e-5, max_steps=100)
    sigma, *_ = top_singular(split_off_nothing(G), start.to(R.dtype), rtol=1e-7, max_steps=100)
    return float(sigma.max())
