"""Where images come from: folders, arrays, tar files, data sets of other libraries."""

from convexhead.tokens.sources.open import ImageSource, open_source

__all__ = ["ImageSource", "open_source"]
