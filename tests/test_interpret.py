"""Spectra and clusters against dense tensors and planted structure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import convexhead as ch
from convexhead.errors import InputError
from convexhead.heads import HEADS, make_head
from convexhead.interpret import (
    choose_n_clusters,
    cluster_figures,
    cluster_tokens,
    effective_rank,
    retained_directions,
    spectra,
    token_embedding,
)
from convexhead.interpret.spectra import AXES
from convexhead.problem import Atoms


def random_atoms(head, k: int, c: int, n_blocks: int) -> Atoms:
    normal = torch.Generator().manual_seed(0)
    U = torch.randn(k, *head.mixing_shape, generator=normal, dtype=torch.float64)
    V = torch.randn(k, head.value_rows, c, generator=normal, dtype=torch.float64)
    return Atoms(U, V, torch.arange(k) % n_blocks, torch.zeros(c))


@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "linear"])
def test_spectra_are_those_of_the_dense_tensor(name, n_blocks):
    head = make_head(name, 4, 6, n_blocks=2)
    atoms = random_atoms(head, 5, 3, n_blocks)
    found = spectra(head, atoms)
    dense = torch.zeros(n_blocks, *head.mixing_shape, head.value_rows, 3, dtype=torch.float64)
    for U, V, j in zip(atoms.U, atoms.V, atoms.block, strict=True):
        dense[j] += torch.tensordot(U, V, 0)
    size = head.mixing_size
    Z = torch.cat([torch.linalg.svdvals(T.reshape(size, -1)) for T in dense]).sort(descending=True).values
    _same(found.pop("Z"), Z)
    for axis, axis_name in enumerate(AXES[name]):
        if axis_name:
            _same(found.pop(axis_name), torch.linalg.svdvals(dense.movedim(axis + 1, 0).flatten(1)))
    assert not found


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


def planted_groups(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of three groups told apart in three quiet channels, among loud channels with groups of their own.

    A sample's class is the group that most of its tokens are from: a statistic of the groups alone.
    """
    rng = np.random.default_rng(seed)
    n, s = 600, 9
    share = rng.dirichlet(np.ones(3), size=n)
    groups = np.stack([rng.choice(3, size=s, p=p) for p in share])
    quiet = np.eye(3)[groups] + 0.1 * rng.normal(size=(n, s, 3))
    loud = 4 * np.eye(4)[rng.integers(0, 4, size=(n, s))] + 0.3 * rng.normal(size=(n, s, 4))
    y = np.array([np.bincount(g, minlength=3).argmax() for g in groups])
    return np.concatenate([quiet, loud, np.ones((n, s, 1))], axis=2), y, groups


def test_clusters_recover_planted_groups_where_raw_features_do_not():
    X, y, groups = planted_groups()
    clf = ch.ConvexHeadClassifier("self-attention", beta_ratio=0.1, tol=1e-4, random_state=0).fit(X, y)
    head, atoms = clf._fitted_head(), clf._atoms()
    tokens = torch.as_tensor(X)
    embedding = token_embedding(head, atoms, tokens, energy=0.95)
    clusters = cluster_tokens(embedding, 3)
    assert adjusted_rand_score(groups.ravel(), clusters.flatten()) >= 0.9
    raw = cluster_tokens(tokens, 3)
    assert adjusted_rand_score(groups.ravel(), raw.flatten()) <= 0.5
    figures = cluster_figures(embedding, clusters)
    assert figures.silhouette > 0.5 > 0.05 > abs(figures.silhouette_random)
    assert figures.similarity_ratio > 0.5 > 0.05 > abs(figures.similarity_ratio_random)
    assert choose_n_clusters(embedding, (2, 3, 4, 5)) == 3


def test_planted_rank_is_found():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(400, 6, 4))
    U, V = rng.normal(size=(2, 4, 4)), rng.normal(size=(2, 4, 3))
    teacher = np.einsum("nd,kde,nse,nsf,kfc->nc", X.mean(1), U, X, X, V, optimize=True) / 6
    y = teacher + 0.05 * teacher.std() * rng.normal(size=teacher.shape)
    reg = ch.ConvexHeadRegressor("self-attention", beta_ratio=0.05, tol=1e-6, random_state=0).fit(X, y)
    assert reg.n_heads_ == 2
    assert effective_rank(spectra(reg._fitted_head(), reg._atoms())["Z"]) <= 2


def test_bad_input():
    head = make_head("mlp", 4, 6)
    with pytest.raises(InputError, match="self-attention"):
        retained_directions(head, random_atoms(head, 2, 3, 1))
    head = make_head("self-attention", 4, 6)
    atoms = random_atoms(head, 2, 3, 1)
    with pytest.raises(InputError, match="energy"):
        retained_directions(head, atoms, energy=0)
    with pytest.raises(InputError, match="this head takes"):
        token_embedding(head, atoms, torch.zeros(3, 4, 5))
    with pytest.raises(InputError, match="n_clusters=1"):
        cluster_tokens(torch.zeros(3, 4, 5), 1)
    nothing = atoms.select(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match="retains no direction"):
        cluster_tokens(token_embedding(head, nothing, torch.zeros(3, 4, 6)), 2)
