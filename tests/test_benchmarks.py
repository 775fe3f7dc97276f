"""Benchmarks are run by hand: that what they import is there is looked at here."""

import ast
import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def defined(script: Path) -> set[str]:
    """Names that a script has at its top level."""
    tree = ast.parse(script.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {alias.asname or alias.name for node in tree.body for alias in getattr(node, "names", [])}


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
