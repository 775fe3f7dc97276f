"""The non-convex baseline meets the certified optimum from above, and says what it minimised."""

from __future__ import annotations

import math

import pytest
import torch

from convexhead.baselines.adam import SCHEDULES, make_network, train_adam, tune_learning_rate
from convexhead.baselines.passes import ProblemPasses, QueryPasses
from convexhead.certificate.certify import certify_atoms
from convexhead.drive import solve
from convexhead.errors import InputError
from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.heads import make_head
from convexhead.program.losses import make_loss
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem

N, S, D, C = 60, 6, 4, 4
CASES = [
    ("self-attention", "linear", "shared"),
    ("self-attention", "gated-relu", "shared"),
    ("mlp-mixer", "linear", "shared"),
    ("mlp-mixer", "gated-relu", "shared"),
    ("fno", "linear", "shared"),
    ("fno", "gated-relu", "shared"),
    ("block-fno", "linear", "grouped"),
    ("block-fno", "gated-relu", "shared"),
    ("mlp", "linear", "shared"),
    ("mlp", "gated-relu", "shared"),
    ("linear", "linear", "shared"),
]


def build(name, activation, outputs="shared", *, loss="cross-entropy", fit_intercept=False, **options):
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(N, S, D, generator=generator, dtype=torch.float64)
    Y = torch.nn.functional.one_hot(torch.randint(C, (N, 1), generator=generator), C).double()
    head = make_head(name, S, D, grid=(2, 3), n_blocks=2, outputs=outputs)
    gates = sample_gates(head, 4, generator) if activation == "gated-relu" else None
    activation = make_activation(activation, head, gates)
    return Problem(Operator(X, head, activation, **options), Y, make_loss(loss), fit_intercept=fit_intercept)


def beta_of(problem, ratio=0.25):
    if not problem.head.learns_mixing:
        return 0.05
    R = problem.residual(problem.outputs(problem.empty()))
    gradients = problem.operator.gradient_matrices(R, torch.arange(problem.n_blocks))
    return ratio * float(torch.linalg.matrix_norm(gradients, 2).max())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "activation", "outputs"), CASES)
def test_reaches_the_certified_optimum_from_above(name, activation, outputs):
    problem = build(name, activation, outputs)
    beta = beta_of(problem)
    solution = solve(problem, beta, tol=1e-6, generator=torch.Generator().manual_seed(0))
    assert solution.certificate.converged
    n_heads = 4 * problem.n_blocks  # min(p, q) a block would be always enough
    result = train_adam(problem, beta, n_heads=n_heads, lr=0.1, epochs=600)
    optimum = solution.certificate.primal
    for objective in (result.objective, result.convex_objective):
        assert objective >= solution.certificate.dual
        assert objective <= optimum * (1 + 1e-3)
    assert result.convex_objective <= result.objective * (1 + 1e-12)
    assert result.objective < result.history[0].objective
    audit = certify_atoms(problem, result.module.to_atoms(), beta, tol=1e-2)
    assert audit.primal == pytest.approx(result.convex_objective, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 16, 60])
@pytest.mark.parametrize("reuse", [True, False])
def test_seeded(batch_size, reuse):
    problem = build("self-attention", "gated-relu", reuse=reuse, fit_intercept=True)
    options = {"n_heads": 5, "lr": 0.03, "epochs": 7, "batch_size": batch_size}
    first, same = (train_adam(problem, 0.02, seed=1, **options) for _ in range(2))
    other = train_adam(problem, 0.02, seed=2, **options)
    assert first.objective == same.objective != other.objective
    torch.testing.assert_close(first.module.mixing, same.module.mixing, rtol=0, atol=0)
    assert first.module.intercept.abs().sum() > 0
    assert [row.epoch for row in first.history] == list(range(8))
    assert first.history[-1].objective == pytest.approx(first.objective, rel=1e-10)
    assert all(a.seconds <= b.seconds for a, b in zip(first.history, first.history[1:], strict=False))
    assert first.history[-1].seconds <= first.seconds


@pytest.mark.slow
def test_prepared_and_streamed_runs_agree():
    for name, activation in (("self-attention", "linear"), ("fno", "gated-relu")):
        runs = [
            train_adam(build(name, activation, reuse=reuse), 0.02, n_heads=6, lr=0.03, epochs=5, batch_size=16)
            for reuse in (True, False)
        ]
        assert runs[0].objective == pytest.approx(runs[1].objective, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_minibatches_descend(schedule):
    problem = build("self-attention", "linear", dtype=torch.float32)
    rows = []
    result = train_adam(
        problem,
        beta_of(problem, 0.1),
        n_heads=6,
        lr=0.02,
        epochs=90,
        batch_size=16,
        schedule=schedule,
        callback=rows.append,
    )
    assert rows == result.history
    assert len(rows) <= 42
    assert rows[-1].epoch == 90
    assert result.objective < 0.9 * rows[0].objective
    assert result.module.values.dtype == torch.float32


@pytest.mark.slow
def test_decoupled_decay_is_labelled_another_objective():
    problem = build("mlp", "linear", loss="squared")
    beta = beta_of(problem)
    options = {"n_heads": 4, "lr": 0.03, "epochs": 400}
    coupled, decoupled = (train_adam(problem, beta, weight_decay_mode=mode, **options) for mode in ("l2", "decoupled"))
    assert "different objective" in decoupled.optimizer
    assert "different objective" not in coupled.optimizer
    assert decoupled.objective > coupled.objective


@pytest.mark.slow
def test_learning_rate_is_tuned_on_what_is_asked():
    problem = build("mlp", "linear")

    def train(lr):
        return train_adam(problem, 0.02, n_heads=3, lr=lr, epochs=20)

    rates = [1e-4, 1e-1]
    tuned = tune_learning_rate(train, rates)
    assert tuned.learning_rate == 1e-1
    assert [lr for lr, *_ in tuned.scores] == rates
    assert tuned.seconds == sum(row[2] for row in tuned.scores)
    assert tune_learning_rate(train, rates, score=lambda result: result.objective).learning_rate == 1e-4


@pytest.mark.slow
def test_a_diverged_run_is_worth_nothing():
    problem = build("self-attention", "linear", loss="squared")
    result = train_adam(problem, 0.02, n_heads=3, lr=1e160, epochs=20)
    assert result.objective == result.convex_objective == math.inf
    tuned = tune_learning_rate(lambda lr: train_adam(problem, 0.02, n_heads=3, lr=lr, epochs=3), [1e160, 1e-3])
    assert tuned.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 0}, "n_heads must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": -1}, "batch_size must be"),
        ({"lr": 0.0}, "lr and beta"),
        ({"lr": math.nan}, "lr and beta"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"weight_decay_mode": "L2"}, "unknown weight_decay_mode"),
    ],
)
def test_errors(options, message):
    with pytest.raises(InputError, match=message):
        train_adam(build("mlp", "linear"), 0.1, **{"n_heads": 2, "lr": 0.1, "epochs": 1, **options})


def test_no_learning_rate():
    with pytest.raises(InputError, match="at least one"):
        tune_learning_rate(lambda lr: None, [])


# -- trained queries ---------------------------------------------------------------------------------------------------
def attentive(norm="all", *, places=True, fit_intercept=True):
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(N, S, D, generator=generator, dtype=torch.float64)
    loud = (X @ torch.randn(D, generator=generator).double()).argmax(1)  # a query can find the token that counts
    labels = (X[torch.arange(N), loud] @ torch.randn(D, C, generator=generator).double()).argmax(1)
    queries = torch.randn(3, D + S * places, generator=generator, dtype=torch.float64)
    head = make_head("attentive", S, D, queries=queries, query_norm=norm)
    operator = Operator(X, head, make_activation("linear", head, None), reuse=True)
    Y = torch.nn.functional.one_hot(labels[:, None], C).double()
    return Problem(operator, Y, make_loss("cross-entropy"), fit_intercept=fit_intercept)


@pytest.mark.parametrize("norm", ["all", "each"])
@pytest.mark.parametrize("places", [True, False])
def test_gradients_in_weights_are_those_of_the_problem_whether_or_not_queries_are_trained(norm, places):
    problem = attentive(norm, places=places)
    fixed, free = make_network(problem, 6, 0), make_network(problem, 6, 0)
    known, passes = ProblemPasses(fixed, problem), QueryPasses(free, problem)
    assert passes.objective(0.1) == pytest.approx(known.objective(0.1), rel=1e-12)
    assert passes.objectives(0.1) == pytest.approx(known.objectives(0.1), rel=1e-12)
    for index in (None, torch.tensor([3, 1, 40])):
        known.differentiate(index, 0.1)
        passes.differentiate(index, 0.1)
        for name, parameter in fixed.named_parameters():
            torch.testing.assert_close(free.get_parameter(name).grad, parameter.grad)
    before = passes.objective(0.1)
    with torch.no_grad():
        free.queries -= 1e-3 * free.queries.grad
    passes.differentiate(None, 0.1)
    assert passes.objective(0.1) < before


@pytest.mark.slow
@pytest.mark.parametrize("how", ["l2", "decoupled"])
def test_trained_queries_are_below_the_optimum_of_those_that_they_start_from(how):
    problem = attentive()
    beta = beta_of(problem, 0.1)
    solution = solve(problem, beta, tol=1e-4, generator=torch.Generator().manual_seed(0))
    options = {"n_heads": 8, "lr": 0.05, "epochs": 150, "batch_size": 20, "weight_decay_mode": how}
    result = train_adam(problem, beta, train_queries=True, **options)
    assert result.optimizer.endswith("queries trained")
    assert not torch.equal(result.module.queries, problem.head.queries)
    if how == "l2":
        assert result.objective < solution.certificate.dual  # which is for the queries of the problem
        assert result.convex_objective <= result.objective
    # What was trained is a head like any other, certified for the queries that it has now.
    own = make_head("attentive", S, D, queries=result.module.queries.detach())
    operator = Operator(problem.operator.X, own, make_activation("linear", own, None))
    its = Problem(operator, problem.Y, problem.loss, fit_intercept=True)
    certificate = certify_atoms(
        its, result.module.to_atoms(), beta, tol=1e-3, generator=torch.Generator().manual_seed(0)
    )
    assert certificate.primal == pytest.approx(result.convex_objective, rel=1e-9)


def test_heads_without_queries_say_that_they_have_none():
    with pytest.raises(InputError, match="only an attentive head has queries"):
        train_adam(build("mlp", "linear"), 0.1, n_heads=2, lr=0.1, epochs=1, train_queries=True)
