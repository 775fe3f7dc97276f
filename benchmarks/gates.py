"""What gates cost: one evaluation of objective and gradient of every head, linear and with 8 and 50 gates.

    python benchmarks/gates.py TOKENS [--samples N] [--heads NAME ...]

``TOKENS`` is a token store (its first training samples are taken) or ``random`` for normal tokens of CIFAR's shape.
``GFLOP_needed`` counts the multiplications and additions of the cheapest way known to do the same, and
``ratio_to_arithmetic`` is the time over what they take at the rate of a large matrix product measured beside each
evaluation, so that what else runs on the machine slows both. Per sample of ``s`` tokens, ``d`` channels, ``c`` outputs,
``k`` atoms on ``J`` active gates, pooled by the mean, with ``f = h (⌊w/2⌋ + 1)`` frequencies of an ``(h, w)`` grid:

    head            gated                                      linear
    self-attention  4 k s d² + 2 J s² d + 8 k s d + 6 k d c    8 k d² + 6 k d c        (Gram matrices at hand)
    mlp-mixer       4 k s² d + 6 k d c                         4 k s d + 6 k d c
    fno             16 k f d + 4 J f s + 6 k c                 4 k d + 6 k c
    block-fno       16 k f d/B + 4 J f s + 6 k c               4 k d/B + 6 k c         (k, J over all groups)
    mlp             4 k d + 6 k c                              4 k d + 6 k c           (gated means at hand)

Each line is forward and backward: products with ``U`` of 2 operations an entry each way, then ``f = M V``, ``MᵀR`` and
``R Vᵀ``; the loss, some tens of operations an output, is not counted. A pricing product ``GᵀG x`` of each of ``J``
blocks takes the same passes over as many vectors as atoms.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from common import RESULTS, hardware, timed, write_csv
from convexhead.linalg.gradient_matrices import GradientMatrices
from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.atoms import Atoms
from convexhead.program.heads import HEADS, make_head
from convexhead.program.losses import CrossEntropy
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.tokens import TokenStore
from evaluation import arithmetic

VECTORS = 2
"""Vectors a block in a pricing product."""


@dataclass(frozen=True)
class Measured:
    """Seconds, and seconds times the GEMM rate measured just before and after, in GFLOP."""

    seconds: float
    gemm_gflop: float


def against_gemm(run: Callable[[], object], repeats: int, size: int = 1024) -> Measured:
    """Medians over ``repeats`` runs after one to warm up."""
    a, b = torch.randn(2, size, size)
    run()
    results = []
    for _ in range(repeats):
        before = timed(lambda: a @ b)[0]
        seconds = timed(run)[0]
        product = (before + timed(lambda: a @ b)[0]) / 2
        results.append((seconds, seconds * 2 * size**3 / product / 1e9))
    return Measured(*(median(column) for column in zip(*results, strict=True)))


def random_atoms(problem: Problem, k: int, generator: torch.Generator) -> Atoms:
    """``k`` atoms dealt out to the blocks in turn."""
    atoms = problem.empty()
    head = problem.head
    atoms.U = torch.randn(k, *head.mixing_shape, generator=generator) / head.mixing_size**0.5
    atoms.V = torch.randn(k, *problem.value_shape, generator=generator) / problem.c**0.5
    atoms.block = torch.arange(k) % problem.n_blocks
    return atoms


def measure(name: str, X: Tensor, Y: Tensor, n_gates: int, k: int, repeats: int) -> dict[str, object]:
    """One row; ``n_gates`` 0 for the linear activation."""
    generator = torch.Generator().manual_seed(0)
    head = make_head(name, *X.shape[1:])
    gates = sample_gates(head, n_gates, generator, X) if n_gates else None
    activation = make_activation("gated-relu" if n_gates else "linear", head, gates)
    seconds, problem = timed(lambda: Problem(Operator(X, head, activation, dtype=torch.float32), Y, CrossEntropy()))
    atoms = problem.empty() if not head.learns_mixing else random_atoms(problem, k, generator)
    k = len(atoms)
    evaluation = against_gemm(lambda: problem.value_and_gradient(atoms, 1e-3), repeats)
    gflop = arithmetic(head, problem.c, k, min(k, problem.n_blocks) if n_gates else 0) * len(X) / 1e9
    row: dict[str, object] = {
        "head": name,
        "n_gates": n_gates,
        "blocks": problem.n_blocks,
        "atoms": k,
        "samples": len(X),
        "seconds_prepare": f"{seconds:.3g}",
        "seconds_evaluation": f"{evaluation.seconds:.4g}",
        "GFLOP_needed": f"{gflop:.4g}",
        "share_of_gemm_rate": f"{gflop / evaluation.gemm_gflop:.2f}",
        "ratio_to_arithmetic": f"{evaluation.gemm_gflop / gflop:.2f}",
    }
    if n_gates:
        R = torch.randn(Y.shape, generator=generator) / len(X)
        G, blocks = GradientMatrices(problem.operator, R), torch.arange(problem.n_blocks)
        x = G.random_start(blocks, VECTORS, generator)
        pricing = against_gemm(lambda: G.gram(x, blocks), max(1, repeats // 2))
        vectors = VECTORS * problem.n_blocks
        gflop = arithmetic(head, problem.c, vectors, problem.n_blocks) * len(X) / 1e9
        row |= {
            "pricing_vectors": vectors,
            "seconds_pricing_product": f"{pricing.seconds:.4g}",
            "pricing_ratio_to_arithmetic": f"{pricing.gemm_gflop / gflop:.2f}",
        }
    return row


def load(tokens: str, n: int) -> tuple[Tensor, Tensor]:
    """Tokens ``(n, s, d)`` float32 and one-hot labels ``(n, 1, c)``."""
    if tokens == "random":
        generator = torch.Generator().manual_seed(0)
        X, y = torch.randn(n, 49, 128, generator=generator), torch.randint(100, (n,), generator=generator)
        return X, torch.nn.functional.one_hot(y, 100).unsqueeze(1).float()
    train = TokenStore.open(tokens, "train")
    y = torch.as_tensor(train.labels)
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:n].sort().values
    X = torch.as_tensor(train[rows.numpy()]).float()
    return X, torch.nn.functional.one_hot(y[rows].long(), int(y.max()) + 1).unsqueeze(1).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--gates", nargs="+", type=int, default=[0, 8, 50])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--fresh", action="store_true", help="measure anew what the table has already")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = hardware() | {"dtype": "float32", "tokens": Path(arguments.tokens).name}
    print(machine)
    X, Y = load(arguments.tokens, arguments.samples)
    rows = [] if arguments.fresh else earlier()
    done = {(row["head"], int(str(row["n_gates"])), row["tokens"]) for row in rows}
    for name in arguments.heads:
        for n_gates in arguments.gates if name != "linear" else [0]:
            if (name, n_gates, machine["tokens"]) in done:
                continue
            row = measure(name, X, Y, n_gates, max(16, n_gates), arguments.repeats)
            print("  ".join(f"{row.get(key, ''):>14}" for key in SHOWN), flush=True)
            rows.append(row | machine)
            path = write_csv("gates", with_ratio_to_linear(rows))
    print(path if rows else "nothing to do")


SHOWN = (
    "head", "n_gates", "atoms", "seconds_prepare", "seconds_evaluation", "ratio_to_arithmetic",
    "seconds_pricing_product", "pricing_ratio_to_arithmetic",
)  # fmt: skip


def earlier() -> list[dict[str, object]]:
    """Rows of the table as it stands."""
    path = RESULTS / "gates.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return [dict(row) for row in csv.DictReader(file)]


def with_ratio_to_linear(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Each row with its seconds an atom over those of the same head with a linear activation."""

    def each(row: dict[str, object]) -> float:
        return float(str(row["seconds_evaluation"])) / int(str(row["atoms"])) / int(str(row["samples"]))

    linear = {(row["head"], row["tokens"]): each(row) for row in rows if int(str(row["n_gates"])) == 0}
    for row in rows:
        base = linear.get((row["head"], row["tokens"]))
        row["ratio_to_linear_per_atom"] = f"{each(row) / base:.2f}" if base else ""
    return rows


if __name__ == "__main__":
    main()
