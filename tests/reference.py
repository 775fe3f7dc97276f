"""The heads once more, from the formulas alone: loops, no FFT, no Gram matrices, no batching. Plain on purpose."""

from __future__ import annotations

import numpy as np


def circulant(X: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """``circ(X) (s, s·d)``: row ``a`` holds ``X[(a − t) mod grid]`` for every shift ``t``."""
    (h, w), (s, d) = grid, X.shape
    lattice = X.reshape(h, w, d)
    rows = np.empty((s, s, d))
    for a in range(s):
        for t in range(s):
            rows[a, t] = lattice[(a // w - t // w) % h, (a % w - t % w) % w]
    return rows.reshape(s, s * d)


def preactivation(name: str, X: np.ndarray, U: np.ndarray, grid: tuple[int, int], group: int) -> np.ndarray:
    """What the activation is applied to, for one sample and one atom."""
    if name == "self-attention":
        return X @ U @ X.T
    if name == "mlp-mixer":
        return U @ X
    if name == "fno":
        return circulant(X, grid) @ U.reshape(-1, 1)
    if name == "block-fno":
        width = U.shape[1]
        return circulant(X[:, group * width : (group + 1) * width], grid) @ U.reshape(-1, 1)
    if name == "mlp":
        return X @ U.reshape(-1, 1)
    raise ValueError(name)


def mix(
    name: str,
    X: np.ndarray,
    U: np.ndarray,
    *,
    grid: tuple[int, int],
    group: int = 0,
    gate: np.ndarray | None = None,
) -> np.ndarray:
    """``mix(X, U)`` of one sample and one atom, before pooling: ``(s, e)``."""
    if name == "linear":
        return X * float(U)
    A = preactivation(name, X, U, grid, group)
    if gate is not None:
        A = A * (preactivation(name, X, gate, grid, group) >= 0)
    return A @ X / len(X) if name == "self-attention" else A


def attend(X: np.ndarray, U: np.ndarray, queries: np.ndarray, block: int) -> np.ndarray:
    """``Σ_j φ_j(X)ᵀ U_j`` of the attentive head, ``U (J, d)``; of one query for ``U (d,)``: ``(1, 1)``."""
    d, total = X.shape[1], 0.0
    of_query = {block: U} if U.ndim == 1 else dict(enumerate(U))
    for j, u in of_query.items():
        scores = [x @ queries[j, :d] + (queries[j, d + t] if queries.shape[1] > d else 0.0) for t, x in enumerate(X)]
        weights = np.exp(np.array(scores) - max(scores))
        total += sum(w * (x @ u) for w, x in zip(weights / weights.sum(), X, strict=True))
    return np.array([[total]])


def pool(M: np.ndarray, how: str) -> np.ndarray:
    """``P M``."""
    return {"mean": M.mean(0, keepdims=True), "cls": M[:1], "none": M}[how]
