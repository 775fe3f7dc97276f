"""Everything that is kept of the same tokens shares one budget of memory.

What is indispensable takes its part for good: the tokens themselves where they fit, masks, chunks to read into. The
rest is lent in the order of asking and returned when it is freed. An owner that is lent less keeps less, and makes the
remainder anew in every pass.
"""

from __future__ import annotations

import weakref


class Budget:
    """The bytes that tokens, and what is made of them, may take together.

    Attributes
    ----------
    left : float
        Bytes that nobody has taken. Negative if more was needed than there is.
    """

    def __init__(self, total: float) -> None:
        self.left = total

    def fits(self, count: int, each: int) -> int:
        """Count how many of ``count`` things of ``each`` bytes fit."""
        return int(min(count, max(self.left, 0.0) / max(each, 1)))

    def take(self, size: float) -> None:
        """Take ``size`` bytes for good."""
        self.left -= size

    def lend(self, size: float, owner: object) -> None:
        """Take ``size`` bytes for as long as ``owner`` lives."""
        self.take(size)
        weakref.finalize(owner, self.take, -size)
