"""Users meet these errors. Each message is one line and says what to do."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Iterable
from types import ModuleType

MANY_OPTIONS = 20
"""Number of options above which a message names the nearest alone. Chosen by hand: one line on a screen."""


class ConvexHeadError(Exception):
    """The base of every error that convexhead raises on purpose."""


class InputError(ConvexHeadError, ValueError):
    """An argument or a data array that cannot be used as given."""


class InputTypeError(InputError, TypeError):
    """An argument or a data array of a type that holds no numbers or labels."""


class FileFormatError(ConvexHeadError, ValueError):
    """A file or folder that is foreign, truncated, half-written or of another format version."""


class MissingExtraError(ConvexHeadError, ImportError):
    """An optional package is needed that is not installed."""


class HubError(ConvexHeadError, RuntimeError):
    """Weights or data of a remote hub could not be loaded."""


def choose(what: str, name: object, options: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``options``; else raise `InputError` with the nearest option.

    >>> choose("head", "self-attention", ["self-attention", "mlp"])
    'self-attention'
    """
    options = list(options)
    if isinstance(name, str) and name in options:
        return name
    near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if near and len(options) > MANY_OPTIONS:
        raise InputError(f"unknown {what} {name!r}: did you mean {near[0]!r}?")
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown {what} {name!r}: choose one of {', '.join(map(repr, options))}{hint}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional ``module`` or raise `MissingExtraError` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs the package {module.split('.')[0]!r}: pip install 'convexhead[{extra}]'"
        ) from error


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user that called into this package, however deep in it the cause lies."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("convexhead", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)
