"""What the parity tests share: our learner in float64, fed with a peer's weights and noise.

Each peer's own update code runs beside ours for 36 consecutive updates in float64. Losses and next
parameters (with stable-baselines3 and sb3-contrib the gradients too) must agree to 1e-9, relative
and absolute: what remains is rounding, carried on through Adam. Where a peer departs from the
paper, the option that reproduces it is set here and nowhere else:

    stable-baselines3   temperature loss on log alpha; 1e-6 inside its log-probability (set to 0)
    sb3-contrib         the same; unbiased variance; folded BRN; warm-up one forward longer
    sbx                 temperature loss on log alpha; folded BRN
"""

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.types import Batch, Features

OBS, ACT, ROWS, WIDTH, UPDATES, WARMUP = 4, 2, 32, 16, 36, 10
GAMMA, TAU, LR, ALPHA = 0.9, 0.05, 1e-3, 0.3
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
COMMON = (
    f"algorithm.gamma={GAMMA}",
    f"algorithm.tau={TAU}",
    "algorithm.anchor.weight=0",
    "algorithm.entropy_tuning.alpha_type=exp",
    "algorithm.entropy_tuning.objective=log_alpha",
    f"algorithm.entropy_tuning.initial_alpha={ALPHA}",
    f"algorithm.entropy_tuning.optim.lr={LR}",
    "algorithm.entropy_tuning.optim.clip_grad=null",
    f"actor.hidden=[{WIDTH},{WIDTH}]",
    f"critic.hidden=[{WIDTH},{WIDTH}]",
    f"actor.optim.lr={LR}",
    f"critic.optim.lr={LR}",
)
SAC = (*COMMON, "algorithm.q_head_type=default", "algorithm.policy_delay=1")
CROSSQ = (
    *COMMON,
    "algorithm.q_head_type=crossq",
    "algorithm.policy_delay=3",
    "actor.batch_renorm=true",
    "actor.optim.betas=[0.5,0.999]",
    "critic.optim.betas=[0.5,0.999]",
    "critic.batch_renorm.form=folded",
)
Tensors = dict[str, np.ndarray]


class Data:
    """One random batch and the noise of both action samples, in float64."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.obs, self.next_obs = rng.standard_normal((2, ROWS, OBS)) * [1, 3, 0.5, 1] + [
            0,
            1,
            2,
            0,
        ]
        self.action = rng.uniform(-1, 1, (ROWS, ACT))
        self.reward = rng.standard_normal(ROWS)
        self.done = (rng.random(ROWS) < 0.25).astype(np.float64)
        self.noise, self.next_noise = rng.standard_normal((2, ROWS, ACT))


class Ours:
    """The learner under test, in float64, fed with given noise."""

    def __init__(self, sac, monkeypatch) -> None:
        self.sac = sac
        for module in (sac.actor, sac.average.module, sac.q_head, sac.temperature):
            module.double()
        for trainable in sac.engine._trainables.values():
            for moments in (trainable.exp_avgs, trainable.exp_avg_sqs):
                moments[:] = [moment.double() for moment in moments]
        self._queue: list[np.ndarray] = []
        monkeypatch.setattr(torch, "randn_like", self._noise)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._queue.pop(0)).view_as(like)

    def update(self, data: Data) -> dict[str, float]:
        self._queue = [data.next_noise, data.noise]

        def features(obs):
            return Features(torch.from_numpy(obs), torch.zeros(ROWS, 1, ACT, dtype=torch.float64))

        batch = Batch(
            features(data.obs),
            features(data.next_obs),
            torch.from_numpy(data.action)[:, None],
            torch.from_numpy(data.reward),
            torch.from_numpy(GAMMA * (1 - data.done)),
            torch.zeros(ROWS, dtype=torch.bool),
        )
        return {k: float(v) for k, v in self.sac.update(batch, env_steps=0).items()}

    def networks(self) -> dict[str, nn.Module]:
        head = self.sac.q_head
        nets = {"actor": self.sac.actor.net}
        nets |= {f"q{i}": member for i, member in enumerate(head.critics.members)}
        if hasattr(head, "target"):
            nets |= {f"target{i}": member for i, member in enumerate(head.target.members)}
        return nets

    def tensors(self) -> Tensors:
        out = {"log_alpha": self.sac.temperature.parameter.detach().numpy()}
        for name, net in self.networks().items():
            for i, layer in enumerate(m for m in net if not isinstance(m, nn.ReLU)):
                if isinstance(layer, BatchRenorm):
                    out[f"{name}.{i}.mean"] = layer.running_mean.numpy()
                    out[f"{name}.{i}.var"] = layer.running_var.numpy()
                for kind in ("weight", "bias"):
                    out[f"{name}.{i}.{kind}"] = getattr(layer, kind).detach().numpy()
        return {k: v.copy() for k, v in out.items()}

    def gradients(self) -> Tensors:
        out = {}
        for name, net in self.networks().items():
            for i, layer in enumerate(m for m in net if not isinstance(m, nn.ReLU)):
                for kind in ("weight", "bias"):
                    if getattr(layer, kind).grad is not None:
                        out[f"{name}.{i}.{kind}"] = getattr(layer, kind).grad.numpy().copy()
        return out

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        """Takes over a peer's weights; both must have the same set of them."""
        assert set(tensors) == set(self.tensors())
        self.sac.temperature.parameter.fill_(float(tensors["log_alpha"]))
        for name, net in self.networks().items():
            for i, layer in enumerate(m for m in net if not isinstance(m, nn.ReLU)):
                for kind in ("weight", "bias"):
                    getattr(layer, kind).copy_(torch.from_numpy(tensors[f"{name}.{i}.{kind}"]))


class Space(gym.Env):
    """The peers ask an environment for its spaces; it is never stepped."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,))
    action_space = gym.spaces.Box(-1, 1, (ACT,))


def assert_same(mine: Tensors, theirs: Tensors, what: str) -> None:
    assert set(mine) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, **CLOSE, err_msg=f"{what}: {name}")
