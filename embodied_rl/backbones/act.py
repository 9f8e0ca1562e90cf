"""ACT (Zhao et al. 2023, arXiv 2304.13705) out of a LeRobot folder, without LeRobot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.backbones.act_network import ActNetwork, ActOutput, ActSizes
from embodied_rl.backbones.act_settings import ActSettings, fit, read_act
from embodied_rl.backbones.act_weights import build_network, load_network, write_network
from embodied_rl.backbones.lerobot_normalise import Normaliser
from embodied_rl.backbones.pi0_inputs import state_vector
from embodied_rl.backbones.pi0_network import check_dtype
from embodied_rl.backbones.published import PublishedBackbone
from embodied_rl.backbones.source import read_source, rebuild
from embodied_rl.config import PolicyConfig
from embodied_rl.types import EnvSpec, Features, Obs

IMAGE, STATE, ENVIRONMENT = "image.", "state", "environment"  # keys of `ActBackbone.inputs`


class ActBackbone(PublishedBackbone):
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

    name, title = "act", "ACT"
    keeps_inputs = False  # float pixels
    tuning_rate = 1e-5  # LeRobot's

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
        inputs = self.inputs(obs)
        out = self._run(inputs)
        parts = [out.cameras.flatten(1), out.plan, inputs[STATE], inputs[ENVIRONMENT]]
        actions = self.action.unnormalise(out.actions[:, : self.chunk_size].float())
        return Features(torch.cat([part.float() for part in parts], 1), actions.clamp(-1, 1))

    def inputs(self, obs: Obs) -> Obs:
        """What the network reads, normalised: images by number, state, environment state."""
        settings = self.settings
        return {
            **{f"{IMAGE}{i}": image for i, image in enumerate(self.pixels(obs))},
            STATE: self._vector(obs, settings.state_keys, self.state),
            ENVIRONMENT: self._vector(obs, settings.environment_keys, self.environment),
        }

    def _run(self, inputs: Obs) -> ActOutput:
        dtype = self.network.dtype
        images = [inputs[f"{IMAGE}{i}"].to(dtype) for i in range(len(self.images))]
        return self.network(images, inputs[STATE].to(dtype), inputs[ENVIRONMENT].to(dtype))

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

    # ------------------------------------------------------------ training

    def blocks(self) -> list[nn.Module]:
        """Image network, input projections, encoder, decoder; not the action head."""
        return self.network.blocks()

    @property
    def taught_steps(self) -> int:
        """All actions that the network computes, also those that are not executed.

        Left out, they would drift with the weights that they share with the others, and LeRobot's
        user may raise `n_action_steps`.
        """
        return self.network.sizes.chunk_size

    def imitation_loss(
        self, inputs: Obs, chunks: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean absolute error of the normalised actions, with the latent at zero, as it acts.

        LeRobot trains with a latent that a variational encoder finds in the demonstrated chunk, to
        tell apart several ways of doing the same. A deterministic teacher has one way.

        Args:
            inputs: what `inputs` returned.
            chunks: actions [B, `taught_steps`, A] in the environment's range.
            generator: not read: nothing is drawn.
        """
        del generator
        wanted = self.action.normalise(chunks)
        return F.l1_loss(self._run(inputs).actions.to(wanted.dtype), wanted)

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

    def network_record(self) -> dict[str, Any]:
        """Its sizes."""
        return asdict(self.network.sizes)

    def write_weights(self, source: Path, folder: Path) -> None:
        """Writes a LeRobot folder."""
        write_network(self.network, source, folder)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ActBackbone:
        """Rebuilds the module: weights from `source`, or random ones where that is null."""
        return cls(*rebuild(config, ActSizes, ActSettings, build_network, load_network))
