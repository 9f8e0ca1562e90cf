"""Runs a policy in a vector environment and turns its steps into trajectories."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.config import RolloutConfig
from embodied_rl.distributed import Ranks
from embodied_rl.episode import Episode, Row
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
        self._episodes = [Episode() for _ in range(env.num_envs)]
        self._obs: Obs | None = None  # what to act on next
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

    def _seeds(self, ahead: int = 0) -> list[int]:
        first = self.ranks.rank * self.env.num_envs  # of this process's environments among all
        return [episode_seed(self.seed, first + i, n + ahead) for i, n in enumerate(self._numbers)]

    def _drop(self, env: int) -> None:
        self.dropped += 1
        self._next_episode(env)

    def _next_episode(self, env: int) -> None:
        self._numbers[env] += 1
        self._episodes[env] = Episode()

    @property
    def deciding(self) -> list[int]:
        """Environments whose next step needs a new decision."""
        return [i for i, episode in enumerate(self._episodes) if episode.undecided]

    @torch.no_grad()
    def begin(self) -> None:
        """Decides where a chunk is used up, and starts one environment step."""
        assert self._obs is not None, "call start() first"
        deciding = self.deciding
        if deciding:
            obs = {k: v[deciding].to(self.device) for k, v in self._obs.items()}
            features = self.policy.encode(obs)
            chosen = self._explore(features)
            chunks = self.policy.decode(features, chosen).cpu()
            chosen = chosen.cpu()
            self._check("in the policy's actions", {"action": chosen, "executed": chunks})
            for j, i in enumerate(deciding):
                self._decide(i, self._observation(obs, features, j), chosen[j], chunks[j])
        actions = torch.stack([e.next_action() for e in self._episodes])
        self.env.send(actions, self._seeds(ahead=1))

    def _explore(self, features: Features) -> Tensor:
        actor = self.policy.actor
        if self.env_steps < self.config.random_steps:
            like = features.base_action if actor is None else actor.anchor(features)
            return torch.rand_like(like) * 2 - 1
        if actor is None:
            return features.base_action
        return actor.explore(features, self.env_steps).action

    def _decide(self, i: int, row: Row, action: Tensor, chunk: Tensor) -> None:
        if self._episodes[i].rows >= self.config.max_trajectory_steps:
            self._store(self._episodes[i].close(row))
        self._episodes[i].decide(row, action, chunk[: self.execute])

    def end(self) -> None:
        """Waits for the step and books it; finished episodes go to replay."""
        result = self.env.recv()
        arrived = {f"obs.{k}": v for k, v in result.obs.items()}
        arrived |= {f"final_obs.{k}": v for k, v in result.final_obs.items()}
        self._check("in the step of the environments", {"reward": result.reward, **arrived})
        self._obs = result.obs
        self.env_steps += self.env.num_envs * self.ranks.world
        ended, lost = (result.terminated | result.truncated).tolist(), result.restarted.tolist()
        reward, success = result.reward.tolist(), result.success.tolist()
        for i, episode in enumerate(self._episodes):
            if lost[i]:
                self._drop(i)
                continue
            episode.book(reward[i], success[i])
            if ended[i] or episode.undecided:
                episode.finish_decision(result, i, self.execute)
        finished = [i for i in range(self.env.num_envs) if ended[i] and not lost[i]]
        if finished:
            self._finish_episodes(finished, result)

    @torch.no_grad()
    def _finish_episodes(self, finished: list[int], result: StepResult) -> None:
        obs = {k: v[finished].to(self.device) for k, v in result.final_obs.items()}
        features = self.policy.encode(obs)
        for j, i in enumerate(finished):
            episode = self._episodes[i]
            self._store(episode.close(self._observation(obs, features, j)))
            at_end = bool(result.success[i])
            self.stats.add(episode.total, episode.once, at_end, episode.steps)
            self._next_episode(i)

    def _observation(self, obs: Obs, features: Features, j: int) -> Row:
        row = {f"obs.{k}": v[j].cpu() for k, v in obs.items()}
        if self.store_features:
            row |= {k: v[j].cpu() for k, v in features.tensors().items()}
        return row

    def _store(self, trajectory: Trajectory) -> None:
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
            "episodes": [e.state_dict() for e in self._episodes],
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
        for episode, saved in zip(self._episodes, state["episodes"], strict=True):
            episode.load_state_dict(saved)
        self._saved = state["env"]
