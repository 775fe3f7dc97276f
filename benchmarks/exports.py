"""How far the outputs of an ONNX file with its backbone are from those of the run, on real images.

    python benchmarks/exports.py IMAGES [--weights VIT.safetensors]

``IMAGES`` holds class folders in ``train/`` and ``test/``. A head is trained on tokens of ``train``, and the file gets
the images of ``test`` as bytes. Rows go to ``results/exports.csv``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

import convexhead as ch
from common import Table, hardware
from convexhead.deploy import export_run
from convexhead.tokens import extract


def difference(clf: ch.ConvexHeadClassifier, test: Any, images: str, file: Path) -> dict[str, Any]:
    """The file's outputs beside the run's."""
    written = export_run(clf, file, with_backbone=True)
    session = onnxruntime.InferenceSession(file)
    batches = np.array_split(test.files, max(1, len(test) // 20))
    found = []
    for files in batches:
        pixels = [np.asarray(Image.open(Path(images) / name).convert("RGB")).transpose(2, 0, 1) for name in files]
        found.append(session.run(None, {"images": np.stack(pixels)})[0])
    logits, expected = np.concatenate(found), clf.decision_function(test)
    return {
        "images": len(test),
        "largest_logit": f"{np.abs(expected).max():.3g}",
        "largest_difference": f"{np.abs(logits - expected).max():.1e}",
        "same_class": int((logits.argmax(1) == expected.argmax(1)).sum()),
        "noise_difference": f"{written.difference:.1e}",
        "megabytes": f"{file.stat().st_size / 1e6:.1f}",
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("images")
    options.add_argument("--weights", help="weights of timm's vit_small_patch14_dinov2")
    given = options.parse_args()
    lite = {"backbone": "packaged:efficientnet-lite0", "image_size": 96}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({**lite, "channels": 40, "reduce": "pca", "constant": True}, {"head": "self-attention"}),
        ({**lite, "layer": 4, "channels": 60}, {"head": "mlp", "activation": "gated-relu"}),
    ]
    if given.weights:
        vit = {"backbone": f"timm:vit_small_patch14_dinov2@{given.weights}", "image_size": 98}
        cases.append((vit, {"head": "linear", "pool": "cls"}))
    machine = hardware("onnx", "onnxruntime", "onnxscript", "timm", "pillow")
    table = Table("exports", ("backbone", "layer", "head", "activation"), machine)
    with tempfile.TemporaryDirectory() as folder:
        for number, (tokens, head) in enumerate(cases):
            store = extract(given.images, out=Path(folder) / str(number), standardize=True, **tokens)
            clf = ch.ConvexHeadClassifier(beta_ratio=0.1, random_state=0, **head).fit(store["train"])
            row = {
                "backbone": tokens["backbone"].partition("@")[0], "layer": tokens.get("layer", "last"),
                "head": clf.head, "activation": clf.activation, "pool": clf.pool, "pixels": tokens["image_size"],
                **difference(clf, store["test"], given.images, Path(folder) / f"{number}.onnx"),
            }  # fmt: skip
            table.add(row)
            print({key: row[key] for key in list(row)[:12]})


if __name__ == "__main__":
    main()
