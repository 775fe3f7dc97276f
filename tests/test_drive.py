"""The driver: solvers by name, precision, bounds on heads, checkpoints and interrupts, whatever solver it drives."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from convexhead import drive
from convexhead.drive import approach, solve
from convexhead.errors import InputError
from convexhead.program import problem as problems
from convexhead.program.activations import make_activation
from convexhead.program.heads import make_head
from convexhead.program.losses import Squared
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.runtime.checkpoint import MANIFEST, Checkpoint
from convexhead.solvers import NAMES, SOLVERS, Stop
from convexhead.solvers.monitor import Monitor
from convexhead.solvers.select import make_solver
from convexhead.tokens.store.manifest import digest_json
from programs import make_instance, run

CONVEX = ("fista", "group-newton", "column-generation")


def generator():
    return torch.Generator().manual_seed(0)


def relu_problem(n=12, c=1):
    rng = torch.Generator().manual_seed(3)
    X = torch.randn(n, 1, 2, generator=rng, dtype=torch.float64)
    Y = torch.randn(n, 1, c, generator=rng, dtype=torch.float64)
    head = make_head("mlp", 1, 2)
    return Problem(Operator(X, head, make_activation("relu", head, None)), Y, Squared())


# -- solvers by name --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "fno", "block-fno"])
def test_every_solver_of_a_problem_finds_its_optimum(name, dtype):
    instance = make_instance(name, "gated-relu", c=1, n=30, intercept=True, seed=4, dtype=dtype)
    truth = instance.dense.solve_fista(accuracy=1e-9)
    for solver in ("auto", *CONVEX):
        _, certificate = run(instance, tol=1e-6, solver=solver)
        assert certificate.converged, solver
        assert certificate.dual <= truth.upper
        assert truth.lower <= certificate.primal <= truth.upper * (1 + 1e-6)


def test_both_solvers_of_a_small_relu_find_its_optimum():
    problem = relu_problem()
    found = {
        solver: solve(problem, 0.02, tol=1e-3, solver=solver, generator=generator()).certificate
        for solver in ("auto", "relu-exact", "relu-search")
    }
    for certificate in found.values():
        assert certificate.scope == "global"
        assert max(other.dual for other in found.values()) <= certificate.primal
        assert certificate.converged


@pytest.mark.parametrize("seed", [8, 13, 18])
def test_a_search_that_kinks_hold_up_ends_within_their_cones(seed):
    """Without that, rounds from these seeds stalled at gaps of 0.4 to 1.1 %."""
    rng = torch.Generator().manual_seed(seed)
    certificate = solve(relu_problem(), 0.02, tol=1e-3, solver="relu-search", generator=rng).certificate
    assert certificate.scope == "global"
    assert certificate.converged


def test_the_linear_head_by_name():
    instance = make_instance("linear", intercept=True, seed=1)
    own, chosen = (run(instance, tol=1e-8, solver=solver)[1] for solver in ("ridge", "auto"))
    assert own == chosen


def test_proximal_steps_are_in_float64_whatever_the_problem():
    instance = make_instance("mlp", seed=2, dtype=torch.float32)
    inner, solver = make_solver(
        "fista", instance.problem, instance.beta, instance.problem.empty(), Monitor(),
        max_heads=None, generator=generator(),
    )  # fmt: skip
    assert inner.dtype == solver.atoms().U.dtype == torch.float64
    assert instance.problem.dtype == torch.float32


@pytest.mark.parametrize("begin", [solve, approach])
@pytest.mark.parametrize(
    ("name", "activation", "c", "solver", "max_heads", "message"),
    [
        ("mlp", "linear", 4, "group-newton", None, "needs one output.*solver='auto' or solver='fista' or solver='col"),
        ("mlp", "linear", 4, "ridge", None, "needs head='linear'.*'fista' or solver='column-generation'"),
        ("linear", "linear", 4, "fista", None, "needs a head with mixing weights.*'auto' or solver='ridge'$"),
        ("mlp", "gated-relu", 4, "relu-exact", None, "needs activation='relu'"),
        ("mlp", "gated-relu", 4, "relu-search", None, "needs activation='relu'"),
        ("mlp", "gated-relu", 4, "fista", 2, "cannot keep max_heads.* or solver='column-generation'$"),
        ("mlp", "gated-relu", 4, "newton", None, "unknown solver 'newton'.*did you mean 'group-newton'"),
    ],
)
def test_a_solver_that_cannot_solve_a_problem_says_which_can(name, activation, c, solver, max_heads, message, begin):
    instance = make_instance(name, activation, c=c, n=20)
    with pytest.raises(InputError, match=message):
        begin(
            instance.problem, instance.beta, tol=0.1, solver=solver, max_heads=max_heads, generator=generator()
        )  # fmt: skip


def test_a_relu_is_no_convex_program():
    for solver in (*CONVEX, "ridge"):
        with pytest.raises(InputError, match=r"choose solver='auto' or solver='relu-exact' or solver='relu-search'$"):
            solve(relu_problem(), 0.1, tol=0.1, solver=solver, generator=generator())


def test_features_beyond_the_memory_are_refused():
    instance = make_instance("self-attention", n=20)
    operator = instance.problem.operator
    short = Problem(
        Operator(operator.X, operator.head, operator.activation, memory=10_000.0), instance.problem.targets, Squared()
    )
    with pytest.raises(InputError, match=r"needs .* GB for dense features where max_memory leaves"):
        solve(short, instance.beta, tol=0.1, solver="fista", generator=generator())
    assert solve(short, instance.beta, tol=0.1, solver="column-generation", generator=generator()).certificate.converged


def test_names_are_those_of_the_solvers():
    assert ("auto", *SOLVERS) == NAMES
    assert all(solver.name == name for name, solver in SOLVERS.items())


# -- precision --------------------------------------------------------------------------------------------------------
def test_a_bound_on_heads_outlives_a_change_of_precision(monkeypatch):
    """In float32 rounding hides that the gap is above 1e-8; the solver that goes on in float64 keeps the bound too."""
    instance = make_instance("mlp", "gated-relu", c=1, n=40, n_gates=6, seed=2, ratio=0.2, dtype=torch.float32)
    made, rows = [], []

    def make(*args, **options):
        made.append(make_solver(*args, **options))
        return made[-1]

    monkeypatch.setattr(drive, "make_solver", make)
    solution = solve(
        instance.problem, instance.beta, tol=1e-8, max_heads=6, callback=rows.append, generator=generator()
    )
    assert [problem.dtype for problem, _ in made] == [torch.float32, torch.float64]
    assert [solver.max_heads for _, solver in made] == [6, 6]
    assert max(row.heads for row in rows) <= 6
    assert solution.certificate.converged


# -- checkpoints ------------------------------------------------------------------------------------------------------
def begun(instance, folder, solver="auto", rows=3):
    """A solve that ends after some rows of its history, and leaves a checkpoint."""

    class Ended(Exception):
        pass

    seen = []

    def end(row):
        seen.append(row)
        if len(seen) == rows:
            raise Ended

    with pytest.raises(Ended):
        solve(
            instance.problem, instance.beta, tol=1e-9, solver=solver, callback=end, generator=generator(),
            checkpoint=Checkpoint(folder, {}, minutes=0.0),
        )  # fmt: skip


def resume(instance, folder, **options):
    checkpoint = Checkpoint(folder, {}, minutes=0.0)
    return solve(
        instance.problem, instance.beta, tol=1e-9, generator=generator(), checkpoint=checkpoint, **options
    )  # fmt: skip


@pytest.mark.parametrize("solver", CONVEX)
def test_a_checkpoint_goes_on_with_the_solver_that_wrote_it(solver, tmp_path):
    instance = make_instance("mlp", "gated-relu", c=1, n=30, seed=4)
    calm = solve(instance.problem, instance.beta, tol=1e-9, solver=solver, generator=generator())
    begun(instance, tmp_path / "c", solver)
    other = "fista" if solver != "fista" else "column-generation"
    with pytest.raises(InputError, match=f"was written by solver={solver!r} and not {other!r}: choose that one"):
        resume(instance, tmp_path / "c", solver=other)
    resumed = resume(instance, tmp_path / "c")  # "auto" would choose another one by itself
    assert resumed.certificate == calm.certificate
    assert torch.equal(resumed.atoms.U, calm.atoms.U)


def test_a_checkpoint_from_before_solvers_had_names_goes_on(tmp_path):
    instance = make_instance("mlp", "gated-relu", c=1, n=30, seed=4)
    calm = solve(instance.problem, instance.beta, tol=1e-9, generator=generator())
    begun(instance, tmp_path / "c")
    path = tmp_path / "c" / MANIFEST
    document = json.loads(path.read_text())
    del document["about"]["solver"], document["checksum"]
    path.write_text(json.dumps({**document, "checksum": digest_json(document)}))
    assert resume(instance, tmp_path / "c").certificate == calm.certificate


# -- interrupts -------------------------------------------------------------------------------------------------------
def test_ctrl_c_while_tokens_are_hashed_leaves_an_honest_model(monkeypatch):
    identify = problems.identify
    monkeypatch.setattr(problems, "identify", lambda problem: signal.raise_signal(signal.SIGINT) or identify(problem))
    instance = make_instance("self-attention", n=30)
    truth = instance.dense.solve_fista(accuracy=1e-6)
    solution = solve(instance.problem, instance.beta, tol=1e-9, solver="column-generation", generator=generator())
    assert solution.interrupted
    assert solution.stop is Stop.INTERRUPTED
    assert solution.certificate.identity == identify(instance.problem)
    assert solution.certificate.dual <= truth.upper
    assert solution.certificate.primal >= truth.lower
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
