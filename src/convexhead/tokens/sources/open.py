"""Image sources: where labelled images come from, named by one string.

===========================  =================================================================================
``PATH``                     a folder of class folders, or of ``train/``, ``val/``, ``test/`` with those
                             (``validation/`` and ``valid/`` are ``val``); or, of these splits, folders ``images/``
                             and ``labels/`` with a mask ``labels/NAME.png`` for each image; or ``images/`` and a
                             table ``labels.csv`` or ``labels.parquet``
``table:PATH``               a table of labels, or a folder with one; ``table:PATH?label=COLUMN,COLUMN&image=COLUMN``
                             ``&split=COLUMN&images=FOLDER&task=TASK`` where there is something to choose
``npz:FILE``                 arrays ``images``, ``labels``, or ``train_images``, ``test_labels``, ...
``hf:NAME_OR_FOLDER``        a data set of the ``datasets`` library, its hub or a folder (parquet, images);
                             ``hf:NAME?label=COLUMN&image=COLUMN&config=NAME`` where it has several
``torchvision:NAME[@ROOT]``  ``CIFAR10``, ``CIFAR100``, ``MNIST``, ``FashionMNIST``, ``KMNIST``
``webdataset:PATTERN``       tar shards of ``KEY.jpg`` (or png, webp) and ``KEY.cls``; those with the word ``val``
                             or ``test`` in their name are these splits; ``*`` and ``{000..012}`` work
``sklearn:digits``           scikit-learn's 1,797 handwritten digits, split 70/30
===========================  =================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from convexhead.errors import InputError, choose, require
from convexhead.tokens.sources.base import ImageSource, MaskSource, TargetSource

Source = TypeVar("Source", bound=ImageSource)


def open_source(
    spec: str | Path | ImageSource,
    *,
    void: int | None = None,
    class_names: Sequence[str] | str | Path | None = None,
) -> ImageSource:
    """Open an image source by its specification (see the module's table).

    Parameters
    ----------
    void, class_names
        Of masks: the number of pixels that do not count, and the names of numbers 0, 1, … or a text file with one a
        line; see `MaskFolder`.

    Raises
    ------
    InputError
        Unknown scheme, missing path, or contents that cannot be used, such as a class of which
        there are test images but no train images.
    FileFormatError
        A file that is not what its scheme says.
    HubError
        A data set that is neither in the local cache nor to be had.
    MissingExtraError
        The library of the scheme is not installed.
    """
    if not isinstance(spec, ImageSource):
        spec = _open(spec, void, class_names)
        if isinstance(spec, MaskSource):
            return spec
    if (void, class_names) != (None, None):
        raise InputError(
            f"void and class_names are for masks, and {spec.spec!r} has none: they lie in labels/ beside images/"
        )
    return spec


def _open(spec: str | Path, void: int | None, class_names: Sequence[str] | str | Path | None) -> ImageSource:
    require("PIL", "images")
    # Imported here because Pillow and the libraries of some sources are optional.
    from convexhead.tokens.sources.hf_images import open_hf
    from convexhead.tokens.sources.image_arrays import open_npz, open_sklearn
    from convexhead.tokens.sources.image_folder import ImageFolder
    from convexhead.tokens.sources.mask_folder import MaskFolder
    from convexhead.tokens.sources.table_images import has_table, open_table
    from convexhead.tokens.sources.tar_images import open_webdataset
    from convexhead.tokens.sources.torchvision_images import open_torchvision

    place = Path(spec).expanduser()
    masks, table = MaskFolder.is_one(place), has_table(place)
    if masks and table:
        raise InputError(
            f"{str(spec)!r} has masks in labels/ and a table of labels: move one away, or give table:{spec}"
        )
    if masks:
        return MaskFolder(spec, void, class_names)
    if table:
        return check_classes(open_table(str(spec), str(spec)))
    if place.exists():
        return check_classes(ImageFolder(spec))
    scheme, separator, rest = str(spec).partition(":")
    openers: dict[str, Callable[[str], ImageSource]] = {
        "npz": open_npz,
        "hf": open_hf,
        "torchvision": open_torchvision,
        "webdataset": open_webdataset,
        "sklearn": open_sklearn,
        "table": open_table,
    }
    # A single letter before the colon is a Windows drive.
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+-]+", scheme):
        raise InputError(
            f"there is no folder {str(spec)!r}: give a folder of class folders, or a source that begins with "
            f"{', '.join(f'{name}:' for name in openers)}"
        )
    return check_classes(openers[choose("image source", scheme, openers)](rest))


def check_classes(source: Source) -> Source:
    """Return the source, unless only splits other than train have one of its classes: no head could predict that.

    Raises
    ------
    InputError
        Names the class.
    """
    if isinstance(source, TargetSource):
        return source
    known = set(source.labels("train").tolist())
    for split in source.splits[1:]:
        if strangers := sorted(set(source.labels(split).tolist()) - known):
            name = source.class_names[strangers[0]]
            raise InputError(f"{source.spec!r}: the class {name!r} has {split} images but no train images")
    return source
