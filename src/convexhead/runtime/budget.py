"""One budget of memory for everything that is kept of the same tokens.

What cannot be done without takes its part for good: the tokens themselves where they fit, masks, chunks to read into.
The rest is lent to whoever comes first and given back when it is freed; who is lent less than everything keeps less,
and makes the rest anew in every pass.
"""

from __future__ import annotations

import weakref


class Budget:
    """Bytes that tokens and what is made of them may take together.

    Attributes
    ----------
    left : float
        Bytes that nobody has; negative where more was needed than there is.
    """

    def __init__(self, total: float) -> None:
        self.left = total

    def fits(self, count: int, each: int) -> int:
        """How many there is room for, of ``count`` things of ``each`` bytes."""
        return int(min(count, max(self.left, 0.0) / max(each, 1)))

    def take(self, size: float) -> None:
        """Take that many bytes for good."""
        self.left -= size

    def lend(self, size: float, owner: object) -> None:
        """Take that many bytes for as long as ``owner`` lives."""
        self.take(size)
        weakref.finalize(owner, self.take, -size)
