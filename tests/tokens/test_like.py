"""`extract --like`: a new store whose tokens and labels mean what those of another store, or of a run, mean."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import convexhead as ch
from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import extract

pytest.importorskip("PIL")
OPTIONS = {"token_pool": 2, "channels": 5, "reduce": "pca", "constant": True, "dtype": "bfloat16", "image_size": 8}


@pytest.fixture
def first(photos, tmp_path):
    return extract(photos, "patches:2", tmp_path / "first", **OPTIONS)


@pytest.fixture
def more(tmp_path, write_images) -> Path:
    """Other images, of which there are no cats, and whose classes come in another order than ``later`` asks for."""
    return write_images(tmp_path / "more/train", {"dog": 5}, seed=7).parent


@pytest.mark.parametrize("given", ["store", "run"])
def test_everything_is_taken_over(first, more, tmp_path, given):
    like = first.path
    if given == "run":
        like = tmp_path / "run"
        ch.ConvexHeadClassifier("linear", beta_ratio=0.5, tol=0.1).fit(first["train"]).save(like)
    new = extract(more, None, tmp_path / "new", like=like)
    assert new.reduction.identity == first.reduction.identity
    assert new.class_names == ["cat", "dog"]
    assert set(new["train"].labels) == {1}
    for key in ("backbone", "layer", "preprocessing", "dtype", "token_pool", "channels", "grid", "reduction"):
        assert new.info()[key] == first.info()[key], key
    # The same images give the same tokens, as they would not behind a reduction of their own.
    shutil.copytree(more / "train/dog", tmp_path / "both/train/dog")
    shutil.copytree(more / "train/dog", tmp_path / "both/train/cat")
    both = extract(tmp_path / "both", None, tmp_path / "third", like=like)
    np.testing.assert_array_equal(both["train"].read()[5:], new["train"].read())
    own = extract(more, "patches:2", tmp_path / "own", **OPTIONS)
    assert own["train"].read().shape == new["train"].read().shape
    assert np.abs(own["train"].read() - new["train"].read()).max() > 0.1


def test_the_same_command_again_finds_the_store_finished(first, more, tmp_path, write_images):
    extract(more, None, tmp_path / "new", like=first.path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()}
    extract(more, None, tmp_path / "new", like=first.path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()} == before
    # Like a third store, whose reduction alone is another: the shards stay, the reduction is exchanged.
    write_images(tmp_path / "zoo/train", {"cat": 4, "dog": 4}, seed=9)
    third = extract(tmp_path / "zoo", "patches:2", tmp_path / "third", **OPTIONS)
    again = extract(more, None, tmp_path / "new", like=third.path)
    assert again.reduction.identity == third.reduction.identity != first.reduction.identity
    shard = tmp_path / "new/train-00000.safetensors"
    assert shard.stat().st_mtime_ns == before[shard]


def test_options_may_agree(first, more, tmp_path):
    new = extract(more, "patches:2", tmp_path / "new", like=first.path, **OPTIONS)
    assert new.reduction.identity == first.reduction.identity


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backbone": "patches:4"}, "backbone is 'patches:2'"),
        ({"channels": 3}, "channels is 5"),
        ({"reduce": "avgpool"}, "reduce is 'pca'"),
        ({"token_pool": 3}, r"token_pool is \(2, 2\)"),
        ({"standardize": False}, "standardize is True"),
        ({"constant": False}, "constant is True"),
        ({"dtype": "float32"}, "dtype is 'bfloat16'"),
        ({"layer": 3}, "layer is None"),
        ({"image_size": 16}, "preprocessing image_size is 16"),
    ],
)
def test_options_that_say_something_else_are_refused(first, more, tmp_path, options, told):
    with pytest.raises(InputError, match=told):
        extract(more, options.pop("backbone", None), tmp_path / "new", like=first.path, **options)
    assert not (tmp_path / "new").exists()


def test_a_class_that_is_not_there_is_refused_by_name(first, tmp_path, write_images):
    write_images(tmp_path / "zoo/train", {"dog": 2, "emu": 2})
    with pytest.raises(InputError, match="'emu'"):
        extract(tmp_path / "zoo", None, tmp_path / "new", like=first.path)


def test_images_that_give_another_grid_are_refused(photos, tmp_path, write_images):
    first = extract(photos, "patches:2", tmp_path / "first")  # images as they are: 12 x 12 pixels
    write_images(tmp_path / "wide/train", {"cat": 2, "dog": 2}, size=(16, 12))
    with pytest.raises(InputError, match="tokens x 12 channels"):
        extract(tmp_path / "wide", None, tmp_path / "new", like=first.path)
    assert not list((tmp_path / "new").glob("*.json"))


def test_what_is_not_a_store_or_a_run(first, more, tmp_path):
    with pytest.raises(FileFormatError, match="neither a token store nor a trained head"):
        extract(more, None, tmp_path / "new", like=tmp_path)
    ch.ConvexHeadClassifier("linear", beta_ratio=0.5, tol=0.1).fit(first["train"].read(), first["train"].labels).save(
        tmp_path / "plain"
    )
    with pytest.raises(InputError, match="does not say how its tokens were made"):
        extract(more, None, tmp_path / "new", like=tmp_path / "plain")
    with pytest.raises(InputError, match="a backbone is needed"):
        extract(more, None, tmp_path / "new")


@pytest.mark.slow
def test_timm_backbones_are_opened_as_they_were(photos, tmp_path):
    """Image size and crop stand in the store only as what timm made of them."""
    import torch
    from safetensors.torch import save_file

    from convexhead.tokens.backbones.timm_import import import_timm

    torch.manual_seed(0)
    model = import_timm().create_model("resnet10t", pretrained=False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    spec = f"timm:resnet10t@{tmp_path / 'w.safetensors'}"
    options = {"layer": 1, "image_size": 48, "crop_pct": 0.9, "channels": 4}
    first = extract(photos, spec, tmp_path / "first", **options)
    again = extract(photos, None, tmp_path / "again", like=first.path)
    np.testing.assert_array_equal(again["train"].raw(0, 22), first["train"].raw(0, 22))
    # A weights file may have moved; another one is refused.
    (tmp_path / "w.safetensors").rename(tmp_path / "moved.safetensors")
    moved = extract(photos, spec.replace("w.safe", "moved.safe"), tmp_path / "third", like=first.path)
    assert moved.reduction.identity == first.reduction.identity
    state = model.state_dict()
    state["conv1.0.weight"] = state["conv1.0.weight"] + 0.1
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="the backbone's weights are"):
        extract(photos, None, tmp_path / "fourth", like=first.path)
