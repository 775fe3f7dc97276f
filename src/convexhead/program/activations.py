"""An activation turns a head's pre-activation into mixed tokens.

``LinearActivation``  σ(A) = A: pooling moves inside and each head takes its cheap path.
``GatedReLU``         σ(A) = D_j ⊙ A with masks ``D_j = 1[pre(X, g_j) ≥ 0]`` decided by fixed gates ``g_j``.
``ReLU``              σ(A) = max(A, 0): each atom's own pre-activation decides its mask.

The first two are linear in the mixing weights, so the training problem is a convex program with one nuclear norm for
each *block*: gate-major, then channel group, ``block = gate · n_groups + group``. Atoms carry the block they belong to.
A ReLU atom's block is its channel group; what is known about its optimum is in `convexhead.dual_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from convexhead.errors import InputError
from convexhead.program.heads.base import Data, GradientCost, Head, mix_features, mix_features_adjoint
from convexhead.runtime.stored_tokens import AllTokens, Tokens

FEATURE_ATOMS = 6
"""Least number of atoms in a block at which gated features are read instead of tokens. Chosen by hand."""
ACTIVATIONS = ("linear", "gated-relu", "relu")
PullBack = Callable[[Tensor], Tensor]
"""``T (b, r, k, e) -> (k, *mixing_shape)``: the adjoint of the derivative of a mix in ``U``, summed over the batch."""


@runtime_checkable
class Activation(Protocol):
    """Mixes tokens for atoms of given blocks, and pulls gradients back to their mixing weights."""

    name: ClassVar[str]
    head: Head
    n_blocks: int
    convex: ClassVar[bool]
    """Whether mixing is linear in ``U``; only then is there a program over ``Z_j = Σ_k vec(U_k) vec(V_k)ᵀ``."""

    def prepare(self, X: Float[Tensor, "b s d"], *, reuse: bool, masks: UInt8[Tensor, "b j m"] | None = None) -> Data:
        """Return the tensors of the samples that `mix` and `mix_adjoint` need.

        With ``reuse`` they serve many passes, and work that only then pays is done (Gram matrices; gated tokens, if
        the samples' packed ``masks`` are given).
        """

    def pack_masks(self, X: Float[Tensor, "b s d"]) -> UInt8[Tensor, "b j m"] | None:
        """Bit-packed masks of every block, which the data passed to `mix` hold as ``"masks"``; None without gates."""

    def mix(self, data: Data, U: Float[Tensor, "k ..."], block: Int[Tensor, " k"]) -> Float[Tensor, "b r k e"]:
        """Mixed, pooled tokens ``P mix(X, U)`` of every atom."""

    def mix_adjoint(
        self, data: Data, T: Float[Tensor, "b r k e"], block: Int[Tensor, " k"], at: Float[Tensor, "k ..."] | None
    ) -> Float[Tensor, "k ..."]:
        """Adjoint of the derivative of `mix` ``at`` given weights, summed over the batch; where mixing is linear they
        do not matter."""

    def mix_with_pull_back(
        self, data: Data, U: Float[Tensor, "k ..."], block: Int[Tensor, " k"]
    ) -> tuple[Float[Tensor, "b r k e"], PullBack]:
        """`mix` at ``U`` and `mix_adjoint` there, which share work."""

    def values_first(self, c: int) -> bool:
        """Whether passes for ``c`` outputs begin with the values: see `convexhead.program.contraction`."""

    def gradient_cost(self, c: int) -> GradientCost | None:
        """Return what `gradient` costs for ``c`` outputs; None where it has no formula."""

    def gradient(
        self, batches: Iterable[tuple[Data, Float[Tensor, "b r c"]]], block: Int[Tensor, " j"]
    ) -> Float[Tensor, "j p ec"]:
        """``𝒜_j*(R)`` of rising blocks, from batches of samples and their ``R``."""

    def workspace(self, k: int) -> int:
        """Count the numbers held for each sample while ``k`` atoms are mixed; it sets the batch size of a pass."""


class LinearActivation:
    """``σ(A) = A``."""

    name: ClassVar[str] = "linear"
    convex: ClassVar[bool] = True

    def __init__(self, head: Head) -> None:
        self.head = head
        self.n_blocks = head.n_groups

    def prepare(self, X: Tensor, *, reuse: bool, masks: Tensor | None = None) -> Data:
        return self.head.prepare_linear(X, reuse=reuse)

    def pack_masks(self, X: Tensor) -> None:
        return None

    def mix(self, data: Data, U: Tensor, block: Tensor) -> Tensor:
        return self.head.linear_mix(data, U, block)

    def mix_adjoint(self, data: Data, T: Tensor, block: Tensor, at: Tensor | None = None) -> Tensor:
        return self.head.linear_mix_adjoint(data, T, block)

    def mix_with_pull_back(self, data: Data, U: Tensor, block: Tensor) -> tuple[Tensor, PullBack]:
        return self.mix(data, U, block), lambda T: self.mix_adjoint(data, T, block)

    def values_first(self, c: int) -> bool:
        return self.head.values_first(c)

    def gradient_cost(self, c: int) -> GradientCost | None:
        return self.head.gradient_cost(c, gates=0)

    def gradient(self, batches: Iterable[tuple[Data, Tensor]], block: Tensor) -> Tensor:
        return self.head.gradient(batches, block)

    def workspace(self, k: int) -> int:
        return self.head.linear_workspace(k)


class GatedReLU:
    """``σ(A) = D_j ⊙ A``, ``D_j = 1[pre(X, g_j) ≥ 0]``; masks are kept at one bit an entry.

    Parameters
    ----------
    head : Head
    gates : Tensor (J, *head.gate_shape)
        The gate vectors ``g_j``; explicit, or from `sample_gates`.
    """

    name: ClassVar[str] = "gated-relu"
    convex: ClassVar[bool] = True

    def __init__(self, head: Head, gates: Float[Tensor, "J ..."]) -> None:
        _check_masks(head)
        if gates.ndim == 0 or tuple(gates.shape[1:]) != head.gate_shape or not len(gates):
            raise InputError(
                f"gates have shape {tuple(gates.shape)}, but this head needs (J, "
                f"{', '.join(map(str, head.gate_shape))}) with J >= 1"
            )
        if not torch.isfinite(gates).all():
            raise InputError("gates contain NaN or infinity")
        self.head = head
        self.gates = gates
        self.n_blocks = len(gates) * head.n_groups

    def prepare(self, X: Tensor, *, reuse: bool, masks: Tensor | None = None) -> Data:
        data = self.head.prepare(X)
        if not reuse or masks is None or len(self.gates) > self.head.kept_gates:
            return data
        unpacked = self._unpack(masks, X.dtype)
        if (features := self.head.gated_features(data, unpacked)) is not None:
            data["features"] = features
        if self.head.keeps_gated:
            data["gated"] = self.head.gate(data, unpacked)
        return data

    def pack_masks(self, X: Tensor) -> Tensor:
        # In float64 always: a mask must not depend on the precision of the pass that uses it.
        exact = self.head.prepare(X.double())
        gates = self.gates.to(X.device, torch.float64).reshape(self.n_blocks, *self.head.mixing_shape)
        group = torch.arange(self.n_blocks, device=X.device) % self.head.n_groups
        few = 8  # gates at a time, so that unpacked masks stay small
        return torch.cat(
            [
                pack_bits(self.head.preactivation(exact, gates[i : i + few], group[i : i + few]).flatten(2) >= 0)
                for i in range(0, self.n_blocks, few)
            ],
            dim=1,
        )

    def _unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Masks ``(b, j, p, q)`` of zeros and ones."""
        shape = self.head.p, self.head.score_width
        return unpack_bits(packed, shape[0] * shape[1], dtype).unflatten(-1, shape)

    def _gated(self, data: Data, block: Tensor) -> tuple[Tensor, Tensor]:
        """`Head.gate` of the blocks that occur, and which of them each atom has."""
        used, which = torch.unique(block, return_inverse=True)
        if "gated" in data:
            return data["gated"] if len(used) == self.n_blocks else data["gated"][:, used], which
        dtype = next(tensor for key, tensor in data.items() if key != "masks").real.dtype
        packed = data["masks"] if len(used) == self.n_blocks else data["masks"][:, used]
        return self.head.gate(data, self._unpack(packed, dtype)), which

    def mix(self, data: Data, U: Tensor, block: Tensor) -> Tensor:
        if _takes_features(data, block):
            return mix_features(data["features"], U, block)
        return self.head.gated_mix(data, U, block % self.head.n_groups, *self._gated(data, block))

    def mix_adjoint(self, data: Data, T: Tensor, block: Tensor, at: Tensor | None = None) -> Tensor:
        if _takes_features(data, block):
            return mix_features_adjoint(data["features"], T, block).view(-1, *self.head.mixing_shape)
        return self.head.gated_mix_adjoint(data, T, block % self.head.n_groups, *self._gated(data, block))

    def mix_with_pull_back(self, data: Data, U: Tensor, block: Tensor) -> tuple[Tensor, PullBack]:
        if _takes_features(data, block):
            return self.mix(data, U, block), lambda T: self.mix_adjoint(data, T, block)
        group, gated = block % self.head.n_groups, self._gated(data, block)  # made once for both
        return (
            self.head.gated_mix(data, U, group, *gated),
            lambda T: self.head.gated_mix_adjoint(data, T, group, *gated),
        )

    def values_first(self, c: int) -> bool:
        return False  # masks act between the two weights

    def gradient_cost(self, c: int) -> GradientCost | None:
        return self.head.gradient_cost(c, gates=self.n_blocks // self.head.n_groups)

    def gradient(self, batches: Iterable[tuple[Data, Tensor]], block: Tensor) -> Tensor:
        return self.head.gated_gradient((data, R, self._gated(data, block)[0]) for data, R in batches)

    def workspace(self, k: int) -> int:
        return self.head.gated_workspace(k, min(k, self.n_blocks))


def _takes_features(data: Data, block: Tensor) -> bool:
    """Whether there are features, and enough atoms a block to repay reading them."""
    return "features" in data and len(block) >= FEATURE_ATOMS * len(torch.unique(block))


class ReLU:
    """``σ(A) = max(A, 0)``: positively homogeneous in ``U`` and linear on the cone of each activation pattern.

    The derivative at a zero entry is taken to be 0.
    """

    name: ClassVar[str] = "relu"
    convex: ClassVar[bool] = False

    def __init__(self, head: Head) -> None:
        _check_masks(head)
        self.head = head
        self.n_blocks = head.n_groups

    def prepare(self, X: Tensor, *, reuse: bool, masks: Tensor | None = None) -> Data:
        return self.head.prepare(X)

    def pack_masks(self, X: Tensor) -> None:
        return None

    def mix(self, data: Data, U: Tensor, block: Tensor) -> Tensor:
        return self._read(data, self.head.preactivation(data, U, block).relu_())

    def mix_adjoint(self, data: Data, T: Tensor, block: Tensor, at: Tensor | None) -> Tensor:
        assert at is not None, "a ReLU has a derivative at given weights only"
        return self.mix_with_pull_back(data, at, block)[1](T)

    def mix_with_pull_back(self, data: Data, U: Tensor, block: Tensor) -> tuple[Tensor, PullBack]:
        head, active = self.head, self.head.preactivation(data, U, block).relu_()

        def pull_back(T: Tensor) -> Tensor:
            S = head.pool_rows_adjoint(head.read_adjoint(data, T))
            masked = torch.ops.aten.threshold_backward(S, active, 0)  # S ⊙ (active > 0), in one go
            return head.preactivation_adjoint(data, masked, block)

        return self._read(data, active), pull_back

    def values_first(self, c: int) -> bool:
        return False

    def gradient_cost(self, c: int) -> None:
        return None

    def gradient(self, batches: Iterable[tuple[Data, Tensor]], block: Tensor) -> Tensor:
        raise NotImplementedError("a ReLU has no gradient matrices")

    def _read(self, data: Data, active: Tensor) -> Tensor:
        return self.head.read(data, self.head.pool_rows(active))

    def workspace(self, k: int) -> int:
        return self.head.workspace(k)


def _check_masks(head: Head) -> None:
    if not head.takes_masks:
        raise InputError(f"the {head.name} head takes activation='linear' only; use head='mlp' for one with a ReLU")


def make_activation(name: str, head: Head, gates: Tensor | None) -> Activation:
    """The activation called ``name`` over ``head``; ``gates`` are needed by the gated ReLU alone."""
    if name == "linear":
        return LinearActivation(head)
    if name == "relu":
        return ReLU(head)
    assert gates is not None, "the gated ReLU needs gates"
    return GatedReLU(head, gates)


def sample_gates(
    head: Head, n_gates: int, generator: torch.Generator, X: Tokens | AllTokens | None = None
) -> Float[Tensor, "J ..."]:
    """``n_gates`` random gates, float64 ``(J, *head.gate_shape)``: continuous, so ties have probability 0.

    Parameters
    ----------
    head : Head
    n_gates : int
        ``J``.
    generator : torch.Generator
        Decides everything: equal states give equal gates.
    X : Tensor (n, s, d), StoredTokens, AllTokens or None
        None: standard normal gates. Tokens: gates ``K_Sᵀ z`` with ``z`` standard normal and ``K_S`` the pre-activations
        of eight random samples as linear functions of the gate: normal gates in the metric of the data, whose
        patterns cut through where the tokens are.
    """
    if X is None:
        return torch.randn(n_gates, *head.gate_shape, generator=generator, dtype=torch.float64)
    gates = []
    for _ in range(n_gates):
        chosen = X[torch.randint(len(X), (min(8, len(X)),), generator=generator)].double()
        z = torch.randn(len(chosen), head.n_groups, head.p, head.score_width, generator=generator, dtype=torch.float64)
        group = torch.arange(head.n_groups, device=chosen.device)
        gates.append(head.preactivation_adjoint(head.prepare(chosen), z.to(chosen.device), group).cpu())
    return torch.stack(gates).view(n_gates, *head.gate_shape) if gates else torch.zeros(0, *head.gate_shape).double()


def pack_bits(mask: Bool[Tensor, "... m"]) -> Tensor:
    """Eight booleans a byte along the last dimension: ``(..., m) -> (..., ceil(m / 8))`` uint8."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, m: int, dtype: torch.dtype) -> Float[Tensor, "... m"]:
    """Inverse of `pack_bits` as zeros and ones of ``dtype``."""
    if packed.is_cuda:
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :m].to(dtype)
    # A table of all bytes is faster on a CPU, and slower on a GPU.
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return torch.nn.functional.embedding(packed.int(), bits.to(dtype)).flatten(-2)[..., :m]
