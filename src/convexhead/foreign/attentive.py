"""Attentive probes that others trained, as the convex program of their queries.

    f = Σ_j φ_j(X)ᵀ V_j W_j + b,      φ_j(X) = Xᵀ softmax(X q_j)

| probe | weights | |
|---|---|---|
| our `AttentiveProbe` | ``queries (M, d)``, ``values (M, d, m)``, a linear layer | ``q_j`` over ``√d`` |
| efficient probing | ``cls_token (1, M, d)``, ``v``, a linear layer | ``v`` split over the queries |
| as of AIM | ``cls_token``, ``k``, ``v``, a linear layer | ``num_heads`` heads, mean over the queries |
| as of V-JEPA | ``query_tokens (1, 1, d)``, ``q``, ``kv`` or ``k``, ``v``, ``proj``, a linear layer | |
| ``torch.nn.MultiheadAttention`` | a query, ``in_proj_weight``, ``out_proj``, a linear layer | |

Keys are linear in the tokens, so head ``h`` of query ``j`` scores them by ``X q``, ``q = K_hᵀ q_jh`` over the root of
its width; biases of keys move all scores of a sample alike and change nothing. Values are linear too: ``V = V_hᵀ``, and
``W`` is what projection and classifier make of them. Biases of values end in ``b``, since the weights sum to 1.

Of a module the reduction is compared with what the module itself computes. Norms inside, several layers, and anything
else that does not reduce is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.errors import InputError

T = TypeVar("T")
QUERIES = ("queries", "cls_token", "query_tokens", "query_token", "query", "latent")
"""Names of learned queries."""
PARTS = {"q": "q", "k": "k", "v": "v", "kv": "kv", "q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "proj",
         "out_proj": "proj"}  # fmt: skip
"""Linear layers of attention, by what they are."""
PACKED = ("in_proj_weight", "in_proj_bias")
"""Those of queries, keys and values in one, as `torch.nn.MultiheadAttention` has them."""
HEADS = "num_heads"
AGREES = 1e-3
"""Largest difference of a module's outputs from those of its reduction, relative to the largest. Chosen by hand:
modules compute in float32 or less."""
TRIED = 16
"""Samples on which they are compared. Chosen by hand."""
NORMS = ("norm", "bn", "ln", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class AttentiveProbe:
    """A probe in the form of the program, in float64.

    Attributes
    ----------
    name : str
        What it is, for messages.
    queries : Tensor (J, d)
    V, W : Tensor (J, d, m), (J, m, c)
    intercept : Tensor (c,) or None
        None where none was trained.
    """

    name: str
    queries: Float[Tensor, "J d"]
    V: Float[Tensor, "J d m"]
    W: Float[Tensor, "J m c"]
    intercept: Float[Tensor, " c"] | None

    def __call__(self, X: Float[Tensor, "n s d"]) -> Float[Tensor, "n c"]:
        """The outputs."""
        read = torch.softmax(X @ self.queries.T, 1).mT @ X
        f = torch.einsum("njd,jdm,jmc->nc", read, self.V, self.W)
        return f if self.intercept is None else f + self.intercept

    def told(self, loss: str, beta: float) -> str:
        """The program in words."""
        return (
            f"mean {loss} loss of {self.name} + β Σ_j ‖Z_j‖_* over the values of its {len(self.queries)} queries at "
            f"β = {beta:.6g}, the queries as they are"
        )


@dataclass
class _Layers:
    """The tensors of a probe by their roles."""

    name: str
    queries: Tensor
    heads: int | None
    weight: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    values: Tensor | None = None


def has_queries(tensors: Mapping[str, Any]) -> bool:
    """Whether a state dict has learned queries."""
    return any(_last(key) in QUERIES for key in tensors)


def read_attentive_module(module: torch.nn.Module, tokens: Float[Tensor, "n s d"]) -> AttentiveProbe:
    """The probe in a module, if it computes what its weights say.

    Parameters
    ----------
    tokens : Tensor (n, s, d)
        Some samples to try it on.

    Raises
    ------
    InputError
        It holds something that does not reduce, or it computes something else.
    """
    name = f"this {type(module).__name__}"
    heads, scales = _settings(module, HEADS, int), _settings(module, "scale", float)
    for found, words in ((heads, "numbers of heads"), (scales, "scales of scores")):
        if len(found) > 1:
            raise InputError(f"{name} has attention with different {words}: only one layer reduces")
    state = {key: value.detach() for key, value in module.state_dict().items()}
    probe = read_attentive_state(state, name, heads=heads.pop() if heads else 1, scale=scales.pop() if scales else None)
    parameter = next(module.parameters())
    X = tokens[:TRIED]
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            f = module(X.to(parameter.device, parameter.dtype))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{name} cannot compute outputs of tokens {tuple(X.shape)} ({error})") from error
    finally:
        module.train(training)
    ours = probe(X.double().cpu())
    if not isinstance(f, Tensor) or f.shape != ours.shape:
        raise InputError(
            f"{name} does not return one output tensor {tuple(ours.shape)} for tokens {tuple(X.shape)}: pass the "
            "module that goes from tokens to class scores"
        )
    off = float((f.double().cpu() - ours).abs().max())
    if not off <= AGREES * float(ours.abs().max()):
        raise InputError(
            f"{name} computes something else than softmax attention of its queries and a linear classifier: outputs "
            f"differ by {off:.3g}. What it does besides, such as a norm, an activation or a residual, does not reduce "
            "to the convex program"
        )
    return probe


def _settings(module: torch.nn.Module, name: str, kind: type[T]) -> set[T]:
    """The values that the parts of a module have for a setting."""
    values = (getattr(part, name, None) for part in module.modules())
    return {value for value in values if isinstance(value, kind)}


def read_attentive_state(
    state: Mapping[str, Any], name: str, *, heads: int | None = None, scale: float | None = None
) -> AttentiveProbe:
    """The probe in a state dict, under whatever prefixes.

    Parameters
    ----------
    heads : int or None
        Heads of the attention; None: from the entry ``num_heads``, else it must not matter.
    scale : float or None
        Factor of the scores; None: one over the root of a head's width, as all these probes have it.

    Raises
    ------
    InputError
        Something that does not reduce, is missing, or does not fit together.
    """
    layers = _roles(state, name, heads)
    d = layers.queries.shape[1]
    classifier, bias = layers.weight["classifier"], layers.bias.get("classifier")
    if layers.values is not None:  # (M, d, m)
        queries, V = layers.queries, layers.values
        if V.ndim != 3 or V.shape[:2] != queries.shape or classifier.shape[1] != V.shape[0] * V.shape[2]:
            raise InputError(f"{name}: queries {tuple(queries.shape)}, values {tuple(V.shape)} and a classifier "
                             f"{tuple(classifier.shape)} do not fit together")  # fmt: skip
        W = classifier.T.reshape(len(V), V.shape[2], -1)
        return AttentiveProbe(name, queries * (d**-0.5 if scale is None else scale), V, W, bias)
    if "k" not in layers.weight:
        return _split_values(layers, scale)
    return _projected(layers, scale)


def _split_values(layers: _Layers, scale: float | None) -> AttentiveProbe:
    """Tokens are their own keys, and values are split over the queries."""
    name, queries, v, classifier = layers.name, layers.queries, layers.weight["v"], layers.weight["classifier"]
    M, d = queries.shape
    width = len(v)
    if layers.heads not in (None, 1):
        raise InputError(f"{name} has {layers.heads} heads without keys: only one head reduces")
    if v.shape[1] != d or width % M or classifier.shape[1] != width or set(layers.weight) > {"v", "classifier"}:
        raise _misfit(layers)
    V = v.view(M, width // M, d).mT
    W = classifier.T.reshape(M, width // M, -1)
    bias = _summed(layers.bias.get("classifier"), classifier, layers.bias.get("v"))
    return AttentiveProbe(name, queries * (d**-0.5 if scale is None else scale), V, W, bias)


def _projected(layers: _Layers, scale: float | None) -> AttentiveProbe:
    """Heads with keys and values of their own; outputs are the mean over the queries."""
    name, queries, weight, bias = layers.name, layers.queries, layers.weight, layers.bias
    if layers.heads is None:
        raise InputError(
            f"{name} has projected keys, but does not say how many heads it has: add the entry {HEADS!r}, or pass the "
            "module"
        )
    if "q" in weight:
        queries = queries @ weight["q"].T + bias.get("q", 0.0)
    k, v, classifier = weight["k"], weight["v"], weight["classifier"]
    if queries.shape[1] != len(k) or len(k) % layers.heads or len(v) % layers.heads or v.shape[1] != k.shape[1]:
        raise _misfit(layers)
    out, values = classifier, bias.get("v")
    total = bias.get("classifier")
    if "proj" in weight:
        if weight["proj"].shape[0] != classifier.shape[1]:
            raise _misfit(layers)
        total = _summed(total, classifier, bias.get("proj"))
        out = classifier @ weight["proj"]
    if out.shape[1] != len(v):
        raise _misfit(layers)
    total = _summed(total, out, values)
    M, H, d = len(queries), layers.heads, k.shape[1]
    key_width = len(k) // H
    factor = key_width**-0.5 if scale is None else scale
    q = torch.einsum("mhw,hwd->mhd", queries.view(M, H, key_width), k.view(H, key_width, d)) * factor
    V = v.view(1, H, -1, d).mT.expand(M, -1, -1, -1)
    W = (out.T.reshape(1, H, len(v) // H, -1) / M).expand(M, -1, -1, -1)
    return AttentiveProbe(name, q.flatten(0, 1), V.flatten(0, 1), W.flatten(0, 1), total)


def _summed(bias: Tensor | None, through: Tensor, more: Tensor | None) -> Tensor | None:
    """``bias + through · more``; None where there is neither."""
    if more is None:
        return bias
    return through @ more if bias is None else bias + through @ more


def _misfit(layers: _Layers) -> InputError:
    shapes = ", ".join(f"{role} {tuple(w.shape)}" for role, w in layers.weight.items())
    return InputError(
        f"{layers.name}: queries {tuple(layers.queries.shape)}, {shapes} do not fit together as an attentive probe"
    )


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _roles(state: Mapping[str, Any], name: str, heads: int | None) -> _Layers:
    """Which tensor is what."""
    tensors = {key: torch.as_tensor(value).detach().cpu() for key, value in state.items()}
    if heads is None:
        told = [key for key in tensors if _last(key) == HEADS]
        heads = int(tensors[told[0]]) if told else None
    tensors = {key: value.double() for key, value in tensors.items() if _last(key) != HEADS}
    norms = [key for key in tensors if any(part in NORMS or part[:4] == "norm" for part in key.split("."))]
    if norms:
        raise InputError(
            f"{name} has a norm inside ({', '.join(map(repr, norms[:3]))}): if it acts on the tokens alone, pass the "
            "normalised tokens and the weights without it; elsewhere it does not reduce to the convex program"
        )
    found = [key for key in tensors if _last(key) in QUERIES]
    if len(found) != 1:
        raise InputError(
            f"{name} must hold one tensor of queries, it holds {len(found)}: {', '.join(map(repr, found))}"
        )
    queries = tensors.pop(found[0])
    if queries.ndim == 3 and len(queries) == 1:
        queries = queries[0]
    queries = queries.unsqueeze(0) if queries.ndim == 1 else queries
    if queries.ndim != 2:
        raise InputError(f"{name}: queries have shape {tuple(queries.shape)}, needed are (M, d)")
    layers = _Layers(name, queries, heads)
    left: list[str] = []
    for key, tensor in tensors.items():
        owner, kind = _last(key.rpartition(".")[0]), _last(key)
        if kind == "values":
            layers.values = tensor
        elif kind in PACKED:
            parts = layers.weight if kind == PACKED[0] else layers.bias
            parts.update(zip("qkv", tensor.chunk(3), strict=True))
        elif kind in ("weight", "bias") and owner in PARTS and PARTS[owner] not in getattr(layers, kind):
            getattr(layers, kind)[PARTS[owner]] = tensor
        else:
            left.append(key)
    for parts in (layers.weight, layers.bias):
        if "kv" in parts:
            parts["k"], parts["v"] = parts.pop("kv").chunk(2)
    _classifier(layers, tensors, left)
    return layers


def _classifier(layers: _Layers, tensors: Mapping[str, Tensor], left: list[str]) -> None:
    """The one linear layer that is left, and nothing besides."""
    weights = [key for key in left if _last(key) == "weight" and tensors[key].ndim == 2]
    prefix = weights[0].removesuffix("weight") if len(weights) == 1 else ""
    more = [key for key in left if key not in (f"{prefix}weight", f"{prefix}bias")]
    if len(weights) != 1 or more or (layers.values is None and "v" not in layers.weight):
        names = ", ".join(map(repr, more[:4])) + (", …" if len(more) > 4 else "")
        raise InputError(
            f"{layers.name} is no attentive probe that reduces to the convex program: needed are queries, at most "
            "linear keys and values, and one linear classifier"
            + (f"; it also holds {names}, such as of further layers" if more else "")
        )
    layers.weight["classifier"] = tensors[weights[0]]
    if f"{prefix}bias" in left:
        layers.bias["classifier"] = tensors[f"{prefix}bias"]
