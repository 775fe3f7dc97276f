"""One run of scnn (`pip install pyscnn`), in an environment of its own: python scnn_worker.py IN.npz OUT.npz

IN: ``X (n, d)`` with columns of norm 1, ``y (n,)``, gates ``G (d, J)``, ``lam``, ``tol``, ``max_iters``. scnn minimises

    (1/2n) ‖Σ_j D_j X w_j − y‖² + λ Σ_j ‖w_j‖₂,      D_j = diag(1[X g_j > 0])

OUT: ``weights (J, d)`` in the order of the gates ``G``, ``seconds`` of the whole call, and scnn's own ``objectives``
with the seconds ``times`` at which it noted them.
"""

import sys
import time

import numpy as np
from scnn.metrics import Metrics
from scnn.models import ConvexGatedReLU
from scnn.optimize import optimize_model
from scnn.regularizers import NeuronGL1
from scnn.solvers import RFISTA


def main() -> None:
    given = np.load(sys.argv[1])
    X, y, G = given["X"], given["y"], given["G"]
    model = ConvexGatedReLU(G, c=1, bias=False)
    solver = RFISTA(model, max_iters=int(given["max_iters"]), tol=float(given["tol"]))
    began = time.perf_counter()
    # Columns have norm 1 already: with `unitize_data` the penalty would be that of another problem.
    fitted, metrics = optimize_model(
        model,
        solver,
        Metrics(metric_freq=10),
        X,
        y,
        regularizer=NeuronGL1(float(given["lam"])),
        return_convex=True,
        unitize_data=False,
        dtype="float64",
    )
    seconds = time.perf_counter() - began
    weights = np.asarray(fitted.parameters[0])[0].astype(np.float64)
    np.savez(
        sys.argv[2],
        weights=weights,
        G=np.asarray(fitted.G),
        seconds=seconds,
        objectives=np.asarray(metrics.objective, dtype=np.float64),
        times=np.asarray(metrics.time, dtype=np.float64),
    )


if __name__ == "__main__":
    main()
