"""The problems that solvers are measured on: self-attention linear with cross-entropy, at a fraction of β_max.

Three small ones that every solver can take, and CIFAR-100 through EfficientNet-Lite0 at three sizes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import convexhead as ch
from common import timed
from convexhead.fitting import beta_max_of
from convexhead.program.activations import make_activation
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.tokens import extract
from convexhead.tokens.fit_reduction import fit_reduction


@dataclass
class Instance:
    """Tokens ``X (n, s, d)``, labels ``y (n,)`` and the fraction of β_max.

    Attributes
    ----------
    tol : float
        The certified relative gap that is asked for.
    small : bool
        Whether dense features and ``Z`` can be formed: FISTA and CVXPY's solvers run on these alone.
    scs, clarabel : str
        Why they are left out, if they are.
    """

    name: str
    X: Tensor
    y: Tensor
    ratio: float
    tol: float
    small: bool = True
    scs: str = ""
    clarabel: str = ""

    @property
    def Y(self) -> Tensor:
        """One-hot labels ``(n, c)`` in float64."""
        return torch.nn.functional.one_hot(self.y).double()

    def problem(self) -> Problem:
        """Ready for passes, in the precision that the estimators would take."""
        head = make_head("self-attention", *self.X.shape[1:])
        activation = make_activation("linear", head, None)
        dtype = torch.float64 if self.small else torch.float32
        return Problem(Operator(self.X, head, activation, dtype=dtype), self.Y.bool().unsqueeze(1), CrossEntropy())

    @cached_property
    def _beta(self) -> tuple[float, float]:
        problem = self.problem()
        seconds, beta_max = timed(lambda: beta_max_of(problem, torch.Generator().manual_seed(0)))
        return self.ratio * beta_max, seconds

    @property
    def beta(self) -> float:
        """``ratio · β_max``. Every solver is given it; finding it takes `beta_seconds`."""
        return self._beta[0]

    @property
    def beta_seconds(self) -> float:
        return self._beta[1]


# -- small ones -----------------------------------------------------------------------------------
def synthetic(n: int, s: int, d: int, c: int, *, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian tokens; labels the argmax of a random attention head of ``rank`` atoms, standardised, plus 0.5 noise."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    X, U, V = normal(n, s, d), normal(rank, d, d), normal(rank, d, c)
    mixed = torch.einsum("nd,kde,nef->nkf", X.mean(1), U, X.mT @ X / s)
    f = torch.einsum("nkf,kfc->nc", mixed, V)
    return X, ((f - f.mean(0)) / f.std(0) + 0.5 * normal(n, c)).argmax(1)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as 16 tokens of 2×2 pixels, scaled to [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    patches = torch.as_tensor(images).view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4) / 16
    return patches.reshape(-1, 16, 4), torch.as_tensor(labels)


RANK_28_SEED = 7
"""Seed whose optimum has rank 28: the problem that defeats factored training with few heads."""
TOO_LARGE = "not run: its factorisation needs more than 7 GB"


# -- CIFAR-100 ------------------------------------------------------------------------------------
def cifar8k_store(tokens: str, images: str | None = None) -> ch.TokenStore:
    """80 train and 20 test images a class, EfficientNet-Lite0's last map, standardised, 128 principal components.

    ``images``, a folder with these in train/ and test/, is extracted to the store ``tokens`` unless that is there.
    """
    if images is not None:
        extract(images, "packaged:efficientnet-lite0", tokens, channels=128, reduce="pca", crop_pct=1.0)
    return ch.TokenStore.open(tokens)


def arrays(view) -> tuple[Tensor, Tensor]:
    """Tokens and labels of a split."""
    return torch.from_numpy(view.read()), torch.from_numpy(np.asarray(view.labels))


def write_tokens(store: str, channels: int, folder: Path, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The train split in a random order, so that the first rows are a random sample of any size, as float32 on disk.

    More stored channels than ``channels`` are standardised and reduced to that many principal components, fitted on
    every tenth image; others are only standardised, as the store has them. Files that are there already are used.
    """
    tokens, labels = folder / f"{Path(store).name}-{channels}.npy", folder / f"{Path(store).name}-{channels}-y.npy"
    if not labels.exists():
        view = ch.TokenStore.open(store)["train"]
        reduction = view.reduction
        if view.raw(0, 1).shape[2] > channels and view.shape[2] != channels:
            some = (view.raw(i, i + 50) for i in range(0, len(view), 500))
            reduction = fit_reduction(some, standardize=True, components=channels, constant=False)
        width = view.shape[2] if reduction is None else reduction.channels
        place = np.random.default_rng(0).permutation(len(view))
        out = np.lib.format.open_memmap(tokens, "w+", np.float32, (len(view), view.shape[1], width))
        for i in range(0, len(view), 500):
            raw = view.raw(i, i + 500)
            out[place[i : i + 500]] = raw if reduction is None else reduction.apply(raw)
        out.flush()
        y = np.empty(len(view), np.int64)
        y[place] = view.labels
        np.save(labels, y)
    return np.load(tokens, mmap_mode="r")[:n], np.load(labels)[:n]


def registry(
    cifar8k: str | None,
    cifar50k: str | None,
    images: str | None = None,
    channels: int = 128,
    work: str | None = None,
) -> dict[str, Callable[[], Instance]]:
    """Makers of the instances by name; CIFAR's where there is a store. See `write_tokens` for the folder ``work``."""
    made: dict[str, Callable[[], Instance]] = {
        "synthetic-200": lambda: Instance(
            "synthetic n=200 s=16 d=4 c=3 ratio=0.1", *synthetic(200, 16, 4, 3, rank=5, seed=0), 0.1, 1e-5
        ),
        "digits": lambda: Instance("digits n=1797 s=16 d=4 c=10 ratio=0.1", *digits(), 0.1, 1e-5),
        "synthetic-1000": lambda: Instance(
            "synthetic n=1000 s=16 d=8 c=10 ratio=0.01",
            *synthetic(1000, 16, 8, 10, rank=5, seed=RANK_28_SEED),
            0.01,
            1e-5,
            clarabel=TOO_LARGE,
        ),
    }
    if cifar8k is not None:

        def of_8k(every: int) -> Instance:
            X, y = arrays(cifar8k_store(cifar8k, images)["train"])
            X, y = X[::every], y[::every]
            name = f"CIFAR-{len(X) // 1000}k s={X.shape[1]} d={X.shape[2]} c=100 ratio=0.02"
            return Instance(name, X.contiguous(), y, 0.02, 1e-3, small=False)

        made["cifar2k"], made["cifar8k"] = partial(of_8k, 4), partial(of_8k, 1)
    if cifar50k is not None:

        def of_50k() -> Instance:
            with tempfile.TemporaryDirectory(prefix="convexhead-suite-") as folder:
                X, y = write_tokens(cifar50k, channels, Path(work or folder))
                X = torch.from_numpy(np.array(X))
            name = f"CIFAR-{len(X) // 1000}k s={X.shape[1]} d={X.shape[2]} c=100 ratio=0.02, {Path(cifar50k).name}"
            return Instance(name, X, torch.from_numpy(y), 0.02, 1e-3, small=False)

        made["cifar50k"] = of_50k
    return made
