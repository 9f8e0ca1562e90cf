"""Updates per second with stored features, against encoding every sampled batch anew; one run.

    python benchmarks/features.py
    python benchmarks/features.py --hidden 32 --image 56     # a smaller policy

The policy is a π0 with random weights (two cameras, an instruction, chunks of 8 actions); learner,
batches and replay are those of a training run (`gaussian` actor, either Q head), sampling included.
Both ways take turns on the same trajectories, a second each; medians, spread in brackets. While
features are stored, a hook on the policy raises: no update may run it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch

from embodied_rl import builders
from embodied_rl.backbones.pi0 import Pi0Backbone
from embodied_rl.config import Config
from embodied_rl.demonstrations import with_features
from embodied_rl.load_config import load_config
from embodied_rl.policy import Policy
from embodied_rl.registry import ACTORS
from embodied_rl.replay.buffer import TrajectoryReplay
from embodied_rl.types import ArraySpec, EnvSpec, Trajectory

CAMERAS = ("sensor_data.base_camera.rgb", "sensor_data.hand_camera.rgb")
CHUNK, ACTION, STATE, EPISODE, EPISODES = 8, 7, 9, 20, 10
CPU = torch.device("cpu")


def network(hidden: int, layers: int, image: int) -> dict:
    """π0's configuration, small."""
    expert = {
        "model_type": "gemma",
        "hidden_size": hidden // 2,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": hidden // 4,
    }
    return {
        "vlm_config": {
            "model_type": "paligemma",
            "text_config": expert
            | {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 512},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": hidden,
                "intermediate_size": 4 * hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "patch_size": 14,
                "image_size": image,
                "vision_use_head": False,
            },
            "projection_dim": hidden,
            "image_token_id": 512,
        },
        "dit_config": expert,
        "chunk_size": CHUNK,
        "max_state_dim": 32,
        "max_action_dim": 32,
        "num_inference_steps": 10,
    }


def spec() -> EnvSpec:
    images = {key: ArraySpec((128, 128, 3), torch.uint8) for key in CAMERAS}
    rest = {
        "agent.qpos": ArraySpec((STATE,), torch.float32),
        "instruction": ArraySpec((), torch.int64),
    }
    return EnvSpec({**images, **rest}, ACTION, EPISODE, "benchmark", ("pick up the cube",))


def trajectory(seed: int) -> Trajectory:
    rng = torch.Generator().manual_seed(seed)
    rows = EPISODE + 1
    flags = torch.zeros(rows, dtype=torch.bool)
    fields = {
        f"obs.{key}": torch.randint(0, 256, (rows, 128, 128, 3), generator=rng, dtype=torch.uint8)
        for key in CAMERAS
    }
    return Trajectory(
        {
            **fields,
            "obs.agent.qpos": torch.randn(rows, STATE, generator=rng),
            "obs.instruction": torch.zeros(rows, dtype=torch.int64),
            "action": torch.rand(rows, CHUNK, ACTION, generator=rng) * 2 - 1,
            "reward": torch.randn(rows, CHUNK, generator=rng),
            "steps": torch.full((rows,), CHUNK),
            "terminated": flags,
            "truncated": flags,
            "success": flags,
        }
    )


def learner(
    config: Config, backbone: Pi0Backbone, trajectories: list[Trajectory], stored: bool
) -> Callable[[], None]:
    """Returns one update; with stored features, one that may not run the backbone."""
    actor = ACTORS.get(config.actor.type).for_backbone(backbone, config.actor, None)
    policy = Policy(backbone, "pi0", actor, config.actor.type)
    sac = builders.build_sac(config, policy, builders.build_q_head(config, policy, CPU), CPU)
    encode = builders.build_encoder(policy, CPU)
    replay = TrajectoryReplay(None, config.algorithm, encode, CPU, seed=0)
    for one in trajectories:
        replay.add(with_features(one, encode) if stored else one)
    if stored:
        backbone.register_forward_pre_hook(forbidden)

    def update() -> None:
        sac.update(replay.sample(config.algorithm.batch_size), env_steps=10**6)

    return update


def forbidden(module: torch.nn.Module, inputs: tuple) -> None:
    raise RuntimeError("an update ran the backbone although its features are stored")


def rate(update: Callable[[], None], seconds: float) -> float:
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        update()
        count += 1
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--image", type=int, default=112, help="pixels the policy looks at")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    backbone = Pi0Backbone.from_config(
        {
            "network": network(args.hidden, args.layers, args.image),
            "dtype": "float32",
            "source": None,
            "prompts": [["pick up the cube", [2, 11, 12, 13, 14, 15, 16, 1]]],
        }
    )
    backbone.check_env(spec())
    backbone.requires_grad_(False)
    size = sum(p.numel() for p in backbone.parameters())
    trajectories = [trajectory(seed) for seed in range(EPISODES)]
    print(f"π0 of {size / 1e6:.2f} M parameters, 2 cameras, batch {args.batch}")
    for head in ("crossq", "default"):
        words = [f"algorithm.batch_size={args.batch}", f"algorithm.q_head_type={head}"]
        config, _ = load_config(Config, [*words, "algorithm.replay_buffer.min_buffer_size=1"])
        ways = {
            name: learner(config, copy.deepcopy(backbone), trajectories, stored)
            for name, stored in (("stored features", True), ("encoded anew", False))
        }
        for update in ways.values():
            update()
        rates = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, update in ways.items():
                rates[name].append(rate(update, 1.0))
        medians = {name: statistics.median(found) for name, found in rates.items()}
        for name, found in rates.items():
            spread = f"[{min(found):.2f}, {max(found):.2f}]"
            print(f"  {head:8} {name:16} {medians[name]:8.2f} updates/s  {spread}")
        ratio = medians["stored features"] / medians["encoded anew"]
        print(f"  {head:8} ratio            {ratio:8.1f}")


if __name__ == "__main__":
    main()
