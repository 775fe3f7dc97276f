"""The contract of a head: heads differ only in how they mix tokens.

Every head is ``f_i = P Σ_k mix(X_i, U_k) V_k`` (theory: Sahiner et al., ICML 2022), where ``mix`` is

    mix(X, U) = read( σ( pre(X, U) ) )

with a pre-activation ``pre`` and a read-out ``read`` that are both linear in their last argument, and ``σ`` an
elementwise activation. A head states ``pre``, ``read`` and their adjoints, and, because pooling commutes with
everything when ``σ`` is linear, a cheaper ``linear_mix`` with its adjoint. Nothing else in the library depends on
which head it is.

Symbols and shapes used throughout (``b`` samples of a batch, ``k`` atoms):

    X      tokens            (b, s, d)
    U      mixing weights    (k, *mixing_shape)
    V      value weights     (k, e, c),  e = `value_rows`
    A      pre-activations   (b, k, p, q): row p is a token that pooling reads, q a score of the head
    S      pooled scores     (b, k, r, q)
    M      mixed tokens      (b, r, k, e), already pooled: f = Σ_k M[:, :, k] V_k
    group  channel group of each atom (k,), all zero unless the head has several (block-FNO)
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from convexhead.errors import InputError, choose
from convexhead.program.heads.query_ball import QueryBall

Data = dict[str, Tensor]
"""Tensors of the samples that a head needs. The leading dimension of each is the sample."""

POOLS = ("mean", "cls", "none")


class GradientCost(NamedTuple):
    """What it takes to form a gradient matrix outright (see `Head.gradient`)."""

    products: float
    """Arithmetic, in products of one block with a vector."""
    workspace: int
    """Numbers of workspace for each sample."""


class Head(ABC):
    """How tokens are mixed.

    Parameters
    ----------
    n_tokens : int
        ``s``, tokens a sample.
    n_channels : int
        ``d``, channels a token.
    pool : {"mean", "cls", "none"}
        ``P``: the mean over tokens, token 0 alone, or every token (``r = s`` outputs a sample).
    grid : (int, int) or None
        ``(h, w)`` with ``h·w = s``, where tokens lie on a grid. None: square if ``s`` is a square, else ``(s, 1)``.
    """

    name: ClassVar[str]
    n_groups: int = 1
    """Number of channel groups with mixing weights of their own."""
    learns_mixing: ClassVar[bool] = True
    """False for the linear head: nothing to mix, one atom, and a squared Frobenius penalty on V alone."""
    reads_tokens: ClassVar[bool] = False
    """Whether `read` takes the tokens again; else ``pre`` is linear in them."""
    takes_masks: ClassVar[bool] = True
    """Whether there is a pre-activation, which masks of a ReLU can act on; else the activation is linear."""
    homogeneous: ClassVar[bool] = True
    """Whether tokens times a number give outputs times a power of it."""
    scope: str = "global"
    """What a certificate of the convex program is for, see `convexhead.certificate.certificate.SCOPES`."""
    reads_grid: ClassVar[bool] = False
    """Whether the head uses the grid of the tokens; else the grid is only kept for pictures."""
    any_length: bool = False
    """Whether samples may have different numbers of tokens: no weight belongs to a position."""
    absent: ClassVar[float] = 0.0
    """What stands in the place of a token that a sample does not have: see `convexhead.padding`."""
    least_batch: ClassVar[int] = 8
    """Least number of samples in a batch of a pass, so that the fixed cost of a batch is repaid. Chosen by hand."""
    feature_vector: str | None = None
    """Which prepared tokens are one vector ``φ`` a sample with outputs ``φᵀ Z``; None where there are none such."""
    value_rows: int
    mixing_shape: tuple[int, ...]
    queries: Float[Tensor, "J m"] | None = None
    """Fixed weights that the maps of the attentive head are made of; None of the others."""
    ball: QueryBall | None = None
    """What they were searched in; None where they are given."""

    def __init__(
        self, n_tokens: int, n_channels: int, *, pool: str = "mean", grid: tuple[int, int] | None = None
    ) -> None:
        self.s, self.d = n_tokens, n_channels
        self.pool = choose("pool", pool, POOLS)
        self.grid = resolve_grid(n_tokens, grid)
        self.rows = slice(0, 1) if pool == "cls" else slice(None)

    @property
    def p(self) -> int:
        """The number of tokens that pooling reads."""
        return 1 if self.pool == "cls" else self.s

    @property
    def r(self) -> int:
        """The number of outputs a sample."""
        return self.s if self.pool == "none" else 1

    def of_length(self, n_tokens: int) -> Head:
        """The same head over samples of another number of tokens; for heads of `any_length`."""
        other: Head = object.__new__(type(self))  # torch.compile does not follow copy.copy
        other.__dict__.update(self.__dict__)
        other.s, other.grid = n_tokens, (n_tokens, 1)
        return other

    def asking(self, queries: Float[Tensor, "J m"] | None) -> Head:
        """The same head with other queries of the same shape; they may be parameters that are trained."""
        return self

    @property
    def divisions(self) -> int:
        """How often outputs are divided by the number of tokens."""
        return int(self.pool == "mean")

    @property
    def mixing_size(self) -> int:
        """Entries of one mixing weight, the row count of ``Z``."""
        return math.prod(self.mixing_shape)

    @property
    def gate_shape(self) -> tuple[int, ...]:
        """Shape of one gate: `mixing_shape`, behind the number of channel groups where there are several."""
        return (self.n_groups, *self.mixing_shape) if self.n_groups > 1 else self.mixing_shape

    def mixing_span(self) -> Float[Tensor, "w p"] | None:
        """Orthonormal float64 rows whose span holds a best mixing weight for any residuals; None: the whole space."""
        return None

    def mix_bound(self, norms: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """``a`` with ``‖P mix(X, U)‖_F ≤ a ‖U‖_F``, given ``‖X‖_F``, for every activation that shrinks its argument.

        It holds of absolute values as well, and of what transforms round: rounding is bounded by it.
        """
        return norms / math.sqrt(self.s) if self.pool == "mean" else norms

    def present(self, X: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """The tokens with zeros in place of those that are `absent`."""
        return X

    def operations(self, largest: float) -> float:
        """Operations that a term passes through into a mixed token, in tokens with ``‖X‖_F`` of at most ``largest``."""
        return 8.0 * (self.s + self.d)

    def output_mask(self, n_outputs: int) -> Bool[Tensor, "g c"] | None:
        """Which outputs each channel group writes; None where all write all."""
        return None

    def channels_of(self, group: int) -> slice:
        """The channels of the tokens that a channel group reads."""
        return slice(0, self.d)

    def mask_values(self, V: Float[Tensor, "k e c"], block: Int[Tensor, " k"]) -> Float[Tensor, "k e c"]:
        """``V`` with zeros in the outputs that the channel group of its block does not write."""
        mask = self.output_mask(V.shape[-1])
        return V if mask is None else V * mask.to(V.device)[block % self.n_groups].unsqueeze(1)

    def value_size(self, n_outputs: int) -> int:
        """Free entries of one value weight, the column count of each ``Z_j``."""
        return self.value_rows * (n_outputs if self.output_mask(n_outputs) is None else n_outputs // self.n_groups)

    # -- with a linear activation: pooling first ------------------------------------------------------------------
    @abstractmethod
    def prepare_linear(self, X: Float[Tensor, "b s d"], *, reuse: bool) -> Data:
        """What `linear_mix` needs of the tokens; with ``reuse`` it will serve many passes."""

    @abstractmethod
    def linear_mix(self, data: Data, U: Float[Tensor, "k ..."], group: Int[Tensor, " k"]) -> Float[Tensor, "b r k e"]:
        """``M = P mix(X, U)`` for the identity activation."""

    @abstractmethod
    def linear_mix_adjoint(
        self, data: Data, T: Float[Tensor, "b r k e"], group: Int[Tensor, " k"]
    ) -> Float[Tensor, "k ..."]:
        """Adjoint of `linear_mix` in ``U``, summed over the batch."""

    def linear_workspace(self, k: int) -> int:
        """Numbers held per sample while ``k`` atoms are mixed."""
        return k * self.r * self.value_rows

    # -- with a linear activation and many outputs a sample: values first (`convexhead.program.contraction`) ----------
    # A head that can do this has ``P mix(X, U) = E(X) U K(X)`` with ``U (p, a)``, ``E (r, p)`` and ``K (a, e)``.
    def values_first(self, c: int) -> bool:
        """Whether passes for ``c`` outputs are cheaper if values meet the tokens before mixing weights do."""
        return False

    @property
    def terms(self) -> int:
        """Terms of an atom in a sum over atoms, at most."""
        return self.value_rows

    def keys_times(self, data: Data, V: Float[Tensor, "e m"]) -> Float[Tensor, "b a m"]:
        """``K_i V``."""
        raise NotImplementedError

    def keys_adjoint(self, data: Data, H: Float[Tensor, "b a m"]) -> Float[Tensor, "e m"]:
        """``Σ_i K_iᵀ H_i``."""
        raise NotImplementedError

    def read_rows(self, data: Data, W: Float[Tensor, "b p c"]) -> Float[Tensor, "b r c"]:
        """``E_i W_i``."""
        raise NotImplementedError

    def read_rows_adjoint(self, data: Data, R: Float[Tensor, "b r c"]) -> Float[Tensor, "b p c"]:
        """``E_iᵀ R_i``."""
        raise NotImplementedError

    # -- with any activation ----------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def score_width(self) -> int:
        """``q``, the columns of a pre-activation."""

    def prepare(self, X: Float[Tensor, "b s d"]) -> Data:
        """What `preactivation` and `read` need of the tokens."""
        return {"X": X}

    @abstractmethod
    def preactivation(
        self, data: Data, U: Float[Tensor, "k ..."], group: Int[Tensor, " k"]
    ) -> Float[Tensor, "b k p q"]:
        """``A = pre(X, U)`` at the tokens that pooling reads."""

    @abstractmethod
    def preactivation_adjoint(
        self, data: Data, A: Float[Tensor, "b k p q"], group: Int[Tensor, " k"]
    ) -> Float[Tensor, "k ..."]:
        """Adjoint of `preactivation` in ``U``, summed over the batch."""

    def read(self, data: Data, S: Float[Tensor, "b k r q"]) -> Float[Tensor, "b r k e"]:
        """From activated, pooled scores to mixed tokens; the identity unless the head says otherwise."""
        return S.transpose(1, 2)

    def read_adjoint(self, data: Data, T: Float[Tensor, "b r k e"]) -> Float[Tensor, "b k r q"]:
        """Adjoint of `read` in ``S``."""
        return T.transpose(1, 2)

    def workspace(self, k: int) -> int:
        """Numbers held per sample while the scores of ``k`` atoms are made."""
        return k * self.p * self.score_width

    # -- as a network: real products of tensors, the same for any batch, so that it can be exported --------------------
    def network_linear_mix(
        self, X: Float[Tensor, "b s d"], U: Float[Tensor, "k ..."], group: Int[Tensor, " k"]
    ) -> Float[Tensor, "b r k e"]:
        """`linear_mix`."""
        return self.linear_mix(self.prepare_linear(X, reuse=False), U, group)

    def network_preactivation(
        self, X: Float[Tensor, "b s d"], U: Float[Tensor, "k ..."], group: Int[Tensor, " k"]
    ) -> Float[Tensor, "b k p q"]:
        """`preactivation`."""
        return self.preactivation(self.prepare(X), U, group)

    # -- with fixed masks ---------------------------------------------------------------------------------------------
    kept_gates: ClassVar[float] = math.inf
    """Largest number of gates for which the results of `gate` or `gated_features` are kept for many passes."""

    @property
    def keeps_gated(self) -> bool:
        """Whether what `gate` makes of few gates is kept for many passes: its samples come first then."""
        return False

    def gated_features(self, data: Data, masks: Float[Tensor, "b g p q"]) -> Float[Tensor, "b j m"] | None:
        """``φ_j`` with ``P read(D_j ⊙ pre(X, U)) = ⟨φ_j, vec(U)⟩`` for every block ``j``, which many passes repay.

        None unless the head has such features (one pooled output, ``e = 1``). Passes with many atoms a block read
        them in place of the tokens.
        """
        return None

    def gate(self, data: Data, masks: Float[Tensor, "b j p q"]) -> Tensor:
        """What a pass needs of the masks of ``j`` gates and the tokens they act on, once for all atoms of a gate.

        The masks themselves, where a head does not know better.
        """
        return masks

    def gated_mix(
        self, data: Data, U: Float[Tensor, "k ..."], group: Int[Tensor, " k"], gated: Tensor, which: Int[Tensor, " k"]
    ) -> Float[Tensor, "b r k e"]:
        """``P read(D ⊙ pre(X, U))`` with the mask ``D = masks[:, which[k]]`` of each atom, ``gated = gate(masks)``."""
        A = self.preactivation(data, U, group) * gated[:, which]
        return self.read(data, self.pool_rows(A))

    def gated_mix_adjoint(
        self,
        data: Data,
        T: Float[Tensor, "b r k e"],
        group: Int[Tensor, " k"],
        gated: Tensor,
        which: Int[Tensor, " k"],
    ) -> Float[Tensor, "k ..."]:
        """Adjoint of `gated_mix` in ``U``, summed over the batch."""
        S = self.pool_rows_adjoint(self.read_adjoint(data, T))
        return self.preactivation_adjoint(data, S * gated[:, which], group)

    def gated_workspace(self, k: int, gates: int) -> int:
        """Numbers held per sample while ``k`` atoms of so many ``gates`` are mixed."""
        return self.workspace(k)

    def pool_rows(self, A: Float[Tensor, "b k p q"]) -> Float[Tensor, "b k r q"]:
        """``P`` applied to the token rows of activated scores."""
        return A.mean(2, keepdim=True) if self.pool == "mean" else A

    def pool_rows_adjoint(self, S: Float[Tensor, "b k r q"]) -> Float[Tensor, "b k p q"]:
        """Adjoint of `pool_rows`."""
        return (S / self.s).expand(-1, -1, self.s, -1) if self.pool == "mean" else S

    def pool_tokens(self, X: Float[Tensor, "b s d"]) -> Float[Tensor, "b r d"]:
        """``P X``; of a single token the tokens themselves, and no copy."""
        if self.s == 1:
            return X
        return X.mean(1, keepdim=True) if self.pool == "mean" else X[:, self.rows]

    # -- gradient matrices, all entries at once -----------------------------------------------------------------------
    def gradient_cost(self, c: int, *, gates: int) -> GradientCost | None:
        """The cost of `gradient`, with ``gates`` of `gated_gradient`, for ``c`` outputs; None where there is none."""
        return None

    def gradient(
        self, batches: Iterable[tuple[Data, Float[Tensor, "b r c"]]], group: Int[Tensor, " j"]
    ) -> Float[Tensor, "j p ec"]:
        """``𝒜_j*(R)`` of rising channel groups for the identity activation, from batches of samples and their ``R``."""
        raise NotImplementedError

    def gated_gradient(self, batches: Iterable[tuple[Data, Float[Tensor, "b r c"], Tensor]]) -> Float[Tensor, "j p ec"]:
        """``𝒜_j*(R)`` of every gate, from batches of samples, their ``R`` and ``gate(masks)``."""
        raise NotImplementedError


def atoms_by_gate(which: Int[Tensor, " k"]) -> list[Int[Tensor, " k_j"]]:
    """Positions of the atoms of each gate."""
    order = torch.argsort(which, stable=True)
    return list(order.split(torch.bincount(which).tolist()))


def mix_features(
    features: Float[Tensor, "b j m"], U: Float[Tensor, "k ..."], block: Int[Tensor, " k"]
) -> Float[Tensor, "b 1 k 1"]:
    """``⟨φ_j, vec(U_k)⟩`` with the features (see `Head.gated_features`) of each atom's block."""
    M = features.new_empty(len(features), len(U))
    for j, mine in enumerate(atoms_by_gate(block)):
        if len(mine):
            M[:, mine] = features[:, j] @ U[mine].flatten(1).T
    return M[:, None, :, None]


def mix_features_adjoint(
    features: Float[Tensor, "b j m"], T: Float[Tensor, "b 1 k 1"], block: Int[Tensor, " k"]
) -> Float[Tensor, "k m"]:
    """Adjoint of `mix_features` in ``U``, summed over the batch."""
    T = T[:, 0, :, 0].T
    U = T.new_empty(len(T), features.shape[2])
    for j, mine in enumerate(atoms_by_gate(block)):
        if len(mine):
            U[mine] = T[mine] @ features[:, j]
    return U


def resolve_grid(n_tokens: int, grid: object) -> tuple[int, int]:
    """``(h, w)`` with ``h·w = n_tokens``: the given grid, else a square, else ``(n_tokens, 1)``."""
    if grid is None:
        side = math.isqrt(n_tokens)
        return (side, side) if side * side == n_tokens else (n_tokens, 1)
    sides: tuple[Any, ...] = tuple(grid) if isinstance(grid, Iterable) and not isinstance(grid, str) else ()
    whole = all(isinstance(side, numbers.Integral) and not isinstance(side, bool) and int(side) > 0 for side in sides)
    if len(sides) != 2 or not whole or sides[0] * sides[1] != n_tokens:
        raise InputError(
            f"grid {grid!r} does not hold {n_tokens} tokens: give whole numbers (h, w) with h*w = {n_tokens}"
        )
    return int(sides[0]), int(sides[1])
