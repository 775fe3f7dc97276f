"""The rules of the house that a program can check: sizes, circles, and who reaches into whose private parts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src"
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 80
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}
"""Names with an underscore that are public all the same: of every NamedTuple, and `os._exit`."""
NOT_OUR_WORDS = {"witness", "peaks", "climbers", "lanes", "learn", "settle", "tidy", "forming", "twin", "twins"}
"""Words that no name of ours is made of: the field has others."""
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "convexhead").rglob("*.py"))
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run: not those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield child
            yield from walk(child)


@cache
def imports(module: str) -> set[str]:
    """The package's modules that a module imports anywhere, in functions too."""
    found = set()
    for node in walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            rest = len(whole) < len(node.names)
            found |= whole | ({node.module} if rest else set())
    return (found & FILES.keys()) - {module}


def circles() -> list[list[str]]:
    """The groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in imports(module):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in FILES:
        if module not in index:
            visit(module)
    return found


@pytest.mark.slow
def test_no_import_circles():
    assert circles() == []


@pytest.mark.parametrize("module", FILES)
def test_sizes(module):
    assert len(FILES[module].read_text().splitlines()) <= MOST_LINES
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    }
    assert not long


def solver_classes() -> set[str]:
    return {
        node.name
        for module in FILES
        if module.startswith("convexhead.solvers")
        for node in tree(module).body
        if isinstance(node, ast.ClassDef)
    }


@pytest.mark.slow
@pytest.mark.parametrize("module", FILES)
def test_nobody_asks_which_solver_it_is(module):
    solvers = solver_classes()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            assert not asked & solvers, f"line {node.lineno}"


@pytest.mark.parametrize("module", FILES)
def test_names_are_words_of_the_field(module):
    named = [
        getattr(node, "name", None) or getattr(node, "arg", None) or getattr(node, "id", "")
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.arg)
        or isinstance(getattr(node, "ctx", None), ast.Store)
    ]
    words = {name: set(re.findall("[a-z]+", re.sub("([A-Z])", r"_\1", name).lower())) for name in named}
    assert not [name for name in named if words[name] & NOT_OUR_WORDS]


@pytest.mark.parametrize("module", FILES)
def test_nobody_reaches_into_another_class(module):
    reached = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if node.attr in PUBLIC:
                continue
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            parent = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if not (own or parent):
                reached.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("convexhead"):
            private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
            if private and f"{node.module}.{private[0]}" not in FILES:
                reached.append(f"line {node.lineno}: {private}")
    assert not reached


@pytest.mark.parametrize("module", [module for module in FILES if module.startswith("convexhead.certificate")])
def test_certificates_import_no_solver(module):
    assert not {other for other in imports(module) if other.startswith("convexhead.solvers")}


@pytest.mark.parametrize("module", [module for module in FILES if module.startswith("convexhead.solvers")])
def test_solvers_import_no_certificate(module):
    assert not {other for other in imports(module) if other.startswith("convexhead.certificate")}
