"""π0 (Black et al. 2024, arXiv 2410.24164): a vision-language model and a flow-matching expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PI0ForConditionalGeneration

from embodied_rl.backbones.images import check_resize, to_pixels
from embodied_rl.backbones.lerobot_normalise import Normaliser
from embodied_rl.backbones.pi0_context import Pi0Context
from embodied_rl.backbones.pi0_folder import load_folder, rebuild, write_trained
from embodied_rl.backbones.pi0_inputs import state_vector
from embodied_rl.backbones.pi0_network import network_dict
from embodied_rl.backbones.pi0_prefix import average, encode, prefix_blocks
from embodied_rl.backbones.pi0_settings import Pi0Settings, fit
from embodied_rl.backbones.pi0_training import flow_loss
from embodied_rl.backbones.prompts import pad_prompts
from embodied_rl.backbones.published import PublishedBackbone
from embodied_rl.config import PolicyConfig
from embodied_rl.interfaces import FlowBackbone
from embodied_rl.types import INSTRUCTION, EnvSpec, Obs


class Pi0Backbone(FlowBackbone, PublishedBackbone):
    """transformers' π0 with its own preprocessing.

    The prefix (images, instruction) runs once for an observation. Its last hidden state, averaged
    over each camera and over the text, and the normalised proprioception are the features; its
    keys and values serve every denoising step of every chunk.

    Args:
        network: the model.
        settings: everything around it.
        dtype: name of its precision.
        source: folder that the weights came from; None: they are in our own policy folder.
    """

    name, title = "pi0", "π0"
    layouts = "LeRobot's or transformers' layout"
    keeps_inputs = False  # float pixels
    tuning_rate = 2.5e-5  # openpi's

    prompt_ids: Tensor
    prompt_mask: Tensor

    def __init__(
        self,
        network: PI0ForConditionalGeneration,
        settings: Pi0Settings,
        dtype: str = "float32",
        source: str | None = None,
    ) -> None:
        super().__init__()
        check_resize(settings.resize)
        self.network, self.settings, self.dtype_name, self.source = network, settings, dtype, source
        self.state = Normaliser(**settings.state)
        self.action = Normaliser(**settings.action)
        config: Any = network.config  # its parts are typed as maybe dictionaries
        self.chunk_size, self.noise_dim = config.chunk_size, config.max_action_dim
        vision, text = config.vlm_config.vision_config, config.vlm_config.text_config
        self.image_size: int = vision.image_size
        self.image_tokens: int = (vision.image_size // vision.patch_size) ** 2
        self.image_token_id: int = config.vlm_config.image_token_id
        self.hidden_dim: int = text.hidden_size
        self.vocabulary: int = text.vocab_size
        self.checkpointing = False
        self._connect()

    def _connect(self) -> None:
        """Takes over cameras, sizes and prompts from the settings."""
        settings = self.settings
        self.action_dim = settings.action_dim or self.noise_dim
        state_dim = settings.state_dim or self.network.config.max_state_dim
        self.feature_dim = (len(settings.cameras) + 1) * self.hidden_dim + state_dim
        ids, mask = pad_prompts([prompt for _, prompt in settings.prompts])
        device = self.network.action_out_proj.weight.device
        self.register_buffer("prompt_ids", ids.to(device), persistent=False)
        self.register_buffer("prompt_mask", mask.to(device), persistent=False)

    # ------------------------------------------------------------ computing

    @property
    def precision(self) -> torch.dtype:
        """Of the network's weights; adapters inside it may have another."""
        return self.network.action_out_proj.weight.dtype

    def inputs(self, obs: Obs) -> dict[str, Tensor]:
        """Preprocesses observations to the arguments of `sample_actions`.

        Absent cameras have no tokens. Prompts are padded to the longest instruction.

        Returns:
            state [B, S], input_ids [B, P], attention_mask [B, P], pixel_values [B, C, 3, h, h] and
            pixel_attention_mask [B, C], C cameras.
        """
        settings, dtype = self.settings, self.precision
        if not settings.cameras:
            raise RuntimeError("check_env first: the policy does not know its cameras yet")
        state = self._proprioception(obs)
        state = F.pad(state, (0, self.network.config.max_state_dim - state.shape[-1]))
        pixels = torch.stack(
            [to_pixels(obs[key], self.image_size, settings.resize) for _, key in settings.cameras],
            1,
        )
        count, cameras = pixels.shape[:2]
        if len(settings.prompts) > 1:
            index = obs[INSTRUCTION].long().flatten()
        else:
            index = torch.zeros(count, dtype=torch.int64, device=pixels.device)
        text, text_mask = self.prompt_ids[index], self.prompt_mask[index]
        image = text.new_full((count, cameras * self.image_tokens), self.image_token_id)
        return {
            "state": state.to(dtype),
            "input_ids": torch.cat([image, text], 1),
            "attention_mask": torch.cat([torch.ones_like(image), text_mask], 1),
            "pixel_values": pixels.to(dtype),
            "pixel_attention_mask": torch.ones(
                count, cameras, dtype=torch.bool, device=pixels.device
            ),
        }

    def _proprioception(self, obs: Obs) -> Tensor:
        """The normalised state vector [B, n]."""
        return self.state.normalise(state_vector(obs, self.settings.state_keys))

    def prefix(self, obs: Obs) -> tuple[Tensor, Pi0Context | None]:
        """Encodes images and instruction; features float32 whatever the network's precision.

        While activations are recomputed (`enable_checkpointing`, with gradients on) there is no
        context: only features can be trained through.
        """
        inputs = self.inputs(obs)
        mask = inputs["attention_mask"]
        again = self.checkpointing and torch.is_grad_enabled()
        encoded = encode(self.network, inputs, recompute=again)
        context = None
        if encoded.past_key_values is not None:
            layers = encoded.past_key_values.layers
            keys, values = (tuple(getattr(la, k) for la in layers) for k in ("keys", "values"))
            context = Pi0Context(keys, values, mask, inputs["state"])
        cameras = inputs["pixel_values"].shape[1]
        seen, text = average(encoded.last_hidden_state.float(), mask, cameras, self.image_tokens)
        return torch.cat([seen.flatten(1), text, self._proprioception(obs).float()], 1), context

    def velocity(self, context: Pi0Context, noisy: Tensor, time: float) -> Tensor:
        """Evaluates the velocity field at chunks [B, H, W] and a time in (0, 1].

        Returns:
            [B, H, W] in the network's precision.
        """
        when = torch.full((len(noisy),), time, dtype=torch.float32, device=noisy.device)
        return self.network(
            state=context.state,
            noise=noisy.to(self.precision),
            timestep=when,
            attention_mask=context.mask,
            past_key_values=context.cache(),
        ).logits

    def integrate(self, context: Pi0Context, noise: Tensor) -> Tensor:
        """Integrates noise [B, H, W] from time 1 to 0 in Euler steps, as `sample_actions` does.

        The state of the integration keeps the noise's precision.
        """
        steps = self.network.config.num_inference_steps
        change = -1.0 / steps
        for step in range(steps):
            noise = noise + change * self.velocity(context, noise, 1.0 + step * change).to(
                noise.dtype
            )
        return noise

    def denoise(self, context: Pi0Context, noise: Tensor) -> Tensor:
        """Integrates noise and takes the action back to the environment's range."""
        return self.action.unnormalise(self.integrate(context, noise)[..., : self.action_dim])

    def repeat(self, context: Pi0Context, times: int) -> Pi0Context:
        """Repeats each row `times` times."""
        return context.repeat(times)

    # ------------------------------------------------------------ training

    def blocks(self) -> list[nn.Module]:
        """Vision tower, projector and language model, layer by layer; not the action expert."""
        return prefix_blocks(self.network)

    def enable_checkpointing(self) -> None:
        """Keeps only the inputs of layers for the backward pass."""
        self.network.activation_checkpointing_enable({"use_reentrant": False})
        self.checkpointing = True

    def imitation_loss(
        self, inputs: dict[str, Tensor], chunks: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Flow-matching loss of demonstrated chunks [B, H, A], as π0 was trained.

        Args:
            inputs: what `inputs` returned.
            chunks: actions in the environment's range.
            generator: draws noise and times, on the CPU; None: torch's default one.
        """
        actions = self.action.normalise(chunks)
        actions = F.pad(actions, (0, self.noise_dim - actions.shape[-1])).to(self.precision)
        return flow_loss(self.network, inputs, actions, generator)

    # ------------------------------------------------------------ environment

    def check_env(self, spec: EnvSpec) -> None:
        """Finds cameras and state among the observations, and encodes the instructions.

        An environment without instructions is told its own name.

        Raises:
            UserError: cameras, state, action or instructions do not fit.
        """
        config = self.network.config
        fit(self.settings, spec, config.max_state_dim, config.max_action_dim, self.vocabulary)
        self._connect()

    # ------------------------------------------------------------ folders

    @classmethod
    def from_folder(cls, folder: Path, config: PolicyConfig) -> Pi0Backbone:
        """Loads a transformers or LeRobot folder; the layouts are described in docs/pi0.md.

        Raises:
            UserError: something in the folder or in `config` does not fit; says what.
        """
        network, settings = load_folder(folder, config)
        return cls(network, settings, config.dtype, str(folder.resolve()))

    def network_record(self) -> dict[str, Any]:
        """The model's configuration."""
        return network_dict(self.network.config)

    def write_weights(self, source: Path, folder: Path) -> None:
        """Writes a transformers or LeRobot folder, as `source` is."""
        write_trained(self.network, source, folder)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Pi0Backbone:
        """Rebuilds the module: weights from `source`, or random ones where that is null."""
        return cls(*rebuild(config))
