"""``convexhead store``: look at token stores, check, join and export them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from typer import Argument, Option

from convexhead.cli.entry import NOTHING, app, command
from convexhead.cli.options import Json, Out, Store
from convexhead.cli.output import emit, show_store
from convexhead.cli.progress import shown_progress

store_app = typer.Typer(no_args_is_help=True, help="Inspect, check, join and export token stores.")
app.add_typer(store_app, name="store")


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
