"""Tokens that were made elsewhere: every format gives the arrays back, and what cannot be trusted is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import convexhead as ch
from convexhead.errors import ConvexHeadError, FileFormatError, InputError
from convexhead.tokens import StoreWriteError, TokenStore, export_store, extract, import_arrays, merge_stores

RNG = np.random.default_rng(0)
CLASSES = ("ant", "bee", "cat")
Arrays = dict[str, np.ndarray]


def numbers(n: int, s: int = 4, d: int = 3, dtype: Any = np.float32) -> np.ndarray:
    return RNG.normal(size=(n, s, d)).astype(dtype)


@pytest.fixture
def arrays() -> Arrays:
    return {
        "X_train": numbers(23), "y_train": np.arange(23) % 3, "X_test": numbers(9), "y_test": np.arange(9) % 3,
        "names_train": np.array([f"img-é{i}" for i in range(23)]),
    }  # fmt: skip


def as_npz(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def as_compressed(folder: Path, arrays: Arrays) -> Path:
    np.savez_compressed(folder / "a.npz", **arrays)
    return folder / "a.npz"


def as_fortran(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "a.npz", **{k: np.asfortranarray(v) for k, v in arrays.items()})
    return folder / "a.npz"


def as_big_endian(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "a.npz", **{k: v.astype(v.dtype.newbyteorder(">")) for k, v in arrays.items()})
    return folder / "a.npz"


def as_npy(folder: Path, arrays: Arrays) -> Path:
    (folder / "all").mkdir()
    for key, value in arrays.items():
        np.save(folder / "all" / f"{key}.npy", value)
    return folder / "all"


def as_safetensors(folder: Path, arrays: Arrays) -> Path:
    plain = {k: v for k, v in arrays.items() if v.dtype.kind != "U"}
    safetensors.numpy.save_file(plain, folder / "a.safetensors")
    return folder / "a.safetensors"


def as_h5(folder: Path, arrays: Arrays) -> Path:
    with pytest.importorskip("h5py").File(folder / "a.h5", "w") as file:
        for key, value in arrays.items():
            name, split = key.split("_")
            file[f"{split}/{name}"] = value.tolist() if value.dtype.kind == "U" else value
    return folder / "a.h5"


def as_parquet(folder: Path, arrays: Arrays) -> Path:
    """A file a split; lists of lists."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "p").mkdir()
    for split in ("train", "test"):
        columns = {k.split("_")[0]: v.tolist() for k, v in arrays.items() if k.endswith(split)}
        columns["X"] = pa.array(columns["X"], pa.list_(pa.list_(pa.float32(), 3), 4))
        pq.write_table(pa.table(columns), folder / "p" / f"{split}.parquet", row_group_size=5)
    return folder / "p"


FORMATS = [as_npz, as_compressed, as_fortran, as_big_endian, as_npy, as_safetensors, as_h5, as_parquet]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_store(arrays: Arrays, tmp_path: Path, write: Callable[..., Path]) -> None:
    store = import_arrays(write(tmp_path, arrays), tmp_path / "out", shard_size=10)
    store.verify()
    for split in ("train", "test"):
        view = store[split]
        np.testing.assert_array_equal(view.unreduced().read(), arrays[f"X_{split}"])
        np.testing.assert_array_equal(view.labels, arrays[f"y_{split}"])
    assert store.grid == (2, 2)
    assert store.class_names == ["0", "1", "2"]
    assert store.info()["dtype"] == "float32"
    named = write is not as_safetensors
    assert store["train"].files == (arrays["names_train"].tolist() if named else [f"train-{i}" for i in range(23)])
    memory = import_arrays(
        {
            "train": (arrays["X_train"], arrays["y_train"], store["train"].files),
            "test": (arrays["X_test"], arrays["y_test"]),
        },
        tmp_path / "memory",
        shard_size=10,
    )
    # The content is what tells sources apart, not the file that it lies in.
    assert memory.manifest.config == store.manifest.config
    assert [p.read_bytes() for p in sorted(memory.path.glob("t*"))] == [
        p.read_bytes() for p in sorted(store.path.glob("t*"))
    ]


@pytest.mark.parametrize("columns", ["f{}", "{}", "feature_{}"])
def test_numbered_columns(tmp_path: Path, columns: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x = numbers(11, 1, 12)[:, 0]
    table = {columns.format(i): x[:, i] for i in RNG.permutation(12)}
    labels = [CLASSES[i % 3] for i in range(11)]
    pq.write_table(pa.table({**table, "label": labels}), tmp_path / "a.parquet")
    key = {"f{}": "f", "{}": None, "feature_{}": "feature"}[columns]
    store = import_arrays(tmp_path / "a.parquet", tmp_path / "out", tokens=key)
    np.testing.assert_array_equal(store["train"].unreduced().read()[:, 0], x)
    assert [CLASSES[i] for i in store["train"].labels] == labels
    pq.write_table(pa.table({"f0": x[:, 0], "f2": x[:, 1], "label": labels}), tmp_path / "gap.parquet")
    with pytest.raises(InputError, match=r"no tokens of train.*\(f0, f2\)"):
        import_arrays(tmp_path / "gap.parquet", tmp_path / "no", tokens="f")


@pytest.mark.parametrize("nested", ["None", "a missing value", "another length"])
def test_lists_that_are_not_whole(tmp_path: Path, nested: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows: list[Any] = [[0.5, 1.5, float(i)] for i in range(1500)]
    rows[1203] = {"None": None, "a missing value": [1.0, None, 2.0], "another length": [1.0, 2.0]}[nested]
    pq.write_table(pa.table({"x": rows, "y": list(range(1500))}), tmp_path / "a.parquet")
    with pytest.raises(FileFormatError, match="row 1203"):
        import_arrays(tmp_path / "a.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "kept"), [("float16", "float16"), ("float32", "float32"), ("float64", "float32")])
def test_types_are_kept(tmp_path: Path, given: str, kept: str) -> None:
    x = numbers(6, dtype=given)
    store = import_arrays({"train": (x, np.arange(6) % 2)}, tmp_path / "out")
    assert store.info()["dtype"] == kept
    np.testing.assert_array_equal(store["train"].raw(0, 6), x.astype(kept))
    assert (
        import_arrays({"train": (x, np.arange(6) % 2)}, tmp_path / "b", dtype="bfloat16").info()["dtype"] == "bfloat16"
    )


def test_bfloat16(tmp_path: Path) -> None:
    x = torch.from_numpy(numbers(6)).bfloat16()
    safetensors.torch.save_file({"tokens": x, "labels": torch.arange(6) % 2}, tmp_path / "a.safetensors")
    store = import_arrays(tmp_path / "a.safetensors", tmp_path / "out")
    assert store.info()["dtype"] == "bfloat16"
    np.testing.assert_array_equal(store["train"].raw(0, 6), x.float().numpy())


def test_class_folders_of_samples(tmp_path: Path) -> None:
    kept = {}
    for split, count in (("train", 4), ("test", 2)):
        for name in CLASSES:
            (tmp_path / "in" / split / name).mkdir(parents=True)
            for i in range(count):
                kept[f"{split}/{name}/{i}.npy"] = numbers(1)[0]
                np.save(tmp_path / "in" / split / name / f"{i}.npy", kept[f"{split}/{name}/{i}.npy"])
    (tmp_path / "in/train/ant/notes.txt").write_text("mine")
    store = import_arrays(tmp_path / "in", tmp_path / "out", shard_size=5)
    assert store.class_names == list(CLASSES)
    for split in ("train", "test"):
        view = store[split]
        np.testing.assert_array_equal(view.unreduced().read(), np.stack([kept[name] for name in view.files]))
        assert [CLASSES[i] for i in view.labels] == [name.split("/")[1] for name in view.files]
    assert list(store.info()["found"]["left_out"]) == ["not an array (.txt)"]
    bad = tmp_path / "in/test/cat/1.npy"
    for value, told in (
        (numbers(1, 5)[0], r"cat/1.npy.*float32 tokens \(5, 3\), the first file's are float32 \(4, 3\)"),
        (numbers(1)[0].astype("f2"), r"cat/1.npy.*float16 tokens"),
        (np.full((4, 3), np.nan, "f4"), r"cat/1.npy.* has NaN"),
    ):
        np.save(bad, value)
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        with pytest.raises(InputError, match=told):
            import_arrays(tmp_path / "in", tmp_path / "again")
    bad.write_bytes(bad.read_bytes()[:-3])
    with pytest.raises(FileFormatError, match=r"cat/1.npy"):
        import_arrays(tmp_path / "in", tmp_path / "third")


def test_what_export_writes_comes_back(arrays: Arrays, tmp_path: Path) -> None:
    x = np.concatenate([numbers(23, 2) + 9, arrays["X_train"]], 1)
    store = import_arrays(
        {"train": (x, arrays["y_train"])}, tmp_path / "store", class_token=True, registers=1, grid=(1, 4),
        class_names=CLASSES, backbone="mine",
    )  # fmt: skip
    assert store["train"].n_prefix == 2
    np.testing.assert_array_equal(store["train"].class_tokens(slice(None)), x[:, 0])
    np.testing.assert_array_equal(store["train"].raw(0, 23), x[:, 2:])
    for format in ("npy", "h5"):
        pytest.importorskip({"npy": "numpy", "h5": "h5py"}[format])
        out = export_store(store.path, tmp_path / f"raw.{format}", format=format, raw=True)
        again = import_arrays(out, tmp_path / f"again-{format}", backbone="mine", grid=(1, 4))
        assert again.class_names == list(CLASSES)
        assert again.grid == (1, 4)
        assert again["train"].files == store["train"].files
        assert again["train"].identity == store["train"].identity
        reduced = export_store(store.path, tmp_path / f"reduced.{format}", format=format)
        with pytest.raises(InputError, match="--raw"):
            import_arrays(reduced, tmp_path / "no", grid=(1, 4))


# -- what is not guessed -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "options", "grid", "prefix"),
    [
        (1, {}, (1, 1), 0), (4, {}, (2, 2), 0), (5, {"class_token": True}, (2, 2), 1), (7, {"grid": (7, 1)}, (7, 1), 0),
        (7, {"grid": (2, 3), "class_token": True}, (2, 3), 1), (6, {"class_token": True, "registers": 1}, (2, 2), 2),
        (5, {"class_token": False, "grid": (1, 5)}, (1, 5), 0), (5, {"grid": (1, 5)}, (1, 5), 0),
        (5, {}, "may be a class token and a grid of 2x2: say class_token=True, or class_token=False with", 0),
        (7, {"grid": (2, 3)}, "a class token and a grid of 2x3", 0), (2, {}, "a grid of 1x1: say class_token", 0),
        (7, {}, "7 tokens lie on no square", 0), (5, {"class_token": False}, "5 tokens lie on no square", 0),
        (4, {"registers": 1}, "need class_token", 0), (4, {"class_token": True}, "3 tokens lie on no square", 0),
        (4, {"grid": (3, 3)}, "grid=3x3 holds 9 tokens, but", 0), (1, {"class_token": True}, "leave none", 0),
        (4, {"class_token": True, "grid": (2, 2)}, "holds 4 tokens, but there are 3", 0),
    ],
)  # fmt: skip
def test_where_tokens_lie_is_said(tmp_path: Path, tokens: int, options: Any, grid: Any, prefix: int) -> None:
    given = {"train": (numbers(6, tokens), np.arange(6) % 2)}
    if isinstance(grid, str):
        with pytest.raises(InputError, match=grid):
            import_arrays(given, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return
    store = import_arrays(given, tmp_path / "out", **options)
    assert (store.grid, store["train"].n_prefix) == (grid, prefix)


def with_value(value: float, dtype: Any = np.float32) -> np.ndarray:
    x = numbers(3000, dtype=dtype)
    x[2711, 2, 1] = value
    return x


Y = np.arange(3000) % 3
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "NaN": ((with_value(np.nan), Y), {}, "tokens of train has NaN in row 2711"),
    "infinity": ((with_value(-np.inf, "f2"), Y), {}, "has an infinite value in row 2711"),
    "beyond float32": ((with_value(1e300, "f8"), Y), {}, "has a value beyond float32 in row 2711"),
    "beyond float16": ((with_value(1e5), Y), {"dtype": "float16"}, "too large for float16: use dtype='float32'"),
    "lengths": ((numbers(6), Y[:5]), {}, r"labels of train has shape \(5,\) for the 6 samples"),
    "label NaN": ((numbers(3), np.array([0, 1, np.nan])), {}, "nan in row 2"),
    "label fraction": ((numbers(3), np.array([0, 1, 0.5])), {}, "0.5 in row 2"),
    "label none": ((numbers(3), np.array(["a", None, "b"], object)), {}, "train-1 has no label"),
    "index of no class": ((numbers(3), np.arange(3)), {"class_names": ["a", "b"]}, "integers below 2"),
    "name of no class": ((numbers(2), np.array(["a", "c"])), {"class_names": ["a", "b"]}, "'c' is none of the class"),
    "class names twice": ((numbers(2), np.arange(2)), {"class_names": ["a", "a"]}, "several classes are called 'a'"),
    "integers": ((np.ones((3, 4, 2), int), np.arange(3)), {}, "holds int64, tokens are float16"),
    "four dimensions": ((np.ones((3, 2, 2, 2)), np.arange(3)), {}, "flatten the grid to"),
    "no samples": ((np.ones((0, 2, 2)), np.arange(0)), {}, "has shape"),
    "names twice": ((numbers(3), np.arange(3), ["a", "b", "a"]), {}, "names two samples 'a'"),
    "names too few": ((numbers(3), np.arange(3), ["a", "b"]), {}, "2 names for the 3 samples"),
    "no labels": ((numbers(3),), {}, "must be a file, or"),
    "shard_size": ((numbers(3), np.arange(3)), {"shard_size": 0}, "shard_size=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    given, options, told = REFUSED[name]
    with pytest.raises(InputError, match=told) as caught:
        import_arrays({"train": given}, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileFormatError):
        TokenStore.open(tmp_path / "out")


def test_refused_files(tmp_path: Path, arrays: Arrays) -> None:
    def refused(told: str, given: Any, **options: Any) -> None:
        with pytest.raises((InputError, FileFormatError), match=told) as caught:
            import_arrays(given, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    source = as_npz(tmp_path, arrays)
    refused("there is no file", tmp_path / "none.npz")
    refused("unknown split 'dev'", {"dev": source})
    refused("no train split, only test", {"test": (arrays["X_test"], arrays["y_test"])})
    (tmp_path / "a.csv").write_text("1,2")
    refused("of no known format", tmp_path / "a.csv")
    for suffix in (".npz", ".npy", ".safetensors", ".h5", ".parquet"):
        broken = tmp_path / f"broken{suffix}"
        for content in (b"", b"\x93NUMPY", b"PK\x03\x04", os.urandom(200)):
            broken.write_bytes(content)
            refused("broken", broken)
    for write in FORMATS[:2] + FORMATS[5:7]:
        whole = write(tmp_path, arrays)
        whole.write_bytes(whole.read_bytes()[:-200])
        refused("no whole|cannot be read|no readable", whole)
    np.savez(tmp_path / "objects.npz", X=np.array([{}, 1], object), y=np.arange(2))
    refused("pickled Python objects", tmp_path / "objects.npz")
    np.save(tmp_path / "objects.npy", np.array([{}, 1], object))
    refused("objects.npy", {"train": (tmp_path / "objects.npy", np.arange(2))})
    np.savez(tmp_path / "two.npz", X=numbers(3), features=numbers(3), y=np.arange(3))
    refused("may both be the tokens of train: say tokens=", tmp_path / "two.npz")
    np.savez(tmp_path / "other.npz", Z=numbers(3), y=np.arange(3))
    refused(r"no tokens of train.*say tokens= with the name that they have \(Z\)", tmp_path / "other.npz")
    np.savez(tmp_path / "part.npz", X=numbers(3), y=np.arange(3), split=np.array(["train", "test", "train"]))
    refused("give one file for each split", tmp_path / "part.npz")
    np.save(tmp_path / "bare.npy", numbers(3))
    refused("no labels of train", tmp_path / "bare.npy")
    as_npz(tmp_path, {**arrays, "y_test": arrays["y_test"] + 5})
    refused("class '[67]' has test images but no train images|the class '5'", source)
    as_npz(tmp_path, {**arrays, "X_test": numbers(9, 4, 2)})
    refused("4 tokens x 2 channels a sample, those of train have 4 x 3", source)
    (tmp_path / "both" / "class").mkdir(parents=True)
    np.save(tmp_path / "both" / "x.npy", numbers(3))
    refused("give one file or folder of arrays", tmp_path / "both")


def test_damaged_files_are_read_or_refused_in_a_line(tmp_path: Path, arrays: Arrays) -> None:
    chance, told = random.Random(0), []
    for write in (as_npz, as_compressed, as_safetensors, as_h5):
        path = write(tmp_path, arrays)
        whole = path.read_bytes()
        for trial in range(25):
            content = bytearray(whole)
            for _ in range(1 + trial % 7):
                content[chance.randrange(len(content))] = chance.randrange(256)
            path.write_bytes(content)
            try:
                import_arrays(path, tmp_path / f"{write.__name__}{trial}")
            except ConvexHeadError as error:
                told.append(str(error))
    assert len(told) > 40
    assert not any("\n" in message for message in told)


def test_names_of_keys(tmp_path: Path, arrays: Arrays) -> None:
    found = {k.replace("X", "of_layer").replace("y_", "kind_"): v for k, v in arrays.items()}
    found["notes"] = np.arange(2)
    store = import_arrays(as_npz(tmp_path, found), tmp_path / "out", tokens="of_layer", labels="kind")
    np.testing.assert_array_equal(store["test"].unreduced().read(), arrays["X_test"])
    assert store.info()["found"]["left_out"] == {"arrays of another name": {"count": 1, "names": ["notes"]}}


# -- comparing stores --------------------------------------------------------------------------------------------------
def test_heads_read_other_imports_of_the_same_words_only(tmp_path: Path) -> None:
    centres = 2 * RNG.normal(size=(3, 1, 5))
    y, more = np.arange(60) % 3, np.array([2, 0] * 15)
    x = numbers(60, 4, 5) + centres[y]
    other = 3 + numbers(30, 4, 5) + centres[more]  # read through its own reduction it would be something else

    def store(name: str, given: Any, **options: Any) -> TokenStore:
        return import_arrays({"train": given}, tmp_path / name, **options)

    first = store("first", (x, np.array(CLASSES)[y]), backbone="DINO v9, layer 3")
    clf = ch.ConvexHeadClassifier("linear", beta_ratio=0.05).fit(first)
    named = np.array(CLASSES)[more]
    same = store("same", (other, named), backbone="DINO v9, layer 3")
    expected = ((other - x.mean((0, 1))) / x.std((0, 1))).mean(1) @ clf.coef_
    np.testing.assert_allclose(clf.decision_function(same), expected, atol=1e-3)
    assert clf.score(same) == np.mean(expected.argmax(1) == more)
    for options in ({"backbone": "DINO v9, layer 4"}, {}, {"backbone": "DINO v9, layer 3", "grid": (1, 4)}):
        strange = store(f"strange{len(str(options))}", (other, named), **options)
        with pytest.raises(InputError, match="not made as those that this head was fitted on"):
            clf.predict(strange)
    with pytest.raises(InputError, match="cannot be merged: they differ in backbone, preprocessing"):
        merge_stores([first.path, tmp_path / "strange2"], tmp_path / "merged")
    clf.save(tmp_path / "run")
    unnamed = store("unnamed", (x, np.array(CLASSES)[y]))
    own = ch.ConvexHeadClassifier("linear", beta_ratio=0.05).fit(unnamed)
    with pytest.raises(
        InputError, match=r"the head's was 'imported'; preprocessing imported is.*the head's was 'unnamed"
    ):
        own.predict(strange)
    for source in (tmp_path / "run", first.path):
        like = store(f"like{source.name}", (other, named), like=source)
        assert like.reduction.identity == first.reduction.identity
        assert like.class_names == list(CLASSES)
        np.testing.assert_array_equal(clf.predict(like), clf.predict(same))
    np.testing.assert_allclose(
        own.decision_function(store("asserted", (other, named), like=unnamed.path)),
        clf.decision_function(same),
        atol=1e-3,
    )


def test_extracted_and_imported_are_told_apart(photos: Path, tmp_path: Path) -> None:
    extracted = extract(photos, "patches:6", tmp_path / "extracted")
    given = {"train": (numbers(6, 4, 108), np.arange(6) % 2)}
    with pytest.raises(InputError, match="not imported: use extract --like"):
        import_arrays(given, tmp_path / "no", like=extracted.path)
    imported = import_arrays(given, tmp_path / "imported", backbone="patches:6")
    with pytest.raises(InputError, match="store import --like"):
        extract(photos, None, tmp_path / "no", like=imported.path)
    clf = ch.ConvexHeadClassifier("linear").fit(extracted)
    with pytest.raises(InputError, match="backbone is 'imported:patches:6', the head's was 'patches:6'"):
        clf.predict(imported)


# -- stopping and going on ---------------------------------------------------------------------------------------------
def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_import_is_no_store_and_goes_on(tmp_path: Path) -> None:
    n = 6000
    np.save(tmp_path / "x.npy", numbers(n, 16, 32))
    np.save(tmp_path / "y.npy", np.arange(n) % 5)
    calm = import_arrays({"train": (tmp_path / "x.npy", tmp_path / "y.npy")}, tmp_path / "calm", shard_size=50)
    out = tmp_path / "out"
    given = {"train": (str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))}
    code = f"from convexhead.tokens import import_arrays; import_arrays({given}, {str(out)!r}, shard_size=50)"
    for wanted in (1, random.Random(0).randrange(20, 60)):
        child = subprocess.Popen([sys.executable, "-c", code])
        while len(list(out.glob("train-*.safetensors"))) < wanted and child.poll() is None:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        with pytest.raises(FileFormatError, match="is not finished: run the same import or extract again"):
            TokenStore.open(out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("train-*.safetensors")}
    assert len(kept) < 120
    import_arrays({"train": (tmp_path / "x.npy", tmp_path / "y.npy")}, out, shard_size=50)
    assert contents(out) == contents(calm.path)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    # Finished, it is returned as it is; other arrays or other words are refused.
    before = contents(out)
    import_arrays({"train": (tmp_path / "x.npy", tmp_path / "y.npy")}, out, shard_size=50)
    with pytest.raises(FileFormatError, match="holds the tokens of another run"):
        import_arrays({"train": (tmp_path / "x.npy", np.arange(n) % 4)}, out, shard_size=50)
    assert contents(out) == before


def test_a_file_that_is_rewritten_meanwhile_is_noticed(tmp_path: Path, arrays: Arrays) -> None:
    source = as_npz(tmp_path, arrays)

    def rewrite(_: Any) -> None:
        time.sleep(0.01)
        as_npz(tmp_path, arrays)

    with pytest.raises(InputError, match=r"changed while its images were read: .*a\.npz' was rewritten"):
        import_arrays(source, tmp_path / "out", progress=rewrite)


def test_targets_that_cannot_be_written(tmp_path: Path, arrays: Arrays) -> None:
    source = as_npz(tmp_path, arrays)
    with pytest.raises(FileFormatError, match="no tokens: choose a new"):
        import_arrays(source, tmp_path)
    with pytest.raises(StoreWriteError, match="cannot make the folder"):
        import_arrays(source, source / "out")


PEAKS = """
import os, resource, sys
import h5py, pyarrow.parquet
from convexhead.tokens import import_arrays

for name in sys.argv[2:]:
    if os.fork() == 0:  # a child has a peak of its own
        import_arrays(f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name}-store")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.table
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_memory_does_not_grow(tmp_path: Path) -> None:
    """160 MB of tokens take hardly more memory than 40 MB."""
    pa, h5py = pytest.importorskip("pyarrow"), pytest.importorskip("h5py")
    pq = pytest.importorskip("pyarrow.parquet")
    for n in (10_000, 40_000):
        x, y = np.ones((n, 1, 1000), np.float32), np.arange(n) % 2
        np.savez_compressed(tmp_path / f"{n}.npz", X=x, y=y)
        safetensors.numpy.save_file({"X": x, "y": y}, tmp_path / f"{n}.safetensors")
        with h5py.File(tmp_path / f"{n}.h5", "w") as out:
            out["X"], out["y"] = x, y
        lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 1000)
        pq.write_table(pa.table({"X": lists, "y": y}), tmp_path / f"{n}.parquet")
    names = [f"{n}.{suffix}" for suffix in ("npz", "safetensors", "h5", "parquet") for n in (10_000, 40_000)]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path), *names], check=True, capture_output=True, text=True
    )
    peaks = dict(zip(names, map(int, done.stdout.split()), strict=True))
    for few, many in zip(names[::2], names[1::2], strict=True):
        assert peaks[many] - peaks[few] < 50_000, peaks  # kilobytes


def test_info_tells_that_it_was_imported(tmp_path: Path, arrays: Arrays) -> None:
    store = import_arrays(as_npz(tmp_path, arrays), tmp_path / "out")
    told = store.info()
    assert told["backbone"] == f"imported@{tmp_path / 'a.npz'}"
    assert told["preprocessing"]["imported"].startswith("unnamed, ")
    assert json.loads((store.path / "manifest.json").read_text())["splits"]["test"]["count"] == 9
