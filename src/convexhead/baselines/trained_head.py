"""The non-convex twin as a saved head: what ordinary training gives, in the form that an audit reads."""

from __future__ import annotations

from typing import Any

import torch

from convexhead.baselines.adam import TrainingResult, train_adam
from convexhead.certificate.certify import certify_atoms
from convexhead.estimators import ConvexHeadClassifier, problem_beta_max


def fit_twin(
    clf: ConvexHeadClassifier, X: Any, y: Any = None, *, n_heads: int, **options: Any
) -> tuple[ConvexHeadClassifier, TrainingResult]:
    """Give ``clf`` the weights that Adam finds for its problem, with the certificate of an audit.

    Parameters
    ----------
    clf : ConvexHeadClassifier
        Unfitted; its head, gates and β are used.
    X, y
        As for ``fit``.
    n_heads : int
        Atoms of the network.
    **options
        Of `convexhead.baselines.adam.train_adam`: ``lr``, ``epochs``, ``batch_size``, ``seed``, …
    """
    problem, generator = clf._prepare(X, y)
    clf.beta_max_ = problem_beta_max(problem, generator)
    clf.beta_ = float(clf.beta) if clf.beta is not None else clf.beta_ratio * clf.beta_max_
    result = train_adam(problem, clf.beta_, n_heads=n_heads, **options)
    atoms = result.module.to_atoms().to(problem.device, torch.float64)
    clf._keep(problem.head, problem.activation, atoms)
    clf.certificate_ = certify_atoms(problem, atoms, clf.beta_, tol=clf.tol, generator=generator)
    clf.history_ = [
        {
            "seconds": row.seconds,
            "objective": row.objective,
            "gap": row.objective - clf.certificate_.dual,
            "heads": n_heads,
        }
        for row in result.history
    ]
    clf.stop_reason_ = f"trained by {result.optimizer}"
    return clf, result
