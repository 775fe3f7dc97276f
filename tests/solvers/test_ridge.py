"""The solver of the linear head while its models are certified."""

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
