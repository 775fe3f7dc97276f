"""Reductions against torch's pooling and scikit-learn's scaler and PCA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.fit_reduction import fit_reduction
from convexhead.tokens.reduce import Reduction, pool_channels, pool_grid


def tokens(n: int = 40, s: int = 6, d: int = 9, dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    scales = np.geomspace(0.01, 30, d)
    return (rng.standard_normal((n, s, d)) @ rng.standard_normal((d, d)) * scales + 5 * scales).astype(dtype)


def fit(x: np.ndarray, chunk: int = 7, **options: object) -> Reduction:
    settings = {"standardize": True, "components": None, "constant": False, **options}
    return fit_reduction((x[i : i + chunk] for i in range(0, len(x), chunk)), **settings)  # type: ignore[arg-type]


def test_pool_channels_is_adaptive_average_pooling() -> None:
    x = torch.from_numpy(tokens(d=10))
    expected = torch.nn.AdaptiveAvgPool1d(4)(x.reshape(-1, 1, 10)).reshape(40, 6, 4)
    torch.testing.assert_close(pool_channels(x, 4), expected)
    torch.testing.assert_close(pool_channels(x, 5), x.reshape(40, 6, 5, 2).mean(-1))
    with pytest.raises(InputError, match="channels=11"):
        pool_channels(x, 11)


def test_pool_grid_averages_neighbours() -> None:
    x = torch.from_numpy(tokens(n=3, s=4 * 6, d=2))
    blocks = x.reshape(3, 2, 2, 3, 2, 2).mean((2, 4)).reshape(3, 6, 2)
    torch.testing.assert_close(pool_grid(x, (4, 6), (2, 3)), blocks)
    with pytest.raises(InputError, match="token_pool"):
        pool_grid(x, (4, 6), (5, 3))


def test_standardisation_agrees_with_sklearn() -> None:
    x = tokens()
    expected = StandardScaler().fit_transform(x.reshape(-1, 9).astype(np.float64))
    np.testing.assert_allclose(fit(x).apply(x).reshape(-1, 9), expected, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e4])
def test_constant_channel_is_only_centred(offset: float) -> None:
    x = tokens()
    x[..., 3] = offset
    reduction = fit(x)
    assert reduction.scale[3] == 1
    assert np.abs(reduction.apply(x)[..., 3]).max() == 0


@pytest.mark.parametrize("standardize", [True, False])
def test_pca_agrees_with_sklearn(standardize: bool) -> None:
    x = tokens()
    flat = x.reshape(-1, 9).astype(np.float64)
    if standardize:
        flat = StandardScaler().fit_transform(flat)
    expected = PCA(4, svd_solver="full").fit_transform(flat)
    got = fit(x, standardize=standardize, components=4).apply(x).reshape(-1, 4)
    signs = np.sign((got * expected).sum(axis=0))
    np.testing.assert_allclose(got, signs * expected, atol=2e-6 * np.abs(expected).max())


def test_pca_signs_do_not_depend_on_chunks() -> None:
    x = tokens()
    bases = [fit(x, chunk, components=5).basis for chunk in (1, 7, 40)]
    for basis in bases:
        assert basis is not None
        np.testing.assert_allclose(basis, bases[0], atol=1e-5)
        assert (basis[np.abs(basis).argmax(axis=0), np.arange(5)] > 0).all()


@pytest.mark.parametrize("components", [None, 4])
def test_apply_takes_torch_and_half_precision(components: int | None) -> None:
    x = tokens(dtype=np.float16)
    reduction = fit(x, components=components, constant=True)
    y = reduction.apply(x)
    assert y.dtype == np.float32
    assert y.shape == (40, 6, reduction.channels)
    assert (y[..., -1] == 1).all()
    z = reduction.apply(torch.from_numpy(x))
    assert z.dtype == torch.float32
    np.testing.assert_allclose(z.numpy(), y, atol=1e-5)


def test_without_options_nothing_happens() -> None:
    x = tokens()
    np.testing.assert_array_equal(fit(x, standardize=False).apply(x), x)


def test_round_trip_is_exact_and_bytes_are_reproducible(tmp_path: Path) -> None:
    reduction = fit(tokens(), components=3, constant=True)
    (tmp_path / "r").write_bytes(reduction.to_bytes())
    again = Reduction.load(tmp_path / "r")
    assert again.options == reduction.options == {"standardize": True, "components": 3, "constant": True}
    assert again.to_bytes() == reduction.to_bytes()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="between 1 and the 9"):
        fit(tokens(), components=10)
    with pytest.raises(InputError, match="at least one token"):
        fit(tokens(n=0))
    with pytest.raises(InputError, match="8 channels"):
        fit(tokens()).apply(tokens(d=8))
    (tmp_path / "r").write_bytes(fit(tokens()).to_bytes()[:-4])
    for path in (tmp_path / "r", tmp_path / "none"):
        with pytest.raises(FileFormatError, match="not a stored reduction"):
            Reduction.load(path)
