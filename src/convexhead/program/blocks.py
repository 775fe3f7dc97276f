"""A head's weights block by block, the form that users see: ``(k, *mixing_shape)`` and ``(k, e, c)`` for each block.

Where outputs are grouped (block-FNO), the values of a block have the ``c/B`` columns that its group writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convexhead.program.atoms import Atoms
from convexhead.program.heads.base import Head


def atoms_from_blocks(
    head: Head,
    mixing: Sequence[NDArray[Any]],
    values: Sequence[NDArray[Any]],
    n_outputs: int,
    intercept: torch.Tensor,
) -> Atoms:
    """The atoms of all blocks, in their order."""
    mask = head.output_mask(n_outputs)
    U, V, block = [], [], []
    for j, pair in enumerate(zip(mixing, values, strict=True)):
        u, v = (torch.as_tensor(np.asarray(w), dtype=torch.float64) for w in pair)
        full = v
        if mask is not None:
            full = v.new_zeros(len(v), head.value_rows, n_outputs)
            full[:, :, mask[j % head.n_groups]] = v
        U.append(u.reshape(-1, *head.mixing_shape))
        V.append(full)
        block.append(torch.full((len(u),), j))
    return Atoms(torch.cat(U), torch.cat(V), torch.cat(block), intercept)


def blocks_of(head: Head, atoms: Atoms, n_blocks: int) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """``(mixing, values)`` of atoms on the CPU; inverse of `atoms_from_blocks`."""
    mask = head.output_mask(atoms.V.shape[2])
    mixing, values = [], []
    for j in range(n_blocks):
        mine = atoms.select(atoms.block == j)
        V = mine.V if mask is None else mine.V[:, :, mask[j % head.n_groups]]
        mixing.append(mine.U.numpy())
        values.append(V.numpy())
    return mixing, values
