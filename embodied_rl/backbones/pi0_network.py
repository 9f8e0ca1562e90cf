"""transformers' π0: its configuration out of published folders, and its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PI0Config, PI0ForConditionalGeneration
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from embodied_rl.errors import UserError

CONFIG = "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# LeRobot's keys that mean the same in PI0Config
SHARED_KEYS = (
    "chunk_size",
    "max_state_dim",
    "max_action_dim",
    "num_inference_steps",
    "time_sampling_beta_alpha",
    "time_sampling_beta_beta",
    "time_sampling_scale",
    "time_sampling_offset",
    "min_period",
    "max_period",
)
# LeRobot's `paligemma_variant` and `action_expert_variant` (openpi's gemma.py)
GEMMA = {
    "gemma_2b": {"hidden_size": 2048, "intermediate_size": 16_384},
    "gemma_300m": {"hidden_size": 1024, "intermediate_size": 4096},
}
# of PI0Config.to_dict, what says nothing of how the network computes
NOT_NETWORK = {
    "transformers_version",
    "architectures",
    "_name_or_path",
    "dtype",
    "auto_map",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
}
# the action expert has an embedding table that nothing reads: its inputs are never tokens
UNREAD = {"model.dit.embed_tokens.weight"}


def check_dtype(name: str) -> torch.dtype:
    """Returns the precision of that name.

    Raises:
        UserError: it is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise UserError(f"policy.dtype={name!r} is unknown. Allowed: {', '.join(DTYPES)}.")
    return DTYPES[name]


def refuse_code(config: Mapping[str, Any], where: str) -> None:
    """Raises UserError where a configuration, or one inside it, refers to code of its own."""
    if "auto_map" in config:
        raise UserError(
            f"{where} needs code of its own (auto_map: {config['auto_map']}; trust_remote_code), "
            "which this project never runs. Use a folder for transformers' own PI0 class, or "
            "LeRobot's: both need none."
        )
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_code(value, f"{where}, {key}")


def from_transformers(config: Mapping[str, Any], where: str) -> PI0Config:
    """Reads transformers' config.json.

    Raises:
        UserError: it needs code of its own or does not describe a π0.
    """
    refuse_code(config, where)
    try:
        return PI0Config.from_dict(dict(config))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{where} does not describe a π0 ({error}).") from None


def from_lerobot(config: Mapping[str, Any], where: str) -> PI0Config:
    """Reads LeRobot's config.json; sizes of the parts come from its variant names.

    `vlm_config` and `dit_config` in transformers' form, if there, take their place (LeRobot does
    not write them; other sizes than the published ones can be had with them).

    Raises:
        UserError: it needs code of its own, an unknown variant, or something not ported.
    """
    refuse_code(config, where)
    for key in ("adapt_to_pi_aloha", "use_delta_joint_actions_aloha"):
        if config.get(key):
            raise UserError(f"{where}: {key}=true is not supported. Allowed: false.")
    sizes = {key: config[key] for key in SHARED_KEYS if key in config}
    default = PI0Config()
    vlm, dit = default.vlm_config.to_dict(), default.dit_config.to_dict()  # type: ignore[union-attr]
    text = _variant(config, "paligemma_variant", "gemma_2b", where)
    vlm["text_config"].update(text)
    vlm.update(projection_dim=text["hidden_size"], hidden_size=text["hidden_size"])
    vlm["vision_config"]["projection_dim"] = text["hidden_size"]
    dit.update(_variant(config, "action_expert_variant", "gemma_300m", where))
    height, width = config.get("image_resolution", (224, 224))
    if height != width:
        raise UserError(f"{where}: image_resolution {height} x {width}. Allowed: squares.")
    vlm["vision_config"]["image_size"] = height
    parts = {
        "vlm_config": config.get("vlm_config", vlm),
        "dit_config": config.get("dit_config", dit),
    }
    return from_transformers({**sizes, **parts}, where)


def _variant(config: Mapping[str, Any], key: str, default: str, where: str) -> dict[str, int]:
    name = config.get(key, default)
    if name not in GEMMA:
        raise UserError(f"{where}: {key}={name!r} is unknown. Allowed: {', '.join(GEMMA)}.")
    return GEMMA[name]


def network_dict(config: PI0Config) -> dict[str, Any]:
    """What of a configuration says how the network computes, JSON-able."""

    def strip(data: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in data.items() if k not in NOT_NETWORK}
        return {k: strip(v) if isinstance(v, dict) else v for k, v in kept.items()}

    return strip(config.to_dict())


def build_network(config: PI0Config, dtype: torch.dtype) -> PI0ForConditionalGeneration:
    """Builds the network with random weights; on the meta device inside `torch.device("meta")`.

    Buffers keep float32: the frequencies of the time embedding reach 1600 and would lose their
    phase.
    """
    network = PI0ForConditionalGeneration(config)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network.eval()


def load_network(
    folder: Path, config: PI0Config, dtype: torch.dtype
) -> PI0ForConditionalGeneration:
    """Builds the network with the weights of a transformers or LeRobot folder.

    transformers itself maps LeRobot's names to its own.

    Raises:
        UserError: weights are missing, damaged, of another shape or not those of a π0.
    """
    files = sorted(folder.glob("*.safetensors"))
    weights = [f for f in files if f.name.startswith("model")]
    if not weights:
        raise UserError(f"{folder} has no model.safetensors. Copy it there from its source.")
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass  # opening checks that header and size of the file agree
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged or truncated ({error}). Copy it again from its source."
            ) from None
    try:
        loaded: Any = PI0ForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: weights and config.json do not agree. {error}") from None
    network, info = loaded  # a pair, because of output_loading_info
    missing = set(info["missing_keys"])
    unexpected = set(info["unexpected_keys"])
    if missing - UNREAD or unexpected or info["mismatched_keys"]:
        told = {
            "missing": missing - UNREAD,
            "unexpected": unexpected,
            "of another shape": {str(k[0]) for k in info["mismatched_keys"]},
        }
        parts = [f"{len(k)} {what} ({', '.join(sorted(k)[:3])})" for what, k in told.items() if k]
        raise UserError(
            f"{folder}: these weights are not those of the π0 in its config.json: "
            f"{'; '.join(parts)}. Written by transformers 5 or LeRobot 0.4 and later they are."
        )
    for name in missing:
        network.get_parameter(name).data.zero_()  # not random: it is part of the fingerprint
    return network.eval()


def published_names(network: PI0ForConditionalGeneration) -> Callable[[str], str]:
    """Returns what maps a name in a published file to one in `network.state_dict()`.

    It is transformers' own mapping, which `load_network` reads files with.
    """
    mapping = get_model_conversion_mapping(network)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    here = network.state_dict()
    base = network.base_model_prefix

    def rename(name: str) -> str:
        new, converted = rename_source_key(name, renamings, converters, base, here)
        if converted is not None:
            raise NotImplementedError(f"transformers reshapes {name} when it reads it")
        if new not in here and name in here:
            new, _ = rename_source_key(name, [], [], base, here)
        return new

    return rename
