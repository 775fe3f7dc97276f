"""Whatever a user passes is handled right or refused in words: every case ends in an `InputError` or in a fit."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

import convexhead as ch
from convexhead.program.patterns import most_cells

rng = np.random.default_rng(0)
X, LABELS, TARGETS = rng.normal(size=(20, 4, 3)), np.arange(20) % 2, rng.normal(size=20)
TABLE, TENSOR = X[:, 0], torch.tensor(X)
HOLE = np.arange(20)[:, None] == 3
FIRST = np.arange(20) == 0

GATED = {"head": "mlp", "activation": "gated-relu"}
PARAMETERS = {  # name: (refused, allowed, what else the estimator is told)
    "beta": ([np.nan, 0, -1, np.inf, True, "1", 1j, [1.0]], [None, 1, np.float32(0.1)], {}),
    "beta_ratio": ([np.nan, None, 0, True, "a", np.complex128(1)], [2.0, np.float64(0.5)], {}),
    "tol": ([np.nan, np.inf, 0, -1, None, "x", True], [1e-6], {}),
    "max_heads": ([0, -1, 1.5, np.nan, True, "a"], [None, 2, np.int64(3)], {}),
    "max_time": ([np.nan, 0, -1, "a", True, np.inf], [None, 100], {}),
    "max_memory": ([0, -1, np.nan, "1", True], [None, 1e9], {}),
    "n_gates": ([True, 0, -1, 1.5, "every", None, np.nan, np.ones(2)], [3, np.int8(2)], GATED),
    "n_blocks": ([0, 2.0, True, np.nan, None, "2", 2], [np.int64(3)], {"head": "block-fno"}),
    "grid": (
        [(-2, -2), (2.0, 2.0), (3, 3), (2,), 2, "22", "ab", (2, 2, 1), (np.nan, 4), (True, 4), (4, 0), ({}, 2), ()],
        [None, (2, 2), [2, 2], np.array([4, 1])],
        {"head": "fno"},
    ),
    "gates": (
        [
            *([[1j] * 3], np.full((2, 3), np.nan), np.full((2, 3), 1j), np.ones((2, 4)), np.ones(3), "x", [["a"]], []),
            *(np.ones((0, 3)), [[1, 2], [3]], object(), 7, {"a": 1}, scipy.sparse.eye(3)),
        ],
        [None, np.ones((2, 3)), torch.ones(2, 3, requires_grad=True), [[1, 2, 3]]],
        GATED,
    ),
    "random_state": (["a", -1, 1.5, np.nan, rng, 2**40], [None, 3, np.random.RandomState(0)], {}),
    "device": (["gpu", "cuda:99", None, 3, "meta"], ["cpu", "auto", torch.device("cpu")], {}),
    "fit_intercept": (["no", None, 2, np.nan, np.ones(2)], [True, np.True_], {}),
    "pool": (["max", 1, ["mean"]], ["mean", "cls"], {}),
    "outputs": (["x", None, 1], ["shared"], {"head": "block-fno", "n_blocks": 3}),
    "verbose": (["a", None, -1, 1.5, np.nan], [0, False], {}),
    "head": (["attn", None, 3, ["mlp"]], ["mlp"], {}),
    "activation": (["elu", None, 3], ["linear"], {}),
    "distributed": (["no", 1, None], [False], {}),
}
TOKENS = {
    "refused": {
        "mixed objects": np.array([[1, "a", None]] * 20, dtype=object),
        "complex": TABLE + 1j,
        "dates": np.array([["2020-01-01"] * 3] * 20, dtype="M8[D]"),
        "durations": np.ones((20, 3), "m8[s]"),
        "sparse": scipy.sparse.csr_matrix(TABLE),
        "sparse array": scipy.sparse.coo_array(TABLE),
        "infinity": np.where(HOLE, np.inf, TABLE),
        "NaN": np.where(HOLE, np.nan, TABLE),
        "NaN in tokens": np.where(HOLE[..., None], np.nan, X),
        "no samples": np.zeros((0, 3)),
        "no samples of tokens": np.zeros((0, 4, 3)),
        "no channels": np.zeros((20, 0)),
        "no tokens": np.zeros((20, 0, 3)),
        "a number": 3,
        "a scalar": np.float64(3),
        "a vector": TABLE[:, 0],
        "four dimensions": np.zeros((20, 2, 2, 3)),
        "ragged": [[1, 2], [3]] * 10,
        "None": None,
        "a string": "hello",
        "a dict": {"a": 1},
        "a set": {1, 2},
        "a generator": iter([1, 2]),
        "an object": object(),
        "mixed columns": pd.DataFrame({"a": range(20), "b": ["x"] * 20}),
        "dated columns": pd.DataFrame({"a": range(20), "b": pd.to_datetime(["2020-01-01"] * 20)}),
        "missing values": pd.DataFrame({"a": [None, *range(19)]}),
        "categories": pd.DataFrame({"a": pd.Categorical(["u", "v"] * 10)}),
        "a series": pd.Series(TABLE[:, 0]),
        "masked": np.ma.masked_array(TABLE, TABLE > 1),
        "masked tokens": np.ma.masked_array(X, X > 1),
        "records": np.zeros(20, dtype=[("a", float), ("b", float)]),
        "beyond float64": np.full((20, 3), np.longdouble("1e4000")),
        "sparse tensor": torch.tensor(TABLE).to_sparse(),
        "quantised tensor": torch.quantize_per_tensor(torch.tensor(TABLE).float(), 0.1, 0, torch.qint8),
        "complex tensor": torch.tensor(TABLE) + 1j,
        "conjugate tensor": (torch.tensor(TABLE) + 1j).conj(),
        "meta tensor": torch.empty(20, 3, device="meta"),
        "infinite tensor": torch.full((20, 3), torch.inf),
        "nested tensor": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
        "constant": np.ones((20, 3)),
        "one sample": TABLE[:1],
    },
    "read": {
        "booleans": TABLE > 0,
        "integers": (TABLE * 9).astype(int),
        "objects": TABLE.astype(object),
        "lists": X.tolist(),
        "arrays in a list": list(X),
        "a data frame": pd.DataFrame(TABLE, columns=list("abc")),
        "nothing masked": np.ma.masked_array(TABLE),
        "negative strides": X[::-1, ::-1, ::-1],
        "every second": np.repeat(X, 2, 2)[..., ::2],
        "Fortran's order": np.asfortranarray(X),
        "big endian": X.astype(">f8"),
        "half": X.astype(np.float16),
        "long double": X.astype(np.longdouble),
        "a matrix": np.asmatrix(TABLE),
        "a subclass": X.view(type("Own", (np.ndarray,), {})),
        "a tensor with a gradient": torch.tensor(X, requires_grad=True),
        "bfloat16": torch.tensor(X).bfloat16(),
        "float8": torch.tensor(X).to(torch.float8_e4m3fn),
        "flipped tensor": torch.tensor(X).flip(0),
        "integer tensor": torch.arange(60).view(20, 3),
        "uint8": (X * 50).astype(np.uint8),
        "very large": X * 1e200,
        "very small": X * 1e-200,
    },
}
LABEL_CASES = {
    "refused": {
        "None": [None] * 20,
        "nothing": None,
        "NaN": np.where(FIRST, np.nan, LABELS),
        "infinity": np.where(FIRST, np.inf, LABELS),
        "mixed": np.array(["a", 1] * 10, dtype=object),
        "some missing": np.array([None, "a"] * 10, dtype=object),
        "pandas' NA": pd.Series([pd.NA, 1] * 10),
        "one class": np.zeros(20),
        "too short": LABELS[:5],
        "two columns": np.ones((20, 2)),
        "bytes": np.array([b"a", b"b"])[LABELS],
        "continuous": TARGETS,
        "complex": LABELS + 1j,
        "a string": "hello",
        "a number": 3,
        "empty": [],
        "a dict": {"a": 1},
        "ragged": [[1], [1, 2]] * 10,
        "sparse": scipy.sparse.csr_matrix(LABELS),
        "meta": torch.empty(20, device="meta"),
        "masked": np.ma.masked_array(LABELS, FIRST),
    },
    "read": {
        "column": LABELS[:, None],
        "booleans": LABELS > 0,
        "strings": np.array(["a", "b"])[LABELS],
        "objects": np.array(["a", "b"], dtype=object)[LABELS],
        "floats": LABELS * 1.0,
        "series": pd.Series(LABELS),
        "categories": pd.Series(pd.Categorical(["u", "v"] * 10)),
        "tensor": torch.tensor(LABELS),
        "list": LABELS.tolist(),
        "negative strides": LABELS[::-1],
        "a class each": np.arange(20),
    },
}
TARGET_CASES = {
    "refused": {
        "None": [None] * 20,
        "nothing": None,
        "NaN": np.where(FIRST, np.nan, TARGETS),
        "infinity": np.where(FIRST, np.inf, TARGETS),
        "strings": np.array(["a", "b"])[LABELS],
        "dates": np.array(["2020-01-01", "2021-01-01"], "M8[D]")[LABELS],
        "complex": TARGETS + 1j,
        "pandas' NA": pd.Series([pd.NA, 1] * 10),
        "too short": TARGETS[:5],
        "three dimensions": np.ones((20, 2, 2)),
        "a number": 3,
        "empty": [],
        "a dict": {"a": 1},
        "sparse": scipy.sparse.csr_matrix(TARGETS),
        "meta": torch.empty(20, device="meta"),
        "masked": np.ma.masked_array(TARGETS, FIRST),
        "too large": TARGETS * 1e300,
        "too small": TARGETS * 1e-300,
    },
    "read": {
        "constant": np.full(20, 7.0),
        "zero": np.zeros(20),
        "two columns": np.stack([TARGETS, -TARGETS], 1),
        "big endian": TARGETS.astype(">f8"),
        "bfloat16": torch.tensor(TARGETS).bfloat16(),
        "with a gradient": torch.tensor(TARGETS, requires_grad=True),
        "integers": LABELS,
        "list": TARGETS.tolist(),
    },
}


def cases(table):
    return [pytest.param(value, id=name) for name, value in table.items()]


def told(message):
    assert message
    assert "\n" not in message
    assert "report" not in message


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_that_cannot_be_meant_are_refused(name):
    refused, allowed, options = PARAMETERS[name]
    for estimator, y in ((ch.ConvexHeadClassifier, LABELS), (ch.ConvexHeadRegressor, TARGETS)):
        for value in refused:
            with pytest.raises(ch.InputError) as error:
                estimator(**{"head": "mlp", **options, name: value}).fit(X, y)
            told(str(error.value))
        for value in allowed:
            assert estimator(**{"head": "mlp", **options, name: value}).fit(X, y).certificate_.converged


@pytest.mark.parametrize("tokens", cases(TOKENS["refused"]))
def test_tokens_that_cannot_be_read_are_refused(tokens):
    fitted = ch.ConvexHeadClassifier("mlp").fit(TABLE, LABELS)
    attempts = [
        lambda: ch.ConvexHeadClassifier("mlp").fit(tokens, LABELS),
        lambda: ch.ConvexHeadRegressor("mlp").fit(tokens, TARGETS),
        lambda: ch.beta_max(tokens, LABELS, head="mlp"),
        lambda: ch.regularization_path(tokens, LABELS, head="mlp"),
    ]
    if not any(tokens is TOKENS["refused"][name] for name in ("constant", "one sample")):  # these can be predicted
        attempts += [lambda: fitted.predict(tokens), lambda: ch.certify(fitted, tokens, LABELS, beta=0.1)]
    for attempt in attempts:
        with pytest.raises(ch.InputError) as error:
            attempt()
        told(str(error.value))


@pytest.mark.parametrize("tokens", cases(TOKENS["read"]))
def test_tokens_of_any_layout_are_read(tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = ch.ConvexHeadClassifier("mlp").fit(tokens, LABELS)
    assert model.certificate_.converged
    if isinstance(tokens, (torch.Tensor, list)):
        parts = tokens if isinstance(tokens, torch.Tensor) else torch.tensor(np.array(tokens))
        plain = parts.detach().double().numpy()
    else:
        plain = np.ascontiguousarray(np.array(tokens, dtype=np.float64))
    same = ch.ConvexHeadClassifier("mlp").fit(plain, LABELS)
    assert model.certificate_.primal == pytest.approx(same.certificate_.primal, rel=1e-3)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("y", cases(LABEL_CASES["refused"]))
def test_labels_that_cannot_be_read_are_refused(y, intercept):
    with pytest.raises(ch.InputError) as error:
        ch.ConvexHeadClassifier("linear", fit_intercept=intercept).fit(X, y)
    told(str(error.value))


@pytest.mark.filterwarnings("ignore:A column-vector y")
@pytest.mark.filterwarnings("ignore:The number of unique classes")
@pytest.mark.parametrize("y", cases(LABEL_CASES["read"]))
def test_labels_of_any_kind_are_read(y):
    model = ch.ConvexHeadClassifier("linear", fit_intercept=True).fit(X, y)
    assert model.certificate_.converged
    assert set(model.predict(X).tolist()) <= set(np.array(y).ravel().tolist())


@pytest.mark.parametrize("dtype", [int, float, str, np.uint8])
def test_labels_that_look_like_numbers_are_warned_of(dtype):
    tokens = np.random.default_rng(0).normal(size=(21, 2))
    with pytest.warns(UserWarning, match="The number of unique classes"):
        ch.ConvexHeadClassifier("linear").fit(tokens, (np.arange(21) % 11).astype(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ch.ConvexHeadClassifier("linear").fit(tokens, (np.arange(21) % 10).astype(dtype))


@pytest.mark.parametrize("y", cases(TARGET_CASES["refused"]))
def test_targets_that_cannot_be_read_are_refused(y):
    with pytest.raises(ch.InputError) as error:
        ch.ConvexHeadRegressor("linear").fit(X, y)
    told(str(error.value))


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("y", cases(TARGET_CASES["read"]))
def test_targets_of_any_kind_are_read(y, intercept):
    assert ch.ConvexHeadRegressor("linear", fit_intercept=intercept).fit(X, y).certificate_.converged


def test_losses_that_are_none_are_refused():
    for loss in ("mse", None, 3, object()):
        with pytest.raises(ch.InputError):
            ch.ConvexHeadRegressor("linear", loss=loss).fit(X, TARGETS)


def surrounded(name):
    return {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference mode": torch.inference_mode,
        "no gradients": torch.no_grad,
        "another device": lambda: torch.device("meta"),
    }[name]()


def results():
    model = ch.ConvexHeadClassifier("self-attention", beta_ratio=0.2, random_state=0).fit(TENSOR, LABELS)
    audit = ch.certify(model, X, LABELS, beta=model.beta_)
    gated = ch.ConvexHeadRegressor(**GATED, n_gates=3, random_state=0, fit_intercept=True).fit(X, TARGETS)
    return [
        *model.mixing_,
        model.predict_proba(X),
        audit.primal,
        audit.dual,
        gated.predict(X),
        model.to_module().values,
    ]


def equal(one, other):
    for a, b in zip(one, other, strict=True):
        a, b = (np.asarray(part.detach() if isinstance(part, torch.Tensor) else part) for part in (a, b))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["autocast", "inference mode", "no gradients", "another device"])
def test_what_torch_is_told_around_a_fit_changes_nothing(name):
    plain = results()
    with surrounded(name):
        equal(results(), plain)


def test_global_settings_of_torch_change_nothing_and_stay():
    plain = results()
    torch.set_default_dtype(torch.float64)
    try:
        equal(results(), plain)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        equal(results(), plain)
    finally:
        torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    results()
    assert torch.get_num_threads() == threads


def test_arrangements_of_no_planes_have_one_cell():
    assert most_cells(0, 3) == most_cells(-1, 2) == 1
    tall = ch.ConvexHeadClassifier("mlp", activation="relu").fit(np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]]), [0, 1])
    assert np.isfinite(tall.certificate_.primal)
