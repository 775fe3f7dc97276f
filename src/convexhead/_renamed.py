"""Modules under the names that they had in 0.1: importing one warns, and gives the module of today.

They go with version 0.3, not before June 2027.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "activation": "program.activations",
    "budget": "runtime.budget",
    "checkpoint": "runtime.checkpoint",
    "clock": "runtime.clock",
    "heads": "program.heads",
    "intercept": "program.intercept",
    "lanes": "runtime.workers",
    "losses": "program.losses",
    "patterns": "program.patterns",
    "problem": "program.problem",
    "ranks": "runtime.ranks",
    "relu": "dual_norm",
    "samples": "runtime.samples",
    "spectral": "linalg.deflation",
    "stored_tokens": "runtime.stored_tokens",
    "training": "baselines.adam",
}
"""Old names within the package, and the names of today."""


class _OldName(MetaPathFinder, Loader):
    """Finds ``convexhead.<old>`` and ``convexhead.<old>.<part>``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parts = fullname.split(".")
        if parts[0] != "convexhead" or len(parts) < 2 or parts[1] not in RENAMED:
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _, old, *rest = spec.name.split(".")
        today = ".".join(["convexhead", RENAMED[old], *rest])
        told = f"{spec.name} is now {today}; the old name goes with 0.3, after May 2027"
        warnings.warn(told, FutureWarning, stacklevel=2)
        module = importlib.import_module(today)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Execute nothing: the module was executed under its name of today, which it keeps."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def accept_old_names() -> None:
    """Let old names be imported."""
    if not any(isinstance(finder, _OldName) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldName())  # before the folders of packages are searched, for a second copy
