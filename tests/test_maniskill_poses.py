"""Poses and actions by numpy are ManiSkill's own, bit for bit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TASKS = ["PickCube-v1", "StackCube-v1", "PegInsertionSide-v1"]
MODES = ["pd_ee_delta_pos", "pd_ee_target_delta_pos", "pd_ee_delta_pose", "pd_joint_delta_pos"]

PLAY = """
import sys

import gymnasium as gym
import mani_skill.envs
import numpy as np
import torch

torch.set_num_threads(1)
if sys.argv[1] == "ours":
    from embodied_rl.envs import maniskill_actions, maniskill_contacts, maniskill_poses

    for sooner in (maniskill_poses, maniskill_contacts, maniskill_actions):
        sooner.install()
played = {}


def towards_the_cube(env):
    tool = env.unwrapped.agent.tcp.pose.p
    way = (env.unwrapped.cube.pose.p - tool)[0].numpy()
    close = np.abs(way).max() < 0.01
    return np.array([*np.clip(10 * way, -1, 1), -1 if close else 1], np.float32)


for task in sys.argv[3].split():
    for mode in [*sys.argv[4].split(), "grasp"][: None if task == "PickCube-v1" else -1]:
        grasp = mode == "grasp"
        control_mode = "pd_ee_delta_pos" if grasp else mode
        env = gym.make(task, obs_mode="state", control_mode=control_mode, sim_backend="physx_cpu")
        seen, actions = [env.reset(seed=3)[0]], np.random.default_rng(0)
        for _ in range(30):
            random = actions.uniform(-1.2, 1.2, env.action_space.shape).astype(np.float32)
            action = towards_the_cube(env) if grasp else random
            obs, reward, *_, info = env.step(action)
            seen += [obs, reward[:, None]]
        if grasp:
            assert info["is_grasped"].all()
        played[f"{task} {mode}"] = torch.cat(seen, 1).numpy()
        env.close()
np.savez(sys.argv[2], **played)
"""


@pytest.mark.e2e
def test_episodes_are_those_of_maniskill_alone(tmp_path):
    played = []
    for whose in ("ours", "theirs"):
        out = tmp_path / f"{whose}.npz"
        words = [sys.executable, "-c", PLAY, whose, str(out), " ".join(TASKS), " ".join(MODES)]
        subprocess.run(words, check=True, cwd=Path(__file__).parent.parent, timeout=600)
        played.append(dict(np.load(out)))
    assert set(played[0]) == {f"{t} {m}" for t in TASKS for m in MODES} | {"PickCube-v1 grasp"}
    for name, ours in played[0].items():
        np.testing.assert_array_equal(ours, played[1][name], err_msg=name)


@pytest.mark.e2e
class TestFunctions:
    @pytest.mark.parametrize(
        ("left", "right"),
        [((5,), (5,)), ((1,), (5,)), ((2, 3), (3,)), ((), ()), ((1,), (1,)), ((1,), ())],
    )
    def test_quaternions(self, left, right):
        from embodied_rl.envs import maniskill_poses as ours

        a, b, p = torch.randn(*left, 4), torch.randn(*right, 4), torch.randn(*right, 3)
        assert torch.equal(ours.multiply(a, b), ours._multiply(a, b))
        assert torch.equal(ours.apply(a, p), ours._apply(a, p))

    @pytest.mark.parametrize(("left", "right"), [(1, 1), (4, 4), (1, 4), (4, 1)])
    def test_poses(self, left, right):
        from embodied_rl.envs import maniskill_poses as ours

        a, b = (ours.Pose(raw_pose=torch.randn(n, 7)) for n in (left, right))
        assert torch.equal(ours.compose(a, b).raw_pose, ours._compose(a, b).raw_pose)
        assert torch.equal(ours.invert(a).raw_pose, ours._invert(a).raw_pose)
        assert torch.equal(ours.matrix(b), ours._matrix(b))

    def test_of_the_simulator(self):
        import sapien

        from embodied_rl.envs import maniskill_poses as ours

        one = sapien.Pose([1, 2, 3], [0.5, 0.5, -0.5, 0.5])
        for pose in (one, [one], [one, one], torch.randn(3), torch.randn(1, 3), torch.randn(2, 3)):
            expected = ours._create(ours.Pose, pose).raw_pose
            assert torch.equal(ours.create(ours.Pose, pose).raw_pose, expected)
        a = ours.Pose(raw_pose=torch.randn(2, 7))
        assert torch.equal(ours.compose(a, one).raw_pose, ours._compose(a, one).raw_pose)

    def test_angles(self):
        from embodied_rl.envs.maniskill_contacts import _angle, angle

        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(300, 3, generator=generator)
        forces = (
            torch.randn(300, 3, generator=generator) * 10 ** torch.linspace(-9, 4, 300)[:, None]
        )
        forces[0] = 0.0
        forces[1], forces[2] = directions[1], -directions[2]
        for direction, force in zip(directions, forces, strict=True):
            assert torch.equal(
                angle(direction[None], force[None]), _angle(direction[None], force[None])
            )
        assert torch.equal(angle(directions, forces), _angle(directions, forces))
        assert angle(torch.full((1, 3), torch.nan), forces[:1]).isnan().all()
        infinite = torch.tensor([[torch.inf, 0.0, 0.0]])
        with np.errstate(invalid="ignore"):
            assert angle(infinite, forces[3:4]).isnan().all()
        assert _angle(infinite, forces[3:4]).isnan().all()

    def test_actions_out_of_bounds(self):
        from embodied_rl.envs.maniskill_actions import _scale, scale

        action = torch.tensor([[-3.0, -1.0, -0.0, 0.3, 1.0, 7.0, torch.nan]])
        low, high = torch.linspace(-1, 0.1, 7), torch.linspace(0.2, 3, 7)
        torch.testing.assert_close(
            scale(action, low, high), _scale(action, low, high), rtol=0, atol=0, equal_nan=True
        )

    def test_impulses(self):
        import types

        from embodied_rl.envs.maniskill_contacts import total_impulse

        rng = np.random.default_rng(0)
        contacts = []
        for count, positive in ((4, True), (1, False), (0, True), (3, False)):
            impulses = rng.normal(size=(count, 3)).astype(np.float32)
            points = [types.SimpleNamespace(impulse=impulse) for impulse in impulses]
            contacts.append((types.SimpleNamespace(points=points), positive))
        for some in ([], contacts[:1], contacts):
            expected = np.zeros(3)  # as `sapien_utils.compute_total_impulse` of ManiSkill 3.0.1
            for contact, positive in some:
                impulse = np.sum([point.impulse for point in contact.points], axis=0)
                expected += impulse * (1 if positive else -1)
            assert np.array_equal(total_impulse(some), expected)

    def test_another_release_keeps_its_controllers(self, monkeypatch):
        from mani_skill.utils import gym_utils

        from embodied_rl.envs import maniskill_actions

        before = gym_utils.clip_and_scale_action
        monkeypatch.setattr(maniskill_actions, "SAME_AS", ())
        maniskill_actions.install()
        assert gym_utils.clip_and_scale_action is before

    def test_what_it_cannot_do_is_left_to_maniskill(self):
        from embodied_rl.envs import maniskill_poses as ours

        a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, requires_grad=True)
        assert torch.equal(ours.multiply(a, a), ours._multiply(a, a))
        assert ours.multiply(b, b).requires_grad
        with pytest.raises(ValueError, match="3D"):
            ours.apply(torch.randn(3, 4), torch.randn(3, 2))
