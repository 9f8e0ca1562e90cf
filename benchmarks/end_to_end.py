"""Environment steps per second of whole training, one update per step, beside sb3-contrib and sbx.

    pip install -e '.[dev]'
    python benchmarks/end_to_end.py                      # HalfCheetah-v5 and PickCube-v1, CrossQ
    python benchmarks/end_to_end.py --algo sac --envs 1
    python benchmarks/end_to_end.py --tasks PickCube-v1 --envs 4 \\
        --also "rollout.overlap=false train.threads=2"   # a variant of ours in the same turns

Everything that a run does for a step is counted: the policy, the simulator, replay, the update and
what is recorded; no evaluations and checkpoints. Networks, batch, policy delay and updates per
step are the same for all, and all may use every core. Ours steps environments in processes of
their own and updates meanwhile. The others step one environment in their own process, as a user of
theirs would write it, and several by their vector environment of processes; ManiSkill through
ManiSkill's own wrapper. Implementations take turns, a round each; medians over rounds, quartiles
in brackets.
"""

from __future__ import annotations

import argparse
import atexit
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from turns import Step, Worker, by_turns, serve

DELAY = {"crossq": 3, "sac": 1}
WIDTH, RATE, GAMMA, BATCH, RANDOM = 256, 1e-3, 0.99, 256, 1_000
MANISKILL: dict[str, Any] = {
    "obs_mode": "state",
    "control_mode": "pd_ee_delta_pos",
    "reward_mode": "normalized_dense",
    "sim_backend": "physx_cpu",
    "render_backend": "cpu",
}


def ours(case: argparse.Namespace) -> Step:
    """Our trainer between two evaluations."""
    import torch

    from embodied_rl import builders
    from embodied_rl.collecting_process import open_env
    from embodied_rl.config import Config
    from embodied_rl.cores import settle
    from embodied_rl.distributed import Ranks
    from embodied_rl.load_config import load_config
    from embodied_rl.stopping import StopRequest
    from embodied_rl.trainer import Trainer

    crossq = case.algo == "crossq"
    words = [
        f"env.type={'maniskill' if case.maniskill else 'gymnasium'}",
        f"env.task={case.task}",
        f"env.num_envs={case.envs}",
        "policy.path=null",
        f"algorithm.q_head_type={'crossq' if crossq else 'default'}",
        f"algorithm.update_epoch={case.envs}",
        f"algorithm.batch_size={BATCH}",
        f"algorithm.gamma={GAMMA}",
        f"algorithm.policy_delay={DELAY[case.algo]}",
        "algorithm.critic_warmup_steps=0",
        "algorithm.anchor.weight=0",
        "algorithm.demo.fraction=0",
        f"algorithm.replay_buffer.min_buffer_size={RANDOM // 50}",
        "algorithm.replay_buffer.cache_size=20000",
        "algorithm.replay_buffer.sample_window_size=20000",
        f"actor.hidden=[{WIDTH},{WIDTH}]",
        "actor.average_decay=0",
        f"actor.batch_renorm={str(crossq).lower()}",
        f"actor.optim.lr={RATE}",
        f"critic.hidden=[{WIDTH},{WIDTH}]",
        f"critic.optim.lr={RATE}",
        "rollout.steps=1",
        f"rollout.random_steps={RANDOM}",
        "rollout.max_trajectory_steps=50",
        "train.total_steps=100000000",
        "train.compile=always",
        *case.words,
    ]
    if case.maniskill:
        modes = ("obs_mode", "control_mode", "reward_mode", "sim_backend")
        words += [f"env.{mode}={MANISKILL[mode]}" for mode in modes]
    config, _ = load_config(Config, words)
    device = torch.device("cpu")
    config = settle(config, device.type)
    assert config.train.threads is not None
    torch.set_num_threads(config.train.threads)
    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory()
    env = open_env(config, device, config.seed, Ranks(), Path(folder.name))
    atexit.register(env.close)  # else its processes are waited for
    policy = builders.build_policy(config, env.spec, device)
    trainer = Trainer(config, Path(folder.name), env, policy, device, StopRequest())
    trainer.logger.open(0)
    trainer._start()

    def step(count: int) -> None:
        end = trainer.step + count
        while trainer.step < end:
            trainer._iterate()
            if trainer.timetable.records(trainer.step):
                trainer.recorder.record(trainer._batch)
        assert folder  # lives as long as the replay

    return step


def peer_env(task: str, maniskill: bool, alone: bool) -> Any:
    """One environment of a peer, alone in a process or in the learner's."""
    import gymnasium as gym

    if not maniskill:
        return gym.make(task)
    import mani_skill.envs  # noqa: F401 - registers the tasks
    import torch
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    if alone:
        torch.set_num_threads(1)
    return CPUGymWrapper(gym.make(task, num_envs=1, **MANISKILL))


def peer(case: argparse.Namespace) -> Step:
    """A peer's own `learn`."""
    import sb3_contrib
    import sbx
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    settings: dict[str, Any] = {
        "learning_rate": RATE,
        "learning_starts": RANDOM,
        "batch_size": BATCH,
        "gamma": GAMMA,
        "train_freq": 1,
        "gradient_steps": case.envs,
        "policy_kwargs": {"net_arch": {"pi": [WIDTH, WIDTH], "qf": [WIDTH, WIDTH]}},
        "seed": 0,
    }
    if case.algo == "crossq":
        kind = {"sb3": sb3_contrib.CrossQ, "sbx": sbx.CrossQ}[case.worker]
        settings["policy_delay"] = DELAY[case.algo]
    else:
        kind = {"sb3": stable_baselines3.SAC, "sbx": sbx.SAC}[case.worker]
    env = make_vec_env(
        peer_env,
        case.envs,
        env_kwargs={"task": case.task, "maniskill": case.maniskill, "alone": case.envs > 1},
        vec_env_cls=SubprocVecEnv if case.envs > 1 else DummyVecEnv,
    )
    model = kind("MlpPolicy", env, device="cpu", **settings)
    return lambda count: model.learn(count, reset_num_timesteps=False) and None


def measure(case: argparse.Namespace) -> dict[str, list[float]]:
    """Rates of all implementations on one task, by turns."""
    workers = []
    variants = [(name, "") for name in case.implementations] + [("ours", w) for w in case.also]
    for name, words in variants:
        command = [sys.executable, __file__, "--worker", name, "--task", case.task]
        command += ["--algo", case.algo, "--envs", str(case.envs), *words.split()]
        label = f"{name}, {words}" if words else name
        workers.append(Worker(label, command, case.seconds, quantum=case.envs))
    return by_turns(workers, case.rounds)


def main() -> None:
    """Measures every setting; prints a table and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["HalfCheetah-v5", "PickCube-v1"])
    parser.add_argument("--algo", default="crossq", choices=list(DELAY))
    parser.add_argument("--envs", nargs="+", type=int, default=[1, 4])
    names = ["ours", "sb3", "sbx"]
    parser.add_argument("--implementations", nargs="+", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a round, about")
    parser.add_argument("--also", nargs="*", default=[], help="overrides for one more of ours each")
    parser.add_argument("--out", type=Path, default=Path("runs/end_to_end.json"))
    args = parser.parse_args()
    found = []
    print("| task | environments | | env steps/s | ours / it |\n|---|---|---|---|---|", flush=True)
    for task in args.tasks:
        for envs in args.envs:
            rates = measure(argparse.Namespace(**{**vars(args), "task": task, "envs": envs}))
            found.append({"task": task, "envs": envs, "algo": args.algo, "rates": rates})
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            mine = rates.get("ours")
            for name, values in rates.items():
                low, middle, high = statistics.quantiles(values, n=4)
                ratio = "" if mine is None else f"{statistics.median(mine) / middle:.2f}"
                shown = f"{middle:.1f} [{low:.1f}, {high:.1f}]"
                print(f"| {task} | {envs} | {name} | {shown} | {ratio} |", flush=True)


def worker() -> None:
    """Entry of the processes that `measure` starts."""
    parser = argparse.ArgumentParser()
    for name in ("worker", "algo", "task"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--envs", type=int)
    parser.add_argument("words", nargs="*")
    case = parser.parse_args()
    import mani_skill.envs  # noqa: F401
    from mani_skill.utils.registration import REGISTERED_ENVS  # empty until tasks are imported

    case.maniskill = case.task in REGISTERED_ENVS
    serve(lambda: ours(case) if case.worker == "ours" else peer(case), warm_up=RANDOM + 200)


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
