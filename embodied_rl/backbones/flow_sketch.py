"""What the sketches of vision-language-action policies share: settings as an environment fits them.

Where nothing tells, the numbers below are assumed, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from embodied_rl.backbones.pi0_settings import Pi0Settings
from embodied_rl.backbones.prompts import encode, load_tokenizer
from embodied_rl.errors import UserError
from embodied_rl.interfaces.sketch import Assumed
from embodied_rl.types import INSTRUCTION, ArraySpec, EnvSpec

CAMERAS, ACTION_DIM = 2, 7  # scene and wrist; a 6-D move and a gripper
STATE_KEY, TOKEN = "state", 2


def fill_in(settings: Pi0Settings, max_state: int, max_action: int, assumed: Assumed) -> None:
    """Fills in cameras, state and action as `check_env` would find them in an environment.

    Args:
        settings: changed in place.
        max_state: entries of the state vector that the network takes.
        max_action: entries of an action that it gives.
        assumed: what the user says; told of what is assumed.
    """
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
            f"state: {max_state} numbers, the most that the policy takes (assume.state_dim)"
        )
    settings.state_dim = told or max_state
    action = settings.action_dim or len(settings.action["first"]) or assumed.action_dim
    if action is None:
        assumed.note(f"action: {ACTION_DIM} numbers (assume.action_dim)")
    settings.action_dim = min(action or ACTION_DIM, max_action)


def fill_in_prompts(
    settings: Pi0Settings, find: Callable[[], Path], vocabulary: int, assumed: Assumed
) -> None:
    """Encodes the instructions; a tokenizer that is not there yet gives the longest prompts.

    Args:
        settings: changed in place, if it has no prompts.
        find: returns the tokenizer's file; raises UserError where there is none.
        vocabulary: tokens that the policy knows.
        assumed: has the instructions; told of what is assumed.
    """
    if settings.prompts:
        return
    texts = list(assumed.instructions) or [assumed.name]
    try:
        path = find()
    except UserError:  # not there yet, like the weights
        assumed.note(
            f"instructions: {settings.max_prompt} tokens, the most that the policy takes "
            "(policy.tokenizer)"
        )
        settings.prompts = [[text, [TOKEN] * settings.max_prompt] for text in texts]
        return
    tokenizer = load_tokenizer(path, settings.bos)
    prompts = encode(tokenizer, texts, settings.max_prompt, vocabulary, settings.bos)
    settings.prompts = [list(pair) for pair in zip(texts, prompts, strict=True)]


def observed(settings: Pi0Settings, assumed: Assumed) -> EnvSpec:
    """An environment that gives just what a filled-in policy reads."""
    image = ArraySpec((assumed.image_size, assumed.image_size, 3), torch.uint8)
    obs = {key: image for _, key in settings.cameras}
    state_dim, action_dim = settings.state_dim, settings.action_dim
    if state_dim is None or action_dim is None:
        raise ValueError("the settings are not filled in")
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
    return EnvSpec(obs, action_dim, assumed.max_episode_steps, assumed.name, assumed.instructions)
