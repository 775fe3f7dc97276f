"""``convexhead probe`` of several labels an image, of numbers and of masks: rows agree with heads trained by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss, mean_absolute_error, r2_score, roc_auc_score
from sklearn.model_selection import KFold
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

import convexhead as ch
from convexhead.dense import pixel_scores
from convexhead.experiments import probe_baselines

pytest.importorskip("PIL")
from PIL import Image

from command import call

OPTIONS = ("--backbone", "patches:4", "--heads", "linear,mlp", "--beta-ratios", "0.3,0.1", "--tol", 1e-2)
TEST = 12


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(probe_baselines, "EPOCHS", 3)


def write(root, task, splits=(("train", 24), ("test", TEST))):
    """Noise in which labels, numbers or masks can be seen."""
    rng = np.random.default_rng(0)
    for split, count in splits:
        rows = []
        (root / split / "images").mkdir(parents=True)
        for i in range(count):
            here, pixels = rng.random(3) < 0.4, rng.integers(0, 120, (8, 8, 3))
            pixels[:, :, 0] += 40 * here[0]
            pixels[:4, :, 1] += 40 * here[1]
            mask = np.zeros((8, 8), np.uint8)
            mask[4 * here[2] :, :] = 1
            mask[:, 4:][mask[:, 4:] == 1] += here[0]
            mask[0, 0] = 9
            pixels[:, :, 2] += 40 * (mask % 9).astype(int)
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / "images" / f"{i:02d}.png")
            told = here[:2].astype(int) if task == "multi-label" else [pixels[..., 0].mean(), 500 + pixels[0, 0, 1]]
            rows.append(",".join([f"{i:02d}", *map(str, told)]))
            if task == "masks":
                (root / split / "labels").mkdir(exist_ok=True)
                Image.fromarray(mask).save(root / split / "labels" / f"{i:02d}.png")
        if task != "masks":
            (root / split / "labels.csv").write_text("\n".join(["name,a,b", *rows]))
    return root


@pytest.fixture(scope="module", params=["multi-label", "regression", "masks"])
def probed(request, tmp_path_factory):
    """Task, images and folder of a probe."""
    root = tmp_path_factory.mktemp("probed")
    images, out = write(root / "images", request.param), root / "out"
    void = ("--void", 9) if request.param == "masks" else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_baselines, "EPOCHS", 3)
        board = ("--leaderboard", root / "board.jsonl")
        arguments = ("probe", images, *OPTIONS, *void, "--fractions", 0.5, "--draws", 2, *board, "--out", out)
        assert call(*arguments) == 0
    return request.param, images, out, arguments


def results_of(out):
    return json.loads((out / "table.json").read_text())


def row_of(out, method):
    return next(row for row in results_of(out)["rows"] if row["method"] == method and row["draw"] is None)


@pytest.mark.slow
def test_rows_are_those_of_heads_trained_by_hand(probed):
    task, images, out, _ = probed
    store = ch.TokenStore.open(out / "tokens")
    train, test = store["train"], store["test"]
    for head in ("linear", "mlp"):
        row = row_of(out, head)
        assert row["converged"]
        assert row["lower_bound"] <= row["objective"]
        value = row[results_of(out)["score"]]
        assert value == 1 if row["low"] is None else row["low"] <= value <= row["high"]
        saved = ch.load(out / row["run"])
        folds = list(KFold(3, shuffle=task != "masks", random_state=None if task == "masks" else 0).split(np.zeros(24)))
        if task == "multi-label":
            by_hand = ch.ConvexHeadClassifierCV(
                head, loss="binary-cross-entropy", fit_intercept=True, beta_ratios=[0.3, 0.1], cv=folds, tol=1e-2,
                random_state=0,
            ).fit(train)  # fmt: skip
            y, p = test.targets, by_hand.predict_proba(test)
            assert row["mean_ap"] == pytest.approx(average_precision_score(y, p))
            assert row["mean_auroc"] == pytest.approx(roc_auc_score(y, p))
            assert row["cross_entropy"] == pytest.approx(np.mean([log_loss(y[:, k], p[:, k]) for k in range(2)]))
            assert row["exact"] == pytest.approx(((p >= 0.5) == y).all(1).mean())
            assert row["per_class"]["b"] == pytest.approx(average_precision_score(y[:, 1], p[:, 1]))
        elif task == "regression":
            by_hand = ch.ConvexHeadRegressorCV(
                head, fit_intercept=True, beta_ratios=[0.3, 0.1], cv=folds, tol=1e-2, random_state=0
            ).fit(train)
            y, f = test.targets, by_hand.predict(test)
            assert row["r2"] == pytest.approx(r2_score(y, f))
            assert row["mae"] == pytest.approx(mean_absolute_error(y, f))
            assert row["per_class"]["a"] == pytest.approx(r2_score(y[:, 0], f[:, 0]))
        else:
            by_hand = ch.ConvexHeadClassifier(head, pool=None, beta_ratio=row["chosen"], tol=1e-2, random_state=0)
            scores = pixel_scores(by_hand.fit(train), test, images)
            assert row["mean_iou"] == pytest.approx(scores.mean_iou)
            assert row["pixel_accuracy"] == pytest.approx(scores.accuracy)
            assert row["per_class"] == pytest.approx(dict(zip("012", scores.iou, strict=True)))
            assert [fold[1].tolist() for fold in folds] == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
        if task != "masks":
            assert row["chosen"] == by_hand.beta_ratio_
            assert row["cv_score"] == pytest.approx(by_hand.scores_.mean(0).max())
        assert saved.beta_ == pytest.approx(row["beta"])


@pytest.mark.slow
def test_baselines_stand_beside_or_are_left_out_with_a_sentence(probed):
    task, _, out, _ = probed
    results, page = results_of(out), (out / "index.html").read_text()
    methods = [row["method"] for row in results["rows"] if row["draw"] is None]
    if task == "masks":
        assert methods == ["linear", "mlp"]
        assert set(results["left_out"]) == {"k-nn", "attentive-probe"}
        assert "k-nn is left out: it has one output an image" in page
        return
    assert methods == ["linear", "mlp", "k-nn", "attentive-probe"]
    assert results["left_out"] == {}
    store = ch.TokenStore.open(out / "tokens")
    train, test = store["train"], store["test"]
    vectors = [view.read()[..., :-1].mean(1) for view in (train, test)]
    row = row_of(out, "k-nn")
    near = KNeighborsRegressor(row["chosen"], metric="cosine", weights="distance").fit(vectors[0], train.targets)
    score = average_precision_score if task == "multi-label" else r2_score
    assert row[results["score"]] == pytest.approx(score(test.targets, near.predict(vectors[1])))
    assert (row["p_value"] is None) == (row["method"] == "linear")
    assert row_of(out, "linear")["difference"] is None


@pytest.mark.slow
def test_fractions_are_shares_of_all_images(probed):
    _, _, out, _ = probed
    rows = [row for row in results_of(out)["rows"] if row["draw"] is not None]
    assert {(row["budget"], row["train_images"]) for row in rows} == {("50%", 12)}
    assert sorted({row["draw"] for row in rows}) == [0, 1]
    for row in rows:
        if row["kind"] == "head":
            assert row["chosen"] == row_of(out, row["method"])["chosen"]


@pytest.mark.slow
def test_the_same_command_fits_nothing_again(probed, monkeypatch):
    _, _, out, arguments = probed
    before, board = results_of(out)["rows"], out.parent / "board.jsonl"
    lines = board.read_text().splitlines()
    assert len(lines) == len(before)
    assert json.loads(lines[0])["task"] == results_of(out)["task"]

    def never(*_, **__):
        raise AssertionError

    for name in ("ConvexHeadClassifierCV", "ConvexHeadClassifier", "ConvexHeadRegressorCV", "ConvexHeadRegressor"):
        monkeypatch.setattr(getattr(ch, name), "fit", never)
    assert call(*arguments) == 0
    assert results_of(out)["rows"] == before
    assert board.read_text().splitlines() == lines


@pytest.mark.slow
def test_what_has_no_meaning_is_refused(probed, capsys, tmp_path):
    task, images, out, _ = probed
    for source in (images, out / "tokens"):
        extra = OPTIONS[2:] if source != images else (*OPTIONS, *(("--void", 9) if task == "masks" else ()))
        capsys.readouterr()
        assert call("probe", source, *extra, "--shots", 4, "--out", tmp_path / "no") == 1
        error = capsys.readouterr().err
        assert "shots are images of each class" in error
        assert "take shares of all images with fractions" in error
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multi-label", "masks"])
def test_without_a_test_split_some_are_held_out(task, tmp_path, capsys):
    images = write(tmp_path / "images", task, [("train", 20)])
    void = ("--void", 9) if task == "masks" else ()
    assert (
        call("probe", images, *OPTIONS, *void, "--baselines", "", "--heads", "linear", "--out", tmp_path / "out") == 0
    )
    told = results_of(tmp_path / "out")["dataset"]
    assert (told["train"], told["test"]) == (16, 4)
    rows = ch.load(tmp_path / "out" / row_of(tmp_path / "out", "linear")["run"]).origin_.rows
    if task == "masks":
        assert "the last 20% of the images" in told["test_is"]
        assert rows.tolist() == list(range(16))
    else:
        assert "20% of the images, held out with seed 0" in told["test_is"]
        assert len(rows) == 16


def test_images_that_are_all_alike_are_refused(tmp_path, capsys):
    root = write(tmp_path / "images", "multi-label")
    for table, said in (("name,a,b\n00,1,0\n01,1,0\n02,1,0\n03,1,0", "all or none have each label"),
                        ("name,a\n00,1.5\n01,1.5\n02,1.5\n03,1.5", "the same number in a column")):  # fmt: skip
        for split in ("train", "test"):
            (root / split / "labels.csv").write_text(table)
        capsys.readouterr()
        out = tmp_path / said[:3]
        assert call("probe", root, "--backbone", "patches:4", "--out", out) == 1
        assert said in capsys.readouterr().err


# -- images at their own aspect ratio ----------------------------------------------------------------------------------
def write_shapes(root, masks):
    """Noise of three shapes whose class, or mask, is how bright it is."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 18), ("test", 9)):
        for i in range(count):
            width, height = ((16, 16), (16, 8), (8, 16))[i % 3]
            bright = 0 if masks else (i // 3) % 2
            pixels = rng.integers(0, 150, (height, width, 3)) + 60 * bright
            folder = root / split / ("images" if masks else ("dark", "light")[bright])
            folder.mkdir(parents=True, exist_ok=True)
            if masks:
                mask = np.zeros((height, width), np.uint8)
                mask[:, width // 2 :] = 1
                pixels[mask > 0] += 40
                (root / split / "labels").mkdir(exist_ok=True)
                Image.fromarray(mask).save(root / split / "labels" / f"{i:02d}.png")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return root


OWN_SHAPE = ("--backbone", "patches:4", "--keep-aspect", "--image-size", 16, "--beta-ratios", "0.3", "--tol", 1e-2)


@pytest.mark.slow
def test_masks_of_images_of_any_shape(tmp_path):
    images, out = write_shapes(tmp_path / "images", masks=True), tmp_path / "out"
    heads = ("--heads", "linear,self-attention,mlp-mixer,mlp,attentive")
    assert call("probe", images, *OWN_SHAPE, *heads, "--out", out) == 0
    results = results_of(out)
    assert [row["method"] for row in results["rows"]] == ["linear", "self-attention", "mlp"]
    assert set(results["left_out"]) == {"mlp-mixer", "attentive", "k-nn", "attentive-probe"}
    assert "mixes tokens by their position" in results["left_out"]["mlp-mixer"]
    assert "one output an image" in results["left_out"]["attentive"]
    test = ch.TokenStore.open(out / "tokens")["test"]
    assert set(test.lengths) == {8, 16}
    for row in results["rows"]:
        scores = pixel_scores(ch.load(out / row["run"]), test, images)
        assert row["mean_iou"] == pytest.approx(scores.mean_iou)
        assert row["mean_iou"] > 0.5


@pytest.mark.slow
def test_classes_of_images_of_any_shape(tmp_path):
    images, out = write_shapes(tmp_path / "images", masks=False), tmp_path / "out"
    heads = ("--heads", "linear,mlp-mixer,attentive", "--n-queries", 4)
    assert call("probe", images, *OWN_SHAPE, *heads, "--out", out) == 0
    left_out = results_of(out)["left_out"]
    assert set(left_out) == {"mlp-mixer", "attentive", "attentive-probe"}
    assert "--no-query-position" in left_out["attentive"]
    assert call("probe", images, *OWN_SHAPE, *heads, "--no-query-position", "--out", out) == 0
    assert set(results_of(out)["left_out"]) == {"mlp-mixer", "attentive-probe"}
    assert "up to 16" in (out / "index.html").read_text()
    store = ch.TokenStore.open(out / "tokens")
    vectors = [
        np.stack([view[i][:s, :-1].mean(0) for i, s in enumerate(view.lengths)])
        for view in (store["train"], store["test"])
    ]
    row = row_of(out, "k-nn")
    near = KNeighborsClassifier(row["chosen"], metric="cosine", weights="distance")
    right = near.fit(vectors[0], store["train"].labels).predict(vectors[1]) == store["test"].labels
    assert row["top1"] == pytest.approx(right.mean())


@pytest.mark.slow
def test_masks_on_one_grid_take_heads_that_mix(tmp_path):
    images, out = write(tmp_path / "images", "masks", (("train", 12), ("test", 6))), tmp_path / "out"
    options = (*OPTIONS[:2], "--beta-ratios", "0.3", "--tol", 1e-2, "--void", 9)
    assert call("probe", images, *options, "--heads", "self-attention,mlp-mixer", "--out", out) == 0
    test = ch.TokenStore.open(out / "tokens")["test"]
    for head in ("linear", "self-attention", "mlp-mixer"):
        row = row_of(out, head)
        assert row["converged"]
        assert row["mean_iou"] == pytest.approx(pixel_scores(ch.load(out / row["run"]), test, images).mean_iou)
