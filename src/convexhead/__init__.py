"""convexhead: token heads on frozen features, trained to a certified global optimum."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from convexhead._renamed import accept_old_names
from convexhead._version import __version__

if TYPE_CHECKING:
    from convexhead.audit import certify
    from convexhead.certificate.certificate import Certificate
    from convexhead.deploy import attach
    from convexhead.errors import ConvexHeadError, FileFormatError, HubError, InputError, MissingExtraError
    from convexhead.estimators import ConvexHeadClassifier
    from convexhead.estimators_cv import ConvexHeadClassifierCV, ConvexHeadRegressorCV
    from convexhead.path import beta_max, regularization_path
    from convexhead.persistence import load
    from convexhead.regressor import ConvexHeadRegressor
    from convexhead.tokens import TokenStore

__all__ = [
    "Certificate",
    "ConvexHeadClassifier",
    "ConvexHeadClassifierCV",
    "ConvexHeadError",
    "ConvexHeadRegressor",
    "ConvexHeadRegressorCV",
    "FileFormatError",
    "HubError",
    "InputError",
    "MissingExtraError",
    "TokenStore",
    "__version__",
    "attach",
    "beta_max",
    "certify",
    "load",
    "regularization_path",
]
HOMES = {
    "Certificate": "certificate.certify",
    "ConvexHeadClassifier": "estimators",
    "ConvexHeadClassifierCV": "estimators_cv",
    "ConvexHeadError": "errors",
    "ConvexHeadRegressor": "regressor",
    "ConvexHeadRegressorCV": "estimators_cv",
    "FileFormatError": "errors",
    "HubError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "TokenStore": "tokens",
    "attach": "deploy",
    "beta_max": "path",
    "certify": "audit",
    "load": "persistence",
    "regularization_path": "path",
}
"""The modules of the names above. They are imported when asked for: torch takes seconds."""

accept_old_names()


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package."""
    if name.startswith("_"):
        raise AttributeError(f"module 'convexhead' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"convexhead.{HOMES.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name != f"convexhead.{name}":
            raise
        raise AttributeError(f"module 'convexhead' has no attribute {name!r}") from error
    value = getattr(module, name) if name in HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
