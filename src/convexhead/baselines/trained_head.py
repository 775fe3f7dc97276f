"""The head trained by Adam as a fitted estimator, in the form that an audit reads."""

from __future__ import annotations

from typing import Any

import torch

from convexhead.baselines.adam import TrainingResult, train_adam
from convexhead.certificate.certify import certify_atoms
from convexhead.estimators import ConvexHeadClassifier
from convexhead.fitting import pose


def fit_by_adam(
    clf: ConvexHeadClassifier, X: Any, y: Any = None, *, n_heads: int, **options: Any
) -> tuple[ConvexHeadClassifier, TrainingResult]:
    """The classifier with the weights that Adam finds for its problem and the certificate of an audit.

    Parameters
    ----------
    clf : ConvexHeadClassifier
        Its head, gates and β are used.
    X, y
        As for ``fit``.
    n_heads : int
        Atoms of the network.
    **options
        Of `convexhead.baselines.adam.train_adam`: ``lr``, ``epochs``, ``batch_size``, ``seed``, …
    """
    task = pose(clf, X, y)
    problem, beta = task.problem, task.beta
    result = train_adam(problem, beta, n_heads=n_heads, **options)
    atoms = result.module.to_atoms().to(problem.device, torch.float64)
    certificate = certify_atoms(problem, atoms, beta, tol=task.spec.tol, generator=task.generator, oracle=task.oracle)
    history = [
        {
            "seconds": row.seconds,
            "objective": row.objective,
            "gap": row.objective - certificate.dual,
            "heads": n_heads,
        }
        for row in result.history
    ]
    model = task.model(atoms, certificate, history, f"trained by {result.optimizer}", result.optimizer)
    return type(clf).from_model(model), result
