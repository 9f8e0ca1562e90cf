"""SmolVLA (Shukor et al. 2025, arXiv 2506.01844) out of a LeRobot folder, without LeRobot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.backbones.flow_times import draw_times
from embodied_rl.backbones.images import to_pixels
from embodied_rl.backbones.lerobot_normalise import Normaliser
from embodied_rl.backbones.pi0_inputs import state_vector
from embodied_rl.backbones.pi0_network import check_dtype
from embodied_rl.backbones.pi0_settings import fit
from embodied_rl.backbones.prompts import pad_prompts
from embodied_rl.backbones.published import PublishedBackbone
from embodied_rl.backbones.smolvla_folder import (
    SmolVLASettings,
    read_smolvla,
    tokenizer_of,
)
from embodied_rl.backbones.smolvla_network import SmolVLAContext, SmolVLANetwork
from embodied_rl.backbones.smolvla_sizes import SmolVLASizes
from embodied_rl.backbones.smolvla_weights import build_network, load_network, write_network
from embodied_rl.backbones.source import read_source, rebuild
from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces import FlowBackbone
from embodied_rl.types import INSTRUCTION, EnvSpec, Obs


class SmolVLABackbone(FlowBackbone, PublishedBackbone):
    """SmolVLM's first layers and a flow-matching expert, with LeRobot's preprocessing.

    The prefix (images, instruction, state) runs once for an observation. Its last hidden state,
    averaged over each camera and over the text, that of the state's token, which has seen all
    others, and the normalised state are the features; its keys and values serve every denoising
    step of every chunk.

    Args:
        network: the model.
        settings: everything around it.
        dtype: name of its precision.
        source: folder that the weights came from; None: they are in our own policy folder.
    """

    name, title = "smolvla", "SmolVLA"
    keeps_inputs = False  # float pixels
    tuning_rate = 1e-4  # LeRobot's

    prompt_ids: Tensor
    prompt_mask: Tensor

    def __init__(
        self,
        network: SmolVLANetwork,
        settings: SmolVLASettings,
        dtype: str = "float32",
        source: str | None = None,
    ) -> None:
        super().__init__()
        self.network, self.settings, self.dtype_name, self.source = network, settings, dtype, source
        self.state = Normaliser(**settings.state)
        self.action = Normaliser(**settings.action)
        sizes = network.sizes
        self.chunk_size, self.noise_dim = sizes.chunk_size, sizes.max_action_dim
        self.image_size: int = sizes.vlm["vision_config"]["image_size"]
        self.vocabulary: int = sizes.vlm["text_config"]["vocab_size"]
        self._connect()

    def _connect(self) -> None:
        """Takes over cameras, sizes and prompts from the settings."""
        settings, sizes = self.settings, self.network.sizes
        self.action_dim = settings.action_dim or self.noise_dim
        state_dim = settings.state_dim or sizes.max_state_dim
        self.feature_dim = (len(settings.cameras) + 2) * sizes.hidden + state_dim
        ids, mask = pad_prompts([prompt for _, prompt in settings.prompts])
        device = self.network.action_out_proj.weight.device
        self.register_buffer("prompt_ids", ids.to(device), persistent=False)
        self.register_buffer("prompt_mask", mask.bool().to(device), persistent=False)

    # ------------------------------------------------------------ computing

    def inputs(self, obs: Obs) -> dict[str, Tensor]:
        """Preprocesses observations to the arguments of `SmolVLANetwork.encode`.

        Absent cameras have no tokens. Prompts are padded to the longest instruction; padding
        changes nothing, for it is masked and takes no position.
        """
        settings, dtype = self.settings, self.network.dtype
        if not settings.cameras:
            raise UserError("the policy has no cameras yet: call check_env with the environment.")
        state = self._proprioception(obs)
        state = F.pad(state, (0, self.network.sizes.max_state_dim - state.shape[-1]))
        pixels = torch.stack(
            [to_pixels(obs[key], self.image_size, settings.resize) for _, key in settings.cameras],
            1,
        )
        if len(settings.prompts) > 1:
            index = obs[INSTRUCTION].long().flatten()
        else:
            index = torch.zeros(len(state), dtype=torch.int64, device=state.device)
        return {
            "pixels": pixels.to(dtype),
            "ids": self.prompt_ids[index],
            "ids_mask": self.prompt_mask[index],
            "state": state.to(dtype),
        }

    def _proprioception(self, obs: Obs) -> Tensor:
        """The normalised state vector [B, n]."""
        return self.state.normalise(state_vector(obs, self.settings.state_keys))

    def prefix(self, obs: Obs) -> tuple[Tensor, SmolVLAContext]:
        """Encodes images, instruction and state; features float32 whatever the precision."""
        inputs = self.inputs(obs)
        hidden, context = self.network.encode(**inputs)
        hidden = hidden.float()
        cameras, tokens = inputs["pixels"].shape[1], self.network.sizes.image_tokens
        seen = hidden[:, : cameras * tokens].unflatten(1, (cameras, tokens)).mean(2)
        weight = inputs["ids_mask"][:, :, None].to(hidden.dtype)
        text = (hidden[:, cameras * tokens : -1] * weight).sum(1) / weight.sum(1)
        parts = [seen.flatten(1), text, hidden[:, -1], self._proprioception(obs).float()]
        return torch.cat(parts, 1), context

    def integrate(self, context: SmolVLAContext, noise: Tensor) -> Tensor:
        """Integrates noise [B, H, W] from time 1 to 0 in Euler steps.

        The state of the integration keeps the noise's precision.
        """
        steps = self.network.sizes.num_steps
        change = -1.0 / steps
        for step in range(steps):
            velocity = self.network.velocity(context, noise, 1.0 + step * change)
            noise = noise + change * velocity.to(noise.dtype)
        return noise

    def denoise(self, context: SmolVLAContext, noise: Tensor) -> Tensor:
        """Integrates noise and takes the action back to the environment's range."""
        return self.action.unnormalise(self.integrate(context, noise)[..., : self.action_dim])

    def repeat(self, context: SmolVLAContext, times: int) -> SmolVLAContext:
        """Repeats each row `times` times."""
        return context.repeat(times)

    # ------------------------------------------------------------ training

    def blocks(self) -> list[nn.Module]:
        """Vision tower, connector, embeddings and language model; not the action expert."""
        return self.network.blocks()

    def imitation_loss(
        self, inputs: Obs, chunks: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Flow-matching loss of demonstrated chunks [B, H, A], as SmolVLA was trained.

        Args:
            inputs: what `inputs` returned.
            chunks: actions in the environment's range.
            generator: draws noise and times, on the CPU; None: torch's default one.
        """
        actions = self.action.normalise(chunks)
        # Padded entries count, as in LeRobot until March 2026 (its pull request 3133 left them out)
        # and in π0: `integrate` moves them too, and where their velocity is not taught they leave
        # the path from noise to zero on which the network is trained to read them.
        actions = F.pad(actions, (0, self.noise_dim - actions.shape[-1]))
        noise = torch.randn(actions.shape, generator=generator).to(actions)
        times = draw_times(len(actions), generator).to(actions)
        time = times[:, None, None]
        _, context = self.network.encode(**inputs)
        velocity = self.network.velocity(context, time * noise + (1 - time) * actions, times)
        return F.mse_loss(velocity.to(actions.dtype), noise - actions)

    # ------------------------------------------------------------ environment

    def check_env(self, spec: EnvSpec) -> None:
        """Finds cameras and state among the observations, and encodes the instructions.

        An environment without instructions is told its own name.

        Raises:
            UserError: cameras, state, action or instructions do not fit.
        """
        sizes = self.network.sizes
        fit(self.settings, spec, sizes.max_state_dim, sizes.max_action_dim, self.vocabulary)
        self._connect()

    # ------------------------------------------------------------ folders

    @classmethod
    def from_folder(cls, folder: Path, config: PolicyConfig) -> SmolVLABackbone:
        """Loads a LeRobot folder; the layout is described in docs/lerobot_policies.md.

        Raises:
            UserError: something in the folder or in `config` does not fit; says what.
        """
        dtype = check_dtype(config.dtype)
        weights, buffers = read_source(folder)
        sizes, settings = read_smolvla(folder, buffers, config)
        settings.tokenizer = str(tokenizer_of(folder, config.tokenizer).resolve())
        network = load_network(weights, sizes, dtype, str(folder))
        return cls(network, settings, config.dtype, str(folder.resolve()))

    def network_record(self) -> dict[str, Any]:
        """Its sizes."""
        return asdict(self.network.sizes)

    def write_weights(self, source: Path, folder: Path) -> None:
        """Writes a LeRobot folder."""
        write_network(self.network, source, folder)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SmolVLABackbone:
        """Rebuilds the module: weights from `source`, or random ones where that is null."""
        return cls(*rebuild(config, SmolVLASizes, SmolVLASettings, build_network, load_network))
