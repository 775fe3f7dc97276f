"""Benchmarks are run by hand: that what they import is there is looked at here."""

import ast
import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def defined(script: Path) -> set[str]:
    """Names that a script has at its top level."""
    names = set()
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {
                name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
        else:
            names |= {alias.asname or alias.name for alias in getattr(node, "names", [])}
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_benchmark_imports_is_there(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        names = {alias.name for alias in node.names}
        if (FOLDER / f"{node.module}.py").exists():
            assert names <= defined(FOLDER / f"{node.module}.py")
        elif node.module.partition(".")[0] == "convexhead":
            module = importlib.import_module(node.module)
            submodules = {path.stem for folder in getattr(module, "__path__", []) for path in Path(folder).iterdir()}
            assert names <= {*dir(module), *submodules}


def test_tables_of_pages_are_what_the_rows_say(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    speed_tables, attentive_page = map(importlib.import_module, ("speed_tables", "attentive_page"))
    assert attentive_page.written(page := attentive_page.PAGE.read_text()) == page
    for name, tables in speed_tables.PAGES.items():
        page = (speed_tables.DOCS / f"{name}.md").read_text()
        for table in tables:
            assert speed_tables.filled(page, table.__name__, table()) == page
