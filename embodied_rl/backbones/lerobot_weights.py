"""The tensors of a LeRobot folder against those that a network has: checked, and written back."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path

from torch import Tensor

from embodied_rl.backbones.lerobot_buffers import is_buffer
from embodied_rl.backbones.published_folder import write_folder
from embodied_rl.errors import UserError


def check_weights(
    weights: Mapping[str, Tensor],
    read: Mapping[str, tuple[int, ...]],
    unread: Mapping[str, tuple[int, ...]],
    where: str,
    what: str,
) -> None:
    """Checks names and shapes, tensor by tensor.

    Args:
        weights: the folder's, by published name.
        read: shapes of what the network needs, by published name.
        unread: shapes of what may be there besides.
        where: the folder, for the message.
        what: the policy, for the message.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; names the first of each.
    """
    known = {**read, **unread}
    told = {
        "missing": sorted(set(read) - set(weights)),
        "unexpected": sorted(set(weights) - set(known)),
        "of another shape": sorted(
            k for k, v in weights.items() if k in known and tuple(v.shape) != known[k]
        ),
    }
    parts = [f"{len(k)} {kind} ({', '.join(k[:3])})" for kind, k in told.items() if k]
    if parts:
        raise UserError(
            f"{where}: these weights are not those of the {what} in its config.json: "
            f"{'; '.join(parts)}. Copy config.json and model.safetensors from the same source."
        )


def write_weights(
    source: Path,
    folder: Path,
    weights: dict[str, Tensor],
    names: Mapping[str, str],
    unread: Container[str],
    plain: Callable[[str], str] = str,
) -> None:
    """Writes a folder like `source`, with a network's weights.

    Statistics among the weights, as folders before LeRobot 0.4 have them, are copied bit for bit.

    Args:
        source: the LeRobot folder that they came from.
        folder: where to.
        weights: by our name.
        names: published name of each, by ours.
        unread: published names of what the network does not have; copied bit for bit.
        plain: makes a published name of one in the file, where the two differ.

    Raises:
        UserError: names or shapes are not those of `source`, which must have changed.
    """
    ours = {theirs: mine for mine, theirs in names.items()}

    def name(key: str) -> str | None:
        known = plain(key)
        return None if known in unread or is_buffer(key) else ours.get(known, key)

    write_folder(source, folder, name, weights)
