"""Scripted experts over state observations, for demonstrations without a planner."""

from __future__ import annotations

import numpy as np

# PickCube-v1's flat state: qpos 9, qvel 9, is_grasped 1, tcp_pose 7, goal_pos 3, obj_pose 7,
# tcp_to_obj_pos 3, obj_to_goal_pos 3
IS_GRASPED, TCP_TO_OBJ, OBJ_TO_GOAL = 18, slice(36, 39), slice(39, 42)
STEP = 0.1  # metres moved by an action entry of 1 under pd_ee_delta_pos
OPEN, CLOSED = 1.0, -1.0


class PickCubeExpert:
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

    def act(self, state: np.ndarray) -> np.ndarray:
        """Returns an action [4] in [-1, 1] for a state [42]."""
        offset = state[TCP_TO_OBJ].astype(np.float64)
        over = np.linalg.norm(offset[:2])
        grasped = bool(state[IS_GRASPED] > 0.5)
        if grasped and self._closing >= 2:
            return self._action(state[OBJ_TO_GOAL], CLOSED)
        at_cube = over < 0.008 and abs(offset[2]) < 0.008
        if at_cube or self._closing:
            self._closing += 1
            if self._closing > 6 and not grasped:  # missed: open and try again
                self._closing = 0
            return self._action(np.zeros(3), CLOSED)
        if over > 0.02:  # stay above the cube until aligned with it
            offset[2] += 0.06
        return self._action(offset, OPEN)

    def _action(self, move: np.ndarray, gripper: float) -> np.ndarray:
        return np.append(np.clip(self.gain * move / STEP, -1, 1), gripper).astype(np.float32)
