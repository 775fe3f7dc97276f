"""The Markdown pages: plain lines, links that lead somewhere, commands, options, names and files that exist."""

from __future__ import annotations

import csv
import importlib
import inspect
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer
import typer.main

import convexhead as ch
from convexhead.cli import app
from convexhead.solvers.select import NAMES

ROOT = Path(__file__).parents[1]
FRAMES = ("index.md", "changelog.md", "contributing.md", "security.md")
"""Pages of the site that are no text of their own: its start, and those that are written in the root."""
WRITTEN = "cli.md"
"""Made when the site is built."""
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / WRITTEN})
GUIDES = [page for page in PAGES if page.parent.name == "docs" or page.name == "CONTRIBUTING.md"]
GUIDES = [page for page in GUIDES if page.name not in FRAMES]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PUBLIC = ("convexhead", *(f"convexhead.{n}" for n in ("tokens", "interpret", "report", "certificate", "dual_norm")))
"""Packages whose ``__all__`` the reference lists in full."""
TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""The changelog keeps the names of its time."""
MOST_CHARACTERS = 100
NOT_OUR_WORDS = re.compile(
    r"\b(witness\w*|climbers?|lanes?|peaks|twins?|forming|tidy|tidied|settle[sd]?"
    r"|learn(?:s|ed|ing)?(?! rates?)|for want of|as far as|what is left of)\b",
    re.IGNORECASE,
)
ABOUT = 0.15
"""Share by which a length that a page calls "about" may be off."""


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=[page.stem for page in pages])


@cache
def code(page: Path) -> str:
    """The blocks of code of a page."""
    text = page.read_text()
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"(?:^\n)((?:^    .*\n)+)", text, re.M)
    return "\n".join([*fenced, *indented])


@cache
def prose(page: Path) -> list[str]:
    """The lines that are no code, formula, table or picture."""
    text = re.sub(r"^(```|\$\$).*?^\1", "", page.read_text(), flags=re.M | re.S)
    return [line for line in text.splitlines() if not line.startswith(("|", "![", "    ", "<!--"))]


@cache
def spans(page: Path) -> list[str]:
    """What stands between backticks, on one line."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]


@each(PAGES)
def test_lines_are_short(page):
    long = [line for line in prose(page) if len(line) > MOST_CHARACTERS and "](" not in line]
    assert not long


@each(PAGES)
def test_words_are_the_field_s(page):
    words = re.sub(r"`[^`]*`|\]\([^)]*\)|scikit-learn", "", " ".join(prose(page)))
    assert not NOT_OUR_WORDS.findall(words)


@each(GUIDES)
def test_a_page_begins_with_what_the_reader_can_do_after_it(page):
    assert re.match(r"# .+\n\nAfter this page you ", page.read_text())


@each(PAGES)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@each(TODAY)
def test_files_exist(page):
    """Files of the repository that the page names, from its root or from the package's folder."""
    named = re.findall(r"\b((?:src|tests|benchmarks|examples|docs)/[\w/.-]*\w)", "\n".join([*spans(page), code(page)]))
    named += [span for span in spans(page) if re.fullmatch(r"[\w/]+/\w+\.py", span)]
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "src" / "convexhead" / name).exists(), name


def commands(page: Path) -> list[list[str]]:
    """The words after ``convexhead`` of each command line on a page."""
    lines = re.sub(r"\\\n\s*", " ", code(page)).splitlines() + [s for s in spans(page) if s.startswith("convexhead ")]
    found = []
    for line in lines:
        match = re.search(r"(?:^|-m )convexhead ((?!as ).+)", line.strip())
        if match:
            found.append(shlex.split(match.group(1), comments=True))
    return found


@each(TODAY)
def test_commands_and_options_exist(page):
    root = typer.main.get_command(app)
    for words in commands(page):
        command = root
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            assert words[0] in command.commands, words[0]
            command, words = command.commands[words[0]], words[1:]
        options = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        } | {"--help"}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, words


@each(TODAY)
def test_options_named_alone_belong_to_some_command(page):
    known = {"--help"}
    groups = [typer.main.get_command(app)]
    while groups:
        for command in groups.pop().commands.values():
            if hasattr(command, "commands"):
                groups.append(command)
            known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= set(re.findall(r'"(--[\w-]+)"', "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))))
    alone = {span.split()[0] for span in spans(page) if span.startswith("--")}
    assert alone <= known


@each(TODAY)
def test_python_names_exist(page):
    text = "\n".join([*spans(page), code(page)])
    for name in set(re.findall(r"\bch\.(\w+)", text)):
        assert hasattr(ch, name), name
    for name in set(re.findall(r"\bconvexhead((?:\.[A-Za-z_]\w*)+)", text)):
        assert resolve("convexhead" + name) is not None, name


def resolve(name: str) -> object:
    """The module or attribute under a dotted name of today."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    return None


@pytest.mark.filterwarnings("error::FutureWarning")
def test_resolve_finds_only_what_there_is():
    assert resolve("convexhead.program.losses.Huber") is not None
    with pytest.raises(AttributeError):
        resolve("convexhead.program.losses.NoSuchLoss")


def test_lengths_are_as_told():
    """``[`name.py`](path) (about N lines`` of files, ```Name` (about N lines`` of losses."""
    text = re.sub(r"\s+", " ", (ROOT / "CONTRIBUTING.md").read_text())
    told = [
        (len((ROOT / path).read_text().splitlines()), int(n))
        for path, n in re.findall(r"`\]\((\S+\.py)\) \(about (\d+) lines", text)
    ]
    losses = importlib.import_module("convexhead.program.losses")
    told += [
        (len(inspect.getsource(getattr(losses, name)).splitlines()), int(n))
        for name, n in re.findall(r"`(\w+)` \(about (\d+) lines", text)
    ]
    assert len(told) >= 7
    for is_, said in told:
        assert abs(is_ - said) <= ABOUT * said, (is_, said)


def test_architecture_has_at_most_ten_stops_and_the_picture_names_them():
    page = (ROOT / "docs" / "architecture.md").read_text()
    stops = re.findall(r"^\d+\. \[`([\w/]+\.py)`\]", page, re.M)
    assert 1 < len(stops) <= 10
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text()
    assert re.findall(r'class="f">([^<]+)<', picture) == stops


def test_solvers_of_the_guide_are_those_that_there_are():
    guide = (ROOT / "docs" / "choosing.md").read_text().split("## Solver\n")[1]
    assert set(re.findall(r"^\| `([\w-]+)` \|", guide, re.M)) | {"auto"} == set(NAMES)


def test_reference_has_every_public_name():
    listed = set(re.findall(r"^   ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.M))
    short = {name.split(".")[-1] for name in listed}
    public = {name for package in PUBLIC for name in importlib.import_module(package).__all__}
    assert public - {"__version__", "certify_atoms", "Certificate"} <= short
    assert {"Certificate", "certificate.certify_atoms"} <= listed


def test_reference_names_only_what_there_is():
    text = (ROOT / "docs" / "api.md").read_text()
    package = ""
    for line in text.splitlines():
        package = line.split("::")[1].strip() if "currentmodule::" in line else package
        if re.fullmatch(r"   [\w.]+", line):
            assert resolve(f"{package}.{line.strip()}") is not None, line


def test_site_reaches_every_page():
    pages = {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"}
    trees = "\n".join(
        block for page in PAGES for block in re.findall(r"```{toctree}\n:hidden:\n\n(.*?)```", page.read_text(), re.S)
    )
    assert set(trees.split()) == pages | {"gallery/index", "cli"}


def test_gallery_shows_each_script():
    assert len(EXAMPLES) >= 12
    for example in EXAMPLES:
        text = example.read_text()
        assert example.stem.startswith("plot_")  # others are not run
        title, line = re.match(r'"""\n(.+)\n(=+)\n\n', text).groups()
        assert len(line) >= len(title)
        assert "plt.show()" in text


def test_citation_and_changelog_are_of_this_version():
    assert f"\nversion: {ch.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(ch.__version__)} ", (ROOT / "CHANGELOG.md").read_text(), re.M)


@each([ROOT / "docs" / "certificates.md", ROOT / "docs" / "first-probe.md"])
def test_the_example_of_a_certificate_is_the_demo_s(page):
    with open(ROOT / "benchmarks" / "results" / "demo.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["head"] == "self-attention")
    numbers = {name: float(row[name]) for name in ("primal", "dual", "beta", "relative_gap", "sigma_slack")}
    numbers["failure_probability"] = float(row["failure_probability"])
    gap = numbers["primal"] - numbers["dual"]
    certificate = ch.Certificate(**numbers, gap=gap, scope=row["scope"], converged=row["converged"] == "True")
    assert f"\n    {certificate}\n" in page.read_text()


def test_readme_fits_one_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 60


def test_readme_quotes_the_probe_that_was_measured():
    with (ROOT / "benchmarks/results/probe_folder.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file) if row["budget"] == "all"}
    page = (ROOT / "README.md").read_text()
    quoted = re.findall(r"^\| ([a-z-]+) \| ([\d.]+)% \| ([\d.]+)–([\d.]+) \|.*\| (\S+) \| (\S+) \|$", page, re.M)
    assert [name for name, *_ in quoted] == list(rows)
    for name, *shares, gap, heads in quoted:
        row = rows[name]
        assert [float(share) for share in shares] == [
            round(100 * float(row[key]), 1) for key in ("top1", "low", "high")
        ]
        assert heads == (row["heads"] or "–")
        assert gap == (f"{100 * float(row['relative_gap']):.2g}%" if row["relative_gap"] else "–")
