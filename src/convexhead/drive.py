"""Solve a problem to a certified gap. Solvers make models and certificates judge them; only this module knows both.

    choose a solver (`convexhead.solvers.select`); begin at the start, or where a checkpoint ends
    repeat
        1. advance   steps of the solver, until by its own estimate the gap is below the target
        2. finish    float64, balanced, without negligible atoms, the intercept solved for
        3. certify   a lower bound that is proven; stop where gap / P ≤ tol
        4. tighten   half the estimated gap is the next target; or go on in float64, where rounding hid the rest

`approach` takes the first two steps only, for searches that look at many models and keep one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from convexhead.certificate.certificate import Certificate
from convexhead.certificate.certify import certify_atoms
from convexhead.dual_norm.norm import NormOracle
from convexhead.errors import InputError
from convexhead.program.atoms import Atoms
from convexhead.program.finish import finish, zero_model
from convexhead.program.identity import differences
from convexhead.program.linear_passes import LinearPasses
from convexhead.program.loss_check import check_loss
from convexhead.program.problem import Problem
from convexhead.runtime.checkpoint import Checkpoint, Snapshot
from convexhead.runtime.freed_memory import return_freed_memory
from convexhead.solvers.base import Solver, Stop
from convexhead.solvers.monitor import Monitor, Progress, Resumable
from convexhead.solvers.select import AUTO, check_name, make_solver

FAILURE_PROBABILITY = 1e-6
"""Probability that a solve's lower bound fails, over the random starts of all its certificates together."""
CHARGED = 0.01
"""Share of a certified gap below which the solver's own estimate says that charges for rounding are the rest. Chosen by
hand."""
MAX_ATTEMPTS = 20
"""Largest number of certificates of a solve. Each attempt asks the solver for half the gap of the one before. Chosen
by hand."""
FIRST_TARGET = 0.8
"""The first gap asked of a solver, in units of the tolerance: its own estimate may be a little too good."""
DECEIVED = 0.9
"""Two certificates in single precision whose gaps have a ratio above this: rounding hides the rest."""


@dataclass
class Solution:
    """What a solve returns.

    Attributes
    ----------
    atoms : Atoms
        The model, balanced.
    certificate : Certificate
        How far from the optimum it is, at most.
    history : list of Progress
    stop : Stop
        Why the solve ended.
    interrupted : bool
        Whether the user asked it to, which a model that is good enough does not tell.
    """

    atoms: Atoms
    certificate: Certificate
    history: list[Progress]
    stop: Stop
    interrupted: bool = False


def solve(
    problem: Problem,
    beta: float,
    *,
    tol: float,
    solver: str = AUTO,
    start: Atoms | None = None,
    known_dual: float = -math.inf,
    max_heads: int | None = None,
    max_time: float | None = None,
    callback: Callable[[Progress], None] | None = None,
    generator: torch.Generator,
    oracle: NormOracle | None = None,
    checkpoint: Checkpoint | None = None,
) -> Solution:
    """Minimise the convex program of ``problem`` at weight ``beta`` until a certificate says ``relative_gap ≤ tol``.

    Parameters
    ----------
    solver : str
        One of `convexhead.solvers.NAMES`; ``"auto"`` chooses by cost.
    start : Atoms or None
        Warm start; the zero model where None.
    known_dual : float
        A lower bound on the optimum known beforehand.
    max_heads : int or None
        Bound on the atoms of the model.
    max_time : float or None
        Seconds after which the best model so far is returned.
    callback : callable (Progress) or None
        Called with every new row of the history.
    generator : torch.Generator
        Random starts of pricing and of the bound on the spectral norm.
    oracle : NormOracle or None
        Of this problem with a ReLU, where one is at hand.
    checkpoint : Checkpoint or None
        Where the state of the solve is written now and then; what it holds already is gone on from.

    Returns
    -------
    Solution
        The last model with its certificate, whatever ended the run: the gap, the clock, the bound on heads or Ctrl-C.
    """
    check_name(solver)
    check_loss(problem.loss, problem.targets)
    monitor = Monitor(max_time, callback, problem.ranks, dual=known_dual)
    with monitor.interruptible():
        model = start or zero_model(problem)
        run = _Run(problem, beta, tol, solver, model, max_heads, monitor, generator, oracle, checkpoint)
        try:
            run.begin()
            while run.attempt():
                pass
        except KeyboardInterrupt:
            run.interrupt()
        return run.solution()


def approach(
    problem: Problem,
    beta: float,
    *,
    tol: float,
    solver: str = AUTO,
    start: Atoms | None = None,
    max_heads: int | None = None,
    max_time: float | None = None,
    callback: Callable[[Progress], None] | None = None,
    generator: torch.Generator,
    oracle: NormOracle | None = None,
) -> tuple[Atoms, list[Progress], Tensor]:
    """Return a model whose relative gap is about ``tol`` by the solver's own estimate, the history, and the outputs.

    Nothing is proven. Parameters are those of `solve`; Ctrl-C is not caught, since there is no certificate to return a
    model with.
    """
    check_name(solver)
    monitor = Monitor(max_time, callback, problem.ranks)
    with monitor.interruptible():
        model = start or zero_model(problem)
        problem, method = make_solver(
            solver, problem, beta, model, monitor, max_heads=max_heads, generator=generator, oracle=oracle
        )
        method.advance(tol)
    if monitor.interrupted:
        raise KeyboardInterrupt
    # Atoms that carry so little say nothing about the rank of the optimum. Without those of a share near tol the next
    # fit of a path would begin far off: where the data term is small, at several times the gap.
    model = finish(problem, method.atoms(), tol / 20, max_heads).to(problem.device, problem.dtype)
    if problem.head.learns_mixing:
        f = problem.outputs(model)
    else:
        passes = LinearPasses(problem)
        problem, f = passes.problem, passes.outputs_of(model).to(problem.dtype)
        if (recent := problem.operator.samples.recent) is not None:
            recent.keep(model, f)
    objective = problem.data_term(f) + beta * problem.penalty(model)
    monitor.record(objective, -math.inf, len(model))
    return model, monitor.history, f


@dataclass
class Stage:
    """Where a solve stands, its solver apart: goes into checkpoints.

    Attributes
    ----------
    target : float
        Relative gap asked of the solver.
    dual : float
        Best certified lower bound.
    failure : float
        Probability that one of the certificates so far fails, whose best bound is kept: their shares add up to less
        than the whole.
    share : float
        Of the next certificate, times two.
    gap : float
        Relative gap of the last certificate.
    attempt : int
        Certificates so far.
    double : bool
        Whether single precision has given what it can.
    """

    target: float
    dual: float
    failure: float = 0.0
    share: float = FAILURE_PROBABILITY
    gap: float = math.inf
    attempt: int = 0
    double: bool = False


@dataclass
class _Run:
    """One solve: the problem in the precision of the moment, its solver, and the last model with its certificate."""

    problem: Problem
    beta: float
    tol: float
    name: str
    model: Atoms
    max_heads: int | None
    monitor: Monitor
    generator: torch.Generator
    oracle: NormOracle | None
    checkpoint: Checkpoint | None
    solver: Solver | None = None
    certificate: Certificate | None = None
    stop: Stop = Stop.STALLED
    stage: Stage = field(init=False)
    identity: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.identity = self.problem.identity  # of the problem in all precisions
        self.stage = Stage(FIRST_TARGET * self.tol, self.monitor.dual)

    # -- beginning ----------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """Make the solver, and let it go on from the checkpoint where there is one."""
        saved = None if self.checkpoint is None else self.checkpoint.load()
        written_by = None if saved is None else self._take_up(saved)
        if self.stage.double and written_by is not None:
            self.problem = self.problem.astype(torch.float64, reuse=True)
        solver = self._make(written_by or self.name, checked=written_by is not None)
        if self.stage.double and written_by is None:
            solver = self._refine(solver)
        if self.checkpoint is not None:
            self.monitor.save = self._save
        if saved is not None:
            self.generator.set_state(saved.shared.pop("generator"))
            device = self.problem.device
            shared, rows = ({name: t.to(device) for name, t in part.items()} for part in (saved.shared, saved.rows))
            solver.restore(shared, rows)

    def _make(self, name: str, *, checked: bool = False) -> Solver:
        self.problem, self.solver = make_solver(
            name, self.problem, self.beta, self.model, self.monitor,
            max_heads=self.max_heads, generator=self.generator, oracle=self.oracle, checked=checked,
        )  # fmt: skip
        self.oracle = self.solver.oracle
        return self.solver

    def _refine(self, solver: Solver) -> Solver:
        """Return the solver that goes on in float64: this one, or a new one that begins at the model."""
        self.stage.double = True
        if solver.keeps_state:
            self.problem = solver.refine()
            return solver
        self.problem = self.problem.astype(torch.float64, reuse=True)
        return self._make(self.name)

    def _take_up(self, saved: Snapshot) -> str | None:
        """Check that a checkpoint is of this solve, and stand where it stood; return the solver that wrote it.

        None where it was written before solvers had names: it is the one that is chosen by cost.
        """
        about, known_dual = saved.about, self.stage.dual
        self.stage = Stage(**about["stage"])
        self.monitor.before, self.monitor.dual = about["seconds"], about["dual"]
        self.monitor.history = [Progress(**row) for row in about["history"]]
        before, now = about.get("problem"), {"beta": self.beta, **self.identity}
        if before is None:  # written before bounds were tied to problems: its weights are a start, its bound is nothing
            self.stage.dual = self.monitor.dual = known_dual
        elif before != now:
            told = differences(before, self.identity)
            told = told or [f"another beta: {before['beta']!r} instead of {self.beta!r}"]
            raise InputError(
                f"the checkpoint is of another problem ({'; '.join(told)}): choose another folder, or delete that one "
                "to begin anew"
            )
        written_by: str | None = about.get("solver")
        if written_by is not None and self.name not in (AUTO, written_by):
            raise InputError(
                f"the checkpoint was written by solver={written_by!r} and not {self.name!r}: choose that one or "
                "another folder, or delete that folder to begin anew"
            )
        return written_by

    def _save(self, state: Resumable) -> None:
        if self.checkpoint is not None:
            self.checkpoint.offer(lambda: self._snapshot(state))

    def _snapshot(self, state: Resumable) -> Snapshot:
        shared, rows = state()
        about = {
            "stage": asdict(self.stage),
            "seconds": self.monitor.seconds(),
            "dual": self.monitor.dual,
            "history": [row.to_dict() for row in self.monitor.history],
            "problem": {"beta": self.beta, **self.identity},
            "solver": None if self.solver is None else self.solver.name,
        }
        return Snapshot(self.problem.n, about, {**shared, "generator": self.generator.get_state()}, rows)

    # -- going on -----------------------------------------------------------------------------------------------------
    def attempt(self) -> bool:
        """Advance, finish, certify and tighten once; return whether to do so again."""
        solver, stage = self.solver, self.stage
        assert solver is not None
        self.stop = solver.advance(stage.target)
        stage.attempt += 1
        if self.stop is Stop.TIME and self.checkpoint is not None:
            self.checkpoint.flush()
        reached, dual_point = solver.atoms(), solver.dual_point()
        solver.rest()
        return_freed_memory(8.0 * self.problem.n * self.problem.head.r * self.problem.c)
        self.model = finish(self.problem, reached, self._negligible, self.max_heads)
        if dual_point is None and len(self.model) < len(reached):
            dual_point = self.problem.outputs(reached)  # what is negligible in the model need not be in its gradient
        certificate = self.certificate = self._certify(dual_point)
        stage.dual = self.monitor.dual = certificate.dual  # proven, where the solver's own was an estimate
        stage.failure = certificate.failure_probability
        if certificate.converged or self.stop in (Stop.TIME, Stop.HEADS):
            return False
        if certificate.scope == "estimated" and self.stop is Stop.CONVERGED:
            self.stop = Stop.SEARCHED  # all that can be had
            return False
        return self._tighten(solver, certificate) and stage.attempt < MAX_ATTEMPTS

    def _tighten(self, solver: Solver, certificate: Certificate) -> bool:
        """Ask for more of the solver; return whether there is more to be had."""
        stage, single = self.stage, self.problem.dtype != torch.float64
        # Rounding can also hide from the solver that there is a gap at all.
        deceived = single and certificate.relative_gap > DECEIVED * stage.gap
        before, stage.gap = stage.gap, certificate.relative_gap
        if self.stop is Stop.STALLED or deceived:
            if single:
                self._refine(solver)
            return single
        # What was believed to be small enough was not: the same point must not be certified again.
        last = self.monitor.history[-1]
        believed = last.gap / abs(last.objective) if last.objective else 0.0
        if not single and believed < CHARGED * stage.gap and stage.gap > before / 2:
            self.stop = Stop.STALLED  # what is left is charged for rounding
            return False
        stage.target = min(stage.target, max(believed, 0.01 * self.tol)) / 2
        return True

    def _certify(self, dual_point: Tensor | None = None) -> Certificate:
        self.stage.share /= 2
        solver = self.solver
        return certify_atoms(
            self.problem,
            self.model,
            self.beta,
            tol=self.tol,
            known_dual=self.stage.dual,
            known_failure=self.stage.failure,
            dual_point=dual_point,
            failure_probability=self.stage.share,
            generator=self.generator,
            oracle=self.oracle,
            late=self.monitor.out_of_grace(),
            found=None if solver is None else solver.take_vectors,
        )

    # -- ending -------------------------------------------------------------------------------------------------------
    def interrupt(self) -> None:
        """Keep the model that the solver has after an exception left it in the middle of a step."""
        self.stop, self.certificate, self.monitor.interrupted = Stop.INTERRUPTED, None, True
        if self.checkpoint is not None:
            self.checkpoint.flush()
        if self.solver is not None:
            self.model = finish(self.problem, self.solver.atoms(), self._negligible, self.max_heads)

    def solution(self) -> Solution:
        """Return the model with its certificate."""
        certificate = self.certificate or self._certify()
        stop = Stop.INTERRUPTED if self.monitor.interrupted else self.stop
        if certificate.converged:
            stop = Stop.CONVERGED
        elif stop is Stop.CONVERGED:
            stop = Stop.STALLED  # by the solver's own estimate only
        return Solution(self.model, certificate, self.monitor.history, stop, self.monitor.interrupted)

    @property
    def _negligible(self) -> float:
        """The share of the nuclear norm that a model can do without."""
        return 1e-3 * min(self.tol, 1e-2)
