"""What a SmolVLA folder in LeRobot's layout says besides its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from embodied_rl.backbones.lerobot_folder import CONFIG, read_json, read_lerobot
from embodied_rl.backbones.pi0_inputs import check_cameras
from embodied_rl.backbones.pi0_settings import Pi0Settings, check_statistics
from embodied_rl.backbones.prompts import find_tokenizer, load_tokenizer
from embodied_rl.backbones.smolvla_sizes import SMOLVLM, SmolVLASizes, read_sizes
from embodied_rl.config import PolicyConfig

STEPS = frozenset({"smolvla_new_line_processor"})
PROMPT = 48  # tokens of an instruction, where the folder does not say


@dataclass
class SmolVLASettings(Pi0Settings):
    """Everything around the network, as for π0; prompts begin with no special token."""

    bos: ClassVar[str | None] = None
    gated: ClassVar[bool] = False
    resize: str = "smolvla"


def read_smolvla(
    folder: Path, buffers: Mapping[str, Tensor], options: PolicyConfig
) -> tuple[SmolVLASizes, SmolVLASettings]:
    """Reads sizes and settings; the tokenizer is as `options` name it.

    Args:
        folder: the policy's.
        buffers: statistics found among the weights, for folders without processors.
        options: cameras, state and tokenizer, as the user named them.

    Raises:
        UserError: something in the folder or in `options` does not fit; says what.
    """
    given = read_json(folder / CONFIG)
    sizes = read_sizes(given, str(folder / CONFIG))
    told = read_lerobot(folder, STEPS, buffers=buffers)
    longest = told.tokenizer.get("max_length", given.get("tokenizer_max_length", PROMPT))
    settings = SmolVLASettings(
        state=told.state.config_dict(),
        action=told.action.config_dict(),
        camera_names=list(told.cameras),
        state_dim=told.state_dim,
        action_dim=told.action_dim,
        max_prompt=int(longest),
        state_keys=list(options.state),
        tokenizer=options.tokenizer,
    )
    check_statistics(folder, told)
    cameras = check_cameras(options.cameras, settings.camera_names)
    settings.cameras = [list(pair) for pair in cameras.items()]
    return sizes, settings


def tokenizer_of(folder: Path, given: str | None) -> Path:
    """Where the tokenizer is: as given, in the vision-language model's folder, or the policy's.

    Raises:
        UserError: nowhere, or it is none; says where to get it.
    """
    name = str(read_json(folder / CONFIG).get("vlm_model_name", SMOLVLM))
    own = Path(name).expanduser()
    if given is None and not (folder / "tokenizer.json").is_file() and own.is_dir():
        path = find_tokenizer(own, None, SMOLVLM, gated=False)
    else:
        repo = name if name.count("/") == 1 else SMOLVLM
        path = find_tokenizer(folder, given, repo, gated=False)
    load_tokenizer(path, SmolVLASettings.bos)
    return path
