"""Held-out samples that many models of one head are scored on, as along a path."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from convexhead import inputs
from convexhead.estimator_base import HeadEstimator
from convexhead.fitting import Task
from convexhead.model import Model
from convexhead.padding import Padded, as_padded, with_lengths
from convexhead.program.operator import Operator

SHARE = 4
"""One over the part of the memory that training has left which held-out samples may take. Chosen by hand."""

LEAST = 1e8
"""Bytes below which nothing is kept. Chosen by hand: tokens on disk would be read in chunks of an eighth of it."""


class HeldOut:
    """Samples, and what the head of a task makes of their tokens: made for the first model, and kept where it fits.

    Parameters
    ----------
    task : Task
        Whose models are scored: they share its head and its gates.
    X, y, sample_weight
        As for ``score``.
    """

    def __init__(self, task: Task, X: Any, y: Any, sample_weight: Any = None) -> None:
        self.task, self.X, self.y, self.sample_weight = task, X, y, sample_weight
        self._operator: Operator | None = None
        self._keeps = True

    def score(self, fitted: HeadEstimator) -> float:
        """Its ``validation_score``."""
        return fitted.validation_score(self.X, self.y, self.sample_weight, outputs=self._outputs(fitted.model_))

    def _outputs(self, model: Model) -> Float[NDArray[np.float64], "n r c"] | None:
        """``f``; None where nothing is kept, and every model reads the tokens anew."""
        if self._keeps and self._operator is None:
            self._operator = self._prepared(model)
            self._keeps = self._operator is not None
        if self._operator is None:
            return None
        return self._operator.outputs(model.atoms.to(self._operator.device, torch.float64)).cpu().numpy()

    def _prepared(self, model: Model) -> Operator | None:
        """The samples prepared, some or all of them.

        None of tables, of samples with different numbers of tokens, where too little memory is left, and of arrays that
        do not fit into it: they may have to be copied to be read.
        """
        X, training = with_lengths(as_padded(model.as_fitted_on(self.X))), self.task.problem.operator
        memory = training.budget.left / SHARE
        if model.any_length or isinstance(X, Padded) or inputs.is_table(X) or memory < LEAST:
            return None
        on_disk = inputs.is_store(X) or isinstance(X, np.memmap)
        if not on_disk and torch.float64.itemsize * math.prod(np.shape(X)) > memory:
            return None
        tokens = inputs.open_tokens(X, n_channels=model.head.d, n_tokens=model.head.s)
        operator = Operator(tokens, model.head, model.activation, device=training.device, memory=memory)
        training.budget.lend(memory - operator.budget.left, operator.samples)
        return operator

    def rest(self) -> None:
        """Give the memory back, and keep nothing more."""
        self._operator, self._keeps = None, False
