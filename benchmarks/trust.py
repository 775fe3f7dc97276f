"""An attack on certificates: random problems of every kind, made to break them, each checked by independent means.

    python benchmarks/trust.py [--problems 20000] [--seconds 3600] [--workers 2] [--kind convex relu …]

Writes benchmarks/results/trust.csv: for each kind how many problems were tried, certified, honest without being
certified, refused in words, crashed, hung, and false. A bound is false where it lies above a value that anybody
attains, by a search in benchmarks/attained.py or by the library itself, evaluated in extended precision. A trial is
known by its kind and seed: ``--kind relu --first 17 --problems 1 --show`` makes one again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import convexhead as ch
from attained import Program, Weights, objective, search
from common import cpu_name, versions, write_csv
from convexhead.errors import ConvexHeadError
from convexhead.padding import Padded

HEADS = ("self-attention", "mlp-mixer", "fno", "block-fno", "mlp", "linear", "attentive")
PATIENCE, BRIEF = 60, 0.7
"""Seconds of a processor after which a trial hangs, and seconds after which its fit is told to end.

A trial that waits and computes nothing hangs after ten times as many seconds by the clock."""
OUTCOMES = ("certified", "honest", "refused", "crashed", "hung", "false")


class Hung(Exception):
    """A trial took longer than `PATIENCE`."""


# -- what problems are made of -----------------------------------------------------------------------------------------
def tokens(rng: np.random.Generator, n: int, s: int, d: int) -> tuple[np.ndarray, str]:
    """Tokens of one of many geometries, and its name."""
    X = rng.normal(size=(n, s, d))
    kind = str(rng.choice(GEOMETRIES))
    if kind == "offset":
        X = X + 10.0 ** rng.integers(1, 15) * rng.choice([1.0, rng.normal()], size=d)
    elif kind == "scale":
        X = X * 10.0 ** rng.integers(-12, 13)
    elif kind == "unequal channels":
        X = X * 10.0 ** rng.uniform(-6, 6, size=d)
    elif kind == "unequal samples":
        X = X * 10.0 ** rng.uniform(-6, 6, size=(n, 1, 1))
    elif kind == "outlier":
        X[rng.integers(n)] *= 10.0 ** rng.integers(3, 12)
    elif kind == "integers":
        X = np.round(X)
    elif kind == "duplicates":
        X = X[rng.integers(max(2, n // 3), size=n)]
    elif kind == "near-parallel":
        X = X[:1] * rng.choice([-1.0, 1.0], size=(n, 1, 1)) + 10.0 ** rng.integers(-14, -2) * X
    elif kind == "constant channel":
        X[..., 0] = 10.0 ** rng.integers(-6, 7)
    elif kind == "constant and offset":
        X = np.concatenate([np.ones((n, s, 1)), 10.0 ** rng.integers(1, 9) + X[..., 1:]], axis=2)
    elif kind == "zero tokens":
        X[rng.random((n, s)) < 0.4] = 0.0
    elif kind == "tiny rows":
        X[rng.random(n) < 0.5] *= 10.0 ** rng.integers(-15, -5)
    elif kind == "collinear":
        X = X[..., :1] * rng.normal(size=d) + 10.0 ** rng.integers(-16, -1) * X
    return X, kind


GEOMETRIES = (
    "normal", "offset", "scale", "unequal channels", "unequal samples", "outlier", "integers", "duplicates",
    "near-parallel", "constant channel", "constant and offset", "zero tokens", "tiny rows", "collinear",
)  # fmt: skip


def draw(rng: np.random.Generator, activations: tuple[str, ...]) -> tuple[Program, Any, dict[str, Any], str]:
    """A problem: its formulas, its targets as an estimator takes them, the estimator's parameters, the geometry."""
    n, s, d, c = (int(rng.integers(*limits)) for limits in ((4, 18), (1, 5), (1, 5), (1, 4)))
    head, activation = str(rng.choice(HEADS)), str(rng.choice(activations))
    if head in ("linear", "attentive"):
        activation = "linear"
    n_blocks, grouped = 1, False
    if head == "block-fno":
        n_blocks = int(rng.integers(1, d + 1))
        d = n_blocks * max(1, d // n_blocks)
    X, geometry = tokens(rng, n, s, d)
    loss = str(rng.choice(["cross-entropy", "squared", "huber"]))
    pool = str(rng.choice(["mean", "cls"] if loss == "cross-entropy" else ["mean", "cls", "none"]))
    grid = (s, 1)
    if head in ("fno", "block-fno") and s == 4:
        grid = (2, 2)
    rows = s if pool == "none" else 1
    if loss == "cross-entropy":
        c = max(2, c)
        y = np.concatenate([np.arange(c), rng.integers(c, size=n - c)])
        if rng.random() < 0.3:  # separable
            y = np.argsort(np.argsort(X[:, 0, 0])) * c // n
        Y = np.eye(c)[y][:, None]
    else:
        Y = rng.normal(size=(n, rows, c))
        if rng.random() < 0.3:
            Y = np.abs(X.mean((1, 2)) - X.mean())[:, None, None] + 0 * Y
        Y = Y * 10.0 ** rng.choice([0, 0, 0, -6, 6]) + rng.choice([0.0, 0.0, 1e3, 1e6])
        y = Y[:, 0] if rows == 1 and pool != "none" else Y
    if head == "block-fno" and c % n_blocks == 0:
        grouped = bool(rng.random() < 0.5)
    if rng.random() < 0.3:
        X = X.astype(np.float32)
    gates = None
    if activation == "gated-relu":
        shape = {
            "self-attention": (d, d), "mlp-mixer": (s, s), "fno": (s, d), "mlp": (d,),
            "block-fno": (n_blocks, s, d // n_blocks)[n_blocks == 1 :],
        }[head]  # fmt: skip
        gates = rng.normal(size=(int(rng.integers(1, 4)), *shape))
    intercept = bool(rng.random() < 0.4)
    queries, each = None, bool(rng.random() < 0.5)
    if head == "attentive":
        pool = "mean"
        Y = Y[:, :1]
        y = y if loss == "cross-entropy" else Y[:, 0]
        queries = rng.normal(size=(int(rng.integers(1, 4)), d + s * int(rng.integers(2))))
        queries[:, :d] *= 10.0 ** rng.integers(-2, 3) / max(np.abs(X).max(), 1e-30)
    program = Program(
        head, activation, pool, loss, grid, n_blocks, grouped, gates, intercept, X, Y, queries=queries, each=each
    )
    parameters: dict[str, Any] = {
        "head": head, "activation": activation, "pool": pool, "grid": grid, "n_blocks": n_blocks,
        "outputs": "grouped" if grouped else "shared", "gates": gates, "fit_intercept": intercept,
        "beta_ratio": float(10 ** rng.uniform(-4, 0.1)), "tol": float(10.0 ** rng.choice([-2, -3, -5])),
        "random_state": int(rng.integers(2**31)), "max_time": BRIEF,
    }  # fmt: skip
    if head == "attentive":
        parameters |= {"queries": queries, "query_norm": "each" if each else "all"}
    if loss != "cross-entropy":
        parameters["loss"] = loss
    return program, y, parameters, geometry


def draw_weighted(rng: np.random.Generator) -> tuple[Program, dict[str, Any], dict[str, Any], str]:
    """A problem with weights: its formulas, the data as an estimator takes them, its parameters, what it is."""
    program, _, parameters, geometry = draw(rng, ("linear", "gated-relu", "relu"))
    parameters.pop("loss", None)
    n, s, _ = program.X.shape
    ragged = program.head in ("self-attention", "mlp", "linear", "attentive") and s > 1 and bool(rng.random() < 0.3)
    mask = np.arange(s) < rng.integers(1, s + 1, size=n)[:, None] if ragged else None
    X = program.X if mask is None else np.where(mask[..., None], program.X, 0)
    every = program.head != "attentive" and bool(rng.random() < 0.4)
    if ragged and program.queries is not None:  # of content alone
        parameters["queries"] = program.queries[:, : program.X.shape[2]]
        program = replace(program, queries=parameters["queries"])
    r, c = s if every else 1, max(2, program.Y.shape[-1])
    if program.head == "block-fno" and program.grouped and c % program.n_blocks:
        c = program.n_blocks * (1 + c // program.n_blocks)
    loss = str(rng.choice(["cross-entropy", "binary-cross-entropy", "squared", "huber"]))
    soft, positive = bool(rng.random() < 0.5), 1.0
    fine = [(n, 1, 1)] + [(n, r, 1)] * every + [(n, r, c)] * (loss != "cross-entropy")
    size = fine[rng.integers(len(fine))]
    w = np.exp(float(rng.choice([0, 1, 8])) * rng.normal(size=size)) * (rng.random(size) < 0.75)
    w[: min(n, c)] = 1.0
    if loss == "cross-entropy" and not soft:
        labels = np.concatenate([np.arange(c), rng.integers(c, size=max(0, n - c))])[:n]
        labels = np.repeat(labels[:, None], r, 1) if every else labels[:, None]
        Y, y = np.eye(c)[labels], labels.copy()
        if every:
            gone = rng.random((n, r)) < 0.3
            gone[:c] = False
            y[gone] = -1
            w = w * ~gone[..., None]
        if len(np.unique(labels[w[..., 0].max(1) > 0])) < c:
            return draw_weighted(rng)
        a = float(rng.choice([0.0, 0.1]))
        Y, parameters["label_smoothing"] = (1 - a) * Y + a / c, a
        y = y if every else y[:, 0]
    elif loss == "cross-entropy":
        Y = y = rng.dirichlet(np.full(c, float(rng.choice([0.1, 1.0]))), size=(n, r))
    elif loss == "binary-cross-entropy":
        Y = y = rng.random((n, r, c)) if soft else (rng.random((n, r, c)) < rng.random(c)).astype(float)
        positive = float(rng.choice([1.0, 0.2, 30.0]))
        parameters["pos_weight"] = None if positive == 1 else positive
    else:
        Y = y = rng.normal(size=(n, r, c)) * 10.0 ** rng.choice([0, 0, -6, 6]) + rng.choice([0.0, 1e3])
    given = w if w.shape[2] > 1 else w[..., 0]
    given = given[:, 0] if w.shape[1] == 1 else given
    if every and w.shape[1] == 1:  # the data term is the mean over tokens of classes, over samples of measurements
        w = w * np.ones((n, r, 1)) if loss.endswith("cross-entropy") or mask is not None else w
    if every and mask is not None:
        w = w * mask[..., None]
    y = y[:, 0] if not every and y.ndim > 1 else y
    parameters |= {"loss": loss, "pool": "none" if every else parameters["pool"] if program.pool != "none" else "mean"}
    if parameters["pool"] == "cls" and mask is not None:
        mask[:, 0] = True
    program = replace(program, loss=loss, pool=parameters["pool"], X=X, Y=Y, weights=w, positive=positive, mask=mask)
    fit = {"y": y, "sample_weight": given, "mask": mask}
    what = ", ".join(filter(None, [loss, "every token" if every else "", "ragged" if ragged else "", geometry]))
    return program, fit, parameters, what


def estimator(parameters: dict[str, Any]) -> Any:
    loss = parameters.get("loss", "cross-entropy")
    return (ch.ConvexHeadClassifier if loss.endswith("cross-entropy") else ch.ConvexHeadRegressor)(**parameters)


def weights_of(model: Any, program: Program) -> Weights:
    """A fitted model's weights in the search's form."""
    c = program.Y.shape[-1]
    if program.head == "linear":
        return Weights(np.ones(1), model.coef_[None], np.zeros(1, int), model.intercept_)
    values = []
    for j, V in enumerate(model.values_):
        if program.grouped:
            full = np.zeros((len(V), V.shape[1], c))
            group, share = j % program.n_blocks, c // program.n_blocks
            full[:, :, group * share : (group + 1) * share] = V
            V = full
        values.append(V)
    block = np.repeat(np.arange(len(values)), [len(V) for V in values])
    return Weights(np.concatenate(model.mixing_), np.concatenate(values), block, model.intercept_)


def verdict(certificate: Any, program: Program, W: Weights, beta: float, rng: np.random.Generator) -> tuple[str, str]:
    """Whether a certificate holds against what is attained, and what was found."""
    numbers = (certificate.primal, certificate.dual, certificate.gap, certificate.relative_gap)
    if any(np.isnan(number) for number in numbers):
        return "false", f"not a number among {numbers}"
    own, off = objective(program, W, beta)
    if certificate.dual > own + off:
        return "false", f"dual {certificate.dual!r} above the model's own objective {own!r}"
    if own - off - certificate.dual > certificate.gap + 1e-9 * abs(own) + 10 * off:
        return "false", f"the model's objective {own!r} is farther above the dual than the gap {certificate.gap!r} says"
    best, off = search(program, beta, starts=[W], random=1, rng=rng)
    if certificate.dual > best + off:
        return "false", f"dual {certificate.dual!r} above {best!r}, which is attained"
    return ("certified" if certificate.converged else "honest"), f"gap {certificate.relative_gap:.1e}"


# -- kinds of trials ---------------------------------------------------------------------------------------------------
def convex(rng: np.random.Generator) -> tuple[str, str]:
    """Linear and gated heads."""
    program, y, parameters, geometry = draw(rng, ("linear", "gated-relu"))
    model = estimator(parameters).fit(program.X, y)
    outcome, why = verdict(model.certificate_, program, weights_of(model, program), model.beta_, rng)
    return outcome, f"{program.head}, {program.activation}, {geometry}: {why}"


def weighted(rng: np.random.Generator, kind: str) -> tuple[str, str]:
    """Weights of samples, tokens and entries; soft and several labels; samples of different length."""
    drawn = draw_weighted(rng)
    while kind not in drawn[3].split(", "):
        drawn = draw_weighted(rng)
    program, fit, parameters, what = drawn
    model = estimator(parameters).fit(program.X, **fit)
    outcome, why = verdict(model.certificate_, program, weights_of(model, program), model.beta_, rng)
    if outcome != "false":
        tokens = program.X if program.mask is None else Padded(program.X, program.mask)
        again = ch.certify(model, tokens, fit["y"], fit["sample_weight"], beta=model.beta_)
        if again.identity != model.certificate_.identity:
            outcome, why = "false", "the audit is of another problem"
    return outcome, f"{program.head}, {program.activation}, {what}: {why}"


def relu(rng: np.random.Generator) -> tuple[str, str]:
    """True ReLU heads: bounds of their geometry."""
    program, y, parameters, geometry = draw(rng, ("relu",))
    model = estimator(parameters).fit(program.X, y)
    outcome, why = verdict(model.certificate_, program, weights_of(model, program), model.beta_, rng)
    return outcome, f"{program.head}, {program.activation}, {geometry}: {why}"


def audit(rng: np.random.Generator) -> tuple[str, str]:
    """Audits of random factors, with and without an intercept that may be zero."""
    program, y, parameters, geometry = draw(rng, ("linear", "gated-relu", "relu"))
    fitted = estimator({**parameters, "max_time": 1.0}).fit(program.X, y)
    module = fitted.to_module(torch.float64)
    with torch.no_grad():
        for part in module.parameters():
            part.mul_(float(rng.choice([0.0, 1.0, rng.normal()])))
    names = ("head", "activation", "pool", "grid", "gates", "n_blocks", "outputs", "queries", "query_norm")
    given = {name: parameters[name] for name in names if name in parameters}
    mixing, values, b = [], [], np.zeros(program.Y.shape[-1])
    for U, V in zip(getattr(fitted, "mixing_", [None]), getattr(fitted, "values_", [None]), strict=True):
        scale = float(rng.choice([0.0, 1.0, 3.0]))
        mixing.append(None if U is None else scale * U)
        values.append(scale * (fitted.coef_ if V is None else V))
    factors = (None, values[0]) if program.head == "linear" else (mixing, values)
    if program.intercept:
        b = float(rng.choice([0.0, 1.0])) * fitted.intercept_
        given["intercept"] = b
    beta = fitted.beta_ * float(rng.choice([0.1, 1.0, 10.0]))
    certificate = ch.certify(factors, program.X, y, beta=beta, loss=program.loss, **given)
    if program.head == "linear":
        W = Weights(np.ones(1), values[0][None], np.zeros(1, int), b)
    else:
        stand_in = type("Fitted", (), {"mixing_": mixing, "values_": values, "intercept_": b})
        W = weights_of(stand_in, program)
    outcome, why = verdict(certificate, program, W, beta, rng)
    return outcome, f"{program.head}, {program.activation}, {geometry}: {why}"


MISMATCHES = (
    "head", "activation", "pool", "gates", "labels", "tokens", "intercept", "beta", "one token", "order", "loss", "none"
)  # fmt: skip


def reference(rng: np.random.Generator) -> tuple[str, str]:
    """A bound meets the problem that it was proven for, and others that differ from it in one thing."""
    n, s, d, c = int(rng.integers(8, 20)), 4, 3, 2
    X, y = rng.normal(size=(n, s, d)), rng.integers(c, size=n)
    y[:c] = np.arange(c)
    gates = rng.normal(size=(2, d, d))
    what = str(rng.choice(MISMATCHES))
    settings: dict[str, Any] = {"head": "self-attention", "activation": "linear", "pool": "mean", "gates": None}
    if what == "gates":
        settings.update(activation="gated-relu", gates=gates)
    bounded = ch.ConvexHeadClassifier(**settings, beta_ratio=0.1, random_state=0).fit(X, y)
    other, X2, y2, beta, intercept, loss = dict(settings), X, y, bounded.beta_, False, None
    if what == "head":
        other["head"] = str(rng.choice(["mlp-mixer", "fno", "mlp", "linear", "block-fno"]))
        other["n_blocks"] = 1
    elif what == "activation":
        other.update(activation="gated-relu", gates=gates)
    elif what == "pool":
        other["pool"] = "cls"
    elif what == "gates":
        other["gates"] = gates + 1e-9 * rng.normal(size=gates.shape)
    elif what == "labels":
        y2 = y.copy()
        y2[rng.integers(c, n)] ^= 1
    elif what == "tokens":
        X2 = X + 1e-6 * rng.normal(size=X.shape)
    elif what == "one token":
        X2 = X.copy()
        X2[rng.integers(n), rng.integers(s), rng.integers(d)] += 1e-8
    elif what == "order":
        order = rng.permutation(n)
        X2 = X[order]
        if np.array_equal(X2, X):
            return "honest", what
    elif what == "intercept":
        intercept = True
    elif what == "beta":
        beta = beta * (1 + float(10 ** rng.uniform(-8, -1)))
    elif what == "loss":
        loss = "squared"
        y2 = np.eye(c)[y]
    learner = (
        ch.ConvexHeadRegressor(**other, loss="squared", beta=beta, fit_intercept=intercept, random_state=1)
        if loss
        else ch.ConvexHeadClassifier(**other, beta=beta, fit_intercept=intercept, random_state=1)
    )
    audited = learner.fit(X2, y2).to_module(torch.float64)
    chosen = {} if loss is None else {"loss": loss}
    try:
        found = ch.certify(audited, X2, y2, beta=beta, lower_bound=bounded.certificate_, **chosen)
    except ConvexHeadError as error:
        return ("false", f"{what}: refused its own problem: {error}") if what == "none" else ("refused", what)
    if what != "none":
        return "false", f"another {what} was accepted"
    return ("certified" if found.gap <= bounded.certificate_.gap * (1 + 1e-9) + 1e-9 else "false"), what


def damage(path: Path, rng: np.random.Generator) -> str:
    """Flip, cut or blank some bytes of a file."""
    content = bytearray(path.read_bytes())
    how = str(rng.choice(["flip", "cut", "blank", "digit"]))
    at = int(rng.integers(len(content)))
    if how == "cut":
        content = content[:at]
    elif how == "blank":
        content[at : at + 16] = bytes(len(content[at : at + 16]))
    elif how == "digit":
        digits = [i for i, byte in enumerate(content) if 48 <= byte < 58] or [at]
        at = digits[int(rng.integers(len(digits)))]
        content[at] = 48 + (content[at] - 48 + 1 + int(rng.integers(9))) % 10
    else:
        content[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(content))
    return how


def same(a: Any, b: Any) -> bool:
    """Whether two fitted models say the same, certificate included."""
    return a.certificate_ == b.certificate_ and all(
        np.array_equal(p, q) for p, q in zip(a.mixing_ + a.values_, b.mixing_ + b.values_, strict=True)
    )


def model_files(rng: np.random.Generator) -> tuple[str, str]:
    """A saved model that was damaged or put together from two."""
    X, y = rng.normal(size=(12, 4, 3)), np.arange(12) % 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        first = ch.ConvexHeadClassifier(beta_ratio=0.1, random_state=0).fit(X, y)
        first.save(path)
        if rng.random() < 0.3:
            how = "exchanged"
            ch.ConvexHeadClassifier(beta_ratio=0.1, random_state=0).fit(X + 0.1, y).save(Path(folder) / "other")
            name = str(rng.choice(["weights.safetensors", "config.json"]))
            shutil.copy(Path(folder) / "other" / name, path / name)
        else:
            name = str(rng.choice(["weights.safetensors", "config.json"]))
            how = damage(path / name, rng)
        try:
            read = ch.load(path)
        except ConvexHeadError:
            return "refused", f"{name}, {how}"
        return ("honest" if same(first, read) else "false"), f"{name}, {how}: read as if nothing was wrong"


def made_store(folder: Path, rng: np.random.Generator) -> Path:
    """A small token store of patches."""
    images = rng.integers(256, size=(24, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(24) % 2)
    ch.tokens.extract(f"npz:{folder / 'images.npz'}", "patches:4", folder / "store", shard_size=8)
    return folder / "store"


def store_files(rng: np.random.Generator) -> tuple[str, str]:
    """A token store one of whose files was damaged or exchanged, opened for a fit."""
    with tempfile.TemporaryDirectory() as folder:
        store = made_store(Path(folder), rng)
        settings: dict[str, Any] = {"head": "mlp", "beta_ratio": 0.2, "random_state": 0}
        before = ch.ConvexHeadClassifier(**settings).fit(ch.TokenStore.open(store)["train"])
        files = sorted(path for path in store.rglob("*") if path.is_file() and path.stat().st_size)
        victim = files[int(rng.integers(len(files)))]
        times = victim.stat().st_atime_ns, victim.stat().st_mtime_ns
        alike = [path for path in files if path.suffix == victim.suffix and path != victim]
        if alike and rng.random() < 0.3:
            how = "exchanged"
            content = victim.read_bytes(), alike[0].read_bytes()
            victim.write_bytes(content[1])
            alike[0].write_bytes(content[0])
        else:
            how = damage(victim, rng)
        os.utime(victim, ns=times)
        try:
            after = ch.ConvexHeadClassifier(**settings).fit(ch.TokenStore.open(store)["train"])
        except ConvexHeadError:
            return "refused", f"{victim.name}, {how}"
        return ("honest" if same(before, after) else "false"), f"{victim.name}, {how}: read as if nothing was wrong"


def checkpoint_files(rng: np.random.Generator) -> tuple[str, str]:
    """A checkpoint that was damaged, or that another fit goes on from."""
    X, y = rng.normal(size=(20, 4, 3)), np.arange(20) % 3
    settings: dict[str, Any] = {"beta_ratio": 0.05, "random_state": 0, "tol": 1e-5}

    class Stop(Exception):
        pass

    def stop(row: Any) -> None:
        if row.seconds > 0.01:
            raise Stop

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        with contextlib.suppress(Stop):
            ch.ConvexHeadClassifier(**settings).fit(X, y, callback=stop, checkpoint=path, checkpoint_minutes=0.0)
        files = sorted(item for item in path.rglob("*") if item.is_file() and item.stat().st_size)
        how = "another fit" if not files or rng.random() < 0.4 else damage(files[int(rng.integers(len(files)))], rng)
        if how == "another fit":
            what = str(rng.choice(["tokens", "labels", "tol", "gates", "pool"]))
            how = f"another {what}"
            X = X + 1e-9 if what == "tokens" else X
            y = (y + 1) % 3 if what == "labels" else y
            settings.update({"tol": {"tol": 1e-6}, "pool": {"pool": "cls"}}.get(what, {}))
            if what == "gates":
                settings.update(activation="gated-relu", gates=rng.normal(size=(1, 3, 3)).tolist())
        fresh = ch.ConvexHeadClassifier(**settings).fit(X, y)
        try:
            resumed = ch.ConvexHeadClassifier(**settings).fit(X, y, checkpoint=path)
        except ConvexHeadError:
            return "refused", how
        holds = (
            resumed.certificate_.dual <= fresh.certificate_.primal * (1 + 1e-12)
            and fresh.certificate_.dual <= resumed.certificate_.primal * (1 + 1e-12)
            and resumed.certificate_.converged
        )
        return ("certified" if holds else "false"), how


RANKS = """
import json, sys
import numpy as np
import convexhead as ch
from convexhead.errors import ConvexHeadError
from convexhead.runtime.ranks import join_ranks
what, rank = sys.argv[1], join_ranks().rank
rng = np.random.default_rng(int(sys.argv[2]))
X, y = rng.normal(size=(21, 4, 3)), np.arange(21) % 3
settings = {"beta_ratio": 0.1, "random_state": 0, "activation": "gated-relu", "gates": rng.normal(size=(2, 3, 3))}
if rank:
    if what == "tokens": X[20, 0, 0] += 1e-9
    if what == "labels": y = (y + 1) % 3
    if what == "beta": settings["beta_ratio"] = 0.1001
    if what == "gates": settings["gates"] = settings["gates"] + 1e-12
    if what == "samples": X, y = X[:20], y[:20]
    if what == "tol": settings["tol"] = 1e-4
    if what == "dtype": X = X.astype(np.float32)
    if what == "missing": raise SystemExit(3)
try:
    model = ch.ConvexHeadClassifier(**settings, distributed=True).fit(X, y)
    print(json.dumps(model.certificate_.to_dict()))
except ConvexHeadError as error:
    print(json.dumps({"refused": str(error)}))
"""


def ranks(rng: np.random.Generator) -> tuple[str, str]:
    """Two processes whose inputs differ in one thing."""
    kinds = ["tokens", "labels", "beta", "gates", "samples", "tol", "dtype", "missing", "none"]
    what, port, seed = str(rng.choice(kinds)), int(rng.integers(20_000, 60_000)), str(int(rng.integers(10**6)))
    told = {
        "TORCHELASTIC_RUN_ID": "trust",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, what, seed],
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=5 * PATIENCE) for process in processes]
    except subprocess.TimeoutExpired:
        return "hung", what
    finally:
        for process in processes:
            process.kill()
    told_by = [out.strip().splitlines()[-1] if out.strip() else "" for out, _ in printed]
    answers = [json.loads(line) if line.startswith("{") else {} for line in told_by]
    if what == "missing":
        return ("refused" if "refused" in answers[0] else "crashed"), f"{what}: {printed[0][1][-300:]}"
    if what == "none":
        return ("certified" if all(answer.get("converged") for answer in answers) else "crashed"), what
    if all("refused" in answer for answer in answers):
        return "refused", what
    if any("dual" in answer for answer in answers):
        return "false", f"another {what} was not noticed"
    return "crashed", f"{what}: {printed[0][1][-300:]}"


WEIGHTED = ("cross-entropy", "binary-cross-entropy", "squared", "huber", "every token", "ragged")
KINDS: dict[str, tuple[float, Callable[[np.random.Generator], tuple[str, str]]]] = {
    "convex": (0.24, convex),
    **{f"weighted-{kind.replace(' ', '-')}": (0.02, partial(weighted, kind=kind)) for kind in WEIGHTED},
    "relu": (0.15, relu),
    "audit": (0.08, audit),
    "reference": (0.2, reference),
    "model_files": (0.13, model_files),
    "store_files": (0.05, store_files),
    "checkpoint_files": (0.028, checkpoint_files),
    "ranks": (0.002, ranks),
}
"""The kinds of trials, and their share of a campaign."""


def trial(kind: str, seed: int) -> tuple[str, str]:
    """The outcome of one trial, and a line about it."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise Hung

    rng = np.random.default_rng([sorted(KINDS).index(kind), seed])
    old = {alarm: signal.signal(alarm, late) for alarm in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    signal.alarm(10 * PATIENCE)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return KINDS[kind][1](rng)
    except ConvexHeadError as error:
        return "refused", f"{error}"
    except Hung:
        return "hung", "".join(traceback.format_exc().splitlines(keepends=True)[-4:])
    except Exception:
        return "crashed", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for alarm, before in old.items():
            signal.signal(alarm, before)


def trials(kinds: list[str], problems: int, first: int) -> Iterator[tuple[str, int]]:
    """Kinds and seeds, mixed, each kind by its share."""
    share = sum(KINDS[kind][0] for kind in kinds)
    counts = {kind: max(1, round(problems * KINDS[kind][0] / share)) for kind in kinds}
    listed = [((i + 0.5) / count, kind, first + i) for kind, count in counts.items() for i in range(count)]
    yield from ((kind, seed) for _, kind, seed in sorted(listed))


def _run(task: tuple[str, int]) -> tuple[str, int, str, str, float]:
    began = time.perf_counter()
    outcome, line = trial(*task)
    return *task, outcome, line, time.perf_counter() - began


def _alone() -> None:
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=3_600.0, help="after which no new trial begins")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kind", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--first", type=int, default=0, help="the first seed of each kind")
    parser.add_argument("--show", action="store_true", help="print every trial, and write no table")
    told = parser.parse_args()
    deadline, tally = time.monotonic() + told.seconds, {kind: Counter[str]() for kind in told.kind}
    spent: Counter[str] = Counter()
    tasks = trials(told.kind, told.problems, told.first)
    with ProcessPoolExecutor(told.workers, initializer=_alone) as pool:
        waiting = {pool.submit(_run, task) for task in islice(tasks, 4 * told.workers)}
        while waiting:
            done = next(as_completed(waiting))
            kind, seed, outcome, line, seconds = done.result()
            waiting.remove(done)
            tally[kind][outcome] += 1
            spent[kind] += seconds
            if told.show or outcome in ("false", "crashed", "hung"):
                print(f"{kind} {seed}: {outcome} after {seconds:.1f} s: {line}", flush=True)
            if time.monotonic() < deadline and (task := next(tasks, None)):
                waiting.add(pool.submit(_run, task))
    machine = {"cpu": cpu_name(), "versions": versions("torch", "numpy", "scipy", "convexhead")}
    rows = []
    for kind, counts in tally.items():
        row = {"kind": kind, "problems": sum(counts.values()), **{name: counts[name] for name in OUTCOMES}}
        rows.append({**row, "seconds": round(spent[kind]), "first_seed": told.first, **machine})
        print(rows[-1])
    if not told.show:
        print(write_csv("trust", rows))


if __name__ == "__main__":
    main()
