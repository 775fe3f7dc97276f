"""Trained heads on a model hub: ``push`` a run with a card that is written from it, ``pull`` it anywhere.

A repository holds what a run is: ``config.json`` and ``weights.safetensors``, under the names that model hubs look for,
and the card ``README.md``. What a report shows of a run (some of its tokens, names of images) stays here.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convexhead._version import __version__
from convexhead.errors import ConvexHeadError, HubError, InputError, require
from convexhead.metrics import accuracy_interval
from convexhead.model import Model
from convexhead.model_folder import check_target
from convexhead.report import evidence
from convexhead.tokens.backbones.hub import check_reachable

FILES = ("config.json", "weights.safetensors")
CARD = "README.md"


def push(
    run: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Put a run into a repository of the hub, which is made if it is not there; its address.

    Parameters
    ----------
    run : path
        Folder of a trained head.
    repository : str
        ``owner/name``.
    private : bool
        Whether a repository that is made can be read by its owner alone.
    revision : str or None
        The branch; None: main.
    token : str or None
        Of the hub; None: the one that ``hf auth login`` saved.

    Raises
    ------
    FileFormatError
        Not a run, or a damaged one.
    HubError
        The hub cannot be reached or refuses.
    """
    folder = Path(run).expanduser()
    text = card(folder, repository)
    hub = _client()
    with _told(hub, f"push {str(run)!r} to {repository!r}", "try again when it can be reached"):
        api = hub.HfApi(endpoint=hub.constants.ENDPOINT, token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [hub.CommitOperationAdd(name, folder / name) for name in FILES]
        operations.append(hub.CommitOperationAdd(CARD, text.encode()))
        done = api.create_commit(
            repository, operations, commit_message=f"A head trained by convexhead {__version__}", revision=revision
        )
    return str(done.repo_url)


def pull(
    repository: str,
    out: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> Model:
    """Get a run from the hub and save it as the folder ``out``; it is checked as every saved model is.

    Parameters
    ----------
    repository : str
        ``owner/name``.
    out : path
        Folder of the run.
    revision : str or None
        A branch, tag or commit; None: main.
    token : str or None
        As of `push`.
    overwrite : bool
        Replace a run that is there.

    Raises
    ------
    FileFormatError
        The repository does not hold a run.
    HubError
        The hub cannot be reached or does not have it.
    """
    target = Path(out).expanduser()
    check_target(target, overwrite=overwrite)
    hub = _client()
    with tempfile.TemporaryDirectory() as place:
        with _told(hub, f"pull {repository!r}", "copy the run's folder from elsewhere"):
            for name in FILES:
                hub.hf_hub_download(
                    repository, name, revision=revision, token=token, local_dir=place, endpoint=hub.constants.ENDPOINT
                )
        model = Model.load(place)
        shutil.rmtree(Path(place) / ".cache", ignore_errors=True)
        model.save(target)
    return model


def _client() -> Any:
    """The hub's library; it loads parts of itself only when they are asked for."""
    for part in ("constants", "errors"):
        require(f"huggingface_hub.{part}", "hub")
    return require("huggingface_hub", "hub")


@contextlib.contextmanager
def _told(hub: Any, what: str, instead: str) -> Iterator[None]:
    """Fail within seconds where there is no hub, and in one line where it refuses."""
    if hub.constants.HF_HUB_OFFLINE:
        raise HubError(f"cannot {what}: HF_HUB_OFFLINE is set, so the hub is not asked")
    check_reachable(hub.constants.ENDPOINT, f"the files of the hub, to {what},", instead)
    try:
        yield
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError, ValueError) as error:
        if isinstance(error, ConvexHeadError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise HubError(f"cannot {what}: {reason}") from error


# -- the card ---------------------------------------------------------------------------------------------------------
def card(run: str | Path, repository: str = "OWNER/NAME") -> str:
    """The model card of a run, in Markdown.

    It says what is known: data, backbone, objective, certificate, accuracy with its interval, and the command. The
    licence is left to the user.

    Raises
    ------
    FileFormatError
        Not a run, or a damaged one.
    """
    model, shown = Model.load(run), evidence.read(Path(run).expanduser())
    spec, certificate = model.spec, model.certificate
    if certificate is None:
        raise InputError(f"{run} has no certificate: fit it to the end")
    front = ["library_name: convexhead", "tags:", "- convexhead", "- convex-optimization", f"- {spec.head}"]
    if model.classes is not None and spec.pool is not None and model.origin is not None:
        front.append("pipeline_tag: image-classification")
    rows = {
        "head": f"{spec.head}, {spec.activation} activation, {len(model.atoms)} atoms",
        "tokens": f"{model.head.s} tokens x {model.head.d} channels, pool {spec.pool}",
        "loss": f"{spec.loss}, β = {model.beta:.6g} ({model.beta / model.beta_max:.3g} β_max)",
        **_data(model),
        **_accuracy(shown),
    }
    command = [] if shown is None or not shown.about["command"] else ["## How it was made", "", _fenced(shown)]
    return "\n".join([
        "---", *front, "---", "", f"# {repository.rpartition('/')[2]}", "",
        "A token head on frozen features, trained by [convexhead](https://arxiv.org/abs/2205.08078).", "",
        f"**Certificate.** {certificate}. Scope: {certificate.scope}.", "",
        "| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items()), "",
        "## Use", "", "```python", "from convexhead.deploy import pull", "import convexhead as ch", "",
        f'pull("{repository}", "run")', 'head = ch.load("run")', "```", "", *command,
    ])  # fmt: skip


def _data(model: Model) -> dict[str, str]:
    """Backbone, images and classes, of a head that was fitted on a store."""
    if model.origin is None:
        return {}
    origin = model.origin
    layer = "last map" if origin.config["layer"] is None else f"layer {origin.config['layer']}"
    names = model.class_names or []
    some = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    trained = origin.images if origin.rows is None else len(origin.rows)
    return {
        "backbone": f"{origin.backbone.partition('@')[0]}, {layer}",
        "preprocessing": json.dumps(origin.config["preprocessing"]),
        "trained on": f"{trained} images of {origin.split}",
        "classes": f"{len(names)}: {some}",
    }


def _accuracy(shown: evidence.Evidence | None) -> dict[str, str]:
    """Accuracy with its interval, of a run that knows it."""
    if shown is None or "predicted" not in shown.arrays:
        return {}
    low, high = accuracy_interval(shown.right)
    share = f"{100 * shown.accuracy:.1f}% of {len(shown.right)} images"
    text = f"{share}, 95% interval {100 * low:.1f}% to {100 * high:.1f}%"
    return {f"accuracy on {shown.about['split']}": text}


def _fenced(shown: evidence.Evidence) -> str:
    made = ", ".join(f"{key} {value}" for key, value in shown.about["environment"].items())
    return f"```\n{shown.about['command']}\n```\n\n{made}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
