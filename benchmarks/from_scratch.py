"""sb3-contrib's CrossQ from scratch, on the environment that our default run finetunes in.

    python benchmarks/from_scratch.py --seed 0 --out scratch_s0.jsonl

The same task, observations, actions, reward, 50-step episodes without early end, number of
environment steps and held-out evaluation seeds as `python -m embodied_rl.train`; the evaluation is
run by our own `Evaluator`. What differs is the subject of the comparison: no pretrained policy, no
demonstrations, no anchor, no critic warm-up.

Hyper-parameters are sb3-contrib's defaults (critics 2 x 1024 x 1024, actor 256 x 256, learning
rate 1e-3, one update per step, policy delay 3), except gamma, which is 0.8 as in our default.
`--critic-width 256` gives the critics the size of ours and is several times faster on a CPU; where
a published number used it, say so. `plot_from_scratch.py` draws the result beside our runs.

The output file gets one line of settings and then one line per evaluation, as it happens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from embodied_rl.builders import build_env
from embodied_rl.collector import episode_seed
from embodied_rl.config import Config, EnvConfig
from embodied_rl.evaluator import Evaluator
from embodied_rl.policy import Policy

LABEL = "sb3-contrib CrossQ from scratch"
OBS_KEY = "state"


class TrainingEnv(gym.Env):
    """Our single ManiSkill environment in gymnasium's interface.

    Episodes take the seeds of our collector's environment 0, so that training never meets an
    evaluation seed; the seeds that SB3 passes to `reset` are not used.

    Args:
        config: which task and how.
        seed: of the run.
    """

    def __init__(self, config: EnvConfig, seed: int) -> None:
        from embodied_rl.envs.maniskill import ManiSkillEnv

        self._env = ManiSkillEnv(config)
        self._seed, self._episode = seed, 0
        spec = self._env.spec
        self.observation_space = gym.spaces.Box(
            -np.inf, np.inf, spec.obs[OBS_KEY].shape, np.float32
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts the next training episode."""
        super().reset(seed=seed, options=options)
        obs = self._env.reset(episode_seed(self._seed, 0, self._episode))
        self._episode += 1
        return obs[OBS_KEY].astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Steps the simulator; the time limit is a truncation, which SB3 bootstraps through."""
        obs, reward, terminated, truncated, success = self._env.step(action.astype(np.float32))
        info = {"is_success": success}
        return obs[OBS_KEY].astype(np.float32), reward, terminated, truncated, info

    def close(self) -> None:
        """Frees the simulator."""
        self._env.close()


class ScratchPolicy:
    """An SB3 model with as much of `Policy` as our evaluator asks for.

    Args:
        model: a trained SB3 algorithm.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.execute_steps = 1

    def act(self, obs: dict[str, Tensor], *, deterministic: bool = True) -> Tensor:
        """Returns actions [B, 1, A] for observations [B, D]."""
        action, _ = self._model.predict(obs[OBS_KEY].cpu().numpy(), deterministic=deterministic)
        return torch.from_numpy(np.asarray(action, np.float32))[:, None]


def build_model(args: argparse.Namespace, env: gym.Env) -> Any:
    """Builds sb3-contrib's CrossQ with its defaults and what the command line changes."""
    from sb3_contrib import CrossQ

    return CrossQ(
        "MlpPolicy",
        env,
        gamma=args.gamma,
        batch_size=args.batch_size,
        policy_kwargs={"net_arch": {"pi": [args.actor_width] * 2, "qf": [args.critic_width] * 2}},
        seed=args.seed,
        device=args.device,
    )


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def train(args: argparse.Namespace, config: Config) -> None:
    """Trains, evaluating before the first step, every `--interval` steps and at the end."""
    device = torch.device("cpu")  # of the evaluation's observations; the model has --device
    evaluation_env = build_env(config.env, args.eval_envs, device)
    env = TrainingEnv(config.env, args.seed)
    try:
        model = build_model(args, env)
        policy = cast(Policy, ScratchPolicy(model))
        evaluator = Evaluator(evaluation_env, args.episodes, device)
        step, seconds = 0, 0.0
        while True:
            summary = evaluator.run(policy, config.eval.seed).summary
            scores = {f"eval/{name}": value for name, value in summary.items()}
            append(args.out, {"step": step, **scores, "train_seconds": round(seconds, 1)})
            print(
                f"step {step:>7,}: success {summary['success_once']:.0%} (at end "
                f"{summary['success_at_end']:.0%}), return {summary['return']:.2f}",
                flush=True,
            )
            if step >= args.steps:
                break
            part = min(args.interval, args.steps - step)
            started = time.monotonic()
            model.learn(part, reset_num_timesteps=False)  # goes on where the last call stopped
            seconds += time.monotonic() - started
            step = int(model.num_timesteps)
    finally:
        env.close()
        evaluation_env.close()


def parse(config: Config) -> argparse.Namespace:
    """Reads the command line; the defaults that can be ours come from our config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps, episodes = config.train.total_steps, config.eval.episodes
    parser.add_argument("--out", type=Path, required=True, help="a JSON lines file, not there yet")
    parser.add_argument("--steps", type=int, default=steps, help=f"environment steps ({steps})")
    parser.add_argument("--seed", type=int, default=config.seed, help="of model and episodes")
    parser.add_argument("--episodes", type=int, default=episodes, help=f"each time ({episodes})")
    parser.add_argument("--interval", type=int, default=config.eval.interval, help="of evaluation")
    parser.add_argument(
        "--task", default=config.env.task, help=f"ManiSkill task ({config.env.task})"
    )
    parser.add_argument("--gamma", type=float, default=config.algorithm.gamma, help="ours: 0.8")
    parser.add_argument("--batch-size", type=int, default=256, help="sb3-contrib: 256")
    parser.add_argument("--critic-width", type=int, default=1024, help="sb3-contrib: 1024")
    parser.add_argument("--actor-width", type=int, default=256, help="sb3-contrib: 256")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--eval-envs", type=int, default=2, help="processes that evaluate")
    parser.add_argument("--device", default="cpu", help="of the networks: cpu, cuda, auto")
    args = parser.parse_args()
    for name in ("steps", "episodes", "interval", "threads", "eval_envs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: 1 or more")
    if args.out.exists() and args.out.stat().st_size > 0:
        parser.error(f"--out {args.out} holds another run; name a new file")
    return args


def main() -> None:
    """Runs the benchmark."""
    config = Config()
    args = parse(config)
    config.env.task = args.task
    torch.set_num_threads(args.threads)
    import sb3_contrib

    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    version = {"sb3_contrib": sb3_contrib.__version__, "torch": torch.__version__}
    append(args.out, {"label": LABEL, **settings, **version, "first_seed": config.eval.seed})
    train(args, config)


if __name__ == "__main__":
    main()
