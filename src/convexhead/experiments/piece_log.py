"""Finished pieces of an experiment as rows of a tracker (`convexhead.runtime.trackers`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convexhead.runtime.run_folder import RunFolder

Track = Callable[[dict[str, Any]], None]


class PieceLog:
    """Tells a tracker of every training in a folder once, also of those that other processes finish.

    Parameters
    ----------
    folder : RunFolder
    track : callable (row)
        Called with a row for each of them: ``run`` (the title), ``piece``, ``objective``, ``relative_gap`` (certified),
        ``heads``, ``validation_accuracy`` and ``seconds``. A value that a training has not is None.
    title : str
        Of the run.
    """

    def __init__(self, folder: RunFolder, track: Track, title: str) -> None:
        self._folder, self._track, self._title = folder, track, title
        self._told: set[str] = set()

    def update(self) -> None:
        """Tell of what was finished since the last call."""
        for name in self._folder.names():
            if name not in self._told:
                self._told.add(name)
                record = self._folder.record(name)
                if "seconds" in record:  # others are scores
                    self._track({"run": self._title, "piece": name, **_values(record)})


def _values(record: dict[str, Any]) -> dict[str, Any]:
    proof = record.get("certificate") or {}
    return {
        "objective": proof.get("primal", record.get("objective")),
        "relative_gap": proof.get("relative_gap"),
        "heads": record.get("heads", record.get("n_heads")),
        "validation_accuracy": record.get("validation_accuracy"),
        "seconds": record["seconds"],
    }
