"""Poses by numpy are ManiSkill's own, bit for bit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TASKS = ["PickCube-v1", "StackCube-v1", "PegInsertionSide-v1"]
MODES = ["pd_ee_delta_pos", "pd_ee_delta_pose"]

PLAY = """
import sys

import gymnasium as gym
import mani_skill.envs
import numpy as np
import torch

torch.set_num_threads(1)
if sys.argv[1] == "ours":
    from embodied_rl.envs import maniskill_poses

    maniskill_poses.install()
played = {}
for task in sys.argv[3].split():
    for mode in sys.argv[4].split():
        env = gym.make(task, obs_mode="state", control_mode=mode, sim_backend="physx_cpu")
        seen, actions = [env.reset(seed=3)[0]], np.random.default_rng(0)
        for _ in range(30):
            action = actions.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            obs, reward, *_ = env.step(action)
            seen += [obs, reward[:, None]]
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
    assert set(played[0]) == {f"{task} {mode}" for task in TASKS for mode in MODES}
    for name, ours in played[0].items():
        np.testing.assert_array_equal(ours, played[1][name], err_msg=name)


@pytest.mark.e2e
class TestFunctions:
    @pytest.mark.parametrize(
        ("left", "right"), [((5,), (5,)), ((1,), (5,)), ((2, 3), (3,)), ((), ())]
    )
    def test_quaternions(self, left, right):
        from embodied_rl.envs import maniskill_poses as ours

        a, b, p = torch.randn(*left, 4), torch.randn(*right, 4), torch.randn(*right, 3)
        assert torch.equal(ours.multiply(a, b), ours._multiply(a, b))
        assert torch.equal(ours.apply(a, p), ours._apply(a, p))

    @pytest.mark.parametrize(("left", "right"), [(4, 4), (1, 4), (4, 1)])
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
        for pose in (one, [one, one]):
            expected = ours._create(ours.Pose, pose).raw_pose
            assert torch.equal(ours.create(ours.Pose, pose).raw_pose, expected)
        a = ours.Pose(raw_pose=torch.randn(2, 7))
        assert torch.equal(ours.compose(a, one).raw_pose, ours._compose(a, one).raw_pose)

    def test_what_it_cannot_do_is_left_to_maniskill(self):
        from embodied_rl.envs import maniskill_poses as ours

        a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, requires_grad=True)
        assert torch.equal(ours.multiply(a, a), ours._multiply(a, a))
        assert ours.multiply(b, b).requires_grad
        with pytest.raises(ValueError, match="3D"):
            ours.apply(torch.randn(3, 4), torch.randn(3, 2))
