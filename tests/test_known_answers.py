"""Problems whose soft Q is known in closed form, learnt by both heads.

The whole learner runs (actor, temperature, head, replay where the problem is a chain); errors are
stated per test.
"""

import math

import numpy as np
import pytest
import torch

from embodied_rl.registry import Q_HEADS
from embodied_rl.replay.buffer import TrajectoryReplay
from embodied_rl.types import Batch, Features, Trajectory

pytestmark = pytest.mark.e2e  # a minute of learning
CPU = torch.device("cpu")
HEADS = Q_HEADS.names
LEARN = (
    "algorithm.anchor.weight=0",
    "algorithm.entropy_tuning.alpha_type=fixed_alpha",
    "algorithm.agg_q=mean",  # the minimum of two noisy critics is biased downwards by design
    "algorithm.tau=0.05",
    "critic.optim.lr=3e-3",
    "critic.optim.lr_scheduler=cosine",
    "actor.optim.lr=3e-3",
    "actor.optim.lr_scheduler=cosine",
    "actor.initial_std=0.5",
    "critic.batch_renorm.warmup_steps=300",
)


# ---------------------------------------------------------------- two-state chain

GAMMA, CHAIN_ALPHA, R0, R1 = 0.8, 0.1, 1.0, -0.5
H = 2 * math.log(2)  # the best policy is uniform on [-1, 1]^2: rewards ignore the action


def chain(terminated: bool) -> Trajectory:
    """State 0 -> state 1 -> end, where a truncated episode's final observation is state 0."""
    obs = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 0, 0, 0]])
    flags = torch.tensor([False, True, False])
    return Trajectory(
        {
            "obs.state": obs,
            "action": torch.rand(3, 1, 2) * 2 - 1,
            "reward": torch.tensor([[R0], [R1], [0.0]]),
            "steps": torch.tensor([1, 1, 0]),
            "terminated": flags & terminated,
            "truncated": flags & (not terminated),
            "success": torch.zeros(3, dtype=torch.bool),
        }
    )


def chain_answer(bootstraps: bool) -> tuple[float, float]:
    """Soft Q of both states: Q0 = R0 + g (Q1 + b), Q1 = R1 + g (Q0 + b) or R1; b = alpha H."""
    bonus = CHAIN_ALPHA * H
    if not bootstraps:
        return R0 + GAMMA * (R1 + bonus), R1
    q0 = (R0 + GAMMA * bonus + GAMMA * (R1 + GAMMA * bonus)) / (1 - GAMMA**2)
    return q0, R1 + GAMMA * (q0 + bonus)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("terminated", "bootstrap", "bootstraps"),
    [(True, "standard", False), (False, "standard", True), (True, "always", True)],
)
def test_two_state_chain(make_sac, make_config, head, terminated, bootstrap, bootstraps):
    """Termination ends the return, truncation does not, `always` ignores terminations.

    Error at most 0.03 (Q is up to 1.9): half of it is the entropy that a tanh Gaussian lacks
    against the uniform distribution (0.02 nats in two dimensions).
    """
    overrides = (
        *LEARN,
        f"algorithm.q_head_type={head}",
        f"algorithm.bootstrap_type={bootstrap}",
        f"algorithm.gamma={GAMMA}",
        f"algorithm.entropy_tuning.initial_alpha={CHAIN_ALPHA}",
    )
    config, sac = make_config(*overrides), make_sac(*overrides)

    def encode(obs):
        state = obs["state"]
        return Features(state, torch.zeros(len(state), 1, 2))

    replay = TrajectoryReplay(None, config.algorithm, encode, CPU, seed=0)
    for _ in range(64):
        replay.add(chain(terminated))
    updates = 1200
    for i in range(updates):
        sac.engine.set_progress(i / updates)
        sac.update(replay.sample(64), env_steps=0)
    states = torch.eye(4)[:2].repeat_interleave(50, 0)
    with torch.no_grad():
        q = sac.q_head.score(states, torch.rand(100, 1, 2) * 1.8 - 0.9).mean(0).view(2, 50).mean(1)
    expected = chain_answer(bootstraps)
    np.testing.assert_allclose(q.numpy(), expected, rtol=0, atol=0.03)
    # the three answers are further apart than the tolerance
    assert abs(chain_answer(True)[1] - chain_answer(False)[1]) > 0.5


# ---------------------------------------------------------------- linear-quadratic problem

A, B, COST, ALPHA, RANGE = 0.4, 0.8, 0.2, 0.02, 4 / 3


class LinearQuadratic:
    """s' = A s + B a, reward -(s^2 + COST a^2), with the soft optimum in closed form.

    V(s) = -p s^2 + c, where p solves the Riccati equation; the policy is Gaussian with mean -K s
    and variance alpha / (2 (COST + gamma B^2 p)); c = alpha / 2 log(2 pi variance) / (1 - gamma).
    States in [-4/3, 4/3] stay there for any action in [-1, 1], which the optimum leaves only
    beyond four standard deviations.
    """

    def __init__(self) -> None:
        p = 1.0
        for _ in range(100):
            p = 1 + GAMMA * A**2 * p - (GAMMA * A * B * p) ** 2 / (COST + GAMMA * B**2 * p)
        curvature = COST + GAMMA * B**2 * p
        self.p, self.gain = p, GAMMA * A * B * p / curvature
        self.std = math.sqrt(ALPHA / (2 * curvature))
        self.c = ALPHA / 2 * math.log(2 * math.pi * self.std**2) / (1 - GAMMA)
        assert self.gain * RANGE + 4 * self.std < 1

    def batch(self, rows: int, rng: torch.Generator) -> Batch:
        state = (torch.rand(rows, 1, generator=rng) * 2 - 1) * RANGE
        action = torch.rand(rows, 1, generator=rng) * 2 - 1
        base = torch.zeros(rows, 1, 2)
        other = torch.rand(rows, 1, generator=rng) * 2 - 1  # the second action is free and idle
        return Batch(
            Features(pad(state), base),
            Features(pad(A * state + B * action), base),
            torch.cat([action, other], 1)[:, None],
            -(state**2 + COST * action**2)[:, 0],
            torch.full((rows,), GAMMA),
            torch.zeros(rows, dtype=torch.bool),
        )

    def q(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Soft Q; the idle action adds its entropy, log 2, to every later step."""
        idle = GAMMA * ALPHA * math.log(2) / (1 - GAMMA)
        value = -self.p * (A * state + B * action) ** 2 + self.c
        return -(state**2 + COST * action**2) + GAMMA * value + idle


def pad(state: torch.Tensor) -> torch.Tensor:
    """The scalar state [B, 1] as features [B, 4], the other entries constant."""
    return torch.cat([state, torch.ones(len(state), 3)], 1)


@pytest.mark.parametrize("head", HEADS)
def test_linear_quadratic(make_sac, head):
    """Q within 0.05 on the grid (it spans 2.6), mean action within 0.04, std within 15 %."""
    problem, rng = LinearQuadratic(), torch.Generator().manual_seed(0)
    sac = make_sac(
        *LEARN,
        f"algorithm.q_head_type={head}",
        f"algorithm.gamma={GAMMA}",
        f"algorithm.entropy_tuning.initial_alpha={ALPHA}",
        "critic.hidden=[64,64]",
        "actor.hidden=[32]",
    )
    updates = 2500
    for i in range(updates):
        sac.engine.set_progress(i / updates)
        sac.update(problem.batch(128, rng), env_steps=0)
    state, action = torch.meshgrid(
        torch.linspace(-1, 1, 9), torch.linspace(-0.9, 0.9, 9), indexing="ij"
    )
    state, action = state.reshape(-1, 1), action.reshape(-1, 1)
    chunk = torch.cat([action, torch.zeros_like(action)], 1)[:, None]
    with torch.no_grad():
        q = sac.q_head.score(pad(state), chunk).mean(0)
        mean, log_std = sac.actor.distribution(Features(pad(state), torch.zeros(81, 1, 2)))
    error = q - problem.q(state, action)[:, 0]
    assert float(error.abs().max()) < 0.05, error.view(9, 9)
    assert float((torch.tanh(mean[:, 0, :1]) + problem.gain * state).abs().max()) < 0.04
    middle = state[:, 0].abs() < 0.3  # where tanh is nearly linear
    slope = 1 - torch.tanh(mean[:, 0, 0]) ** 2
    std = (log_std.exp()[:, 0, 0] * slope)[middle].mean()
    assert float(std) == pytest.approx(problem.std, rel=0.15)
