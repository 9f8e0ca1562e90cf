"""Runs a policy in a vector environment and turns its steps into trajectories."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.config import RolloutConfig
from embodied_rl.distributed import Ranks
from embodied_rl.episodes import FLAGS, Episodes, Rows
from embodied_rl.guard import Guard
from embodied_rl.interfaces import TrajectorySink, VecEnv
from embodied_rl.policy import Policy
from embodied_rl.types import EpisodeStats, Features, Obs, StepResult, Trajectory

RECENT = 8  # finished trajectories kept at hand
TRAIN_SEEDS = 2**30  # training episodes take seeds from here up, evaluations below


def episode_seed(run_seed: int, env: int, episode: int) -> int:
    """Seed of one training episode: a hash of run, environment and episode number."""
    words = np.random.SeedSequence([run_seed, env, episode]).generate_state(1)
    return TRAIN_SEEDS + int(words[0]) % TRAIN_SEEDS


def check_environments(state: dict[str, Any], num_envs: int) -> None:
    """Raises ValueError if a collector's state is of another number of environments."""
    if len(state["numbers"]) != num_envs:
        raise ValueError(
            f"the checkpoint has {len(state['numbers'])} environments, env.num_envs is {num_envs}."
        )


class Collector:
    """Steps the environments with the exploring policy and fills the replay buffer.

    `begin` chooses actions and starts the step, `end` waits for it: updates may run in between
    while worker processes simulate.

    Args:
        env: the training environments.
        policy: backbone and actor; None-actor policies act with their base action.
        replay: receives every finished trajectory.
        config: chunk execution, random phase and the length of replay pieces.
        guard: checks what the environments return and what they are sent.
        store_features: put the backbone's features into the trajectories.
        seed: of the training episodes.
        device: where the policy runs.
        ranks: processes that collect beside this one, each with as many environments.

    Attributes:
        env_steps: steps of all environments of all processes together, those of dropped episodes
            included.
        dropped: episodes lost in progress: a worker died, or a resume could not re-create them.
        recent: the latest finished trajectories, for diagnostics.
    """

    def __init__(
        self,
        env: VecEnv,
        policy: Policy,
        replay: TrajectorySink,
        config: RolloutConfig,
        guard: Guard,
        *,
        store_features: bool,
        seed: int,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = Ranks() if ranks is None else ranks
        self.env, self.policy, self.replay, self.config = env, policy, replay, config
        self.guard, self.store_features, self.seed, self.device = (
            guard,
            store_features,
            seed,
            device,
        )
        self.execute = policy.execute_steps
        self.env_steps, self.dropped = 0, 0
        self.stats = EpisodeStats()
        self.recent: deque[Trajectory] = deque(maxlen=RECENT)
        self._numbers = [0] * env.num_envs  # of each environment's present episode
        self._following = self._seeds(ahead=1)  # seeds of the episodes after the present ones
        self._episodes = Episodes(env.num_envs, self.execute, env.device)
        self._obs: Obs | None = None  # what to act on next
        self._arrived: StepResult | None = None  # the step that waits to be booked
        self._saved: dict[str, Any] | None = None  # state of the environments to go back to

    def start(self) -> int:
        """Starts the first episodes, or goes on with those of a checkpoint.

        Returns:
            How many of the checkpoint's episodes the simulator did not come back to. They are
            dropped, and their environments begin their next episodes.
        """
        different: list[int] = []
        if self._saved is None:
            self._obs = self.env.reset(self._seeds())
        else:
            self._obs, restarted = self.env.resume(self._saved, self._seeds(ahead=1))
            different = restarted.nonzero().flatten().tolist()
        for i in different:
            self._drop(i)
        self._check("at the start of the episodes", {f"obs.{k}": v for k, v in self._obs.items()})
        return len(different)

    def _seed(self, env: int, ahead: int) -> int:
        first = self.ranks.rank * self.env.num_envs  # of this process's environments among all
        return episode_seed(self.seed, first + env, self._numbers[env] + ahead)

    def _seeds(self, ahead: int = 0) -> list[int]:
        return [self._seed(env, ahead) for env in range(self.env.num_envs)]

    def _drop(self, env: int) -> None:
        self.dropped += 1
        self._next_episode(env)

    def _next_episode(self, env: int) -> None:
        self._numbers[env] += 1
        self._following[env] = self._seed(env, ahead=1)
        self._episodes.restart(env)

    @property
    def deciding(self) -> np.ndarray:
        """Environments whose next step needs a new decision."""
        return self._episodes.undecided.nonzero()[0]

    @torch.no_grad()
    def begin(self) -> None:
        """Decides where a chunk is used up, and starts one environment step."""
        assert self._obs is not None, "call start() first"
        deciding = self.deciding
        if len(deciding):
            everyone, at = len(deciding) == self.env.num_envs, torch.from_numpy(deciding)
            obs = {k: (v if everyone else v[at]).to(self.device) for k, v in self._obs.items()}
            features = self.policy.encode(obs)
            chosen = self._explore(features)
            chunks = self.policy.decode(features, chosen)
            self._check("in the policy's actions", {"action": chosen, "executed": chunks})
            self._decide(deciding, self._observations(obs, features), chosen, chunks)
        self.env.send(self._episodes.next_actions(), list(self._following))

    def _explore(self, features: Features) -> Tensor:
        actor = self.policy.actor
        if self.env_steps < self.config.random_steps:
            like = features.base_action if actor is None else actor.anchor(features)
            return torch.rand_like(like) * 2 - 1
        if actor is None:
            return features.base_action
        return actor.explore(features, self.env_steps)

    def _decide(self, envs: np.ndarray, observed: Rows, action: Tensor, chunk: Tensor) -> None:
        full = np.flatnonzero(self._episodes.rows[envs] >= self.config.max_trajectory_steps)
        if len(full):
            last = {k: v[torch.from_numpy(full)] for k, v in observed.items()}
            self._store(self._episodes.close(envs[full], last))
        self._episodes.decide(envs, {**observed, "action": action}, chunk[:, : self.execute])

    def wait(self) -> None:
        """Waits for the step; `end` then has nothing to wait for."""
        self._arrived = self.env.recv()

    def end(self) -> None:
        """Waits for the step and books it; finished episodes go to replay."""
        if self._arrived is None:
            self.wait()
        result, self._arrived = self._arrived, None
        assert result is not None
        arrived = {f"obs.{k}": v for k, v in result.obs.items()}
        if result.final_obs is not result.obs:
            arrived |= {f"final_obs.{k}": v for k, v in result.final_obs.items()}
        self._check("in the step of the environments", {"reward": result.reward, **arrived})
        self._obs = result.obs
        self.env_steps += self.env.num_envs * self.ranks.world
        flags = {name: getattr(result, name).cpu().numpy() for name in FLAGS}
        lost, ended = result.restarted.cpu().numpy(), flags["terminated"] | flags["truncated"]
        for env in lost.nonzero()[0].tolist():
            self._drop(env)
        envs = (~lost).nonzero()[0]
        self._episodes.book(envs, result.reward.cpu().numpy()[envs], flags["success"][envs])
        decided = (~lost & (ended | self._episodes.undecided)).nonzero()[0]
        self._episodes.finish_decisions(decided, {k: v[decided] for k, v in flags.items()})
        finished = (~lost & ended).nonzero()[0]
        if len(finished):
            self._finish_episodes(finished, result.final_obs, flags["success"])

    @torch.no_grad()
    def _finish_episodes(self, envs: np.ndarray, final_obs: Obs, success: np.ndarray) -> None:
        obs = {k: v[torch.from_numpy(envs)].to(self.device) for k, v in final_obs.items()}
        self._store(self._episodes.close(envs, self._observations(obs, self.policy.encode(obs))))
        totals, onces, steps = (
            getattr(self._episodes, name)[envs].tolist() for name in ("totals", "onces", "steps")
        )
        for env, total, once, length in zip(envs.tolist(), totals, onces, steps, strict=True):
            self.stats.add(total, once, bool(success[env]), length)
            self._next_episode(env)

    def _observations(self, obs: Obs, features: Features) -> Rows:
        rows = {f"obs.{k}": v for k, v in obs.items()}
        return rows | features.tensors() if self.store_features else rows

    def _store(self, trajectories: list[Trajectory]) -> None:
        for trajectory in trajectories:
            self.replay.add(trajectory)
            self.recent.append(trajectory)

    def _check(self, when: str, tensors: dict[str, Tensor]) -> None:
        self.guard.check(when, self.env_steps, tensors, self._context)

    def _context(self) -> dict[str, Any]:
        """What re-creates the simulators' state, and what was last seen before."""
        return {"env": self.env.state_dict(), "seen_before": self._obs}

    def pop_stats(self) -> EpisodeStats:
        """Returns the episodes finished since the last call."""
        stats, self.stats = self.stats, EpisodeStats()
        return stats

    def settle(self) -> bool:
        """Asks to stop at a point that can be saved; whether this is one, which it always is."""
        return True

    def pop_speed(self) -> dict[str, float]:
        """Figures about collecting beside the learner since the last call: none here."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Counters, the episodes in progress and the latest finished ones."""
        return {
            "env_steps": self.env_steps,
            "dropped": self.dropped,
            "stats": vars(self.stats),
            "recent": [t.fields for t in self.recent],
            "numbers": list(self._numbers),
            "episodes": self._episodes.state_dict(),
            "env": self._saved if self._obs is None else self.env.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; `start` then goes back into the episodes.

        Raises:
            ValueError: the state is of another number of environments.
        """
        check_environments(state, self.env.num_envs)
        self.env_steps, self.dropped = state["env_steps"], state["dropped"]
        self.stats = EpisodeStats(**state["stats"])
        self.recent = deque((Trajectory(fields) for fields in state["recent"]), maxlen=RECENT)
        self._numbers = list(state["numbers"])
        self._following = self._seeds(ahead=1)
        self._episodes.load_state_dict(state["episodes"])
        self._saved = state["env"]
