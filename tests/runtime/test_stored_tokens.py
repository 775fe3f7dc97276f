"""Tokens on disk and budgets of memory change nothing but where tokens are when a pass wants them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

import convexhead as ch
from convexhead.errors import InputError
from convexhead.inputs import as_tokens, open_tokens
from convexhead.program.atoms import Atoms
from convexhead.runtime.samples import default_memory
from convexhead.runtime.stored_tokens import CHUNK_BYTES, StoredTokens, read_ahead
from convexhead.tokens import extract
from passes import CASES, C, D, N, S, passes, problem_on


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 16 * S * D * 8)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    X = np.random.default_rng(0).normal(size=(N, S, D))
    path = tmp_path_factory.mktemp("tokens") / "X.npy"
    np.save(path, X)
    return X, path


@pytest.mark.parametrize(
    ("pool", "dtype"),
    [("mean", torch.float32), pytest.param("cls", torch.float64, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("name", "activation"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0] not in ("mlp", "linear") else ()) for case in CASES],
)
def test_every_pass_is_the_same_at_every_budget(name, activation, pool, dtype, tokens):
    X, path = tokens
    whole = problem_on(torch.from_numpy(X), name, activation, pool, dtype=dtype)
    assert whole.operator.samples.complete
    expected, exact = passes(whole), passes(whole.astype(torch.float64))
    kept = set()
    for memory in (0.0, 6e3, 1e9):
        on_disk = problem_on(
            open_tokens(np.load(path, mmap_mode="r")), name, activation, pool, dtype=dtype, memory=memory
        )
        kept.add(on_disk.operator.samples.kept)
        assert isinstance(on_disk.operator.X, StoredTokens) == (memory < 1e9)
        assert on_disk.operator.samples.bytes <= max(memory, 0)
        for one, other in zip(expected, passes(on_disk), strict=True):
            torch.testing.assert_close(other, one, rtol=2e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
        for one, other in zip(exact, passes(on_disk.astype(torch.float64)), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)
        if activation == "gated-relu":
            assert torch.equal(on_disk.operator.masks, whole.operator.masks)
    assert min(kept) == 0
    assert max(kept) == N


def test_tokens_in_memory_are_prepared_as_far_as_the_budget_goes(tokens):
    X = torch.from_numpy(tokens[0])
    partly = problem_on(X, "mlp-mixer", "linear", dtype=torch.float32, memory=20.0 * S * D * 4)
    assert 0 < partly.operator.samples.kept < N
    assert 0 < partly.operator.samples.bytes <= 20.0 * S * D * 4
    for one, other in zip(
        passes(problem_on(X, "mlp-mixer", "linear", dtype=torch.float32)), passes(partly), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=2e-5, atol=1e-5)


def test_tokens_that_need_no_preparation_are_not_copied(tokens):
    X = torch.from_numpy(tokens[0])
    problem = problem_on(X, "mlp-mixer", "gated-relu")
    assert problem.operator.samples.data["X"].data_ptr() == X.data_ptr()
    assert problem.operator.samples.bytes == 0


def test_rough_products_while_streaming(tokens, monkeypatch):
    monkeypatch.setattr("convexhead.program.operator.has_fast_bfloat16", lambda device: True)
    stored = open_tokens(np.load(tokens[1], mmap_mode="r"))
    half = problem_on(stored, "self-attention", "linear", dtype=torch.float32, memory=2e3).with_half_products()
    single = problem_on(torch.from_numpy(tokens[0]), "self-attention", "linear", dtype=torch.float32)
    atoms = Atoms(torch.ones(2, D, D), torch.ones(2, D, C), torch.zeros(2, dtype=torch.int64), torch.zeros(C))
    a, b = (made.value_and_gradient(atoms, 0.1).gradient for made in (single, half))
    for one, other in ((a.U, b.U), (a.V, b.V), (a.intercept, b.intercept)):
        assert other.dtype == torch.float32
        assert float((one - other).norm() / one.norm()) < 0.03


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_memory_maps(mode, dtype, tmp_path):
    X = (10 * np.random.default_rng(0).normal(size=(N, S, D))).astype(dtype)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode=mode)
    if mode == "c":
        mapped[3] = 0  # a change in memory alone must survive
    part = open_tokens(mapped[2:]).share(slice(1, 50))
    expected = as_tokens(np.array(mapped))[3:52]
    assert part.shape == tuple(expected.shape)
    assert part.dtype == expected.dtype
    assert torch.equal(part.read(), expected)
    assert torch.equal(part[::7], expected[::7])
    assert torch.equal(part[torch.tensor([4, 0])], expected[[4, 0]])
    assert torch.equal(torch.cat([chunk for _, chunk in read_ahead(part, 5, start=3, stop=44)]), expected[3:44])


def test_bad_numbers_on_disk_are_found_when_they_are_read(tmp_path):
    X = np.random.default_rng(0).normal(size=(N, S, D)).astype(np.float32)
    X[50, 2, 1] = np.nan
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    with pytest.raises(ValueError, match="contains NaN"):
        ch.ConvexHeadClassifier("fno", max_memory=1e3).fit(mapped, np.arange(N) % 3)
    X[:] = X[0]
    np.save(tmp_path / "X.npy", X)
    with pytest.raises(InputError, match="every sample is the same"):
        ch.ConvexHeadClassifier("fno", max_memory=1e3).fit(np.load(tmp_path / "X.npy", mmap_mode="r"), np.arange(N) % 3)


def test_reading_ahead_stops_with_its_reader():
    read = []

    class Slow:
        shape, dtype = (1000, 1, 1), torch.float64

        def __len__(self):
            return 1000

        def __getitem__(self, rows):
            read.append(rows)
            return torch.zeros(rows.stop - rows.start, 1, 1)

    for _ in read_ahead(Slow(), 10):
        break
    assert len(read) <= 3


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    store = extract(
        "sklearn:digits", "patches:2", tmp_path_factory.mktemp("digits") / "store", channels=2, reduce="pca"
    )
    return store["train"]


@pytest.mark.slow
@pytest.mark.parametrize(("head", "activation"), [("self-attention", "linear"), ("mlp", "gated-relu")])
def test_a_head_trained_from_disk_is_the_head_trained_in_memory(head, activation, digits, monkeypatch):
    monkeypatch.setattr("convexhead.fitting.SMALL_TOKENS", 0)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 32e6)
    solver = {"solver": "column-generation"}
    parameters = {**solver, "activation": activation, "n_gates": 3, "beta_ratio": 0.3, "random_state": 0}
    streamed = ch.ConvexHeadClassifier(head, max_memory=1e5, **parameters).fit(digits)
    memory = ch.ConvexHeadClassifier(head, **parameters).fit(digits)
    assert streamed.certificate_.converged
    assert streamed.beta_ == pytest.approx(memory.beta_, rel=1e-9)
    bounds = [(model.certificate_.dual, model.certificate_.primal) for model in (streamed, memory)]
    assert max(dual for dual, _ in bounds) <= min(primal for _, primal in bounds)
    np.testing.assert_array_equal(streamed.predict(digits), streamed.predict(digits.read()))
    audit = ch.certify(streamed, digits, beta=streamed.beta_, random_state=0)
    assert audit.primal == pytest.approx(streamed.certificate_.primal, rel=1e-9)


@pytest.mark.slow
def test_a_relu_head_is_trained_from_disk(digits, monkeypatch):
    monkeypatch.setattr("convexhead.dual_norm.norm.WRITTEN_OUT", 0)
    monkeypatch.setattr(StoredTokens, "read", lambda tokens: pytest.fail("all tokens were read"))
    clf = ch.ConvexHeadClassifier(
        "mlp", activation="relu", beta_ratio=0.3, max_memory=1e5, max_time=5, tol=0.05, random_state=0
    )
    with pytest.warns(ConvergenceWarning, match="estimated"):
        clf.fit(digits)
    assert clf.n_heads_ > 0
    audit = ch.certify(clf, digits[:], digits.labels, beta=clf.beta_, random_state=0)
    assert audit.primal == pytest.approx(clf.certificate_.primal, rel=1e-9)


def test_what_decoding_makes_small_is_decoded_once(digits):
    assert digits.reduction.basis is not None
    stored = open_tokens(digits)
    decoded = stored.decoded()
    assert decoded is not stored
    assert torch.equal(decoded.read(), stored.read())
    assert decoded.decoded() is decoded


def test_the_default_budget_is_a_part_of_the_machine():
    assert 1e7 < default_memory(torch.device("cpu")) < 1e15


PEAK = r"""
import re, sys
from pathlib import Path
import numpy as np, torch
from convexhead.program.activations import make_activation
from convexhead.program.heads import make_head
from convexhead.inputs import open_tokens
from convexhead.program.losses import Squared
from convexhead.program.atoms import Atoms
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.certificate.certify import certify_atoms

X = np.load(sys.argv[1], mmap_mode="r")
n, s, d = X.shape
head = make_head("mlp", s, d)
operator = Operator(open_tokens(X), head, make_activation("linear", head, None), dtype=torch.float32, memory=32e6)
problem = Problem(operator, torch.zeros(n, 1, 2), Squared())

def peak():  # getrusage would count the parent's memory from before the exec
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
atoms = Atoms(torch.ones(2, d), torch.ones(2, 1, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(2))
problem.value_and_gradient(atoms, 0.1)
certify_atoms(problem, atoms, 1.0, tol=0.5, generator=torch.Generator().manual_seed(0))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_set_by_the_budget(tmp_path):
    """256 MB of tokens under a budget of 32 MB."""
    path = tmp_path / "X.npy"
    out = np.lib.format.open_memmap(path, "w+", np.float16, (8192, 128, 128))
    rows = np.random.default_rng(0).normal(size=(64, 128, 128)).astype(np.float16)
    for i in range(0, len(out), 64):
        out[i : i + 64] = rows
    del out
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150e3, "kilobytes beyond what preparation took"
