"""Policies on the Hugging Face Hub: `owner/name` to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from embodied_rl.errors import UserError

# what a policy needs; no code, no pickles
PATTERNS = ["*.json", "*.safetensors"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether a text has the form owner/name and names no folder here."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def download(name: str, revision: str | None = None) -> Path:
    """Returns the local folder of a Hub repository, fetching what the cache lacks.

    Args:
        name: owner/name.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        UserError: the repository does not exist or is gated, or there is no network and the cache
            does not have it.
    """
    if HUB_ID.fullmatch(name) is None:
        raise UserError(f"{name!r} is no Hub repository. Allowed: owner/name, or a folder.")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(
            f"the Hub has no repository {name}, or it is gated or private ({type(error).__name__})."
            f" Open https://huggingface.co/{name}, accept its terms, and log in: hf auth login."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"cannot fetch {name} from the Hub, and it is not whole in the local cache "
            f"({type(error).__name__}). On a machine with a network: hf download {name} "
            "--local-dir <folder>; then set policy.path=<folder>."
        ) from None
    except HFValidationError as error:
        raise UserError(f"{name!r} is no Hub repository: {error}") from None
