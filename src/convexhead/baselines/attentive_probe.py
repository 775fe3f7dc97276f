"""The attentive probe of the field: learned queries read the tokens by softmax attention, a linear classifier follows.

    a_m = softmax(X q_m / √d)            one map over the s tokens for each of M queries
    f   = W [a_1ᵀ X V_1, …, a_Mᵀ X V_M] + b

Tokens are their own keys, and the value projection is split over the queries: multi-query attention without what it
does not need ("efficient probing", Psomas et al., *Attention, Please! Revisiting Attentive Probing for Masked Image
Modeling*, 2025). Trained by AdamW with a cosine schedule; learning rate and weight decay are chosen on validation.
On a GPU where there is one, as the heads that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from convexhead.experiments.cells import AdamSettings, finite, network_scores, top
from convexhead.experiments.splits import Splits
from convexhead.experiments.tuning import Tuned, tune
from convexhead.inputs import open_tokens, pick_device
from convexhead.runtime.clock import now
from convexhead.runtime.run_folder import Piece, RunFolder
from convexhead.runtime.samples import default_memory
from convexhead.runtime.stored_tokens import StoredTokens, Tokens, token_bytes

Probe = TypeVar("Probe", bound=nn.Module)
QUERIES = 16
OPTIONS = tuple((lr, decay) for lr in (0.001, 0.003, 0.01, 0.03) for decay in (0.01, 0.3))
"""Pairs of learning rate and weight decay to try."""


class AttentiveProbe(nn.Module):
    """See the module's text.

    Parameters
    ----------
    n_channels, n_outputs : int
        ``d`` and ``c``.
    n_queries : int
        ``M``.
    seed : int
        Of the start.
    """

    def __init__(self, n_channels: int, n_outputs: int, n_queries: int = QUERIES, seed: int = 0) -> None:
        super().__init__()
        width = math.ceil(n_channels / n_queries)
        generator = torch.Generator().manual_seed(seed)
        self.queries = nn.Parameter(torch.randn(n_queries, n_channels, generator=generator))
        values = torch.randn(n_queries, n_channels, width, generator=generator) / n_channels**0.5
        self.values = nn.Parameter(values)
        self.classifier = nn.Linear(n_queries * width, n_outputs)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Float[Tensor, "n s d"]) -> Float[Tensor, "n c"]:
        maps = torch.softmax(tokens @ self.queries.T / tokens.shape[2] ** 0.5, dim=1)  # (n, s, M)
        read = maps.transpose(1, 2) @ tokens  # (n, M, d): values are linear, so they come after the average
        return self.classifier(torch.einsum("nmd,mdw->nmw", read, self.values).flatten(1))

    @classmethod
    def restored(cls, weights: dict[str, Tensor]) -> AttentiveProbe:
        """The probe with these weights."""
        queries = weights["queries"]
        probe = cls(queries.shape[1], len(weights["classifier.bias"]), len(queries))
        probe.load_state_dict(weights)
        return probe


def train_attentive_probe(
    splits: Splits, *, lr: float, weight_decay: float, epochs: int, batch_size: int, seed: int
) -> Piece:
    """One training run; its record has what `convexhead.experiments.tuning.tune` chooses by."""
    began = now()
    classes, y = np.unique(splits.train.labels, return_inverse=True)
    probe, mean_loss = fit_attentive_probe(
        splits.train.tokens, torch.from_numpy(y), len(classes), nn.functional.cross_entropy, lr=lr,
        weight_decay=weight_decay, epochs=epochs, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    seconds = now() - began
    scores = network_scores(probe, splits.validation.tokens)
    return Piece(
        {
            "seed": seed,
            "learning_rate": lr,
            "weight_decay": weight_decay,
            "objective": finite(mean_loss),
            "validation_accuracy": top(scores, classes, splits.validation.labels),
            "seconds": seconds,
            "parameters": sum(p.numel() for p in probe.parameters()),
        },
        {key: value.detach().cpu() for key, value in probe.state_dict().items()},
    )


def fit_attentive_probe(
    tokens: Any,
    targets: Tensor,
    n_outputs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float,
    weight_decay: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[AttentiveProbe, float]:
    """The probe after training, and its mean loss in the last epoch.

    Parameters
    ----------
    tokens : array (n, s, d) or SplitView
    targets : Tensor (n, ...)
        What ``loss(outputs (b, c), targets (b, ...))`` compares outputs with.
    n_outputs : int
        ``c``.
    lr, weight_decay, epochs, batch_size, seed
        Of AdamW, and of the order of the images.
    """
    probe = AttentiveProbe(open_tokens(tokens).shape[2], n_outputs, seed=seed)
    return train_probe(
        probe, tokens, targets, loss, lr=lr, weight_decay=weight_decay, epochs=epochs, batch_size=batch_size, seed=seed
    )


def train_probe(
    probe: Probe,
    tokens: Any,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float,
    weight_decay: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[Probe, float]:
    """Train any network of tokens as the attentive probe is trained; parameters as of `fit_attentive_probe`."""
    device = pick_device("auto")
    X, targets = _on_device(tokens, device), targets.to(device)
    probe = probe.to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    total = epochs * math.ceil(len(X) / batch_size)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / total))
    generator = torch.Generator().manual_seed(seed)
    mean_loss = math.nan
    for _ in range(epochs):
        losses: list[Tensor] = []
        for index in torch.randperm(len(X), generator=generator).to(device).split(batch_size):
            value = loss(probe(X[index].to(device)), targets[index])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            decay.step()
            losses.append(value.detach())
        mean_loss = float(torch.stack(losses).mean())
    return probe, mean_loss


def _on_device(tokens: Any, device: torch.device) -> Tokens:
    """On the device where they fit into half of what is free there, as for a fit; else each batch is read from disk."""
    opened = open_tokens(tokens)
    if len(opened) * token_bytes(opened) > default_memory(device):
        return opened
    return (opened.read() if isinstance(opened, StoredTokens) else opened).to(device)


def tune_attentive_probe(splits: Splits, settings: AdamSettings, folder: RunFolder) -> Tuned:
    """Learning rate and weight decay chosen on the validation part, the best over several seeds."""
    return tune(
        folder,
        OPTIONS,
        settings.seeds or (0,),
        tuning_seeds=settings.tuning_seeds,
        name=lambda option: f"probes/attentive-probe-lr{option[0]:g}-decay{option[1]:g}",
        run=lambda option, seed: train_attentive_probe(
            splits,
            lr=option[0],
            weight_decay=option[1],
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=seed,
        ),
    )
