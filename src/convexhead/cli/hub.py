"""``convexhead push`` and ``pull``: trained heads on a model hub."""

from __future__ import annotations

from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from convexhead.cli.entry import NOTHING, command
from convexhead.cli.options import Json, Out, Overwrite, Run
from convexhead.cli.output import certificate_line, emit
from convexhead.cli.progress import shown_progress

Repository = Annotated[str, Argument(metavar="OWNER/NAME", help="Repository of the hub.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit; default: main.")]
Private = Annotated[bool, Option(help="A repository that is made can be read by its owner alone.")]
CardOnly = Annotated[bool, Option("--card", help="Print the model card and send nothing.")]


@command("the hub has what was sent so far; run the same command again")
def push(
    run: Run,
    repository: Repository,
    private: Private = False,
    revision: Revision = None,
    card: CardOnly = False,
    as_json: Json = False,
) -> None:
    """Put a trained head on the hub, with a model card that is written from the run."""
    from convexhead.deploy import hub

    if card:
        print(hub.card(run, repository))
        return
    with shown_progress(as_json, "sending the run"):
        address = hub.push(run, repository, private=private, revision=revision)
    emit({"run": str(run), "address": address}, as_json, f"{escape(str(run))} is at [bold]{escape(address)}[/]")


@command(NOTHING)
def pull(
    repository: Repository,
    out: Out,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Get a trained head from the hub, as a run."""
    from convexhead.deploy import hub

    with shown_progress(as_json, "asking the hub"):
        model = hub.pull(repository, out, revision=revision, overwrite=overwrite)
    certificate = model.certificate
    assert certificate is not None, "saved models have one"
    told = {"run": str(out), "certificate": certificate.to_dict()}
    emit(told, as_json, certificate_line(certificate), f"saved in [bold]{escape(str(out))}[/]")
