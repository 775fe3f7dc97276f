"""Objectives that anybody can attain: the heads from their formulas, and a search, with no code of the library.

    f_i = P Σ_k mix(X_i, U_k) V_k + b        objective  (1/n) Σ_i ℓ(f_i, y_i) + (β/2) Σ_k (‖U_k‖² + ‖V_k‖²)

Every value is evaluated in extended precision at weights that a float64 search has found, so that a lower bound above
it is false whatever was rounded. The linear head has the penalty ``(β/2)‖V‖²``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

Array = Any
"""A numpy array of extended precision, or a tensor."""
ROUNDING = 1e-15
"""Relative error that an objective in extended precision surely stays below, in units of its largest term."""


@dataclass(frozen=True)
class Program:
    """A training problem as its user states it.

    Attributes
    ----------
    head, activation, pool, loss : str
    grid : (int, int)
    n_blocks : int
        Channel groups.
    grouped : bool
        Whether a group of block-fno writes its own outputs only.
    gates : ndarray (J, *gate_shape) or None
    intercept : bool
    X : ndarray (n, s, d)
    Y : ndarray (n, r, c)
    weights : ndarray (n, r or 1, c or 1) or None
        Of samples, rows or entries: the data term is the mean over them.
    positive : float
        Weight of the ones of binary cross-entropy.
    mask : ndarray (n, s) or None
        Which tokens there are; the others are zeros in ``X``.
    queries : ndarray (J, d) or (J, d + s), or None
        Of the attentive head.
    each : bool
        Whether each of them has a block of its own.
    """

    head: str
    activation: str
    pool: str
    loss: str
    grid: tuple[int, int]
    n_blocks: int
    grouped: bool
    gates: np.ndarray | None
    intercept: bool
    X: np.ndarray
    Y: np.ndarray
    weights: np.ndarray | None = None
    positive: float = 1.0
    mask: np.ndarray | None = None
    queries: np.ndarray | None = None
    each: bool = False

    @property
    def groups(self) -> int:
        if self.queries is not None and self.each:
            return len(self.queries)
        return self.n_blocks if self.head == "block-fno" else 1

    @property
    def blocks(self) -> int:
        return self.groups * (1 if self.gates is None else len(self.gates))

    @property
    def mixing_shape(self) -> tuple[int, ...]:
        s, d = self.X.shape[1:]
        return {
            "self-attention": (d, d),
            "mlp-mixer": (s, s),
            "fno": (s, d),
            "block-fno": (s, d // self.n_blocks),
            "mlp": (d,),
            "linear": (),
            "attentive": (d,) if self.queries is None or self.each else (len(self.queries), d),
        }[self.head]

    @cached_property
    def maps(self) -> np.ndarray:
        """``(n, s, J)`` of the attentive head, in extended precision."""
        assert self.queries is not None
        wide, d = np.longdouble, self.X.shape[2]
        scores = np.einsum("nsd,jd->nsj", self.X.astype(wide), self.queries[:, :d].astype(wide))
        if self.queries.shape[1] > d:
            scores = scores + self.queries[:, d:].T
        there = True if self.mask is None else self.mask[..., None]
        scores = np.where(there, scores, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    @property
    def value_rows(self) -> int:
        return self.X.shape[2] if self.head in ("self-attention", "mlp-mixer", "linear") else 1


@dataclass(frozen=True)
class Weights:
    """``U (k, *mixing_shape)``, ``V (k, e, c)``, the block of each atom and ``b (c,)``."""

    U: np.ndarray
    V: np.ndarray
    block: np.ndarray
    b: np.ndarray


def shifts(grid: tuple[int, int]) -> np.ndarray:
    """``(s, s)``: the token that position ``a`` meets under shift ``t``."""
    h, w = grid
    a = np.arange(h * w)
    return ((a[:, None] // w - a // w) % h) * w + (a[:, None] % w - a % w) % w


def scores(program: Program, X: Array, U: Array, group: int, einsum: Any) -> Array:
    """Pre-activations of one channel group's atoms."""
    if program.head == "self-attention":
        return einsum("nsd,kde,nte->nkst", X, U, X)
    if program.head == "mlp-mixer":
        return einsum("kps,nsd->nkpd", U, X)
    if program.head in ("fno", "block-fno"):
        width = U.shape[-1]
        mine = X[:, :, group * width : (group + 1) * width]
        return einsum("natd,ktd->nka", mine[:, shifts(program.grid)], U)
    return einsum("nsd,kd->nks", X, U)


def outputs(program: Program, X: Array, weights: Any, einsum: Any) -> Array:
    """``f (n, r, c)``."""
    s = X.shape[1] if program.mask is None else like(program.mask.sum(1).reshape(-1, 1, 1, 1), X)
    f = 0 * X[:, :, :1] + 0 * weights.b
    for j in range(program.blocks):
        mine = np.flatnonzero(weights.block == j)
        if not len(mine):
            continue
        group, U, V = j % program.groups, weights.U[mine], weights.V[mine]
        if program.head == "attentive":
            maps = like(program.maps, X)
            read = einsum("ns,nsd->nd", maps[:, :, group], X) if program.each else einsum("nsj,nsd->njd", maps, X)
            scores_of = einsum("nd,kd->nk", read, U) if program.each else einsum("njd,kjd->nk", read, U)
            f = f + einsum("nk,kec->nc", scores_of, V)[:, None]
            continue
        if program.head == "linear":
            f = f + einsum("nse,kec->nsc", X, V)
            continue
        A = scores(program, X, U, group, einsum)
        if program.activation == "relu":
            A = A * (A > 0)
        if program.activation == "gated-relu":
            A = A * gate_mask(program, j, like=A)
        if program.head == "self-attention":
            A = einsum("nkst,ntd->nksd", A, X) / s
        f = f + (einsum("nkse,kec->nsc", A, V) if A.ndim == 4 else einsum("nks,kec->nsc", A, V))
    if program.head == "attentive":
        return f[:, :1] + weights.b
    count = X.shape[1] if program.mask is None else like(program.mask.sum(1).reshape(-1, 1, 1), X)
    return {"mean": f.sum(1)[:, None] / count, "cls": f[:, :1], "none": f}[program.pool] + weights.b


def like(numbers: np.ndarray, x: Array) -> Array:
    """Numbers as the kind of array that ``x`` is."""
    return torch.from_numpy(numbers.astype(np.float64)) if isinstance(x, torch.Tensor) else numbers


def gate_mask(program: Program, j: int, *, like: Array) -> Array:
    """``1[score of the gate ≥ 0]`` of block ``j``, one atom wide, in float64."""
    assert program.gates is not None
    gate, group = divmod(j, program.groups)
    G = program.gates[gate][group] if program.groups > 1 else program.gates[gate]
    mask = scores(program, program.X.astype(np.float64), np.asarray(G, np.float64)[None], group, np.einsum) >= 0
    return torch.from_numpy(mask) if isinstance(like, torch.Tensor) else mask


def data_term(program: Program, f: Array, Y: Array) -> Array:
    """``(1/n) Σ_i ℓ(f_i, y_i)``, or ``Σ w ℓ / Σ w``."""
    each = losses(program, f, Y)
    if program.weights is None:
        return each.sum() / len(f)
    w = like(program.weights.astype(np.longdouble), f)
    return (where(w > 0, each, 0 * each) * w).sum() / w.sum()


def losses(program: Program, f: Array, Y: Array) -> Array:
    """``ℓ`` of rows ``(n, r, 1)``, or of entries ``(n, r, c)``."""
    plain = isinstance(f, np.ndarray)
    if program.loss == "cross-entropy":
        top = f.max(-1, keepdims=True) if plain else f.max(-1, keepdim=True).values
        away = f - top
        each = np.log(np.exp(away).sum(-1)) if plain else away.exp().sum(-1).log()
        return (each * Y.sum(-1) - (away * Y).sum(-1))[..., None]
    if program.loss == "binary-cross-entropy":
        tail = np.log1p(np.exp(-abs(f))) if plain else torch.log1p(torch.exp(-abs(f)))
        up, down = (np.maximum(f, 0), np.maximum(-f, 0)) if plain else (f.clamp(min=0), (-f).clamp(min=0))
        return program.positive * Y * (tail + down) + (1 - Y) * (tail + up)
    t = abs(f - Y)
    if program.loss == "squared":
        return t * t / 2
    inner = t.clip(None, 1.0) if plain else t.clamp(max=1.0)
    return inner * (t - inner / 2)


def where(condition: Array, a: Array, b: Array) -> Array:
    """`numpy.where` or `torch.where`."""
    return (torch if isinstance(condition, torch.Tensor) else np).where(condition, a, b)


def squared_norms(program: Program, weights: Any) -> Array:
    square = (weights.V * weights.V).sum()
    return square if program.head == "linear" else square + (weights.U * weights.U).sum()


def objective(
    program: Program, weights: Weights, beta: float, *, shift: np.ndarray | float = 0.0
) -> tuple[float, float]:
    """The objective in extended precision, and an error that it surely stays below.

    ``shift (d,)`` is taken from every token first: for heads that are linear in the tokens that is another intercept.
    """
    wide = np.longdouble
    W = Weights(weights.U.astype(wide), weights.V.astype(wide), weights.block, weights.b.astype(wide))
    X, Y = _there(program, program.X.astype(wide) - np.asarray(shift, wide)), program.Y.astype(wide)

    def einsum(formula: str, *parts: Array) -> Array:
        return np.einsum(formula, *parts, optimize=False)

    f = outputs(program, X, W, einsum)
    value = data_term(program, f, Y) + wide(beta) / 2 * squared_norms(program, W)
    # What cancels in the outputs is as large as the sum of the absolute values.
    size = Weights(abs(W.U), abs(W.V), W.block, abs(W.b))
    largest = float(np.max(outputs(replace(program, activation="linear", gates=None), abs(X), size, einsum)))
    slope = float(np.max(abs(f - Y))) if program.loss == "squared" else max(program.positive, 1.0)
    lost = 1e-17
    if program.queries is not None:  # scores are sums of products of this size, and weights their exponentials
        lost += 1e-18 * float(abs(X).max() * abs(program.queries[:, : X.shape[2]]).sum(1).max()) * X.shape[2]
    return float(value), lost * largest * max(slope, 1.0) * program.Y.shape[-1] + ROUNDING * abs(float(value))


def search(
    program: Program, beta: float, *, starts: list[Weights], random: int, rng: np.random.Generator, atoms: int = 6
) -> tuple[float, float]:
    """The lowest objective that descents find, from ``starts`` and from as many ``random`` ones, and its error.

    The descents see tokens of scale 1, ``X = t X̂``: an atom is of degree 3 in the tokens for attention and 1 else, and
    its ``U`` and ``V`` share that factor. With an intercept, heads that are linear in the tokens see them centred.
    """
    X, shift = program.X.astype(np.float64), np.zeros(program.X.shape[2])
    if program.intercept and program.activation == "linear" and program.head in ("linear", "mlp", "attentive"):
        shift = X.mean((0, 1))
        X = (program.X.astype(np.longdouble) - shift.astype(np.longdouble)).astype(np.float64)
        X = _there(program, X)
    scale = 2.0 ** np.round(np.log2(max(np.abs(X).max(), 1e-290)))
    per = scale if program.head == "linear" else scale ** (1.5 if program.head == "self-attention" else 0.5)
    tokens, Y = torch.from_numpy(X / scale), torch.from_numpy(program.Y.astype(np.float64))
    best, error = np.inf, 0.0
    begin = [_widened(program, _shifted(program, shift, W), rng) for W in starts]
    for W in [*begin, *(random_weights(program, rng, atoms) for _ in range(random))]:
        mask = value_mask(program, W)
        m, k = W.U.size, W.V.size

        def unpack(x: Any, W: Weights = W, mask: Array = mask, m: int = m, k: int = k) -> Weights:
            """The weights of tokens of scale 1."""
            V = x[m : m + k].reshape(W.V.shape) * (mask if isinstance(x, np.ndarray) else torch.from_numpy(mask))
            b = x[m + k :] if program.intercept else 0 * x[m + k :]
            return Weights(x[:m].reshape(W.U.shape), V, W.block, b)

        def value(x: np.ndarray, unpack: Any = unpack) -> tuple[float, np.ndarray]:
            z = torch.from_numpy(x).requires_grad_()
            weights = unpack(z)
            f = outputs(program, tokens, weights, torch.einsum)
            total = data_term(program, f, Y) + beta / per**2 / 2 * squared_norms(program, weights)
            (gradient,) = torch.autograd.grad(total, z)
            return float(total), gradient.numpy()

        first = np.concatenate([W.U.ravel() * (1.0 if program.head == "linear" else per), W.V.ravel() * per, W.b])
        options = {"maxiter": 40, "ftol": 1e-15, "gtol": 1e-12}
        for x in (first, minimize(value, first, jac=True, method="L-BFGS-B", options=options).x):
            found = unpack(x)
            U = found.U if program.head == "linear" else found.U / per
            found = replace(found, U=U, V=found.V / per)
            if all(np.isfinite(part).all() for part in (found.U, found.V, found.b)):
                reached, off = objective(program, found, beta, shift=shift)
                if reached < best:
                    best, error = reached, off
    return best, error


def _there(program: Program, X: Array) -> Array:
    """Tokens with zeros where there is none."""
    return X if program.mask is None else X * program.mask[..., None]


def _shifted(program: Program, shift: Array, W: Weights) -> Weights:
    """The weights that do on ``X − shift`` what ``W`` does on ``X``."""
    if not shift.any():
        return W
    wide = [part.astype(np.longdouble) for part in (shift, W.U, W.V, W.b)]
    t, U, V, b = wide
    along = np.ones(len(V)) if program.head == "linear" else U @ t
    along = along.sum(1) if along.ndim > 1 else along  # over the queries
    V = np.einsum("e,kec->kc", t, V) if program.head == "linear" else V[:, 0]
    return replace(W, b=(b + along @ V).astype(np.float64))


def _widened(program: Program, W: Weights, rng: np.random.Generator) -> Weights:
    """The same outputs from more atoms, one a block, so that a descent may grow them."""
    if program.head == "linear":
        return W
    k = program.blocks
    U = 1e-3 * rng.normal(size=(k, *program.mixing_shape)) * max(np.abs(W.U).max(initial=0.0), 1e-3)
    V = np.zeros((k, program.value_rows, program.Y.shape[-1]))
    return Weights(np.concatenate([W.U, U]), np.concatenate([W.V, V]), np.concatenate([W.block, np.arange(k)]), W.b)


def value_mask(program: Program, W: Weights) -> np.ndarray:
    """Zeros in the outputs that an atom's group does not write."""
    if not (program.head == "block-fno" and program.grouped):
        return np.ones_like(W.V)
    share = program.Y.shape[-1] // program.n_blocks
    group = W.block % program.n_blocks
    return (np.arange(program.Y.shape[-1]) // share == group[:, None])[:, None, :] * np.ones_like(W.V)


def random_weights(program: Program, rng: np.random.Generator, atoms: int) -> Weights:
    """Normal weights, spread over the blocks; the intercept begins at the mean target of a regression."""
    k = 1 if program.head == "linear" else max(atoms, program.blocks)
    c = program.Y.shape[-1]
    scale = 10 ** rng.uniform(-2, 0.5)
    U = np.ones(1) if program.head == "linear" else scale * rng.normal(size=(k, *program.mixing_shape))
    V = scale * rng.normal(size=(k, program.value_rows, c))
    b = np.zeros(c) if program.loss.endswith("cross-entropy") else np.median(program.Y, axis=(0, 1)).astype(np.float64)
    W = Weights(U, V, np.arange(k) % program.blocks, b)
    return replace(W, V=W.V * value_mask(program, W))
