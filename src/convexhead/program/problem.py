"""The training problem of a head: objective, factored gradients and products with the gradient matrix.

    min  F + β Ω,   F = (1/n) Σ_i ℓ(f_i, y_i),   f_i = Σ_k P mix(X_i, U_k) V_k + b

with ``Ω = Σ_j ‖Z_j‖_*`` over blocks ``j``, ``Z_j = Σ_{k in j} vec(U_k) vec(V_k)ᵀ``, and its factored form
``½ Σ_k (‖U_k‖² + ‖V_k‖²) ≥ Ω`` (equal once balanced). The linear head has ``Ω = ½‖V‖²`` instead.

With ``R_i = ∇ℓ(f_i, y_i)/n`` the gradient of ``F`` in ``Z_j`` is the matrix ``𝒜_j*(R)``. Products with it are

    𝒜_j*(R) V  = mix_adjoint(R Vᵀ)  (*mixing_shape)        𝒜_j*(R)ᵀ U = Σ_i (P mix(X_i, U))ᵀ R_i  (e, c)

Everything is one pass over the samples in batches, a few large matrix products each. Several processes may share the
samples: each passes over its own, and `Problem.sum` adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from convexhead.program.activations import Activation
from convexhead.program.coordinates import Coordinates
from convexhead.program.heads.base import Data, Forming, Head
from convexhead.program.identity import FILES, identify
from convexhead.program.losses import Loss
from convexhead.runtime.budget import Budget
from convexhead.runtime.ranks import Ranks
from convexhead.runtime.samples import Samples
from convexhead.runtime.stored_tokens import StoredTokens
from convexhead.runtime.workers import Work, add_up

BATCH_BYTES = {"cpu": 3_000_000, "cuda": 1_000_000_000}
"""Workspace that a batch may take: on a CPU what stays in the caches between the products of a pass."""
FORMING_BYTES = {"cpu": 10_000_000, "cuda": 1_000_000_000}
"""Workspace that a batch may take while gradient matrices are formed."""


@dataclass
class Atoms:
    """A head's weights in factored form.

    Attributes
    ----------
    U : Tensor (k, *mixing_shape)
        Mixing weights.
    V : Tensor (k, e, c)
        Value weights; zero outside the outputs that a grouped block-FNO's group writes.
    block : Tensor (k,), int64
        The block of each atom, ``gate · n_groups + group``.
    intercept : Tensor (c,)
        ``b``; zero where none is fitted.
    """

    U: Float[Tensor, "k ..."]
    V: Float[Tensor, "k e c"]
    block: Int[Tensor, " k"]
    intercept: Float[Tensor, " c"]

    def __len__(self) -> int:
        return len(self.block)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Atoms:
        """The same weights on another device in another precision."""
        return Atoms(
            self.U.to(device, dtype),
            self.V.to(device, dtype),
            self.block.to(device),
            self.intercept.to(device, dtype),
        )

    def select(self, index: Tensor) -> Atoms:
        """The atoms that ``index`` (a mask or positions) picks."""
        return replace(self, U=self.U[index], V=self.V[index], block=self.block[index])

    def state(self) -> dict[str, Tensor]:
        """The weights by name, for checkpoints."""
        return {"U": self.U, "V": self.V, "block": self.block, "intercept": self.intercept}

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> Atoms:
        """Inverse of `state`, which may hold other things too."""
        return cls(state["U"], state["V"], state["block"], state["intercept"])

    def append(self, other: Atoms) -> Atoms:
        """These atoms and then ``other``'s, with this intercept."""
        return replace(
            self,
            U=torch.cat([self.U, other.U]),
            V=torch.cat([self.V, other.V]),
            block=torch.cat([self.block, other.block]),
        )


class Problem:
    """Tokens, targets, head, activation and loss, ready for passes over the data.

    Parameters
    ----------
    X : Tensor (n, s, d) or StoredTokens
        Tokens of this process's samples, any float dtype, in memory or on disk.
    Y : Tensor (n, r, c)
        Their targets; one-hot rows for class labels, of any type.
    head, activation, loss
        What makes the outputs and how they are judged.
    fit_intercept : bool
        Whether an unpenalised ``b`` is added to the outputs.
    dtype : torch.dtype
        Precision of the passes.
    reuse : bool
        Prepare the tokens once and keep the result (a solver's many passes); else prepare each batch anew.
    device : torch.device or None
        Where passes are computed; None: where the tokens are.
    memory : float
        Bytes that tokens and what is made of them may take; the rest is read and prepared again in each pass.
    ranks : Ranks or None
        The processes that share the samples, each with a `Problem` of its own.

    Attributes
    ----------
    products : torch.dtype
        Precision of the matrix products of a pass: ``dtype``, or bfloat16 after `with_half_products`.
    stored : str or None
        Tells the tokens of a store from all others, where their values cannot (`StoredTokens.checksum`).
    coordinates : Coordinates
        Those that tokens, targets, weights and β are in; `stated` is the problem in the user's own.
    n : int
        Samples of all processes together. Tensors with a dimension ``n`` hold this process's share of them.
    """

    def __init__(
        self,
        X: Float[Tensor, "n s d"] | StoredTokens,
        Y: Shaped[Tensor, "n r c"],
        head: Head,
        activation: Activation,
        loss: Loss,
        *,
        fit_intercept: bool = False,
        dtype: torch.dtype = torch.float64,
        reuse: bool = True,
        device: torch.device | None = None,
        memory: float = math.inf,
        ranks: Ranks | None = None,
    ) -> None:
        self.head, self.activation, self.loss, self.ranks = head, activation, loss, ranks or Ranks()
        self.coordinates, self.stated = Coordinates(), self
        self.fit_intercept, self.dtype, self.products = fit_intercept, dtype, dtype
        self.device = device or (X.device if isinstance(X, Tensor) else torch.device("cpu"))
        self.samples = Samples(
            X, activation, dtype=dtype, device=self.device, memory=memory, reuse=reuse, step=self._preparation_step()
        )
        self.stored = self._known_by_files(X)
        self.targets, self.Y = Y, Y.to(self.device, dtype)
        self.n, self.c = int(self.sum(torch.tensor(len(Y)))[0]), Y.shape[-1]
        self.n_blocks = activation.n_blocks
        self.value_shape = (head.value_rows, self.c)
        output_mask = head.output_mask(self.c)
        self.output_mask = None if output_mask is None else output_mask.to(self.device, dtype)

    def in_coordinates(self, coordinates: Coordinates) -> Problem:
        """The same program in other coordinates, which its weights and its β are in as well."""
        if not coordinates:
            return self
        inner = copy(self)
        for name in ("rows", "largest_target", "forming"):
            inner.__dict__.pop(name, None)
        inner.coordinates, inner.stated = coordinates, self
        inner.samples = Samples(
            coordinates.tokens(self.X),
            self.activation,
            dtype=self.dtype,
            device=self.device,
            memory=self.budget.left,
            reuse=True,
            step=self._preparation_step(),
        )
        inner.targets = coordinates.targets(self.targets)
        inner.Y = inner.targets.to(self.device, self.dtype)
        return inner

    def in_double(self, *, reuse: bool = False) -> Problem:
        """The same problem in float64; unless ``reuse``, each batch is prepared anew and little memory is taken."""
        if self.dtype == torch.float64:
            return self
        exact = copy(self)
        exact.dtype = exact.products = torch.float64
        exact.Y = self.targets.to(self.device, torch.float64)
        exact.output_mask = None if self.output_mask is None else self.output_mask.double()
        exact.samples = self.samples.in_precision(torch.float64, reuse=reuse, step=exact._preparation_step())
        return exact

    def enter(self, atoms: Atoms) -> Atoms:
        """The user's weights in this problem's coordinates."""
        return self.coordinates.enter(atoms, self.activation)

    def leave(self, atoms: Atoms) -> Atoms:
        """Weights of this problem as the user's."""
        return self.coordinates.leave(atoms, self.activation)

    def rounding(self, atoms: Atoms, f: Float[Tensor, "n r c"]) -> float:
        """What the objective may grow by when these weights, with outputs ``f``, become the user's: see `Coordinates`.

        With ``δ`` what their outputs may differ by, ``F(b + δ) ≤ F(b) + ⟨Σ_i R_i, δ⟩ + r‖δ‖²/2`` for a loss that curves
        no more than ``½‖f‖²`` does, as all of the library do.
        """
        if not self.coordinates:
            return 0.0
        lost = self.coordinates.rounding(atoms, self.activation)
        left = self.sum(self.residual(f).sum((0, 1)))[0].abs()
        return float(lost @ left + self.head.r * lost.square().sum() / 2)

    def class_by_class(self) -> Problem:
        """The same problem with targets that lie in memory as dense passes make outputs: a column for every class."""
        same = copy(self)
        same.Y = self.Y.movedim(2, 0).contiguous().movedim(0, 2)
        return same

    def with_half_products(self) -> Problem | None:
        """The same problem with its large products in bfloat16, weights and sums in float32: for rough early work.

        None where nothing would be gained: hardware without bfloat16 products, other precisions, Fourier transforms.
        """
        if self.dtype != torch.float32 or any(value.is_complex() for value in self.samples.like.values()):
            return None
        if not has_fast_bfloat16(self.device):
            return None
        half = copy(self)
        half.products = torch.bfloat16
        half.samples = self.samples.with_products(torch.bfloat16)
        return half

    @cached_property
    def identity(self) -> dict[str, str]:
        """Everything that the optimum depends on but β, in named parts: see `convexhead.program.identity`.

        Tokens and targets are those that a user gave. A problem that is solved in other coordinates takes over the
        identity of the one that was stated. All processes ask for it together.
        """
        return identify(self) if self.stated is self else self.stated.identity

    def _known_by_files(self, X: Tensor | StoredTokens) -> str | None:
        if isinstance(X, Tensor) or X.checksum is None:
            return None
        n, first = int(self.sum(torch.tensor(len(X)))[0]), -int(self.ranks.largest(-X.first)[0])
        return f"{n}x{X.shape[1]}x{X.shape[2]} {FILES} from {first} {X.checksum}"

    @property
    def masks(self) -> Tensor | None:
        """Bit-packed masks of the gates, ``(n, j, m)``."""
        return self.samples.masks

    @property
    def budget(self) -> Budget:
        """What there is left of ``memory``, shared by this problem in all precisions."""
        return self.samples.budget

    @property
    def X(self) -> Float[Tensor, "n s d"] | StoredTokens:
        """Tokens of this process's samples."""
        return self.samples.X

    def tokens(self) -> Float[Tensor, "n s d"]:
        """All of them in memory, read where they are not."""
        return self.X if isinstance(self.X, Tensor) else self.X.read()

    # -- sums over the samples ----------------------------------------------------------------------------------------
    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over all samples, of what was summed over this process's: the one place where processes meet."""
        return self.ranks.sum(*parts)

    def mean(self, values: Float[Tensor, " n"]) -> float:
        """``(1/n) Σ_i`` over all samples, in float64."""
        return float(self.sum(values.double().sum())[0]) / self.n

    def mean_of(self, function: Callable[..., Float[Tensor, " b"]], *parts: Float[Tensor, "n r c"]) -> float:
        """``(1/n) Σ_i`` of what ``function`` makes of rows of ``parts``, some rows at a time to save memory."""
        if len(self.rows) == 1:
            return self.mean(function(*parts))
        return self.mean(torch.stack([function(*(part[rows] for part in parts)).double().sum() for rows in self.rows]))

    @cached_property
    def rows(self) -> list[slice]:
        """This process's samples in slices whose outputs, in float64, stay in the caches."""
        step = max(1, BATCH_BYTES[self.device.type] // 8 // (self.head.r * self.c))
        return [slice(i, i + step) for i in range(0, len(self.Y), step)]

    @cached_property
    def largest_target(self) -> float:
        """``max |y|``."""
        return self.ranks.largest(float(self.Y.abs().max()))[0]

    # -- shapes -------------------------------------------------------------------------------------------------------
    @property
    def value_size(self) -> int:
        """Free entries of one value weight, the column count of each ``Z_j``."""
        columns = self.c if self.output_mask is None else self.c // self.head.n_groups
        return self.head.value_rows * columns

    def empty(self) -> Atoms:
        """The zero model. The linear head has its one atom from the start."""
        k = 0 if self.head.learns_mixing else 1
        return Atoms(
            torch.ones(k, *self.head.mixing_shape, device=self.device, dtype=self.dtype),
            torch.zeros(k, *self.value_shape, device=self.device, dtype=self.dtype),
            torch.zeros(k, dtype=torch.int64, device=self.device),
            torch.zeros(self.c, device=self.device, dtype=self.dtype),
        )

    def mask_values(self, V: Float[Tensor, "k e c"], block: Int[Tensor, " k"]) -> Float[Tensor, "k e c"]:
        """``V`` with zeros in the outputs that its block does not write."""
        if self.output_mask is None:
            return V
        return V * self.output_mask[block % self.head.n_groups].unsqueeze(1)

    # -- passes over the data -----------------------------------------------------------------------------------------
    def batches(self, k: int) -> Iterator[tuple[slice, Data]]:
        """Slices of samples with their prepared data, sized for ``k`` atoms."""
        yield from self.samples.batches(max(self.head.least_batch, self._batch_size(self.activation.workspace(k))))

    def over_batches(self, k: int, work: Work, *into: Tensor) -> None:
        """Add to ``into`` what ``work(rows, data)`` returns for every batch, sized for ``k`` atoms."""
        most = max(self.head.least_batch, self._batch_size(self.activation.workspace(k)))
        lanes = torch.get_num_threads() if self.device.type == "cpu" else 1
        if len(self.Y) <= most * (lanes - 1):
            lanes = 1  # too few batches
        turns = max(1, math.ceil(len(self.Y) / (most * lanes)))
        even = max(1, math.ceil(len(self.Y) / (turns * lanes)))  # no lane waits for the last batch of another
        add_up(self.samples.batches(even), work, into, lanes=lanes, context=self._in_products)

    def _in_products(self) -> AbstractContextManager[Any]:
        """Where large products are made in `products`."""
        if self.products == self.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, self.products)

    def _batch_size(self, numbers: int) -> int:
        """Samples whose workspace of so many ``numbers`` each fits the budget."""
        return max(1, BATCH_BYTES[self.device.type] // self.products.itemsize // max(1, numbers))

    def _preparation_step(self) -> int:
        """Samples prepared at a time."""
        return self._batch_size(self.head.s * max(self.head.s, self.head.d))

    def outputs(self, atoms: Atoms) -> Float[Tensor, "n r c"]:
        """``f`` of every sample."""
        f = atoms.intercept.expand(len(self.Y), self.head.r, self.c).clone()
        if len(atoms):
            V = atoms.V.flatten(0, 1)

            def add(rows: slice, data: Data) -> tuple[Tensor, ...]:
                f[rows] += self.activation.mix(data, atoms.U, atoms.block).flatten(2) @ V
                return ()

            self.over_batches(len(atoms), add)
        return f

    def mixed(self, U: Float[Tensor, "k ..."], block: Int[Tensor, " k"]) -> Float[Tensor, "n r k e"]:
        """Mixed, pooled tokens of every sample: large, see `mixed_bytes`."""
        out = torch.empty(len(self.Y), self.head.r, len(U), self.head.value_rows, dtype=self.products, device=U.device)

        def mix(rows: slice, data: Data) -> tuple[Tensor, ...]:
            out[rows] = self.activation.mix(data, U, block)
            return ()

        self.over_batches(len(U), mix)
        return out

    def mixed_bytes(self, k: int) -> int:
        """What `mixed` takes for ``k`` atoms; who keeps it asks the `budget`."""
        return len(self.Y) * self.head.r * k * self.head.value_rows * self.products.itemsize

    def data_term(self, f: Float[Tensor, "n r c"]) -> float:
        """``F = (1/n) Σ_i ℓ(f_i, y_i)``, summed in float64."""
        return self.mean_of(self.loss.value, f, self.Y)

    def residual(self, f: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
        """``R_i = ∇ℓ(f_i, y_i) / n``."""
        return self.loss.residual(f, self.Y) / self.n

    def balance(self, atoms: Atoms) -> tuple[Atoms, list[Tensor]]:
        """The same function with balanced atoms and the least penalty known for it, and ``‖U_k‖‖V_k‖`` by block.

        Blocks of a convex program take an SVD (`balance`), atoms of a ReLU are only rescaled (`rescale`).
        """
        return balance(atoms, drop=0.0) if self.activation.convex else rescale(atoms)

    def penalty(self, atoms: Atoms) -> float:
        """``½ Σ_k (‖U_k‖² + ‖V_k‖²)``, or ``½‖V‖²`` where the mixing is not learned."""
        parts = [atoms.V, atoms.U] if self.head.learns_mixing else [atoms.V]
        return sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts) / 2

    def value_and_gradient(
        self, atoms: Atoms, beta: float
    ) -> tuple[float, Float[Tensor, "k ..."], Float[Tensor, "k e c"], Float[Tensor, " c"]]:
        """Factored objective and its gradients in ``U``, ``V`` and ``b``; one pass."""
        V = atoms.V.flatten(0, 1)
        self.last_outputs = torch.empty_like(self.Y)  # a gap check right after needs them again
        gU, gV, gb = torch.zeros_like(atoms.U), torch.zeros_like(atoms.V), torch.zeros_like(atoms.intercept)
        total = torch.zeros((), dtype=torch.float64, device=self.device)

        def evaluate(rows: slice, data: Data) -> tuple[Tensor, ...]:
            M, pull_back = self.activation.mix_with_pull_back(data, atoms.U, atoms.block)
            flat = M.flatten(2).flatten(0, 1)  # (b·r, k·e)
            f = (flat @ V + atoms.intercept).view(*M.shape[:2], self.c)
            self.last_outputs[rows] = f
            loss, R = self.loss.value_and_residual(f, self.Y[rows])
            R = R.flatten(0, 1) / self.n
            at_V = (flat.T @ R).view(gV.shape)
            at_U = pull_back((R @ V.T).view(M.shape)) if self.head.learns_mixing else torch.zeros_like(gU)
            return loss.double().sum(), at_U, at_V, R.sum(0)

        self.over_batches(len(atoms), evaluate, total, gU, gV, gb)
        total, gU, gV, gb = self.sum(total, gU, gV, gb)
        if self.head.learns_mixing:
            gU = gU + beta * atoms.U
        if not self.fit_intercept:
            gb = torch.zeros_like(gb)
        value = float(total) / self.n + beta * self.penalty(atoms)
        return value, gU, self.mask_values(gV + beta * atoms.V, atoms.block), gb

    def adjoint_times_values(
        self,
        R: Float[Tensor, "n r c"],
        V: Float[Tensor, "k e c"],
        block: Int[Tensor, " k"],
        at: Float[Tensor, "k ..."] | None = None,
    ) -> Float[Tensor, "k ..."]:
        """``𝒜_j*(R) V_k`` for each ``V_k`` in its block; of a ReLU with the masks that the weights ``at`` decide."""
        V = self.mask_values(V, block)
        out = V.new_zeros(len(V), *self.head.mixing_shape)

        def pull_back(rows: slice, data: Data) -> tuple[Tensor, ...]:
            T = (R[rows] @ V.flatten(0, 1).T).unflatten(-1, V.shape[:2])
            return (self.activation.mix_adjoint(data, T, block, at),)

        self.over_batches(len(V), pull_back, out)
        return self.sum(out)[0]

    def adjoint_times_mixing(
        self, R: Float[Tensor, "n r c"], U: Float[Tensor, "k ..."], block: Int[Tensor, " k"]
    ) -> Float[Tensor, "k e c"]:
        """``𝒜_j*(R)ᵀ U_k`` for each ``U_k`` in its block: ``Σ_i (P mix(X_i, U_k))ᵀ R_i``, whatever the activation."""
        out = U.new_zeros(len(U), *self.value_shape)

        def read(rows: slice, data: Data) -> tuple[Tensor, ...]:
            M = self.activation.mix(data, U, block)
            return ((M.flatten(2).flatten(0, 1).T @ R[rows].flatten(0, 1)).view(out.shape),)

        self.over_batches(len(U), read, out)
        return self.mask_values(self.sum(out)[0], block)

    def value_grams(self, atoms: Atoms, groups: Sequence[Tensor]) -> list[Tensor]:
        """``(1/n) Σ_i M_iᵀ M_i (g·e, g·e)`` of the mixed tokens ``M_i (r, g·e)``, for each group ``(g,)`` of atoms."""
        e = self.head.value_rows
        grams = [torch.zeros(len(g) * e, len(g) * e, dtype=self.dtype, device=self.device) for g in groups]

        def grams_of(rows: slice, data: Data) -> tuple[Tensor, ...]:
            M = self.activation.mix(data, atoms.U, atoms.block).flatten(0, 1)
            of_groups = (M[:, group].flatten(1) for group in groups)
            return tuple(flat.T @ flat for flat in of_groups)

        self.over_batches(len(atoms), grams_of, *grams)
        return [gram / self.n for gram in self.sum(*grams)]

    def pair_covariance(
        self,
        basis: Atoms,
        probes: Float[Tensor, "n r c"],
        n_blocks: int,
        mixed: Float[Tensor, "n r k e"] | None = None,
    ) -> Float[Tensor, "jmm jmm"]:
        """Covariance of ``⟨P mix(X_i, U_a) V_b, z_i⟩`` over the samples, for all pairs ``(a, b)`` of a block's basis.

        Parameters
        ----------
        basis : Atoms
            ``m`` of each of ``n_blocks`` blocks, block by block.
        probes : Tensor (n, r, c)
            ``z``: with draws whose covariance is the loss's Hessian, the result is that of the data term in the
            coefficients ``M`` of ``Σ_ab M_ab mix(X, U_a) V_b``.
        mixed : Tensor (n, r, k, e) or None
            The basis's `mixed` tokens where they are at hand.
        """
        V = basis.V.flatten(0, 1).T
        size = len(basis) ** 2 // n_blocks
        out = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        waiting: list[Tensor] = []

        def add() -> None:  # the product is large beside a batch: many batches share one
            pairs = torch.cat(waiting)
            out.add_(pairs.T @ pairs)
            waiting.clear()

        with self._in_products():
            for rows, M in self._mixed_batches(basis, mixed):
                T = (probes[rows] @ V).view(M.shape)
                M, T = (part.unflatten(2, (n_blocks, -1)).movedim(1, 2) for part in (M, T))  # (b, j, r, m, e)
                waiting.append(torch.einsum("bjrke,bjrle->bjkl", M, T).flatten(1))
                if sum(map(len, waiting)) >= 2 * size:
                    add()
            if waiting:
                add()
        return self.sum(out)[0] / self.n

    def _mixed_batches(self, basis: Atoms, mixed: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Slices of samples with their mixed tokens, from those at hand or made anew."""
        if mixed is None:
            for rows, data in self.batches(len(basis)):
                yield rows, self.activation.mix(data, basis.U, basis.block)
        else:
            step = self._batch_size(2 * mixed[0].numel())
            for i in range(0, len(mixed), step):
                yield slice(i, i + step), mixed[i : i + step]

    def features(self) -> Float[Tensor, "j nr pe"]:
        """Every block's linear map as a dense matrix: row ``(i, row)``, column ``(entry of U, row of V)``."""
        p, e, r = self.head.mixing_size, self.head.value_rows, self.head.r
        basis = torch.eye(p, dtype=self.dtype, device=self.device).view(p, *self.head.mixing_shape)
        n = len(self.Y)
        out = torch.empty(self.n_blocks, n, r, p, e, dtype=self.dtype, device=self.device)
        for j in range(self.n_blocks):
            block = torch.full((p,), j, device=self.device)

            def mix(rows: slice, data: Data, out: Tensor = out[j], block: Tensor = block) -> tuple[Tensor, ...]:
                out[rows] = self.activation.mix(data, basis, block)
                return ()

            self.over_batches(p, mix)
        return out.view(self.n_blocks, n * r, p * e)

    @cached_property
    def forming(self) -> Forming | None:
        """What forming a gradient matrix takes; None where products from its smaller side would take less."""
        forming = self.activation.forming(self.c)
        cheaper = forming is not None and forming.products < min(self.head.mixing_size, self.head.value_rows * self.c)
        return forming if cheaper else None

    def gradient_matrices(self, R: Float[Tensor, "n r c"], blocks: Int[Tensor, " j"]) -> Float[Tensor, "j p q"]:
        """``𝒜_j*(R)`` formed for the named blocks, ``(mixing_size, value_rows · c)`` each."""
        if self.forming is not None:
            return self._form(R, blocks, self.forming)
        p, q = self.head.mixing_size, self.head.value_rows * self.c
        times, shape = (
            (self.adjoint_times_mixing, self.head.mixing_shape)
            if p <= q
            else (self.adjoint_times_values, self.value_shape)
        )
        basis = torch.eye(min(p, q), dtype=self.dtype, device=self.device).view(-1, *shape)
        vectors = basis.repeat(len(blocks), *[1] * len(shape)).split(64)
        of = blocks.repeat_interleave(min(p, q)).split(64)
        rows = torch.cat([times(R, *part) for part in zip(vectors, of, strict=True)]).view(len(blocks), min(p, q), -1)
        return rows if p <= q else rows.mT

    def _form(self, R: Tensor, blocks: Tensor, forming: Forming) -> Tensor:
        rising, place = torch.unique(blocks, return_inverse=True)
        size = max(1, FORMING_BYTES[self.device.type] // self.dtype.itemsize // forming.workspace)
        batches = ((data, R[rows]) for rows, data in self.samples.batches(size))
        (matrices,) = self.sum(self.activation.gradient(batches, rising))
        return matrices if torch.equal(rising, blocks) else matrices[place]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices much faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without the instructions CPUs emulate them, several times slower than float32.
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported() for supported in known if supported is not None)


def balance(atoms: Atoms, *, drop: float) -> tuple[Atoms, list[Tensor]]:
    """The same ``Z_j`` with orthogonal, balanced atoms sorted by singular value, block by block.

    Parameters
    ----------
    drop : float
        Atoms whose singular value is at most ``drop`` times the largest of all blocks are dropped.

    Returns
    -------
    atoms : Atoms
        ``‖U_k‖ = ‖V_k‖ = √σ_k``, ordered by block, then by falling ``σ_k``.
    singular_values : list of Tensor
        One ``(k_j,)`` for each block that has atoms, in the atoms' order.
    """
    pieces = []
    for j in torch.unique(atoms.block).tolist():
        of_block = atoms.select(atoms.block == j)
        qu, ru = torch.linalg.qr(of_block.U.flatten(1).T)
        qv, rv = torch.linalg.qr(of_block.V.flatten(1).T)
        left, sigma, right = torch.linalg.svd(ru @ rv.T)
        left, right = qu @ left[:, : len(sigma)], qv @ right[: len(sigma)].T
        pieces.append((j, left, sigma, right))
    largest = max((float(sigma[0]) for *_, sigma, _ in pieces if len(sigma)), default=0.0)
    kept = atoms.select(torch.zeros(0, dtype=torch.int64, device=atoms.block.device))
    values = []
    for j, left, sigma, right in pieces:
        m = int((sigma > drop * largest).sum())
        root = sigma[:m].sqrt()
        of_block = Atoms(
            (left[:, :m] * root).T.reshape(m, *atoms.U.shape[1:]),
            (right[:, :m] * root).T.reshape(m, *atoms.V.shape[1:]),
            torch.full((m,), j, device=atoms.block.device),
            atoms.intercept,
        )
        kept = kept.append(of_block)
        if m:
            values.append(sigma[:m])
    return kept, values


def rescale(atoms: Atoms) -> tuple[Atoms, list[Tensor]]:
    """The same function with ``‖U_k‖ = ‖V_k‖``, which every positively homogeneous activation allows.

    Returns
    -------
    atoms : Atoms
        Ordered by block, then by falling ``‖U_k‖‖V_k‖``; atoms that do nothing are dropped.
    sizes : list of Tensor
        ``‖U_k‖‖V_k‖``, one ``(k_j,)`` for each block that has atoms, in the atoms' order.
    """
    nU, nV = atoms.U.flatten(1).norm(dim=1), atoms.V.flatten(1).norm(dim=1)
    size = nU * nV
    order = torch.argsort(size, descending=True)
    order = order[torch.argsort(atoms.block[order], stable=True)]
    order = order[size[order] > 0]
    kept, size = atoms.select(order), size[order]
    root = size.sqrt()
    kept.U = kept.U * (root / nU[order]).view(-1, *[1] * (kept.U.ndim - 1))
    kept.V = kept.V * (root / nV[order]).view(-1, 1, 1)
    return kept, [size[kept.block == j] for j in torch.unique(kept.block).tolist()]
