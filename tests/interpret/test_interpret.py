"""Interpretation against dense tensors, logits and planted structure."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.errors import InputError
from convexhead.interpret import (
    FittedHead,
    choose_n_clusters,
    cluster_figures,
    cluster_tokens,
    effective_rank,
    fourier_filters,
    head_contributions,
    head_lift,
    mixing_matrix,
    principal_embedding,
    query_maps,
    query_strengths,
    retained_directions,
    spectra,
    token_contributions,
    token_embedding,
)
from convexhead.interpret.spectra import AXES
from convexhead.program.activations import GatedReLU, LinearActivation, sample_gates
from convexhead.program.atoms import Atoms
from convexhead.program.heads import HEADS
from kinds import cases, head_of, pooled
from reference import attend, mix, pool, preactivation

N, S, D, C = 7, 4, 6, 3


class OwnSigns:
    """A true ReLU as far as interpretation goes: no gates, masks by the sign of each atom's own pre-activation."""

    def __init__(self, head):
        self.n_blocks = head.n_groups


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def fitted_head(name: str, activation: str = "linear", pool: str = "mean", k: int = 5) -> FittedHead:
    """A head with random weights; two blocks a channel group where gates are fixed."""
    head = head_of(name.removesuffix("-each"), S, D, pool=pool, variant="each" if name.endswith("-each") else "shared")
    k = k if head.learns_mixing else 1
    if activation == "gated-relu":
        maker = GatedReLU(head, sample_gates(head, 2, torch.Generator().manual_seed(3)))
    else:
        maker = LinearActivation(head) if activation == "linear" else OwnSigns(head)
    U = draw(k, *head.mixing_shape) if head.learns_mixing else torch.ones(1, dtype=torch.float64)
    atoms = Atoms(U, draw(k, head.value_rows, C), torch.arange(k) % maker.n_blocks, draw(C))
    return FittedHead(head, maker, atoms)


def reference_parts(fitted: FittedHead, X: np.ndarray) -> np.ndarray:
    """Contributions ``(n, s, k, c)`` from the formulas in loops."""
    head, atoms, gates = fitted.head, fitted.atoms, fitted.mask_weights()
    out = np.zeros((len(X), S, len(atoms), C))
    for i, x in enumerate(X):
        for k, (u, v) in enumerate(zip(atoms.U.numpy(), atoms.V.numpy(), strict=True)):
            group = int(atoms.block[k]) % head.n_groups
            mask = 1.0
            if gates is not None:
                mask = preactivation(head.name, x, gates[k].numpy(), head.grid, group) >= 0
            for t in range(S):
                alone = x * (np.arange(S) == t)[:, None]
                if head.name == "self-attention":
                    A = (preactivation(head.name, x, u, head.grid, group) * mask)[:, [t]]
                    part = A @ x[[t]] / S
                elif head.name == "attentive":
                    at = np.arange(S) == t
                    out[i, t, k] = (attend_at(x, u, head.queries.numpy(), int(atoms.block[k]), at) @ v)[0]
                    continue
                elif head.name == "linear":
                    part = mix("linear", alone, u, grid=head.grid)
                else:
                    part = preactivation(head.name, alone, u, head.grid, group) * mask
                out[i, t, k] = (pool(part, head.pool) @ v)[0]
    return out


def attend_at(x: np.ndarray, u: np.ndarray, queries: np.ndarray, block: int, at: np.ndarray) -> np.ndarray:
    """What the attentive head reads of one token: the maps are of all of them, and the others are made zero."""
    total = 0.0
    for j, own in {block: u}.items() if u.ndim == 1 else enumerate(u):
        weights = np.exp(x @ queries[j, :D] + queries[j, D:])
        total += float(weights @ np.where(at, x @ own, 0.0) / weights.sum())
    return np.array([[total]])


CELLS = list(dict.fromkeys(case[:2] for case in cases("linear", "gated-relu", "relu")))
CELLS.append(("attentive-each", "linear"))


# -- contributions -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "activation", "pooling"),
    [case for case in pooled(CELLS, "mean", "cls") if case != ("attentive-each", "linear", "cls")],
)
def test_contributions_are_exact_shares_of_the_logits(name, activation, pooling):
    fitted, X = fitted_head(name, activation, pooling), draw(N, S, D)
    parts = head_contributions(fitted, X)
    np.testing.assert_allclose(parts, reference_parts(fitted, X.numpy()), atol=1e-10)
    torch.testing.assert_close(token_contributions(fitted, X), parts.sum(2), rtol=0, atol=1e-10)
    gates = fitted.mask_weights()
    for i in range(N):
        logits = np.zeros(C)
        for k, (u, v) in enumerate(zip(fitted.atoms.U.numpy(), fitted.atoms.V.numpy(), strict=True)):
            gate = None if gates is None else gates[k].numpy()
            group = int(fitted.group[k])
            if fitted.head.queries is not None:
                logits += (attend(X[i].numpy(), u, fitted.head.queries.numpy(), group) @ v)[0]
                continue
            mixed = mix(name, X[i].numpy(), u, grid=fitted.head.grid, group=group, gate=gate)
            logits += (pool(mixed, pooling) @ v)[0]
        np.testing.assert_allclose(parts[i].sum((0, 1)), logits, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "activation"), [cell for cell in CELLS if cell[1] != "relu" and cell[0] != "attentive-each"]
)
def test_contributions_of_a_fitted_estimator_sum_to_its_decision_function(name, activation):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, S, D)), np.arange(60) % C
    clf = ch.ConvexHeadClassifier(
        name, activation=activation, beta_ratio=0.3, n_gates=2, n_blocks=2, fit_intercept=True, random_state=0
    ).fit(X, y)
    total = token_contributions(clf, X).sum(1).numpy() + clf.intercept_
    np.testing.assert_allclose(total, clf.decision_function(X), atol=1e-5)
    module = clf.to_module(torch.float64)
    torch.testing.assert_close(token_contributions(module, X), token_contributions(clf, X), rtol=0, atol=1e-10)


def test_contributions_of_no_samples_and_of_no_heads():
    fitted = fitted_head("self-attention")
    assert head_contributions(fitted, draw(1, S, D)[:1]).shape == (1, S, 5, C)
    nothing = FittedHead(fitted.head, fitted.activation, fitted.atoms.select(torch.zeros(0, dtype=torch.int64)))
    assert not token_contributions(nothing, draw(2, S, D)).any()
    assert effective_rank(spectra(nothing)["Z"]) == 0


@pytest.mark.parametrize(("name", "activation"), [cell for cell in CELLS if cell[1] != "relu"])
def test_lift_is_the_difference_of_class_means(name, activation):
    fitted, X, y = fitted_head(name, activation), draw(N, S, D), torch.tensor([0, 1, 0, 1, 1, 0, 0])
    logits = head_contributions(fitted, X).sum(1)
    logits = logits - logits.mean(2, keepdim=True)
    expected = torch.stack([logits[y == c, :, c].mean(0) - logits[y != c, :, c].mean(0) for c in (0, 1)], dim=1)
    strangers = torch.cat([X, draw(3, S, D)]), torch.cat([y, torch.full((3,), -1)])
    lift = head_lift(fitted, *strangers)
    torch.testing.assert_close(lift[:, :2], expected, rtol=0, atol=1e-10)
    assert not lift[:, 2].any()


# -- queries -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["attentive", "attentive-each"])
def test_maps_and_strengths_of_queries(name):
    fitted, X = fitted_head(name), draw(N, S, D)
    queries = fitted.head.queries
    scores = torch.einsum("nsd,jd->nsj", X, queries[:, :D]) + queries[:, D:].T
    torch.testing.assert_close(query_maps(fitted, X), scores.exp() / scores.exp().sum(1, keepdim=True))
    Z = torch.zeros(len(queries), D, C, dtype=torch.float64)
    for U, V, j in zip(fitted.atoms.U, fitted.atoms.V, fitted.atoms.block, strict=True):
        if U.ndim == 1:
            Z[j] += torch.outer(U, V[0])
        else:
            Z += torch.einsum("jd,c->jdc", U, V[0])
    torch.testing.assert_close(query_strengths(fitted), Z.flatten(1).norm(dim=1))
    with pytest.raises(InputError, match="only the attentive head"):
        query_maps(fitted_head("mlp"), X)


# -- spectra and filters -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "activation"), [cell for cell in CELLS if cell[0] != "linear"])
def test_spectra_are_those_of_the_dense_tensor(name, activation):
    fitted = fitted_head(name, activation)
    head, atoms = fitted.head, fitted.atoms
    found = spectra(fitted)
    # One tensor for everything that acts on the same features; every atom of a ReLU has masks of its own.
    block = torch.arange(len(atoms)) if activation == "relu" else atoms.block
    dense = torch.zeros(len(atoms), *head.mixing_shape, head.value_rows, C, dtype=torch.float64)
    for U, V, j in zip(atoms.U, atoms.V, block, strict=True):
        dense[j] += torch.tensordot(U, V, 0)
    size = head.mixing_size
    Z = torch.cat([torch.linalg.svdvals(T.reshape(size, -1)) for T in dense]).sort(descending=True).values
    _same(found.pop("Z"), Z)
    for axis, axis_name in enumerate(AXES[head.name][-(dense.ndim - 1) :]):
        if axis_name:
            _same(found.pop(axis_name), torch.linalg.svdvals(dense.movedim(axis + 1, 0).flatten(1)))
    assert not found


def test_spectra_of_the_linear_head():
    fitted = fitted_head("linear")
    expected = torch.linalg.svdvals(fitted.atoms.V[0])
    for values in spectra(fitted).values():
        _same(values, expected)


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for zeros at the end."""
    m = max(len(found), len(expected))
    found, expected = (torch.nn.functional.pad(x, (0, m - len(x))) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7)


def test_effective_rank():
    assert effective_rank(torch.ones(5, dtype=torch.float64)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    assert 1 < effective_rank(torch.tensor([1.0, 0.1])) < 2


def test_mixing_matrix():
    fitted = fitted_head("mlp-mixer")
    T = torch.einsum("kpt,kec->ptec", fitted.atoms.U, fitted.atoms.V)
    torch.testing.assert_close(mixing_matrix(fitted), T.flatten(2).norm(dim=2))


@pytest.mark.parametrize("name", ["fno", "block-fno"])
def test_fourier_filters(name):
    fitted = fitted_head(name)
    filters = fourier_filters(fitted)
    assert filters.space.shape == filters.frequency.shape == (5, 2, 2)
    torch.testing.assert_close(filters.space.square().sum((1, 2)), filters.frequency.square().sum((1, 2)))
    mean = fitted.atoms.U.sum(1) / S**0.5
    torch.testing.assert_close(filters.frequency[:, 1, 1], mean.norm(dim=1))
    torch.testing.assert_close(filters.space[:, 0, 0], fitted.atoms.U[:, 0].norm(dim=1))


# -- embedding and clusters --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in HEADS if name != "attentive"])  # its maps read all channels
def test_what_the_retained_directions_leave_out_does_not_matter(name):
    """Weights built on three of six channels: the head is the same on tokens projected on its directions."""
    fitted = fitted_head(name)
    atoms, width = fitted.atoms, D // fitted.head.n_groups
    kept = torch.diag((torch.arange(width) < width // 2).double())
    if name == "self-attention":
        atoms.U = kept @ atoms.U @ kept
    elif name in ("mlp-mixer", "linear"):
        atoms.V = kept @ atoms.V
    else:
        atoms.U = atoms.U @ kept
    A = retained_directions(fitted, energy=1.0)
    assert A.shape == (D, {"block-fno": 2}.get(name, 3))
    torch.testing.assert_close(A.T @ A, torch.eye(A.shape[1], dtype=A.dtype))
    X = draw(N, S, D)
    if name == "self-attention":  # values are read along all channels, so compare scores
        P = A @ A.T
        torch.testing.assert_close(P @ atoms.U @ P, atoms.U, rtol=0, atol=1e-9)
    else:
        projected = token_contributions(fitted, X @ A @ A.T)
        torch.testing.assert_close(projected, token_contributions(fitted, X), rtol=0, atol=1e-9)
    assert token_embedding(fitted, X, energy=1.0).shape == (N, S, A.shape[1])


EXAMPLE = Path(__file__).parents[2] / "examples" / "plot_planted_clusters.py"


@pytest.mark.slow
def test_clusters_recover_planted_groups_where_raw_features_do_not():
    result = runpy.run_path(str(EXAMPLE))["study"]()
    assert result["rank"] == result["planted_rank"]
    assert result["ari_head"] >= 0.9
    assert result["ari_raw"] <= 0.5
    assert result["n_clusters"] == 3
    figures = result["figures"]
    assert figures.silhouette.value > 0.5
    assert figures.silhouette.is_real
    assert figures.similarity_ratio.is_real
    assert figures.agreement.value > 0.9


def test_no_clusters_in_a_cloud_without_any():
    cloud = draw(40, 9, 3)
    figures = cluster_figures(cloud, 4)
    assert figures.silhouette.value == pytest.approx(figures.silhouette.permuted, abs=0.05)
    assert figures.silhouette.value < 0.35
    assert not (figures.silhouette.is_real and figures.similarity_ratio.is_real)


def test_clusters_are_numbered_by_size():
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]).double()
    which = torch.tensor([0] * 2 + [1] * 5 + [2] * 9).view(4, 4)
    clusters = cluster_tokens(centres[which] + 0.1 * draw(4, 4, 2), 3)
    assert torch.bincount(clusters.flatten()).tolist() == [9, 5, 2]
    assert (clusters == 2 - which).all()
    assert choose_n_clusters(centres[which] + 0.1 * draw(4, 4, 2), (2, 3, 4)) == 3


def test_principal_embedding():
    X = draw(N, S, D) * torch.tensor([9.0, 5.0, 1.0, 0.1, 0.1, 0.1]).double()
    flat = principal_embedding(X, 2).flatten(0, 1)
    covariance = torch.cov(flat.T)
    assert abs(covariance[0, 1]) < 1e-9 * covariance[0, 0]
    assert covariance[0, 0] > covariance[1, 1] > 1


def test_planted_rank_is_found():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(400, 6, 4))
    U, V = rng.normal(size=(2, 4, 4)), rng.normal(size=(2, 4, 3))
    teacher = np.einsum("nd,kde,nse,nsf,kfc->nc", X.mean(1), U, X, X, V, optimize=True) / 6
    y = teacher + 0.05 * teacher.std() * rng.normal(size=teacher.shape)
    reg = ch.ConvexHeadRegressor("self-attention", beta_ratio=0.05, tol=1e-6, random_state=0).fit(X, y)
    assert reg.n_heads_ == 2
    assert effective_rank(spectra(reg)["Z"]) <= 2


def test_bad_input():
    attention, mixer = fitted_head("self-attention"), fitted_head("mlp-mixer")
    for call, message in (
        (lambda: retained_directions(attention, energy=0), "energy"),
        (lambda: token_embedding(attention, torch.zeros(3, 4, 5)), "5 features"),
        (lambda: token_contributions(attention, torch.zeros(3, 5, D)), "5 tokens"),
        (lambda: cluster_tokens(torch.zeros(3, 4, 5), 1), "n_clusters=1"),
        (lambda: cluster_figures(draw(1, 4, 5), 2), "at least two"),
        (lambda: mixing_matrix(attention), "mlp-mixer"),
        (lambda: fourier_filters(mixer), "block-fno"),
        (lambda: spectra(ch.ConvexHeadClassifier()), "fit it first"),
        (lambda: token_contributions(fitted_head("mlp", pool="none"), draw(2, S, D)), "pool='mean'"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    nothing = FittedHead(
        attention.head, attention.activation, attention.atoms.select(torch.zeros(0, dtype=torch.int64))
    )
    with pytest.raises(InputError, match="retains no direction"):
        cluster_tokens(token_embedding(nothing, draw(3, S, D)), 2)
