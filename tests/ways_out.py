"""Ways out of Python: a head through each of them, beside the head itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexhead.modules import HeadModule
from convexhead.program.activations import ACTIVATIONS, sample_gates
from convexhead.program.heads import HEADS
from kinds import cases, head_of, pooled

Case = tuple[str, str, str, bool]
"""Head, activation, pool, and whether samples may have any number of tokens."""
Run = Callable[..., Tensor]
S, D, C = 6, 4, 4
CASES: list[Case] = [
    (*case, any_length)
    for case in pooled(list(dict.fromkeys(case[:2] for case in cases(*ACTIVATIONS))), "mean", "cls", "none")
    for any_length in ([False, True] if HEADS[case[0]].any_length or case[0] == "attentive" else [False])
]


class Way(NamedTuple):
    """A way out of Python.

    Attributes
    ----------
    run
        Makes of a network, and of tokens to trace it by, what runs elsewhere.
    allowed
        Largest difference of its outputs from the network's own, relative to the largest of them.
    dtype
        What tokens are rounded to first.
    """

    run: Callable[[HeadModule, tuple[Tensor, ...]], Run]
    allowed: float
    dtype: torch.dtype = torch.float32


def build(case: Case) -> tuple[HeadModule, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The network of a case, tokens to trace it by, and others: of another batch, and another length if it may."""
    name, activation, pool, any_length = case
    generator = torch.Generator().manual_seed(1)
    head = head_of(name, S, D, pool=pool, grid=(2, 3), variant="grouped", places=not any_length)
    gates = sample_gates(head, 3, generator) if activation == "gated-relu" else None
    module = HeadModule(head, activation, gates, 5, C, intercept=True, any_length=any_length).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    tokens, others = (torch.randn(b, s, D, generator=generator) for b, s in ((3, S), (5, 9 if any_length else S)))
    if not any_length:
        return module, (tokens,), (others,)
    mask = torch.rand(others.shape[:2], generator=generator) > 0.3
    mask[:, 0] = True
    return module, (tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)), (others, mask)


@torch.no_grad()
def difference(case: Case, way: Way) -> float:
    """Of the outputs for another batch, and for one sample of it, relative to the largest."""
    module, args, (others, *mask) = build(case)
    others = others.to(way.dtype).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn of their own code
        run = way.run(module, args)
    worst = 0.0
    for inputs in ((others, *mask), (others[:1], *(each[:1] for each in mask))):
        expected, found = module(*inputs), run(*inputs)
        if found.shape != expected.shape:
            return float("inf")
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


# -- the ways ---------------------------------------------------------------------------------------------------------
def _export(module: HeadModule, args: tuple[Tensor, ...]) -> Run:
    return torch.export.export(module, args, dynamic_shapes=_free_axes(args)).module()


def _compile(module: HeadModule, args: tuple[Tensor, ...]) -> Run:
    torch._dynamo.reset()
    run = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    run(*args)
    return run


def _onnx(module: HeadModule, args: tuple[Tensor, ...]) -> Run:
    import onnxruntime

    program: Any = torch.onnx.export(
        module, args, dynamo=True, opset_version=18, dynamic_shapes=_free_axes(args), verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())

    def run(*inputs: Tensor) -> Tensor:
        feed = {put.name: each.numpy() for put, each in zip(session.get_inputs(), inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def _free_axes(args: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """The batch; with a mask the number of tokens too."""
    free = {axis: torch.export.Dim(name) for axis, name in enumerate("bs"[: len(args)])}
    return (free,) * len(args)


def _half(dtype: torch.dtype) -> Callable[[HeadModule, tuple[Tensor, ...]], Run]:
    def way(module: nn.Module, args: tuple[Tensor, ...]) -> Run:
        low = copy.deepcopy(module).to(dtype)
        assert low.values.dtype == dtype
        return lambda X, *mask: low(X.to(dtype), *mask).float()

    return way


def _autocast(dtype: torch.dtype) -> Callable[[HeadModule, tuple[Tensor, ...]], Run]:
    def way(module: nn.Module, args: tuple[Tensor, ...]) -> Run:
        def run(*inputs: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return module(*inputs).float()

        return run

    return way


WAYS = {
    "torch.export": Way(_export, 1e-4),
    "torch.compile": Way(_compile, 1e-4),
    "TorchScript": Way(torch.jit.trace, 1e-4),
    "ONNX": Way(_onnx, 1e-4),
    "float16": Way(_half(torch.float16), 5e-3, torch.float16),
    "bfloat16": Way(_half(torch.bfloat16), 4e-2, torch.bfloat16),
    "autocast float16": Way(_autocast(torch.float16), 5e-3, torch.float16),
    "autocast bfloat16": Way(_autocast(torch.bfloat16), 4e-2, torch.bfloat16),
}


def some_of_each_head() -> Iterator[Case]:
    """A case of each head, of another activation and pool for each: what CI runs of the slow ways."""
    for turn, name in enumerate(HEADS):
        own = [case for case in CASES if case[0] == name]
        yield own[(5 * turn + 9) % len(own)]
