"""The report shows what the results say, stays one file and takes hostile names for text."""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from convexhead.errors import InputError
from convexhead.report import csv_rows, markdown_table, render, tables, terminal_table

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from convexhead.report import drawing, figures

HEADS = ("self-attention", "mlp-mixer", "fno", "block-fno", "mlp", "linear")
RATIOS = (0.3, 0.1, 0.05, 0.02, 0.01)


def png(pixels):
    """Base64 of a small grayscale PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def decay(rng, first, last, steps, top_seconds):
    """A history that falls from ``first`` above the bound to ``last``."""
    t = np.linspace(0.05, 1, steps)
    above = first * (last / first) ** (t + 0.05 * rng.standard_normal(steps))
    return [(float(top_seconds * x**2), float(a)) for x, a in zip(t, np.minimum.accumulate(above), strict=True)]


def make_row(rng, head, activation):
    gated = activation == "gated-relu"
    primal, gap = float(rng.uniform(0.2, 0.6)), float(10 ** rng.uniform(-4.2, -3.02))
    dual, fit = primal * (1 - gap), float(rng.uniform(0.5, 20))
    heads = 1 if head == "linear" else int(rng.integers(6, 30))
    spectrum = np.sort(10 ** rng.uniform(-1.5, 1, heads))[::-1]
    best = {"self-attention": 0.968, "mlp-mixer": 0.961, "fno": 0.953, "block-fno": 0.949}.get(head, 0.93)
    runs = []
    for seed in range(3):
        excess = float(10 ** rng.uniform(-2.8, -1))
        history = decay(rng, 4, excess + gap, 25, fit * 2.5)
        runs.append(
            {
                "seed": seed,
                "test_accuracy": best - 0.01 + 0.006 * float(rng.standard_normal()),
                "objective": primal * (1 + excess),
                "relative_excess": excess,
                "seconds": fit * 2.5,
                "history": [{"seconds": t, "objective": dual + primal * a} for t, a in history],
            }
        )
    mine = decay(rng, 3, gap, 30, fit)
    return {
        "head": head,
        "activation": activation,
        "beta_ratio": 0.02,
        "beta": 0.0123,
        "validation_accuracy": best + 0.004 * gated,
        "test_accuracy": best + 0.002 * float(rng.standard_normal()),
        "certificate": {
            "primal": primal,
            "dual": dual,
            "gap": primal - dual,
            "relative_gap": gap,
            "sigma_slack": 0.003,
            "failure_probability": 1e-6 if head == "self-attention" else 0.0,
            "scope": "sampled-gates" if gated else "global",
            "converged": True,
        },
        "heads": heads,
        "seconds": fit * 3,
        "fit_seconds": fit,
        "parameters": heads * 5000,
        "history": [
            {
                "seconds": t,
                "objective": dual + primal * a,
                "gap": 2.5 * primal * a,
                "heads": 1 + i * heads // 30,
            }
            for i, (t, a) in enumerate(mine)
        ],
        "singular_values": np.array_split(spectrum, 3 if gated else 1),
        "path": [
            {
                "beta_ratio": ratio,
                "validation_accuracy": best - 0.06 * abs(math.log10(ratio / 0.02)) ** 1.5,
                "heads": 1 if head == "linear" else max(1, int(heads * (0.02 / ratio) ** 0.7)),
                "relative_gap": gap,
                "seconds": fit / 2,
            }
            for ratio in RATIOS
        ],
        "twin": None
        if head == "linear"
        else {"optimizer": "Adam, L2 term in the loss", "n_heads": 30, "learning_rate": 0.01, "runs": runs},
    }


def fake_results(title="Convex heads on digits"):
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    digits = load_digits()
    rows = [make_row(rng, head, "linear") for head in HEADS]
    rows += [make_row(rng, head, "gated-relu") for head in HEADS if head != "linear"]
    rows[7]["certificate"] |= {"converged": False, "relative_gap": 0.0123}
    images = []
    for i in range(12):
        label, where = (
            str(digits.target[i]),
            np.add.outer((np.arange(7) - 3.0) ** 2, (np.arange(7) - 3.0) ** 2),
        )
        field = np.exp(-where / 6) * 0.3 + 0.06 * rng.standard_normal((7, 7))
        predicted = "8" if i == 5 else label
        images.append(
            {
                "png": png(255 - digits.images[i] * 15.9),
                "label": label,
                "predicted": predicted,
                "map": field.tolist(),
                "file": f"test/{label}/{i:04d}.png",
            }
        )
    results = {
        "title": title,
        "subtitle": "Attention, Mixer, FNO and MLP heads on frozen tokens, solved to a certified optimum",
        "dataset": {
            "name": "sklearn:digits",
            "train": 1077,
            "validation": 360,
            "test": 360,
            "tokens": 49,
            "channels": 64,
            "classes": 10,
            "backbone": "packaged:efficientnet-lite0, block 4",
        },
        "environment": {
            "cpu": "Example CPU @ 2.5 GHz",
            "cores": 2,
            "python": "3.11",
            "torch": "2.13.0",
            "convexhead": "0.1.0",
            "date": "2025-01-01",
        },
        "rows": rows,
        "baseline": {
            "name": "Logistic regression, mean token",
            "test_accuracy": 0.925,
            "validation_accuracy": 0.93,
            "relative_gap": 4.2e-4,
            "seconds": 2.1,
            "detail": "scikit-learn, C chosen on validation from 8 values",
        },
        "attention": {"images": images, "grid": [7, 7]},
        "reproduce": ["git clone https://example.org/convexhead", "make demo"],
    }
    return json.loads(json.dumps(results, default=lambda array: np.asarray(array).tolist()))


@pytest.fixture(scope="module")
def results():
    return fake_results()


@pytest.fixture(scope="module")
def page(results):
    return render(results)


class Page(HTMLParser):
    """Collects the tags, attributes and visible text of a page, and checks that tags close."""

    VOID = frozenset(("meta", "link", "img", "input", "br"))

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


# -- tables ------------------------------------------------------------------------------------------------
def test_markdown_table(results):
    lines = markdown_table(results).strip().split("\n")
    assert len(lines) == 2 + 11 + 1
    assert {line.count("|") for line in lines} == {len(tables.COLUMNS) + 1}
    assert lines[2].startswith("| self-attention | linear | 96.")
    assert "stopped early" in lines[2 + 7]
    assert lines[-1].startswith("| Logistic regression, mean token | – | 92.5% | 0.042% | – |")


def test_csv_rows_are_flat_and_complete(results):
    rows = csv_rows(results)
    assert len(rows) == 12
    assert all(row.keys() == rows[0].keys() for row in rows)
    out = io.StringIO()
    csv.DictWriter(out, rows[0].keys()).writerows(rows)
    assert rows[0]["relative_gap"] == results["rows"][0]["certificate"]["relative_gap"]
    excess = sorted(run["relative_excess"] for run in results["rows"][0]["twin"]["runs"])
    assert (rows[0]["adam_excess_median"], rows[0]["adam_excess_worst"]) == (excess[1], excess[2])
    assert rows[5]["adam_accuracy_mean"] is None


def test_terminal_table(results):
    from rich.console import Console

    hostile = copy.deepcopy(results)
    hostile["rows"][0]["head"] = "[red]attention[/red]"
    console = Console(width=220, file=io.StringIO())
    console.print(terminal_table(hostile))
    text = console.file.getvalue()
    assert "[red]attention[/red]" in text
    assert "Logistic regression" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00083, "0.083%"),
        (0.0123, "1.2%"),
        (0.5, "50%"),
        (1.5, "150%"),
        (2e-6, "<0.001%"),
        (0.0, "0%"),
        (None, "–"),
        (math.inf, "–"),
        (-0.01, "−1.0%"),
    ],
)
def test_relative(value, text):
    assert tables.relative(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.42, "0.4 s"), (41.2, "41 s"), (312, "5.2 min"), (7200, "2.0 h")])
def test_seconds(value, text):
    assert tables.seconds(value) == text


@pytest.mark.slow
def test_diverged_runs_are_counted_not_averaged(results):
    changed = copy.deepcopy(results)
    run = changed["rows"][0]["twin"]["runs"][0]
    run["relative_excess"] = run["objective"] = math.inf
    run["history"][-1]["objective"] = math.nan
    assert tables.diverged(changed["rows"][0]) == 1
    assert "1 diverged" in markdown_table(changed)
    assert "1 diverged" in render(changed)


# -- figures -----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", ["excess", "convergence", "spectra", "path", "attention_maps"])
def test_figures_are_written_and_reproducible(results, name, tmp_path):
    draw = getattr(figures, name)
    first = drawing.save(draw(results), tmp_path / "first.svg")
    again = drawing.save(draw(results), tmp_path / "again")
    assert [path.name for path in first] == ["first.svg", "first.pdf", "first.png", "first.json"]
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert 600 < one.stat().st_size < 600_000


def test_convergence_ends_at_the_certified_gap(results):
    row = results["rows"][0]
    figure = drawing.panel(figures.draw_convergence, row)
    ours = figure.axes[0].lines[-1]
    last = row["history"][-1]["objective"] - row["certificate"]["dual"]
    assert ours.get_ydata()[-1] == pytest.approx(last / row["certificate"]["primal"])
    assert len(figure.axes[0].lines) == 3 + 2


@pytest.mark.slow
def test_class_names_are_not_formulas(results):
    changed = copy.deepcopy(results)
    changed["attention"]["images"][0]["label"] = r"$\frac{<b>"
    drawing.svg(figures.attention_maps(changed))


# -- the page ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_page_is_well_formed_and_says_what_the_results_say(results, page):
    parsed = Page(page)
    assert not parsed.open
    assert len(parsed.ids) == len(set(parsed.ids))
    text = " ".join(" ".join(parsed.texts).split())
    for row in results["rows"]:
        assert row["head"] in text
        assert tables.relative(row["certificate"]["relative_gap"]) in text
    for said in ("1,077 / 360 / 360", "make demo", "one in 1,000,000", "0.1.0", "92.5%", "± "):
        assert said in text
    assert len(page.encode()) < 3_000_000
    assert parsed.tags.count("h1") == 1
    assert parsed.tags.count("img") == 12
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", page)) <= set(parsed.ids)


@pytest.mark.slow
def test_page_asks_the_network_for_nothing(page):
    for tag, key, value in Page(page).attributes:
        if key in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            assert value.startswith(("data:", "#")), (tag, key, value[:60])
    assert not re.search(r"@import|url\((?!#)", page)
    assert "fetch(" not in page
    assert "default-src 'none'" in page


@pytest.mark.slow
def test_every_figure_has_words(page):
    attributes = Page(page).attributes
    images = [value for tag, key, value in attributes if tag == "img" and key == "alt"]
    assert len(images) == 12
    assert all(images)
    shown = page.count('role="img"')
    assert shown == 2 + 11 + 5 + 4  # distances twice, progress, spectra, paths
    assert len([1 for tag, key, v in attributes if tag == "svg" and key == "aria-label" and len(v) > 20]) == shown


@pytest.mark.slow
def test_hostile_strings_stay_text(results):
    evil = "<script>alert(1)</script>"
    changed = copy.deepcopy(results)
    image = changed["attention"]["images"][0]
    image["label"] = image["predicted"] = image["file"] = evil + '" onload="alert(2)'
    for place, key in (
        (changed, "title"),
        (changed, "subtitle"),
        (changed["dataset"], "name"),
        (changed["dataset"], "backbone"),
        (changed["environment"], "cpu"),
        (changed["baseline"], "name"),
        (changed["baseline"], "detail"),
        (changed["rows"][0], "head"),
        (changed["rows"][1], "activation"),
        (changed["rows"][2]["twin"], "optimizer"),
    ):
        place[key] = evil
    changed["reproduce"] = [evil]
    page = render(changed)
    parsed = Page(page)
    assert parsed.tags.count("script") == 1
    assert "alert(1)" not in page[page.index("<script>\n") :]
    assert [key for _, key, _ in parsed.attributes].count("onload") == 0
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    changed["attention"]["images"][0]["png"] = '" onerror="alert(3)'
    with pytest.raises(InputError, match="base64 PNG"):
        render(changed)


@pytest.mark.slow
def test_page_without_the_optional_parts(results):
    changed = copy.deepcopy(results)
    changed["attention"] = changed["baseline"] = None
    for row in changed["rows"]:
        row["twin"], row["path"], row["history"], row["singular_values"] = None, [], [], []
    page = render(changed)
    assert not Page(page).open
    assert "Adam" not in Page(page).texts
    assert render({**changed, "rows": []})


@pytest.mark.slow
def test_page_is_reproducible(results, page):
    assert render(fake_results()) == page
    assert json.loads(json.dumps(results)) == results
