"""A trained head as a file that other programs read and run, without this package.

===============  ====================================================================================================
``onnx``         for onnxruntime and others, opset 18
``export``       a ``.pt2`` file of ``torch.export``, for torch
``safetensors``  the weights as arrays, with the head's formula as text
``sklearn``      a linear head as a fitted `LogisticRegression`, in a file of skops, which loads no code
===============  ====================================================================================================

A network is read back and compared with the head before the file is kept.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from convexhead._version import __version__
from convexhead.deploy.network import ImageModel, TokenModel, Trained, as_model, attach
from convexhead.deploy.pixels import Pixels, pixels_of
from convexhead.errors import InputError, choose, require
from convexhead.model import Model
from convexhead.targets import is_multilabel
from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.store.files import write_atomic

OPSET = 18
AGREE = 1e-3
"""Largest difference of a file's outputs from the head's own, relative to the largest of them. Chosen by hand: float32
in another order of sums differs by some 1e-5."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes
    ----------
    path : Path
    format : str
    content : str
        What it takes or holds, in words.
    difference : float or None
        Largest difference of its outputs from the head's own on noise, relative to the largest output; None of a file
        that holds no network.
    """

    path: Path
    format: str
    content: str
    difference: float | None


@dataclass
class Network:
    """A network with inputs to trace it by, and others to try it on; each input's axes of any size by name."""

    module: nn.Module
    inputs: dict[str, Tensor]
    others: dict[str, Tensor]
    free: dict[str, dict[int, str]]
    takes: str

    def shapes(self) -> tuple[dict[int, Any], ...]:
        """The free axes as `torch.export` asks for them."""
        names = {name for axes in self.free.values() for name in axes.values()}
        dims = {name: torch.export.Dim(name) for name in sorted(names)}
        return tuple({axis: dims[name] for axis, name in self.free[put].items()} for put in self.inputs)


def export_run(
    run: Trained,
    out: str | Path,
    *,
    format: str = "onnx",
    with_backbone: bool = False,
    backbone: str | Backbone | None = None,
    prepared: bool = False,
) -> Exported:
    """Write a trained head as a file.

    Parameters
    ----------
    run : path, Model or fitted estimator
    out : path
        The file; one that is there is replaced.
    format : {"onnx", "export", "safetensors", "sklearn"}
        See the module's table.
    with_backbone : bool
        From images to outputs, with the backbone, its preprocessing and the token reduction. Else from tokens as a
        store holds them; of a head that was fitted on arrays from such arrays.
    backbone : str, Backbone or None
        The run's backbone, where its weights lie elsewhere now.
    prepared : bool
        The file takes images that are resized and cropped already, and only normalises them.

    Returns
    -------
    Exported

    Raises
    ------
    InputError
        A head that the format cannot hold, or a preprocessing that no file can.
    MissingExtraError
        A package that the format needs is not installed.
    """
    model, path = as_model(run), Path(out).expanduser()
    choose("export format", format, WRITERS)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{str(out)!r} cannot be written: " + ("it is a folder" * path.is_dir() or "no such folder"))
    if (backbone is not None or prepared) and not with_backbone:
        raise InputError("backbone and prepared go with with_backbone: use --with-backbone")
    if format in ARRAYS:
        if with_backbone:
            raise InputError(f"a file of format {format!r} holds no network: use onnx or export with the backbone")
        data, holds = ARRAYS[format](model)
        write_atomic(path, data)
        return Exported(path, format, holds, None)
    network = _of_images(model, backbone, prepared) if with_backbone else _of_tokens(model)
    data, run_file = NETWORKS[format](network, about(model))
    difference = _difference(network, run_file)
    if not difference <= AGREE:
        raise InputError(
            f"the {format} file gives other outputs than the head ({difference:.1e} of the largest): nothing was "
            "written; use another format"
        )
    write_atomic(path, data)
    return Exported(path, format, f"takes {network.takes}", difference)


def about(model: Model) -> dict[str, str]:
    """What a file says of the head, as texts."""
    spec, names = model.spec, TokenModel(model).class_names
    return {
        "convexhead": __version__,
        "head": spec.head,
        "activation": spec.activation,
        "pool": str(spec.pool),
        "grid": json.dumps(model.head.grid),
        "loss": str(spec.loss),
        "beta": repr(model.beta),
        "certificate": str(model.certificate),
        "class_names": json.dumps(names),
    }


# -- networks ---------------------------------------------------------------------------------------------------------
class WholeImages(nn.Module):
    """Images as bytes of any size to outputs."""

    def __init__(self, pixels: Pixels, model: ImageModel) -> None:
        super().__init__()
        self.pixels, self.model = pixels, model

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.model(self.pixels(images))
        return outputs


def _of_images(model: Model, backbone: str | Backbone | None, prepared: bool) -> Network:
    net = attach(backbone, model)
    generator = torch.Generator().manual_seed(0)

    def noise(b: int, h: int, w: int) -> Tensor:
        return torch.randint(256, (b, 3, h, w), dtype=torch.uint8, generator=generator)

    if not prepared:
        whole = WholeImages(pixels_of(net.backbone), net).eval()
        free = {0: "batch", 2: "height", 3: "width"}
        takes = "RGB images, bytes (batch, 3, height, width) of any size"
        return Network(whole, {"images": noise(2, 67, 91)}, {"images": noise(3, 120, 80)}, {"images": free}, takes)
    from PIL import Image

    first = net.prepare(Image.fromarray(noise(1, 120, 80)[0].permute(1, 2, 0).numpy()))
    inputs, others = (torch.stack([first] * b) for b in (2, 3))
    kind = "bytes" if first.dtype == torch.uint8 else "floats"
    takes = f"prepared RGB images, {kind} (batch, {', '.join(map(str, first.shape))})"
    return Network(net, {"images": inputs}, {"images": others}, {"images": {0: "batch"}}, takes)


def _of_tokens(model: Model) -> Network:
    net = TokenModel(model).eval()
    origin, (s, d) = model.origin, (model.head.s, model.head.d)
    what = "tokens, floats (batch, tokens, channels)"
    if origin is not None:
        (s, d), what = origin.shape, "tokens as a store holds them, floats (batch, tokens, channels)"
        s += net.front
    elif model.reduction is not None:
        d = len(model.reduction.mean)
    generator = torch.Generator().manual_seed(0)
    inputs, others = (torch.randn(b, s, d, generator=generator) for b in (2, 3))
    takes = f"{what} = (any, {s}, {d})"
    if not model.any_length:
        return Network(net, {"tokens": inputs}, {"tokens": others}, {"tokens": {0: "batch"}}, takes)
    longer = torch.randn(3, s + 3, d, generator=generator)
    mask = torch.arange(s + 3) < torch.tensor([[s + 3], [s], [1]])
    free = {0: "batch", 1: "tokens"}
    return Network(
        net,
        {"tokens": inputs, "mask": torch.ones(2, s, dtype=torch.bool)},
        {"tokens": longer, "mask": mask},
        {"tokens": free, "mask": free},
        f"{what} = (any, any, {d}), and a mask (batch, tokens) of those that there are",
    )


Runner = Callable[[dict[str, Tensor]], Tensor]


def _onnx(network: Network, told: dict[str, str]) -> tuple[bytes, Runner]:
    for package in ("onnx", "onnxscript"):
        require(package, "export")
    runtime = require("onnxruntime", "export")
    with _quiet():
        program = torch.onnx.export(
            network.module, tuple(network.inputs.values()), dynamo=True, opset_version=OPSET, verbose=False,
            dynamic_shapes=network.shapes(), input_names=list(network.inputs), output_names=["logits"],
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(told)
    content: bytes = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    return content, run


def _export(network: Network, told: dict[str, str]) -> tuple[bytes, Runner]:
    file = io.BytesIO()
    with _quiet(), torch.no_grad():
        program = torch.export.export(network.module, tuple(network.inputs.values()), dynamic_shapes=network.shapes())
        torch.export.save(program, file, extra_files={"about.json": json.dumps(told)})
        content = file.getvalue()
        loaded = torch.export.load(io.BytesIO(content)).module()
    return content, lambda inputs: loaded(*inputs.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def _difference(network: Network, run: Runner) -> float:
    """Of the outputs for the other inputs, and for one of them."""
    worst = 0.0
    for inputs in (network.others, {name: value[:1] for name, value in network.others.items()}):
        expected, found = network.module(*inputs.values()), run(inputs)
        if found.shape != expected.shape:
            return float("inf")
        scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
        worst = max(worst, float((found - expected).abs().max()) / scale)
    return worst


# -- arrays -----------------------------------------------------------------------------------------------------------
FORMULA = "f = P sum_k mix(X, U_k) V_k + b; X = (tokens - mean) * scale @ basis, then a channel of ones if constant"


def _safetensors(model: Model) -> tuple[bytes, str]:
    """Weights by the names of the formula, float32; gates stay float64."""
    net = TokenModel(model)
    head, names = net.head, {"mixing": "U", "values": "V", "intercept": "b"}
    state = {name.removeprefix("head."): value for name, value in net.state_dict().items()}
    arrays = {names.get(name, name): value for name, value in state.items()}
    if not model.head.learns_mixing:
        del arrays["U"], arrays["block"]
    arrays["V"] = head.masked_values().detach()
    told = {**about(model), "formula": FORMULA, "n_groups": str(model.head.n_groups)}
    if model.reduction is not None:
        told["constant"] = json.dumps(model.reduction.constant)
    if net.pooled is not None:
        told["token_pool"] = json.dumps(net.pooled)
    content = safetensors.torch.save({name: value.contiguous() for name, value in arrays.items()}, metadata=told)
    return content, f"holds the arrays {', '.join(sorted(arrays))} and their formula"


def _sklearn(model: Model) -> tuple[bytes, str]:
    """A linear head over the mean (or the class token) of the tokens, as its reduction would have read them.

    The reduction is affine, so it goes into the coefficients: ``P((T − μ) s B) W + b = P T (s B W) + (b − μ s B W)``.
    """
    from sklearn.linear_model import LogisticRegression

    io_ = require("skops.io", "export")
    if model.coef is None or model.classes is None or model.spec.pool is None or is_multilabel(model.spec):
        raise InputError(
            "a LogisticRegression is a linear classifier of one class a sample: this head is another (fit one with "
            "--head linear, or use another format)"
        )
    W, b, reduction = model.coef, model.atoms.intercept.numpy(), model.reduction
    if reduction is not None:
        if reduction.constant:
            W, b = W[:-1], b + W[-1]
        W = W if reduction.basis is None else reduction.basis.astype(float) @ W
        W = reduction.scale.astype(float)[:, None] * W
        b = b - reduction.mean.astype(float) @ W
    if W.shape[1] == 2:  # scikit-learn keeps the difference of two
        W, b = W[:, 1:] - W[:, :1], b[1:] - b[:1]
    regression = LogisticRegression()
    regression.coef_, regression.intercept_ = np.ascontiguousarray(W.T), np.asarray(b, float)
    regression.classes_ = model.classes if model.class_names is None else np.array(model.class_names)
    regression.n_features_in_, regression.n_iter_ = len(W), np.zeros(1, np.int32)
    which = "the class token" if model.spec.pool == "cls" else "the mean of the tokens"
    stored = "" if reduction is None else ", as a store holds them"
    return io_.dumps(regression), f"takes {which}{stored}, floats (samples, {len(W)})"


NETWORKS = {"onnx": _onnx, "export": _export}
ARRAYS = {"safetensors": _safetensors, "sklearn": _sklearn}
WRITERS = (*NETWORKS, *ARRAYS)
