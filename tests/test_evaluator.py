"""Scores on fixed seeds, on the fake environment."""

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from embodied_rl.evaluator import Evaluator, write_video

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


@pytest.fixture
def evaluate(make_env):
    def run(policy, first_seed=0, *, episodes=5, num_envs=2, task="reach", limit=20, **settings):
        env = make_env(task, num_envs, limit)
        return Evaluator(env, episodes, CPU).run(policy, first_seed, **settings)

    return run


def start(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, 2)


def test_by_hand(evaluate, scripted, to_origin):
    """Each episode by simulation in NumPy: reward is minus the distance after the step."""
    stats = evaluate(scripted(to_origin), 40, limit=6).stats
    for i in range(5):
        position, total, success = start(40 + i), 0.0, []
        for _ in range(6):
            position = position + 0.2 * np.clip(-position / 0.2, -1, 1)
            distance = float(np.hypot(*position))
            total -= distance
            success.append(distance < 0.15)
        assert stats.returns[i] == pytest.approx(total, abs=1e-5)
        assert stats.success_once[i] == any(success) and stats.success_at_end[i] == success[-1]
    assert stats.lengths == [6] * 5


@pytest.mark.parametrize("task", ["reach", "reach-terminates"])
def test_results_do_not_depend_on_the_number_of_environments(evaluate, scripted, to_origin, task):
    slow = scripted(lambda s: to_origin(s) * 0.6)
    results = [evaluate(slow, 7, num_envs=n, task=task).stats for n in (1, 2, 3, 8)]
    assert all(len(r) == 5 for r in results)
    assert all(r == results[0] for r in results), "in the order of the seeds"
    if task == "reach-terminates":
        assert len(set(results[0].lengths)) > 1 and all(results[0].success_at_end)


def test_seeds_are_fixed(evaluate, scripted, to_origin):
    policy = scripted(to_origin)
    assert evaluate(policy, 3).stats == evaluate(policy, 3).stats
    first, shifted = evaluate(policy, 3).stats, evaluate(policy, 4).stats
    assert first.returns[1:] == shifted.returns[:-1]
    assert first.returns[0] != shifted.returns[0]


def test_success_once_and_at_end(evaluate, scripted, through_origin, to_origin):
    summary = evaluate(scripted(through_origin)).summary
    assert summary["success_once"] == 1.0 and summary["success_at_end"] == 0.0
    summary = evaluate(scripted(to_origin)).summary
    assert summary["success_once"] == summary["success_at_end"] == 1.0


def test_summary_is_the_mean(evaluate, scripted, to_origin):
    result = evaluate(scripted(lambda s: to_origin(s) * 0.3), limit=12)
    assert result.summary["return"] == pytest.approx(np.mean(result.stats.returns), rel=1e-12)
    once = np.mean(result.stats.success_once)
    assert result.summary["success_once"] == pytest.approx(once, rel=1e-12)
    assert 0 < once < 1, "some and not all, so that the mean says something"
    assert result.summary["episode_length"] == 12


def test_chunked_execution(evaluate, scripted):
    """Chunks of three of which two are executed: x moves 0.02, 0.04, 0.02, 0.04, 0.02."""

    def script(state):
        return torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.9, 0.0]]).expand(len(state), 3, 2)

    policy = scripted(script, chunk=3, execute=2)
    stats = evaluate(policy, 9, episodes=1, num_envs=1, limit=5).stats
    x, y = start(9)
    path = x + np.array([0.02, 0.06, 0.08, 0.12, 0.14])
    assert stats.returns == [pytest.approx(-np.hypot(path, y).sum(), abs=1e-5)]
    assert [int(s[3]) for s in policy.backbone.asked] == [0, 2, 4]


def test_a_chunk_never_reaches_into_the_next_episode(evaluate, scripted):
    """Limit 4, chunks of three: decisions at 0 and 3, then a fresh one for the new episode."""
    policy = scripted(lambda s: torch.zeros(len(s), 3, 2), chunk=3)
    evaluate(policy, episodes=2, num_envs=1, limit=4)
    assert [int(s[3]) for s in policy.backbone.asked] == [0, 3, 0, 3]
    assert [int(s[2]) for s in policy.backbone.asked] == [0, 0, 1, 1]


def test_deterministic_or_sampled(evaluate, make_policy):
    policy = make_policy("actor.initial_std=0.5")
    assert evaluate(policy).stats == evaluate(policy).stats
    noisy = [evaluate(policy, deterministic=False).stats.returns for _ in range(2)]
    assert noisy[0] != noisy[1] != evaluate(policy).stats.returns


def test_evaluation_leaves_the_generator_alone(evaluate, make_policy):
    """A run with more evaluations must not train differently."""
    policy, before = make_policy(), torch.get_rng_state()
    evaluate(policy)
    assert torch.equal(torch.get_rng_state(), before)


def test_video(evaluate, scripted, to_origin, tmp_path):
    """Three episodes side by side, as long as the longest of them."""
    path = tmp_path / "deep" / "video.mp4"
    policy = scripted(lambda s: to_origin(s) * 0.6)
    filmed = evaluate(policy, task="reach-terminates", video=path, video_episodes=3)
    plain = evaluate(policy, task="reach-terminates")
    assert filmed.stats == plain.stats
    frames = list(imageio.get_reader(path).iter_data())
    assert frames[0].shape == (64, 3 * 64, 3)
    assert len(frames) == max(filmed.stats.lengths[:5:2])  # environment 0 of 2 has 0, 2 and 4


def test_write_video_holds_the_last_frame(tmp_path):
    dark, bright = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 250, np.uint8)
    write_video(tmp_path / "v.mp4", [[dark] * 4, [dark, bright]])
    frames = list(imageio.get_reader(tmp_path / "v.mp4").iter_data())
    assert len(frames) == 4
    right = [float(f[:, 80:].mean()) for f in frames]  # compression: compare with a wide margin
    assert right[0] < 20 and min(right[1:]) > 230
    assert max(float(f[:, :48].mean()) for f in frames) < 20
