"""A π0 of 60 thousand random weights, and folders of it in the published layouts."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, trainers
from torch import Tensor

from embodied_rl.backbones.pi0 import Pi0Backbone
from embodied_rl.backbones.pi0_network import DTYPES, build_network, from_transformers
from embodied_rl.types import ArraySpec, EnvSpec

LAYERS, HEADS, HEAD = 2, 4, 8
HIDDEN, VOCABULARY, IMAGE = 32, 128, 28
TOKENS = 4  # per camera: (28 / 14)^2
NETWORK = {
    "vlm_config": {
        "model_type": "paligemma",
        "text_config": {
            "model_type": "gemma",
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "intermediate_size": 64,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "head_dim": HEAD,
            "vocab_size": VOCABULARY,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 14,
            "image_size": IMAGE,
            "vision_use_head": False,
        },
        "projection_dim": HIDDEN,
        "image_token_id": VOCABULARY,
    },
    "dit_config": {
        "model_type": "gemma",
        "hidden_size": 16,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 32,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
    },
    "chunk_size": 3,
    "max_state_dim": 8,
    "max_action_dim": 6,
    "num_inference_steps": 4,
}
BASE, WRIST = "sensor_data.base_camera.rgb", "sensor_data.hand_camera.rgb"
SPEC = EnvSpec(
    {
        BASE: ArraySpec((20, 28, 3), torch.uint8),
        WRIST: ArraySpec((28, 28, 3), torch.uint8),
        "agent.qpos": ArraySpec((3,), torch.float32),
        "extra.is_grasped": ArraySpec((), torch.bool),
        "sensor_param.base_camera.intrinsic_cv": ArraySpec((3, 3), torch.float32),
        "instruction": ArraySpec((), torch.int64),
    },
    2,
    20,
    "cubes",
    ("push the cube", "pull the red cube to the target"),
)
STATE_DIM = 4
# of LeRobot's normaliser, for the state and the action of SPEC
STATISTICS = {
    "observation.state.mean": torch.tensor([0.1, -0.2, 0.3, 0.5]),
    "observation.state.std": torch.tensor([1.0, 2.0, 0.5, 0.4]),
    "action.mean": torch.tensor([0.05, -0.1]),
    "action.std": torch.tensor([0.4, 0.3]),
}


def observations(spec: EnvSpec = SPEC, count: int = 5, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    obs = {}
    for key, entry in spec.obs.items():
        shape = (count, *entry.shape)
        if key == "instruction":
            obs[key] = torch.arange(count) % max(1, len(spec.instructions))
        elif entry.dtype == torch.uint8:
            obs[key] = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
        elif entry.dtype == torch.bool:
            obs[key] = torch.arange(count).reshape(shape) % 2 == 0
        else:
            obs[key] = torch.randn(shape, generator=rng)
    return obs


def network(dtype: str = "float32", scale: float = 4.0):
    """Random weights, larger than usual at the start so that inputs matter."""
    made = build_network(from_transformers(copy.deepcopy(NETWORK), "test"), DTYPES[dtype])
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(scale)
    return made


def write_tokenizer(folder: Path) -> Path:
    """A byte-pair tokenizer with PaliGemma's special tokens, of fewer than 128 tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=55,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=[chr(c) for c in range(97, 123)] + [" ", "\n", "-", "_", *"CPSTv123"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SPEC.instructions, "push\npull\n"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def transformers_folder(folder: Path, statistics: bool = True) -> Path:
    """A folder as transformers saves it: model, tokenizer, processor with statistics."""
    network().save_pretrained(folder)
    write_tokenizer(folder)
    if statistics:
        names = {"observation.state": "state", "action": "actions"}
        told = {
            f"{names[key.rpartition('.')[0]]}_{key.rpartition('.')[2]}": value.tolist()
            for key, value in STATISTICS.items()
        }
        processor = {"processor_class": "PI0Processor", "image_processor": {"resample": 3}, **told}
        (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def lerobot_name(key: str) -> str:
    """A weight's name in LeRobot's published folders, from transformers' name."""
    expert, vlm = "paligemma_with_expert.gemma_expert", "paligemma_with_expert.paligemma"
    if key == "model.dit.embed_tokens.weight":
        return f"{expert}.lm_head.weight"
    if key == "model.vlm.language_model.embed_tokens.weight":
        return f"{vlm}.lm_head.weight"
    for ours, theirs in (
        ("model.dit.", f"{expert}.model."),
        ("model.vlm.vision_tower.", f"{vlm}.model.vision_tower.vision_model."),
        ("model.vlm.", f"{vlm}.model."),
        ("embed_action_time.", ""),
    ):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def lerobot_folder(
    folder: Path,
    *,
    mode: str = "MEAN_STD",
    statistics: dict[str, Tensor] | None = None,
    cameras: tuple[str, ...] = ("base_camera", "hand_camera", "third"),
    prefix: str = "model.",
) -> Path:
    """A folder as LeRobot 0.4 saves it, of the tiny size; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    statistics = STATISTICS if statistics is None else statistics
    weights = {prefix + lerobot_name(k): v for k, v in network().state_dict().items()}
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, folder / "model.safetensors")
    write_tokenizer(folder)
    images = {
        f"observation.images.{name}": {"type": "VISUAL", "shape": [3, IMAGE, IMAGE]}
        for name in cameras
    }
    inputs = {**images, "observation.state": {"type": "STATE", "shape": [STATE_DIM]}}
    outputs = {"action": {"type": "ACTION", "shape": [2]}}
    modes = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    config = {
        "type": "pi0",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": modes,
        "device": "cpu",
        "dtype": "float32",
        "n_action_steps": 3,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "image_resolution": [IMAGE, IMAGE],
        "empty_cameras": 0,
        "tokenizer_max_length": 48,
        **NETWORK,
    }
    step = "policy_{}processor_step_{}_{}.safetensors"
    normaliser = {"eps": 1e-8, "features": {**inputs, **outputs}, "norm_map": modes}
    before, after = (
        step.format("pre", 5, "normalizer_processor"),
        step.format("post", 0, "unnormalizer_processor"),
    )
    tokens = {
        "max_length": 48,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": "google/paligemma-3b-pt-224",
    }
    pre = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "pi0_new_line_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": tokens},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
        {"registry_name": "normalizer_processor", "config": normaliser, "state_file": before},
    ]
    post = [
        {"registry_name": "unnormalizer_processor", "config": normaliser, "state_file": after},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    for name, data in (
        ("config.json", config),
        ("policy_preprocessor.json", {"name": "policy_preprocessor", "steps": pre}),
        ("policy_postprocessor.json", {"name": "policy_postprocessor", "steps": post}),
    ):
        (folder / name).write_text(json.dumps(data, indent=2))
    for name in (before, after):
        save_file(statistics, folder / name)
    return folder


def backbone(spec: EnvSpec = SPEC, dtype: str = "float32", **settings) -> Pi0Backbone:
    """Random weights, connected to an environment; prompts are made up, no tokenizer needed."""
    texts = spec.instructions or (spec.name,)
    made = Pi0Backbone.from_config(
        {
            "network": copy.deepcopy(NETWORK),
            "dtype": dtype,
            "source": None,
            "prompts": [
                [t, [2, *(3 + ord(c) % 90 for c in t[: 3 + i]), 1]] for i, t in enumerate(texts)
            ],
            **settings,
        }
    )
    for parameter in made.network.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    made.check_env(spec)
    return made.requires_grad_(False)
