"""Scripted experts for demonstrations without a planner; they may see more than a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

Position = Callable[[str], np.ndarray]  # name of an object, or "tcp" -> where it is [3], metres

# PickCube-v1's flat state: qpos 9, qvel 9, is_grasped 1, tcp_pose 7, goal_pos 3, obj_pose 7,
# tcp_to_obj_pos 3, obj_to_goal_pos 3
IS_GRASPED, TCP_TO_OBJ, OBJ_TO_GOAL = 18, slice(36, 39), slice(39, 42)
STEP = 0.1  # metres moved by an action entry of 1 under pd_ee_delta_pos
OPEN, CLOSED = 1.0, -1.0


class Expert(ABC):
    """A controller that solves one task.

    Attributes:
        obs_mode: the `env.obs_mode` that it needs; None: any, it looks at positions only.
        control_mode: the `env.control_mode` that its actions are for.
    """

    obs_mode: ClassVar[str | None] = None
    control_mode: ClassVar[str]

    def reset(self) -> None:  # noqa: B027 - most remember nothing
        """Forgets the episode."""

    @abstractmethod
    def act(self, obs: Mapping[str, np.ndarray], position: Position) -> np.ndarray:
        """Returns an action [A] in [-1, 1]."""


class PickCubeExpert(Expert):
    """Reaches above the cube, descends, grasps, carries it to the goal and holds still.

    A proportional controller on the observed offsets; the phase is read off the state except for
    the few steps that the fingers need to close.

    Args:
        gain: share of the remaining offset covered in one step.
    """

    obs_mode, control_mode = "state", "pd_ee_delta_pos"

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain
        self.reset()

    def reset(self) -> None:
        """Forgets the episode."""
        self._closing = 0

    def act(self, obs: Mapping[str, np.ndarray], position: Position) -> np.ndarray:
        """Returns an action [4] in [-1, 1] for a state [42]."""
        del position
        state = obs["state"]
        offset = state[TCP_TO_OBJ].astype(np.float64)
        over = np.linalg.norm(offset[:2])
        grasped = bool(state[IS_GRASPED] > 0.5)
        if grasped and self._closing >= 2:
            return delta_action(self.gain * state[OBJ_TO_GOAL], CLOSED)
        at_cube = over < 0.008 and abs(offset[2]) < 0.008
        if at_cube or self._closing:
            self._closing += 1
            if self._closing > 6 and not grasped:  # missed: open and try again
                self._closing = 0
            return delta_action(np.zeros(3), CLOSED)
        if over > 0.02:  # stay above the cube until aligned with it
            offset[2] += 0.06
        return delta_action(self.gain * offset, OPEN)


class SlideCubeExpert(Expert):
    """Goes behind the cube, down to the table, and slides the cube along the x axis.

    It slides on, slowly, once the cube has come far enough: what a policy without memory sees
    then looks like a cube still to be moved, and demonstrations that stop there teach stopping.

    Args:
        direction: 1 away from the robot (PushCube-v1), -1 towards it (PullCube-v1).
    """

    control_mode = "pd_ee_delta_pos"
    BEHIND = 0.045  # metres from the cube's centre to the fingers' before they touch
    HEIGHT = 0.06  # above the cube's centre, on the way there
    ENOUGH = 0.13  # metres; success begins at 0.1 and ends at 0.3
    FAST, SLOW = 0.4, 0.08  # actions that slide the cube

    def __init__(self, direction: int) -> None:
        self.direction = direction
        self.reset()

    def reset(self) -> None:
        """Forgets where the cube began."""
        self._start: float | None = None

    def act(self, obs: Mapping[str, np.ndarray], position: Position) -> np.ndarray:
        """Returns an action [4] in [-1, 1]."""
        del obs
        cube, tcp = position("obj").astype(np.float64), position("tcp")
        if self._start is None:
            self._start = float(cube[0])
        offset = cube - tcp
        ahead = offset[0] * self.direction  # from the fingers to the cube, along the way
        aside, above = abs(offset[1]), -offset[2]
        if ahead > 0.01 and aside < 0.015 and abs(above) < 0.015:
            moved = (cube[0] - self._start) * self.direction
            push = self.FAST if moved < self.ENOUGH else self.SLOW
            return delta_action(np.array([push * STEP * self.direction, *offset[1:]]), CLOSED)
        offset[0] -= self.BEHIND * self.direction
        if ahead < 0.035 or aside > 0.015:  # not behind it yet: stay above
            offset[2] += self.HEIGHT
        return delta_action(offset, CLOSED)


class PushCubeExpert(SlideCubeExpert):
    """PushCube-v1: away from the robot."""

    def __init__(self) -> None:
        super().__init__(1)


class PullCubeExpert(SlideCubeExpert):
    """PullCube-v1: towards the robot."""

    def __init__(self) -> None:
        super().__init__(-1)


def delta_action(move: np.ndarray, gripper: float) -> np.ndarray:
    """An action of pd_ee_delta_pos that moves by `move` [3] metres."""
    return np.append(np.clip(move / STEP, -1, 1), gripper).astype(np.float32)
