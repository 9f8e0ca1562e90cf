"""Pretrained policies: observations to features and a base action."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.types import EnvSpec, Features, Obs

LOCATIONS = ("source", "tokenizer")  # keys of a backbone's config that are paths


class Backbone(nn.Module, ABC):
    """A pretrained policy: observations to features and a base action.

    Owns preprocessing and normalisation; knows nothing of Q values or algorithms.

    Attributes:
        feature_dim: D.
        chunk_size: H.
        action_dim: A.
        frozen: whether features may be stored and read again: nothing trains the weights.
        source: the folder that the weights came from, in a layout that is not ours; None for our
            own policy folders. A policy folder refers to a source instead of copying it.
        source_hash: what `weights_hash` was when they came from there.
    """

    feature_dim: int
    chunk_size: int
    action_dim: int
    frozen: bool = True
    source: str | None = None
    source_hash: str | None = None

    @abstractmethod
    def forward(
        self, obs: Obs, samples: int = 1, generator: torch.Generator | None = None
    ) -> Features:
        """Encodes observations [B, ...] to features [B, D] and base actions [B, H, A].

        Args:
            obs: observations.
            samples: chunks wanted of a policy that samples: the first is the base action, the
                others are candidates; 0: none, the base action is zero. A deterministic policy has
                one whatever is asked.
            generator: draws the noise; None: torch's default one.
        """

    @abstractmethod
    def check_env(self, spec: EnvSpec) -> None:
        """Takes over the environment's instructions; raises UserError where it does not fit."""

    def fingerprint(self) -> str:
        """SHA-256 of config (preprocessing included) and weights; cached features carry it.

        Where files lie is not part of it: a folder may move.
        """
        config = {k: v for k, v in self.config_dict().items() if k not in LOCATIONS}
        described = json.dumps(config, sort_keys=True)
        return hashlib.sha256(f"{described} {self.weights_hash()}".encode()).hexdigest()

    def weights_hash(self) -> str:
        """SHA-256 of all weights and statistics."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @classmethod
    def from_folder(cls, folder: Path, config: PolicyConfig) -> Backbone:
        """Loads a folder in a published layout that is not ours (LeRobot's, transformers').

        Raises:
            UserError: this backbone has no such layout, or the folder does not fit it.
        """
        del config
        raise UserError(f"{folder}: {cls.__name__} loads embodied_rl policy folders only.")

    def to_folder(self, folder: Path) -> None:
        """Writes its weights in the layout of `source`, with copies of that folder's other files.

        Raises:
            UserError: this backbone writes no such layout.
        """
        raise UserError(
            f"{folder}: {type(self).__name__} cannot be written in the layout of {self.source}."
        )

    def blocks(self) -> list[nn.Module]:
        """The parts between observation and features, in that order: what finetuning may change.

        `policy.trainable=full` takes all of them, `last` the last ones, `lora` their linear layers.
        """
        return []

    def enable_checkpointing(self) -> None:
        """Recomputes activations in the backward pass instead of keeping them.

        Raises:
            UserError: this backbone cannot.
        """
        raise UserError(
            f"policy.gradient_checkpointing=true: {type(self).__name__} has no such mode. Lower "
            "policy.micro_batch instead."
        )

    @abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild the (untrained) module."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Backbone:
        """Rebuilds the module from `config_dict`."""

    @classmethod
    @abstractmethod
    def for_env(cls, spec: EnvSpec) -> Backbone:
        """Builds an untrained backbone for runs from scratch."""


class FlowBackbone(Backbone):
    """A policy that turns Gaussian noise into action chunks by integrating a velocity field.

    An observation is encoded once, whatever is then done with it: features for the critic, any
    number of chunks, chunks from chosen noise.

    Attributes:
        noise_dim: W, size of the noise for each action of a chunk.
    """

    noise_dim: int

    @abstractmethod
    def prefix(self, obs: Obs) -> tuple[Tensor, Any]:
        """Encodes observations to features [B, D] and the context that `denoise` reads."""

    @abstractmethod
    def denoise(self, context: Any, noise: Tensor) -> Tensor:
        """Integrates noise [B, H, W] to chunks [B, H, A], unclipped; differentiable."""

    @abstractmethod
    def repeat(self, context: Any, times: int) -> Any:
        """Repeats each row of a context, as `Tensor.repeat_interleave` does."""

    def forward(
        self, obs: Obs, samples: int = 1, generator: torch.Generator | None = None
    ) -> Features:
        """Encodes once and denoises `samples` chunks for each observation."""
        vector, context = self.prefix(obs)
        count = len(vector)
        if samples == 0:
            none = vector.new_zeros(count, self.chunk_size, self.action_dim)
            return Features(vector, none, None, context)
        where = vector.device if generator is None else generator.device
        shape = (count * samples, self.chunk_size, self.noise_dim)
        noise = torch.randn(shape, generator=generator, device=where, dtype=vector.dtype)
        repeated = context if samples == 1 else self.repeat(context, samples)
        chunks = self.denoise(repeated, noise.to(vector.device)).clamp(-1, 1)
        chunks = chunks.unflatten(0, (count, samples))
        return Features(vector, chunks[:, 0], chunks[:, 1:] if samples > 1 else None, context)
