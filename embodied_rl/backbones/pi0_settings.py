"""What surrounds a π0 network: cameras, state, statistics, prompts; out of published folders."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from embodied_rl.backbones.lerobot_folder import LeRobotFolder, read_json, read_lerobot
from embodied_rl.backbones.lerobot_normalise import Normaliser
from embodied_rl.backbones.pi0_inputs import match_cameras, match_state, state_size
from embodied_rl.backbones.pi0_network import CONFIG
from embodied_rl.backbones.prompts import BOS, encode, find_tokenizer, load_tokenizer
from embodied_rl.errors import UserError
from embodied_rl.types import INSTRUCTION, EnvSpec

PROCESSOR = "processor_config.json"  # of a transformers folder: statistics, image processing
PALIGEMMA = "google/paligemma-3b-pt-224"
MAX_PROMPT = 48  # tokens, as π0 was trained
BICUBIC = 3  # PIL's number, in transformers' files
LEROBOT_STEPS = frozenset({"pi0_new_line_processor"})

log = logging.getLogger(__name__)


@dataclass
class Pi0Settings:
    """Everything around the network, JSON-able; part of the fingerprint.

    Attributes:
        resize: how images are resized, one of `images.RESIZES`.
        state: `Normaliser` of the state vector, as its config.
        action: `Normaliser` of the action, as its config.
        camera_names: the policy's cameras in its order; empty: its folder does not tell.
        cameras: (policy's camera, observation key), in the policy's order; found by `check_env`
            where not given.
        state_keys: observations that make the state vector; found by `check_env` where not given.
        state_dim: entries of the state vector; None until an environment tells.
        action_dim: A; None until an environment tells.
        prompts: (instruction, token ids), in the order of the environment's indices.
        max_prompt: tokens that a prompt may have.
        tokenizer: path of the tokenizer file; None: instructions cannot change.
        bos: token that prompts begin with; None: whatever the tokenizer's file adds.
        gated: whether the tokenizer's repository is.
    """

    bos: ClassVar[str | None] = BOS
    gated: ClassVar[bool] = True
    resize: str = "transformers"
    state: dict[str, Any] = field(default_factory=lambda: Normaliser().config_dict())
    action: dict[str, Any] = field(default_factory=lambda: Normaliser().config_dict())
    camera_names: list[str] = field(default_factory=list)
    cameras: list[list[str]] = field(default_factory=list)
    state_keys: list[str] = field(default_factory=list)
    state_dim: int | None = None
    action_dim: int | None = None
    prompts: list[list[Any]] = field(default_factory=list)
    max_prompt: int = MAX_PROMPT
    tokenizer: str | None = None


def fit(
    settings: Pi0Settings, spec: EnvSpec, max_state: int, max_action: int, vocabulary: int
) -> None:
    """Finds cameras and state among an environment's observations; encodes its instructions.

    An environment without instructions is told its own name.

    Args:
        settings: changed in place, and only if everything fits.
        spec: the environment.
        max_state: entries of the state vector that the network takes.
        max_action: entries of an action that it gives.
        vocabulary: tokens that it knows.

    Raises:
        UserError: cameras, state, action or instructions do not fit.
    """
    wanted = settings.action_dim or len(settings.action["first"]) or None
    if wanted is not None and wanted != spec.action_dim:
        raise UserError(
            f"the policy was made for {wanted} action entries, but {spec.name} has "
            f"{spec.action_dim}. Set env.task and env.control_mode as they were when the policy "
            "was pretrained."
        )
    if spec.action_dim > max_action:
        raise UserError(
            f"the policy gives at most {max_action} action entries, but {spec.name} has "
            f"{spec.action_dim}. Set env.control_mode."
        )
    cameras = match_cameras(dict(settings.cameras), settings.camera_names, spec)
    expected = settings.state_dim or len(settings.state["first"]) or None
    keys = match_state(settings.state_keys, expected, max_state, spec)
    instructions = list(spec.instructions) or [spec.name]
    if len(instructions) > 1 and INSTRUCTION not in spec.obs:
        raise UserError(
            f"{spec.name} has {len(instructions)} instructions, but no observation "
            f"{INSTRUCTION!r} that tells which one holds, only {', '.join(spec.obs)}."
        )
    settings.prompts = _prompts(settings, instructions, vocabulary)
    settings.cameras = [list(pair) for pair in cameras]
    settings.state_keys, settings.state_dim = keys, state_size(keys, spec)
    settings.action_dim = spec.action_dim


def _prompts(settings: Pi0Settings, instructions: list[str], vocabulary: int) -> list[list[Any]]:
    """(instruction, token ids) in order; only new instructions need the tokenizer."""
    known = {text: ids for text, ids in settings.prompts}
    new = [text for text in instructions if text not in known]
    if new:
        if settings.tokenizer is None:
            raise UserError(
                f"the policy knows the instructions {list(known)} and has no tokenizer for {new}. "
                "Set policy.tokenizer."
            )
        bos = settings.bos
        path = find_tokenizer(Path(), settings.tokenizer, PALIGEMMA, settings.gated)
        prompts = encode(load_tokenizer(path, bos), new, settings.max_prompt, vocabulary, bos)
        known.update(zip(new, prompts, strict=True))
    return [[text, known[text]] for text in instructions]


def lerobot_settings(folder: Path) -> tuple[Pi0Settings, str]:
    """Settings of a LeRobot folder, and the Hub repository of its tokenizer."""
    told = read_lerobot(folder, LEROBOT_STEPS)
    settings = Pi0Settings(
        resize="openpi",
        state=told.state.config_dict(),
        action=told.action.config_dict(),
        camera_names=list(told.cameras),
        state_dim=told.state_dim,
        action_dim=told.action_dim,
        max_prompt=int(told.tokenizer.get("max_length", MAX_PROMPT)),
    )
    check_statistics(folder, told)
    return settings, str(told.tokenizer.get("tokenizer_name", PALIGEMMA))


def check_statistics(folder: Path, told: LeRobotFolder) -> None:
    """Raises UserError where statistics are not of the sizes that the folder's config names."""
    for what, size, statistics in (
        ("state", told.state_dim, told.state.size),
        ("action", told.action_dim, told.action.size),
    ):
        if size is not None and statistics is not None and size != statistics:
            raise UserError(
                f"{folder}: the {what} has {size} entries in {CONFIG}, but {statistics} in the "
                "statistics. Write the folder again with LeRobot."
            )


def transformers_settings(folder: Path) -> Pi0Settings:
    """Settings of a transformers folder: statistics from its processor's file, if it has one."""
    path = folder / PROCESSOR
    if not path.is_file():
        log.warning("%s is missing: state and action are used as they are", path)
        return Pi0Settings()
    told = read_json(path)
    images = told.get("image_processor") or {}
    if images.get("resample", BICUBIC) != BICUBIC:
        raise UserError(
            f"{path}: image_processor.resample={images['resample']!r}. "
            f"Allowed: {BICUBIC} (bicubic)."
        )
    parts = {}
    for part, prefix in (("state", "state"), ("action", "actions")):
        names = {s: told.get(f"{prefix}_{s}") for s in ("mean", "std")}
        if None in names.values():
            log.warning("%s has no %s_mean and _std: it is used as it is", path, prefix)
            continue
        tensors = {s: torch.tensor(v, dtype=torch.float32) for s, v in names.items()}
        made = Normaliser.from_statistics("MEAN_STD", tensors, 1e-8, f"{path}, {prefix}")
        parts[part] = made.config_dict()
    return Pi0Settings(**parts)
