"""Both of LeRobot's policies that are trained here, tiny, and what they are shown."""

import tiny_act
import tiny_smolvla
import torch
from safetensors.torch import load_file
from tiny_rgb import SPEC, observations

from embodied_rl.config import PolicyConfig
from embodied_rl.interfaces import Imitator
from embodied_rl.policy import Policy
from embodied_rl.types import EXPERT, Trajectory

WRITE = {"act": tiny_act.write, "smolvla": tiny_smolvla.write}
A = 2


def read(folder, **options) -> Policy:
    policy = Policy.from_pretrained(folder, PolicyConfig(path=str(folder), **options))
    policy.backbone.check_env(SPEC)
    return policy


def imitator(folder, **options) -> Imitator:
    backbone = read(folder, **options).backbone
    assert isinstance(backbone, Imitator)
    return backbone.requires_grad_(False)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def shown(length: int = 6, seed: int = 0) -> Trajectory:
    rng = torch.Generator().manual_seed(seed)
    fields = {f"obs.{k}": v for k, v in observations(count=length + 1, seed=seed).items()}
    fields["obs.instruction"] = torch.full_like(fields["obs.instruction"], seed % 2)
    for key in ("action", EXPERT):
        fields[key] = torch.rand(length + 1, 1, A, generator=rng) * 2 - 1
    fields["success"] = torch.ones(length + 1, dtype=torch.bool)
    return Trajectory(fields)


def chunks_of(count: int, length: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(7)
    return torch.rand(count, length, A, generator=rng) * 2 - 1
