"""What ManiSkill's controllers do with an action, for simulation on the CPU: the same, sooner.

Left out is what the CPU's way does not use: the tool's pose a second time, and a rotation for the
solver on a GPU. The rest is done by numpy, as in `maniskill_poses`; results are equal bit for bit
(tests/test_maniskill_poses.py). Only `maniskill.py` may use this.
"""

from __future__ import annotations

from typing import Any

import mani_skill
import numpy as np
import sapien
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPosController
from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicController
from mani_skill.agents.controllers.utils.kinematics import Kinematics
from mani_skill.utils import gym_utils
from mani_skill.utils.structs.articulation import Articulation
from mani_skill.utils.structs.pose import Pose

from embodied_rl.envs.maniskill_poses import plain

SAME_AS = ("3.0.1",)  # releases of ManiSkill whose controllers these are
HALF = np.float32(0.5)

_scale, _act = gym_utils.clip_and_scale_action, PDEEPosController.set_action
_solve, _mimic = Kinematics.compute_ik, PDJointPosMimicController.set_action
_drive = Articulation.set_joint_drive_targets


def install() -> None:
    """Puts them in the place of ManiSkill's own, which still serve everything but CPU tensors.

    Not in the place of another release's, which may do something else.
    """
    if mani_skill.__version__ not in SAME_AS:
        return
    gym_utils.clip_and_scale_action = scale
    PDEEPosController.set_action = act  # type: ignore[method-assign]
    Kinematics.compute_ik = solve  # type: ignore[method-assign]
    PDJointPosMimicController.set_action = mimic  # type: ignore[method-assign]
    Articulation.set_joint_drive_targets = drive  # type: ignore[method-assign]


def scale(action: Any, low: Any, high: Any) -> Any:
    """Actions [..., A] clipped to [-1, 1], which then means `low` to `high`."""
    if not (plain(action) and plain(low) and plain(high)):
        return _scale(action, low, high)
    least, most = low.numpy(), high.numpy()
    clipped = np.minimum(np.maximum(action.numpy(), -1), 1)
    return torch.from_numpy(HALF * (most + least) + HALF * (most - least) * clipped)


def act(self: PDEEPosController, action: Any) -> None:
    """Sets the joints' targets to those that bring the tool to its own target."""
    if self.scene.gpu_sim_enabled:
        _act(self, action)
        return
    action = self._preprocess_action(action)
    self._step, self._start_qpos = 0, self.qpos
    before = self._target_pose if self.config.use_target else self.ee_pose_at_base
    self._target_pose = self.compute_target_pose(before, action)
    found = self.kinematics.compute_ik(pose=self._target_pose, q0=self.articulation.get_qpos())
    self._target_qpos = self._start_qpos if found is None else found
    _set_out(self)


def solve(self: Kinematics, pose: Any, q0: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Joint positions [1, J] at which the tool is at `pose`; None: the solver found none."""
    own = isinstance(pose, Pose) and plain(pose.raw_pose) and pose.raw_pose.shape == (1, 7)
    if self.use_gpu_ik or not own or not plain(q0):
        return _solve(self, pose, q0, *args, **kwargs)
    place = pose.raw_pose.numpy()[0]
    result, success, _ = self.pmodel.compute_inverse_kinematics(
        self.end_link_idx,
        sapien.Pose(place[:3], place[3:]),
        initial_qpos=q0.numpy()[0, self.pmodel_active_joint_indices.numpy()],
        active_qmask=self.qmask,
        max_iterations=100,
    )
    if not success:
        return None
    joints = result[self.pmodel_controlled_joint_indices.numpy()]
    return torch.from_numpy(joints[None].astype(np.float32))


def mimic(self: Any, action: Any) -> None:
    """Sets the targets of a gripper, whose fingers move alike."""
    if self.scene.gpu_sim_enabled or self.config.use_delta or not plain(self._target_qpos):
        _mimic(self, action)
        return
    action = self._preprocess_action(action)
    self._step, self._start_qpos = 0, self.qpos
    targets = self._target_qpos.numpy()  # the same memory
    targets[:, self.control_joint_indices.numpy()] = action.numpy()
    copied = targets[:, self.mimic_control_joint_indices.numpy()]
    copied = copied * self._multiplier.numpy()[None] + self._offset.numpy()[None]
    targets[:, self.mimic_joint_indices.numpy()] = copied
    _set_out(self)


def drive(self: Articulation, targets: Any, joints: Any = None, joint_indices: Any = None) -> None:
    """Tells the motors of `joints` their targets [1, J]."""
    if self.scene.gpu_sim_enabled or joints is None or not plain(targets):
        _drive(self, targets, joints, joint_indices)
        return
    for joint, target in zip(joints, targets.numpy().T, strict=True):
        joint._objs[0].drive_target = target


def _set_out(controller: Any) -> None:
    """Moves to the joints' targets, at once or evenly over the simulator's steps."""
    if controller.config.interpolate:
        whole = controller._target_qpos - controller._start_qpos
        controller._step_size = whole / controller._sim_steps
    else:
        controller.set_drive_targets(controller._target_qpos)
