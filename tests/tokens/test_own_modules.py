"""A user's own module and transform over images, and loaders of images or tokens; compared with the module itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import convexhead as ch
from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import TokenStore, extract, import_arrays, open_backbone, open_source

Image = pytest.importorskip("PIL.Image")


def transform(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((12, 12)))).permute(2, 0, 1).float() / 255 - 0.4


class Net(nn.Module):
    """A map of 3 x 3 tokens, or the like of a ViT's sequence, or one token."""

    def __init__(self, kind: str = "map", channels: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.conv = nn.Conv2d(3, channels, 4, 4)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.5)
        self.cls = nn.Parameter(torch.randn(1, 1, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.norm(self.conv(x)))
        self.last = y  # what another thread would overwrite
        if self.kind == "map":
            return self.last
        y = self.last.flatten(2).transpose(1, 2)
        if self.kind == "sequence":
            return nn.functional.layer_norm(torch.cat([self.cls.expand(len(y), -1, -1), y], 1), [y.shape[2]])
        return y.mean(1)


def expected(net: Net, photos: Path, split: str) -> np.ndarray:
    source = open_source(photos)
    images = torch.stack([transform(source.load(split, i)) for i in range(len(source.files(split)))])
    net.eval()
    with torch.no_grad():
        return net(images).numpy()


@pytest.mark.parametrize("kind", ["map", "sequence", "pooled"])
def test_tokens_are_the_module_s(photos: Path, tmp_path: Path, kind: str) -> None:
    net = Net(kind).train()
    store = extract(
        photos, open_backbone(net, transform=transform), tmp_path / "out", dtype="float32", batch_size=2, shard_size=5
    )
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    for split in ("train", "test"):
        want, view = expected(net, photos, split), store[split]
        got = view.raw(0, len(view))
        if kind == "map":
            want = want.reshape(*want.shape[:2], -1).transpose(0, 2, 1)
        elif kind == "sequence":
            got = np.concatenate([view.prefix(0, len(view)), got], 1)
        np.testing.assert_allclose(got, want.reshape(got.shape), atol=1e-5)
    assert (store.grid, store["train"].n_prefix) == {
        "map": ((3, 3), 0), "sequence": ((3, 3), 1), "pooled": ((1, 1), 0),
    }[kind]  # fmt: skip
    assert store.info()["backbone"] == "module:Net"


class Shaken(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.randn(1)


class Failing(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes\nmismatch")


class Permuted(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x).flatten(2).transpose(1, 2)
        return y[:, [4, 0, 8, 2, 6, 1, 7, 3, 5]]


def noisy(image: Any) -> torch.Tensor:
    return transform(image) + torch.randn(3, 12, 12)


@pytest.mark.parametrize(
    ("net", "change", "told"),
    [
        (Shaken(), transform, "other tokens at each call"),
        (Failing(), transform, "gives no tokens for images of 12x12 pixels .*shapes mismatch"),
        (Permuted(), transform, "do not lie row by row"),
        (nn.Linear(2, 2), transform, "gives no tokens"),
        (nn.Flatten(0), transform, "gives features"),
        (Net(), noisy, "another tensor at each call: give one without random steps"),
        (Net(), lambda image: image, "must give a float tensor .*not Image"),
        (Net(), lambda image: (transform(image) * 255).byte(), "must give a float tensor .*not torch.uint8"),
        (Net(), lambda image: transform(image)[None], r"must give a float tensor .*\(1, 3, 12, 12\)"),
        (Net(), lambda image: image.missing, "transform fails on an RGB image of 320x256 pixels: AttributeError"),
        (Net(), None, "needs a transform"),
    ],
)
def test_refused(photos: Path, tmp_path: Path, net: nn.Module, change: Any, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        extract(photos, open_backbone(net, transform=change), tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileFormatError):
        TokenStore.open(tmp_path / "out")


def test_options_that_do_not_go_together(photos: Path, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.ones(2, 3, 4, 4), torch.arange(2)))
    for call, told in (
        (lambda: open_backbone(Net(), transform=transform, layer=1), "module and transform decide them"),
        (lambda: open_backbone("patches:2", transform=transform), "go with a module of your own"),
        (lambda: open_backbone("patches:2", name="x"), "go with a module of your own"),
        (lambda: extract(photos, Net(), tmp_path / "out"), "needs a transform"),
        (lambda: extract(loader, "patches:2", tmp_path / "out"), "give the module as backbone"),
        (lambda: extract(loader, open_backbone(Net(), transform=transform), tmp_path / "out"), "without transform"),
    ):
        with pytest.raises(InputError, match=told):
            call()


def test_only_the_same_module_and_transform_may_be_read(photos: Path, tmp_path: Path) -> None:
    def store(where: str, net: nn.Module, change: Any = transform, **options: Any) -> TokenStore:
        return extract(photos, open_backbone(net, transform=change, **options), tmp_path / where)

    first = store("first", Net())
    clf = ch.ConvexHeadClassifier("linear").fit(first)
    clf.predict(store("same", Net(), lambda image: transform(image))["test"])  # other code that does the same
    other = Net()
    with torch.no_grad():
        other.conv.bias += 1
    for i, (net, change, options, told) in enumerate(
        [
            (other, transform, {}, "weights are"),
            (Net(), lambda image: transform(image) + 0.1, {}, "preprocessing transform is"),
            (Net(), transform, {"name": "mine"}, "backbone is 'module:mine', the head's was 'module:Net'"),
        ]
    ):
        strange = store(f"other{i}", net, change, **options)
        with pytest.raises(InputError, match=told):
            clf.predict(strange["test"])
        with pytest.raises(FileFormatError, match="holds the tokens of another run"):
            store("first", net, change, **options)
    like = extract(photos, open_backbone(Net(), transform=transform), tmp_path / "like", like=first.path)
    np.testing.assert_array_equal(clf.predict(like["test"]), clf.predict(first["test"]))
    with pytest.raises(InputError, match="was a module of your own: in Python give it"):
        extract(photos, None, tmp_path / "no", like=first.path)


class Photos(Dataset[Any]):
    """As torchvision's: images and labels, ``classes`` beside."""

    def __init__(self, photos: Path, split: str, names: bool = False) -> None:
        self.source, self.split, self.names = open_source(photos), split, names
        self.classes = self.source.class_names

    def __len__(self) -> int:
        return len(self.source.files(self.split))

    def __getitem__(self, i: int) -> Any:
        sample = transform(self.source.load(self.split, i)), int(self.source.labels(self.split)[i])
        return (*sample, self.source.files(self.split)[i]) if self.names else sample


@pytest.mark.parametrize("kind", ["map", "sequence"])
def test_loaders_of_images(photos: Path, tmp_path: Path, kind: str) -> None:
    loaders = {
        s: DataLoader(Photos(photos, s, names=True), batch_size=4, shuffle=s == "train") for s in ("train", "test")
    }
    store = extract(loaders, Net(kind), tmp_path / "out", dtype="float32")
    straight = extract(photos, open_backbone(Net(kind), transform=transform), tmp_path / "straight", dtype="float32")
    assert store.class_names == ["cat", "dog"]
    assert (store.grid, store["train"].n_prefix) == (straight.grid, straight["train"].n_prefix)
    for split in ("train", "test"):
        a, b = store[split], straight[split]
        order = [b.files.index(name) for name in a.files]
        np.testing.assert_array_equal(a.labels, b.labels[order])
        np.testing.assert_allclose(a.raw(0, len(a)), b.raw(0, len(b))[order], atol=1e-6)
        if kind == "sequence":
            np.testing.assert_allclose(a.prefix(0, len(a)), b.prefix(0, len(b))[order], atol=1e-6)
    assert sorted(store["train"].files) == sorted(straight["train"].files)
    clf = ch.ConvexHeadClassifier("linear").fit(store)
    named = [
        extract(loaders, open_backbone(Net(kind), name="mine"), tmp_path / f"{i}", dtype="float32") for i in range(2)
    ]
    own = ch.ConvexHeadClassifier("linear").fit(named[0])
    own.predict(named[1]["test"])
    with pytest.raises(InputError, match="not made as those"):
        clf.predict(named[1]["test"])


def test_loaders_of_tokens(tmp_path: Path) -> None:
    x, y = torch.randn(21, 5, 3), torch.arange(21) % 3
    store = import_arrays(DataLoader(TensorDataset(x, y), batch_size=4), tmp_path / "out", class_token=True)
    np.testing.assert_array_equal(store["train"].raw(0, 21), x[:, 1:])
    np.testing.assert_array_equal(store["train"].class_tokens(slice(None)), x[:, 0])
    np.testing.assert_array_equal(store["train"].labels, y)
    both = {"train": DataLoader(TensorDataset(x.half(), y)), "test": (x[:9].half(), y[:9])}
    assert import_arrays(both, tmp_path / "both", class_token=True)["test"].shape == (9, 4, 3)
    x[17, 0, 0] = torch.nan
    with pytest.raises(InputError, match="tokens of train has NaN in row 17"):
        import_arrays(DataLoader(TensorDataset(x, y), batch_size=4), tmp_path / "nan", class_token=True)
    for batches, told in (
        ([{"x": x, "y": y}], "not dict"),
        ([x], r"must be \(tensor, labels\)"),
        ([(x, y[:-1])], "21 samples with 20 labels"),
        ([(x, y), (x[:, :4], y)], "differ: float32 .5, 3. a sample, then"),
        ([], "no batches of train"),
    ):
        with pytest.raises(InputError, match=told):
            import_arrays(DataLoader(batches, batch_size=None), tmp_path / "no", class_token=True)
    assert not (tmp_path / "no").exists()
