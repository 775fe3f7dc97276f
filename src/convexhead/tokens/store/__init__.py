"""Token stores: shards, their manifest, and what reads, joins and exports them."""

from convexhead.tokens.store.store import TokenStore

__all__ = ["TokenStore"]
