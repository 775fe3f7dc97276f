"""The solver of the linear head while its models are certified."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import convexhead as ch
from convexhead.fitting import pose
from convexhead.solvers.base import Stop
from convexhead.solvers.monitor import Monitor
from convexhead.solvers.ridge import RidgeNewton

X, Y = (part[:300] for part in load_digits(return_X_y=True))
SETTINGS = {"head": "linear", "fit_intercept": True, "random_state": 0}


def test_outputs_that_were_given_up_are_made_again():
    problem = pose(ch.ConvexHeadClassifier(beta=1e-3, **SETTINGS), X / 16, Y, to_solve=True).problem
    solver = RidgeNewton(problem, 1e-3, problem.empty(), Monitor(None, None, problem.ranks))
    assert solver.advance(1e-2) is Stop.CONVERGED
    before = solver.monitor.history[-1].objective
    _, rows = solver.state()
    solver.rest()
    assert not solver.state()[1]["outputs"].numel()
    solver.begin()
    torch.testing.assert_close(solver.state()[1]["outputs"], rows["outputs"], rtol=1e-5, atol=1e-5)
    solver.rest()
    assert solver.advance(1e-5) is Stop.CONVERGED
    assert 0 < before - solver.monitor.history[-1].objective < 1e-2 * before


def test_an_estimate_that_an_objective_refutes_is_forgotten():
    monitor = Monitor()
    assert monitor.record(10.0, 8.0, 1) == 0.2
    assert monitor.record(5.0, 1.0, 1) == 0.8
    assert monitor.record(4.0, 3.0, 1) == 0.25
    assert monitor.record(4.0, 2.0, 1) == 0.25  # the better of two that nothing refutes


@pytest.mark.parametrize(("seed", "ratio"), [(17, 0.3), (36, 0.3), (57, 0.3)])
def test_far_from_its_targets_hubers_loss_is_solved(seed, ratio):
    """Most residuals are on the straight parts: what an intercept leaves of their sum costs more than is estimated."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((13 + seed % 3 * 60, 7)) * 60
    y = X @ rng.standard_normal((7, 6)) + rng.standard_normal((len(X), 6)) + 1000 * (seed % 2)
    weights = rng.uniform(0, 3, len(X))
    model = ch.ConvexHeadRegressor("linear", loss="huber", fit_intercept=True, beta_ratio=ratio, tol=1e-4)
    assert model.set_params(random_state=0).fit(X, y, weights).certificate_.converged
