"""The fake environment seen by two cameras, and what LeRobot writes beside a policy's weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from embodied_rl.envs.fake import FakeVecEnv
from embodied_rl.types import ArraySpec, EnvSpec

BASE, WRIST = "sensor_data.base_camera.rgb", "sensor_data.hand_camera.rgb"
SIDE = 32
SPEC = EnvSpec(
    {
        BASE: ArraySpec((SIDE, SIDE, 3), torch.uint8),
        WRIST: ArraySpec((SIDE, SIDE, 3), torch.uint8),
        "agent.qpos": ArraySpec((3,), torch.float32),
        "extra.is_grasped": ArraySpec((), torch.bool),
        "instruction": ArraySpec((), torch.int64),
    },
    2,
    20,
    "cubes",
    ("push the cube", "pull the red cube to the target"),
)
STATE = 4
STATISTICS = {
    "observation.state.mean": torch.tensor([0.1, -0.2, 0.3, 0.5]),
    "observation.state.std": torch.tensor([1.0, 2.0, 0.5, 0.4]),
    "action.mean": torch.tensor([0.05, -0.1]),
    "action.std": torch.tensor([0.4, 0.3]),
}


class RgbVecEnv(FakeVecEnv):
    """A point that must reach the origin, whose place and speed also colour two images."""

    def __init__(self, num_envs, config, device):
        super().__init__(num_envs, config, device)
        limit = self.spec.max_episode_steps
        self.spec = EnvSpec(SPEC.obs, 2, limit, "cubes", SPEC.instructions)

    def _obs(self):
        state = super()._obs()["state"]
        count = len(state)
        line = torch.linspace(0, 255, SIDE)
        image = (line[None, :, None, None] * (state[:, None, None, :1] + 2) / 4).expand(
            count, SIDE, SIDE, 3
        )
        other = (line[None, None, :, None] * (state[:, None, None, 1:2] + 2) / 4).expand_as(image)
        return {
            BASE: image.clamp(0, 255).to(torch.uint8),
            WRIST: other.clamp(0, 255).to(torch.uint8),
            "agent.qpos": state[:, [0, 1, 3]],
            "extra.is_grasped": state[:, 0] > 0,
            "instruction": torch.arange(count) % 2,
        }


def make_rgb(config, num_envs, device):
    return RgbVecEnv(num_envs, config, device)


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


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def write_processors(
    folder: Path, config: dict, statistics: dict[str, Tensor], extra: list[dict], place: int
) -> None:
    """Both pipelines as LeRobot 0.4 saves them; `place`: the normaliser's position in the first."""
    inputs, outputs = config["input_features"], config["output_features"]
    settings = {
        "eps": 1e-8,
        "features": {**inputs, **outputs},
        "norm_map": config["normalization_mapping"],
    }
    name = "policy_{}processor_step_{}_{}.safetensors"
    before = name.format("pre", place, "normalizer_processor")
    after = name.format("post", 0, "unnormalizer_processor")
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    pre = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        *extra,
        device,
    ]
    pre.insert(
        place,
        {"registry_name": "normalizer_processor", "config": settings, "state_file": before},
    )
    settings = {**settings, "features": outputs}
    post = [
        {"registry_name": "unnormalizer_processor", "config": settings, "state_file": after},
        device,
    ]
    for side, steps in (("pre", pre), ("post", post)):
        told = {"name": f"policy_{side}processor", "steps": steps}
        (folder / f"policy_{side}processor.json").write_text(json.dumps(told, indent=2))
    for file in (before, after):
        save_file(statistics, folder / file)
