"""An ACT of a few thousand random weights, and folders of it as LeRobot publishes them.

The names and shapes are written out here from LeRobot's `modeling_act.py` and torchvision's
`resnet.py`, not taken from our modules.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_rgb import SIDE, SPEC, STATE, STATISTICS, write_processors
from torch import Tensor

from embodied_rl.backbones.act import ActBackbone
from embodied_rl.backbones.lerobot_normalise import Normaliser
from embodied_rl.types import EnvSpec

M, F, CHUNK, H, A, LATENT, HEADS = 16, 24, 5, 3, 2, 4, 2
WIDTHS, DEPTHS = [8, 8, 12, 16], [1, 2, 1, 1]
RESNET = {"embedding_size": 8, "hidden_sizes": WIDTHS, "depths": DEPTHS, "layer_type": "basic"}
CAMERAS = ("base_camera", "hand_camera")
IMAGENET = {
    "mean": torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1),
    "std": torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1),
}
IMAGE_STATISTICS = {
    f"observation.images.{camera}.{name}": value.clone()
    for camera in CAMERAS
    for name, value in IMAGENET.items()
}


def norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
    """A frozen batch normalisation: four buffers, no count of batches."""
    return {f"{name}.{k}": (size,) for k in ("weight", "bias", "running_mean", "running_var")}


def linear_shapes(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def resnet_shapes(stem: int, widths: list[int], depths: list[int], bottleneck: bool) -> dict:
    """torchvision's ResNet up to layer4."""
    shapes = {"conv1.weight": (stem, 3, 7, 7), **norm_shapes("bn1", stem)}
    into = stem
    for s, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
        for i in range(depth):
            name = f"layer{s}.{i}"
            if bottleneck:
                inner = width // 4
                convs = [(inner, into, 1), (inner, inner, 3), (width, inner, 1)]
            else:
                convs = [(width, into, 3), (width, width, 3)]
            for j, (out, channels, side) in enumerate(convs, 1):
                shapes[f"{name}.conv{j}.weight"] = (out, channels, side, side)
                shapes |= norm_shapes(f"{name}.bn{j}", out)
            if i == 0 and (s > 1 or into != width):
                shapes[f"{name}.downsample.0.weight"] = (width, into, 1, 1)
                shapes |= norm_shapes(f"{name}.downsample.1", width)
            into = width
    return {f"model.backbone.{k}": v for k, v in shapes.items()}


def attention_shapes(name: str, width: int) -> dict:
    return {
        f"{name}.in_proj_weight": (3 * width, width),
        f"{name}.in_proj_bias": (3 * width,),
        **linear_shapes(f"{name}.out_proj", width, width),
    }


def layer_shapes(name: str, width: int, inner: int, decoder: bool) -> dict:
    shapes = attention_shapes(f"{name}.self_attn", width)
    if decoder:
        shapes |= attention_shapes(f"{name}.multihead_attn", width)
    shapes |= linear_shapes(f"{name}.linear1", inner, width)
    shapes |= linear_shapes(f"{name}.linear2", width, inner)
    for i in range(1, 4 if decoder else 3):
        shapes |= {f"{name}.norm{i}.{k}": (width,) for k in ("weight", "bias")}
    return shapes


def transformer_shapes(
    width: int = M,
    inner: int = F,
    chunk: int = CHUNK,
    action: int = A,
    state: int = STATE,
    environment: int = 0,
    latent: int = LATENT,
    channels: int = WIDTHS[-1],
    layers: tuple[int, int, int] = (1, 1, 1),
    pre_norm: bool = False,
    vae: bool = True,
) -> dict:
    """Everything of ACT but the image network; `layers`: encoder, decoder, variational encoder."""
    shapes = {}
    stacks = [("encoder", layers[0]), ("decoder", layers[1])]
    if vae:
        stacks.append(("vae_encoder", layers[2]))
        shapes["vae_encoder_cls_embed.weight"] = (1, width)
        if state:
            shapes |= linear_shapes("vae_encoder_robot_state_input_proj", width, state)
        shapes |= linear_shapes("vae_encoder_action_input_proj", width, action)
        shapes |= linear_shapes("vae_encoder_latent_output_proj", 2 * latent, width)
        shapes["vae_encoder_pos_enc"] = (1, chunk + 1 + bool(state), width)
    for stack, depth in stacks:
        for i in range(depth):
            shapes |= layer_shapes(f"{stack}.layers.{i}", width, inner, stack == "decoder")
        if stack == "decoder" or pre_norm:
            shapes |= {f"{stack}.norm.{k}": (width,) for k in ("weight", "bias")}
    if state:
        shapes |= linear_shapes("encoder_robot_state_input_proj", width, state)
    if environment:
        shapes |= linear_shapes("encoder_env_state_input_proj", width, environment)
    shapes |= linear_shapes("encoder_latent_input_proj", width, latent)
    if channels:
        shapes["encoder_img_feat_input_proj.weight"] = (width, channels, 1, 1)
        shapes["encoder_img_feat_input_proj.bias"] = (width,)
    tokens = 1 + bool(state) + bool(environment)
    shapes["encoder_1d_feature_pos_embed.weight"] = (tokens, width)
    shapes["decoder_pos_embed.weight"] = (chunk, width)
    shapes |= linear_shapes("action_head", action, width)
    return {f"model.{k}": v for k, v in shapes.items()}


def random_weights(shapes: dict, seed: int = 0) -> dict[str, Tensor]:
    """Weights of about unit gain, so that every input matters; variances are positive."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        draw = torch.randn(shape, generator=rng)
        if name.endswith("running_var"):
            draw = draw.abs() + 0.5
        elif len(shape) > 1:
            draw = 1.5 * draw / max(1, draw[0].numel()) ** 0.5
        elif ".norm" in name or "bn" in name or "downsample.1" in name:
            draw = 1 + 0.2 * draw if name.endswith("weight") else 0.2 * draw
        else:
            draw = 0.3 * draw
        weights[name] = draw
    return weights


def write(
    folder: Path,
    *,
    old: bool = False,
    cameras: tuple[str, ...] = CAMERAS,
    environment: int = 0,
    pre_norm: bool = False,
    activation: str = "relu",
    state: int = STATE,
    layers: tuple[int, int, int] = (1, 1, 1),
    seed: int = 0,
) -> Path:
    """A folder of the tiny ACT as LeRobot saves it; `old`: before 0.4, statistics as buffers."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs: dict[str, dict] = {
        f"observation.images.{name}": {"type": "VISUAL", "shape": [3, SIDE, SIDE]}
        for name in cameras
    }
    if state:
        inputs["observation.state"] = {"type": "STATE", "shape": [state]}
    if environment:
        inputs["observation.environment_state"] = {"type": "ENV", "shape": [environment]}
    config = {
        "type": "act",
        "n_obs_steps": 1,
        "normalization_mapping": {k: "MEAN_STD" for k in ("VISUAL", "STATE", "ENV", "ACTION")},
        "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [A]}},
        "device": "cpu",
        "use_amp": False,
        "chunk_size": CHUNK,
        "n_action_steps": H,
        "vision_backbone": "resnet18",
        "pretrained_backbone_weights": "ResNet18_Weights.IMAGENET1K_V1",
        "replace_final_stride_with_dilation": 0,
        "pre_norm": pre_norm,
        "dim_model": M,
        "n_heads": HEADS,
        "dim_feedforward": F,
        "feedforward_activation": activation,
        "n_encoder_layers": layers[0],
        "n_decoder_layers": layers[1],
        "use_vae": True,
        "latent_dim": LATENT,
        "n_vae_encoder_layers": layers[2],
        "temporal_ensemble_coeff": None,
        "dropout": 0.1,
        "kl_weight": 10.0,
        "backbone_config": RESNET,  # not LeRobot's: a small image network
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    statistics = {k: v for k, v in STATISTICS.items() if state or "state" not in k}
    statistics |= {k: v for k, v in IMAGE_STATISTICS.items() if k.split(".")[2] in cameras}
    if environment:
        for name, value in (("mean", 0.25), ("std", 0.5)):
            key = f"observation.environment_state.{name}"
            statistics[key] = torch.full((environment,), value)
    channels = WIDTHS[-1] if cameras else 0
    shapes = transformer_shapes(
        state=state, environment=environment, channels=channels, layers=layers, pre_norm=pre_norm
    )
    if cameras:
        shapes |= resnet_shapes(8, WIDTHS, DEPTHS, False)
    weights = random_weights(shapes, seed)
    if old:
        for key, value in statistics.items():
            feature, _, name = key.rpartition(".")
            parts = ("normalize_inputs",)
            if feature == "action":
                parts = ("normalize_targets", "unnormalize_outputs")
            for part in parts:
                weights[f"{part}.buffer_{feature.replace('.', '_')}.{name}"] = value.clone()
    else:
        write_processors(folder, config, statistics, [], 3)
    save_file(weights, folder / "model.safetensors")
    return folder


def backbone(spec: EnvSpec = SPEC) -> ActBackbone:
    """Random weights of our own, connected to an environment."""
    shapes = [[name, [SIDE, SIDE], Normaliser().config_dict()] for name in CAMERAS]
    made = ActBackbone.from_config(
        {
            "network": {
                "action_dim": A,
                "state_dim": STATE,
                "environment_dim": 0,
                "resnet": RESNET,
                "chunk_size": CHUNK,
                "n_action_steps": H,
                "dim_model": M,
                "n_heads": HEADS,
                "dim_feedforward": F,
                "n_encoder_layers": 1,
                "latent_dim": LATENT,
            },
            "dtype": "float32",
            "source": None,
            "images": shapes,
        }
    )
    made.check_env(spec)
    return made.requires_grad_(False)
