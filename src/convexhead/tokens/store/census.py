"""What a source was found to hold, by class, and what of it is not read: counted, stored and printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convexhead.tokens.sources.base import MULTI_LABEL, ImageSource, MaskSource, TargetSource

KEPT_NAMES = 20
"""Largest number of names kept of files left out for one reason; all are counted. Chosen by hand."""


def take_census(source: ImageSource) -> dict[str, Any]:
    """Count the images of every class and split of a source, and what it left out.

    Returns
    -------
    JSON values: ``splits`` maps a split to ``images`` and ``per_class``, one count a class in the order of
    ``class_names``; or of masks ``pixels`` of every class and then of none; or of several labels an image
    ``per_label``, the images that have each. ``left_out`` maps a reason to ``count`` and the first ``names``.
    """
    n_classes = len(source.class_names)
    splits: dict[str, dict[str, Any]] = {}
    for split in source.splits:
        if isinstance(source, MaskSource):
            splits[split] = {"images": len(source.files(split)), "pixels": source.pixels(split).tolist()}
            continue
        if isinstance(source, TargetSource):
            targets = source.targets(split)
            ones = {"per_label": (targets >= 0.5).sum(0).tolist()} if source.task == MULTI_LABEL else {}
            splits[split] = {"images": len(targets), **ones}
            continue
        counts = np.bincount(source.labels(split), minlength=n_classes)
        splits[split] = {"images": int(counts.sum()), "per_class": counts.tolist()}
    left_out: Mapping[str, list[str]] = getattr(source, "left_out", {})
    return {
        "splits": splits,
        "left_out": {
            reason: {"count": len(names), "names": sorted(names)[:KEPT_NAMES]}
            for reason, names in sorted(left_out.items())
            if names
        },
    }


def join_censuses(censuses: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the censuses of stores that share their classes; nothing if one of them has none."""
    if not all(censuses):
        return {}
    splits: dict[str, dict[str, Any]] = {}
    left_out: dict[str, dict[str, Any]] = {}
    for census in censuses:
        for split, found in census["splits"].items():
            added = {"images": found["images"] + splits.get(split, {"images": 0})["images"]}
            for counts in found.keys() - added.keys():
                before = splits.get(split, {counts: [0] * len(found[counts])})
                added[counts] = [a + b for a, b in zip(before[counts], found[counts], strict=True)]
            splits[split] = added
        for reason, more in census["left_out"].items():
            so_far = left_out.get(reason, {"count": 0, "names": []})
            names = [*so_far["names"], *more["names"]][:KEPT_NAMES]
            left_out[reason] = {"count": so_far["count"] + more["count"], "names": names}
    return {"splits": splits, "left_out": left_out}


def census_lines(census: dict[str, Any], class_names: Sequence[str] = ()) -> list[str]:
    """Return one line for every split and for every reason to leave something out; masks name their classes.

    >>> census_lines({"splits": {"train": {"images": 3, "per_class": [2, 1]}}, "left_out": {}})
    ['train: 3 images of 2 classes, 1 to 2 a class (median 1.5)']
    """
    lines = []
    for split, found in census.get("splits", {}).items():
        if "pixels" in found:
            total = max(1, sum(found["pixels"]))
            shares = [
                f"{name} {100 * count / total:.2g}%"
                for name, count in zip([*class_names, "void"], found["pixels"], strict=True)
            ]
            lines.append(f"{split}: {found['images']} images with masks; pixels: {', '.join(shares)}")
            continue
        if "per_class" not in found:
            each = found.get("per_label")
            spread = "" if each is None else f" with {len(each)} labels, each of {min(each)} to {max(each)} images"
            lines.append(f"{split}: {found['images']} images{spread or ' with numbers'}")
            continue
        counts = found["per_class"]
        spread = f"{min(counts)} to {max(counts)} a class (median {np.median(counts):g})"
        lines.append(f"{split}: {found['images']} images of {np.count_nonzero(counts)} classes, {spread}")
    for reason, what in census.get("left_out", {}).items():
        # As Python writes them: a name may hold what a terminal cannot show.
        names = ", ".join(map(repr, what["names"][:3])) + (", …" if what["count"] > 3 else "")
        lines.append(f"not read, {reason}: {what['count']} ({names})")
    return lines
