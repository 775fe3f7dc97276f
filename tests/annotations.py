"""Shape and dtype annotations are checked while the tests run (jaxtyping with beartype).

Each function of the `CHECKED` packages is checked in its first calls of each test. A check costs more than most
functions do on small tensors, and the hundredth step of a loop has the shapes of its first. Functions inside functions
are left alone: they would be compiled anew in each call. What torch traces is traced without the checks.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import torch
from beartype import beartype
from jaxtyping import jaxtyped

CHECKED = tuple(f"convexhead.{name}." for name in ("program", "dual_norm", "linalg", "certificate", "solvers"))
CALLS = 5
"""Calls of each function that are checked in each test."""
calls: Counter[Callable[..., Any]] = Counter()
"""Calls of each function in the running test; each test begins with none."""


@functools.cache
def _whole(thing: Any) -> Any:
    """The function with all its checks. (What torch compiles can refer to a cache by name, but not hold one.)"""
    return jaxtyped(thing, typechecker=beartype)


def checked(thing: Any) -> Any:
    """A function or a dataclass whose first calls are checked."""
    if isinstance(thing, type):
        if "__dataclass_fields__" in vars(thing):
            thing.__init__ = checked(thing.__init__)
        return thing

    @functools.wraps(thing)
    def check(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or calls[thing] >= CALLS:
            return thing(*args, **kwargs)
        calls[thing] += 1
        return _whole(thing)(*args, **kwargs)

    return check


def definitions(scope: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module, and their methods, but nothing inside a function."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            yield from definitions(node)


class CheckedLoader(SourceFileLoader):
    """Decorates each function, below its other decorators, and each class, above them."""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)

    def source_to_code(self, data: Any, path: Any, **_: Any) -> Any:
        tree = ast.parse(data)
        for node in definitions(tree):
            decorator = ast.copy_location(ast.Name("_checked", ast.Load()), node)
            node.decorator_list.insert(0 if isinstance(node, ast.ClassDef) else len(node.decorator_list), decorator)
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["_checked"] = checked
        super().exec_module(module)


class CheckedModules(MetaPathFinder):
    """Finds the modules whose annotations are checked."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if f"{name}.".startswith(CHECKED) else None
        if spec is not None and spec.origin is not None:
            spec.loader = CheckedLoader(name, spec.origin)
        return spec


def install() -> None:
    """Check what is imported from now on."""
    sys.meta_path.insert(0, CheckedModules())
