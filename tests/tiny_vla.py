"""A small VLA with random towers of a few thousand parameters, in transformers folders."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast

from embodied_rl.backbones.small_vla import SmallVLABackbone
from embodied_rl.command_configs import PretrainConfig, SmallVLAConfig
from embodied_rl.types import ArraySpec, EnvSpec, Trajectory

TOLD = ("push the cube", "pull the cube")
CAMERA = "sensor_data.base_camera.rgb"
SIZE = 28  # pixels
SPEC = EnvSpec(
    {
        CAMERA: ArraySpec((SIZE, SIZE, 3), torch.uint8),
        "agent.qpos": ArraySpec((3,), torch.float32),
        "instruction": ArraySpec((), torch.int64),
    },
    2,
    20,
    "tiny",
    TOLD,
)


def vision_folder(folder: Path, seed: int = 0) -> Path:
    """A DINOv2 of 2 x 2 patches."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=SIZE // 2,
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def text_folder(folder: Path, seed: int = 0) -> Path:
    """A BERT that knows the words of the instructions."""
    torch.manual_seed(seed)
    words = ["[UNK]", "[PAD]", *sorted({w for text in TOLD for w in text.split()})]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    )
    wrapped.save_pretrained(folder)
    return folder


def observations(count: int = 8, seed: int = 2) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        CAMERA: torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=rng, dtype=torch.uint8),
        "agent.qpos": torch.randn(count, 3, generator=rng),
        "instruction": torch.arange(count) % len(TOLD),
    }


def demos(count: int = 4, length: int = 10) -> list[Trajectory]:
    """Random pictures, the same for each instruction; it and the first joint say the action."""
    trajectories = []
    for i in range(count):
        obs = observations(length + 1, seed=i // len(TOLD))
        obs["instruction"] = torch.full((length + 1,), i % len(TOLD))
        sign = 1 - 2 * (i % len(TOLD))
        action = torch.stack([obs["agent.qpos"][:, 0].tanh(), torch.full((length + 1,), 0.5)], 1)
        flags = {n: torch.zeros(length + 1, dtype=torch.bool) for n in ("terminated", "truncated")}
        fields = {f"obs.{k}": v for k, v in obs.items()} | flags
        fields |= {
            "action": sign * action[:, None],
            "reward": torch.zeros(length + 1, 1),
            "steps": torch.ones(length + 1, dtype=torch.int64),
            "success": torch.ones(length + 1, dtype=torch.bool),
        }
        trajectories.append(Trajectory(fields))
    return trajectories


def config(vision: Path, text: Path, chunk_size: int = 3) -> PretrainConfig:
    sizes = SmallVLAConfig(str(vision), str(text), keypoints=3, summary=4, text_dim=2)
    return PretrainConfig(small_vla=sizes, hidden=[16], chunk_size=chunk_size)


def backbone(folder: Path, chunk_size: int = 3) -> SmallVLABackbone:
    """Random weights, normalised to `demos`."""
    made = config(vision_folder(folder / "vision"), text_folder(folder / "text"), chunk_size)
    torch.manual_seed(0)
    return SmallVLABackbone.for_demos(demos(), TOLD, made).eval().requires_grad_(False)
