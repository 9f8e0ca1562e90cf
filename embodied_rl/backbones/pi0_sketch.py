"""π0 on the meta device: its configuration without its weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PI0Config

from embodied_rl.backbones.flow_sketch import fill_in, fill_in_prompts, observed
from embodied_rl.backbones.pi0 import Pi0Backbone
from embodied_rl.backbones.pi0_folder import read_folder
from embodied_rl.backbones.pi0_inputs import check_cameras
from embodied_rl.backbones.pi0_network import build_network, check_dtype, from_transformers
from embodied_rl.backbones.pi0_settings import PALIGEMMA, Pi0Settings
from embodied_rl.backbones.prompts import find_tokenizer
from embodied_rl.config import PolicyConfig
from embodied_rl.interfaces.sketch import Assumed, Sketch


def sketch_pi0(
    config: dict[str, Any] | None, folder: Path | None, options: PolicyConfig, assumed: Assumed
) -> Sketch:
    """A π0 policy folder of ours, one in a published layout, or the published π0."""
    network, settings, dtype = _read(config, folder, options)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of dtypes on meta
    vlm: Any = network.vlm_config
    fill_in(settings, network.max_state_dim, network.max_action_dim, assumed)
    fill_in_prompts(
        settings,
        lambda: find_tokenizer(folder or Path(), settings.tokenizer, PALIGEMMA),
        vlm.text_config.vocab_size,
        assumed,
    )
    with torch.device("meta"):
        backbone = Pi0Backbone(build_network(network, check_dtype(dtype)), settings, dtype)
    return Sketch(backbone, observed(settings, assumed))


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
