"""A pretrained policy of your own as a backbone, finetuned with a residual actor.

    python examples/custom_backbone.py                        # about 10 minutes
    python examples/custom_backbone.py --steps 2000 --out /tmp/short

The policy is no network at all: a hand-written controller for PickCube whose calibration is off by
centimetres, so that it misses its grasp four times in ten. Whatever computes actions from
observations, in any framework, can take its place: a backbone promises `forward`, `check_env`, and
a config that rebuilds it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from embodied_rl import builders
from embodied_rl.config import Config
from embodied_rl.cores import settle
from embodied_rl.errors import UserError
from embodied_rl.interfaces import Backbone
from embodied_rl.load_config import load_config, save_config
from embodied_rl.policy import Policy
from embodied_rl.registry import BACKBONES
from embodied_rl.stopping import StopRequest
from embodied_rl.trainer import Trainer
from embodied_rl.types import EnvSpec, Features, Obs

# PickCube-v1's flat state, see embodied_rl/envs/experts.py
IS_GRASPED, TO_CUBE, CUBE_TO_GOAL = 18, slice(36, 39), slice(39, 42)
STEP = 0.1  # metres that an action of 1 moves the hand


class Controller(Backbone):
    """Reaches above the cube, descends, closes the fingers, carries the cube to the goal.

    Args:
        error: metres by which it misjudges where the cube is, [3].
    """

    feature_dim, chunk_size, action_dim = 42, 1, 4

    def __init__(self, error: list[float]) -> None:
        super().__init__()
        self.register_buffer("error", torch.tensor(error))

    def forward(
        self, obs: Obs, samples: int = 1, generator: torch.Generator | None = None
    ) -> Features:
        """Features are the state as it is; the base action is the controller's."""
        del samples, generator  # it draws no noise
        state = obs["state"].float()
        offset = state[:, TO_CUBE] + self.error
        sideways = offset[:, :2].norm(dim=1)
        there = (sideways < 0.012) & (offset[:, 2].abs() < 0.012)
        grasped = state[:, IS_GRASPED] > 0.5
        hover = (sideways > 0.02) & ~grasped
        move = offset + hover[:, None] * offset.new_tensor([0.0, 0.0, 0.06])
        move = torch.where(grasped[:, None], state[:, CUBE_TO_GOAL], move)
        gripper = torch.where(there | grasped, -1.0, 1.0)
        action = torch.cat([(move / STEP).clamp(-1, 1), gripper[:, None]], 1)
        return Features(state, action[:, None])

    def check_env(self, spec: EnvSpec) -> None:
        """The controller knows PickCube's state and nothing else."""
        if spec.name != "PickCube-v1" or spec.obs["state"].shape != (42,):
            raise UserError(f"this controller is for PickCube-v1 with state, not {spec.name}.")

    def config_dict(self) -> dict[str, Any]:
        """The constructor's argument."""
        return {"error": [float(e) for e in self.error]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Controller:
        """Rebuilds the controller."""
        return cls(**config)

    @classmethod
    def for_env(cls, spec: EnvSpec) -> Controller:
        """Without a calibration error."""
        return cls([0.0, 0.0, 0.0])


def main() -> None:
    """Saves the controller as a policy folder, finetunes it, and prints both scores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--out", type=Path, default=Path("runs/custom_backbone"))
    args = parser.parse_args()

    BACKBONES.register("controller", Controller)  # before any folder that names it is read
    args.out.mkdir(parents=True)
    Policy(Controller([0.010, -0.025, 0.0]), "controller").save_pretrained(args.out / "start")

    config, _ = load_config(
        Config,
        [
            f"policy.path={args.out / 'start'}",
            "actor.type=residual",
            "actor.residual_scale=0.3",
            "actor.residual_ramp_steps=1000",
            "algorithm.demo.fraction=0",
            f"train.total_steps={args.steps}",
        ],
    )
    run_dir = args.out / "run"
    run_dir.mkdir()
    device = builders.build_device(config.device)
    config = settle(config, device.type)
    assert config.train.threads is not None
    torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)
    save_config(config, run_dir / "config.yaml")
    env = builders.build_env(config.env, config.env.num_envs, device)
    try:
        with StopRequest() as stop:
            policy = builders.build_policy(config, env.spec, device)
            results = Trainer(config, run_dir, env, policy, device, stop).run(resume=False)
    finally:
        env.close()
    if results is not None:
        before, after = (results[k]["success_once"] for k in ("pretrained", "final"))
        print(f"success: the controller {before:.0%}, finetuned {after:.0%}; videos in {run_dir}")


if __name__ == "__main__":
    main()
