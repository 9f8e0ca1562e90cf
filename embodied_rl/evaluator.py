"""Scores a policy on fixed seeds, and films it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch

from embodied_rl.distributed import Ranks
from embodied_rl.interfaces import VecEnv
from embodied_rl.policy import Policy
from embodied_rl.types import INSTRUCTION, EpisodeStats

FPS = 20


@dataclass
class Evaluation:
    """The episodes of one evaluation, in the order of their seeds."""

    stats: EpisodeStats
    summary: dict[str, float]


class Evaluator:
    """Runs the policy from seeds `first_seed`, `first_seed` + 1, ... to the end of each episode.

    Args:
        env: evaluation environments, apart from the training ones.
        episodes: episodes per evaluation.
        device: where the policy runs.
        ranks: processes that share the episodes, each with as many environments.
    """

    def __init__(
        self, env: VecEnv, episodes: int, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.env, self.episodes, self.device = env, episodes, device
        self.ranks = Ranks() if ranks is None else ranks

    @torch.no_grad()
    def run(
        self,
        policy: Policy,
        first_seed: int,
        *,
        deterministic: bool = True,
        video: Path | None = None,
        video_episodes: int = 4,
    ) -> Evaluation:
        """Evaluates; of all N environments the i-th runs episodes i, i + N, i + 2N, ...

        An episode whose environment is lost in the middle runs again, after the one that follows.

        Args:
            policy: acts.
            first_seed: seed of the first episode.
            deterministic: act with the mode.
            video: MP4 to write the first `video_episodes` episodes of environment 0 to: the
                other environments then need no renderer, which takes long to start on a CPU.
            video_episodes: how many of them.
        """
        n, whole = self.env.num_envs, self.env.num_envs * self.ranks.world
        first = self.ranks.rank * n  # of this process's environments among all
        own = sum(first <= e % whole < first + n for e in range(self.episodes))
        results: dict[int, tuple[float, bool, bool, int]] = {}
        episode = list(range(first, first + n))  # the episode that each environment is in
        numbers = [itertools.count(e + whole, whole) for e in episode]  # those still to come
        following = [next(more) for more in numbers]
        generator = torch.Generator(self.device).manual_seed(first_seed + first)
        obs = self.env.reset([first_seed + e for e in episode])
        told = obs.get(INSTRUCTION)  # of the episode that each environment is in
        tasks: dict[int, int] = {}  # instruction of each finished episode
        plans: list[list[torch.Tensor]] = [[] for _ in range(n)]
        totals, onces, lengths = [0.0] * n, [False] * n, [0] * n
        frames: dict[int, list[np.ndarray]] = {}
        while len(results) < own:
            deciding = [i for i in range(n) if not plans[i]]
            if deciding:
                part = {k: v[deciding].to(self.device) for k, v in obs.items()}
                actions = policy.act(part, deterministic=deterministic, generator=generator).cpu()
                for j, i in enumerate(deciding):
                    plans[i] = list(actions[j, : policy.execute_steps])
            if video is not None and episode[0] < min(video_episodes * whole, self.episodes):
                frame = self.env.render(0)
                if frame is not None:
                    frames.setdefault(episode[0], []).append(frame)
            actions = torch.stack([p.pop(0) for p in plans])
            self.env.send(actions, [first_seed + e for e in following])
            result = self.env.recv()
            obs = result.obs
            rewards, successes = result.reward.tolist(), result.success.tolist()
            ended, lost = (result.terminated | result.truncated).tolist(), result.restarted.tolist()
            for i in range(n):
                if not lost[i]:
                    totals[i] += rewards[i]
                    onces[i] |= successes[i]
                    lengths[i] += 1
                    if ended[i] and episode[i] < self.episodes:
                        results[episode[i]] = (totals[i], onces[i], successes[i], lengths[i])
                        if told is not None:
                            tasks[episode[i]] = int(told[i])
                if lost[i] or ended[i]:
                    if lost[i] and i == 0:
                        frames.pop(episode[0], None)
                    after = episode[i] if lost[i] else next(numbers[i])
                    episode[i], following[i] = following[i], after
                    totals[i], onces[i], lengths[i], plans[i] = 0.0, False, 0, []
            told = obs.get(INSTRUCTION)
        outcomes = [[e, *results[e], tasks.get(e)] for e in results]
        everything = sorted(o for part in self.ranks.gather_json(outcomes) for o in part)
        stats = EpisodeStats()
        for _, total, once, at_end, length, _ in everything:
            stats.add(total, once, at_end, length)
        tasks = {e: task for e, *_, task in everything if task is not None}
        if video is not None and frames:
            write_video(video, [frames[e] for e in sorted(frames)])
        by_task = by_instruction(stats, tasks, self.env.spec.instructions)
        return Evaluation(stats, stats.summary() | by_task)


def by_instruction(
    stats: EpisodeStats, tasks: Mapping[int, int], instructions: Sequence[str]
) -> dict[str, float]:
    """Share of each instruction's episodes in which success held at any step.

    Args:
        stats: the episodes.
        tasks: episode to index of its instruction.
        instructions: their texts; with fewer than two there is nothing to tell apart.
    """
    shares: dict[str, float] = {}
    for index, text in enumerate(instructions if len(instructions) > 1 else ()):
        won = [stats.success_once[e] for e, task in tasks.items() if task == index]
        if won:
            shares[f"success_once/{text}"] = sum(won) / len(won)
    return shares


def write_video(path: Path, episodes: list[list[np.ndarray]]) -> None:
    """Writes episodes side by side as an MP4; shorter ones hold their last frame."""
    length = max(len(e) for e in episodes)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [
        np.concatenate([e[min(t, len(e) - 1)] for e in episodes], axis=1) for t in range(length)
    ]
    imageio.mimwrite(path, frames, fps=FPS, codec="libx264", macro_block_size=2)  # type: ignore[arg-type]
