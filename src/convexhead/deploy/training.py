"""Fine-tuning from the certified head: head and last blocks of the backbone, beside the same from a random head.

    min  mean cross-entropy + β · ½ Σ_k (‖U_k‖² + ‖V_k‖²)  over head and last blocks, by AdamW

The certified head is the optimum of this in the head alone (linear probing, then fine-tuning: Kumar et al., ICLR 2022).
A random head of the same shape gets the same budget. Each start has the learning rates with the best accuracy on a
fifth of the training images; the certified head is fitted anew to the other four for that, since it has seen the fifth.
Then each start is trained on all of the training images, once for each seed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as to_bytes
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from convexhead import inputs
from convexhead.deploy.network import ImageModel, Trained, as_model, attach
from convexhead.errors import InputError
from convexhead.estimators import ConvexHeadClassifier
from convexhead.model import Model
from convexhead.runtime.clock import now
from convexhead.runtime.progress import Notify, silent
from convexhead.targets import is_multilabel
from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.parallel import map_on_cores
from convexhead.tokens.sources.base import ImageSource
from convexhead.tokens.sources.open import open_source
from convexhead.tokens.store.files import write_atomic

STARTS = ("certified", "random")
WARM_UP = 0.1
"""Share of the steps in which the learning rates rise from 0. Chosen by hand."""
SCORED = 64
"""Images that are scored at a time. Chosen by hand."""
ROUGH = 1e-2
"""Tolerance of the head that rates are chosen with, at least. Chosen by hand: accuracies there are known to less."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on.

    Attributes
    ----------
    epochs, batch_size : int
    blocks : int
        Last blocks of the backbone that are trained, with what comes after them.
    rates : sequence of float
        Learning rates of the last block to choose from.
    head_rates : sequence of float
        Those of the head, in units of the last block's, to choose from.
    layer_decay : float
        Factor of the learning rate from a block to the one before it.
    weight_decay : float
        Of AdamW, for the blocks alone: the head has β.
    """

    epochs: int = 2
    batch_size: int = 32
    blocks: int = 2
    rates: Sequence[float] = (1e-4, 5e-4)
    head_rates: Sequence[float] = (1.0, 10.0)
    layer_decay: float = 0.7
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not all(rate > 0 for rate in (*self.rates, *self.head_rates, self.layer_decay)) or not self.rates:
            raise InputError("learning rates must be positive numbers")


@dataclass(frozen=True)
class Trial:
    """One run of fine-tuning: accuracy on the scored split before and after, and seconds of the training."""

    start: str
    seed: int
    rate: float
    head_rate: float
    before: float
    after: float
    seconds: float


@dataclass
class FineTuned:
    """What `finetune` found.

    Attributes
    ----------
    trials : list of Trial
    scored : str
        The split that accuracies are of.
    images : dict
        Number of images by split.
    weights : dict of Tensor
        The network of the certified start and the first seed, for ``load_state_dict`` of what `attach` gives. It has no
        certificate.
    """

    trials: list[Trial]
    scored: str
    images: dict[str, int]
    weights: dict[str, Tensor]

    def accuracies(self, start: str) -> NDArray[np.float64]:
        """After fine-tuning, of each seed."""
        return np.array([trial.after for trial in self.trials if trial.start == start])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"scored": self.scored, "images": self.images, "trials": [asdict(trial) for trial in self.trials]}


@dataclass
class Labelled:
    """Prepared images of a split, and the numbers of the head's outputs."""

    images: Tensor
    labels: Tensor

    def some(self, rows: NDArray[np.int64]) -> Labelled:
        """The images of these rows."""
        return Labelled(self.images[rows], self.labels[rows])


def finetune(
    run: Trained,
    images: str | Path | ImageSource,
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    seeds: int = 3,
    backbone: str | Backbone | None = None,
    device: str = "auto",
    notify: Notify = silent,
) -> FineTuned:
    """Train a certified head and the last blocks of its backbone on, and a random head beside it.

    Parameters
    ----------
    run : path, Model or fitted estimator
        A classifier of images with one label, that was fitted on a token store.
    images : path, str or ImageSource
        With a split ``train``, and ``test`` or ``val`` that is scored once. All are prepared and kept in memory.
    out : path or None
        File for the network's weights, safetensors: ``ch.attach(None, run).load_state_dict`` takes them.
    recipe : Recipe or None
    seeds : int
        Of the random heads, and of the order and the flips of the images.
    backbone, device, notify
        As of `convexhead.predict.predict`.

    Raises
    ------
    InputError
        Another kind of head, images of classes that it does not know, or a backbone without blocks.
    """
    model, recipe = as_model(run), recipe or Recipe()
    if model.classes is None or model.spec.pool is None or is_multilabel(model.spec):
        raise InputError("fine-tuning takes a classifier with one label an image: this head is another")
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    if out is not None and not Path(out).expanduser().parent.is_dir():
        raise InputError(f"{str(out)!r} cannot be written: no such folder")
    source = images if isinstance(images, ImageSource) else open_source(images)
    scored = next((split for split in ("test", "val") if split in source.splits), None)
    if scored is None:
        raise InputError(f"{source.spec!r} has no split test or val to score: give class folders in train/ and test/")
    where = inputs.pick_device(device)
    net = attach(backbone, model).to(where)
    train, test = (_read(source, split, net, notify) for split in ("train", scored))
    settings = recipe, model.beta, where, notify
    work = _Work(net, *settings)
    fitted, held = train_test_split(np.arange(len(train.labels)), test_size=0.2, stratify=train.labels, random_state=0)
    few, rest = train.some(fitted), train.some(held)
    grid = list(itertools.product(recipe.rates, recipe.head_rates))
    found = []
    with work.restoring():
        chosen = dict.fromkeys(STARTS, grid[0])
        if len(grid) > 1:
            notify("fitting the head on four fifths of the train images", 0, 1)
            trying = _Work(attach(net.backbone, _fitted_on(few, model, net, where)).to(where), *settings)
            for start in STARTS:
                scores = [trying.trial(start, 0, rates, few, rest)[0].after for rates in grid]
                chosen[start] = grid[int(np.argmax(scores))]
        for start in STARTS:
            found += [work.trial(start, seed, chosen[start], train, test) for seed in range(seeds)]
    weights = found[0][1]
    if out is not None:
        write_atomic(Path(out).expanduser(), to_bytes(weights))
    counts = {"train": len(train.labels), scored: len(test.labels)}
    return FineTuned([trial for trial, _ in found], scored, counts, weights)


def _read(source: ImageSource, split: str, net: ImageModel, notify: Notify) -> Labelled:
    """The prepared images of a split, with labels by the names of the head's classes."""
    names = net.class_names or []
    if strangers := [name for name in source.class_names if name not in names]:
        raise InputError(f"{source.spec!r} has the class {strangers[0]!r}, which this head does not know: leave it out")
    number = np.array([names.index(name) for name in source.class_names], np.int64)
    n, prepared = len(source.files(split)), []
    for image in map_on_cores(lambda index: net.prepare(source.load(split, index)), range(n)):
        prepared.append(image)
        notify(f"preparing {split} images", len(prepared), n)
    return Labelled(torch.stack(prepared), torch.from_numpy(number[source.labels(split)]))


def _fitted_on(part: Labelled, model: Model, net: ImageModel, device: torch.device) -> Model:
    """The optimum of the head's program on a part of its images.

    The head itself was fitted on all of them: on those that are held out it would look better the less it is changed.
    """
    with torch.no_grad():
        tokens = torch.cat([net.read(images.to(device)).cpu() for images in part.images.split(SCORED)])
    assert model.classes is not None
    known = len(part.labels.unique()) == len(model.classes)
    y = model.classes[part.labels] if known else nn.functional.one_hot(part.labels, len(model.classes)).numpy()
    gates, queries = (None if made is None else made.numpy() for made in (model.gates, model.queries))
    settings = {"beta": model.beta, "tol": max(model.spec.tol, ROUGH), "gates": gates, "device": device.type}
    if queries is not None:
        settings["queries"] = queries
    if not known:
        settings["class_weight"] = None  # which are of labels
    clf = clone(ConvexHeadClassifier.from_model(model)).set_params(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = clf.fit(tokens.numpy(), y).model_
    return replace(fitted, classes=model.classes, origin=model.origin, reduction=model.reduction)


class _Work:
    """Trials of one recipe on one network."""

    def __init__(self, net: ImageModel, recipe: Recipe, beta: float, device: torch.device, notify: Notify) -> None:
        self._net, self._recipe, self._beta, self._device, self._notify = net, recipe, beta, device, notify
        self._certified = _weights(net)

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Leave the network as it was: its backbone may be the caller's."""
        try:
            yield
        finally:
            self._net.load_state_dict(self._certified)
            self._net.requires_grad_(False)

    def trial(
        self, start: str, seed: int, rates: tuple[float, float], train: Labelled, test: Labelled
    ) -> tuple[Trial, dict[str, Tensor]]:
        """Train the network from a start, and score it; its weights then."""
        torch.manual_seed(seed)  # of networks with random parts of their own
        self._net.load_state_dict(self._certified)
        if start == "random":
            first = train.images[:: max(1, len(train.images) // SCORED)][:SCORED].to(self._device)
            with torch.no_grad():
                self._net.tokens.head.reset_parameters(seed, self._net.read(first))
        before = self._score(test)
        began = now()
        self._train(seed, rates, train, f"{start} head, rate {rates[0]:g}, seed {seed}")
        seconds = now() - began
        return Trial(start, seed, *rates, before, self._score(test), seconds), _weights(self._net)

    @torch.no_grad()
    def _score(self, data: Labelled) -> float:
        right = 0
        for images, labels in zip(data.images.split(SCORED), data.labels.split(SCORED), strict=True):
            right += int((self._net(images.to(self._device)).argmax(1).cpu() == labels).sum())
        return right / len(data.labels)

    def _train(self, seed: int, rates: tuple[float, float], data: Labelled, what: str) -> None:
        net, recipe = self._net, self._recipe
        head = net.tokens.head
        groups = [
            {"params": parameters, "lr": rates[0] * recipe.layer_decay**distance, "weight_decay": recipe.weight_decay}
            for distance, parameters in enumerate(last_blocks(net, data.images[:2].to(self._device), recipe.blocks))
        ]
        head.requires_grad_(True)
        groups.append({"params": list(head.parameters()), "lr": rates[0] * rates[1], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups)
        steps = recipe.epochs * math.ceil(len(data.labels) / recipe.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
        for step, (images, labels) in enumerate(_batches(data, recipe, seed)):
            loss = nn.functional.cross_entropy(net(images.to(self._device)), labels.to(self._device))
            loss = loss + self._beta * head.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            self._notify(what, step + 1, steps, f"loss {float(loss.detach()):.3g}")


def _weights(net: ImageModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}


def _rate(done: float) -> float:
    """The learning rate's share of its highest: up in a line, down in half a cosine."""
    if done < WARM_UP:
        return (done + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def _batches(data: Labelled, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in random order, half of them mirrored, once an epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(data.labels), generator=generator).split(recipe.batch_size):
            mirrored = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
            images = data.images[rows]
            yield torch.where(mirrored, images.flip(3), images), data.labels[rows]


def last_blocks(net: ImageModel, images: Tensor, count: int) -> list[list[nn.Parameter]]:
    """Let the last blocks of the backbone be trained: what comes after them, then the blocks from the last on.

    The blocks are the parts of the list of modules that holds most parameters. Which of them have an effect is
    measured by one backward pass: a head on an inner layer does not use those behind it.

    Raises
    ------
    InputError
        The network has no such list.
    """
    network = net.backbone.requires_grad_(True)
    net.zero_grad(set_to_none=True)
    net(images).square().sum().backward()
    used = {id(parameter) for parameter in network.parameters() if parameter.grad is not None}
    net.zero_grad(set_to_none=True)
    network.requires_grad_(False)
    lists = [m for m in network.modules() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m) > 1]
    blocks: list[list[nn.Parameter]] = []
    if lists:
        largest = max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
        blocks = [[p for p in block.parameters() if id(p) in used] for block in largest]
        blocks = [block for block in blocks if block]
    if not blocks:
        raise InputError(f"the backbone {net.backbone.spec!r} has no blocks to train on: choose another backbone")
    inside = {id(parameter) for parameter in largest.parameters()}
    order = list(network.parameters())
    end = max(place for place, parameter in enumerate(order) if id(parameter) in inside)
    after = [parameter for parameter in order[end + 1 :] if id(parameter) in used]
    chosen = [after, *blocks[: -count - 1 : -1]] if after else blocks[: -count - 1 : -1]
    for parameter in itertools.chain.from_iterable(chosen):
        parameter.requires_grad_(True)
    return chosen
