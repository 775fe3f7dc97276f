"""A trained head where its owner's model runs: as one network with its backbone, as a file, on a hub."""

from convexhead.deploy.files import export_run
from convexhead.deploy.network import ImageModel, TokenModel, attach

__all__ = ["ImageModel", "TokenModel", "attach", "export_run"]
