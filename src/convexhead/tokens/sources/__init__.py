"""Where images come from: folders, arrays, tar files, data sets of other libraries."""

from convexhead.tokens.sources.base import BrokenImageError, ImageSource
from convexhead.tokens.sources.open import open_source

__all__ = ["BrokenImageError", "ImageSource", "open_source"]
