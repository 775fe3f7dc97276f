"""Images with a table of labels beside them: what is read, what is counted, and what is refused."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convexhead as ch
from command import call
from convexhead.errors import FileFormatError, InputError
from convexhead.predict import predict
from convexhead.tokens import extract, open_source
from convexhead.tokens.sources.base import TargetSource
from convexhead.tokens.store.census import census_lines

ANIMALS = "name,animal\na.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n"
SEVERAL = "file,indoor,night\na.png,1,0\nb.png,0,0\nc.png,1,1\nd.png,0,1\n"
NUMBERS = "file,age\na.png,1.5\nb.png,2\nc.png,-3e1\nd.png,0\n"


def write(folder: Path, table: str | None = ANIMALS, names: str = "abcd", inside: str = "images") -> Path:
    (folder / inside).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(names))
    for name in names:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / inside / f"{name}.png")
    if table is not None:
        (folder / "labels.csv").write_text(table)
    return folder


def test_a_table_beside_images_is_found_by_its_layout(tmp_path):
    source = open_source(write(tmp_path / "photos"))
    assert source.class_names == ["cat", "dog"]
    assert source.labels("train").tolist() == [0, 1, 0, 1]
    assert source.files("train") == [f"images/{name}.png" for name in "abcd"]
    assert source.splits == ("train",)
    assert source.load("train", 1).getpixel((0, 0)) == Image.open(tmp_path / "photos/images/b.png").getpixel((0, 0))
    assert not any(source.left_out.values())


def test_rows_keep_their_labels_whatever_their_order(tmp_path):
    root = write(tmp_path, "animal,name\ndog,d\ncat,images/a.png\ndog,./b.png\ncat,c.png\n")
    source = open_source(f"table:{root}?image=name")
    named = dict(zip(source.files("train"), source.labels("train").tolist(), strict=True))
    assert named == {"images/a.png": 0, "images/b.png": 1, "images/c.png": 0, "images/d.png": 1}


@pytest.mark.parametrize(
    ("table", "task", "names", "targets"),
    [
        (SEVERAL, "multi-label", ["indoor", "night"], [[1, 0], [0, 0], [1, 1], [0, 1]]),
        (SEVERAL.replace("1", "True").replace("0", "False"), "multi-label", ["indoor", "night"],
         [[1, 0], [0, 0], [1, 1], [0, 1]]),
        (NUMBERS, "regression", ["age"], [[1.5], [2], [-30], [0]]),
        ("f,x,y\na,1,20\nb,0,2\nc,0,3\nd,1,4\n", "regression", ["x", "y"], [[1, 20], [0, 2], [0, 3], [1, 4]]),
    ],
)  # fmt: skip
def test_columns_say_what_the_labels_are(tmp_path, table, task, names, targets):
    source = open_source(write(tmp_path, table))
    assert isinstance(source, TargetSource)
    assert (source.task, source.class_names) == (task, names)
    assert source.targets("train").tolist() == targets
    with pytest.raises(InputError, match="targets, not one label an image"):
        source.labels("train")


@pytest.mark.parametrize(
    ("table", "query", "what"),
    [
        ("f,age\na,1\nb,2\nc,3\nd,4\n", "task=regression", "regression"),
        ("f,age\na,1\nb,2\nc,3\nd,4\n", "task=classes", None),
        ("f,x,y\na,.5,.1\nb,0,1\nc,0,1\nd,1,1\n", "task=multi-label", "multi-label"),
        ("f,x,y\na,.5,.1\nb,0,1\nc,0,1\nd,1,1\n", "task=regression", "regression"),
    ],
)
def test_what_can_be_read_in_two_ways_is_asked(tmp_path, table, query, what):
    root = write(tmp_path, table)
    with pytest.raises(InputError, match=r"say \?task=.*task=regression behind table:PATH"):
        open_source(root)
    assert getattr(open_source(f"table:{root}?{query}"), "targets", None) is None or what is not None
    assert open_source(f"table:{root}?{query}").task == (what or "classes")


def test_splits_are_folders_or_a_column(tmp_path):
    for split, names in (("train", "abcd"), ("test", "ab")):
        write(tmp_path / "two" / split, SEVERAL if split == "train" else SEVERAL[: SEVERAL.index("c.png")], names)
    source = open_source(tmp_path / "two")
    assert source.splits == ("train", "test")
    assert source.files("test") == ["test/images/a.png", "test/images/b.png"]
    table = "name,animal,split\na,cat,train\nb,dog,validation\nc,dog,train\nd,cat,test\n"
    source = open_source(write(tmp_path / "one", table))
    assert source.splits == ("train", "val", "test")
    assert [source.files(split) for split in source.splits] == [
        ["images/a.png", "images/c.png"], ["images/b.png"], ["images/d.png"],
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"has the split 'dev'"):
        open_source(write(tmp_path / "one", table.replace("validation", "dev")))
    with pytest.raises(InputError, match=r"class 'horse' has test images but no train images"):
        open_source(write(tmp_path / "one", table.replace("cat,test", "horse,test")))


def test_columns_and_folders_are_chosen_behind_a_question_mark(tmp_path):
    table = "id,animal,file,part,indoor,night\n" + "".join(
        f"{i},cat,pets/{name}.png,{'test' if name == 'd' else 'train'},{i % 2},{int(i > 1)}\n"
        for i, name in enumerate("abcd")
    )
    root = write(tmp_path, None, inside="jpg/pets")
    (root / "all.csv").write_text(table)
    query = "?image=file&images=jpg&split=part&label=indoor,night"
    source = open_source(f"table:{root}/all.csv{query}")
    assert source.files("test") == ["jpg/pets/d.png"]
    assert source.targets("train").tolist() == [[0, 0], [1, 0], [0, 1]]
    assert open_source(f"table:{root}/all.csv{query.replace(',', '&label=')}").class_names == ["indoor", "night"]


def test_parquet_says_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root = write(tmp_path, None)
    columns = {"file": ["a", "b", "c", "d"], "indoor": [True, False, True, False], "night": [0, 0, 1, 1]}
    parquet.write_table(pyarrow.table(columns), root / "labels.parquet")
    source = open_source(root)
    assert (source.task, source.targets("train").tolist()) == ("multi-label", [[1, 0], [0, 0], [1, 1], [0, 1]])
    columns["night"][2] = None
    parquet.write_table(pyarrow.table(columns), root / "labels.parquet")
    with pytest.raises(InputError, match=r"no 'night' for 'c'"):
        open_source(root)
    (root / "labels.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileFormatError, match="no whole parquet file"):
        open_source(root)
    (root / "labels.csv").write_text(ANIMALS)
    with pytest.raises(InputError, match=r"both labels\.csv and labels\.parquet"):
        open_source(root)


def test_what_one_has_and_the_other_not_is_counted_and_named(tmp_path):
    root = write(tmp_path, ANIMALS + "gone.png,dog\n", "abcdef")
    (root / "images" / "notes.txt").write_text("no image")
    source = open_source(root)
    assert dict(source.left_out) == {
        "row without an image": ["gone.png"],
        "image without a row": ["images/e.png", "images/f.png"],
        "not an image (.txt)": ["images/notes.txt"],
    }
    lines = census_lines(extract(source, "patches:4", tmp_path / "tokens").info()["found"])
    assert "train: 4 images of 2 classes, 2 to 2 a class (median 2)" in lines
    assert "not read, image without a row: 2 ('images/e.png', 'images/f.png')" in lines


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (ANIMALS + "a.png,cat\n", "two rows for the image 'a.png'"),
        (ANIMALS + "a,dog\n", r"two rows for the image 'a.png' \('a.png', 'a'\)"),
        (ANIMALS.replace("dog", "", 1), "no 'animal' for 'b.png'"),
        (ANIMALS.replace("dog", "NaN", 1), "no 'animal' for 'b.png'"),
        (ANIMALS.replace("b.png", ""), "no 'name' for 'row 2'"),
        (SEVERAL.replace("b.png,0,0", "b.png,0, "), "no 'night' for 'b.png'"),
        (SEVERAL.replace("b.png,0,0", "b.png,0,x"), r"has 'x' in 'night' for 'images/b.png'.*\?label="),
        (NUMBERS.replace("1.5", "inf"), "missing or infinite"),
        ("name\na\nb\n", "another must be of labels"),
        ("a.png,cat\nb.png,dog\n", "the first line of .* names an image, 'a.png'"),
        ("name,animal\nx.png,cat\n", r"no image in .*'x.png'; there is 'a.png'.*\?image=NAME"),
        (",animal\na.png,cat\n", "a column called ''"),
        ("name,name\na.png,cat\n", "a column called 'name'"),
        ("name,animal\n", "no rows"),
        ("", "no rows|column called"),
        (ANIMALS.replace("d.png", "d.png,e"), "line 5 .* has 3 cells, its first line 2"),
        (ANIMALS.replace(",", ";"), "not separated by commas"),
        (ANIMALS.replace("cat", '"cat', 1), "no CSV file"),
        ("name,a,split\na.png,cat,test\n", "no train images"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used_are_refused(tmp_path, table, message):
    with pytest.raises((InputError, FileFormatError), match=message):
        open_source(write(tmp_path, table))


def test_other_refusals(tmp_path):
    root = write(tmp_path)
    Image.new("RGB", (8, 8)).save(root / "images" / "a.jpg")
    open_source(root)  # the table has the extensions
    (root / "labels.csv").write_text(ANIMALS.replace("a.png", "a"))
    with pytest.raises(InputError, match=r"may be 'a\.jpg' or 'a\.png'"):
        open_source(root)
    (root / "labels.csv").write_text(ANIMALS)
    for spec, message in (
        (f"table:{root}?lable=x", "'label'"),
        (f"table:{root}?label=animals", "'animal'"),
        (f"table:{root}?task=clases", "'classes'"),
        (f"table:{root}?label", "no options"),
        (f"table:{root}?images=none", "no folder .* of images"),
        (f"table:{root}/none.csv", "no table or folder"),
        (f"table:{root / 'images'}", "has no table labels.csv or labels.parquet"),
        (f"table:{root}/images/a.png", "no table: give a file .csv or .parquet"),
        (root / "labels.csv", "did you mean 'table:"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(spec)
    (root / "labels.csv").write_text(SEVERAL)
    with pytest.raises(InputError, match="reads one column"):
        open_source(f"table:{root}?task=classes")
    with pytest.raises(InputError, match="one column, which tells two classes apart"):
        open_source(f"table:{root}?task=multi-label&label=night")
    (root / "labels").mkdir()
    Image.new("L", (8, 8)).save(root / "labels" / "a.png")
    with pytest.raises(InputError, match="masks in labels/ and a table"):
        open_source(root)
    assert open_source(f"table:{root}").class_names == ["indoor", "night"]
    for split in ("train", "test"):
        write(tmp_path / "two" / split, ANIMALS if split == "train" else ANIMALS.replace("animal", "pet"))
    with pytest.raises(InputError, match="have other columns: 'animal'"):
        open_source(tmp_path / "two")
    (tmp_path / "two" / "test" / "labels.csv").unlink()
    with pytest.raises(InputError, match=r"test' has no table labels\.csv"):
        open_source(tmp_path / "two")


def test_a_changed_label_is_another_source(tmp_path):
    root = write(tmp_path)
    source = open_source(root)
    before = source.fingerprint()
    assert open_source(root).fingerprint() == before
    assert source.changed() is None
    (root / "labels.csv").write_text(ANIMALS.replace("a.png,cat", "a.png,dog"))
    assert "'labels.csv' was rewritten" in source.changed()
    assert open_source(root).fingerprint() != before


@pytest.mark.parametrize("table", [ANIMALS, SEVERAL, NUMBERS])
def test_extract_fit_and_predict_take_it(tmp_path, capsys, table):
    """What a head of these labels says of the table's images is what it says of the store's."""
    names = "abcdefghij"
    header, *rows = table.splitlines()
    more = [",".join([f"{name}.png", *rows[i % 4].split(",")[1:]]) for i, name in enumerate(names)]
    parted = [f"{row},{'test' if i > 7 else 'train'}" for i, row in enumerate(more)]
    root = write(tmp_path / "photos", "\n".join([f"{header},split", *parted]), names)
    assert call("extract", root, "--backbone", "patches:4", "--out", tmp_path / "tokens") == 0
    assert "test: 2 images" in capsys.readouterr().out
    assert call("fit", tmp_path / "tokens", "--head", "mlp", "--out", tmp_path / "run") == 0
    head = ch.load(tmp_path / "run")
    told = head.predict(ch.TokenStore.open(tmp_path / "tokens")["test"])
    capsys.readouterr()
    assert call("predict", tmp_path / "run", f"table:{root}", "--split", "test") == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["image"] for line in lines] == ["images/i.png", "images/j.png"]
    if table == ANIMALS:
        assert [line["predicted"] for line in lines] == [head.class_names_[k] for k in told]
    if table == NUMBERS:
        np.testing.assert_allclose([float(line["age"]) for line in lines], told.ravel(), rtol=1e-5)
    if table == SEVERAL:
        has = [[name in line["predicted"].split("|") for name in ("indoor", "night")] for line in lines]
        assert np.array_equal(has, told.astype(bool))
    loose = list(predict(tmp_path / "run", root / "images"))
    assert [row[0] for row in loose] == [f"{name}.png" for name in names]
