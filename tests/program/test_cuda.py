"""The same code on a GPU: passes agree with a CPU's, and certificates from both hold for each other's models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.baselines.trained_head import fit_by_adam
from convexhead.experiments.cells import network_scores
from convexhead.program.atoms import Atoms
from convexhead.program.operator import has_fast_bfloat16
from convexhead.solvers.increments import Increments
from passes import CASES, N, problem_on

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def weights(problem, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    block = torch.arange(7) % problem.n_blocks
    U = torch.randn(7, *problem.head.mixing_shape, generator=generator).double()
    V = torch.randn(7, *problem.value_shape, generator=generator).double()
    b = torch.randn(problem.c, generator=generator).double()
    if not problem.head.learns_mixing:
        U, V, block = torch.ones(1).double(), V[:1], block[:1]
    atoms = Atoms(U, V, block, b).to(problem.device, dtype)
    return replace(atoms, V=problem.mask_values(atoms.V, atoms.block))


@pytest.mark.parametrize(("name", "activation"), CASES)
def test_passes_are_those_of_a_cpu(name, activation):
    X = torch.randn(N, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for device in (torch.device("cpu"), CUDA):
        problem = problem_on(X, name, activation, device=device)
        atoms = weights(problem)
        value, at, _ = problem.value_and_gradient(atoms, 0.1)
        R = problem.residual(problem.outputs(atoms))
        parts = [at.U, at.V, at.intercept, R, problem.operator.adjoint_times_mixing(R, atoms.U, atoms.block)]
        if name != "linear":
            parts.append(problem.operator.adjoint_times_values(R, atoms.V, atoms.block))
        found.append((value, [part.cpu() for part in parts]))
    (on_cpu, cpu_parts), (on_gpu, gpu_parts) = found
    assert on_gpu == pytest.approx(on_cpu, rel=1e-12)
    for a, b in zip(cpu_parts, gpu_parts, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_increments_have_errors_of_the_step_alone(name, activation, pool):
    if not has_fast_bfloat16(CUDA):
        pytest.skip("needs products in bfloat16")
    X = torch.randn(N, 6, 4, generator=torch.Generator().manual_seed(0))
    problem = problem_on(X, name, activation, pool, dtype=torch.float32, device=CUDA)
    rough = problem.with_half_products()
    if rough is None or not problem.head.learns_mixing:
        pytest.skip("has no such products")
    atoms = weights(problem, torch.float32)
    passes = Increments(problem, rough, atoms)
    for step in (1e-1, 1e-3):
        near = Atoms(atoms.U * (1 + step), atoms.V * (1 - step), atoms.block, atoms.intercept)
        value, ours, _ = passes.value_and_gradient(near, 0.1)
        exact, true, _ = problem.value_and_gradient(near, 0.1)
        assert value == pytest.approx(exact, rel=0.02 * step)
        assert float((ours.U - true.U).norm() / true.U.norm()) < 0.1 * step + 1e-5
        assert float((ours.V - true.V).norm() / true.V.norm()) < 0.1 * step + 1e-5


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("name", "activation"), [*CASES, ("self-attention", "relu"), ("mlp", "relu")])
def test_certificates_hold_for_the_models_of_a_cpu(name, activation):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 6, 8)).astype(np.float32), rng.integers(0, 5, 200)
    options = {"head": name, "activation": activation, "beta_ratio": 0.3, "grid": (2, 3), "n_blocks": 2, "n_gates": 3}
    options |= {"random_state": 0, "tol": 1e-3, "max_time": 5 if activation == "relu" else None}
    gpu, cpu = (ch.ConvexHeadClassifier(device=device, **options).fit(X, y).certificate_ for device in ("cuda", "cpu"))
    if activation != "relu":
        assert gpu.converged
        assert cpu.converged
    assert gpu.dual <= cpu.primal
    assert cpu.dual <= gpu.primal


def test_a_head_trained_by_adam_on_a_gpu_scores_tokens_of_a_cpu():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(100, 6, 4)).astype(np.float32), rng.integers(0, 3, 100)
    clf = ch.ConvexHeadClassifier(head="mlp", beta_ratio=0.2, random_state=0, device="cuda")
    clf, result = fit_by_adam(clf, X, y, n_heads=4, lr=0.03, epochs=3, batch_size=32)
    scores = network_scores(result.module, X)
    np.testing.assert_allclose(scores, clf.decision_function(X), rtol=1e-4, atol=1e-5)
