"""π0 on the meta device: its configuration without its weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PI0Config

from embodied_rl.backbones.pi0 import Pi0Backbone
from embodied_rl.backbones.pi0_folder import read_folder
from embodied_rl.backbones.pi0_inputs import check_cameras
from embodied_rl.backbones.pi0_network import (
    build_network,
    check_dtype,
    from_transformers,
)
from embodied_rl.backbones.pi0_settings import (
    PALIGEMMA,
    Pi0Settings,
)
from embodied_rl.backbones.prompts import encode, find_tokenizer, load_tokenizer
from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces.sketch import Assumed, Sketch
from embodied_rl.types import INSTRUCTION, ArraySpec, EnvSpec

CAMERAS, ACTION_DIM = 2, 7  # assumed where nothing tells: scene and wrist; a 6-D move and a gripper
STATE_KEY, TOKEN = "state", 2


def sketch_pi0(
    config: dict[str, Any] | None, folder: Path | None, options: PolicyConfig, assumed: Assumed
) -> Sketch:
    """A π0 policy folder of ours, one in a published layout, or the published π0."""
    network, settings, dtype = _read(config, folder, options)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of dtypes on meta
    _fit(settings, network, folder, assumed)
    with torch.device("meta"):
        backbone = Pi0Backbone(build_network(network, check_dtype(dtype)), settings, dtype)
    image = ArraySpec((assumed.image_size, assumed.image_size, 3), torch.uint8)
    obs = {key: image for _, key in settings.cameras}
    state_dim = settings.state_dim or network.max_state_dim
    # which entry has how many numbers is not told; only their sum matters
    obs |= {key: ArraySpec((), torch.float32) for key in settings.state_keys}
    first = state_dim - len(settings.state_keys) + 1
    obs[settings.state_keys[0]] = ArraySpec((first,), torch.float32)
    if len(settings.prompts) > 1:
        obs[INSTRUCTION] = ArraySpec((), torch.int64)
    assumed.note(
        f"observations: cameras ({len(settings.cameras)}, of {assumed.image_size} x "
        f"{assumed.image_size} pixels) and {state_dim} numbers, and no others"
    )
    spec = EnvSpec(
        obs, backbone.action_dim, assumed.max_episode_steps, assumed.name, assumed.instructions
    )
    return Sketch(backbone, spec)


def _read(
    config: dict[str, Any] | None, folder: Path | None, options: PolicyConfig
) -> tuple[PI0Config, Pi0Settings, str]:
    """Network configuration, settings and precision."""
    if config is not None:
        parts = dict(config)
        network, dtype, _ = (parts.pop(key) for key in ("network", "dtype", "source"))
        return from_transformers(network, "the policy's config"), Pi0Settings(**parts), dtype
    if folder is None:
        network, settings = PI0Config(), Pi0Settings()
    else:
        network, settings, _ = read_folder(folder)
    cameras = check_cameras(options.cameras, settings.camera_names)
    settings.cameras = [list(pair) for pair in cameras.items()]
    settings.state_keys, settings.tokenizer = list(options.state), options.tokenizer
    return network, settings, options.dtype


def _fit(settings: Pi0Settings, network: PI0Config, folder: Path | None, assumed: Assumed) -> None:
    """Fills in what `Pi0Backbone.check_env` would find in an environment."""
    if not settings.cameras:
        names = settings.camera_names or [f"camera_{i}" for i in range(CAMERAS)]
        count = assumed.cameras or len(names)
        names = [*names, *(f"camera_{i}" for i in range(len(names), count))][:count]
        settings.cameras = [[name, name] for name in names]
        if assumed.cameras is None:
            assumed.note(
                f"cameras: {count}; the policy takes more or fewer, and absent ones cost nothing "
                "(policy.cameras or assume.cameras)"
            )
    settings.state_keys = settings.state_keys or [STATE_KEY]
    told = settings.state_dim or len(settings.state["first"]) or assumed.state_dim
    if told is None:
        assumed.note(
            f"state: {network.max_state_dim} numbers, the most that the policy takes "
            "(assume.state_dim)"
        )
    settings.state_dim = told or network.max_state_dim
    action = settings.action_dim or len(settings.action["first"]) or assumed.action_dim
    if action is None:
        assumed.note(f"action: {ACTION_DIM} numbers (assume.action_dim)")
    settings.action_dim = min(action or ACTION_DIM, network.max_action_dim)
    if not settings.prompts:
        settings.prompts = _prompts(settings, network, folder, assumed)


def _prompts(
    settings: Pi0Settings, network: PI0Config, folder: Path | None, assumed: Assumed
) -> list[list[Any]]:
    texts = list(assumed.instructions) or [assumed.name]
    try:
        path = find_tokenizer(folder or Path(), settings.tokenizer, PALIGEMMA)
    except UserError:  # not there yet, like the weights
        assumed.note(
            f"instructions: {settings.max_prompt} tokens, the most that the policy takes "
            "(policy.tokenizer)"
        )
        return [[text, [TOKEN] * settings.max_prompt] for text in texts]
    vlm: Any = network.vlm_config
    size = vlm.text_config.vocab_size
    prompts = encode(load_tokenizer(path), texts, settings.max_prompt, size)
    return [list(pair) for pair in zip(texts, prompts, strict=True)]
