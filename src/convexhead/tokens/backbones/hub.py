"""Getting weights and images from hubs, or failing within seconds."""

from __future__ import annotations

import threading
from pathlib import Path

from convexhead.errors import HubError, require

PROBE_SECONDS = 2.5
WEIGHTS_FILE = "model.safetensors"


def fetch_weights(repository: str) -> Path:
    """Return the local path of a repository's safetensors weights, downloading them if they are not cached.

    Raises
    ------
    HubError
        Not cached, and the hub cannot be reached or does not have the file.
    """
    hub = require("huggingface_hub", "images")
    if cached := cached_file(repository, WEIGHTS_FILE):
        return cached
    check_reachable(
        hub.constants.ENDPOINT,
        f"the weights of {repository!r}",
        "download them elsewhere and use timm:NAME@FILE.safetensors",
    )
    try:
        return Path(hub.hf_hub_download(repository, WEIGHTS_FILE, etag_timeout=PROBE_SECONDS))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise HubError(f"cannot download {WEIGHTS_FILE} of {repository!r}: {reason}") from error


def cached_file(repository: str, file: str, kind: str = "model") -> Path | None:
    """Return a file of a hub repository if the local cache has it."""
    cached = require("huggingface_hub", "images").try_to_load_from_cache(repository, file, repo_type=kind)
    return Path(cached) if isinstance(cached, str) else None


def check_reachable(address: str, what: str, instead: str) -> None:
    """Ask for an address once. The clients of hubs retry an unreachable host for most of a minute.

    Raises
    ------
    HubError
        No answer within seconds; says that ``what`` is not here and what to do ``instead``.
    """
    if failure := unreachable(address):
        raise HubError(
            f"{what} are not in the local cache and {address} cannot be reached ({failure}): connect, or {instead}"
        )


def unreachable(address: str) -> str | None:
    """Ask for the headers of an address; return None if it answers, else what went wrong."""
    hub = require("huggingface_hub", "images")
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            hub.get_session().head(address, timeout=PROBE_SECONDS)
            outcome.append(None)
        # Every HTTP library has exceptions of its own.
        except Exception as error:
            outcome.append(str(error).strip().partition("\n")[0] or type(error).__name__)

    # Name look-up ignores timeouts; a daemon thread can be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 0.5)
    return outcome[0] if outcome else f"no answer in {PROBE_SECONDS:.0f} s"
