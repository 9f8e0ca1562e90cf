"""ManiSkill's environments that step as one, for GPUs; on the CPU ManiSkill has them with N = 1."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from embodied_rl.collector import Collector
from embodied_rl.config import EnvConfig, RolloutConfig
from embodied_rl.errors import UserError
from embodied_rl.guard import Guard
from embodied_rl.policy import Policy

CPU = torch.device("cpu")
SHORT = EnvConfig(render_size=32, max_episode_steps=9)


def open_env(config=SHORT, num_envs=1, backend="physx_cpu"):
    from embodied_rl.envs.maniskill_gpu import ManiSkillVecEnv

    return ManiSkillVecEnv(config, num_envs, backend, "cpu")


def actions(steps: int, num_envs: int = 1, size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(steps, num_envs, size, generator=generator) * 2 - 1


def advance(env, chosen, seed=100):
    results = []
    for step, action in enumerate(chosen):
        env.send(action, [seed + step] * env.num_envs)
        results.append(env.recv())
    return results


class Kept:
    """Stands where the replay buffer does."""

    def __init__(self):
        self.trajectories = []

    def add(self, trajectory):
        self.trajectories.append(trajectory)


@pytest.mark.e2e
def test_trajectories_are_those_of_a_worker_process(tmp_path):
    """Seeds, flags, autoreset and observations: the collector cannot tell the two apart."""
    from embodied_rl.envs.maniskill import make_maniskill

    collected = []
    for env in (open_env(), make_maniskill(SHORT, 1, CPU)):
        sink = Kept()
        try:
            collector = Collector(
                env,
                Policy.from_pretrained("pickcube_state_bc"),
                sink,
                RolloutConfig(random_steps=0),
                Guard(tmp_path, enabled=True),
                store_features=True,
                seed=4,
                device=CPU,
            )
            collector.start()
            for _ in range(30):
                collector.begin()
                collector.end()
        finally:
            env.close()
        collected.append([t.fields for t in sink.trajectories])
        assert collector.pop_stats().lengths == [9, 9, 9]
    one, other = collected
    assert len(one) == len(other) == 3
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("control", "observes"),
    [("pd_ee_delta_pos", "state_dict"), ("pd_joint_target_delta_pos", "state")],
)
def test_resumes_where_it_was(control, observes):
    """Another simulator, put into a saved state, goes on as the first one did.

    Positions and velocities are set exactly; PhysX's solver starts without its last impulses, which
    moves the arm by micrometres.
    """
    config = dataclasses.replace(SHORT, control_mode=control, obs_mode=observes)
    first, second = open_env(config), open_env(config)
    size = first.spec.action_dim
    try:
        first.reset([5])
        advance(first, actions(13, size=size))
        state = first.state_dict()
        shown, restarted = second.resume(state, [0])
        assert not restarted.any()
        near(shown, state["shown"], 1e-5)
        chosen = actions(8, size=size)
        for a, b in zip(advance(first, chosen), advance(second, chosen), strict=True):
            near(a.final_obs, b.final_obs, 1e-3)
            assert torch.equal(a.truncated, b.truncated)
            torch.testing.assert_close(a.reward, b.reward, rtol=0, atol=1e-3)
    finally:
        first.close()
        second.close()


def near(one, other, tolerance):
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=tolerance, msg=key)


@pytest.mark.e2e
def test_resumes_with_the_cube_in_hand():
    """Contacts are none of what is saved: they come back by a step from where everything was."""
    from embodied_rl.envs.experts import IS_GRASPED, PickCubeExpert

    env, other = open_env(EnvConfig(render_size=32)), open_env(EnvConfig(render_size=32))

    def position(name):
        found = env._task.agent.tcp if name == "tcp" else getattr(env._task, name)
        return found.pose.p[0].numpy()

    try:
        expert, shown = PickCubeExpert(), env.reset([1])["state"]
        while not shown[0, IS_GRASPED]:
            chosen = expert.act({"state": shown[0].numpy()}, position)
            (result,) = advance(env, torch.as_tensor(chosen)[None, None])
            shown = result.final_obs["state"]
        found, restarted = other.resume(env.state_dict(), [0])
        assert not restarted.any() and found["state"][0, IS_GRASPED] == 1
    finally:
        env.close()
        other.close()


@pytest.mark.e2e
def test_the_tasks_own_tensors_are_kept():
    """RollBall pays by stages that it counts itself; they are in no observation."""
    config = EnvConfig(task="RollBall-v1", control_mode="pd_joint_delta_pos", render_size=32)
    first, second = open_env(config), open_env(config)
    try:
        first.reset([5])
        first._task.reached_status[:] = 1.0
        _, restarted = second.resume(first.state_dict(), [0])
        assert not restarted.any() and second._task.reached_status.tolist() == [1.0]
    finally:
        first.close()
        second.close()


@pytest.mark.e2e
def test_a_state_of_worker_processes_is_refused():
    env = open_env()
    try:
        with pytest.raises(UserError, match=r"env\.sim_backend=physx_cpu.*policy\.path=RUN"):
            env.resume({"past": []}, [0])
    finally:
        env.close()


@pytest.mark.unit
def test_targets_of_episodes_that_go_on():
    """ManiSkill resets all controllers at a partial reset; these rows get theirs back."""
    from embodied_rl.envs.maniskill_gpu import _merged

    before = {"arm": {"target": torch.arange(4.0)[:, None]}}
    after = {"arm": {"target": -torch.ones(4, 1)}}
    merged = _merged(before, after, torch.tensor([1, 3]))
    assert merged["arm"]["target"].flatten().tolist() == [0, -1, 2, -1]


@pytest.mark.unit
def test_agreement_is_by_environment_and_not_by_pixel():
    from embodied_rl.envs.maniskill_gpu import _close

    one = {
        "x": torch.zeros(3, 2),
        "held": torch.tensor([True] * 3),
        "rgb": torch.zeros(3, 1).byte(),
    }
    other = {k: v.clone() for k, v in one.items()}
    other["x"][1, 0], other["held"][2], other["rgb"][0] = 0.01, False, 9
    assert _close(one, other).tolist() == [True, False, False]


@pytest.mark.e2e
def test_episodes_that_look_different_begin_anew():
    env = open_env()
    try:
        env.reset([5])
        advance(env, actions(3))
        state = env.state_dict()
        state["shown"] = {"state": state["shown"]["state"] + 0.01}
        shown, restarted = env.resume(state, [77])
        assert restarted.tolist() == [True]
        assert torch.equal(shown["state"], env.reset([77])["state"])
        assert advance(env, actions(9))[-1].truncated.tolist() == [True], "a whole new episode"
    finally:
        env.close()


@pytest.mark.e2e
def test_observations_are_copies():
    """ManiSkill may write the next observation into the tensors of the last one."""
    env = open_env(dataclasses.replace(SHORT, obs_mode="state_dict"))
    try:
        before = env.reset([5])
        kept = {k: v.clone() for k, v in before.items()}
        advance(env, actions(2))
        assert all(torch.equal(kept[k], before[k]) for k in kept)
        assert "agent.qpos" in kept
    finally:
        env.close()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instructions": {"PickCube-v1": "pick"}}, r"env\.instructions=.*physx_cpu"),
        ({"render_every": 4}, r"env\.render_every=4.*set env\.render_every=1"),
    ],
)
def test_refuses_what_needs_a_process_each(change, message):
    with pytest.raises(UserError, match=message):
        open_env(dataclasses.replace(SHORT, **change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_many_on_a_gpu():
    """In a process of its own: PhysX takes the GPU before anything else, or never."""
    subprocess.run([sys.executable, "-c", MANY], check=True)


MANY = """
# partial resets: those that end begin anew, the others go on; nothing leaves the GPU
import torch
from embodied_rl.config import EnvConfig
from embodied_rl.envs.maniskill_gpu import make_on_gpu

config = EnvConfig(render_size=32, max_episode_steps=9, sim_backend="physx_cuda")
env = make_on_gpu(config, 8, torch.device("cuda"))
shown = env.reset(list(range(8)))["state"]
assert shown.device.type == "cuda" and len({tuple(row.tolist()) for row in shown}) == 8
chosen, state = torch.rand(9, 8, 4, device="cuda") * 2 - 1, None
for step, action in enumerate(chosen):
    env.send(action, [50 + i for i in range(8)])
    result = env.recv()
    assert result.obs["state"].device.type == result.reward.device.type == "cuda"
    assert bool(result.truncated.all()) == (step == 8)
    state = env.state_dict() if step == 4 else state
assert not torch.equal(result.obs["state"], result.final_obs["state"])
_, restarted = env.resume(state, [90 + i for i in range(8)])
assert restarted.device.type == "cuda" and restarted.sum() <= 1
before = env._task.agent.robot.get_qpos().clone()
env._begin(torch.tensor([2], device="cuda"), [70 + i for i in range(8)])
moved = (env._task.agent.robot.get_qpos() - before).abs().amax(1) > 1e-4
assert moved.nonzero().flatten().tolist() == [2]
env.close()
"""
