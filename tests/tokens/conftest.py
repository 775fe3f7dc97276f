"""Small images and weights for the token tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SHARED_WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights"

WriteImages = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models wait for other threads longer than they compute, above all on busy machines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights() -> Path:
    """Folder of weight files that live beside the repository."""
    if not SHARED_WEIGHTS.is_dir():
        pytest.skip("needs the weight files of ../shared/data/weights beside the repository")
    return SHARED_WEIGHTS


@pytest.fixture(scope="session")
def write_images() -> WriteImages:
    """A function that writes random PNG images ``img1.png, img2.png, ...`` into class folders."""

    def write(folder: Path, per_class: dict[str, int], size: tuple[int, int] = (12, 12), seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        for name, count in per_class.items():
            (folder / name).mkdir(parents=True)
            for i in range(1, count + 1):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"img{i}.png")
        return folder

    return write


@pytest.fixture
def no_retries() -> Callable[..., None]:
    """What to put in place of a client that retries an unreachable host for most of a minute: it may not be called."""

    def called(*_: object, **__: object) -> None:
        pytest.fail("the client was called although the host had not answered")

    return called


@pytest.fixture
def lost_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_retries: Callable[..., None]) -> None:
    """A hub that cannot be reached, and an empty cache."""
    hub = pytest.importorskip("huggingface_hub")
    # A documentation address (RFC 5737): packets to it are lost, which is the slow way to be unreachable.
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://192.0.2.1")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hf_hub_download", no_retries)


@pytest.fixture
def photos(tmp_path: Path, write_images: WriteImages) -> Path:
    """A folder with train/ and test/, two classes, 22 + 6 images of 12 x 12 pixels."""
    root = tmp_path / "photos"
    write_images(root / "train", {"cat": 11, "dog": 11})
    write_images(root / "test", {"cat": 3, "dog": 3}, seed=1)
    return root
