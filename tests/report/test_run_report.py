"""`convexhead report` in a real browser: every control does what it says, nothing leaves the page, names stay text."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import convexhead as ch
from convexhead.errors import FileFormatError, InputError
from convexhead.interpret import head_contributions, head_lift, spectra
from convexhead.report import evidence as evidences

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
import torch
from PIL import Image

from command import call
from convexhead.report import drawing, run_figures, run_page
from convexhead.report.gallery import gallery
from convexhead.report.pictures import as_seen
from convexhead.report.run_page import render_runs
from convexhead.report.runs import distances_in_words

pytestmark = pytest.mark.slow
CLASSES = ("blue", "green", "red", "yellow")
COLORS = ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images with a square of their class's colour somewhere, their tokens, a path, a Mixer, and Adam's run."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("work")
    for split, count in (("train", 24), ("test", 12)):
        for name, color in zip(CLASSES, COLORS, strict=True):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 170, (16, 16, 3))
                y, x = rng.integers(0, 9, 2)
                pixels[y : y + 8, x : x + 8] += 30 * np.array(color)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / split / name / f"{i:03}.png")
    tokens = folder / "tokens"
    extract = ("--backbone", "patches:4", "--channels", 11, "--reduce", "pca", "--constant")
    assert call("extract", folder / "photos", *extract, "--out", tokens) == 0
    assert call("path", tokens, "--out", folder / "path", "--beta-ratios", "0.5,0.2,0.05", "--tol", "0.01") == 0
    mixer = ("--head", "mlp-mixer", "--activation", "gated-relu", "--n-gates", 3, "--fit-intercept")
    assert call("fit", tokens, "--out", folder / "mixer", *mixer, "--beta-ratio", 0.1, "--tol", "0.01") == 0
    assert call("adam", tokens, "--out", folder / "adam", "--epochs", 3, "--heads", 4) == 0
    return folder


@pytest.fixture(scope="module")
def figure_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="module")
def page_text(work, figure_folder):
    return render_runs([work / "path"], figure_folder=figure_folder)


# -- without a browser -------------------------------------------------------------------------------------------------
def test_fitting_keeps_what_a_report_needs(work):
    model, kept = ch.load(work / "path"), evidences.read(work / "path")
    view = ch.TokenStore.open(work / "tokens")["test"]
    a, about = kept.arrays, kept.about
    np.testing.assert_array_equal(a["predicted"], model.decision_function(view).argmax(1))
    assert kept.accuracy == pytest.approx(model.score(view))
    np.testing.assert_array_equal(a["tokens"], view[a["sample"]])
    assert about["files"] == [view.files[i] for i in a["sample"]]
    assert about["classes"] == list(CLASSES)
    assert about["command"].startswith("convexhead path ")
    np.testing.assert_allclose(a["lift"], head_lift(model, view, torch.as_tensor(view.labels)), atol=1e-10)
    wrong = np.flatnonzero(a["labels"] != a["predicted"])
    assert a["sample"][0] == wrong[a["loss"][wrong].argmax()]
    assert [row["beta_ratio"] for row in about["path"]] == [0.5, 0.2, 0.05]
    chosen = next(row for row in about["path"] if row["beta"] == model.beta_)
    np.testing.assert_allclose(chosen["spectra"]["Z"], spectra(model)["Z"], atol=1e-9)
    assert not any("date" in key for key in about["environment"])


def test_the_same_run_gives_the_same_bytes(work, page_text, figure_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.move(work / "tokens", work / "elsewhere")  # the store is not needed
    try:
        assert render_runs([work / "path"], figure_folder=tmp_path / "again") == page_text
    finally:
        shutil.move(work / "elsewhere", work / "tokens")
    files = sorted(path.name for path in figure_folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (figure_folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_every_figure_has_its_numbers_beside_it(work, page_text, figure_folder):
    for figure in {path.stem for path in figure_folder.iterdir()}:
        assert all((figure_folder / f"{figure}.{ending}").stat().st_size for ending in ("svg", "pdf", "png", "json"))
    model = ch.load(work / "path")
    Z = json.loads((figure_folder / "run-1-spectrum-Z.json").read_text())["panels"][0]
    assert [line["name"] for line in Z["lines"]] == ["0.5", "0.2", "0.05"]
    order = [row["beta"] for row in evidences.read(work / "path").about["path"]].index(model.beta_)
    np.testing.assert_allclose(Z["lines"][order]["y"], spectra(model)["Z"], rtol=1e-9)
    confusion = json.loads((figure_folder / "run-1-confusion.json").read_text())["panels"][0]
    assert confusion["x_labels"] == list(CLASSES)
    np.testing.assert_allclose(np.sum(confusion["images"][0], axis=1), 1)
    assert page_text.count('download="') == len(list(figure_folder.glob("*.json")))


def test_command_line(work, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    capsys.readouterr()
    assert call("report", work / "path", "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == out.stat().st_size
    assert call("report", work / "nowhere", "--out", out) == 1
    assert "not a model folder" in capsys.readouterr().err
    assert call("report", "--out", out) == 2


def test_images_that_are_gone_or_have_moved(work, page_text):
    assert page_text.count("data:image/png") > 48
    shutil.move(work / "photos", work / "moved")
    try:
        page = render_runs([work / "path"])
        assert "The images are not shown" in page
        assert 'src="data:image' not in page
        (work / "moved" / "test" / "red" / "000.png").rename(work / "moved" / "test" / "red" / "x.png")
        page = render_runs([work / "path"], images=str(work / "moved"))
        (work / "moved" / "test" / "red" / "x.png").rename(work / "moved" / "test" / "red" / "000.png")
        assert "1 of 48 images are no longer in" in page
        assert set(re.findall('src="data:image[^"]*', page)) < set(re.findall('src="data:image[^"]*', page_text))
    finally:
        shutil.move(work / "moved", work / "photos")


def test_a_model_alone_and_a_store_to_score_it_on(work, tmp_path):
    ch.load(work / "path").save(tmp_path / "model")
    page = render_runs([tmp_path / "model"])
    assert "Give the token store with --tokens" in page
    assert "data-gallery" not in page.split("<script>")[0]
    scored = render_runs([tmp_path / "model"], store=ch.TokenStore.open(work / "tokens"))
    assert "data-gallery" in scored.split("<script>")[0]


def test_evidence_that_does_not_belong_is_refused(work, tmp_path):
    shutil.copytree(work / "path", tmp_path / "run")
    shutil.copy(work / "adam" / "weights.safetensors", tmp_path / "run" / "weights.safetensors")
    with pytest.raises(FileFormatError, match="another model"):
        evidences.read(tmp_path / "run")
    (tmp_path / "run" / "evidence.json").write_text("{")
    with pytest.raises(FileFormatError, match="damaged"):
        evidences.read(tmp_path / "run")
    regressor = ch.ConvexHeadRegressor("mlp").fit(np.eye(6, 4), np.arange(6.0))
    regressor.save(tmp_path / "regressor")
    with pytest.raises(InputError, match="regressor"):
        render_runs([tmp_path / "regressor"])
    with pytest.raises(InputError, match="at least one"):
        render_runs([])


@pytest.mark.parametrize("head", ["block-fno", "linear"])
def test_other_heads_and_few_images(work, tmp_path, head):
    store = ch.TokenStore.open(work / "tokens")
    model = ch.ConvexHeadClassifier(head, beta_ratio=0.3, tol=0.05, n_blocks=2, random_state=0).fit(store["train"])
    model.save(tmp_path / "run")
    evidences.write(evidences.collect(model, store), tmp_path / "run")
    page = render_runs([tmp_path / "run"], size=5)
    assert ("What it does to positions" in page) == (head == "block-fno")
    assert ("one head whatever β is" in page) == (head == "linear")
    assert ("of the nuclear norm" in page) == (head != "linear")
    assert page.count('class="tile" tabindex') == 5


def test_the_zero_model_has_a_report(work, tmp_path):
    store = ch.TokenStore.open(work / "tokens")
    model = ch.ConvexHeadClassifier(beta_ratio=2.0, random_state=0).fit(store["train"])
    model.save(tmp_path / "run")
    evidences.write(evidences.collect(model, store), tmp_path / "run")
    assert "the optimum is the zero model" in render_runs([tmp_path / "run"])


def test_thumbnails_show_what_the_tokens_cover():
    image = Image.new("RGB", (100, 60))
    timm = {"input_size": [3, 224, 224], "crop_pct": 0.5}
    assert as_seen(image, timm).size == (30, 30)
    assert as_seen(image, {"resize": 256, "crop": [224, 224]}).size == (52, 52)
    assert as_seen(image, {"resize": [224, 224], "crop": None}).size == (100, 60)
    assert as_seen(image, {"image_size": None}).size == (100, 60)


def test_numbers_of_a_figure_are_those_drawn():
    figure = run_figures.spectrum("Z", [("one", [3.0, 2.0]), ("two", [1.0])], along_beta=False)
    panel = drawing.numbers(figure)["panels"][0]
    assert panel["lines"] == [
        {"name": "one", "x": [1.0, 2.0], "y": [3.0, 2.0]},
        {"name": "two", "x": [1.0], "y": [1.0]},
    ]


def test_an_attentive_head_shows_what_its_queries_look_at(work, tmp_path):
    run = tmp_path / "attentive"
    options = ("--n-queries", 9, "--query-norm", "each", "--beta-ratio", 0.1, "--tol", "0.01")
    assert call("fit", work / "tokens", "--out", run, "--head", "attentive", *options) == 0
    text = render_runs([run], figure_folder=tmp_path / "figures")
    assert "What its queries look at" in text
    assert "the means of all 9 queries" in text
    panels = json.loads((tmp_path / "figures" / "run-1-queries.json").read_text())["panels"][:-1]  # last: the scale
    model, kept = ch.load(run), evidences.read(run).arrays
    # From the formula: the softmax of the scores of the image's own tokens, and the norms of what each query adds.
    Z = np.zeros((9, 11 + 1, 4))
    for j, (U, V) in enumerate(zip(model.mixing_, model.values_, strict=True)):
        Z[j] = np.einsum("kd,kc->dc", U, V.reshape(len(V), 4))
    squares = (Z**2).sum((1, 2))
    order = np.argsort(-squares, kind="stable")[:6]
    titles = [f"query {j}\n{drawing.percent(round(squares[j] / squares.sum(), 3))}" for j in order]
    assert [panel["title"] for panel in panels[:7]] == ["image", *titles]
    labels = [CLASSES[kept["labels"][i]] for i in kept["sample"]]
    names = [panel["y"] for panel in panels[::7]]
    assert sorted(names) == sorted(set(labels))
    for i, name in enumerate(names):
        tokens = kept["tokens"][labels.index(name)].astype(float)
        scores = tokens @ model.queries_[:, :12].T + model.queries_[:, 12:].T
        maps = np.exp(scores) / np.exp(scores).sum(0)
        for k, j in enumerate(order):
            np.testing.assert_allclose(panels[7 * i + k + 1]["images"][0], maps[:, j].reshape(4, 4), atol=1e-6)
    moved = render_runs([run], images=str(tmp_path / "nowhere"))  # without the images the maps are still there
    assert "What its queries look at" in moved


# -- in a browser ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs Chromium or Chrome on the PATH")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens HTML; afterwards asserts that nothing was asked of the network and no error said."""
    opened = []

    def open_page(text: str, width: int = 1200, **options: Any) -> Any:
        path = tmp_path / f"page{len(opened)}.html"
        path.write_text(text, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        seen = SimpleNamespace(requests=[], messages=[], page=page, url=path.as_uri())
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("console", lambda message: seen.messages.append(message.text))
        page.on("pageerror", lambda error: seen.messages.append(str(error)))
        page.goto(seen.url)
        opened.append(seen)
        return page

    yield open_page
    for seen in opened:
        assert [url for url in seen.requests if not url.startswith("data:")] == [seen.url]
        # Chromium remarks on the tests' own reading of pixels.
        assert [text for text in seen.messages if "getImageData" not in text] == []
        seen.page.close()


@pytest.fixture(scope="module")
def truth(work):
    """Contributions ``(g, s, k, c)`` in the order of the page's heads, and the evidence."""
    model, kept = ch.load(work / "path"), evidences.read(work / "path")
    order = np.argsort(-np.concatenate(model.singular_values_), kind="stable")
    parts = head_contributions(model, kept.arrays["tokens"]).numpy()[:, :, order]
    return SimpleNamespace(parts=parts, kept=kept, logits=model.decision_function(kept.arrays["tokens"]))


def colored(tile: Any) -> list[list[int]]:
    """RGBA of every token of a tile or of the large image."""
    script = """element => {
      const canvas = element.querySelector("canvas"), context = canvas.getContext("2d");
      return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
    }"""
    return np.reshape(tile.evaluate(script), (-1, 4)).tolist()


def value(text: str) -> float:
    return float(re.search(r"[+−]\d\S*", text).group().replace("−", "-"))


def test_the_gallery_shows_the_contributions(visit, page_text, truth):
    page = visit(page_text)
    tiles = page.locator("button.tile")
    assert tiles.count() == len(truth.parts) == 48
    predicted = truth.kept.arrays["predicted"][truth.kept.arrays["sample"]]
    for i in (0, 20, 47):
        total = truth.parts[i, :, :, predicted[i]].sum(1)
        pixels = np.array(colored(tiles.nth(i)))
        strong = np.abs(total) > 0.05 * np.abs(total).max()
        np.testing.assert_array_equal((pixels[:, 0] > pixels[:, 2])[strong], (total > 0)[strong])
        np.testing.assert_allclose(pixels[:, 3] / 215, np.abs(total) / np.abs(total).max(), atol=0.02)
    tiles.nth(20).click()
    heads = page.locator("[data-rows=heads] tr")
    sums = [value(heads.nth(k).locator("td").inner_text()) for k in range(heads.count())]
    expected = truth.parts[20, :, :, predicted[20]].sum(0)
    np.testing.assert_allclose(sums[1:], expected, rtol=6e-3, atol=1e-3)
    assert sums[0] == pytest.approx(truth.logits[20, predicted[20]], rel=6e-3)


def test_choosing_head_and_class(visit, page_text, truth):
    page = visit(page_text)
    tile = page.locator("button.tile").nth(5)
    tile.click()
    page.locator("[data-control=head]").select_option("2")
    page.locator("[data-control=class]").select_option(label="red")
    expected = truth.parts[5, :, 1, CLASSES.index("red")]
    pixels = np.array(colored(page.locator(".tokens")))
    np.testing.assert_allclose(pixels[:, 3] / 215, np.abs(expected) / np.abs(expected).max(), atol=0.02)
    said = page.locator(".chosen output")
    assert "to red through head 2" in said.inner_text()
    assert value(said.inner_text()) == pytest.approx(expected[0], rel=0.02, abs=np.abs(expected).max() / 100)
    page.locator("[data-rows=heads] button").nth(0).click()
    assert page.locator("[data-control=head]").input_value() == "0"
    page.locator("[data-rows=classes] button").filter(has_text="green").click()
    assert page.locator("[data-control=class]").input_value() == str(CLASSES.index("green"))
    assert page.locator("[data-rows=classes] tr.on").inner_text().startswith("green")
    for wanted, place in (("true", truth.kept.arrays["labels"]), ("predicted", truth.kept.arrays["predicted"])):
        page.locator("[data-control=class]").select_option(wanted)
        assert f"to {CLASSES[place[truth.kept.arrays['sample'][5]]]} " in said.inner_text()
    page.locator("[data-control=class]").select_option("second")
    runner_up = np.argsort(-truth.logits[5])[1]
    assert f"to {CLASSES[runner_up]} " in said.inner_text()


def test_clusters_images_and_filters(visit, page_text, truth):
    page = visit(page_text)
    tiles = page.locator("button.tile")
    for mode in ("head", "raw"):
        page.locator("[data-control=show]").select_option(mode)
        pixels = {tuple(pixel) for i in range(48) for pixel in colored(tiles.nth(i))}
        assert 2 <= len(pixels) <= 10
        assert len({pixel[3] for pixel in pixels}) == 1
    tiles.nth(3).hover(position={"x": 5, "y": 5})
    lit = {pixel[3] for pixel in colored(tiles.nth(3))} | {pixel[3] for pixel in colored(tiles.nth(9))}
    assert len(lit) == 2
    assert re.search(r"row 1, column 1: cluster \d of \d", page.locator("output.said").first.inner_text())
    page.locator("[data-control=show]").select_option("image")
    assert not any(pixel[3] for pixel in colored(tiles.nth(0)))
    wrong = int((truth.kept.arrays["labels"] != truth.kept.arrays["predicted"]).sum())
    page.locator("[data-control=which]").select_option("wrong")
    assert page.locator("button.tile:visible").count() == wrong
    page.locator("[data-control=which]").select_option("right")
    assert page.locator("button.tile:visible").count() == 48 - wrong


def test_a_page_of_limited_size_keeps_the_likely_and_the_true_classes(visit, work, truth, monkeypatch):
    kept = gallery(ch.load(work / "path"), truth.kept, size=48, budget=1)
    shown = np.frombuffer(base64.b64decode(kept["shown"]), "<i2").reshape(48, 3)
    labels = truth.kept.arrays["labels"][truth.kept.arrays["sample"]]
    assert (shown == labels[:, None]).any(1).all()
    monkeypatch.setattr(run_page, "BUDGET", 1)
    small = run_page.render_runs([work / "path"])
    page = visit(small)
    said, i = page.locator(".chosen output"), 30
    page.locator("button.tile").nth(i).click()
    order = np.argsort(-truth.logits[i])
    assert labels[i] in order[:3]
    page.locator("[data-control=class]").select_option(str(order[3]))
    assert f"{CLASSES[order[3]]} is not among the 3 classes kept" in said.inner_text()
    assert page.locator("[data-rows=heads] tr").count() == 0
    page.locator("[data-control=class]").select_option("true")
    assert page.locator("[data-rows=heads] tr").count() == truth.parts.shape[2] + 1


def test_hovering_says_what_a_token_adds(visit, page_text, truth):
    page = visit(page_text)
    tile = page.locator("button.tile").nth(7)
    box = tile.bounding_box()
    tile.hover(position={"x": box["width"] * 0.6, "y": box["height"] * 0.9})
    said = page.locator("output.said").first.inner_text()
    predicted = truth.kept.arrays["predicted"][truth.kept.arrays["sample"][7]]
    expected = truth.parts[7, 3 * 4 + 2, :, predicted].sum()
    assert truth.kept.about["files"][7] in said
    assert "row 4, column 3" in said
    assert value(said) == pytest.approx(expected, rel=0.02, abs=0.02)


def test_everything_works_from_the_keyboard(visit, page_text):
    page = visit(page_text)
    tiles = page.locator("button.tile")
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.locator("button.tile[tabindex='0']").count() == 1
    tiles.nth(0).focus()
    for key, place in (("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", 0), ("End", 47), ("Home", 0)):
        page.keyboard.press(key)
        assert page.evaluate(focused) == tiles.nth(place).get_attribute("aria-label")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("button.tile[aria-pressed=true]").count() == 1
    assert page.locator(".chosen").is_visible()
    page.locator(".tokens").focus()
    for key, where in (
        ("ArrowRight", "row 1, column 2"),
        ("ArrowDown", "row 2, column 2"),
        ("ArrowLeft", "row 2, column 1"),
    ):
        page.keyboard.press(key)
        assert where in page.locator(".chosen output").inner_text()
    slider = page.locator("input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "0.5"
    for _ in range(60):  # every control is reached by tabbing on
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.dataset.control ?? ''")
        if name == "which":
            break
    assert name == "which"


def test_the_slider_picks_a_beta(visit, page_text):
    page = visit(page_text)
    slider, output = page.locator("input[type=range]"), page.locator(".slider output")
    model_row = page.locator("table.path tr.on th").inner_text()
    assert output.inner_text() in model_row
    for step, ratio in enumerate(("0.5", "0.2", "0.05")):
        slider.fill(str(step))
        assert output.inner_text() == ratio
        assert ratio in page.locator("table.path tr.on th").inner_text()
        lines = page.locator("[data-slider] .on[id*='-beta-']")
        assert lines.count() == 5  # Z and four sides
        assert all(line.get_attribute("id").endswith(f"-beta-{step}") for line in lines.all())


def test_tables_sort(visit, page_text):
    page = visit(page_text)
    table = page.locator("table").first
    head = table.locator("thead button").filter(has_text="Singular value")

    def column() -> list[float]:
        return [float(cell) for cell in table.locator("tbody td:nth-child(2)").all_inner_texts()]

    before = column()
    assert before == sorted(before, reverse=True)
    for order in ("ascending", "descending"):
        head.click()
        assert column() == sorted(before, reverse=order == "descending")
        assert table.locator(f"th[aria-sort={order}]").count() == 1


def test_words_for_screen_readers(visit, page_text):
    page = visit(page_text)
    assert page.locator("html[lang=en]").count() == 1
    assert page.locator("h1").count() == 1
    for control in page.locator("select, input").all():
        assert control.evaluate("e => e.labels.length") == 1
    assert page.locator("svg:not([role=img]):not([aria-hidden])").count() == page.locator("svg svg").count()
    assert all(svg.get_attribute("aria-label") for svg in page.locator("svg[role=img]").all())
    assert all(image.get_attribute("alt") is not None for image in page.locator("img").all())
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        for selector in (".subtitle", ".note", "figcaption", ".caption b", ".numbers", "td small"):
            assert contrast(page, selector) >= 4.5, (theme, selector)


def contrast(page: Any, selector: str) -> float:
    """WCAG's contrast of an element's text with the page's paper."""
    colors = page.locator(selector).first.evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = []
    for color in colors:
        rgb = np.array([int(part) for part in re.findall(r"\d+", color)[:3]]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(visit, page_text, width):
    page = visit(page_text, width=width)
    page.locator("button.tile").nth(9).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_captions_say_what_is_true_and_what_was_predicted(visit, page_text, truth):
    captions = visit(page_text).locator("button.tile + .caption").all_inner_texts()
    arrays = truth.kept.arrays
    expected = []
    for row in arrays["sample"]:
        label, predicted = (CLASSES[arrays[name][row]] for name in ("labels", "predicted"))
        expected.append(f"{label}, right" if label == predicted else f"true: {label}, predicted: {predicted}")
    assert captions == expected
    assert any(told.startswith("true") for told in captions)


def test_print_leaves_the_controls_out(visit, page_text):
    page = visit(page_text)
    page.emulate_media(media="print")
    assert not page.locator(".controls, .slider, .numbers").filter(visible=True).count()
    assert page.locator("button.tile img").first.is_visible()
    page.pdf()


def test_without_javascript_the_page_still_tells(browser, page_text, tmp_path):
    (tmp_path / "page.html").write_text(page_text)
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("noscript").inner_text()
    assert page.locator("button.tile img").first.is_visible()
    context.close()


def test_hostile_names_stay_text(visit, work, tmp_path):
    evil = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">\''
    shutil.copytree(work / "path", tmp_path / "<b>run")
    path = tmp_path / "<b>run" / "evidence.json"
    about = json.loads(path.read_text())
    about["classes"][1] = about["files"][0] = about["command"] = about["tokens"]["backbone"] = evil
    about["environment"]["cpu"] = evil
    path.write_text(json.dumps(about))
    page = visit(render_runs([path.parent]))
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x], body dd b").count() == 0
    assert page.locator("[data-control=class] option[value='1']").first.inner_text() == evil
    page.locator("button.tile").first.click()
    page.locator("[data-control=class]").first.select_option("1")
    assert evil in page.locator(".chosen output").first.inner_text()
    assert page.locator("dd", has_text="<b>run").count() == 1


def test_several_runs_side_by_side(visit, work):
    page = visit(render_runs([work / "adam", work / "mixer"]))
    rows = page.locator("#compare ~ .scroll tbody tr")
    assert [name.strip() for name in rows.locator("th").all_inner_texts()] == ["adam", "mixer"]
    assert page.locator("h1").inner_text() == "2 runs compared"
    page.set_viewport_size({"width": 1200, "height": 900})
    assert page.locator(".scroll.many").evaluate("table => table.scrollWidth <= table.clientWidth")
    assert "Adam" in rows.nth(0).inner_text()
    assert page.locator("article").count() == 2
    page.locator("nav a").nth(1).click()
    assert page.url.endswith("#run-2")
    mixer = page.locator("#run-2")
    mixer.locator("button.tile").first.click()
    assert mixer.locator("[data-rows=heads] tr").last.inner_text().startswith("intercept")
    assert page.locator("#run-1 .chosen").is_hidden()
    assert mixer.get_by_text("What it does to positions").count() == 1


def test_a_head_by_adam_is_told_its_distance_from_the_optimum_of_its_problem():
    def run(name, problem, primal, dual, *, by_adam):
        return {
            "name": name,
            "problem": problem,
            "by_adam": by_adam,
            "certificate": {"primal": primal, "dual": dual},
        }

    runs = [
        run("adam", 1, 1.02, 0.9, by_adam=True),
        run("convex", 1, 1.0, 0.999, by_adam=False),
        run("other adam", 2, 3.0, 1.0, by_adam=True),
    ]
    distances_in_words(runs)
    assert runs[0]["distance"] == (
        "Of its objective, 2.0% to 2.1% lies above the optimum, by the certified optimum of convex."
    )
    assert runs[1]["distance"] is runs[2]["distance"] is None
