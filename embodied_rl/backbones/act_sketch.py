"""ACT on the meta device: its configuration without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from embodied_rl.backbones.act import ActBackbone
from embodied_rl.backbones.act_network import ActSizes
from embodied_rl.backbones.act_settings import ENVIRONMENT_KEY, ActSettings, read_act
from embodied_rl.backbones.act_weights import build_network
from embodied_rl.backbones.pi0_inputs import STATE_KEY
from embodied_rl.backbones.pi0_network import check_dtype
from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces.sketch import Assumed, Sketch
from embodied_rl.types import ArraySpec, EnvSpec


def sketch_act(
    config: dict[str, Any] | None, folder: Path | None, options: PolicyConfig, assumed: Assumed
) -> Sketch:
    """An ACT policy folder of ours, or LeRobot's with statistics beside the weights (0.4 on)."""
    if config is not None:
        parts = dict(config)
        network, dtype, _ = (parts.pop(key) for key in ("network", "dtype", "source"))
        sizes, settings = ActSizes(**network), ActSettings(**parts)
    elif folder is not None:
        (sizes, settings), dtype = read_act(folder, {}, options), options.dtype
    else:
        raise UserError(
            "an ACT cannot be planned without its policy folder: its sizes come from its "
            "demonstrations. Set policy.path."
        )
    settings.cameras = settings.cameras or [[name, name] for name, _, _ in settings.images]
    obs = {
        key: ArraySpec((*shape, 3), torch.uint8)
        for (_, key), (_, shape, _) in zip(settings.cameras, settings.images, strict=True)
    }
    vectors = (
        ("state_keys", STATE_KEY, sizes.state_dim),
        ("environment_keys", ENVIRONMENT_KEY, sizes.environment_dim),
    )
    for attribute, default, size in vectors:
        if size:
            keys = getattr(settings, attribute) or [default]
            setattr(settings, attribute, keys)
            # which entry has how many numbers is not told; only their sum matters
            obs |= {key: ArraySpec((1,), torch.float32) for key in keys}
            obs[keys[0]] = ArraySpec((size - len(keys) + 1,), torch.float32)
    with torch.device("meta"):
        backbone = ActBackbone(build_network(sizes, check_dtype(dtype)), settings, dtype)
    assumed.note(
        f"observations: cameras ({len(settings.cameras)}, of the size that the policy was trained "
        f"with) and {sizes.state_dim + sizes.environment_dim} numbers, and no others"
    )
    spec = EnvSpec(
        obs, sizes.action_dim, assumed.max_episode_steps, assumed.name, assumed.instructions
    )
    return Sketch(backbone, spec)
