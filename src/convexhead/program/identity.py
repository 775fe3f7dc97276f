"""Which problem it is: everything that the optimum depends on, β apart, in named parts.

A lower bound belongs to one problem. Two problems are the same when all parts of their identities are equal, and then

    min over all heads of  F + β Ω

is the same number for every β. Parts are short texts. Arrays are known by the SHA-256 of their values:

    tokens, targets   of the values as float64 numbers, whatever type holds them: float32 tokens and their exact float64
                      copies are equal, as are labels of other names with the same one-hot rows, and 0 equals −0
    gates             the same; their number, order and exact values count. Of the attentive head: its queries, or the
                      ball that they were searched in
    loss              its name and parameters; of a loss of one's own also its code and class attributes
    grid              only of heads that read it; pool: only where there are several tokens

Samples are hashed in blocks that are cut by their number and their size alone, so every number of processes finds the
same text. Tokens of a store are read and hashed as they come out, and equal the same tokens in an array, but for one
case: principal components and whitened tokens are products in single precision, whose last bits depend on how many
samples are read at a time. Such tokens are known by the checksums of the store's files and of its reduction.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convexhead.program.losses import LOSSES, Loss
from convexhead.runtime.content import content_hash
from convexhead.runtime.ranks import Ranks
from convexhead.runtime.stored_tokens import CHUNK_BYTES, StoredTokens, read_ahead

if TYPE_CHECKING:
    from convexhead.program.problem import Problem

BLOCK = 2**16
"""Numbers that are hashed together (one sample's if that is more). It is part of the identity: never change it."""
HASHED = {"tokens": "tokens", "targets": "labels or targets", "weights": "sample weights", "gates": "gates"}
"""Parts of an identity that hold a hash, and the words for them in a message."""
STATED = {
    "head": "head",
    "activation": "activation",
    "loss": "loss",
    "pool": "pool",
    "grid": "token grid",
    "blocks": "number of channel groups",
    "outputs": "kind of outputs",
    "intercept": "intercept",
}
"""Parts of an identity that hold a plain value, and the words for them in a message."""
PARTS = (*HASHED, *STATED)
FILES = "by-files"
"""Prefix of a hash of tokens that is made from the files of their store and not from values."""


def identify(problem: Problem) -> dict[str, str]:
    """The parts of a problem's identity: those of `PARTS`."""
    head, ranks = problem.head, problem.ranks
    gates = getattr(problem.activation, "gates", head.queries)
    if head.ball is not None:  # over all queries of the ball
        gates = head.ball.described()
    return {
        "tokens": problem.operator.stored or digest_rows(problem.operator.X, ranks),
        "targets": digest_rows(problem.targets, ranks),
        "weights": "none" if problem.weights is None else digest_rows(problem.weights, ranks),
        "gates": "none" if gates is None else digest_rows(gates),
        "head": head.name,
        "activation": problem.activation.name,
        "loss": describe_loss(problem.loss),
        "pool": head.pool if head.s > 1 else "one token",
        "grid": "x".join(map(str, head.grid)) if head.reads_grid else "not read",
        "blocks": str(head.n_groups) if head.ball is None else "searched",
        "outputs": getattr(head, "outputs", "shared") if head.n_groups > 1 else "shared",
        "intercept": "fitted" if problem.fit_intercept else "none",
    }


def differences(reference: Mapping[str, object], problem: Mapping[str, object]) -> list[str]:
    """What differs between a reference's problem and another, in words: ``another head: mlp instead of fno``."""
    told = []
    for part, words in STATED.items():
        if reference.get(part) != problem.get(part):
            told.append(f"another {words}: {reference.get(part)} instead of {problem.get(part)}")
    of_queries = {"gates": "queries"} if reference.get("head") == problem.get("head") == "attentive" else {}
    for part, words in {**HASHED, **of_queries}.items():
        both = [str(texts.get(part, "none")) for texts in (reference, problem)]
        if both[0] != both[1]:
            shapes = [text.split(" ")[0] for text in both]
            told.append(f"other {words}" + (f": {shapes[0]} instead of {shapes[1]}" if shapes[0] != shapes[1] else ""))
            if shapes[0] == shapes[1] and (FILES in both[0]) != (FILES in both[1]):
                told[-1] += " (PCA or whitened tokens of a store equal only themselves: pass the store, not an array)"
    return told


# -- arrays -----------------------------------------------------------------------------------------------------------
def digest_rows(X: Tensor | StoredTokens, ranks: Ranks | None = None) -> str:
    """Shape and SHA-256 of ``X (n, ...)``, whose rows the processes share in order; all of them get the same text."""
    ranks, cuts = ranks or Ranks(), [0, len(X)]
    if ranks.size > 1:
        lengths = torch.zeros(ranks.size, dtype=torch.int64)
        lengths[ranks.rank] = len(X)
        cuts = [0, *torch.cumsum(ranks.sum(lengths)[0], 0).tolist()]
    start, stop, n = cuts[ranks.rank], cuts[ranks.rank + 1], cuts[-1]
    size = max(1, BLOCK // max(1, math.prod(X.shape[1:])))
    digests = np.zeros((math.ceil(n / size), 4), np.int64)
    split = sorted({cut // size for cut in cuts[1:-1] if cut % size})  # blocks whose rows several processes hold
    first, last = math.ceil(start / size), stop // size if stop < n else math.ceil(n / size)
    if first < last:
        for k, block in enumerate(_blocks(X, first * size - start, min(last * size, n) - start, size), first):
            digests[k] = _digest(block)
    digests = ranks.sum(torch.from_numpy(digests))[0].numpy()
    for k in split:
        rows = slice(max(k * size, start), min((k + 1) * size, n, stop))
        whole = torch.zeros(min(size, n - k * size), *X.shape[1:], dtype=torch.float64)
        if rows.start < rows.stop:
            whole[rows.start - k * size : rows.stop - k * size] = X[rows.start - start : rows.stop - start].cpu()
        digests[k] = _digest(ranks.sum(whole)[0])
    shape = "x".join(map(str, (n, *X.shape[1:])))
    return f"{shape} {hashlib.sha256(shape.encode() + digests.tobytes()).hexdigest()}"


def _blocks(X: Tensor | StoredTokens, start: int, stop: int, size: int) -> Iterator[Tensor]:
    """Rows ``start .. stop``, ``size`` at a time."""
    if isinstance(X, Tensor):
        yield from X[start:stop].split(size)
        return
    row = max(1, math.prod(X.shape[1:]) * X.dtype.itemsize)
    many = size * max(1, int(CHUNK_BYTES["cpu"] // (size * row)))
    for _, chunk in read_ahead(X, many, start=start, stop=stop):
        yield from chunk.split(size)


def _digest(block: Tensor) -> NDArray[np.int64]:
    """SHA-256 of the values as four numbers, whatever type holds them."""
    block = block.detach().cpu()
    if block.dtype in (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        values = block.float() + 0.0  # −0 becomes 0
    else:
        single = block.float()
        values = (single if torch.equal(single.double(), block.double()) else block.double()) + 0.0
    digest = hashlib.sha256(str(values.dtype).encode())
    digest.update(values.contiguous().numpy().data)
    return np.frombuffer(digest.digest(), np.int64)


# -- losses -----------------------------------------------------------------------------------------------------------
def describe_loss(loss: Loss) -> str:
    """Name and parameters of a loss, and a hash of its code where it is not one of the library's."""
    parameters = ", ".join(f"{name}={_text(value)}" for name, value in sorted(vars(loss).items()))
    if LOSSES.get(loss.name) is type(loss):
        return f"{loss.name}({parameters})" if parameters else loss.name
    return f"{type(loss).__qualname__}({parameters}) {content_hash(loss)}"


def _text(value: Any) -> str:
    """A parameter in a message: numbers and words as they are, the rest as a hash."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if plain else content_hash(value)[:12]
