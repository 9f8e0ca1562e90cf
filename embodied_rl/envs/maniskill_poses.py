"""ManiSkill's arithmetic of poses for simulation on the CPU: the same numbers, sooner.

A step of PickCube on a CPU is one part physics and several parts torch operations on single
quaternions, a tenth of a microsecond of work at several of overhead each. Here they are written out
in numpy's scalars, in the same order and precision, so that results are equal bit for bit
(tests/test_maniskill_poses.py). There is one pose at a time on a CPU; several, or what is on a GPU,
are left to ManiSkill. Only `maniskill.py` and its like may use this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.utils.geometry import rotation_conversions
from mani_skill.utils.structs import pose as pose_module
from mani_skill.utils.structs.pose import Pose

CPU = torch.device("cpu")
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
Numbers = Sequence[np.float32]

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
    left, right = row_of(a, 4), row_of(b, 4)
    if left is None or right is None or a.ndim != b.ndim:
        return _multiply(a, b)
    return torch.from_numpy(np.array(_product(left, right), np.float32)).view(a.shape)


def apply(quaternion: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Points [..., 3] turned by quaternions [..., 4]."""
    turn, place = row_of(quaternion, 4), row_of(point, 3)
    if turn is None or place is None or quaternion.ndim != point.ndim:
        return _apply(quaternion, point)
    return torch.from_numpy(np.array(_turned(turn, place), np.float32)).view(point.shape)


def create(cls: type[Pose], pose: Any, device: Any = None) -> Pose:
    """A batch of poses out of what the simulator or a controller gives."""
    if isinstance(pose, torch.Tensor):
        place = row_of(pose, 3) if _on_cpu(device) else None
        if place is not None:
            return _pose((*place, ONE, ZERO, ZERO, ZERO))
    elif _on_cpu(device):
        one = pose[0] if isinstance(pose, list) and len(pose) == 1 else pose
        if isinstance(one, sapien.Pose):
            return cls(raw_pose=torch.from_numpy(_read(one)))
    return _create(cls, pose, device)


def compose(self: Pose, other: Pose | sapien.Pose) -> Pose:
    """The pose `other` seen from where `self` is."""
    a, b = _numbers(self), _numbers(other)
    if a is None or b is None:
        return _compose(self, other)
    x, y, z = _turned(a[3:], b[:3])
    r, i, j, k = _product(a[3:], b[3:])
    if r < 0:
        r, i, j, k = -r, -i, -j, -k
    return _pose((a[0] + x, a[1] + y, a[2] + z, r, i, j, k))


def invert(self: Pose) -> Pose:
    """The pose that undoes this one."""
    own = _numbers(self)
    if own is None:
        return _invert(self)
    x, y, z, r, i, j, k = own
    back = (r, -i, -j, -k)
    return _pose((*_turned(back, (-x, -y, -z)), *back))


def matrix(self: Pose) -> torch.Tensor:
    """Homogeneous matrices [N, 4, 4]."""
    own = _numbers(self)
    if own is None:
        return _matrix(self)
    x, y, z, r, i, j, k = own
    double = TWO / (r * r + i * i + j * j + k * k)
    rows = (
        (ONE - double * (j * j + k * k), double * (i * j - k * r), double * (i * k + j * r), x),
        (double * (i * j + k * r), ONE - double * (i * i + k * k), double * (j * k - i * r), y),
        (double * (i * k - j * r), double * (j * k + i * r), ONE - double * (i * i + j * j), z),
        (ZERO, ZERO, ZERO, ONE),
    )
    return torch.from_numpy(np.array(rows, np.float32)[None])


def _product(a: Numbers, b: Numbers) -> Numbers:
    (aw, ax, ay, az), (bw, bx, by, bz) = a, b
    return (
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    )


def _turned(quaternion: Numbers, point: Numbers) -> Numbers:
    r, i, j, k = quaternion
    return _product(_product(quaternion, (ZERO, *point)), (r, -i, -j, -k))[1:]


def _read(pose: sapien.Pose) -> np.ndarray:
    row = np.empty((1, 7), np.float32)
    row[0, :3], row[0, 3:] = pose.p, pose.q
    return row


def _pose(numbers: Numbers) -> Pose:
    return Pose(raw_pose=torch.from_numpy(np.array((numbers,), np.float32)))


def _numbers(pose: Any) -> Numbers | None:
    """Position and quaternion where they are one and at hand; None: leave it to ManiSkill."""
    if isinstance(pose, sapien.Pose):
        return tuple(_read(pose)[0])
    return row_of(pose.raw_pose, 7) if isinstance(pose, Pose) and pose.raw_pose.ndim == 2 else None


def row_of(tensor: torch.Tensor, length: int) -> Numbers | None:
    """The numbers of a tensor [..., length] with a single row; None: leave it to ManiSkill."""
    one = tensor.shape[-1:] == (length,) and tensor.numel() == length
    return tuple(tensor.numpy().reshape(length)) if one and plain(tensor) else None


def plain(value: Any) -> bool:
    """Whether this is a float32 tensor that numpy can read where it is."""
    if not isinstance(value, torch.Tensor) or value.requires_grad:
        return False
    return value.device.type == "cpu" and value.dtype == torch.float32


def _on_cpu(device: Any) -> bool:
    return device is None or device == CPU
