"""Audit: how far from the global optimum are weights that anyone trained?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.exceptions import NotFittedError
from torch import Tensor

from convexhead import inputs
from convexhead.audited import Audited, of_probe, plainly, understood
from convexhead.certificate.certificate import Certificate, relative_to
from convexhead.certificate.certify import certify_atoms
from convexhead.drive import Solution, solve
from convexhead.dual_norm.query_ascent import STARTS, QueryMaxima, mean_token, price
from convexhead.errors import InputError
from convexhead.estimator_base import HeadEstimator
from convexhead.fitting import precision
from convexhead.foreign.attentive import AttentiveProbe
from convexhead.foreign.estimators import own_features
from convexhead.foreign.read import read_head
from convexhead.model import Model
from convexhead.modules import HeadModule
from convexhead.padding import Padded, as_padded, with_lengths
from convexhead.program.atoms import Atoms
from convexhead.program.heads.attentive import Attentive
from convexhead.program.heads.query_ball import QueryBall
from convexhead.program.heads.token_draw import TokenDraw
from convexhead.program.losses import Loss, make_loss
from convexhead.program.problem import Problem
from convexhead.reading import split_for, tokens_of
from convexhead.runtime.ranks import Ranks, join_ranks
from convexhead.runtime.surroundings import undisturbed
from convexhead.spec import Spec

OF_REFERENCE = "that of the reference"
"""First words of ``bound`` in a certificate whose dual value comes from a reference."""


@undisturbed()
def certify(
    weights: Any,
    X: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    beta: float | None = None,
    head: str = "self-attention",
    activation: str = "linear",
    pool: str | None = "mean",
    grid: tuple[int, int] | None = None,
    gates: Any = None,
    n_blocks: int = 4,
    outputs: str = "shared",
    queries: Any = None,
    query_norm: str = "all",
    intercept: Any = None,
    loss: str | Loss | None = None,
    tol: float = 1e-3,
    lower_bound: Certificate | None = None,
    device: str = "auto",
    random_state: int | None = None,
    distributed: bool = False,
) -> Certificate:
    """Certificate of a trained head for the convex program at weight ``beta`` on the data it was trained on.

    The gap is rigorous but rests on the dual point that the weights themselves give, which is poor for weights far
    from optimal. With a ``lower_bound`` from a fit of the same problem it is the true distance up to that fit's gap.

    What the problem is is never guessed from the weights' values: a module has an intercept if it has that parameter,
    an estimator if it was fitted with one, factors if ``intercept`` is given, be it zero or not.

    Parameters
    ----------
    weights : HeadModule, fitted estimator, Model, path, or (mixing, values)
        Factors are lists with one entry a block, ``(k, *mixing_shape)`` and ``(k, e, c)`` as in ``mixing_`` and
        ``values_``, or for a head of one block the two arrays themselves. The linear head: ``(None, coef)``. They
        need not be balanced: the certificate is for the products, whose penalty is never more than the factors'.

        Linear heads of others: a fitted ``LogisticRegression``, ``LogisticRegressionCV``, ``SGDClassifier`` with
        log loss, ``RidgeClassifier`` or ``RidgeClassifierCV`` of scikit-learn, or what has their names and attributes;
        a pipeline that ends in one, which is audited on the features that its last step sees; a `torch.nn.Linear`; a
        state dict with one linear layer; or the path of an ``.npz``, ``.safetensors`` or ``.pth`` file with such
        weights. A path of a folder is a saved model. Attentive probes of others, as modules, state dicts or files:
        learned queries, at most linear keys and values, a linear classifier. `convexhead.foreign` has their programs.
    X, y, sample_weight
        The training data, with the weights that the training had, as for `ConvexHeadClassifier.fit` (labels) or
        `ConvexHeadRegressor.fit` (float targets with ``loss`` other than cross-entropy). Labels are matched by name
        with an estimator's ``classes_``; the outputs of modules and factors are those of the sorted labels. An
        estimator of others tells its ``class_weight`` itself.
    beta : float or None
        ``β`` of the objective. For weights trained with weight decay ``λ`` in the loss ``(λ/2)‖θ‖²``, ``β = λ``.
        None: that of the model, or what follows from an estimator's ``C`` or ``alpha``. With one output for two
        classes, β is that of ``mean loss + (β/2)‖w‖²``, and twice that in the certificate, which is for two outputs.
    head, activation, pool, grid, gates, n_blocks, outputs, queries, query_norm, intercept
        What the factors are of; a module or an estimator knows. ``intercept (c,)``: the bias that was trained with
        them, None where there was none. ``pool`` says which tokens a linear head of others reads.
    loss : str, Loss or None
        None: cross-entropy, or the regressor's or estimator's own.
    tol : float
        Relative gap for ``converged``.
    lower_bound : Certificate or None
        Of the same problem at the same β, as ``certificate_`` of a fit: its ``dual`` bounds the optimum from below. A
        plain number is refused, since nothing says which problem it is of.
    distributed : bool
        Whether the processes that torchrun started share the samples; all of them get the same certificate.

    Raises
    ------
    InputError
        Shapes, labels or options that do not fit together; a lower bound of another problem, with what differs.
    """
    _check_reference(lower_bound)
    spec = Spec(
        head=head, activation=activation, loss=loss or "cross-entropy", beta=beta, pool=pool, grid=grid,
        n_blocks=n_blocks, outputs=outputs, queries=queries, query_norm=query_norm, tol=tol, device=device,
    )  # fmt: skip
    with _processes(distributed) as ranks:
        posed = _pose(weights, X, y, sample_weight, spec, loss, gates, intercept, random_state, ranks)
        return posed.agreed(lower_bound).certificate(lower_bound)


@dataclass(frozen=True, eq=False)
class MissingQuery:
    """A query that is rewarded at the optimum for the queries at hand: above 1, adding it lowers the objective.

    Attributes
    ----------
    query : Tensor (d,)
        As long as the longest of the queries at hand, at most.
    reward : float
        ``‖Σ_i φ_q(X_i) R_iᵀ‖₂ / β``. A search found it: others may be rewarded more.
    """

    query: Float[Tensor, " d"]
    reward: float


@dataclass(frozen=True, eq=False)
class Audit:
    """Two statements about a trained head, which are not to be confused.

    Attributes
    ----------
    proven : Certificate or None
        From the weights alone. Its gap bounds the distance from the optimum, and may be many times as large. None
        where a reference was given for a head that mixes tokens: one bound is then enough.
    reference : Certificate or None
        Of a certified optimum of the same problem, given or found here.
    certificate : Certificate
        The sharpest there is, with the larger of the two lower bounds.
    beta : float
        ``β`` of the certificate.
    told : str or None
        Of a head of others: the program in words.
    missing : MissingQuery or None
        Of an attentive head with one norm a query: the best query that a search found beside its own.
    """

    proven: Certificate | None
    reference: Certificate | None
    certificate: Certificate
    beta: float
    told: str | None = None
    missing: MissingQuery | None = None

    @property
    def distance(self) -> tuple[float, float] | None:
        """How far the objective lies above the optimum at least and at most, relative to the objective; None where
        there is no reference."""
        if self.reference is None:
            return None
        least = max(self.certificate.primal - self.reference.primal, 0.0)
        return relative_to(least, self.certificate.primal), self.certificate.relative_gap


@undisturbed()
def audit(
    weights: Any,
    X: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    beta: float | None = None,
    pool: str | None = "mean",
    loss: str | Loss | None = None,
    tol: float = 1e-3,
    reference: Certificate | None = None,
    find_optimum: bool = True,
    device: str = "auto",
    random_state: int | None = None,
    distributed: bool = False,
) -> Audit:
    """What is proven of a trained head from its weights alone, and its distance from a certified optimum.

    Parameters
    ----------
    weights, X, y, sample_weight, beta, pool, loss, tol, device, random_state, distributed
        As of `certify`.
    reference : Certificate or None
        As ``lower_bound`` of `certify`.
    find_optimum : bool
        Find the certified optimum where there is no reference and the gap is above ``tol``, if the head is linear or
        attentive: it is cheap there. Of an attentive head with one norm a query also search for a query that it lacks.
    """
    _check_reference(reference)
    spec = Spec(loss=loss or "cross-entropy", beta=beta, pool=pool, tol=tol, device=device)
    with _processes(distributed) as ranks:
        posed = _pose(weights, X, y, sample_weight, spec, loss, None, None, random_state, ranks)
        return _audited(posed.agreed(reference, find_optimum=find_optimum), reference, find_optimum)


def _audited(posed: _Posed, reference: Certificate | None, find_optimum: bool) -> Audit:
    """The two statements about weights and their problem."""
    head, atoms, missing = posed.problem.head, posed.atoms, None
    cheap = not head.learns_mixing or isinstance(head, Attentive)
    proven = posed.certificate(None) if not head.learns_mixing or reference is None else None
    if reference is None and cheap and find_optimum and proven is not None and not proven.converged:
        optimum = posed.optimum()
        reference, atoms = optimum.certificate, optimum.atoms
    if isinstance(head, Attentive) and find_optimum:
        missing = posed.missing(head, atoms)
    sharpest = proven if reference is None else posed.certificate(reference)
    assert sharpest is not None
    return Audit(proven, reference, sharpest, posed.beta, posed.told, missing)


@contextlib.contextmanager
def _processes(distributed: bool) -> Iterator[Ranks]:
    """Those that share the samples: if the block fails in one of them, it fails in all."""
    ranks = join_ranks() if distributed else Ranks()
    with ranks.all_or_none():
        yield ranks


@dataclass(frozen=True, eq=False)
class _Posed:
    """Weights and the problem that they are audited for; ``beta`` is the user's."""

    problem: Problem
    atoms: Atoms
    beta: float
    tol: float
    told: str | None
    seed: int | None

    def agreed(self, reference: Certificate | None, **more: bool) -> _Posed:
        """This, once all processes have the same, and the same of ``more``."""
        known = None if reference is None else reference.to_dict()
        facts = {"beta": self.beta, "tol": self.tol, "random_state": self.seed, "reference": known, **more}
        return self.problem.ranks.agree(lambda: self, lambda posed: facts)

    def certificate(self, reference: Certificate | None) -> Certificate:
        """The certificate of the weights, with the reference's bound where that is better."""
        if reference is not None:
            reference.check_is_of(self.problem.identity, self.beta)
        return certify_atoms(
            self.problem,
            self.problem.enter(self.atoms.to(self.problem.device, torch.float64)),
            self.problem.coordinates.beta(self.beta),
            tol=self.tol,
            known_dual=-math.inf if reference is None else reference.dual,
            known_failure=0.0 if reference is None else reference.failure_probability,
            known_from="" if reference is None else f"{OF_REFERENCE}: {reference.bound}",
            generator=None if self.seed is None else torch.Generator().manual_seed(self.seed),
        )

    def optimum(self) -> Solution:
        """The optimum that a solver finds, with its certificate."""
        shape = self.problem.n, *self.problem.operator.X.shape[1:]
        problem = self.problem.astype(precision(shape, self.tol, self.problem.head))
        generator = torch.Generator().manual_seed(self.seed or 0)
        return solve(problem, problem.coordinates.beta(self.beta), tol=self.tol, generator=generator)

    def missing(self, head: Attentive, atoms: Atoms) -> MissingQuery | None:
        """The best query that a search finds from those of the head and from random tokens, no longer than they are."""
        own, mean = head.queries, mean_token(self.problem.operator)
        rho = float(own.norm(dim=1).max())
        if head.query_norm != "each" or own.shape[1] != head.d or rho == 0 or not bool(mean.isfinite().all()):
            return None
        problem = self.problem.astype(torch.float64, reuse=True)
        q = problem.dual_point(problem.outputs(atoms.to(problem.device, torch.float64)))
        R = problem.losses.weigh(q) / problem.n
        ball = QueryBall(torch.eye(head.d).double(), rho, None, mean)
        known = QueryMaxima(own.new_zeros(len(own)), own, torch.zeros(len(own), dtype=torch.int64), rho)
        generator = torch.Generator().manual_seed(self.seed or 0)
        draw = TokenDraw.of(problem.operator.X, ranks=problem.ranks)
        best = price(problem.operator, ball, R, known, draw, generator, starts=STARTS // 4)
        return MissingQuery(best.z[0], float(best.values[0]) / problem.coordinates.beta(self.beta))


def _pose(
    weights: Any,
    X: Any,
    y: Any,
    sample_weight: Any,
    spec: Spec,
    loss: str | Loss | None,
    gates: Any,
    intercept: Any,
    seed: int | None,
    ranks: Ranks,
) -> _Posed:
    """Weights of any form and the problem that they are audited for."""
    weights, X = own_features(weights, as_padded(inputs.resolve_store(X)))
    told, beta, classes = None, spec.beta, None
    if isinstance(weights, (str, Path)) and Path(weights).is_dir():
        weights = Model.load(weights)
    model = as_model(weights)
    if model is not None:
        X, y, sample_weight = _images_of_training(model, X, y, sample_weight)
        beta = model.beta if beta is None else beta
    elif isinstance(weights, HeadModule):
        X = plainly(split_for(X, weights.head.name, weights.head.pool))
    elif (found := read_head(weights, X)) is not None:
        if any(given is not None for given in (gates, spec.queries, intercept)):
            raise InputError(f"gates, queries and intercept go with factors: {found.name} has its own")
        if isinstance(found, AttentiveProbe):
            X = plainly(X)
            audited = of_probe(found, tokens_of(X)[0].shape[1:])
            told = found.told(make_loss(spec.loss).name, math.nan if beta is None else beta)
            return _posed(audited, X, y, sample_weight, spec, loss, beta, told, seed, ranks)
        spec = replace(spec, head="linear", activation="linear")
        X = plainly(split_for(X, spec.head, spec.pool))
        program = found.program(X, y, sample_weight, beta=beta, loss=loss)
        weights, intercept = (None, program.coef), program.intercept
        y, sample_weight = program.y, program.sample_weight
        classes, loss, beta, told = program.classes, program.loss, program.beta, program.told
    else:
        X = plainly(split_for(X, spec.head, spec.pool))
    X = with_lengths(X)
    shape = tokens_of(X)[0].shape[1:]
    audited = understood(weights if model is None else model, spec, shape, gates, intercept)
    if classes is not None:
        audited = replace(audited, classes=classes)
    return _posed(audited, X, y, sample_weight, spec, loss, beta, told, seed, ranks)


def _posed(
    audited: Audited,
    X: Any,
    y: Any,
    sample_weight: Any,
    spec: Spec,
    loss: str | Loss | None,
    beta: float | None,
    told: str | None,
    seed: int | None,
    ranks: Ranks,
) -> _Posed:
    if beta is None:
        raise InputError("beta must be a positive number, got None: an audit is at the weight of the training")
    problem = audited.problem(X, y, sample_weight, loss, inputs.pick_device(spec.device), ranks)
    if ranks.size > 1 and seed is None:
        seed = ranks.first_does(lambda: int(np.random.default_rng().integers(2**31)))
    return _Posed(problem, audited.atoms, float(beta), spec.tol, told, seed)


def _check_reference(lower_bound: Any) -> None:
    if lower_bound is not None and not isinstance(lower_bound, Certificate):
        raise InputError(
            f"lower_bound must be a Certificate, got {type(lower_bound).__name__}: a number does not say which problem "
            "it bounds; pass certificate_ of a fit of the same problem"
        )


def as_model(weights: Any) -> Model | None:
    """The `Model` of a fitted estimator, or the model itself; None for anything else.

    Raises
    ------
    NotFittedError
        An estimator that is not fitted.
    """
    if isinstance(weights, HeadEstimator):
        if not hasattr(weights, "model_"):
            raise NotFittedError("this estimator is not fitted yet: call fit before certify")
        return weights.model_
    return weights if isinstance(weights, Model) else None


def _images_of_training(model: Model, X: Any, *parts: Any) -> tuple[Any, ...]:
    """The images that the model was trained on, and their parts of what there is one of each image of the split."""
    if isinstance(X, Padded):
        return X, *parts
    whole = inputs.plain(X, "X")
    X = model.as_trained_on(whole)
    if len(X) < len(whole):  # trained on some of the split
        parts = tuple(np.asarray(part)[X.rows] if np.ndim(part) and len(part) == len(whole) else part for part in parts)
    return X, *parts
