"""From arrays of tokens, whatever made them, to a token store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from torch.utils.data import DataLoader

from convexhead.errors import FileFormatError, InputError, choose
from convexhead.tokens.arrays.imported import Arrangement, ImportedTokens, arrange
from convexhead.tokens.arrays.roles import find_arrays, holds_arrays
from convexhead.tokens.arrays.source import TargetArrays, TokenArrays, TokenFolder
from convexhead.tokens.extract import extract
from convexhead.tokens.like import origin_of
from convexhead.tokens.progress import ProgressCallback
from convexhead.tokens.sources.base import TASKS
from convexhead.tokens.sources.open import check_classes
from convexhead.tokens.store.origin import TokenOrigin
from convexhead.tokens.store.store import TokenStore

Dtype = Literal["float16", "bfloat16", "float32"]

SAMPLES = 256
"""Samples that are written at a time. Chosen by hand."""


def import_arrays(
    arrays: str | Path | DataLoader[Any] | Mapping[str, Any],
    out: str | Path,
    *,
    tokens: str | None = None,
    labels: str | None = None,
    names: str | None = None,
    task: str = "classes",
    class_names: Sequence[str] | str | Path | None = None,
    any_length: bool = False,
    grid: tuple[int, int] | None = None,
    class_token: bool | None = None,
    registers: int = 0,
    backbone: str | None = None,
    like: str | Path | None = None,
    channels: int | None = None,
    reduce: Literal["avgpool", "pca"] | None = None,
    token_pool: int | tuple[int, int] | None = None,
    standardize: bool | None = None,
    constant: bool | None = None,
    dtype: Dtype | None = None,
    shard_size: int = 512,
    progress: ProgressCallback | None = None,
) -> TokenStore:
    """Put tokens that were made elsewhere into a store in the folder ``out``.

    What `extract` says of stopping, going on, several processes and other things in ``out`` holds here too. The files
    are read twice, and never as a whole: first all values are checked, then they are written.

    Parameters
    ----------
    arrays
        A file (.npz, .npy, .safetensors, .h5, .hdf5, .parquet). A folder with a file for each split (``train.h5``) or
        each array (``X_train.npy``, ``y_train.npy``). A folder of class folders with a file for each sample. Or of each
        split a file, or files or arrays in the order tokens, labels, names: ``{"train": (X, y), "test": "test.npz"}``;
        or a `DataLoader` that yields these (one alone is train).
        Tokens are floats ``(n, s, d)``, or ``(n, d)`` for one token a sample; labels are whole numbers or texts. Arrays
        may be padded, with an array ``lengths (n,)``.
    out
        Folder of the store.
    tokens, labels, names
        Names of the arrays, without the split, where they are not called as in `convexhead.tokens.arrays.roles`.
    task
        What the labels are: ``"classes"``, one each; ``"multi-label"``, ``(n, c)`` of ones and zeros, or between, which
        of several classes a sample has; ``"regression"``, numbers ``(n,)`` or ``(n, c)``.
    class_names, any_length
        What labels ``0 .. c - 1``, or columns, mean, or a text file of names. None: what the arrays' file says, else
        the distinct labels. ``any_length``: files of class folders may have different numbers of tokens.
    grid, class_token, registers
        ``(h, w)`` of the tokens behind those in front (None: a square); whether the first token is a class token, which
        must be said where their number leaves it open; register tokens behind that.
    backbone
        What made the tokens, in words of your own. A head reads another import only if both have the same text here;
        without one, only the store that it was fitted on.
    like
        A store that was imported, or a run on one: take kind, arrangement, reduction and order of classes from there.
    dtype, channels, reduce, token_pool, standardize, constant, shard_size, progress
        See `extract`; a ``dtype`` of None keeps the tokens' own (float64 becomes float32).

    Raises
    ------
    ConvexHeadError
        Arrays that cannot be used, with the name of file and row; see also `extract`.
    """
    choose("task", task, ("classes", *TASKS))
    source = _open(arrays, {"tokens": tokens, "labels": labels, "names": names}, class_names, task, any_length)
    origin = None if like is None else origin_of(like)
    kind, arrangement = (
        _kind(source, backbone, origin),
        _arrangement(source, grid, class_token, registers, token_pool, origin),
    )
    spec = f"imported@{source.spec}" if backbone is None else f"imported:{backbone}"
    network = ImportedTokens(origin.backbone if origin and backbone is None else spec, kind, arrangement)
    if dtype is None and origin is None:
        dtype = cast(Dtype, source.dtype)
    return extract(
        source, network, out, like=like, channels=channels, reduce=reduce, token_pool=token_pool,
        standardize=standardize, constant=constant, dtype=dtype,
        batch_size=SAMPLES, shard_size=shard_size, device="cpu", progress=progress,
    )  # fmt: skip


def _open(
    arrays: Any,
    keys: dict[str, str | None],
    class_names: Sequence[str] | str | Path | None,
    task: str,
    any_length: bool,
) -> TokenArrays | TokenFolder:
    if isinstance(class_names, (str, Path)):
        class_names = _lines(Path(class_names).expanduser())
    if isinstance(arrays, (str, Path)):
        folder = Path(arrays).expanduser()
        if folder.is_dir() and not holds_arrays(folder):
            if class_names is not None or any(keys.values()):
                raise InputError(f"{str(arrays)!r} has class folders, which are the labels: leave names and keys out")
            if task != "classes":
                raise InputError(f"{str(arrays)!r} has class folders, one class a sample: task={task!r} needs arrays")
            return check_classes(TokenFolder(arrays, any_length))
    if any_length:
        raise InputError("any_length is for class folders: beside an array of tokens put one called lengths, (n,)")
    found, names = find_arrays(arrays, keys), None if class_names is None else list(class_names)
    return check_classes(TokenArrays(found, names)) if task == "classes" else TargetArrays(found, names, task)


def _kind(source: TokenArrays | TokenFolder, backbone: str | None, origin: TokenOrigin | None) -> str:
    """Return the text that two imports share only if their user says that they hold tokens of the same kind."""
    if origin is None:
        return f"unnamed, {source.fingerprint()[:16]}" if backbone is None else backbone
    kind = origin.config["preprocessing"].get("imported")
    if kind is None:
        raise InputError(f"the tokens of `like` were made by {origin.backbone!r} and not imported: use extract --like")
    return str(kind) if backbone is None else backbone


def _arrangement(
    source: TokenArrays | TokenFolder,
    grid: tuple[int, int] | None,
    class_token: bool | None,
    registers: int,
    token_pool: int | tuple[int, int] | None,
    origin: TokenOrigin | None,
) -> Arrangement:
    if source.ragged:
        if (grid, token_pool) != (None, None) or class_token or registers:
            raise InputError(
                "samples of different length lie on no grid, and have no tokens in front: leave grid, token_pool, "
                "class_token and registers out"
            )
        return Arrangement((source.shape[0], 1), 0)
    p = None if origin is None else origin.config["preprocessing"].get("tokens in front")
    if origin is None or p is None or (grid, class_token, registers) != (None, None, 0):
        return arrange(source.shape[0], source.n_prefix, grid, class_token, registers)
    said = (p > 0, p - 1) if p and not source.n_prefix else (None if source.n_prefix else False, 0)
    pooled = origin.config["token_pool"] is not None
    return arrange(source.shape[0], source.n_prefix, None if pooled else origin.grid, *said)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{str(path)!r} is no text file with a class name a line: {error}") from error
