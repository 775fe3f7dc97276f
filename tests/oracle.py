"""The convex programs once more, dense and from the formulas of `reference` alone.

    min  (1/n) Σ_i ℓ(f_i, y_i) + β Σ_j ‖Z_j‖_*,   f = Σ_j Φ_j Z_j + b      (the linear head: β/2 ‖W‖_F² instead)

Every ``Φ_j (n·r, p·e)`` is written out column by column from `reference.mix`. Two solvers that share nothing with
the library: CVXPY at tiny size, and an accelerated proximal gradient with exact SVDs at medium size. Any point's
`objective` is a true upper bound on the optimum and its `lower_bound` a true lower one: an oracle knows its accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp, softmax, xlogy

import reference

INTERCEPT_BOX = 1e5
"""Bound on ``|b_k|`` for which lower bounds are charged where an intercept's residuals do not sum to zero."""
CURVATURE = {"cross-entropy": 0.5, "squared": 1.0, "huber": 1.0}
"""Largest eigenvalue that the Hessian of one row's loss can have."""


@dataclass(frozen=True)
class Point:
    """Dense weights: ``Z[j] (p, e·c_j)`` for each block, ``b (c,)``."""

    Z: list[np.ndarray]
    b: np.ndarray


@dataclass(frozen=True)
class Bracket:
    """A point with ``lower ≤ optimum ≤ upper``, ``upper`` its objective."""

    point: Point
    lower: float
    upper: float

    @property
    def accuracy(self) -> float:
        """Relative width."""
        return (self.upper - self.lower) / abs(self.upper) if self.upper else 0.0


@dataclass(frozen=True)
class DenseProgram:
    """One training problem in dense form.

    Attributes
    ----------
    maps : list of ndarray (n·r, p·e)
        ``Φ_j``, with one column for each pair of an entry of ``U`` and a row of ``V``.
    columns : list of slice
        The outputs that each block writes.
    Y : ndarray (n, r, c)
        Targets.
    value_rows : int
        ``e``.
    ridge : bool
        The linear head's penalty instead of nuclear norms.
    """

    maps: list[np.ndarray]
    columns: list[slice]
    Y: np.ndarray
    loss: str
    value_rows: int
    ridge: bool = False
    intercept: bool = False
    beta: float = math.nan

    # -- shapes
    @property
    def n(self) -> int:
        return len(self.Y)

    @property
    def c(self) -> int:
        return self.Y.shape[-1]

    def width(self, j: int) -> int:
        """Outputs that block ``j`` writes."""
        return len(range(self.c)[self.columns[j]])

    def zero(self) -> Point:
        """The zero model."""
        e = self.value_rows
        Z = [np.zeros((phi.shape[1] // e, e * self.width(j))) for j, phi in enumerate(self.maps)]
        return Point(Z, np.zeros(self.c))

    def point(self, U: np.ndarray, V: np.ndarray, block: np.ndarray, b: np.ndarray) -> Point:
        """Dense weights of factors ``U (k, …)``, ``V (k, e, c)`` in blocks ``(k,)``."""
        point = self.zero()
        for u, v, j in zip(U, V, block, strict=True):
            inside = v[:, self.columns[j]]
            assert np.count_nonzero(v) == np.count_nonzero(inside), "a value outside its output group"
            point.Z[j][:] += np.outer(u.ravel(), inside.ravel())
        return replace(point, b=np.asarray(b, dtype=float))

    # -- objective
    def outputs(self, point: Point) -> np.ndarray:
        """``f (n, r, c)``."""
        f = np.zeros((self.n * self.Y.shape[1], self.c)) + point.b
        for phi, Z, columns in zip(self.maps, point.Z, self.columns, strict=True):
            f[:, columns] += phi @ Z.reshape(phi.shape[1], -1)
        return f.reshape(self.Y.shape)

    def data_term(self, f: np.ndarray) -> float:
        """``(1/n) Σ_i ℓ(f_i, y_i)``."""
        return float(loss_values(self.loss, f, self.Y).sum()) / self.n

    def penalty(self, point: Point) -> float:
        """What ``β`` multiplies."""
        if self.ridge:
            return sum(float((Z**2).sum()) for Z in point.Z) / 2
        return sum(float(np.linalg.norm(Z, "nuc")) for Z in point.Z)

    def objective(self, point: Point) -> float:
        """The value of the program at ``point``: an upper bound on its optimum."""
        return self.data_term(self.outputs(point)) + self.beta * self.penalty(point)

    # -- duality
    def residual(self, f: np.ndarray) -> np.ndarray:
        """``∇ℓ(f_i, y_i) / n``, ``(n, r, c)``."""
        return loss_gradients(self.loss, f, self.Y) / self.n

    def gradient(self, R: np.ndarray) -> list[np.ndarray]:
        """``𝒜_j*(R) (p, e·c_j)`` of every block."""
        flat = R.reshape(-1, self.c)
        return [
            (phi.T @ flat[:, columns]).reshape(phi.shape[1] // self.value_rows, -1)
            for phi, columns in zip(self.maps, self.columns, strict=True)
        ]

    def norm(self, R: np.ndarray) -> float:
        """``max_j ‖𝒜_j*(R)‖₂``."""
        return max(float(np.linalg.norm(G, 2)) for G in self.gradient(R))

    def lower_bound(self, f: np.ndarray) -> float:
        """The dual value that the residuals at outputs ``f`` give."""
        if self.intercept:
            f = f + best_intercept(self.loss, f, self.Y)
        R = self.residual(f)
        if self.ridge:
            tau, missing = 1.0, sum(float((G**2).sum()) for G in self.gradient(R)) / (2 * self.beta)
        else:
            tau, missing = min(1.0, self.beta / max(self.norm(R), 1e-300)), 0.0
        if self.intercept:
            missing += tau * INTERCEPT_BOX * float(np.abs(R.sum((0, 1))).sum())
        return -float(loss_conjugates(self.loss, tau * self.n * R, self.Y).sum()) / self.n - missing

    def bracket(self, point: Point) -> Bracket:
        """The bounds that one point gives."""
        upper = self.objective(point)
        return Bracket(point, min(upper, self.lower_bound(self.outputs(point))), upper)

    def beta_max(self) -> float:
        """The weight from which on ``Z = 0`` is optimal (by convention the same formula for the linear head)."""
        f = np.zeros_like(self.Y)
        if self.intercept:
            f = f + best_intercept(self.loss, f, self.Y)
        return self.norm(self.residual(f))

    # -- solvers
    def solve_cvxpy(self, **options: object) -> Bracket:
        """By an interior-point method, for tiny sizes."""
        import cvxpy as cp

        Z = [cp.Variable(z.shape) for z in self.zero().Z]
        b = cp.Variable((1, self.c))
        rows = self.n * self.Y.shape[1]
        f = np.ones((rows, 1)) @ b if self.intercept else np.zeros((rows, self.c))
        for j, phi in enumerate(self.maps):
            spread = np.eye(self.c)[self.columns[j]]  # (c_j, c)
            f = f + phi @ cp.reshape(Z[j], (phi.shape[1], self.width(j)), order="C") @ spread
        Y = self.Y.reshape(rows, self.c)
        if self.loss == "cross-entropy":
            data = cp.sum(cp.log_sum_exp(f, axis=1)) - cp.sum(cp.multiply(Y, f))
        elif self.loss == "squared":
            data = cp.sum_squares(f - Y) / 2
        else:
            data = cp.sum(cp.huber(f - Y, 1.0)) / 2  # CVXPY's is t² inside, twice ours
        penalty = sum(cp.sum_squares(z) / 2 if self.ridge else cp.normNuc(z) for z in Z)
        options = {"solver": "CLARABEL"} | options
        cp.Problem(cp.Minimize(data / self.n + self.beta * penalty)).solve(**options)
        return self.bracket(Point([z.value for z in Z], b.value[0] if self.intercept else np.zeros(self.c)))

    def solve_fista(self, *, accuracy: float, start: Point | None = None, max_iterations: int = 50_000) -> Bracket:
        """By accelerated proximal gradient with restarts, until the bracket is as narrow as ``accuracy``."""
        start = start or self.zero()
        every = np.concatenate(self.maps, axis=1)
        norm = float(np.linalg.norm(every, 2)) or 1.0
        omega = norm / math.sqrt(len(every)) if self.intercept else 0.0  # b = omega · a, so that both count alike
        step = self.n / (CURVATURE[self.loss] * norm**2 * (2 if self.intercept else 1))
        Z, a = start.Z, start.b / omega if omega else np.zeros(self.c)
        EZ, Ea, momentum = Z, a, 1.0
        best = self.bracket(start)
        for iteration in range(max_iterations):
            R = self.residual(self.outputs(Point(EZ, omega * Ea)))
            new_Z = [self._prox(z - step * g, step) for z, g in zip(EZ, self.gradient(R), strict=True)]
            new_a = Ea - step * omega * R.sum((0, 1))
            uphill = sum(float(((e - z) * (z - o)).sum()) for e, z, o in zip(EZ, new_Z, Z, strict=True))
            uphill += float((Ea - new_a) @ (new_a - a))
            if uphill > 0:
                momentum = 1.0
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            weight, momentum = (momentum - 1) / following, following
            EZ = [z + weight * (z - o) for z, o in zip(new_Z, Z, strict=True)]
            Ea, Z, a = new_a + weight * (new_a - a), new_Z, new_a
            if iteration % 20 == 19:
                now = self.bracket(Point(Z, omega * a))
                upper_point = now.point if now.upper < best.upper else best.point
                best = Bracket(upper_point, max(now.lower, best.lower), min(now.upper, best.upper))
                if best.accuracy <= accuracy:
                    break
        return best

    def _prox(self, Z: np.ndarray, step: float) -> np.ndarray:
        if self.ridge:
            return Z / (1 + step * self.beta)
        left, sigma, right = np.linalg.svd(Z, full_matrices=False)
        return (left * np.maximum(sigma - step * self.beta, 0)) @ right


# -- losses, a row at a time: (n, r, c) -> (n, r) or (n, r, c) ---------------------------------------------
def loss_values(loss: str, f: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``ℓ``, ``(n, r)``."""
    if loss == "cross-entropy":
        return logsumexp(f, axis=-1) - (f * y).sum(-1)
    if loss == "squared":
        return ((f - y) ** 2).sum(-1) / 2
    t = np.abs(f - y)
    return np.where(t <= 1, t**2 / 2, t - 0.5).sum(-1)


def loss_gradients(loss: str, f: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``∇_f ℓ``, ``(n, r, c)``."""
    if loss == "cross-entropy":
        return softmax(f, axis=-1) - y
    return f - y if loss == "squared" else np.clip(f - y, -1, 1)


def loss_conjugates(loss: str, g: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``ℓ*`` at points of its domain, ``(n, r)``."""
    if loss == "cross-entropy":
        p = y + g
        assert p.min() > -1e-14
        assert np.abs(p.sum(-1) - 1).max() < 1e-13 * p.shape[-1]
        p = np.maximum(p, 0)
        return xlogy(p, p).sum(-1)
    if loss == "huber":
        assert np.abs(g).max(initial=0) <= 1
    return (g**2 / 2 + g * y).sum(-1)


def best_intercept(loss: str, f: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``argmin_b Σ_i ℓ(f_i + b, y_i)`` to rounding, ``(c,)``; a far point where it lies at infinity."""
    f, y = f.reshape(-1, f.shape[-1]), y.reshape(-1, y.shape[-1])
    if loss == "squared":
        return (y - f).mean(0)
    if loss == "huber":
        return np.array([_huber_shift(t) for t in (f - y).T])
    b = np.zeros(f.shape[1])
    for _ in range(100):  # damped Newton
        p = np.exp(log_softmax(f + b, axis=1))
        g = (p - y).mean(0)
        if np.abs(g).sum() <= 1e-16 * len(b):
            break
        H = (np.diag(p.sum(0)) - p.T @ p) / len(p)
        step = np.linalg.lstsq(H, g, rcond=1e-13)[0]
        t, value = 1.0, loss_values(loss, f + b, y).mean()
        while t > 1e-6 and loss_values(loss, f + b - t * step, y).mean() > value - 1e-4 * t * (g @ step):
            t /= 2
        if t <= 1e-6:  # rounding rules: a full step if it makes the gradient smaller
            full = (softmax(f + b - step, axis=1) - y).mean(0)
            if np.abs(full).sum() >= np.abs(g).sum():
                break
            t = 1.0
        b = b - t * step
    return b


def _huber_shift(t: np.ndarray) -> float:
    """The root of the rising, piecewise linear ``b ↦ Σ clip(t + b, −1, 1)``."""
    return brentq(lambda b: np.clip(t + b, -1, 1).sum(), -t.max() - 1, -t.min() + 1, xtol=1e-15)


# -- features ----------------------------------------------------------------------------------------------
def mixing_shape(head: str, s: int, d: int, groups: int) -> tuple[int, ...]:
    """Shape of one mixing weight."""
    return {
        "self-attention": (d, d),
        "mlp-mixer": (s, s),
        "fno": (s, d),
        "block-fno": (s, d // groups),
        "mlp": (d,),
        "linear": (),
    }[head]


def dense_program(
    head: str,
    X: np.ndarray,
    Y: np.ndarray,
    *,
    loss: str,
    pool: str,
    grid: tuple[int, int],
    gates: np.ndarray | None = None,
    groups: int = 1,
    outputs: str = "shared",
    queries: np.ndarray | None = None,
    intercept: bool = False,
) -> DenseProgram:
    """Write out every block's linear map: gate-major, then channel group.

    Parameters
    ----------
    X : ndarray (n, s, d)
    Y : ndarray (n, r, c)
    gates : ndarray (J, *mixing_shape), or (J, groups, *mixing_shape) for block-FNO, or None
    queries : ndarray (J, d + s) or None
        Of the attentive head: one block each, or with outputs "all" one for all.
    """
    (n, s, d), c = X.shape, Y.shape[-1]
    if queries is not None:
        basis = np.eye(d)
        maps = [
            np.array([[reference.attend(x, u, queries, j)[0, 0] for u in basis] for x in X])
            for j in range(len(queries))
        ]
        maps = [np.concatenate(maps, axis=1)] if outputs == "all" else maps
        return DenseProgram(maps, [slice(0, c)] * len(maps), Y, loss, 1, intercept=intercept)
    shape = mixing_shape(head, s, d, groups)
    basis = np.eye(math.prod(shape)).reshape(-1, *shape)
    every_gate: Sequence[np.ndarray | None] = [None] if gates is None else list(gates)
    maps, columns = [], []
    for gate in every_gate:
        for group in range(groups):
            own = gate[group] if gate is not None and head == "block-fno" else gate
            mixed = [
                [reference.pool(reference.mix(head, x, U, grid=grid, group=group, gate=own), pool) for U in basis]
                for x in X
            ]
            phi = np.array(mixed)  # (n, p, r, e)
            maps.append(phi.transpose(0, 2, 1, 3).reshape(n * phi.shape[2], -1))
            part = c // groups
            grouped = outputs == "grouped"
            columns.append(slice(group * part, (group + 1) * part) if grouped else slice(0, c))
    value_rows = d if head in ("self-attention", "mlp-mixer", "linear") else 1
    return DenseProgram(maps, columns, Y, loss, value_rows, ridge=head == "linear", intercept=intercept)


# -- the cone-constrained program of a ReLU head with scalar values -------------------------------------------------
def relu_optimum(
    head: str, X: np.ndarray, y: np.ndarray, gates: np.ndarray, *, pool: str, grid: tuple[int, int], beta: float
) -> float:
    """The optimum of the ReLU network with one output, squared loss, by CVXPY: a second-order cone program.

        min  (1/2n) ‖Σ_j Φ_j (z_j − w_j) − y‖² + β Σ_j (‖z_j‖ + ‖w_j‖)   over   K_j z_j ≥ 0, K_j w_j ≥ 0

    Parameters
    ----------
    X : ndarray (n, s, d)
    y : ndarray (n,)
    gates : ndarray (J, *mixing_shape)
        One in each activation pattern; then the program has the network's optimal value.
    """
    import cvxpy as cp

    n, s, d = X.shape
    shape = mixing_shape(head, s, d, 1)
    basis = np.eye(math.prod(shape)).reshape(-1, *shape)
    used = slice(0, 1) if pool == "cls" else slice(None)
    K = np.array([[reference.preactivation(head, x, u, grid, 0)[used, 0] for u in basis] for x in X])  # (n, p, rows)
    rows = K.transpose(0, 2, 1).reshape(-1, len(basis))  # every pre-activation
    signs = np.where(gates.reshape(len(gates), -1) @ rows.T >= 0, 1.0, -1.0)  # (J, n·rows)
    active = np.einsum("jnr,npr->njp", signs.reshape(len(gates), n, -1) > 0, K) / K.shape[2]
    parts = [cp.Variable((len(gates), len(basis))) for _ in range(2)]
    f = active.reshape(n, -1) @ cp.vec(parts[0] - parts[1], order="C")
    penalty = sum(cp.sum(cp.norm(Z, axis=1)) for Z in parts)
    objective = cp.Minimize(cp.sum_squares(f - y) / (2 * n) + beta * penalty)
    constraints = [cp.multiply(signs, Z @ rows.T) >= 0 for Z in parts]
    return float(cp.Problem(objective, constraints).solve(solver="CLARABEL"))
