"""Sizes of a SmolVLA, out of LeRobot's config.json and that of its vision-language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import SmolVLMConfig

from embodied_rl.backbones.lerobot_folder import CONFIG, read_json
from embodied_rl.errors import UserError

SMOLVLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
)
VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
# vision-language models whose sizes are known without their files
PUBLISHED: dict[str, dict[str, Any]] = {
    SMOLVLM: {
        "text_config": {
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "vocab_size": 49_280,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "scale_factor": 4,
    }
}


@dataclass(frozen=True)
class SmolVLASizes:
    """What fixes the network's tensors and its integration, JSON-able; LeRobot's names.

    Attributes:
        vlm: `text_config`, `vision_config` and `scale_factor` of the vision-language model.
        num_vlm_layers: of its text layers, the first that are there.
        self_attn_every_n_layers: expert layers whose number this divides attend to the actions too,
            the others only to the prefix; 0: all of these.
        attention_mode: with "cross" in it, as above; else all layers attend to the actions.
        expert_width_multiplier: of the text model's width.
        chunk_size: H.
        max_state_dim: entries of the padded state.
        max_action_dim: W, entries of a padded action.
        num_steps: Euler steps.
        min_period: of the sines that tell the time.
        max_period: of the sines that tell the time.
    """

    vlm: dict[str, Any]
    num_vlm_layers: int = 16
    self_attn_every_n_layers: int = 2
    attention_mode: str = "cross_attn"
    expert_width_multiplier: float = 0.75
    chunk_size: int = 50
    max_state_dim: int = 32
    max_action_dim: int = 32
    num_steps: int = 10
    min_period: float = 4e-3
    max_period: float = 4.0

    @property
    def hidden(self) -> int:
        """Width of the text model."""
        return self.vlm["text_config"]["hidden_size"]

    @property
    def expert(self) -> int:
        """Width of the action expert."""
        return int(self.hidden * self.expert_width_multiplier)

    @property
    def expert_inner(self) -> int:
        """Inner width of the expert's feed-forward layers: 8/3 of its own, up to 256 k."""
        inner = 4 * int(2 * self.expert / 3)
        return 256 * ((inner + 255) // 256)

    @property
    def image_tokens(self) -> int:
        """Tokens of one camera."""
        vision = self.vlm["vision_config"]
        side = vision["image_size"] // vision["patch_size"] // self.vlm["scale_factor"]
        return side * side

    def attends_to_actions(self, layer: int) -> bool:
        """Whether the expert's layer attends to the actions, or to the prefix alone."""
        every = self.self_attn_every_n_layers
        return "cross" not in self.attention_mode or (every > 0 and layer % every == 0)


COUNTS = ("chunk_size", "max_state_dim", "max_action_dim", "num_steps")
FLOATS = ("expert_width_multiplier", "min_period", "max_period")
FIXED = {  # what of LeRobot's options is done here
    "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False,
    "add_image_special_tokens": False,
    "n_obs_steps": 1,
}


def read_sizes(config: Mapping[str, Any], where: str) -> SmolVLASizes:
    """Reads LeRobot's config.json.

    Raises:
        UserError: a value that is none, or that this project does not do.
    """
    for key, allowed in FIXED.items():
        if config.get(key, allowed) != allowed:
            raise UserError(f"{where}: {key}={config[key]!r}. Allowed: {str(allowed).lower()}.")
    counts = {key: config[key] for key in COUNTS if key in config}
    floats = {key: config[key] for key in FLOATS if key in config}
    for key, value in (counts | floats).items():
        kinds = (int,) if key in counts else (int, float)
        if type(value) not in kinds or value <= 0:
            kind = "whole numbers from 1" if key in counts else "positive numbers"
            raise UserError(f"{where}: {key}={value!r}. Allowed: {kind}.")
    mode = config.get("attention_mode", "cross_attn")
    if mode not in ("cross_attn", "self_attn"):
        raise UserError(f"{where}: attention_mode={mode!r}. Allowed: cross_attn, self_attn.")
    vlm = _vlm(config, where)
    depth = vlm["text_config"]["num_hidden_layers"]
    layers, expert, every = (
        config.get(key, default)
        for key, default in (
            ("num_vlm_layers", 16),
            ("num_expert_layers", -1),
            ("self_attn_every_n_layers", 2),
        )
    )
    for key, value in (("num_vlm_layers", layers), ("self_attn_every_n_layers", every)):
        if type(value) is not int:
            raise UserError(f"{where}: {key}={value!r}. Allowed: whole numbers.")
    layers = min(layers, depth) if layers > 0 else depth
    if type(expert) is not int or (expert > 0 and expert != layers):
        raise UserError(
            f"{where}: num_expert_layers={expert!r}. Allowed: 0, or num_vlm_layers={layers}: an "
            "expert with fewer layers is not ported."
        )
    side = vlm["vision_config"]["image_size"]
    resize = config.get("resize_imgs_with_padding", [512, 512])
    if not isinstance(resize, list | tuple) or list(resize) != [side, side]:
        raise UserError(
            f"{where}: resize_imgs_with_padding={resize!r}. Allowed: [{side}, {side}], the image "
            "size of its vision tower."
        )
    return SmolVLASizes(vlm, layers, max(every, 0), mode, **counts, **floats)


def _vlm(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The vision-language model's sizes.

    From `vlm_config` (not LeRobot's: other sizes than the published ones can be had with it), the
    table above, the folder that `vlm_model_name` names, or the local Hub cache.
    """
    name = str(config.get("vlm_model_name", SMOLVLM))
    if "vlm_config" in config:
        return _reduced(config["vlm_config"], f"{where}, vlm_config")
    if name in PUBLISHED:
        return PUBLISHED[name]
    path = Path(name).expanduser() / CONFIG
    if not path.is_file():
        last = next((p for p in PUBLISHED if p.endswith("/" + Path(name).name)), None)
        if last is not None:  # the folder of whoever trained it, not there any more
            return PUBLISHED[last]
        cached = try_to_load_from_cache(name, CONFIG) if name.count("/") == 1 else None
        if not isinstance(cached, str):
            raise UserError(
                f"{where}: vlm_model_name={name!r} is neither a folder here nor in the local Hub "
                f"cache, and its sizes are not known. Known: {', '.join(PUBLISHED)}. Fetch its "
                f"configuration: hf download {name} {CONFIG}; or write the path of its folder "
                "into vlm_model_name."
            )
        path = Path(cached)
    return _reduced(read_json(path), str(path))


def _reduced(config: Any, where: str) -> dict[str, Any]:
    """What of a SmolVLM's configuration says how it computes."""
    try:
        read = SmolVLMConfig.from_dict(dict(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{where} does not describe a SmolVLM ({error}).") from None
    text: Any = read.text_config
    vision: Any = read.vision_config
    if text.model_type != "llama":
        raise UserError(f"{where}: the text model is a {text.model_type!r}. Allowed: llama.")
    return {
        "text_config": {key: getattr(text, key) for key in TEXT_KEYS},
        "vision_config": {key: getattr(vision, key) for key in VISION_KEYS},
        "scale_factor": read.scale_factor,
    }
