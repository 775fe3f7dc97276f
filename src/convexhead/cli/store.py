"""``convexhead store``: look at token stores, check, join and export them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer import Argument, Option

from convexhead.cli.entry import AGAIN, NOTHING, app, command
from convexhead.cli.extract import Channels, Constant, Reduction, ShardSize, Standardize
from convexhead.cli.options import Dtype, Json, Out, Store, TokenPool
from convexhead.cli.output import emit, show_store, speaks_for_all
from convexhead.cli.progress import shown_progress
from convexhead.errors import InputError

store_app = typer.Typer(no_args_is_help=True, help="Import, inspect, check, join and export token stores.")
app.add_typer(store_app, name="store")


Arrays = Annotated[
    list[str] | None,
    Argument(
        metavar="ARRAYS",
        help="File of tokens and labels (.npz, .safetensors, .h5, .parquet), a folder of such files or of .npy, or a "
        "folder of class folders with a file a sample. Or SPLIT=FILE of each split, with FILE,FILE for tokens, labels.",
    ),
]
SplitFiles = Annotated[list[str] | None, Option("--split", help="SPLIT=FILE, the same as an argument.")]
Tokens = Annotated[str | None, Option(help="Name of the array of tokens; default: X, tokens, features, ….")]
Labels = Annotated[str | None, Option(help="Name of the array of labels; default: y, labels, targets, ….")]
Names = Annotated[str | None, Option(help="Name of the array of the samples' names; default: names, files, ids, ….")]
Task = Annotated[
    str,
    Option(
        help="What the labels are: classes (one each), multi-label (a column of ones and zeros for each class), or "
        "regression (numbers)."
    ),
]
ClassNames = Annotated[Path | None, Option(help="Text file with the name of each class or column, a line each.")]
AnyLength = Annotated[bool, Option("--any-length", help="Files of class folders may have different numbers of tokens.")]
Grid = Annotated[str | None, Option(help="Rows x columns of the tokens' grid, as in 16x16; default: a square.")]
ClassToken = Annotated[
    bool | None, Option("--class-token/--no-class-token", help="Whether the first token is a class token.")
]
Registers = Annotated[int, Option(help="Register tokens behind the class token.")]
MadeBy = Annotated[
    str | None,
    Option("--backbone", help="What made the tokens, in your words. Heads read other imports of the same words only."),
]
TokensDtype = Annotated[Dtype | None, Option(help="Precision in which tokens are stored; default: theirs.")]
LikeImport = Annotated[
    Path | None, Option("--like", help="A store that was imported, or a run on it, to be comparable with.")
]


@command(f"finished shards are kept in {{out}}; {AGAIN}", of=store_app, name="import", shares=True)
def import_(
    out: Out,
    arrays: Arrays = None,
    split: SplitFiles = None,
    tokens: Tokens = None,
    labels: Labels = None,
    names: Names = None,
    task: Task = "classes",
    class_names: ClassNames = None,
    any_length: AnyLength = False,
    grid: Grid = None,
    class_token: ClassToken = None,
    registers: Registers = 0,
    backbone: MadeBy = None,
    like: LikeImport = None,
    channels: Channels = None,
    reduce: Reduction = None,
    token_pool: TokenPool = None,
    standardize: Standardize = None,
    constant: Constant = None,
    dtype: TokensDtype = None,
    shard_size: ShardSize = 512,
    as_json: Json = False,
) -> None:
    """Put tokens that were made elsewhere into a store; run it again to go on where it stopped."""
    from convexhead.tokens import import_arrays
    from convexhead.tokens.progress import told_to
    from convexhead.tokens.store.census import census_lines

    with shown_progress(as_json, "checking arrays") as notify:
        store = import_arrays(
            _by_split([*(arrays or []), *(split or [])]),
            out,
            tokens=tokens,
            labels=labels,
            names=names,
            task=task,
            class_names=class_names,
            any_length=any_length,
            grid=None if grid is None else _sides(grid),
            class_token=class_token,
            registers=registers,
            backbone=backbone,
            like=like,
            channels=channels,
            reduce=None if reduce is None else reduce.value,
            token_pool=token_pool,
            standardize=standardize,
            constant=constant,
            dtype=None if dtype is None else dtype.value,
            shard_size=shard_size,
            progress=told_to(notify),
        )
    if speaks_for_all():
        show_store(store, as_json, *map(escape, census_lines(store.info()["found"])))


def _by_split(arrays: list[str]) -> str | dict[str, Any]:
    """One file or folder, or the files of each split."""
    if len(arrays) == 1 and ("=" not in arrays[0] or Path(arrays[0]).expanduser().exists()):
        return arrays[0]
    found: dict[str, Any] = {}
    for word in arrays:
        split, is_, files = word.partition("=")
        if not is_ or not files:
            raise InputError(f"{word!r} should be SPLIT=FILE, as in train=train.npz: several arrays name their splits")
        if split in found:
            raise InputError(f"the split {split!r} is given twice: put its tokens into one file")
        found[split] = files if Path(files).expanduser().exists() or "," not in files else tuple(files.split(","))
    if not found:
        raise InputError("there are no arrays: give a file, a folder, or SPLIT=FILE of each split")
    return found


def _sides(grid: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", grid)
    if match is None:
        raise InputError(f"--grid must be rows x columns, as in 16x16, got {grid!r}")
    return int(match[1]), int(match[2])


@command(NOTHING, of=store_app)
def info(store: Store, as_json: Json = False) -> None:
    """Say what a store holds and how it was made."""
    from rich.table import Table

    from convexhead.tokens import TokenStore

    told = TokenStore.open(store).info()
    table = Table(show_header=False, box=None)
    for key, value in told.items():
        table.add_row(key, escape(str(value)))
    emit(told, as_json, table)


@command(NOTHING, of=store_app)
def verify(store: Store, as_json: Json = False) -> None:
    """Read every file of a store and compare it with its checksum."""
    from convexhead.tokens import TokenStore

    opened = TokenStore.open(store)
    with shown_progress(as_json, "reading the store"):
        opened.verify()
    emit({"path": str(store), "intact": True}, as_json, f"{escape(str(store))}: intact")


@command("{out} is not finished; delete it and run the same command again", of=store_app)
def merge(
    stores: Annotated[list[Path], Argument(metavar="STORE", help="Stores of the same backbone and settings.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Join stores of the same backbone and settings into a new one."""
    from convexhead.tokens import merge_stores

    with shown_progress(as_json, "joining stores"):
        merged = merge_stores(stores, out)
    show_store(merged, as_json)


@command(NOTHING, of=store_app)
def export(
    store: Store,
    out: Annotated[Path, Option("--out", help="Folder (npy, zarr) or file (h5) to write.")],
    format: Annotated[str, Option(help="npy, h5 or zarr.")] = "npy",
    raw: Annotated[
        bool, Option(help="Write the tokens as they were stored, before standardisation and principal components.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a store as arrays that other programs read."""
    from convexhead.tokens import export_store

    with shown_progress(as_json, "writing arrays"):
        written = export_store(store, out, format=format, raw=raw)
    emit({"path": str(written)}, as_json, f"written: {escape(str(written))}")
