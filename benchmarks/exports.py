"""Ways out of Python, beside the head itself: the largest difference of their outputs.

    python benchmarks/exports.py
    python benchmarks/exports.py IMAGES [--weights VIT.safetensors]

The first sends every head, activation, pool and kind of length through every way, on random tokens, and writes
``results/export_ways.csv``. The second compares ONNX files that hold a backbone with the runs that they were made of,
on real images, and writes ``results/exports.csv``. ``IMAGES`` holds class folders in ``train/`` and ``test/``: a head
is trained on tokens of ``train``, and the file gets the images of ``test`` as bytes.

Of a head with gates the second says where a difference comes from. A gate is 1 on one side of a plane through 0, and
else 0. Tokens of the file that differ from the run's by rounding may lie on its other side.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image

import convexhead as ch
from common import Row, Table, hardware
from convexhead.deploy import export_run
from convexhead.deploy.files import OPSET, WholeImages
from convexhead.deploy.network import ImageModel, attach
from convexhead.deploy.pixels import pixels_of
from convexhead.modules import HeadModule
from convexhead.tokens import extract

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ways_out import CASES, WAYS, difference

BATCH = 20
"""Images that the file, and the backbone in torch, get at a time."""


# -- heads alone ------------------------------------------------------------------------------------------------------
def measure_ways() -> None:
    """Every case through every way; ends with exit code 1 if one differs by more than is allowed."""
    table = Table("export_ways", ("head", "activation", "pool", "any_length", "way"), hardware("onnx", "onnxruntime"))
    for way, how in WAYS.items():
        for case in CASES:
            key: Row = dict(zip(("head", "activation", "pool", "any_length"), case, strict=True)) | {"way": way}
            if table.has(**key):
                continue
            found = difference(case, how)
            table.add({**key, "difference": f"{found:.1e}", "allowed": how.allowed, "ok": found <= how.allowed})
        print(way, len(list(table.where(way=way))), "cases", flush=True)
    print_ways(table)
    sys.exit(any(str(row["ok"]) != "True" for row in table.rows))


def print_ways(table: Table) -> None:
    """The table of the page: the largest difference over pools and lengths."""
    print("| head | activation |", " | ".join(WAYS), "|\n|---|---|" + "---|" * len(WAYS))
    for head, activation in dict.fromkeys(case[:2] for case in CASES):
        cells = [
            max((row["difference"] for row in table.where(head=head, activation=activation, way=way)), key=float)
            for way in WAYS
        ]
        print("|", " | ".join((head, activation, *cells)), "|")


# -- with a backbone --------------------------------------------------------------------------------------------------
class Reader(torch.nn.Module):
    """Images to the tokens that the head reads: the file without its head."""

    def __init__(self, net: ImageModel) -> None:
        super().__init__()
        self.pixels, self.net = pixels_of(net.backbone), net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net.read(self.pixels(images))


def compare(clf: ch.ConvexHeadClassifier, test: Any, images: str, file: Path) -> Row:
    """The file's outputs beside the run's, and beside those of the same network in torch."""
    written = export_run(clf, file, with_backbone=True)
    net = attach(None, clf)
    whole = WholeImages(pixels_of(net.backbone), net).eval()
    pixels = [
        np.stack([np.asarray(Image.open(Path(images) / name).convert("RGB")).transpose(2, 0, 1) for name in names])
        for names in np.array_split(test.files, max(1, len(test) // BATCH))
    ]
    logits, expected = run_onnx(file, pixels), clf.decision_function(test)
    with torch.no_grad():
        in_torch = np.concatenate([whole(torch.from_numpy(each)).numpy() for each in pixels])
    apart = np.abs(logits - expected).max(1)
    row = {
        "images": len(test),
        "largest_logit": f"{np.abs(expected).max():.3g}",
        "largest_difference": f"{apart.max():.1e}",
        "same_class": int((logits.argmax(1) == expected.argmax(1)).sum()),
        "difference_in_torch": f"{np.abs(in_torch - expected).max():.1e}",
        "noise_difference": f"{written.difference:.1e}",
        "megabytes": f"{file.stat().st_size / 1e6:.1f}",
    }
    if clf.activation == "gated-relu":
        row |= trace_gates(net, torch.from_numpy(np.concatenate(list(test.chunks()))), pixels, logits, apart)
    return row


def trace_gates(
    net: ImageModel, tokens: torch.Tensor, pixels: list[np.ndarray], logits: np.ndarray, apart: np.ndarray
) -> Row:
    """Gates that the file's tokens open otherwise than the run's, and the largest difference of images without any.

    The distance of a token ``x`` from the plane of a gate ``g`` is ``|gᵀx| / (‖g‖ ‖x‖)``.
    """
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        torch.onnx.export(
            Reader(net).eval(), (torch.from_numpy(pixels[0][:2]),), file.name, dynamo=True, opset_version=OPSET,
            verbose=False, external_data=False, input_names=["images"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        there = torch.from_numpy(run_onnx(Path(file.name), pixels))
    head = net.tokens.head
    with torch.no_grad():
        unexplained = np.abs(head(there).numpy() - logits).max()
    ours, theirs = preactivations(head, tokens), preactivations(head, there)
    flipped = (ours >= 0) != (theirs >= 0)
    with_flips = flipped.any(2).any(1).numpy()
    return {
        "tokens_apart": f"{((there - tokens).norm(dim=2) / tokens.norm(dim=2)).max():.1e}",
        "gates": flipped.numel(),
        "gates_flipped": int(flipped.sum()),
        "largest_distance_flipped": f"{ours[flipped].abs().max():.1e}" if flipped.any() else "",
        "median_distance": f"{ours.abs().median():.2g}",
        "images_with_flips": int(with_flips.sum()),
        "difference_without_flips": f"{apart[~with_flips].max():.1e}",
        "unexplained": f"{unexplained:.1e}",
    }


def preactivations(head: HeadModule, tokens: torch.Tensor) -> torch.Tensor:
    """``gᵀx / (‖g‖ ‖x‖)`` of every token and gate of the MLP head ``(n, s, J)``, in float64."""
    x, g = tokens.double(), head.gates.flatten(1)
    return (x / x.norm(dim=2, keepdim=True)) @ (g / g.norm(dim=1, keepdim=True)).mT


def run_onnx(file: Path, batches: list[np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": batch})[0] for batch in batches])


def measure_images(images: str, weights: str | None) -> None:
    lite = {"backbone": "packaged:efficientnet-lite0", "image_size": 96}
    gated = {"head": "mlp", "activation": "gated-relu"}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({**lite, "channels": 40, "reduce": "pca", "constant": True}, {"head": "self-attention"}),
        ({**lite, "layer": 4, "channels": 60}, gated),
        ({**lite, "layer": 4, "channels": 60, "dtype": "float32"}, gated),
    ]
    if weights:
        vit = {"backbone": f"timm:vit_small_patch14_dinov2@{weights}", "image_size": 98}
        cases.append((vit, {"head": "linear", "pool": "cls"}))
    machine = hardware("onnx", "onnxruntime", "onnxscript", "timm", "pillow")
    table = Table("exports", ("backbone", "layer", "dtype", "head", "activation"), machine)
    with tempfile.TemporaryDirectory() as folder:
        for number, (tokens, head) in enumerate(cases):
            store = extract(images, out=Path(folder) / str(number), standardize=True, **tokens)
            clf = ch.ConvexHeadClassifier(beta_ratio=0.1, random_state=0, **head).fit(store["train"])
            row = {
                "backbone": tokens["backbone"].partition("@")[0], "layer": tokens.get("layer", "last"),
                "dtype": tokens.get("dtype", "float16"), "head": clf.head, "activation": clf.activation,
                "pool": clf.pool, "pixels": tokens["image_size"],
                **compare(clf, store["test"], images, Path(folder) / f"{number}.onnx"),
            }  # fmt: skip
            table.add(row)
            print({key: row[key] for key in row if key not in machine}, flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("images", nargs="?", help="class folders in train/ and test/; none: heads alone")
    options.add_argument("--weights", help="weights of timm's vit_small_patch14_dinov2")
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.images is None:
        measure_ways()
    else:
        measure_images(given.images, given.weights)


if __name__ == "__main__":
    main()
