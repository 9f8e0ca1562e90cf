"""Sketches of backbones that are small enough to be built and then moved to the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from embodied_rl.backbones.state import OBS_KEY, StateBackbone
from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces.sketch import Assumed, Sketch
from embodied_rl.types import INSTRUCTION, ArraySpec, EnvSpec

SCALAR = ArraySpec((), torch.int64)


def sketch_state(
    config: dict[str, Any] | None, folder: Path | None, options: PolicyConfig, assumed: Assumed
) -> Sketch:
    """A state policy, or the untrained one of a run from scratch."""
    del folder, options
    if config is not None:
        with torch.device("meta"):
            backbone = StateBackbone.from_config(config)
        spec = _spec(
            {OBS_KEY: ArraySpec((backbone.feature_dim,), torch.float32)},
            backbone.action_dim,
            assumed,
        )
        assumed.note(
            f"observations: the {backbone.feature_dim} numbers that the policy reads, and no others"
        )
        return Sketch(backbone, spec)
    if assumed.state_dim is None or assumed.action_dim is None:
        raise UserError(
            f"policy.path=null: without a simulator, nothing says what {assumed.name} observes. Set"
            " assume.state_dim= and assume.action_dim= (HalfCheetah-v5: 17 and 6)."
        )
    spec = _spec(
        {OBS_KEY: ArraySpec((assumed.state_dim,), torch.float32)}, assumed.action_dim, assumed
    )
    with torch.device("meta"):
        return Sketch(StateBackbone.for_env(spec), spec)


def sketch_small_vla(
    config: dict[str, Any] | None, folder: Path | None, options: PolicyConfig, assumed: Assumed
) -> Sketch:
    """A small VLA; its vision tower is one that is installed, a few MB."""
    del options
    if config is None:
        raise UserError(
            f"a small_vla cannot be planned without its policy folder ({folder or 'none given'}): "
            "its sizes come from its demonstrations. Set policy.path."
        )
    from embodied_rl.backbones.small_vla import SmallVLABackbone

    backbone = SmallVLABackbone.from_config(config)
    (tower,) = backbone._tower
    backbone = backbone.to("meta")
    a, image = backbone.arguments, assumed.image_size
    pixels = torch.zeros((1, image, image, 3), dtype=torch.uint8, device="meta")
    grid = list(tower(pixels).shape[2:])
    wrong = [known for known in a.grids if known != grid]
    if wrong:
        raise UserError(
            f"images of {image} x {image} pixels give the policy's tower {grid[0]} x {grid[1]} "
            f"places, but it was trained with {wrong[0][0]} x {wrong[0][1]}. Set "
            "assume.image_size= to the size of its cameras."
        )
    obs = {camera: ArraySpec((image, image, 3), torch.uint8) for camera in a.cameras}
    obs |= {key: ArraySpec((1,), torch.float32) for key in a.state}
    # which entry has how many numbers is not told; only their sum matters
    obs[a.state[0]] = ArraySpec((a.state_dim - len(a.state) + 1,), torch.float32)
    obs[INSTRUCTION] = SCALAR
    assumed.note(
        f"observations: cameras ({len(a.cameras)}, of {image} x {image} pixels), {a.state_dim} "
        "numbers and an instruction, and no others"
    )
    return Sketch(backbone, _spec(obs, a.action_dim, assumed), (tower,))


def _spec(obs: dict[str, ArraySpec], action_dim: int, assumed: Assumed) -> EnvSpec:
    return EnvSpec(obs, action_dim, assumed.max_episode_steps, assumed.name, assumed.instructions)
