"""Photos, their tokens and runs on them, small enough for every test."""

from __future__ import annotations

import numpy as np
import pytest

import convexhead as ch
from command import call

pytest.importorskip("PIL")
from PIL import Image

CLASSES = ("blue", "green, light", "red")


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with ``photos``, the store ``tokens`` of them and the runs ``run`` and ``linear`` on it."""
    folder = tmp_path_factory.mktemp("deployed")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 7)):
        for c, name in enumerate(CLASSES):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (21, 17, 3))
                pixels[:, :, c] += 50
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / split / name / f"{i}.png")
    options = ("--image-size", 12, "--token-pool", 3, "--channels", 5, "--reduce", "pca", "--standardize", "--constant")
    assert call("extract", folder / "photos", "--backbone", "patches:2", *options, "--out", folder / "tokens") == 0
    for out, head in (("run", "self-attention"), ("linear", "linear")):
        assert call("fit", folder / "tokens", "--head", head, "--beta-ratio", 0.05, "--out", folder / out) == 0
    return folder


@pytest.fixture(scope="session")
def photos(work):
    """The bytes of the test photos ``(n, 3, h, w)``, in the order of the store."""
    files = ch.TokenStore.open(work / "tokens")["test"].files
    return np.stack([np.asarray(Image.open(work / "photos" / file)).transpose(2, 0, 1) for file in files])
