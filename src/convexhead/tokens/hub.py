"""Getting weights from the Hugging Face hub, or failing within seconds."""

from __future__ import annotations

import threading
from pathlib import Path

from convexhead.errors import HubError, require

PROBE_SECONDS = 3.0
WEIGHTS_FILE = "model.safetensors"


def fetch_weights(repository: str) -> Path:
    """Return the local path of a repository's safetensors weights, downloading them if they are not cached.

    Raises:
        HubError: not cached, and the hub cannot be reached or does not have the file.
    """
    hub = require("huggingface_hub", "images")
    cached = hub.try_to_load_from_cache(repository, WEIGHTS_FILE)
    if isinstance(cached, str):
        return Path(cached)
    # The hub's client retries an unreachable host for most of a minute, so its reachability is asked first.
    if failure := _probe(hub.constants.ENDPOINT):
        raise HubError(
            f"the weights of {repository!r} are not in the local cache and {hub.constants.ENDPOINT} cannot "
            f"be reached ({failure}): connect, or download them elsewhere and use timm:NAME@FILE.safetensors"
        )
    try:
        return Path(hub.hf_hub_download(repository, WEIGHTS_FILE, etag_timeout=PROBE_SECONDS))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise HubError(f"cannot download {WEIGHTS_FILE} of {repository!r}: {reason}") from error


def _probe(endpoint: str) -> str | None:
    """Ask for the endpoint's headers once; return None if it answers, else what went wrong."""
    hub = require("huggingface_hub", "images")
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            hub.get_session().head(endpoint, timeout=PROBE_SECONDS)
            outcome.append(None)
        # Every HTTP library has exceptions of its own.
        except Exception as error:
            outcome.append(str(error).strip().partition("\n")[0] or type(error).__name__)

    # Name look-up ignores timeouts; a daemon thread can be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return outcome[0] if outcome else f"no answer in {PROBE_SECONDS:.0f} s"
