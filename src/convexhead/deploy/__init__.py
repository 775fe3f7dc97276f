"""A trained head where its owner's model runs: as one network with its backbone, as a file, on a hub."""

from convexhead.deploy.files import export_run
from convexhead.deploy.hub import pull, push
from convexhead.deploy.network import ImageModel, TokenModel, attach
from convexhead.deploy.training import Recipe, finetune

__all__ = ["ImageModel", "Recipe", "TokenModel", "attach", "export_run", "finetune", "pull", "push"]
