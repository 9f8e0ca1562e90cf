"""PickCube-v1 in ManiSkill itself: the expert, recorded .h5 files, and clean resets."""

import numpy as np
import pytest
import torch

from embodied_rl.config import EnvConfig
from embodied_rl.demonstrations import read_demos
from embodied_rl.errors import UserError

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def env():
    from embodied_rl.envs.maniskill import ManiSkillEnv

    opened = ManiSkillEnv(EnvConfig(render_size=32))
    yield opened
    opened.close()


def play(env, expert, seed: int):
    """States [51, 42] and success [50] of one expert episode."""
    expert.reset()
    state, states, success = env.reset(seed, rebuild=True)["state"], [], []
    states.append(state)
    for _ in range(env.spec.max_episode_steps):
        obs, _, _, _, ok = env.step(expert.act({"state": state}, env.position))
        state = obs["state"]
        states.append(state)
        success.append(ok)
    return np.stack(states), np.array(success)


def test_expert_succeeds_and_holds(env):
    from embodied_rl.envs.experts import PickCubeExpert

    outcomes = [play(env, PickCubeExpert(), seed)[1] for seed in range(3)]
    assert all(success.any() and success[-1] for success in outcomes)


def test_reset_after_a_grasp(env):
    """After an episode that ends with the cube in hand, the next one starts clean."""
    from embodied_rl.envs.experts import IS_GRASPED, PickCubeExpert

    first, _ = play(env, PickCubeExpert(), 1)
    held, _ = play(env, PickCubeExpert(), 2)
    assert held[-1, IS_GRASPED] == 1
    assert env.reset(1)["state"][IS_GRASPED] == 0, "a plain reset, as autoreset does"
    again, _ = play(env, PickCubeExpert(), 1)
    assert np.array_equal(first, again)


def test_evaluation_does_not_depend_on_what_ran_before():
    """PhysX carries state over a plain reset, which is why `VecEnv.reset` rebuilds the scene."""
    from embodied_rl.builders import build_env
    from embodied_rl.evaluator import Evaluator
    from embodied_rl.policy import Policy

    cpu, policy = torch.device("cpu"), Policy.from_pretrained("pickcube_state_bc")
    env = build_env(EnvConfig(render_size=32), 1, cpu)
    evaluator = Evaluator(env, 3, cpu)
    try:
        first = evaluator.run(policy, 0).stats.returns
        evaluator.run(policy, 50)
        assert evaluator.run(policy, 0).stats.returns == first
    finally:
        env.close()


def test_resume_in_the_middle_of_an_episode():
    """Two worker processes agree bit for bit, because a resume repeats all since the rebuild."""
    from embodied_rl.envs.maniskill import ManiSkillEnv
    from embodied_rl.envs.worker import WorkerVecEnv

    config = EnvConfig(render_size=32, max_episode_steps=12)
    first, second = (WorkerVecEnv(ManiSkillEnv, (config,), 1, rebuild_every=3) for _ in range(2))
    rng = torch.Generator().manual_seed(0)
    seeds = iter(range(100, 200))

    def advance(env, actions):
        results = []
        for action, seed in actions:
            env.send(action[None], [seed])
            results.append(env.recv())
        return [(r.obs["state"], r.final_obs["state"], r.reward) for r in results]

    def choose(count):
        return [(torch.rand(4, generator=rng) * 2 - 1, next(seeds)) for _ in range(count)]

    try:
        first.reset([5])
        advance(first, choose(30))  # two episodes and a half
        state, following = first.state_dict(), choose(30)  # beyond the next rebuild
        second.reset([6])
        _, restarted = second.resume(state, [0])
        assert not restarted.any()
        for one, two in zip(advance(first, following), advance(second, following), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    finally:
        first.close()
        second.close()


def test_reads_what_maniskill_records(tmp_path):
    import gymnasium as gym
    import mani_skill.envs  # noqa: F401 - registers the tasks
    from mani_skill.utils.wrappers import RecordEpisode

    inner = gym.make(
        "PickCube-v1",
        obs_mode="state",
        control_mode="pd_ee_delta_pos",
        reward_mode="normalized_dense",
        sim_backend="physx_cpu",
        render_backend="cpu",
        max_episode_steps=6,
    )
    recorder = RecordEpisode(
        inner, str(tmp_path), save_trajectory=True, save_video=False, record_reward=True
    )
    rng = np.random.default_rng(0)
    observed, actions, rewards = [], [], []
    for seed in range(2):
        obs, _ = recorder.reset(seed=seed)
        observed.append([obs[0].numpy()])
        for _ in range(6):
            action = rng.uniform(-1, 1, 4).astype(np.float32)
            obs, reward, *_ = recorder.step(action)
            observed[-1].append(obs[0].numpy())
            actions.append(action)
            rewards.append(float(reward))
    recorder.close()
    (path,) = tmp_path.glob("*.h5")
    trajectories = read_demos(path)
    assert [t.length for t in trajectories] == [6, 6]
    for trajectory, states in zip(trajectories, observed, strict=True):
        assert np.array_equal(trajectory.fields["obs.state"].numpy(), np.stack(states))
        assert not trajectory.fields["terminated"].any()
    stacked = torch.cat([t.fields["action"][:-1, 0] for t in trajectories]).numpy()
    assert np.array_equal(stacked, np.stack(actions))
    gains = torch.cat([t.fields["reward"][:-1, 0] for t in trajectories]).numpy()
    np.testing.assert_allclose(gains, rewards, rtol=1e-6)


def test_maniskill_loads_what_we_write(tmp_path):
    """Its data set class and its merge tool, on a real demonstration folder."""
    from mani_skill.trajectory.dataset import ManiSkillTrajectoryDataset
    from mani_skill.trajectory.merge_trajectory import merge_trajectories

    from embodied_rl.demonstrations import find_demos
    from embodied_rl.replay.__main__ import main
    from embodied_rl.replay.reader import read_all

    folder = find_demos(None, "pickcube_state_bc")
    assert folder is not None
    ours, paths = read_all(folder), [tmp_path / "a.h5", tmp_path / "b.h5"]
    for path in paths:
        assert main(["export", str(folder), f"out={path}"]) == 0
    loaded = ManiSkillTrajectoryDataset(str(paths[0]))
    assert loaded.env_id == "PickCube-v1" and len(loaded) == sum(t.length for t in ours)
    values = {"obs.state": loaded.obs, "success": loaded.success, "truncated": loaded.truncated}
    for name, value in values.items():
        wanted = torch.cat([t.fields[name][:-1] for t in ours]).numpy()
        assert np.array_equal(value, wanted), name
    wanted = torch.cat([t.fields["action"][:-1, 0] for t in ours]).numpy()
    assert np.array_equal(loaded.actions, wanted)
    wanted = torch.cat([t.fields["reward"][:-1, 0] for t in ours]).numpy()
    assert np.array_equal(loaded.rewards, wanted)
    merge_trajectories(str(tmp_path / "both.h5"), paths)
    assert len(read_demos(tmp_path / "both.h5")) == 2 * len(ours)


def test_other_h5_is_refused(tmp_path):
    import h5py

    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=[1, 2])
    with pytest.raises(UserError, match="is not a ManiSkill trajectory file"):
        read_demos(path)
