"""convexhead."""
