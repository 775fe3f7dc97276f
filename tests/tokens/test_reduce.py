"""Reductions against torch's pooling and scikit-learn's scaler and PCA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.fit_reduction import FLOOR, add_metric, fit_reduction
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float16, ">f2", np.float32, np.float64])
@pytest.mark.parametrize("view", ["whole", "strided", "reversed", "read-only"])
def test_apply_is_numpy_arithmetic_to_the_bit(dtype: type, view: str) -> None:
    reduction, x = fit(tokens()), tokens().astype(dtype)
    x = {"strided": x[:, ::2], "reversed": x[::-1]}.get(view, x)
    x.flags.writeable = view != "read-only"
    before = x.copy()
    expected = (x.astype(np.float32) - reduction.mean) * reduction.scale
    np.testing.assert_array_equal(reduction.apply(x), expected)
    np.testing.assert_array_equal(x, before)


def test_without_options_nothing_happens() -> None:
    x = tokens()
    np.testing.assert_array_equal(fit(x, standardize=False).apply(x), x)


def test_round_trip_is_exact_and_bytes_are_reproducible(tmp_path: Path) -> None:
    reduction = fit(tokens(), components=3, constant=True)
    (tmp_path / "r").write_bytes(reduction.to_bytes())
    again = Reduction.load(tmp_path / "r")
    assert again.options == reduction.options == {"standardize": True, "components": 3, "constant": True}
    assert again.to_bytes() == reduction.to_bytes()


@pytest.mark.parametrize("whiten", [0.3, 1])
@pytest.mark.parametrize("options", [{}, {"standardize": False}, {"components": 4, "constant": True}])
def test_the_metric_is_a_power_of_the_second_moment(options: dict[str, object], whiten: float) -> None:
    x = tokens() / np.geomspace(0.1, 30, 9).astype(np.float32)  # every direction is above the floor
    plain = fit(x, **options)
    y = plain.apply(x).reshape(240, -1).astype(np.float64)
    y, ones = (y[:, :-1], y[:, -1:]) if plain.constant else (y, y[:, :0])
    expected = np.hstack([y @ fractional_matrix_power(y.T @ y / len(y), -whiten / 2), ones])
    at_once, after = fit(x, **options, whiten=whiten), add_metric(plain, iter([plain.apply(x)]), whiten)
    for reduction in (at_once, after):
        assert reduction.options == {**plain.options, "whiten": whiten}
        assert reduction.identity != plain.identity
        got = reduction.apply(x)
        np.testing.assert_allclose(got.reshape(240, -1), expected, atol=2e-3 * np.abs(expected).max())
        np.testing.assert_allclose(reduction.apply(torch.from_numpy(x)).numpy(), got, atol=1e-3)


def test_no_metric_is_no_change() -> None:
    x = tokens()
    assert fit(x, whiten=0).identity == fit(x).identity == add_metric(fit(x), iter([fit(x).apply(x)]), 0.0).identity


def test_directions_of_rounding_are_not_blown_up() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 6, 3))
    x = np.concatenate([x, x[..., :1] + 1e-5 * rng.standard_normal((40, 6, 1)), np.zeros((40, 6, 1))], axis=-1)
    reduction = fit(x, whiten=1)
    scales = np.linalg.svd(reduction.basis, compute_uv=False)  # type: ignore[call-overload]
    largest = np.linalg.eigvalsh(np.cov(StandardScaler().fit_transform(x.reshape(-1, 5)).T, bias=True))[-1]
    np.testing.assert_allclose(scales.max(), (FLOOR * largest) ** -0.5, rtol=1e-3)
    assert (reduction.apply(x)[..., 4] == 0).all()
    assert (fit(np.zeros((3, 2, 4)), whiten=1).apply(np.zeros((3, 2, 4))) == 0).all()


def test_a_metric_that_is_none() -> None:
    x = tokens()
    for whiten in (-0.1, 1.01, float("nan"), True, "0.5"):
        with pytest.raises(InputError, match="whiten must be a number from 0"):
            fit(x, whiten=whiten)
    with pytest.raises(InputError, match="whitened already"):
        add_metric(fit(x, whiten=0.5), iter([x]), 0.5)


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
