"""A SmolVLA of a few thousand random weights, and folders of it as LeRobot publishes them.

The names and shapes are written out here from LeRobot's `smolvlm_with_expert.py` and
`modeling_smolvla.py` and the published inventory of lerobot/smolvla_base, not taken from our
modules.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_rgb import SIDE, SPEC, STATE, STATISTICS, write_processors
from tokenizers import Tokenizer, models, trainers
from torch import Tensor

from embodied_rl.backbones.smolvla import SmolVLABackbone
from embodied_rl.types import EnvSpec

TEXT = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
VLM = {"text_config": TEXT, "vision_config": VISION, "scale_factor": 2}
TOKENS = 4  # of a camera: (32 / 8 / 2)^2
M, X, INNER = 16, 12, 256  # widths: text, expert; the expert's inner one
LAYERS, H, A, S, W, STEPS = 2, 3, 2, 8, 6, 4


def linear_shapes(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def llama_shapes(
    name: str, width: int, inner: int, queries: int, keys: int, reads: int
) -> dict[str, tuple[int, ...]]:
    """A layer; `reads`: what keys and values are made of."""
    return {
        f"{name}.input_layernorm.weight": (width,),
        f"{name}.post_attention_layernorm.weight": (width,),
        f"{name}.self_attn.q_proj.weight": (queries, width),
        f"{name}.self_attn.k_proj.weight": (keys, reads),
        f"{name}.self_attn.v_proj.weight": (keys, reads),
        f"{name}.self_attn.o_proj.weight": (width, queries),
        f"{name}.mlp.gate_proj.weight": (inner, width),
        f"{name}.mlp.up_proj.weight": (inner, width),
        f"{name}.mlp.down_proj.weight": (width, inner),
    }


def shapes(
    text: dict = TEXT,
    vision: dict = VISION,
    scale: int = 2,
    layers: int = LAYERS,
    expert: int = X,
    expert_inner: int = INNER,
    state: int = S,
    action: int = W,
    every: int = 2,
) -> dict[str, tuple[int, ...]]:
    """All tensors of model.safetensors."""
    vlm, own = "model.vlm_with_expert.vlm", "model.vlm_with_expert.lm_expert"
    width, inner = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    wide, deep = vision["hidden_size"], vision["intermediate_size"]
    patch = vision["patch_size"]
    places = (vision["image_size"] // patch) ** 2
    tower = f"{vlm}.model.vision_model"
    made = {
        f"{vlm}.lm_head.weight": (text["vocab_size"], width),
        f"{vlm}.model.text_model.embed_tokens.weight": (text["vocab_size"], width),
        f"{vlm}.model.text_model.norm.weight": (width,),
        f"{vlm}.model.connector.modality_projection.proj.weight": (width, wide * scale**2),
        f"{own}.norm.weight": (expert,),
        f"{tower}.embeddings.patch_embedding.weight": (wide, 3, patch, patch),
        f"{tower}.embeddings.patch_embedding.bias": (wide,),
        f"{tower}.embeddings.position_embedding.weight": (places, wide),
        f"{tower}.post_layernorm.weight": (wide,),
        f"{tower}.post_layernorm.bias": (wide,),
    }
    for i in range(vision["num_hidden_layers"]):
        name = f"{tower}.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made |= linear_shapes(f"{name}.self_attn.{part}", wide, wide)
        made |= linear_shapes(f"{name}.mlp.fc1", deep, wide)
        made |= linear_shapes(f"{name}.mlp.fc2", wide, deep)
        for norm in ("layer_norm1", "layer_norm2"):
            made |= {f"{name}.{norm}.{k}": (wide,) for k in ("weight", "bias")}
    for i in range(layers):
        made |= llama_shapes(
            f"{vlm}.model.text_model.layers.{i}", width, inner, queries, keys, width
        )
        reads = expert if every > 0 and i % every == 0 else keys
        made |= llama_shapes(f"{own}.layers.{i}", expert, expert_inner, queries, keys, reads)
    made |= linear_shapes("model.state_proj", width, state)
    made |= linear_shapes("model.action_in_proj", expert, action)
    made |= linear_shapes("model.action_out_proj", action, expert)
    made |= linear_shapes("model.action_time_mlp_in", expert, 2 * expert)
    made |= linear_shapes("model.action_time_mlp_out", expert, expert)
    return made


def random_weights(table: dict, seed: int = 0) -> dict[str, Tensor]:
    """Weights of about unit gain, so that every input matters."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in sorted(table.items()):
        draw = torch.randn(shape, generator=rng)
        if "embed_tokens" in name:
            draw = 0.25 * draw
        elif len(shape) > 1:
            draw = 1.3 * draw / draw[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            draw = 1 + 0.2 * draw
        else:
            draw = 0.3 * draw
        made[name] = draw
    return made


def write_tokenizer(folder: Path) -> Path:
    """A byte-pair tokenizer without a token that begins texts, of fewer than 128 tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=60,
        special_tokens=["<|im_end|>", "<unk>"],
        initial_alphabet=[chr(c) for c in range(97, 123)] + [" ", "\n", "-", "_", *"CPSTv123"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SPEC.instructions, "push\npull\n"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write(
    folder: Path,
    *,
    cameras: tuple[str, ...] = ("base_camera", "hand_camera", "third"),
    old: bool = False,
    seed: int = 0,
    mode: str = "cross_attn",
    every: int = 2,
) -> Path:
    """A folder of the tiny SmolVLA as LeRobot saves it; `old`: before 0.4, and compiled."""
    inputs: dict[str, dict] = {"observation.state": {"type": "STATE", "shape": [STATE]}}
    for name in cameras:
        feature = {"type": "VISUAL", "shape": [3, SIDE, SIDE]}
        inputs[f"observation.images.{name}"] = feature
    config = {
        "type": "smolvla",
        "n_obs_steps": 1,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [A]}},
        "chunk_size": H,
        "n_action_steps": H,
        "max_state_dim": S,
        "max_action_dim": W,
        "resize_imgs_with_padding": [SIDE, SIDE],
        "empty_cameras": 0,
        "adapt_to_pi_aloha": False,
        "use_delta_joint_actions_aloha": False,
        "tokenizer_max_length": 48,
        "num_steps": STEPS,
        "use_cache": True,
        "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "load_vlm_weights": True,
        "add_image_special_tokens": False,
        "attention_mode": mode,
        "prefix_length": 0,
        "pad_language_to": "max_length",
        "num_expert_layers": 0,
        "num_vlm_layers": LAYERS,
        "self_attn_every_n_layers": every,
        "expert_width_multiplier": 0.75,
        "min_period": 0.004,
        "max_period": 4.0,
        "vlm_config": VLM,  # not LeRobot's: a small model
    }
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    table = shapes(every=every if "cross" in mode else 1)
    weights = random_weights(table, seed)
    if old:
        weights = {f"model._orig_mod.{k.removeprefix('model.')}": v for k, v in weights.items()}
        for key, value in STATISTICS.items():
            feature, _, name = key.rpartition(".")
            parts = ("normalize_inputs",)
            if feature == "action":
                parts = ("normalize_targets", "unnormalize_outputs")
            for part in parts:
                weights[f"{part}.buffer_{feature.replace('.', '_')}.{name}"] = value.clone()
    else:
        tokens = {
            "max_length": 48,
            "task_key": "task",
            "padding_side": "right",
            "padding": "max_length",
            "truncation": True,
            "tokenizer_name": config["vlm_model_name"],
        }
        steps = [
            {"registry_name": "smolvla_new_line_processor", "config": {}},
            {"registry_name": "tokenizer_processor", "config": tokens},
        ]
        write_processors(folder, config, STATISTICS, steps, 5)
    save_file(weights, folder / "model.safetensors")
    return folder


def backbone(spec: EnvSpec = SPEC) -> SmolVLABackbone:
    """Random weights of our own, connected to an environment; prompts are made up."""
    texts = spec.instructions or (spec.name,)
    made = SmolVLABackbone.from_config(
        {
            "network": {
                "vlm": copy.deepcopy(VLM),
                "num_vlm_layers": LAYERS,
                "chunk_size": H,
                "max_state_dim": S,
                "max_action_dim": W,
                "num_steps": STEPS,
            },
            "dtype": "float32",
            "source": None,
            "prompts": [[t, [3 + ord(c) % 90 for c in t[: 3 + i]]] for i, t in enumerate(texts)],
        }
    )
    made.check_env(spec)
    return made.requires_grad_(False)
