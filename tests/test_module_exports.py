"""A trained head runs where its owner's model runs: every head, activation and pool through every way out of Python."""

from __future__ import annotations

import pytest
import torch

from convexhead.modules import HeadModule
from convexhead.program.activations import ACTIVATIONS, sample_gates
from convexhead.program.heads import HEADS
from kinds import cases, head_of, pooled

S, D, C = 6, 4, 4
CASES = [
    (*case, any_length)
    for case in pooled(list(dict.fromkeys(case[:2] for case in cases(*ACTIVATIONS))), "mean", "cls", "none")
    for any_length in ([False, True] if HEADS[case[0]].any_length or case[0] == "attentive" else [False])
]


def table(*in_ci):
    """All cases; those that CI does not run are marked."""
    return pytest.mark.parametrize(
        "case",
        [pytest.param(case, marks=() if case in in_ci else pytest.mark.table, id="-".join(map(str, case)))
         for case in CASES],
    )  # fmt: skip


def build(case):
    """The network of a case, tokens to export it with, and others: of another batch, and another length if it may."""
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


def dynamic(any_length):
    free = {0: torch.export.Dim("b"), 1: torch.export.Dim("s")} if any_length else {0: torch.export.Dim("b")}
    return (free, free) if any_length else (free,)


def agree(run, module, others, *, atol=1e-4):
    """On another batch, and on one sample of it."""
    for args in (others, tuple(arg[:1] for arg in others)):
        expected, found = module(*args), run(*args)
        torch.testing.assert_close(found, expected, rtol=0, atol=atol * float(expected.detach().abs().max()))


def one_of_each_head():
    """A case of each head, of another activation and pool for each: what CI runs of the slow ways."""
    for turn, name in enumerate(HEADS):
        own = [case for case in CASES if case[0] == name]
        yield own[(5 * turn + 9) % len(own)]


EVERY_HEAD = list(one_of_each_head())


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace(case):
    module, args, others = build(case)
    agree(torch.jit.trace(module, args), module, others)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
def test_half_precision(case, dtype, share):
    module, _, (others, *mask) = build(case)
    others = others.to(dtype).float()
    low, _, _ = build(case)
    low.to(dtype)
    assert low.values.dtype == dtype
    agree(lambda X, *mask: low(X.to(dtype), *mask).float(), module, (others, *mask), atol=share)

    def cast(X, *mask):
        with torch.autocast("cpu", dtype=dtype):
            return module(X, *mask).float()

    agree(cast, module, (others, *mask), atol=share)


@table(*EVERY_HEAD)
def test_export(case):
    module, args, others = build(case)
    exported = torch.export.export(module, args, dynamic_shapes=dynamic(case[3]))
    agree(exported.module(), module, others)


@table(*EVERY_HEAD[:2])
def test_compile(case):
    module, args, others = build(case)
    torch._dynamo.reset()
    run = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    run(*args)
    agree(run, module, others)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:# The axis name")
@table(*EVERY_HEAD[:3])
def test_onnx(case):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, args, others = build(case)
    shapes = dynamic(case[3])
    program = torch.onnx.export(module, args, dynamo=True, opset_version=18, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())

    def run(*args):
        feed = {put.name: arg.numpy() for put, arg in zip(session.get_inputs(), args, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    agree(run, module, others)
