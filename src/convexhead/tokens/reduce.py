"""Reductions that make tokens small.

Two are free of data and are applied before tokens are written: `pool_channels` and `pool_grid`. One is fitted
on the train split, stored beside the tokens and applied when they are read: the affine map `Reduction`, which
does standardisation, principal components, the metric of the tokens and the constant channel.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from convexhead.errors import FileFormatError, InputError

FORMAT = "convexhead-reduction"
VERSION = 1

Array = TypeVar("Array", NDArray[Any], torch.Tensor)


def pool_channels(tokens: torch.Tensor, channels: int) -> torch.Tensor:
    """Average neighbouring channels, ``(b, s, d)`` to ``(b, s, channels)``: adaptive average pooling.

    Raises
    ------
    InputError
        ``channels`` is not in ``1 .. d``.
    """
    if not 1 <= channels <= tokens.shape[-1]:
        raise InputError(f"channels={channels} must be between 1 and the {tokens.shape[-1]} channels of the tokens")
    return functional.adaptive_avg_pool1d(tokens, channels)


def pool_grid(tokens: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Average neighbouring tokens: ``(b, h * w, d)`` on ``grid = (h, w)`` to the grid ``target``.

    Raises
    ------
    InputError
        ``target`` is larger than the grid or not positive.
    """
    check_pool(grid, target)
    b, _, d = tokens.shape
    image = tokens.transpose(1, 2).reshape(b, d, *grid)
    return functional.adaptive_avg_pool2d(image, target).flatten(2).transpose(1, 2)


def check_pool(grid: tuple[int, int], target: tuple[int, int]) -> None:
    """Refuse a grid that tokens on ``grid`` cannot be averaged down to.

    Raises
    ------
    InputError
        ``target`` is larger than the grid or not positive.
    """
    if not all(1 <= t <= g for t, g in zip(target, grid, strict=True)):
        raise InputError(f"token_pool={target} must be between (1, 1) and the token grid {grid}")


def as_read(
    tokens: NDArray[Any],
    class_token: NDArray[Any] | None,
    grid: tuple[int, int],
    token_pool: tuple[int, int] | None,
    reduction: Reduction | None,
) -> NDArray[np.float32]:
    """Stored tokens ``(b, s, d)`` as a head reads them.

    They are averaged from ``grid`` down to ``token_pool``; a class token ``(b, 1, d)`` goes in front; then all pass
    through the reduction.
    """
    if token_pool is not None:
        tokens = pool_grid(torch.from_numpy(_in_single(tokens)), grid, token_pool).numpy()
    if class_token is not None:
        tokens = np.concatenate([class_token, tokens], axis=-2)
    return reduction.apply(tokens) if reduction else _in_single(tokens)


def _in_single(tokens: NDArray[Any], *, copy: bool = False) -> NDArray[np.float32]:
    """Tokens in float32. Of numpy and torch, torch widens float16 several times as fast."""
    if tokens.dtype == np.float16 and tokens.flags.c_contiguous and tokens.flags.writeable:
        return torch.from_numpy(tokens).float().numpy()
    return tokens.astype(np.float32, order="C", copy=copy)


@dataclass(frozen=True)
class Reduction:
    """The affine map ``((x - mean) * scale) @ basis``, then a channel of ones if ``constant``.

    Attributes
    ----------
    mean
        float32 ``(d,)``.
    scale
        float32 ``(d,)``.
    basis
        float32 ``(d, k)``, or None for the identity: principal axes, the metric ``M``, or their product.
    constant
        Whether a channel with value 1 is appended.
    options
        What was asked of `fit_reduction`; ``whiten`` only where there is a metric.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    basis: NDArray[np.float32] | None
    constant: bool
    options: dict[str, Any]

    @property
    def identity(self) -> str:
        """SHA-256 of everything that decides what comes out: the same map has the same text."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def channels(self) -> int:
        """Number of channels that come out."""
        return (len(self.mean) if self.basis is None else self.basis.shape[1]) + self.constant

    def apply(self, tokens: Array) -> Array:
        """Map tokens ``(..., d)`` of any float type to float32 ``(..., channels)``; numpy in, numpy out.

        Raises
        ------
        InputError
            The tokens do not have ``d`` channels.
        """
        if tokens.shape[-1] != len(self.mean):
            raise InputError(f"tokens have {tokens.shape[-1]} channels, the reduction was fitted on {len(self.mean)}")
        if isinstance(tokens, torch.Tensor):
            return self._apply_torch(tokens)
        reduced = _in_single(tokens, copy=True)
        torch.from_numpy(reduced).sub_(torch.from_numpy(self.mean)).mul_(torch.from_numpy(self.scale))  # in place
        if self.basis is not None:
            reduced = reduced @ self.basis
        if self.constant:
            reduced = np.concatenate([reduced, np.ones_like(reduced[..., :1])], axis=-1)
        return reduced

    def _apply_torch(self, tokens: torch.Tensor) -> torch.Tensor:
        mean, scale = (torch.from_numpy(a).to(tokens.device) for a in (self.mean, self.scale))
        reduced = (tokens.float() - mean) * scale
        if self.basis is not None:
            reduced = reduced @ torch.from_numpy(self.basis).to(tokens.device)
        if self.constant:
            reduced = torch.cat([reduced, torch.ones_like(reduced[..., :1])], dim=-1)
        return reduced

    def to_bytes(self) -> bytes:
        """Serialise as safetensors; everything that is not an array is one JSON entry of its metadata."""
        arrays = {"mean": self.mean, "scale": self.scale}
        if self.basis is not None:
            arrays["basis"] = self.basis
        about = {"format": FORMAT, "version": VERSION, "constant": self.constant, "options": self.options}
        return safetensors.numpy.save(arrays, metadata={"convexhead": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Reduction:
        """Read what `to_bytes` wrote.

        Raises
        ------
        FileFormatError
            Missing, truncated, foreign or newer file.
        """
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {})["convexhead"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["format"] != FORMAT or about["version"] > VERSION:
                raise FileFormatError(f"{str(path)!r} was written by a newer convexhead: upgrade")
            return cls(
                arrays["mean"],
                arrays["scale"],
                arrays.get("basis"),
                bool(about["constant"]),
                about["options"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise FileFormatError(f"{str(path)!r} is not a stored reduction: {error}") from error
