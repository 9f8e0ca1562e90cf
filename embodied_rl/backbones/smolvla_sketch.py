"""SmolVLA on the meta device: its configuration without its weights."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from embodied_rl.backbones.flow_sketch import fill_in, fill_in_prompts, observed
from embodied_rl.backbones.pi0_network import check_dtype
from embodied_rl.backbones.smolvla import SmolVLABackbone
from embodied_rl.backbones.smolvla_folder import SmolVLASettings, read_smolvla, tokenizer_of
from embodied_rl.backbones.smolvla_sizes import SmolVLASizes
from embodied_rl.backbones.smolvla_weights import build_network
from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces.sketch import Assumed, Sketch


def sketch_smolvla(
    config: dict[str, Any] | None, folder: Path | None, options: PolicyConfig, assumed: Assumed
) -> Sketch:
    """A SmolVLA folder of ours, or LeRobot's with statistics beside the weights (0.4 on)."""
    if config is not None:
        parts = dict(config)
        network, dtype, _ = (parts.pop(key) for key in ("network", "dtype", "source"))
        sizes, settings = SmolVLASizes(**network), SmolVLASettings(**parts)
    elif folder is not None:
        (sizes, settings), dtype = read_smolvla(folder, {}, options), options.dtype
    else:
        raise UserError("a SmolVLA cannot be planned without its policy folder. Set policy.path.")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of dtypes on meta
    fill_in(settings, sizes.max_state_dim, sizes.max_action_dim, assumed)
    if folder is not None:  # ours has its prompts
        vocabulary = sizes.vlm["text_config"]["vocab_size"]
        find = partial(tokenizer_of, folder, settings.tokenizer)
        fill_in_prompts(settings, find, vocabulary, assumed)
    with torch.device("meta"):
        backbone = SmolVLABackbone(build_network(sizes, check_dtype(dtype)), settings, dtype)
    return Sketch(backbone, observed(settings, assumed))
