"""Which observations are a VLA's cameras and which make its state vector."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from embodied_rl.backbones.lerobot_folder import short_name
from embodied_rl.errors import UserError, nearest
from embodied_rl.types import INSTRUCTION, ArraySpec, EnvSpec, Obs

STATE_KEY = "state"
STATE_GROUPS = ("agent.", "extra.")  # of ManiSkill's nested observations, in this order

log = logging.getLogger(__name__)


def is_image(spec: ArraySpec) -> bool:
    """Whether an entry is an RGB image [h, w, 3] uint8."""
    return spec.dtype == torch.uint8 and len(spec.shape) == 3 and spec.shape[-1] == 3


def check_cameras(given: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Checks the camera names of `policy.cameras` against the policy's own.

    Args:
        given: policy's camera to observation key; long LeRobot names are shortened.
        names: the policy's cameras; empty where its folder does not tell.

    Returns:
        the same, in the policy's order.

    Raises:
        UserError: the policy has no such camera.
    """
    short = {short_name(name): key for name, key in given.items()}
    if not names:
        return short
    for name in short:
        if name not in names:
            raise UserError(
                f"policy.cameras names {name!r}, but the policy's cameras are "
                f"{', '.join(names)}.{nearest(name, names)}"
            )
    return {name: short[name] for name in names if name in short}


def match_cameras(
    given: Mapping[str, str], names: Sequence[str], spec: EnvSpec
) -> list[tuple[str, str]]:
    """Pairs the policy's cameras with the environment's images.

    With nothing given: by name, where every image's key has a camera's name as one of its dotted
    parts; else by order, if there are no more images than cameras. Cameras without an image are
    absent.

    Args:
        given: `policy.cameras`, checked.
        names: the policy's cameras, in its order; empty where its folder does not tell.
        spec: the environment.

    Returns:
        (policy's camera, observation key), in the policy's order.

    Raises:
        UserError: no images; a key that is none; more images than cameras.
    """
    images = sorted(key for key, entry in spec.obs.items() if is_image(entry))
    if not images:
        raise UserError(
            f"the policy looks through cameras, but {spec.name} gives no image, only "
            f"{', '.join(spec.obs) or 'nothing'}. Set env.obs_mode=rgb."
        )
    if given:
        for name, key in given.items():
            if key not in images:
                raise UserError(
                    f"policy.cameras.{name}={key}, but the images of {spec.name} are "
                    f"{', '.join(images)}.{nearest(key, images)}"
                )
        return list(given.items())
    if not names:
        return [(key, key) for key in images]
    by_name = {name: [k for k in images if name in k.split(".")] for name in names}
    pairs = [(name, keys[0]) for name, keys in by_name.items() if len(keys) == 1]
    if sorted(key for _, key in pairs) == images:
        return pairs
    if not pairs and len(images) <= len(names):
        pairs = list(zip(names, images, strict=False))
        log.warning(
            "cameras matched by order: %s. Set policy.cameras if that is wrong.",
            ", ".join(f"{name} = {key}" for name, key in pairs),
        )
        return pairs
    raise UserError(
        f"cannot tell which images of {spec.name} ({', '.join(images)}) are the policy's cameras "
        f"({', '.join(names)}). Set policy.cameras, for example policy.cameras="
        f"{{{names[0]}: {images[0]}}}."
    )


def match_state(given: Sequence[str], wanted: int | None, most: int, spec: EnvSpec) -> list[str]:
    """Chooses the observations whose concatenation is the policy's state vector.

    With nothing given: `state` where the environment has it, else every entry under `agent.` in
    name order, followed by every entry under `extra.`, each flattened. Nothing is ever cut.

    Args:
        given: `policy.state`.
        wanted: size that the policy was trained with; None where its folder does not tell.
        most: largest size that the network takes; smaller vectors are padded with zeros.
        spec: the environment.

    Returns:
        observation keys in order.

    Raises:
        UserError: an unknown key, no state at all, or a wrong size.
    """
    vectors = [k for k, s in spec.obs.items() if not is_image(s) and k != INSTRUCTION]
    if given:
        for key in given:
            if key not in vectors:
                raise UserError(
                    f"policy.state names {key!r}, but {spec.name} has {', '.join(sorted(vectors))}."
                    f"{nearest(key, vectors)}"
                )
        keys = list(given)
    elif STATE_KEY in vectors:
        keys = [STATE_KEY]
    else:
        keys = [k for group in STATE_GROUPS for k in sorted(vectors) if k.startswith(group)]
    size = state_size(keys, spec)
    sizes = ", ".join(f"{k} [{state_size([k], spec)}]" for k in keys or sorted(vectors)) or "none"
    if wanted is not None and size != wanted:
        raise UserError(
            f"the policy was trained with a state of {wanted} entries, but {spec.name} gives "
            f"{size}: {sizes}. List the keys that it was trained with, in that order, in "
            "policy.state."
        )
    if not 0 < size <= most:
        raise UserError(
            f"the policy's state has 1 to {most} entries, but {spec.name} gives {size}: {sizes}. "
            "Choose some in policy.state."
        )
    return keys


def state_size(keys: Iterable[str], spec: EnvSpec) -> int:
    """Entries of the state vector."""
    return sum(math.prod(spec.obs[key].shape) for key in keys)


def state_vector(obs: Obs, keys: Sequence[str]) -> Tensor:
    """Concatenates observations to float32 [B, S]."""
    return torch.cat([obs[key].float().reshape(len(obs[key]), -1) for key in keys], 1)
