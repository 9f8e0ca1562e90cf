"""ManiSkill's arithmetic of poses for simulation on the CPU: the same numbers, sooner.

A step of PickCube on a CPU is one part physics and eight parts torch operations on single
quaternions, a microsecond of work at ten of overhead each. numpy does several of them at a time,
in the same order and precision, so that results are equal bit for bit (tests/test_maniskill.py).
Only `maniskill.py` may use this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.utils.geometry import rotation_conversions
from mani_skill.utils.structs import pose as pose_module
from mani_skill.utils.structs.pose import Pose

# (a b) component c = sum over k of a[k] * b[SECOND[k, c]] * SIGN[k, c], added in the order of k
SECOND = np.array([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
SIGN = np.array([[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]], np.float32)
CPU = torch.device("cpu")
CONJUGATE = np.array([1, -1, -1, -1], np.float32)

_multiply = rotation_conversions.quaternion_raw_multiply
_apply = rotation_conversions.quaternion_apply
_create = Pose.create.__func__  # type: ignore[attr-defined]
_compose, _invert, _matrix = Pose.__mul__, Pose.inv, Pose.to_transformation_matrix


def install() -> None:
    """Puts them in the place of ManiSkill's own, which still serve everything but CPU tensors."""
    rotation_conversions.quaternion_raw_multiply = multiply
    pose_module.quaternion_apply = apply
    Pose.create = classmethod(create)  # type: ignore[assignment, method-assign]
    Pose.__mul__, Pose.inv = compose, invert  # type: ignore[method-assign]
    Pose.to_transformation_matrix = matrix  # type: ignore[method-assign]


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of quaternions [..., 4], real part first."""
    if not (_plain(a) and _plain(b)):
        return _multiply(a, b)
    return torch.from_numpy(_product(a.numpy(), b.numpy()))


def apply(quaternion: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Points [..., 3] turned by quaternions [..., 4]."""
    if not (_plain(quaternion) and _plain(point)) or point.shape[-1] != 3:
        return _apply(quaternion, point)
    return torch.from_numpy(_turned(quaternion.numpy(), point.numpy()))


def create(cls: type[Pose], pose: Any, device: Any = None) -> Pose:
    """A batch of poses out of what the simulator gives."""
    if isinstance(pose, sapien.Pose) and _on_cpu(device):
        return cls(raw_pose=torch.from_numpy(_rows([pose])))
    if isinstance(pose, list) and isinstance(pose[0], sapien.Pose) and _on_cpu(device):
        return cls(raw_pose=torch.from_numpy(_rows(pose)))
    return _create(cls, pose, device)


def compose(self: Pose, other: Pose | sapien.Pose) -> Pose:
    """The pose `other` seen from where `self` is."""
    a, b = _array(self), _array(other)
    if a is None or b is None:
        return _compose(self, other)
    turn = _product(a[:, 3:], b[:, 3:])
    turn = np.where(turn[:, :1] < 0, -turn, turn)
    place = a[:, :3] + _turned(a[:, 3:], b[:, :3])
    return Pose(raw_pose=torch.from_numpy(np.concatenate([place, turn], 1)))


def invert(self: Pose) -> Pose:
    """The pose that undoes this one."""
    own = _array(self)
    if own is None:
        return _invert(self)
    turn = own[:, 3:] * CONJUGATE
    return Pose(raw_pose=torch.from_numpy(np.concatenate([_turned(turn, -own[:, :3]), turn], 1)))


def matrix(self: Pose) -> torch.Tensor:
    """Homogeneous matrices [N, 4, 4]."""
    own = _array(self)
    if own is None:
        return _matrix(self)
    r, i, j, k = own[:, 3:].T
    double = np.float32(2) / (own[:, 3:] * own[:, 3:]).sum(-1)
    out = np.zeros((len(own), 4, 4), np.float32)
    out[:, 0, 0] = 1 - double * (j * j + k * k)
    out[:, 0, 1] = double * (i * j - k * r)
    out[:, 0, 2] = double * (i * k + j * r)
    out[:, 1, 0] = double * (i * j + k * r)
    out[:, 1, 1] = 1 - double * (i * i + k * k)
    out[:, 1, 2] = double * (j * k - i * r)
    out[:, 2, 0] = double * (i * k - j * r)
    out[:, 2, 1] = double * (j * k + i * r)
    out[:, 2, 2] = 1 - double * (i * i + j * j)
    out[:, :3, 3], out[:, 3, 3] = own[:, :3], 1
    return torch.from_numpy(out)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    parts = a[..., :, None] * (b[..., SECOND] * SIGN)
    return parts[..., 0, :] + parts[..., 1, :] + parts[..., 2, :] + parts[..., 3, :]


def _turned(quaternion: np.ndarray, point: np.ndarray) -> np.ndarray:
    pure = np.zeros((*point.shape[:-1], 4), np.float32)
    pure[..., 1:] = point
    return _product(_product(quaternion, pure), quaternion * CONJUGATE)[..., 1:]


def _rows(poses: list[sapien.Pose]) -> np.ndarray:
    rows = np.empty((len(poses), 7), np.float32)
    for row, pose in zip(rows, poses, strict=True):
        row[:3], row[3:] = pose.p, pose.q
    return rows


def _array(pose: Any) -> np.ndarray | None:
    """Positions and quaternions [N, 7] where they are at hand; None: leave it to ManiSkill."""
    if isinstance(pose, sapien.Pose):
        return _rows([pose])
    if isinstance(pose, Pose) and _plain(pose.raw_pose) and pose.raw_pose.ndim == 2:
        return pose.raw_pose.numpy()
    return None


def _plain(tensor: torch.Tensor) -> bool:
    cpu = tensor.device.type == "cpu" and tensor.dtype == torch.float32
    return cpu and not tensor.requires_grad


def _on_cpu(device: Any) -> bool:
    return device is None or device == CPU
