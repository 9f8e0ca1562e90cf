"""Runs a policy in a vector environment and turns its steps into trajectories."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.config import RolloutConfig
from embodied_rl.interfaces import ReplayBuffer, VecEnv
from embodied_rl.policy import Policy
from embodied_rl.types import EpisodeStats, Features, Obs, StepResult, Trajectory

RECENT = 8  # finished trajectories kept at hand
TRAIN_SEEDS = 2**30  # training episodes take seeds from here up, evaluations below


def episode_seed(run_seed: int, env: int, episode: int) -> int:
    """Seed of one training episode: a hash of run, environment and episode number."""
    words = np.random.SeedSequence([run_seed, env, episode]).generate_state(1)
    return TRAIN_SEEDS + int(words[0]) % TRAIN_SEEDS


class OpenTrajectory:
    """The episode that one environment is in the middle of."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []  # one per decision
        self.plan: list[Tensor] = []  # actions of the present chunk still to execute
        self.rewards: list[float] = []  # of the present chunk
        self.total, self.once, self.steps = 0.0, False, 0


class Collector:
    """Steps the environments with the exploring policy and fills the replay buffer.

    `begin` chooses actions and starts the step, `end` waits for it: updates may run in between
    while worker processes simulate.

    Args:
        env: the training environments.
        policy: backbone and actor; None-actor policies act with their base action.
        replay: receives every finished trajectory.
        config: chunk execution, random phase and the length of replay pieces.
        store_features: put the backbone's features into the trajectories.
        seed: of the training episodes.
        device: where the policy runs.
    """

    def __init__(
        self,
        env: VecEnv,
        policy: Policy,
        replay: ReplayBuffer,
        config: RolloutConfig,
        *,
        store_features: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self.env, self.policy, self.replay, self.config = env, policy, replay, config
        self.store_features, self.seed, self.device = store_features, seed, device
        self.execute = policy.execute_steps
        self.env_steps = 0
        self.stats = EpisodeStats()
        self.recent: deque[Trajectory] = deque(maxlen=RECENT)  # for diagnostics
        self._episodes = [0] * env.num_envs  # number of each environment's present episode
        self._open = [OpenTrajectory() for _ in range(env.num_envs)]
        self._obs: Obs | None = None

    def start(self) -> None:
        """Starts a fresh episode everywhere; what was half done is dropped."""
        n = self.env.num_envs
        self._open = [OpenTrajectory() for _ in range(n)]
        self._obs = self.env.reset([self._seed(i) for i in range(n)])

    def _seed(self, env: int, ahead: int = 0) -> int:
        return episode_seed(self.seed, env, self._episodes[env] + ahead)

    @torch.no_grad()
    def begin(self) -> None:
        """Decides where a chunk is used up, and starts one environment step."""
        assert self._obs is not None, "call start() first"
        deciding = [i for i, o in enumerate(self._open) if not o.plan]
        if deciding:
            obs = {k: v[deciding].to(self.device) for k, v in self._obs.items()}
            features = self.policy.encode(obs)
            chunks = self._explore(features)
            for j, i in enumerate(deciding):
                self._decide(i, _row(obs, j), _feature_row(features, j), chunks[j])
        actions = torch.stack([o.plan.pop(0) for o in self._open])
        seeds = [self._seed(i, ahead=1) for i in range(self.env.num_envs)]
        self.env.send(actions, seeds)

    def _explore(self, features: Features) -> Tensor:
        if self.env_steps < self.config.random_steps:
            return torch.rand_like(features.base_action) * 2 - 1
        actor = self.policy.actor
        if actor is None:
            return features.base_action
        return actor.explore(features, self.env_steps).action

    def _decide(
        self, i: int, obs: dict[str, Tensor], features: dict[str, Tensor], chunk: Tensor
    ) -> None:
        current = self._open[i]
        row = self._observation_row(obs, features)
        if len(current.rows) >= self.config.max_trajectory_steps:
            self._close(current, row)
            current.rows = []
        chunk = chunk.cpu()
        current.rows.append({**row, "action": chunk})
        current.plan = list(chunk[: self.execute])
        current.rewards = []

    def end(self) -> None:
        """Waits for the step and books it; finished episodes go to replay."""
        result = self.env.recv()
        self._obs = result.obs
        self.env_steps += self.env.num_envs
        ended = (result.terminated | result.truncated).cpu()
        reward, success = result.reward.tolist(), result.success.tolist()
        for i, current in enumerate(self._open):
            current.rewards.append(reward[i])
            current.total += reward[i]
            current.once |= success[i]
            current.steps += 1
            if ended[i] or not current.plan:
                self._finish_decision(current, result, i)
        finished = ended.nonzero().flatten().tolist()
        if finished:
            self._finish_episodes(finished, result)

    def _finish_decision(self, current: OpenTrajectory, result: StepResult, i: int) -> None:
        rewards = torch.zeros(self.execute)
        rewards[: len(current.rewards)] = torch.tensor(current.rewards)
        current.rows[-1] |= {
            "reward": rewards,
            "steps": torch.tensor(len(current.rewards)),
            "terminated": result.terminated[i].cpu(),
            "truncated": result.truncated[i].cpu(),
            "success": result.success[i].cpu(),
        }

    @torch.no_grad()
    def _finish_episodes(self, finished: list[int], result: StepResult) -> None:
        obs = {k: v[finished].to(self.device) for k, v in result.final_obs.items()}
        features = self.policy.encode(obs)
        for j, i in enumerate(finished):
            current = self._open[i]
            self._close(current, self._observation_row(_row(obs, j), _feature_row(features, j)))
            at_end = bool(result.success[i])
            self.stats.add(current.total, current.once, at_end, current.steps)
            self._episodes[i] += 1
            self._open[i] = OpenTrajectory()

    def _observation_row(
        self, obs: dict[str, Tensor], features: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        row = {f"obs.{k}": v.cpu() for k, v in obs.items()}
        if self.store_features:
            row |= {f"features.{k}": v.cpu() for k, v in features.items()}
        return row

    def _close(self, current: OpenTrajectory, last: dict[str, Tensor]) -> None:
        """Stacks the rows and the final observation into a trajectory."""
        first = current.rows[0]
        end = {k: last[k] if k in last else torch.zeros_like(v) for k, v in first.items()}
        rows = [*current.rows, end]
        trajectory = Trajectory({k: torch.stack([r[k] for r in rows]) for k in first})
        self.replay.add(trajectory)
        self.recent.append(trajectory)

    def pop_stats(self) -> EpisodeStats:
        """Returns the episodes finished since the last call."""
        stats, self.stats = self.stats, EpisodeStats()
        return stats

    def state_dict(self) -> dict[str, Any]:
        """Counters; episodes in progress are not kept and start anew after a resume."""
        return {"env_steps": self.env_steps, "episodes": list(self._episodes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counters; each environment goes on with its next episode's seed."""
        self.env_steps = state["env_steps"]
        self._episodes = [n + 1 for n in state["episodes"]]


def _row(obs: Obs, j: int) -> dict[str, Tensor]:
    return {k: v[j] for k, v in obs.items()}


def _feature_row(features: Features, j: int) -> dict[str, Tensor]:
    return {"vector": features.vector[j], "base_action": features.base_action[j]}
