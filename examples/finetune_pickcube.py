"""Finetunes the shipped policy and watches one episode of the result, from Python.

    python examples/finetune_pickcube.py
    python examples/finetune_pickcube.py algorithm.q_head_type=default train.total_steps=10000

Arguments are the keys of `python -m embodied_rl.train`; the run folder is runs/example.
"""

import sys

import torch

from embodied_rl.builders import build_env
from embodied_rl.config import EnvConfig
from embodied_rl.policy import Policy
from embodied_rl.train import main

if __name__ == "__main__":  # simulators run in processes of their own, which import this file
    main(["run_dir=runs/example", *sys.argv[1:]])
    policy = Policy.from_pretrained("runs/example")  # the best checkpoint
    env = build_env(EnvConfig(**policy.env), num_envs=1, device=torch.device("cpu"))
    obs, done, steps = env.reset([20_000]), False, 0
    while not done:
        env.send(policy.act(obs)[:, 0], next_seeds=[20_001])  # [1, chunk, action] -> [1, action]
        result = env.recv()
        obs, steps = result.obs, steps + 1
        done = bool(result.terminated | result.truncated)
    print(f"after {steps} steps: {'success' if result.success.item() else 'no success'}")
    env.close()
