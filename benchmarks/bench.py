"""Ten minutes of fits, by which a change is compared with the code before it: `make bench`.

    python benchmarks/bench.py [--name bench] [--only WORD]

1. Small: self-attention on the three small instances of `suite.py` to a certified 1e-5, and every head on
   synthetic-200. A fit takes milliseconds, most of them spent around the solver.
2. Digits: every head with a linear activation and with 10 gates, to a certified 1e-3.
3. Large: 2,000 samples of 16 tokens with 48 channels and 20 classes, in single precision; self-attention to 1e-3.

Rows go to benchmarks/results/NAME.csv. One thread, and seconds of the processor: what else runs on the machine matters
little. `tflop_equivalents` are these seconds times the float32 GEMM rate of one thread by the same clock, measured
before every row. The median of up to 9 runs that fit 6 seconds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import convexhead as ch
from common import Row, Table, hardware, measure, spread
from convexhead.program.heads import HEADS
from convexhead.runtime.clock import count_processor_time, now
from instances import registry, synthetic

RUNS, BUDGET = 9, 6.0
"""Most runs of a row, and the seconds that they may take together."""
FIXED = ("attentive",)
"""Heads with queries that are no part of these rows."""


def fits() -> Iterator[tuple[str, str, str, Any, Any, dict[str, Any]]]:
    """Instance, head, activation, tokens, labels and settings of every row."""
    instances = registry(None, None)
    for name in ("synthetic-200", "digits", "synthetic-1000"):
        one = instances[name]()
        yield name, "self-attention", "linear", one.X, one.y, {"beta_ratio": one.ratio, "tol": one.tol}
    heads = [head for head in HEADS if head not in FIXED]
    small, digits = instances["synthetic-200"](), instances["digits"]()
    for head in heads:
        if head != "self-attention":
            yield "synthetic-200", head, "linear", small.X, small.y, {"beta_ratio": 0.1, "tol": 1e-5}
    for activation in ("linear", "gated-relu"):
        for head in heads:
            if HEADS[head].learns_mixing or activation == "linear":
                settings = {"beta_ratio": 0.1, "tol": 1e-3, "n_gates": 10}
                yield "digits", head, activation, digits.X, digits.y, settings
    X, y = synthetic(2000, 16, 48, 20, rank=8, seed=0)
    yield "synthetic-2000", "self-attention", "linear", X.float(), y, {"beta_ratio": 0.05, "tol": 1e-3}


def row(fit: Callable[[], Any]) -> Row:
    """The columns of a fit."""
    times, model = measure(fit, runs=RUNS, budget=BUDGET, clock=now)
    certificate = model.certificate_
    return {
        **spread(times),
        "converged": certificate.converged,
        "objective": f"{certificate.primal:.9f}",
        "relative_gap_certified": f"{certificate.relative_gap:.2g}",
        "heads_found": model.n_heads_,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="bench", help="of the file in benchmarks/results")
    parser.add_argument("--only", default="", help="rows whose instance, head or activation has this word")
    told = parser.parse_args()
    torch.set_num_threads(1)
    count_processor_time()
    warnings.simplefilter("ignore")
    table = Table(told.name, ("instance", "head", "activation", "tol"), {}, again=True)
    for instance, head, activation, X, y, settings in fits():
        if told.only not in (instance, head, activation, ""):
            continue
        table.machine = hardware("scikit-learn", clock=now)
        clf = ch.ConvexHeadClassifier(head, activation=activation, random_state=0, device="cpu", **settings)
        key = {"instance": instance, "head": head, "activation": activation, "tol": f"{settings['tol']:g}"}
        table.run(lambda: row(lambda: clf.fit(X, y)), **key)  # noqa: B023  it is called before they change


if __name__ == "__main__":
    main()
