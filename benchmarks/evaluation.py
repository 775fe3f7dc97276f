"""Rate of one evaluation, value and gradient, of every head: the products it needs against the machine's GEMM rate.

    python benchmarks/evaluation.py [--samples 8000 --tokens 49 --channels 128 --classes 100] [--atoms 32] [--gates 50]
                                    [--device cuda] [--bfloat16] [--head NAME ...] [--again]

Tokens are random, which does not matter here. On a GPU products are made in TF32 (`torch.set_float32_matmul_precision
("high")`), and so is the GEMM they are compared with; for the published size of tokens on an H200 take

    python benchmarks/evaluation.py --device cuda --samples 4000 --tokens 196 --channels 256

--bfloat16 measures what the solver mostly does where the hardware multiplies bfloat16 fast: steps around an anchor
(`convexhead.solvers.increments`), whose products with the anchor's mixed tokens come on top of the same arithmetic.

With gates each of 10, 25 and --gates gates has one atom, at a quarter of the samples. Medians of 7. Rows:
benchmarks/results/evaluation.csv; 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch

from common import Row, Skip, Table, hardware, timed
from convexhead.program.activations import GatedReLU, make_activation, sample_gates
from convexhead.program.heads import HEADS, Head, make_head
from convexhead.program.losses import CrossEntropy
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.solvers.increments import Increments

BFLOAT16 = "bfloat16 steps"
"""Type of the rows of --bfloat16, which are measured against products in TF32."""


def arithmetic(head: Head, c: int, atoms: int, gates: int = 0) -> float:
    """Operations that value and gradient of one sample take with ``atoms`` atoms under mean pooling, at the least.

    Products with values are ``3 · 2 e c`` an atom: outputs, and the gradients in ``V`` and in the mixed tokens. Mixing
    is counted forward and back, with ``w = d`` channels (``d/B`` of a block-FNO), ``f`` the frequencies of a real
    Fourier transform over the grid, and what does not depend on the atoms at hand (Grams, gated means, spectra):

    ===============  =========================================  ================================================
    head             linear, an atom                            gated, an atom
    ===============  =========================================  ================================================
    self-attention   ``4d² + 2 min(2d², 4sd)``                  ``4sd² + 8sd``, and ``2s²d`` a gate
    attentive        ``4Jd`` (of features that are made)        –
    mlp-mixer        ``4sd`` (pooled: one weight a token)       ``4s²d``
    fno, block-fno   ``4w`` (on pooled tokens)                  ``16fw``, and ``4fs`` a gate
    mlp              ``4d``                                     ``4d``
    linear           nothing                                    –
    ===============  =========================================  ================================================
    """
    s, d, w = head.s, head.d, head.d // head.n_groups
    f = head.grid[0] * (head.grid[1] // 2 + 1)
    if head.name == "linear":
        return 4 * d * c
    values = 6 * head.value_rows * c
    if gates:
        of_atom = {"self-attention": 4 * s * d * d + 8 * s * d, "mlp-mixer": 4 * s * s * d, "mlp": 4 * d}
        of_gate = {"self-attention": 2 * s * s * d, "mlp-mixer": 0, "mlp": 0}
        return atoms * (of_atom.get(head.name, 16 * f * w) + values) + gates * of_gate.get(head.name, 4 * f * s)
    of_atom = {"self-attention": 4 * d * d + 2 * min(2 * d * d, 4 * s * d), "mlp-mixer": 4 * s * d}
    of_atom["attentive"] = 4 * head.mixing_size
    return atoms * (of_atom.get(head.name, 4 * w) + values)


def random_problem(name: str, n: int, s: int, d: int, c: int, gates: int, device: str) -> Problem:
    """Standard normal tokens and random labels."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(n, s, d, generator=generator), torch.randint(c, (n,), generator=generator)
    head = make_head(name, s, d)
    activation = (
        GatedReLU(head, sample_gates(head, gates, generator)) if gates else make_activation("linear", head, None)
    )
    Y = (y.unsqueeze(1) == torch.arange(c)).unsqueeze(1)
    return Problem(
        Operator(X.to(device), head, activation, dtype=torch.float32, device=torch.device(device)), Y, CrossEntropy()
    )


def evaluation_seconds(problem: Problem, atoms: int, repeats: int = 7, rough: Problem | None = None) -> float:
    """Median time of value and gradient, as increments where a ``rough`` problem is given; atoms are spread over the
    blocks."""
    generator = torch.Generator().manual_seed(0)
    model = problem.empty()
    if problem.head.learns_mixing:
        U = torch.randn(atoms, *problem.head.mixing_shape, generator=generator) / math.sqrt(problem.head.mixing_size)
        V = 0.01 * torch.randn(atoms, *problem.value_shape, generator=generator)
        model.U, model.block = U.to(model.U), (torch.arange(atoms) % problem.n_blocks).to(problem.device)
        model.V = problem.mask_values(V.to(model.V), model.block)
    device = problem.device.type
    passes = problem if rough is None else Increments(problem, rough, model)
    passes.value_and_gradient(model, 0.1)
    return statistics.median(timed(lambda: passes.value_and_gradient(model, 0.1), device)[0] for _ in range(repeats))


def described(
    problem: Problem, atoms: int, gates: int, machine: Row, repeats: int = 7, rough: Problem | None = None
) -> Row:
    """Seconds, and the share of the GEMM rate at which the products that are needed were made."""
    seconds = evaluation_seconds(problem, atoms, repeats, rough)
    atoms = atoms if problem.head.learns_mixing else 1
    rate = problem.n * arithmetic(problem.head, problem.c, atoms, problem.n_blocks if gates else 0) / seconds / 1e9
    gemm = machine[f"gemm_gflops_{str(problem.dtype).removeprefix('torch.')}"]
    return {
        "seconds_median": f"{seconds:.4g}",
        "gflops": f"{rate:.4g}",
        "share_of_gemm_rate": f"{rate / gemm:.3g}",
        "times_the_arithmetic": f"{gemm / rate:.3g}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=49)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--atoms", type=int, default=32)
    parser.add_argument("--gates", type=int, default=50)
    parser.add_argument("--head", nargs="*", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; nothing else on CPUs
    machine = hardware(device=args.device)
    machine |= {"dtype": BFLOAT16 if args.bfloat16 else "TF32" if args.device != "cpu" else "float32"}
    key = ("device", "instance", "head", "activation", "atoms", "gates", "dtype")
    table = Table("evaluation", key, machine, again=args.again)
    for gates in (0, *sorted({min(g, args.gates) for g in (10, 25, args.gates)})):
        n = args.samples // 4 if gates else args.samples
        for name in args.head:
            if gates and not HEADS[name].learns_mixing:
                continue

            def row(name: str = name, gates: int = gates, n: int = n) -> Row:
                sizes = n, args.tokens, args.channels, args.classes
                problem = random_problem(name, *sizes, gates, args.device)
                rough = problem.with_half_products() if args.bfloat16 else None
                if args.bfloat16 and rough is None:
                    raise Skip("no fast bfloat16 products on this hardware, or none in this head")
                atoms = problem.n_blocks if gates else args.atoms
                return described(problem, atoms, gates, machine, rough=rough)

            sizes = f"n={n} s={args.tokens} d={args.channels} c={args.classes}"
            activation = "gated-relu" if gates else "linear"
            atoms = "one a block" if gates else args.atoms
            where = {"device": machine.get("gpu", "cpu"), "instance": sizes, "head": name, "activation": activation}
            table.run(row, **where, atoms=atoms, gates=gates, dtype=machine["dtype"])


if __name__ == "__main__":
    main()
