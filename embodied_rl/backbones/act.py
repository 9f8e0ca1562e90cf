"""ACT (Zhao et al. 2023, arXiv 2304.13705) out of a LeRobot folder, without LeRobot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.backbones.act_network import ActNetwork, ActSizes
from embodied_rl.backbones.act_settings import ActSettings, fit, read_act
from embodied_rl.backbones.act_weights import build_network, load_network
from embodied_rl.backbones.lerobot_normalise import Normaliser
from embodied_rl.backbones.pi0_inputs import state_vector
from embodied_rl.backbones.pi0_network import check_dtype
from embodied_rl.backbones.source import read_source, rebuild, record
from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces import Backbone
from embodied_rl.types import EnvSpec, Features, Obs


class ActBackbone(Backbone):
    """An action chunking transformer: images and state to one chunk, deterministically.

    Features: for each camera, the mean of the transformer encoder's output over the camera's
    tokens (which have attended to every camera and to the state); the mean of the decoder's output
    over the chunk, which is what the policy is about to do; the normalised state and environment
    state. There is no dropout, in training neither: base actions stay those of the policy.

    Args:
        network: the model.
        settings: everything around it.
        dtype: name of its precision.
        source: folder that the weights came from; None: they are in our own policy folder.
    """

    def __init__(
        self,
        network: ActNetwork,
        settings: ActSettings,
        dtype: str = "float32",
        source: str | None = None,
    ) -> None:
        super().__init__()
        self.network, self.settings, self.dtype_name, self.source = network, settings, dtype, source
        sizes = network.sizes
        self.state = Normaliser(**settings.state)
        self.environment = Normaliser(**settings.environment)
        self.action = Normaliser(**settings.action)
        self.images = nn.ModuleList(Normaliser(**made) for _, _, made in settings.images)
        self.chunk_size, self.action_dim = sizes.n_action_steps, sizes.action_dim
        self.feature_dim = (len(settings.images) + 1) * sizes.dim_model
        self.feature_dim += sizes.state_dim + sizes.environment_dim

    # ------------------------------------------------------------ computing

    def forward(
        self, obs: Obs, samples: int = 1, generator: torch.Generator | None = None
    ) -> Features:
        """Encodes observations; features float32 whatever the network's precision."""
        del samples, generator  # deterministic
        dtype = self.network.dtype
        state = self._vector(obs, self.settings.state_keys, self.state)
        environment = self._vector(obs, self.settings.environment_keys, self.environment)
        images = [image.to(dtype) for image in self.pixels(obs)]
        out = self.network(images, state.to(dtype), environment.to(dtype))
        parts = [out.cameras.flatten(1), out.plan, state, environment]
        actions = self.action.unnormalise(out.actions[:, : self.chunk_size].float())
        return Features(torch.cat([part.float() for part in parts], 1), actions.clamp(-1, 1))

    def pixels(self, obs: Obs) -> list[Tensor]:
        """Scales images to [0, 1], resizes them to the policy's sizes and normalises them.

        LeRobot resizes nothing: where an image has the policy's size, neither does this.

        Returns:
            [B, 3, h, w] float32 for each camera.
        """
        made = []
        normalisers: list[Any] = list(self.images)
        pairs = zip(self.settings.cameras, self.settings.images, normalisers, strict=True)
        for (_, key), (_, shape, _), normaliser in pairs:
            image = obs[key].permute(0, 3, 1, 2).float() / 255
            if list(image.shape[-2:]) != shape:
                image = F.interpolate(image, shape, mode="bilinear", antialias=True)
            scaled = normaliser.normalise(image.permute(0, 2, 3, 1))
            made.append(scaled.permute(0, 3, 1, 2))
        return made

    def _vector(self, obs: Obs, keys: list[str], normaliser: Normaliser) -> Tensor:
        """The normalised concatenation [B, n] of observations; n = 0 for no keys."""
        if not keys:
            first = next(iter(obs.values()))
            return torch.zeros(len(first), 0, device=first.device)
        return normaliser.normalise(state_vector(obs, keys))

    def blocks(self) -> list[nn.Module]:
        """Image network, input projections, encoder, decoder; not the action head."""
        return self.network.blocks()

    # ------------------------------------------------------------ environment

    def check_env(self, spec: EnvSpec) -> None:
        """Finds cameras and state among the observations.

        Raises:
            UserError: cameras, state or action do not fit.
        """
        fit(self.settings, self.network.sizes, spec)

    # ------------------------------------------------------------ folders

    @classmethod
    def from_folder(cls, folder: Path, config: PolicyConfig) -> ActBackbone:
        """Loads a LeRobot folder; the layout is described in docs/lerobot_policies.md.

        Raises:
            UserError: something in the folder or in `config` does not fit; says what.
        """
        dtype = check_dtype(config.dtype)
        weights, buffers = read_source(folder)
        sizes, settings = read_act(folder, buffers, config)
        network = load_network(weights, sizes, dtype, str(folder))
        return cls(network, settings, config.dtype, str(folder.resolve()))

    def config_dict(self) -> dict[str, Any]:
        """Sizes, precision, source of the weights and settings."""
        sizes = asdict(self.network.sizes)
        return record(sizes, self.dtype_name, self.source, self.settings)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ActBackbone:
        """Rebuilds the module: weights from `source`, or random ones where that is null."""
        return cls(*rebuild(config, ActSizes, ActSettings, build_network, load_network))

    @classmethod
    def for_env(cls, spec: EnvSpec) -> ActBackbone:
        """Refuses: it is trained by imitation."""
        raise UserError(
            f"policy.backbone=act cannot be trained from scratch on {spec.name}. Set policy.path "
            "to an ACT folder in LeRobot's layout."
        )
