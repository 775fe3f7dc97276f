"""Every head as an ordinary ``torch.nn.Module``: the export of a convex solution, or what Adam trains.

    f_i = P Σ_k mix(X_i, U_k) V_k + b        tokens (b, s, d) -> (b, c), or (b, s, c) with pool "none"

    U  `mixing`     (k, *mixing_shape)   a parameter; fixed at 1 for the linear head, whose V is the probe W
    V  `values`     (k, e, c)            a parameter
    b  `intercept`  (c,)                 a parameter where an intercept is used, else None
    g  `gates`      (J, *gate_shape)     a buffer of the gated ReLU, float64 whatever the module's precision
    q  `queries`    (J, d [+ s])         a buffer of the attentive head, float64 as the gates; see `train_queries`
       `block`      (k,)                 a buffer: the block of each atom, gate · n_groups + channel group

The mathematics is the library's own (`heads`, `activation`) and autograd works through it: a convex solution
can be fine-tuned, and the same module trained from `reset_parameters` is the usual, non-convex way to a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from convexhead.errors import InputError, choose
from convexhead.program.activations import ACTIVATIONS, make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.heads import Head

EXACT = ("gates", "queries", "reduction")
"""Buffers that keep their precision."""


@runtime_checkable
class Affine(Protocol):
    """The constants of ``((x − mean) · scale) @ basis``, then a channel of ones if `constant`."""

    @property
    def mean(self) -> Any: ...
    @property
    def scale(self) -> Any: ...
    @property
    def basis(self) -> Any: ...
    @property
    def constant(self) -> bool: ...


class ChannelReduction(nn.Module):
    """A fixed affine map of the channels, ``(b, s, d_raw) -> (b, s, d)``, in float32 as in token stores."""

    mean: Tensor
    scale: Tensor
    basis: Tensor | None

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.constant = bool(affine.constant)
        for name in ("mean", "scale", "basis"):
            array = getattr(affine, name)
            self.register_buffer(name, None if array is None else torch.as_tensor(array).float().clone())

    def forward(self, tokens: Float[Tensor, "b s raw"]) -> Float[Tensor, "b s d"]:
        if tokens.shape[-1] != len(self.mean):
            raise InputError(f"tokens have {tokens.shape[-1]} channels, the reduction takes {len(self.mean)}")
        X = (tokens.float() - self.mean) * self.scale
        if self.basis is not None:
            X = X @ self.basis
        return nn.functional.pad(X, (0, 1), value=1.0) if self.constant else X


class HeadModule(nn.Module):
    """One head as an ordinary network.

    Parameters
    ----------
    head : Head
        How tokens are mixed, with its pooling and grid.
    activation : {"linear", "gated-relu", "relu"}
    gates : Tensor (J, \\*head.gate_shape) or None
        Fixed gates of the gated ReLU.
    block : Tensor (k,) or int
        The block of each atom, or the number of atoms, to be spread evenly over the blocks.
    n_outputs : int
        ``c``.
    intercept : bool
        Whether ``b`` is added to the outputs.
    reduction : object with mean, scale, basis, constant; or None
        Applied to raw tokens first.
    any_length : bool
        Whether samples may have any number of tokens.
    seed : int or None
        Of `reset_parameters`; None leaves all weights zero, to be filled in.

    Attributes
    ----------
    classes, class_names : list or None
        The label of each output, and its name, of a module that a trained `Model` was exported as.
    origin : TokenOrigin or None
        How the tokens of that model's training were made.
    fitted_behind : Reduction or None
        What those tokens were read through: the module takes such tokens, or with `reduction` raw ones.
    """

    classes: list[Any] | None = None
    class_names: list[str] | None = None
    origin: Any = None
    fitted_behind: Any = None
    block: Tensor
    gates: Tensor | None
    queries: Tensor | None
    mixing: Tensor
    output_mask: Tensor | None

    def __init__(
        self,
        head: Head,
        activation: str,
        gates: Float[Tensor, "J ..."] | None,
        block: Int[Tensor, " k"] | int,
        n_outputs: int,
        *,
        intercept: bool = False,
        reduction: Affine | None = None,
        any_length: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self._head, self.any_length = head, any_length
        self.activation_name = choose("activation", activation, ACTIVATIONS)
        if (gates is None) != (activation != "gated-relu"):
            raise InputError("gates go with activation='gated-relu', and only with it")
        gates = None if gates is None else gates.detach().double().clone()
        n_blocks = make_activation(activation, head, gates).n_blocks
        if isinstance(block, int):
            block = torch.arange(block if head.learns_mixing else 1) % n_blocks
        if len(block) and not 0 <= int(block.min()) <= int(block.max()) < n_blocks:
            raise InputError(f"blocks must lie in 0 .. {n_blocks - 1}")
        self.register_buffer("block", block.detach().clone())
        mixing = torch.ones(len(block), *head.mixing_shape, dtype=dtype)
        if head.learns_mixing:
            self.mixing = nn.Parameter(torch.zeros_like(mixing))
        else:
            self.register_buffer("mixing", mixing)
        self.values = nn.Parameter(torch.zeros(len(block), head.value_rows, n_outputs, dtype=dtype))
        self.intercept = nn.Parameter(torch.zeros(n_outputs, dtype=dtype)) if intercept else None
        queries = None if head.queries is None else head.queries.clone()
        optional = {"queries": queries, "gates": gates, "output_mask": head.output_mask(n_outputs)}
        for name in sorted(optional, key=lambda name: optional[name] is None):  # torch.export miscounts those behind
            self.register_buffer(name, optional[name], persistent=name != "output_mask")
        self.reduction = None if reduction is None else ChannelReduction(reduction)
        if seed is not None:
            self.reset_parameters(seed)

    # -- to and from the factored form of a solution --------------------------------------------------------
    @classmethod
    def from_atoms(
        cls,
        head: Head,
        activation: str,
        gates: Float[Tensor, "J ..."] | None,
        atoms: Atoms,
        *,
        intercept: bool | None = None,
        reduction: Affine | None = None,
        any_length: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> HeadModule:
        """The network of a solution.

        Parameters
        ----------
        intercept : bool or None
            Whether ``b`` is a parameter of the network, be it zero or not. Atoms cannot tell: theirs is zero where none
            is fitted. None keeps one where it is not zero; say it where the network will be trained or audited.

        Raises
        ------
        InputError
            ``intercept=False`` for atoms with an intercept.
        """
        if intercept is False and bool(atoms.intercept.any()):
            raise InputError("these atoms have an intercept: pass intercept=True")
        module = cls(
            head,
            activation,
            gates,
            atoms.block,
            atoms.V.shape[-1],
            intercept=bool(atoms.intercept.any()) if intercept is None else intercept,
            reduction=reduction,
            any_length=any_length,
            dtype=dtype,
            seed=None,
        ).to(atoms.V.device)
        with torch.no_grad():
            if head.learns_mixing:
                module.mixing.copy_(atoms.U)
            module.values.copy_(atoms.V)
            if module.intercept is not None:
                module.intercept.copy_(atoms.intercept)
        return module

    def to_atoms(self) -> Atoms:
        """The weights in factored form, detached copies in the module's precision."""
        self._check_shapes()
        V = self.masked_values().detach().clone()
        b = V.new_zeros(V.shape[-1]) if self.intercept is None else self.intercept.detach().clone()
        return Atoms(self.mixing.detach().clone(), V, self.block.clone(), b)

    @property
    def head(self) -> Head:
        """How tokens are mixed, by the queries that the module has now."""
        return self._head.asking(self.queries)

    # -- the network ----------------------------------------------------------------------------------------
    def forward(self, tokens: Float[Tensor, "b s d"], mask: Bool[Tensor, "b s"] | None = None) -> Tensor:
        """Outputs ``(b, c)``, or ``(b, s, c)`` with pool "none"; ``(b, d)`` is one token a sample.

        ``mask`` says which tokens there are, for a head of `any_length`.
        """
        X = tokens.unsqueeze(1) if tokens.ndim == 2 and self.head.s == 1 else tokens
        if self.reduction is not None and X.ndim == 3:
            X = self.reduction(X)
        if self.any_length and X.ndim == 3 and X.shape[2] == self.head.d:
            return self._of_any_length(X, mask)
        if mask is not None:
            raise InputError("mask goes with a head that was fitted on samples of different numbers of tokens")
        if X.ndim != 3 or X.shape[1:] != (self.head.s, self.head.d):
            raise InputError(
                f"tokens have shape {tuple(tokens.shape)}, but this head takes "
                f"(b, {self.head.s}, {self._raw_channels()})"
            )
        f = self._outputs(X, self.head)
        return f if self.head.pool == "none" else f.squeeze(1)

    def _of_any_length(self, X: Float[Tensor, "b s d"], mask: Bool[Tensor, "b s"] | None) -> Tensor:
        head = self.head.of_length(X.shape[1])
        if mask is not None:  # see `convexhead.padding`
            alpha = (head.s / mask.sum(1).double()) ** (head.divisions / (3 if head.reads_tokens else 1))
            X = (X * alpha.to(X.dtype)[:, None, None]).masked_fill(~mask.unsqueeze(2), head.absent)
        f = self._outputs(X, head)
        return f if head.pool == "none" else f.squeeze(1)

    def _outputs(self, X: Float[Tensor, "b s d"], head: Head) -> Float[Tensor, "b r c"]:
        """``f`` of tokens that the head takes."""
        if len(self.block):
            f = self._mixed(X, head).flatten(2) @ self.masked_values().flatten(0, 1)
        else:
            f = self.values.new_zeros(X.shape[0], head.r, self.values.shape[-1])
        if self.intercept is not None:
            self._check_intercept()
            f = f + self.intercept
        return f

    def _mixed(self, X: Float[Tensor, "b s d"], head: Head) -> Float[Tensor, "b r k e"]:
        """``P mix(X, U)``; the mask of a gate is that of the tokens in float64, whatever the module's precision."""
        tokens, group = X.to(self.values.dtype), self.block % head.n_groups
        if self.activation_name == "linear":
            return head.network_linear_mix(tokens, self.mixing, group)
        A = head.network_preactivation(tokens, self.mixing, group)
        if self.gates is None:
            A = A.relu()
        else:
            gates = self.gates.reshape(-1, *head.mixing_shape)[self.block]
            A = A * (head.network_preactivation(X.detach().double(), gates, group) >= 0)
        return head.read({"X": tokens}, head.pool_rows(A))

    def masked_values(self) -> Float[Tensor, "k e c"]:
        """``V`` with zeros in the outputs that its channel group does not write (grouped block-FNO)."""
        if self.output_mask is None:
            return self.values
        return self.values * self.output_mask[self.block % self.head.n_groups].unsqueeze(1)

    def penalty(self) -> Tensor:
        """``½ Σ_k (‖U_k‖² + ‖V_k‖²)``, for the linear head ``½‖V‖²``: the objective adds it β times."""
        total = self.masked_values().square().sum()
        if self.head.learns_mixing:
            total = total + self.mixing.square().sum()
        return total / 2

    @torch.no_grad()
    def reset_parameters(self, seed: int, tokens: Float[Tensor, "b s d"] | None = None) -> None:
        """A start for training: normal weights with ``E‖U_k‖² = E‖V_k‖²`` and outputs of order 1.

        Both factors are drawn standard normal, divided by the root of their number of entries, and multiplied
        by one common number that makes the root mean square output 1 on ``tokens``; without tokens, on eight
        normal samples of unit variance, half of which all tokens of a sample share (as real tokens do). The
        intercept starts at 0. The linear head is convex and starts at 0.
        """
        if self.intercept is not None:
            self.intercept.zero_()
        if not self.head.learns_mixing or not len(self.block):
            self.values.zero_()
            return
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.mixing, self.values):
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(draw / draw[0].numel() ** 0.5)
        self.values.copy_(self.masked_values())
        if tokens is None:
            shape, raw = (8, self.head.s, self._raw_channels()), 0.5**0.5
            common = torch.randn(shape[0], 1, shape[2], generator=generator)
            tokens = raw * (common + torch.randn(shape, generator=generator)).to(self.values.device)
            if self.reduction is not None:
                tokens = self.reduction.mean + tokens / self.reduction.scale
        size = float(self(tokens).double().square().mean().sqrt())
        if size > 0:  # outputs are of degree 2 in the weights
            self.mixing.mul_(size**-0.5)
            self.values.mul_(size**-0.5)

    def train_queries(self) -> None:
        """Make the queries of an attentive head parameters.

        Raises
        ------
        InputError
            The head has none.
        """
        queries = self.queries
        if queries is None:
            raise InputError(f"only an attentive head has queries to train, and this is {self.head.name!r}")
        del self.queries
        self.queries = nn.Parameter(queries)

    # -- inside ---------------------------------------------------------------------------------------------
    def _check_shapes(self) -> None:
        """Refuse parameters that were replaced by others of another shape: nothing broadcasts."""
        k, c = len(self.block), self.values.shape[-1]
        for name, wanted in (("mixing", (k, *self.head.mixing_shape)), ("values", (k, self.head.value_rows, c))):
            if tuple(getattr(self, name).shape) != wanted:
                raise InputError(f"{name} has shape {tuple(getattr(self, name).shape)}, this head needs {wanted}")
        self._check_intercept()

    def _check_intercept(self) -> None:
        b, c = self.intercept, self.values.shape[-1]
        if b is not None and b.shape != (c,):
            raise InputError(f"the intercept has shape {tuple(b.shape)}, {c} outputs need {(c,)}")

    def _raw_channels(self) -> int:
        return self.head.d if self.reduction is None else len(self.reduction.mean)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadModule:
        """Casting leaves gates, queries and reduction alone: a map must not depend on the precision of a pass."""
        exact = {name: buffer for name, buffer in self.named_buffers() if name.split(".")[0] in EXACT}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            owner = self.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], buffer.to(self.values.device))
        return self

    def extra_repr(self) -> str:
        k, _, c = self.values.shape
        return f"{self.head.name}, {self.activation_name}, pool={self.head.pool}, heads={k}, outputs={c}"
