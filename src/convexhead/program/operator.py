"""The linear map of a head over its tokens, and its adjoints, in one precision on one device.

    f_i = Σ_k P mix(X_i, U_k) V_k + b        𝒜_j*(R) = Σ_i ∂⟨f_i, R_i⟩/∂Z_j

The *gradient matrices* ``𝒜_j*(R)`` of residuals ``R (n, r, c)`` are large. Products with them take only the tokens:

    𝒜_j*(R) V  = mix_adjoint(R Vᵀ)  (*mixing_shape)        𝒜_j*(R)ᵀ U = Σ_i (P mix(X_i, U))ᵀ R_i  (e, c)

Everything is one pass over the samples in batches, a few large matrix products each. Several processes may share the
samples: each passes over its own, and what is summed over samples is summed over processes (`Ranks.sum`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.program.activations import Activation
from convexhead.program.atoms import Atoms
from convexhead.program.contraction import MixFirst, ValuesFirst, pairs_of_mixed
from convexhead.program.heads.base import Data, GradientCost, Head
from convexhead.program.identity import FILES
from convexhead.runtime.budget import Budget
from convexhead.runtime.ranks import Ranks
from convexhead.runtime.samples import Samples
from convexhead.runtime.stored_tokens import StoredTokens, Tokens
from convexhead.runtime.workers import Work, add_up

GRADIENT_BYTES = {"cpu": 10_000_000, "cuda": 1_000_000_000}
"""Bytes of workspace that a batch may take while gradient matrices are formed. Chosen by hand."""

GRAM_ROWS, GRAM_SAMPLES = 8, 64
"""Least rows for each column of `Operator.value_grams`, which need only be about right, and samples. Chosen by hand."""


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Operator:
    """Tokens, head and activation, ready for passes over the data. It never changes: `astype` makes another.

    Parameters
    ----------
    X : Tensor (n, s, d) or StoredTokens
        Tokens of this process's samples, any float dtype, in memory or on disk.
    head, activation
        What makes outputs of them.
    dtype : torch.dtype
        Precision of the passes.
    device : torch.device or None
        Where passes are computed; None: where the tokens are.
    memory : float
        Bytes that tokens and what is made of them may take; the rest is read and prepared again in each pass.
    reuse : bool
        Prepare the tokens once and keep the result (a solver's many passes); else prepare each batch anew.
    ranks : Ranks or None
        The processes that share the samples, each with an `Operator` of its own.

    Attributes
    ----------
    samples : Samples
        The tokens as passes take them.
    n : int
        Samples of all processes together. Tensors with a dimension ``n`` hold this process's share of them.
    stored : str or None
        Tells the tokens of a store from all others, where their values cannot (`StoredTokens.checksum`).
    """

    head: Head
    activation: Activation
    samples: Samples
    ranks: Ranks
    n: int
    stored: str | None

    def __init__(
        self,
        X: Tokens,
        head: Head,
        activation: Activation,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
        memory: float = math.inf,
        reuse: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        device = device or (X.device if isinstance(X, Tensor) else torch.device("cpu"))
        ranks = ranks or Ranks()
        n = int(ranks.sum(torch.tensor(len(X)))[0])
        vars(self).update(
            head=head,
            activation=activation,
            samples=Samples(X, activation, dtype=dtype, device=device, memory=memory, reuse=reuse),
            ranks=ranks,
            n=n,
            stored=_known_by_files(X, n, ranks),
        )

    def _with(self, samples: Samples, **changed: Any) -> Operator:
        other = copy(self)
        vars(other).update(samples=samples, **changed)
        return other

    # -- the same operator otherwise ----------------------------------------------------------------------------------
    def astype(self, dtype: torch.dtype, *, reuse: bool = False) -> Operator:
        """In another precision; unless ``reuse``, each batch is prepared anew and little memory is taken."""
        if dtype == self.dtype == self.product_dtype:
            return self
        return self._with(self.samples.astype(dtype, reuse=reuse))

    def with_half_products(self) -> Operator | None:
        """With large products in bfloat16, weights and sums in float32: for rough early work.

        None where nothing would be gained: hardware without bfloat16 products, other precisions, Fourier transforms.
        """
        if self.dtype != torch.float32 or any(value.is_complex() for value in self.samples.like.values()):
            return None
        if not has_fast_bfloat16(self.device):
            return None
        return self._with(self.samples.with_products(torch.bfloat16))

    def take(self, index: Int[Tensor, " b"]) -> Operator:
        """Some samples of one process, with what was prepared of them."""
        return self._with(self.samples.take(index), n=len(index), stored=None)

    # -- what it holds ------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        """This process's samples."""
        return len(self.samples)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights, outputs and sums."""
        return self.samples.dtype

    @property
    def product_dtype(self) -> torch.dtype:
        """Precision of the matrix products of a pass: ``dtype``, or bfloat16 after `with_half_products`."""
        return self.samples.product_dtype

    @property
    def device(self) -> torch.device:
        """Where passes are computed."""
        return self.samples.device

    @property
    def n_blocks(self) -> int:
        """``J`` gates times channel groups."""
        return self.activation.n_blocks

    @property
    def budget(self) -> Budget:
        """What there is left of ``memory``, shared by this operator in all precisions."""
        return self.samples.budget

    @property
    def masks(self) -> Tensor | None:
        """Bit-packed masks of the gates, ``(n, j, m)``."""
        return self.samples.masks

    @property
    def X(self) -> Float[Tensor, "n s d"] | StoredTokens:
        """Tokens of this process's samples."""
        return self.samples.X

    def tokens(self) -> Float[Tensor, "n s d"]:
        """All of them in memory, read where they are not."""
        return self.X if isinstance(self.X, Tensor) else self.X.read()

    # -- passes over the data -----------------------------------------------------------------------------------------
    def batches(self, k: int) -> Iterator[tuple[slice, Data]]:
        """Slices of samples with their prepared data, sized for ``k`` atoms."""
        yield from self.samples.batches(self._batch(self.activation.workspace(k)))

    def contraction(self, c: int) -> MixFirst | ValuesFirst:
        """The cheaper order of products for ``c`` outputs."""
        if self.activation.values_first(c):
            return ValuesFirst(self.head, c)
        return MixFirst(self.activation)

    def over_batches(self, k: int, work: Work, *into: Tensor, c: int | None = None) -> None:
        """Add to ``into`` what ``work(rows, data)`` returns for every batch.

        Batches are sized to mix ``k`` atoms, or for the `contraction` of their ``c`` outputs.
        """
        most = self._batch(self.activation.workspace(k) if c is None else self.contraction(c).workspace(k))
        workers = torch.get_num_threads() if self.device.type == "cpu" else 1
        if len(self) <= most * (workers - 1):
            workers = 1  # too few batches
        turns = max(1, math.ceil(len(self) / (most * workers)))
        even = max(1, math.ceil(len(self) / (turns * workers)))  # no worker waits for the last batch of another
        add_up(self.samples.batches(even), work, into, workers=workers, context=self._in_products)

    def _batch(self, numbers: int) -> int:
        """Most samples of a batch that takes so many ``numbers`` of workspace each."""
        return max(self.head.least_batch, self.samples.batch_size(numbers))

    def _in_products(self) -> AbstractContextManager[Any]:
        """Where large products are made in `product_dtype`."""
        if self.product_dtype == self.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, self.product_dtype)

    def outputs(self, atoms: Atoms) -> Float[Tensor, "n r c"]:
        """``f`` of every sample."""
        f = atoms.intercept.expand(len(self), self.head.r, -1).clone()
        if len(atoms):
            contraction = self.contraction(f.shape[2])

            def add(rows: slice, data: Data) -> tuple[Tensor, ...]:
                f[rows] += contraction.outputs(data, atoms.U, atoms.V, atoms.block)
                return ()

            self.over_batches(len(atoms), add, c=f.shape[2])
        return f

    def mixed(self, U: Float[Tensor, "k ..."], block: Int[Tensor, " k"]) -> Float[Tensor, "n r k e"]:
        """Mixed, pooled tokens of every sample: large, see `mixed_bytes`."""
        shape = len(self), self.head.r, len(U), self.head.value_rows
        out = torch.empty(shape, dtype=self.product_dtype, device=U.device)

        def mix(rows: slice, data: Data) -> tuple[Tensor, ...]:
            out[rows] = self.activation.mix(data, U, block)
            return ()

        self.over_batches(len(U), mix)
        return out

    def mixed_bytes(self, k: int) -> int:
        """What `mixed` takes for ``k`` atoms; who keeps it asks the `budget`."""
        return len(self) * self.head.r * k * self.head.value_rows * self.product_dtype.itemsize

    def adjoint_times_values(
        self,
        R: Float[Tensor, "n r c"],
        V: Float[Tensor, "k e c"],
        block: Int[Tensor, " k"],
        at: Float[Tensor, "k ..."] | None = None,
    ) -> Float[Tensor, "k ..."]:
        """``𝒜_j*(R) V_k`` for each ``V_k`` in its block; of a ReLU with the masks that the weights ``at`` decide."""
        V, contraction = self.head.mask_values(V, block), self.contraction(R.shape[2])
        out = V.new_zeros(len(V), *self.head.mixing_shape)

        def pull_back(rows: slice, data: Data) -> tuple[Tensor, ...]:
            return (contraction.times_values(data, R[rows], V, block, at),)

        self.over_batches(len(V), pull_back, out, c=R.shape[2])
        return self.ranks.sum(out)[0]

    def adjoint_times_mixing(
        self, R: Float[Tensor, "n r c"], U: Float[Tensor, "k ..."], block: Int[Tensor, " k"]
    ) -> Float[Tensor, "k e c"]:
        """``𝒜_j*(R)ᵀ U_k`` for each ``U_k`` in its block: ``Σ_i (P mix(X_i, U_k))ᵀ R_i``, whatever the activation."""
        out, contraction = U.new_zeros(len(U), self.head.value_rows, R.shape[2]), self.contraction(R.shape[2])

        def read(rows: slice, data: Data) -> tuple[Tensor, ...]:
            return (contraction.times_mixing(data, R[rows], U, block),)

        self.over_batches(len(U), read, out, c=R.shape[2])
        return self.head.mask_values(self.ranks.sum(out)[0], block)

    # -- matrices -----------------------------------------------------------------------------------------------------
    def value_grams(self, atoms: Atoms, groups: Sequence[Tensor]) -> list[Tensor]:
        """``(1/n) Σ_i M_iᵀ M_i (g·e, g·e)`` of the mixed tokens ``M_i (r, g·e)``, for each group ``(g,)`` of atoms.

        With an output for every token an estimate from samples at equal distances.
        """
        e = self.head.value_rows
        step = min(self.n * self.head.r // (GRAM_ROWS * e * max(map(len, groups), default=1)), self.n // GRAM_SAMPLES)
        if step > 1 and self.head.r > 1:
            return self.take(torch.arange(0, len(self), step)).value_grams(atoms, groups)
        grams = [torch.zeros(len(g) * e, len(g) * e, dtype=self.dtype, device=self.device) for g in groups]

        def grams_of(rows: slice, data: Data) -> tuple[Tensor, ...]:
            M = self.activation.mix(data, atoms.U, atoms.block).flatten(0, 1)
            of_groups = (M[:, group].flatten(1) for group in groups)
            return tuple(flat.T @ flat for flat in of_groups)

        self.over_batches(len(atoms), grams_of, *grams)
        n, *sums = self.ranks.sum(torch.tensor(len(self), device=self.device), *grams)
        return [total / n for total in sums]

    def pair_covariance(
        self,
        basis: Atoms,
        probes: Float[Tensor, "t n r c"],
        n_blocks: int,
        mixed: Float[Tensor, "n r k e"] | None = None,
    ) -> Float[Tensor, "jmm jmm"]:
        """Covariance of ``⟨P mix(X_i, U_a) V_b, z_ti⟩`` over samples and draws, for all pairs of a block's basis.

        Parameters
        ----------
        basis : Atoms
            ``m`` of each of ``n_blocks`` blocks, block by block.
        probes : Tensor (t, n, r, c)
            ``z``: with draws whose covariance is the loss's Hessian, the result is that of the data term in the
            coefficients ``M`` of ``Σ_ab M_ab mix(X, U_a) V_b``.
        mixed : Tensor (n, r, k, e) or None
            The basis's `mixed` tokens where they are at hand.
        """
        size = len(basis) ** 2 // n_blocks
        out = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        waiting: list[Tensor] = []

        def add() -> None:  # the product is large beside a batch: many batches share one
            pairs = torch.cat(waiting)
            out.add_(pairs.T @ pairs)
            waiting.clear()

        with self._in_products():
            for pairs in self._pairs(basis, probes, n_blocks, mixed):
                waiting.append(pairs)
                if sum(map(len, waiting)) >= 2 * size:
                    add()
            if waiting:
                add()
        return self.ranks.sum(out)[0] / (self.n * len(probes))

    def _pairs(
        self, basis: Atoms, probes: Tensor, n_blocks: int, mixed: Tensor | None
    ) -> Iterator[Float[Tensor, "tb jmm"]]:
        """``⟨P mix(X_i, U_a) V_b, z_ti⟩``, some samples at a time."""
        if mixed is None:
            contraction = self.contraction(probes.shape[3])
            for rows, data in self.samples.batches(self._batch(contraction.workspace(len(basis)))):
                yield contraction.pairs(data, basis, probes[:, rows], n_blocks)
        else:
            step = self.samples.batch_size(2 * mixed[0].numel())
            for i in range(0, len(mixed), step):
                yield pairs_of_mixed(mixed[i : i + step], basis, probes[:, i : i + step], n_blocks)

    def features(self) -> Float[Tensor, "j nr pe"]:
        """Every block's linear map as a dense matrix: row ``(i, row)``, column ``(entry of U, row of V)``."""
        p, e, r, n = self.head.mixing_size, self.head.value_rows, self.head.r, len(self)
        basis = torch.eye(p, dtype=self.dtype, device=self.device).view(p, *self.head.mixing_shape)
        out = torch.empty(self.n_blocks, n, r, p, e, dtype=self.dtype, device=self.device)
        for j in range(self.n_blocks):
            block = torch.full((p,), j, device=self.device)

            def mix(rows: slice, data: Data, out: Tensor = out[j], block: Tensor = block) -> tuple[Tensor, ...]:
                out[rows] = self.activation.mix(data, basis, block)
                return ()

            self.over_batches(p, mix)
        return out.view(self.n_blocks, n * r, p * e)

    def gradient_cost(self, c: int) -> GradientCost | None:
        """What gradient matrices of ``c`` outputs take when they are formed outright.

        None where products with a basis of their smaller side take less.
        """
        cost = self.activation.gradient_cost(c)
        cheaper = cost is not None and cost.products < min(self.head.mixing_size, self.head.value_rows * c)
        return cost if cheaper else None

    def gradient_matrices(self, R: Float[Tensor, "n r c"], blocks: Int[Tensor, " j"]) -> Float[Tensor, "j p q"]:
        """``𝒜_j*(R)`` formed for the named blocks, ``(mixing_size, value_rows · c)`` each."""
        cost = self.gradient_cost(R.shape[-1])
        return self._by_products(R, blocks) if cost is None else self._outright(R, blocks, cost)

    def _by_products(self, R: Tensor, blocks: Tensor) -> Tensor:
        shapes = self.head.mixing_shape, (self.head.value_rows, R.shape[-1])
        p, q = map(math.prod, shapes)
        times, shape = (self.adjoint_times_mixing, shapes[0]) if p <= q else (self.adjoint_times_values, shapes[1])
        basis = torch.eye(min(p, q), dtype=self.dtype, device=self.device).view(-1, *shape)
        vectors = basis.repeat(len(blocks), *[1] * len(shape)).split(64)
        of = blocks.repeat_interleave(min(p, q)).split(64)
        rows = torch.cat([times(R, *part) for part in zip(vectors, of, strict=True)]).view(len(blocks), min(p, q), -1)
        return rows if p <= q else rows.mT

    def _outright(self, R: Tensor, blocks: Tensor, cost: GradientCost) -> Tensor:
        rising, place = torch.unique(blocks, return_inverse=True)
        size = max(1, GRADIENT_BYTES[self.device.type] // self.dtype.itemsize // cost.workspace)
        batches = ((data, R[rows]) for rows, data in self.samples.batches(size))
        (matrices,) = self.ranks.sum(self.activation.gradient(batches, rising))
        return matrices if torch.equal(rising, blocks) else matrices[place]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices much faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without the instructions CPUs emulate them, several times slower than float32.
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported() for supported in known if supported is not None)


def _known_by_files(X: Tokens, n: int, ranks: Ranks) -> str | None:
    if isinstance(X, Tensor) or X.checksum is None:
        return None
    first = -int(ranks.largest(-X.first)[0])
    return f"{n}x{X.shape[1]}x{X.shape[2]} {FILES} from {first} {X.checksum}"
