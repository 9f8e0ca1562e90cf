"""The tensors of a LeRobot folder against those that a network has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

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
