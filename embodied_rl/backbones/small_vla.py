"""A small vision-language-action policy: frozen pretrained towers, a learned head of a few MB."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from embodied_rl.backbones import text, vision
from embodied_rl.backbones.small_vla_head import MapReader, VelocityField
from embodied_rl.backbones.towers import check_fingerprint
from embodied_rl.command_configs import PretrainConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces import FlowBackbone, Imitator
from embodied_rl.types import INSTRUCTION, EnvSpec, Obs, Trajectory

CLIP = 10.0  # bound on normalised proprioception, in standard deviations
MAP, STATE = "map.", "state"  # keys of `SmallVLABackbone.inputs`


@dataclasses.dataclass
class SmallVLAArguments:
    """What rebuilds the module; JSON-able.

    Attributes:
        cameras: observation keys of uint8 images [h, w, 3].
        grids: rows and columns of each camera's map.
        state: observation keys of proprioception, in order.
        state_dim: numbers in them together.
        action_dim: A.
        chunk_size: H.
        hidden: widths of the velocity field.
        keypoints: per camera.
        summary: numbers per camera, beside the keypoints.
        text_dim: numbers for the instruction.
        denoise_steps: Euler steps from noise to chunk.
        vision: tower, by name or folder.
        vision_fingerprint: of that tower; None: take the one at hand.
        text: tower, by name or folder.
        text_fingerprint: of that tower; None: take the one at hand.
        text_size: E, of what it returns.
        instructions: what the policy can be told, by index.
    """

    cameras: list[str]
    grids: list[list[int]]
    state: list[str]
    state_dim: int
    action_dim: int
    chunk_size: int
    hidden: list[int]
    keypoints: int
    summary: int
    text_dim: int
    denoise_steps: int
    vision: str
    text: str
    text_size: int
    instructions: list[str]
    vision_fingerprint: str | None = None
    text_fingerprint: str | None = None


class SmallVLABackbone(FlowBackbone, Imitator):
    """Camera maps, proprioception and an instruction to features; a flow to action chunks.

    Features are keypoints and a summary of each camera's map, normalised proprioception and a
    projection of the instruction: what the velocity field reads, and a critic can. The flow goes
    from noise at time 0 to the chunk at time 1 in a straight line (Lipman et al. 2023).

    The towers are no submodules: they are not trained, and their weights stay where they came
    from. A policy folder holds their fingerprints.

    Args:
        arguments: sizes, keys, towers.

    Raises:
        UserError: a tower cannot be loaded, or is not the one that the head was trained on.
    """

    state_mean: Tensor
    state_std: Tensor
    action_mean: Tensor
    action_std: Tensor
    told: Tensor

    def __init__(self, arguments: SmallVLAArguments) -> None:
        super().__init__()
        self.arguments = a = arguments
        tower = vision.load_vision(a.vision)
        check_fingerprint(tower.fingerprint, a.vision_fingerprint, vision.KEY, a.vision)
        a.vision_fingerprint = tower.fingerprint
        self._tower = [tower]  # in a list: no submodule
        self.chunk_size, self.action_dim, self.noise_dim = a.chunk_size, a.action_dim, a.action_dim
        self.readers = nn.ModuleList(
            MapReader(tower.channels, a.keypoints, a.summary, (rows, columns))
            for rows, columns in a.grids
        )
        self.read_text = nn.Linear(a.text_size, a.text_dim)
        seen = a.text_dim + a.state_dim
        self.feature_dim = seen + len(a.cameras) * (2 * a.keypoints + a.summary)
        self.velocity = VelocityField(self.feature_dim, a.chunk_size * a.action_dim, a.hidden)
        self.register_buffer("state_mean", torch.zeros(a.state_dim))
        self.register_buffer("state_std", torch.ones(a.state_dim))
        self.register_buffer("action_mean", torch.zeros(a.action_dim))
        self.register_buffer("action_std", torch.ones(a.action_dim))
        self.register_buffer("told", torch.zeros(len(a.instructions), a.text_size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the tower too."""
        self._tower[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def instruct(self, instructions: Sequence[str]) -> None:
        """Reads what `obs["instruction"]` shall stand for.

        Raises:
            UserError: the text tower cannot be loaded, or is not the one trained with.
        """
        tower, a = text.load_text(self.arguments.text), self.arguments
        check_fingerprint(tower.fingerprint, a.text_fingerprint, text.KEY, a.text)
        a.text_fingerprint, a.instructions = tower.fingerprint, list(instructions)
        self.told = tower(instructions).to(self.told)

    # ------------------------------------------------------------ features

    @torch.no_grad()
    def inputs(self, obs: Obs) -> Obs:
        """The tower's map of each camera (float16), proprioception and instruction."""
        maps = {
            f"{MAP}{i}": self._tower[0](obs[camera]).half().contiguous()
            for i, camera in enumerate(self.arguments.cameras)
        }
        state = torch.cat([obs[key].float().flatten(1) for key in self.arguments.state], dim=1)
        return {**maps, STATE: state, INSTRUCTION: obs[INSTRUCTION]}

    def _features(self, inputs: Obs) -> Tensor:
        dtype = self.told.dtype
        seen = [reader(inputs[f"{MAP}{i}"].to(dtype)) for i, reader in enumerate(self.readers)]
        state = (inputs[STATE].to(dtype) - self.state_mean) / self.state_std
        # entries of a unit vector are of the size 1 / sqrt(E)
        told = self.told[inputs[INSTRUCTION]] * self.arguments.text_size**0.5
        return torch.cat([*seen, state.clamp(-CLIP, CLIP), self.read_text(told)], dim=1)

    def prefix(self, obs: Obs) -> tuple[Tensor, Tensor]:
        """Returns features [B, D], which are all that `denoise` reads, too."""
        vector = self._features(self.inputs(obs))
        return vector, vector

    def repeat(self, context: Tensor, times: int) -> Tensor:
        """Repeats each row."""
        return context.repeat_interleave(times, 0)

    def denoise(self, context: Tensor, noise: Tensor) -> Tensor:
        """Integrates noise [B, H, A] over time 0 to 1 in equal Euler steps."""
        steps = self.arguments.denoise_steps
        chunk = noise.flatten(1)
        for step in range(steps):
            time = chunk.new_full((len(chunk),), step / steps)
            chunk = chunk + self.velocity(context, chunk, time) / steps
        return chunk.view_as(noise) * self.action_std + self.action_mean

    # ------------------------------------------------------------ imitation

    def imitation_loss(
        self, inputs: Obs, chunks: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Flow matching: the velocity, at a random time, of the straight line from noise."""
        wanted = ((chunks - self.action_mean) / self.action_std).flatten(1)
        noise = torch.randn(wanted.shape, generator=generator).to(wanted)
        time = torch.rand(len(wanted), generator=generator).to(wanted)
        noisy = noise + time[:, None] * (wanted - noise)
        velocity = self.velocity(self._features(inputs), noisy, time)
        return F.mse_loss(velocity, wanted - noise)

    @classmethod
    def for_demos(
        cls,
        trajectories: Sequence[Trajectory],
        instructions: Sequence[str],
        config: PretrainConfig,
    ) -> SmallVLABackbone:
        """Cameras are the uint8 images, proprioception all other observations [n]."""
        fields, options = trajectories[0].fields, config.small_vla
        obs = {k.removeprefix("obs."): v for k, v in fields.items() if k.startswith("obs.")}
        cameras = sorted(k for k, v in obs.items() if v.dtype == torch.uint8 and v.ndim == 4)
        state = sorted(k for k, v in obs.items() if v.dtype == torch.float32 and v.ndim == 2)
        if not cameras or not state or INSTRUCTION not in obs or not instructions:
            raise UserError(
                f"backbone=small_vla reads camera images, proprioception and an instruction; the "
                f"demonstrations have {', '.join(obs)} and {len(instructions)} instructions. "
                "Collect them with env.obs_mode=rgb and env.instructions."
            )
        tower = vision.load_vision(options.vision)
        grids = [list(tower(obs[camera][:1]).shape[2:]) for camera in cameras]
        states = torch.cat([_joined(t, state) for t in trajectories])
        actions = torch.cat([t.labels for t in trajectories])
        backbone = cls(
            SmallVLAArguments(
                cameras=cameras,
                grids=grids,
                state=state,
                state_dim=states.shape[1],
                action_dim=actions.shape[1],
                chunk_size=config.chunk_size,
                hidden=list(config.hidden),
                keypoints=options.keypoints,
                summary=options.summary,
                text_dim=options.text_dim,
                denoise_steps=options.denoise_steps,
                vision=options.vision,
                text=options.text,
                text_size=text.load_text(options.text)(["x"]).shape[1],
                instructions=[],
            )
        )
        backbone.instruct(instructions)
        _set_statistics(backbone.state_mean, backbone.state_std, states)
        _set_statistics(backbone.action_mean, backbone.action_std, actions)
        return backbone

    # ------------------------------------------------------------ policy folder

    def blocks(self) -> list[nn.Module]:
        """The towers never change."""
        return [*self.readers, self.read_text]

    def check_env(self, spec: EnvSpec) -> None:
        """Takes over the environment's instructions; raises UserError where it does not fit."""
        a = self.arguments
        missing = [k for k in (*a.cameras, *a.state) if k not in spec.obs]
        if missing:
            raise UserError(
                f"the policy reads {', '.join(missing)}, but {spec.name} gives "
                f"{', '.join(spec.obs)}. Set env.obs_mode=rgb and env.obs_keys as they were when "
                "the policy was pretrained (config.json in its folder)."
            )
        if spec.action_dim != a.action_dim:
            raise UserError(
                f"the policy was made for {a.action_dim} action entries, but {spec.name} has "
                f"{spec.action_dim}. Set env.task and env.control_mode as they were when the "
                "policy was pretrained."
            )
        if not spec.instructions:
            raise UserError(
                f"the policy follows instructions, and {spec.name} gives none. Say what to do: "
                "env.instructions.<task>=..."
            )
        if list(spec.instructions) != a.instructions:
            self.instruct(spec.instructions)

    def config_dict(self) -> dict[str, Any]:
        """The constructor's arguments, fingerprints of the towers among them."""
        return dataclasses.asdict(self.arguments)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SmallVLABackbone:
        """Rebuilds the module from `config_dict`."""
        return cls(SmallVLAArguments(**config))

    @classmethod
    def for_env(cls, spec: EnvSpec) -> SmallVLABackbone:
        """Refuses: its features come from demonstrations."""
        raise UserError(
            f"policy.backbone=small_vla cannot be trained from scratch on {spec.name}. Set "
            "policy.path=pushpull_small_vla, or pretrain one: python -m embodied_rl.pretrain "
            "backbone=small_vla data=<demonstrations>."
        )


def _joined(trajectory: Trajectory, keys: Sequence[str]) -> Tensor:
    parts = [trajectory.fields[f"obs.{key}"][: trajectory.length] for key in keys]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _set_statistics(mean: Tensor, std: Tensor, rows: Tensor) -> None:
    """Entries that hardly vary get a floor: 1 % of the largest standard deviation."""
    spread = rows.std(0, correction=0)
    mean.copy_(rows.mean(0))
    std.copy_(spread.clamp(min=float(spread.max()) * 0.01 + 1e-8))
