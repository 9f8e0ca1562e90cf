"""What `embodied_rl.plan` needs of a backbone: its shape without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from embodied_rl.config import PolicyConfig
from embodied_rl.interfaces.backbone import Backbone
from embodied_rl.types import EnvSpec


@dataclass
class Assumed:
    """What a plan takes for granted where only a simulator or a missing folder could tell.

    Attributes:
        state_dim: numbers of proprioception, if the user says so.
        action_dim: A, if the user says so.
        cameras: of the environment, if the user says so.
        image_size: side of an observed image in pixels.
        max_episode_steps: environment steps of an episode.
        name: of the task.
        instructions: what the environment tells the policy.
        notes: one line for each thing assumed.
    """

    state_dim: int | None
    action_dim: int | None
    cameras: int | None
    image_size: int
    max_episode_steps: int
    name: str
    instructions: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Adds what was assumed, once."""
        if line not in self.notes:
            self.notes.append(line)


@dataclass
class Sketch:
    """A backbone on the meta device.

    Attributes:
        backbone: knows its cameras, sizes and prompts, as after `Backbone.check_env`.
        spec: an environment that gives just what it reads.
        elsewhere: networks that it runs and that are no submodules of it.
    """

    backbone: Backbone
    spec: EnvSpec
    elsewhere: tuple[nn.Module, ...] = ()


# Arguments: the backbone's part of a config.json of ours, or None; a folder in another project's
# layout, or None; both None stands for the published sizes. Raises UserError where that is not
# enough to know the sizes.
Sketcher = Callable[[dict[str, Any] | None, Path | None, PolicyConfig, Assumed], Sketch]
