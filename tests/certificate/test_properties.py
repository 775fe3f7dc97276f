"""No certificate is ever better than the truth: random problems, solved well, badly and not at all.

What is compared is rigorous in both directions. The optimum ``P*`` is bracketed by the oracle, which shares no
code with the library: the objective of any point, whoever found it, is ``≥ P*``; the oracle's own dual value there
is ``≤ P*``. So

    dual ≤ upper                     must hold of every honest certificate, and
    primal − upper ≤ tol |primal|    of every converged one, as primal − upper ≤ primal − P*;

and because the bracket is narrow (that is asserted, too) a lie larger than its width is caught.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import convexhead.certificate.certify
import oracle
from convexhead.certificate.certify import Certificate, certify_atoms
from convexhead.drive import solve
from convexhead.program.atoms import Atoms
from convexhead.program.losses import Huber, Loss, make_loss
from convexhead.solvers.monitor import Monitor
from programs import CASES, LOSSES, POOLS, Instance, make_instance

ROUNDING = 1e-14
"""Relative error of an objective recomputed in float64."""
random_problems = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Draw:
    """How one random problem is made and solved."""

    case: tuple[str, str, str]
    options: dict[str, object]
    tol: float
    large: bool
    krylov: bool
    max_heads: int | None = None
    max_time: float | None = None

    @property
    def seed(self) -> int:
        return self.options["seed"]

    def instance(self) -> Instance:
        return make_instance(*self.case, **self.options)

    @property
    def solver(self) -> str:
        """The solver of large problems, which one of this size would not meet by itself, or its own."""
        return "column-generation" if self.large and self.case[0] != "linear" else "auto"

    @contextlib.contextmanager
    def routes(self) -> Iterator[None]:
        """The certificate that a problem of this size would not meet by itself."""
        with pytest.MonkeyPatch.context() as patch:
            if self.krylov:
                patch.setattr(convexhead.certificate.certify, "worth_decomposing", lambda *_: False)
            yield


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr(Monitor, "out_of_time", ticking)


def ticking(monitor: Monitor) -> bool:
    """A clock on which every question takes a millisecond: what a solve does must not depend on the machine."""
    monitor.before += 1e-3
    return monitor.max_time is not None and monitor.before > monitor.max_time


def powers_of_ten(low: float, high: float) -> st.SearchStrategy[float]:
    """From ``10^low`` to ``10^high``."""
    return st.floats(low, high).map(lambda x: 10**x)


def draws(*, truncated: bool) -> st.SearchStrategy[Draw]:
    """Every head, loss, pool; tokens from 1e-2 to 1e2; tolerances 1e-5 to 1e-1; both routes of everything."""
    options = st.fixed_dictionaries(
        {
            "pool": st.sampled_from(POOLS),
            "loss": st.sampled_from(LOSSES),
            "intercept": st.booleans(),
            "n": st.integers(3, 9),
            "grid": st.sampled_from([(2, 1), (3, 1), (2, 2)]),
            "d": st.sampled_from([2, 4]),
            "c": st.just(2),
            "ratio": powers_of_ten(-1.7, 0.08),
            "scale": powers_of_ten(-2, 2),
            "target_scale": powers_of_ten(-1, 1),
            "dtype": st.sampled_from([torch.float32, torch.float64]),
            "seed": st.integers(0, 2**31),
        }
    )
    limits = {
        "max_heads": st.sampled_from([None, 1, 2]),
        "max_time": st.sampled_from([None, 0.0, 0.003]),
    }
    return st.builds(
        Draw,
        case=st.sampled_from(CASES),
        options=options,
        tol=powers_of_ten(-5, -1),
        large=st.booleans(),
        krylov=st.booleans(),
        **(limits if truncated else {}),
    )


def find_optimum(instance: Instance, start: Atoms) -> oracle.Bracket:
    """A narrow bracket of the optimum; the library may propose points, only the oracle judges them."""
    program = instance.dense
    proposal = solve(
        instance.problem.astype(torch.float64, reuse=True),
        instance.beta,
        tol=1e-7,
        max_time=0.25,
        start=start,
        generator=torch.Generator().manual_seed(1),
    )
    bracket = program.bracket(instance.point(proposal.atoms))
    if bracket.accuracy > 1e-6:
        better = program.solve_fista(accuracy=1e-7, start=bracket.point, max_iterations=1000)
        bracket = oracle.Bracket(better.point, max(better.lower, bracket.lower), min(better.upper, bracket.upper))
    assert bracket.accuracy <= 1e-4, "the optimum is not known well enough to tell a lie"
    return bracket


def assert_honest(certificate: Certificate, atoms: Atoms, instance: Instance, truth: oracle.Bracket, tol: float):
    """Everything that a certificate says of ``atoms``."""
    own = instance.dense.objective(instance.point(atoms))
    best = min(truth.upper, own)
    rounding = ROUNDING * (abs(certificate.primal) + abs(best))
    assert certificate.primal == pytest.approx(own, rel=1e-11, abs=1e-300)
    assert certificate.dual <= best + rounding
    assert certificate.primal >= truth.lower - rounding
    assert certificate.gap >= certificate.primal - best - rounding
    assert certificate.gap == pytest.approx(certificate.primal - certificate.dual, abs=rounding)
    assert certificate.converged == (certificate.relative_gap <= tol)
    if certificate.converged:
        assert certificate.primal - best <= tol * abs(certificate.primal) + rounding


FAR_INTERCEPT = Draw(
    case=("fno", "linear", "shared"),
    options={
        "pool": "none", "loss": "cross-entropy", "intercept": True, "n": 3, "grid": (2, 2), "d": 2, "c": 2,
        "ratio": 0.1**1.5, "scale": 1.0, "target_scale": 1.0, "dtype": torch.float32, "seed": 128,
    },
    tol=0.1,
    large=False,
    krylov=False,
)  # fmt: skip
"""An intercept of 5.7 where targets are of size 1: what it had not settled looked small to the solver."""


@pytest.mark.slow
@settings(random_problems, max_examples=120)
@given(draws(truncated=False))
@example(FAR_INTERCEPT)
def test_solves_are_honest(drawn):
    check_solve(drawn)


@pytest.mark.slow
@settings(random_problems, max_examples=70)
@given(draws(truncated=True))
def test_truncated_solves_are_honest(drawn):
    check_solve(drawn)


def check_solve(drawn: Draw) -> None:
    """One solve by the drawn route, judged by the oracle."""
    instance = drawn.instance()
    # The Krylov bound is not meant for matrices this small and may never be tight enough to end a solve.
    max_time = 0.1 if drawn.krylov and drawn.max_time is None else drawn.max_time
    with drawn.routes():
        solution = solve(
            instance.problem,
            instance.beta,
            tol=drawn.tol,
            solver=drawn.solver,
            max_heads=drawn.max_heads,
            max_time=max_time,
            generator=torch.Generator().manual_seed(drawn.seed),
        )
    truth = find_optimum(instance, solution.atoms)
    assert_honest(solution.certificate, solution.atoms, instance, truth, drawn.tol)
    if drawn.max_heads is not None and instance.problem.head.learns_mixing:
        assert len(solution.atoms) <= drawn.max_heads
    if drawn.max_heads is None and drawn.max_time is None and not drawn.krylov:
        assert solution.certificate.converged


@pytest.mark.slow
@settings(random_problems, max_examples=150)
@given(draws(truncated=False), st.integers(0, 6), st.floats(-3, 1), st.booleans())
def test_certificates_of_random_weights_are_honest(drawn, k, log_size, at_zero):
    """Unbalanced, redundant, far from any optimum: an audit must be right about them as well."""
    instance, size = drawn.instance(), 10**log_size
    problem = instance.problem.astype(torch.float64)
    generator = torch.Generator().manual_seed(drawn.seed)

    def normal(*shape: int) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator, dtype=torch.float64)

    atoms = problem.empty()
    if problem.head.learns_mixing:
        block = torch.randint(problem.n_blocks, (k,), generator=generator)
        U, V = (
            normal(k, *problem.head.mixing_shape),
            problem.mask_values(normal(k, *problem.value_shape), block),
        )
        if k > 2:
            U[1], V[1], block[1] = U[0], V[0], block[0]  # one atom twice, and one that does nothing
            U[2] = 0
        atoms = replace(atoms, U=U, V=V, block=block)
    else:
        atoms.V = normal(*atoms.V.shape)
    if problem.fit_intercept and not at_zero:
        atoms.intercept = normal(problem.c)
    with drawn.routes():
        certificate = certify_atoms(
            instance.problem, atoms, instance.beta, tol=drawn.tol, generator=generator, max_steps=40
        )
    assert_honest(certificate, atoms, instance, find_optimum(instance, problem.empty()), drawn.tol)


# -- the losses --------------------------------------------------------------------------------------------
losses = st.sampled_from([make_loss(name) for name in LOSSES] + [Huber(0.3), Huber(4.0)])


def loss_case(loss: Loss, seed: int, size: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs, targets, and a point in the domain of the conjugate, each ``(n, r, c)``."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 6, size=3))
    f, y, g = size * rng.normal(size=shape), size * rng.normal(size=shape), rng.normal(size=shape)
    if loss.name == "cross-entropy":
        y = rng.dirichlet(np.ones(shape[2]), size=shape[:2]) if seed % 2 else np.eye(shape[2])[f.argmax(-1) // 2]
        g = rng.dirichlet(np.full(shape[2], 0.5), size=shape[:2]) - y
    elif loss.name == "binary-cross-entropy":
        y = rng.random(shape) if seed % 2 else (f > 0).astype(float)
        g = rng.random(shape) - y
    elif isinstance(loss, Huber):
        g = loss.delta * np.tanh(g)
    return torch.as_tensor(f), torch.as_tensor(y), torch.as_tensor(g)


@settings(random_problems, max_examples=100)
@given(losses, st.integers(0, 2**31), st.floats(-2, 1.5))
def test_conjugates_keep_the_fenchel_young_inequality(loss, seed, log_size):
    f, y, g = loss_case(loss, seed, 10**log_size)
    inner = (f * g).sum((1, 2))
    slack = loss.value(f, y) + loss.conjugate(g, y) - inner
    scale = 1 + loss.value(f, y).abs() + inner.abs() + (g * y).abs().sum((1, 2))
    assert (slack >= -1e-13 * scale).all()
    residual = loss.residual(f, y)
    touching = loss.value(f, y) + loss.conjugate(residual, y) - (f * residual).sum((1, 2))
    size = 1 + loss.value(f, y) + (f * residual).abs().sum((1, 2)) + (residual * y).abs().sum((1, 2))
    assert (touching.abs() <= 1e-12 * size).all()


@settings(random_problems, max_examples=60)
@given(losses, st.integers(0, 2**31))
def test_conjugates_are_the_supremum(loss, seed):
    """``ℓ*(g) = sup_f ⟨g, f⟩ − ℓ(f)``: reached from below by ascent: no conjugate is too small either."""
    _, y, g = loss_case(loss, seed, 1.0)
    g = 0.9 * g  # inside the domain, where the supremum is attained
    f = torch.zeros_like(y, requires_grad=True)
    ascent = torch.optim.LBFGS(
        [f], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        ascent.zero_grad()
        value = (loss.value(f, y) - (f * g).sum((1, 2))).sum()
        value.backward()
        return value

    ascent.step(closure)
    found = -(loss.value(f, y) - (f * g).sum((1, 2))).detach()
    torch.testing.assert_close(loss.conjugate(g, y), found, rtol=1e-6, atol=1e-6)


@settings(random_problems, max_examples=60)
@given(losses, st.integers(0, 2**31), st.floats(-2, 1))
def test_outside_its_domain_a_conjugate_is_infinite(loss, seed, log_far):
    _, y, g = loss_case(loss, seed, 1.0)
    if loss.name == "squared":
        assert loss.scaled_domain(y, y) == float("inf")
        return
    far = 10**log_far
    g[-1, -1, -1] = -loss.delta * (1 + far) if isinstance(loss, Huber) else -y[-1, -1, -1] - far
    assert loss.conjugate(g, y)[-1] == torch.inf
    assert torch.isfinite(loss.conjugate(0 * g, y)).all()


@settings(random_problems, max_examples=60)
@given(losses, st.integers(0, 2**31), st.floats(-2, 1))
def test_residuals_may_be_scaled_within_the_domain_that_the_loss_states(loss, seed, log_size):
    f, y, _ = loss_case(loss, seed, 10**log_size)
    limit = loss.scaled_domain(f, y)
    assert limit >= 1
    for tau in (0.0, 0.3, 1.0, min(limit, 5.0), min(limit, 50.0)):
        assert torch.isfinite(loss.conjugate(tau * loss.residual(f, y), y)).all()


@settings(random_problems, max_examples=60)
@given(losses, st.integers(0, 2**31))
def test_residuals_and_hessians_are_derivatives(loss, seed):
    f, y, _ = loss_case(loss, seed, 2.0)
    if isinstance(loss, Huber):  # keep away from the kinks of its derivative
        t = (f - y).abs()
        f = torch.where((t - loss.delta).abs() < 1e-3, y, f)
    h = 1e-5
    numerical = torch.zeros_like(f)
    for index in np.ndindex(*f.shape):
        e = torch.zeros_like(f)
        e[index] = h
        numerical[index] = ((loss.value(f + e, y) - loss.value(f - e, y)) / (2 * h))[index[0]]
    torch.testing.assert_close(loss.residual(f, y), numerical, rtol=1e-6, atol=1e-8)
    columns = [
        (loss.residual(f + h * e, y) - loss.residual(f - h * e, y)).sum((0, 1)) / (2 * h)
        for e in torch.eye(f.shape[-1], dtype=f.dtype)
    ]
    torch.testing.assert_close(loss.summed_hessian(f, y, None), torch.stack(columns), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        loss.summed_hessian(f, y, None), Loss.summed_hessian(loss, f, y, None), rtol=1e-9, atol=1e-12
    )
