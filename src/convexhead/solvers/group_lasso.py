"""Newton's method for one output, where nuclear norms are Euclidean norms and the program is a group lasso.

With ``c = e = 1`` every ``Z_j`` is a single column ``w_j (p,)``:

    min_{w, b}  F(Σ_j 𝒜_j(w_j) + b) + β Σ_j ‖w_j‖

Newton's equations are solved by conjugate gradients with two passes over the blocks of the model a product, and
preconditioned by ``M``: the diagonal blocks of ``H`` with the mean curvature of the loss for ``∇²F``. Where no length
of the step helps, as with losses that have no curvature somewhere, ``H`` is damped by a multiple of ``M`` (Levenberg &
Marquardt).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.dual_norm.norm import NormOracle
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers.base import Solver, Stop, scaled_dual
from convexhead.solvers.monitor import State
from convexhead.solvers.pricing import with_best_step
from convexhead.solvers.whitening import curvatures, mean_curvature


def is_group_lasso(problem: Problem) -> bool:
    """Whether every ``Z_j`` is a single column."""
    one_output = problem.c == problem.head.value_rows == 1
    return one_output and problem.head.learns_mixing and problem.activation.convex


class GroupNewton(Solver):
    """Newton's method over the blocks that are not zero, and blocks that enter.

    1. *Price*: ``g_j = 𝒜_j*(R)`` of all blocks, in one pass; stop where the gap between the model and the dual point of
       ``R`` is small.
    2. *Enter*: zero blocks with the largest ``‖g_j‖ > β``, along ``−g_j``, with the best common step, if the gradient
       along the others is small beside that.
    3. *Step*: Newton's over the blocks that are not zero, where the objective is smooth with Hessian

           H = 𝒜* ∇²F 𝒜 + diag_j (β/‖w_j‖) (I − u_j u_jᵀ),    u_j = w_j/‖w_j‖;

       a block that it would carry through zero stops there.

    One `step` is one round. Parameters are those of `Solver`; ``max_heads`` bounds the blocks other than zero.
    """

    name = "group-newton"
    fewest = 4
    """Number of blocks that may enter in a round, or half as many as the model has if that is more. Chosen by hand."""
    ready = 0.5
    """They enter where the gradient along the model's blocks is at most this part of how far theirs is above β."""
    accuracy = 0.1
    """Of a step: the residual of Newton's equations, relative to the gradient in the norm of ``M⁻¹``."""
    most_products = 200
    most_halvings, most_dampings = 10, 12
    most_steps = 1000
    patience = 20
    """Rounds without a better gap or a lower objective after which a precision has given what it can."""

    def _set_up(self, start: Atoms) -> None:
        blocks, which = torch.unique(start.block, return_inverse=True)
        W = start.U.new_zeros(len(blocks), self.problem.head.mixing_size)
        self._set(W.index_add_(0, which, _columns(start)), blocks, start.intercept)
        self.damping = 0.0
        self._grams: dict[int, Tensor] = {}

    @classmethod
    def lacks(cls, problem: Problem, oracle: NormOracle | None) -> str | None:
        """Columns for every ``Z_j``."""
        if is_group_lasso(problem):
            return None
        return "one output, one value row a head (mlp, fno or block-fno), and a linear or gated activation"

    def _set(self, W: Float[Tensor, "k p"], block: Int[Tensor, " k"], b: Float[Tensor, " c"]) -> None:
        """Make these columns the model."""
        kept = W.norm(dim=1) > 0
        self.W, self.block, self.b = W[kept], block[kept], b

    def state(self) -> tuple[State, State]:
        """Return the model and the damping."""
        damping = torch.tensor(self.damping, dtype=torch.float64)
        return {"W": self.W, "block": self.block, "b": self.b, "damping": damping}, {}

    def _restore(self, shared: State, rows: State) -> None:
        self.begin()
        self.W, self.block, self.b = shared["W"], shared["block"], shared["b"]
        self.damping = float(shared["damping"])

    def atoms(self) -> Atoms:
        """Return the current model."""
        return self._atoms(self.W, self.block, self.b)

    def _atoms(self, W: Float[Tensor, "k p"], block: Int[Tensor, " k"], b: Float[Tensor, " c"]) -> Atoms:
        return Atoms(W.view(-1, *self.problem.head.mixing_shape), W.new_ones(len(W), 1, 1), block, b)

    def begin(self) -> None:
        """Forget how the rounds went."""
        self._best, self._lowest, self._since = math.inf, math.inf, 0

    def step(self) -> Stop | None:
        """Take one round."""
        problem = self.problem
        f = problem.outputs(self.atoms())
        G = self._pull(problem.residual(f), torch.arange(problem.n_blocks, device=self.b.device))
        dual = scaled_dual(problem, f, float(G.norm(dim=1).max()), self.beta, self.b)
        value = self._value(f, self.W)
        gap = self.monitor.record(value, dual, len(self.W))
        if gap <= self.target:
            return Stop.CONVERGED
        idle = gap > 0.95 * self._best and value > self._lowest - 2 * self._rounding(self._lowest)
        self._best, self._lowest = min(gap, self._best), min(value, self._lowest)
        self._since = self._since + 1 if idle else 0
        entered = self._enter(f, G)
        stepped = self._newton_step(problem.outputs(self.atoms()) if entered else f)
        return None if (entered or stepped) and self._since <= self.patience else self._ended(len(self.W))

    def _value(self, f: Float[Tensor, "n r c"], W: Float[Tensor, "k p"]) -> float:
        return self.problem.data_term(f) + self.beta * float(W.norm(dim=1).double().sum())

    def _rounding(self, value: float) -> float:
        """What an objective's last digits are worth."""
        return 4 * torch.finfo(self.W.dtype).eps * abs(value)

    def _pull(self, R: Float[Tensor, "n r c"], block: Int[Tensor, " k"]) -> Float[Tensor, "k p"]:
        """``𝒜_j*(R)`` of some blocks."""
        if not len(block):
            return self.W
        return self.problem.operator.adjoint_times_values(R, R.new_ones(len(block), 1, 1), block).flatten(1)

    def _sum(self, R: Float[Tensor, "n r c"]) -> Float[Tensor, " c"]:
        """Over samples and rows: the adjoint of adding an intercept; zero where none is fitted."""
        return self.problem.sum(R.sum((0, 1)))[0] if self.problem.fit_intercept else torch.zeros_like(self.b)

    def _enter(self, f: Float[Tensor, "n r c"], G: Float[Tensor, "j p"]) -> bool:
        """Add the blocks that promise most; whether there are any."""
        excess = G.norm(dim=1) - self.beta
        excess[self.block] = -torch.inf
        if len(self.W):
            slope = G[self.block] + self.beta * torch.nn.functional.normalize(self.W)
            if float(slope.norm(dim=1).max()) > self.ready * float(excess.max()):
                return False
        room = max(self.fewest, len(self.W) // 2)
        if self.max_heads is not None:
            room = max(0, min(room, self.max_heads - len(self.W)))
        new = excess.argsort(descending=True)[:room]
        new = new[excess[new] > 1e-9 * self.beta]
        if not len(new):
            return False
        along = -excess[new].unsqueeze(1) * torch.nn.functional.normalize(G[new])
        atoms = self._atoms(along, new, torch.zeros_like(self.b))
        atoms = with_best_step(self.problem, f, atoms, excess[new], self.beta)
        self._set(torch.cat([self.W, _columns(atoms)]), torch.cat([self.block, new]), self.b)
        return True

    # -- Newton -------------------------------------------------------------------------------------------------------
    def _newton_step(self, f: Float[Tensor, "n r c"]) -> bool:
        """One step; False where no further decrease is possible in this precision."""
        value, diagonal = self._value(f, self.W), self._diagonal(f)
        for _ in range(self.most_dampings):
            dW, db, df = self._direction(f, diagonal)
            for halvings in range(self.most_halvings):
                t = 0.5**halvings
                W, b = self.W + t * dW, self.b + t * db
                through = (W * self.W).sum(1) <= 0
                W = W * ~through.unsqueeze(1)
                moved = self.problem.outputs(self._atoms(W, self.block, b)) if bool(through.any()) else f + t * df
                # Within rounding a full step may still lower the gradient, and so the gap.
                if self._value(moved, W) < value + (self._rounding(value) if t == 1 else 0.0):
                    self._set(W, self.block, b)
                    self.damping = self.damping / 10 if self.damping > 1e-6 else 0.0
                    return True
            self.damping = max(1e-4, 10 * self.damping)
        return False

    def _direction(
        self, f: Float[Tensor, "n r c"], diagonal: Diagonal
    ) -> tuple[Float[Tensor, "k p"], Float[Tensor, " c"], Float[Tensor, "n r c"]]:
        """The step in the columns and the intercept, and what it does to the outputs."""
        problem, size = self.problem, self.W.norm(dim=1, keepdim=True)
        unit, bend = self.W / size, self.beta / size
        R = problem.residual(f)
        r, rb = -self._pull(R, self.block) - self.beta * unit, -self._sum(R)
        x, xb, df = torch.zeros_like(r), torch.zeros_like(rb), torch.zeros_like(f)
        p, pb = diagonal.solve(r, rb)
        first = square = _inner(r, p, rb, pb)
        for _ in range(self.most_products):
            change = problem.outputs(self._atoms(p, self.block, pb))
            bent = problem.losses.hessian_times(f, change) / problem.n
            q = self._pull(bent, self.block) + bend * (p - unit * (unit * p).sum(1, keepdim=True))
            qb = self._sum(bent)
            if self.damping:
                Mp, Mpb = diagonal.times(p, pb)
                q, qb = q + self.damping * Mp, qb + self.damping * Mpb
            curvature = _inner(p, q, pb, qb)
            if not curvature > 0:
                break
            t = square / curvature
            x, xb, df = x + t * p, xb + t * pb, df + t * change
            r, rb = r - t * q, rb - t * qb
            z, zb = diagonal.solve(r, rb)
            last, square = square, _inner(r, z, rb, zb)
            if square <= self.accuracy**2 * first:
                break
            p, pb = z + square / last * p, zb + square / last * pb
        return x, xb, df

    def _diagonal(self, f: Float[Tensor, "n r c"]) -> Diagonal:
        """``M`` at the model."""
        h = mean_curvature(self.problem, curvatures(self.problem, f)) or 1.0
        p = self.W.shape[1]
        eye = torch.eye(p, dtype=f.dtype, device=f.device)
        for j in self.block.tolist():
            if j not in self._grams:
                units = self._atoms(eye, torch.full((p,), j, device=f.device), self.b)
                (self._grams[j],) = self.problem.operator.value_grams(units, [torch.arange(p, device=f.device)])
        size = self.W.norm(dim=1).view(-1, 1, 1)
        unit = self.W.unsqueeze(2) / size
        M = self.beta / size * (eye - unit @ unit.mT)
        for k, j in enumerate(self.block.tolist()):
            M[k] += h * self._grams[j]
        M += 64 * torch.finfo(f.dtype).eps * M.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1) * eye
        return Diagonal(M, h * self.problem.head.r)


class Diagonal:
    """``M``: blocks ``M (k, p, p)`` for the columns, and ``m`` for the intercept."""

    def __init__(self, M: Float[Tensor, "k p p"], m: float) -> None:
        self.M, self.m = M, m
        self.root = torch.linalg.cholesky(M)

    def times(
        self, x: Float[Tensor, "k p"], b: Float[Tensor, " c"]
    ) -> tuple[Float[Tensor, "k p"], Float[Tensor, " c"]]:
        return (self.M @ x.unsqueeze(2)).squeeze(2), self.m * b

    def solve(
        self, x: Float[Tensor, "k p"], b: Float[Tensor, " c"]
    ) -> tuple[Float[Tensor, "k p"], Float[Tensor, " c"]]:
        return torch.cholesky_solve(x.unsqueeze(2), self.root).squeeze(2), b / self.m


def _inner(x: Tensor, y: Tensor, xb: Tensor, yb: Tensor) -> float:
    return float((x * y).sum() + (xb * yb).sum())


def _columns(atoms: Atoms) -> Float[Tensor, "k p"]:
    """``u_k v_k`` of atoms with one value each."""
    return atoms.U.flatten(1) * atoms.V.flatten(1)
