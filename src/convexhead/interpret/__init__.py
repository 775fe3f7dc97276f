"""What a trained head did, read from its weights."""

from convexhead.interpret.attention import token_contributions

__all__ = ["token_contributions"]
