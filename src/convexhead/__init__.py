"""convexhead: token heads on frozen features, trained to a certified global optimum."""

from convexhead._version import __version__
from convexhead.audit import certify
from convexhead.certificate import Certificate
from convexhead.errors import ConvexHeadError, FileFormatError, HubError, InputError, MissingExtraError
from convexhead.estimators import ConvexHeadClassifier, ConvexHeadRegressor
from convexhead.path import beta_max, regularization_path
from convexhead.persistence import load
from convexhead.tokens import TokenStore

__all__ = [
    "Certificate",
    "ConvexHeadClassifier",
    "ConvexHeadError",
    "ConvexHeadRegressor",
    "FileFormatError",
    "HubError",
    "InputError",
    "MissingExtraError",
    "TokenStore",
    "__version__",
    "beta_max",
    "certify",
    "load",
    "regularization_path",
]
