"""The training problem of a head: objective, factored gradients, identity.

    min  F + β Ω,   F = (1/n) Σ_i ω_i ℓ(f_i, y_i),   f_i = Σ_k P mix(X_i, U_k) V_k + b

with ``Ω = Σ_j ‖Z_j‖_*`` over blocks ``j``, ``Z_j = Σ_{k in j} vec(U_k) vec(V_k)ᵀ``, and its factored form
``½ Σ_k (‖U_k‖² + ‖V_k‖²) ≥ Ω`` (equal once balanced). The linear head has ``Ω = ½‖V‖²`` instead.

The map from weights to outputs is the problem's `Operator`. With ``R_i = ω_i ∇ℓ(f_i, y_i)/n`` the gradient of ``F`` in
``Z_j`` is the matrix ``𝒜_j*(R)`` of its adjoint. Samples count alike, ``ω_i = 1``, unless the problem says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from convexhead.errors import InputError
from convexhead.program.activations import Activation
from convexhead.program.atoms import Atoms, balance, rescale
from convexhead.program.coordinates import Coordinates
from convexhead.program.heads.base import Data, Head
from convexhead.program.identity import identify
from convexhead.program.losses import Loss
from convexhead.program.operator import Operator
from convexhead.program.sample_losses import SampleLosses, Weights
from convexhead.runtime.ranks import Ranks
from convexhead.runtime.samples import BATCH_BYTES

MANY_TARGETS = 4_000_000
"""Entries of targets from which those of class labels stay bytes. Chosen by hand: 16 MB as float32, while to make
numbers of them in every pass takes a few hundredths of a softmax."""

ARRAYS = 8
"""Arrays of outputs that losses make of some samples. Chosen by hand: with 8 a fit of the linear head to 50,000 samples
takes 5% less time than with 1, and a tenth of the features less memory."""


class Evaluation(NamedTuple):
    """The factored objective at some weights."""

    value: float
    """``F + β Ω``."""
    gradient: Atoms
    """The gradients in ``U``, ``V`` and ``b``, each in the field of its variable."""
    outputs: Float[Tensor, "n r c"]
    """``f``, which the gradients were made from."""


class Problem:
    """An operator, targets and a loss: everything that the optimum depends on but β.

    Parameters
    ----------
    operator : Operator
        Makes outputs of weights; its precision and device are the problem's.
    targets : Tensor (n, r, c)
        Of this process's samples; one-hot rows for class labels, of any type.
    loss : Loss
        How outputs are judged.
    weights : Tensor (n, r or 1, c or 1) or None
        ``ω`` of samples, rows of outputs or entries, at least 0. None: all are 1.
    fit_intercept : bool
        Whether an unpenalised ``b`` is added to the outputs.

    Attributes
    ----------
    losses : SampleLosses
        Loss, targets and weights in the operator's precision on its device.
    coordinates : Coordinates
        Those that tokens, targets, weights and β are in.
    stated : Problem or None
        The problem in the user's own coordinates and as it was stated; None where it is this one.
    """

    def __init__(
        self,
        operator: Operator,
        targets: Shaped[Tensor, "n r c"],
        loss: Loss,
        *,
        weights: Weights | None = None,
        fit_intercept: bool = False,
    ) -> None:
        if targets.shape[:2] != (len(operator), operator.head.r):
            raise InputError(
                f"targets are {tuple(targets.shape)}, but outputs are ({len(operator)}, {operator.head.r}, c): "
                "give each row of outputs its targets"
            )
        self.operator, self.targets, self.weights, self.fit_intercept = operator, targets, weights, fit_intercept
        self.loss, self.c = loss, targets.shape[-1]
        self.losses = self._losses(operator.device, operator.dtype)
        self.coordinates = Coordinates()
        self.stated: Problem | None = None
        self._target_sums: list[tuple[Tensor, Tensor]] = []  # shared by the same problem in all precisions
        self.head.output_mask(self.c)  # refuses outputs that cannot be written in groups

    # -- the same problem otherwise -----------------------------------------------------------------------------------
    def in_coordinates(self, coordinates: Coordinates) -> Problem:
        """The same program in other coordinates, which its weights and its β are in as well."""
        if not coordinates:
            return self
        moved = Operator(
            coordinates.tokens(self.operator.X),
            self.head,
            self.activation,
            dtype=self.dtype,
            device=self.device,
            memory=self.operator.budget.left,
            ranks=self.ranks,
        )
        inner = Problem(
            moved,
            coordinates.targets(self.targets),
            self.loss,
            weights=self.weights,
            fit_intercept=self.fit_intercept,
        )
        inner.coordinates, inner.stated = coordinates, self
        return inner

    def astype(self, dtype: torch.dtype, *, reuse: bool = False) -> Problem:
        """The same problem in another precision: see `Operator.astype`."""
        operator = self.operator.astype(dtype, reuse=reuse)
        return self if operator is self.operator else self._on(operator, self._losses(operator.device, operator.dtype))

    def with_half_products(self) -> Problem | None:
        """The same problem with its large products in bfloat16, or None: see `Operator.with_half_products`."""
        # With the values first, products are few and short: what is rounded and widened again would cost more.
        half = None if self.activation.values_first(self.c) else self.operator.with_half_products()
        return None if half is None else self._on(half, self.losses)

    def class_by_class(self) -> Problem:
        """The same problem with targets as dense passes make outputs: see `SampleLosses.class_by_class`."""
        return self._on(self.operator, self.losses.class_by_class())

    def take(self, index: Int[Tensor, " b"]) -> Problem:
        """Take some samples of one process, with what was prepared of them: for steps over batches.

        It is another problem, with an identity of its own: a bound on the whole says nothing about it.
        """
        part = self._on(self.operator.take(index), self.losses.at(index))
        part.targets, part.weights, part.stated = part.Y, part.losses.weights, None
        vars(part).pop("identity", None)
        vars(part).update(_target_sums=[])
        return part

    @property
    def exact_losses(self) -> SampleLosses:
        """`losses` in float64. Targets are those that were given: probabilities in float32 do not sum to 1 there."""
        return self.losses if self.dtype == torch.float64 else self._losses(self.device, torch.float64)

    def _losses(self, device: torch.device, dtype: torch.dtype) -> SampleLosses:
        weights = None if self.weights is None else self.weights.to(device, dtype)
        stay_bytes = self.targets.dtype == torch.bool and self.targets.numel() >= MANY_TARGETS
        targets = self.targets.to(device, torch.bool if stay_bytes else dtype)
        return SampleLosses(self.loss, targets, weights, dtype=dtype)

    def _on(self, operator: Operator, losses: SampleLosses) -> Problem:
        other = copy(self)
        other.operator, other.losses, other.stated = operator, losses, self.stated or self
        for cached in ("rows", "largest_target"):
            vars(other).pop(cached, None)
        return other

    def enter(self, atoms: Atoms) -> Atoms:
        """Bring the user's weights into this problem's coordinates."""
        return self.coordinates.enter(atoms, self.activation)

    def leave(self, atoms: Atoms) -> Atoms:
        """Bring weights of this problem into the user's coordinates."""
        return self.coordinates.leave(atoms, self.activation)

    def rounding(self, atoms: Atoms, f: Float[Tensor, "n r c"]) -> float:
        """What the objective may grow by when these weights, with outputs ``f``, become the user's: see `Coordinates`.

        With ``δ`` what their outputs may differ by, ``F(b + δ) ≤ F(b) + ⟨Σ_i R_i, δ⟩ + ω r‖δ‖²/2`` for a loss that
        curves no more than ``½‖f‖²`` does, as all of the library do, ``ω`` the mean of the samples' largest weights.
        """
        if not self.coordinates:
            return 0.0
        lost = self.coordinates.rounding(atoms, self.activation)
        parts = [self.losses.at(rows).residual(f[rows]).sum((0, 1)) for rows in self.rows]
        left = self.sum(torch.stack(parts).sum(0) / self.n)[0].abs()
        largest = self.losses.largest
        weight = self.mean(largest) if isinstance(largest, Tensor) else largest
        return float(lost @ left + weight * self.head.r * lost.square().sum() / 2)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Everything that the optimum depends on but β, in named parts: see `convexhead.program.identity`.

        Tokens and targets are those that a user gave. A problem that is solved in other coordinates takes over the
        identity of the one that was stated. All processes ask for it together.
        """
        return identify(self) if self.stated is None else self.stated.identity

    # -- what its parts hold ------------------------------------------------------------------------------------------
    @property
    def Y(self) -> Float[Tensor, "n r c"]:
        """The targets in the operator's precision on its device."""
        return self.losses.Y

    @property
    def head(self) -> Head:
        """How tokens are mixed."""
        return self.operator.head

    @property
    def activation(self) -> Activation:
        """The activation of scores."""
        return self.operator.activation

    @property
    def ranks(self) -> Ranks:
        """The processes that share the samples."""
        return self.operator.ranks

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights, outputs and sums."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """The device that everything is computed on."""
        return self.operator.device

    @property
    def n(self) -> int:
        """The number of samples of all processes together."""
        return self.operator.n

    @property
    def n_blocks(self) -> int:
        """Blocks ``Z_j``."""
        return self.operator.n_blocks

    def outputs(self, atoms: Atoms) -> Float[Tensor, "n r c"]:
        """``f`` of every sample."""
        return self.operator.outputs(atoms)

    # -- sums over the samples ----------------------------------------------------------------------------------------
    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sum over all samples what was summed over this process's."""
        return self.ranks.sum(*parts)

    def mean(self, values: Float[Tensor, " n"]) -> float:
        """``(1/n) Σ_i`` over all samples, in float64."""
        return float(self.sum(values.sum(dtype=torch.float64))[0]) / self.n

    def mean_of(
        self,
        function: Callable[..., Float[Tensor, " b"]],
        *x: Float[Tensor, "n r c"],
        losses: SampleLosses | None = None,
    ) -> float:
        """``(1/n) Σ_i`` of what ``function`` makes of losses and all ``x``, some samples at a time to save memory.

        ``losses``: those of the problem where None.
        """
        losses = self.losses if losses is None else losses
        if len(self.rows) == 1:
            return self.mean(function(losses, *x))
        parts = [function(losses.at(rows), *(each[rows] for each in x)).double().sum() for rows in self.rows]
        return self.mean(torch.stack(parts))

    def total_of(self, function: Callable[..., Tensor], *x: Float[Tensor, "n r c"]) -> Tensor:
        """``Σ_i`` of what ``function`` makes of losses and all ``x``, some samples at a time to save memory."""
        parts = [function(self.losses.at(rows), *(each[rows] for each in x)) for rows in self.rows]
        return self.sum(torch.stack(parts).sum(0))[0]

    @cached_property
    def rows(self) -> list[slice]:
        """This process's samples in slices of which some arrays of outputs, in float64, stay in the caches."""
        step = max(1, BATCH_BYTES[self.device.type] // ARRAYS // 8 // (self.head.r * self.c))
        return [slice(i, i + step) for i in range(0, len(self.losses), step)]

    @property
    def target_sums(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """``Σ ω y`` and ``Σ ω`` over samples and rows, in float64: made once for a problem in all its precisions."""
        if not self._target_sums:
            losses, sums = self.exact_losses, []
            for rows in self.rows:
                part = losses.at(rows)
                sums.append(torch.stack([part.summed(part.Y), part.summed(torch.ones_like(part.Y))]))
            targets, ones = self.sum(torch.stack(sums).sum(0))[0]
            self._target_sums.append((targets, ones))
        return self._target_sums[0]

    @cached_property
    def largest_target(self) -> float:
        """``max |y|``."""
        parts = [torch.stack(self.losses.at(rows).Y.aminmax()).abs().max() for rows in self.rows]
        return self.ranks.largest(float(torch.stack(parts).max()))[0]

    # -- shapes -------------------------------------------------------------------------------------------------------
    @property
    def value_shape(self) -> tuple[int, int]:
        """``(e, c)`` of one value weight."""
        return self.head.value_rows, self.c

    def mask_values(self, V: Float[Tensor, "k e c"], block: Int[Tensor, " k"]) -> Float[Tensor, "k e c"]:
        """``V`` with zeros in the outputs that its block does not write."""
        return self.head.mask_values(V, block)

    def empty(self) -> Atoms:
        """The zero model. The linear head has its one atom from the start."""
        k = 0 if self.head.learns_mixing else 1
        return Atoms(
            torch.ones(k, *self.head.mixing_shape, device=self.device, dtype=self.dtype),
            torch.zeros(k, *self.value_shape, device=self.device, dtype=self.dtype),
            torch.zeros(k, dtype=torch.int64, device=self.device),
            torch.zeros(self.c, device=self.device, dtype=self.dtype),
        )

    # -- the objective ------------------------------------------------------------------------------------------------
    def data_term(self, f: Float[Tensor, "n r c"]) -> float:
        """``F = (1/n) Σ_i ω_i ℓ(f_i, y_i)``, summed in float64."""
        return self.mean_of(SampleLosses.value, f)

    def residual(self, f: Float[Tensor, "n r c"], out: Float[Tensor, "n r c"] | None = None) -> Float[Tensor, "n r c"]:
        """``R_i = ω_i ∇ℓ(f_i, y_i) / n``, some samples at a time to save memory; into ``out``, which ``f`` may be."""
        R = torch.empty_like(f) if out is None else out
        for rows in self.rows:
            torch.div(self.losses.at(rows).residual(f[rows]), self.n, out=R[rows])
        return R

    def dual_point(self, f: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
        """``∇ℓ(f_i, y_i)``, some samples at a time to save memory."""
        q = torch.empty_like(f)
        for rows in self.rows:
            q[rows] = self.losses.at(rows).dual_point(f[rows])
        return q

    def balance(self, atoms: Atoms) -> tuple[Atoms, list[Tensor]]:
        """The same function with balanced atoms and the least penalty known for it, and ``‖U_k‖‖V_k‖`` by block.

        Blocks of a convex program take an SVD (`balance`), atoms of a ReLU are only rescaled (`rescale`).
        """
        return balance(atoms, drop=0.0) if self.activation.convex else rescale(atoms)

    def penalty(self, atoms: Atoms) -> float:
        """``½ Σ_k (‖U_k‖² + ‖V_k‖²)``, or ``½‖V‖²`` where the mixing is not learned."""
        parts = [atoms.V, atoms.U] if self.head.learns_mixing else [atoms.V]
        return sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts) / 2

    def value_and_gradient(self, atoms: Atoms, beta: float) -> Evaluation:
        """Return the factored objective and its gradients, in one pass."""
        f, contraction = self.losses.empty(), self.operator.contraction(self.c)
        gU, gV, gb = torch.zeros_like(atoms.U), torch.zeros_like(atoms.V), torch.zeros_like(atoms.intercept)
        total = torch.zeros((), dtype=torch.float64, device=self.device)

        def evaluate(rows: slice, data: Data) -> tuple[Tensor, ...]:
            here, pull_back = contraction.with_pull_back(data, atoms.U, atoms.V, atoms.block)
            here = here + atoms.intercept
            f[rows] = here
            loss, R = self.losses.at(rows).value_and_residual(here)
            R = R / self.n
            return loss.double().sum(), *pull_back(R), R.sum((0, 1))

        self.operator.over_batches(len(atoms), evaluate, total, gU, gV, gb, c=self.c)
        total, gU, gV, gb = self.sum(total, gU, gV, gb)
        if self.head.learns_mixing:
            gU = gU + beta * atoms.U
        if not self.fit_intercept:
            gb = torch.zeros_like(gb)
        gV = self.mask_values(gV + beta * atoms.V, atoms.block)
        return Evaluation(float(total) / self.n + beta * self.penalty(atoms), Atoms(gU, gV, atoms.block, gb), f)
