"""The documentation site: `make docs` builds it into `docs/_site`."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path

import typer
import typer.main
from docutils import nodes
from sphinx.application import Sphinx
from sphinx_gallery.sorting import FileNameSortKey
from typer.cli import get_docs_for_click

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "src"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import convexhead  # noqa: E402
import convexhead.cli  # noqa: E402


class FirstFit(FileNameSortKey):
    """The gallery begins with the example of a first fit."""

    def __call__(self, filename: str) -> str:
        return "" if filename == "plot_first_fit.py" else super().__call__(filename)


project = "convexhead"
author = "The convexhead developers"
project_copyright = "The convexhead developers, Apache-2.0"
release = convexhead.__version__
version = ".".join(release.split(".")[:2])

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a network
    "numpydoc",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_site", "_templates", "gallery/**/*.ipynb", "gallery/**/*.py", "gallery/**/*.zip", "**/*.md5"]
templates_path = ["_templates"]
nitpicky = False
suppress_warnings = ["config.cache"]  # settings that are functions are not kept between builds

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4

autosummary_generate = True
autodoc_typehints = "none"
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
default_role = "code"  # single backticks in docstrings

html_theme = "pydata_sphinx_theme"
html_title = f"convexhead {version}"
html_sidebars = {"index": [], "first-probe": []}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": f"convexhead {version}"},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": FirstFit,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "capture_repr": ("_repr_html_", "__repr__"),
    "matplotlib_animations": False,
}
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")

LONG_TABLE = 20
"""Rows beyond which a table is folded."""


OF_THE_ROOT = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md", "security": "SECURITY.md"}
"""Pages that are written in the root of the repository; the files of their names in `docs` say so."""


ELSEWHERE = {
    **{f"../{file}": f"{page}.md" for page, file in OF_THE_ROOT.items()},
    "../examples/README.rst": "gallery/index.rst",
    "../src/convexhead/cli": "cli.md",
}
"""Pages of the site that stand for files of the repository; an example stands for its page in the gallery."""


def write_commands(app: Sphinx) -> None:
    """Write `cli.md`: what `--help` says, for all commands on one page."""
    command = typer.main.get_command(convexhead.cli.app)
    command.commands = {name: one for name, one in command.commands.items() if not one.hidden}
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="convexhead", title="Command line")
    text = re.sub(r"^\* `-?-?(install|show)-completion`.*\n", "", text, flags=re.M)
    for name, one in command.commands.items():  # the list has the first words of each
        text = re.sub(
            rf"^\* `{name}`: .*", f"* `{name}`: {one.get_short_help_str(limit=1000)}", text, count=1, flags=re.M
        )
    text = re.sub(r"(?<![\w`-])--[a-z][\w-]*(?![^`\n]*`)", r"`\g<0>`", text)  # else a dash is typeset
    (DOCS / "cli.md").write_text(text)


def link_repository(app: Sphinx, doc: str, source: list[str]) -> None:
    """Let links out of `docs` lead to pages of this site, or to files that it carries along."""
    text = source[0]
    if doc in OF_THE_ROOT:
        text = re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](../\1)", (ROOT / OF_THE_ROOT[doc]).read_text())

    def resolve(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        path, hash_, anchor = target.partition("#")
        page = ELSEWHERE.get(path, re.sub(r"^\.\./examples/(\w+)\.py$", r"gallery/\1.rst", path))
        page = page.removeprefix("../docs/")
        return words if (DOCS / page).is_dir() else f"[{words}]({page}{hash_}{anchor})"

    source[0] = re.sub(r"(?<!!)\[([^\]]*)\]\((\.\./[^)]+)\)", resolve, text)


def skip_metadata_requests(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out the methods that scikit-learn makes for its routing of metadata."""
    return True if re.fullmatch(r"set_\w+_request|get_metadata_routing", name) else None


def fold_long_tables(app: Sphinx, doctree: nodes.document) -> None:
    """Tables of many rows open at a click. Nothing is left out of the page."""
    for table in list(doctree.findall(nodes.table)):
        rows = len(next(table.findall(nodes.tbody)).children)
        if rows > LONG_TABLE:
            opening = f'<details class="long-table"><summary>Table of {rows} rows</summary>'
            parent, at = table.parent, table.parent.index(table)
            parent.insert(at + 1, nodes.raw("", "</details>", format="html"))
            parent.insert(at, nodes.raw("", opening, format="html"))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_commands)
    app.connect("autodoc-skip-member", skip_metadata_requests)
    app.connect("source-read", link_repository)
    app.connect("doctree-read", fold_long_tables)
