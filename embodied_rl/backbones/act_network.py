"""The network of ACT (Zhao et al. 2023, arXiv 2304.13705) in LeRobot's layout.

Modules carry the published names. Written from the description and the tensor names of LeRobot's
`modeling_act.py`; at inference the latent is zero and the variational encoder is not there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.backbones.act_resnet import build_resnet

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class ActSizes:
    """What fixes the network's tensors, JSON-able; names as in LeRobot's config.json.

    Attributes:
        action_dim: A.
        state_dim: S; 0: no state token.
        environment_dim: E; 0: no environment token.
        resnet: arguments of `ResNetConfig`; None: no cameras.
        chunk_size: actions that the network computes.
        n_action_steps: H, those of them that are executed.
        dim_model: width M.
        n_heads: attention heads.
        dim_feedforward: inner width of the feed-forward layers.
        feedforward_activation: one of `ACTIVATIONS`.
        n_encoder_layers: layers of the encoder.
        n_decoder_layers: layers of the decoder.
        pre_norm: whether layers normalise their input rather than their output.
        latent_dim: of the variational encoder's latent.
        use_vae: whether the folder has a variational encoder.
        n_vae_encoder_layers: its layers.
    """

    action_dim: int
    state_dim: int
    environment_dim: int
    resnet: dict[str, Any] | None
    chunk_size: int = 100
    n_action_steps: int = 100
    dim_model: int = 512
    n_heads: int = 8
    dim_feedforward: int = 3200
    feedforward_activation: str = "relu"
    n_encoder_layers: int = 4
    n_decoder_layers: int = 1
    pre_norm: bool = False
    latent_dim: int = 32
    use_vae: bool = True
    n_vae_encoder_layers: int = 4


@dataclass
class ActOutput:
    """What the network makes of an observation.

    Attributes:
        cameras: [B, C, M] mean of the encoder's output over each camera's tokens.
        plan: [B, M] mean of the decoder's output over the chunk.
        actions: [B, chunk, A] normalised actions.
    """

    cameras: Tensor
    plan: Tensor
    actions: Tensor


class Attention(nn.Module):
    """Multi-head attention with the tensors of `nn.MultiheadAttention`.

    The output projection is called as a module, so that low-rank adapters work on it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends from [B, Q, M] to keys and values [B, K, M]; returns [B, Q, M]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward layer, normalised before (pre_norm) or after."""

    def __init__(self, sizes: ActSizes) -> None:
        super().__init__()
        width = sizes.dim_model
        self.self_attn = Attention(width, sizes.n_heads)
        self.linear1 = nn.Linear(width, sizes.dim_feedforward)
        self.linear2 = nn.Linear(sizes.dim_feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pre_norm, self.activation = sizes.pre_norm, ACTIVATIONS[sizes.feedforward_activation]

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Takes tokens [B, N, M] and their positions [N, M] to [B, N, M]."""
        inner = self.norm1(x) if self.pre_norm else x
        place = inner + positions
        x = x + self.self_attn(place, place, inner)
        x = x if self.pre_norm else self.norm1(x)
        inner = self.norm2(x) if self.pre_norm else x
        x = x + self.linear2(self.activation(self.linear1(inner)))
        return x if self.pre_norm else self.norm2(x)


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder's output, a feed-forward layer."""

    def __init__(self, sizes: ActSizes) -> None:
        super().__init__()
        width = sizes.dim_model
        self.self_attn = Attention(width, sizes.n_heads)
        self.multihead_attn = Attention(width, sizes.n_heads)
        self.linear1 = nn.Linear(width, sizes.dim_feedforward)
        self.linear2 = nn.Linear(sizes.dim_feedforward, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.pre_norm, self.activation = sizes.pre_norm, ACTIVATIONS[sizes.feedforward_activation]

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        """Takes [B, Q, M], its positions [Q, M], the memory [B, N, M] and its positions [N, M]."""
        inner = self.norm1(x) if self.pre_norm else x
        place = inner + queries
        x = x + self.self_attn(place, place, inner)
        x = x if self.pre_norm else self.norm1(x)
        inner = self.norm2(x) if self.pre_norm else x
        x = x + self.multihead_attn(inner + queries, memory + positions, memory)
        x = x if self.pre_norm else self.norm2(x)
        inner = self.norm3(x) if self.pre_norm else x
        x = x + self.linear2(self.activation(self.linear1(inner)))
        return x if self.pre_norm else self.norm3(x)


class Encoder(nn.Module):
    """A stack of encoder layers; with pre_norm it ends in a normalisation.

    Args:
        sizes: of the network.
        depth: number of layers.
    """

    def __init__(self, sizes: ActSizes, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(sizes) for _ in range(depth))
        self.norm = nn.LayerNorm(sizes.dim_model) if sizes.pre_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Takes tokens [B, N, M] and their positions [N, M] to [B, N, M]."""
        for layer in self.layers:
            x = layer(x, positions)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers, ending in a normalisation."""

    def __init__(self, sizes: ActSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(sizes.n_decoder_layers))
        self.norm = nn.LayerNorm(sizes.dim_model)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        """As `DecoderLayer.forward`."""
        for layer in self.layers:
            x = layer(x, queries, memory, positions)
        return self.norm(x)


class ActNetwork(nn.Module):
    """Images and state to a chunk of actions, all normalised.

    Tokens of the encoder: latent (zero), state, environment, then each camera's map row by row.

    Args:
        sizes: of its tensors.
    """

    def __init__(self, sizes: ActSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.dim_model
        if sizes.resnet is not None:
            self.backbone = build_resnet(sizes.resnet)
            channels = sizes.resnet["hidden_sizes"][-1]
            self.encoder_img_feat_input_proj = nn.Conv2d(channels, width, 1)
        self.encoder = Encoder(sizes, sizes.n_encoder_layers)
        self.decoder = Decoder(sizes)
        if sizes.state_dim:
            self.encoder_robot_state_input_proj = nn.Linear(sizes.state_dim, width)
        if sizes.environment_dim:
            self.encoder_env_state_input_proj = nn.Linear(sizes.environment_dim, width)
        self.encoder_latent_input_proj = nn.Linear(sizes.latent_dim, width)
        single = 1 + bool(sizes.state_dim) + bool(sizes.environment_dim)
        self.encoder_1d_feature_pos_embed = nn.Embedding(single, width)
        self.decoder_pos_embed = nn.Embedding(sizes.chunk_size, width)
        self.action_head = nn.Linear(width, sizes.action_dim)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.action_head.weight.dtype

    def forward(self, images: list[Tensor], state: Tensor, environment: Tensor) -> ActOutput:
        """Runs the network.

        Args:
            images: normalised images [B, 3, h, w], one tensor for each camera.
            state: [B, S] normalised; S may be 0.
            environment: [B, E] normalised; E may be 0.
        """
        count, dtype = len(state), self.dtype
        tokens = [self.encoder_latent_input_proj(state.new_zeros(count, self.sizes.latent_dim))]
        if self.sizes.state_dim:
            tokens.append(self.encoder_robot_state_input_proj(state))
        if self.sizes.environment_dim:
            tokens.append(self.encoder_env_state_input_proj(environment))
        sequence = [torch.stack(tokens, 1)]
        positions = [self.encoder_1d_feature_pos_embed.weight]
        for image in images:
            seen = self.backbone(image).last_hidden_state
            height, wide = seen.shape[-2:]
            grid = grid_positions(height, wide, self.sizes.dim_model, seen.device)
            positions.append(grid.to(dtype))
            sequence.append(self.encoder_img_feat_input_proj(seen).flatten(2).transpose(1, 2))
        places = torch.cat(positions)
        encoded = self.encoder(torch.cat(sequence, 1), places)
        start = encoded.new_zeros(count, self.sizes.chunk_size, self.sizes.dim_model)
        decoded = self.decoder(start, self.decoder_pos_embed.weight, encoded, places)
        maps = encoded.split([part.shape[1] for part in sequence], 1)[1:]
        means = [part.mean(1) for part in maps]
        cameras = torch.stack(means, 1) if means else encoded[:, :0]
        return ActOutput(cameras, decoded.mean(1), self.action_head(decoded))

    def blocks(self) -> list[nn.Module]:
        """The parts before the features, in order: all but the action head."""
        vision: list[nn.Module] = []
        inputs: list[nn.Module] = [self.encoder_latent_input_proj]
        if self.sizes.resnet is not None:
            stages: Any = self.backbone.encoder.stages
            vision = [self.backbone.embedder, *stages]
            inputs.append(self.encoder_img_feat_input_proj)
        if self.sizes.state_dim:
            inputs.append(self.encoder_robot_state_input_proj)
        if self.sizes.environment_dim:
            inputs.append(self.encoder_env_state_input_proj)
        inputs.append(self.encoder_1d_feature_pos_embed)
        encoder, decoder = list(self.encoder.layers), list(self.decoder.layers)
        ends = nn.ModuleList([encoder[-1], self.encoder.norm])
        last = nn.ModuleList([decoder[-1], self.decoder.norm, self.decoder_pos_embed])
        return [*vision, nn.ModuleList(inputs), *encoder[:-1], ends, *decoder[:-1], last]


def grid_positions(height: int, width: int, size: int, device: torch.device) -> Tensor:
    """Returns sinusoidal positions [height x width, size] of a map, row by row, in float32.

    Half of the entries tell the row, half the column, each counted from 1 and scaled to (0, 2 pi];
    sine and cosine alternate, and two neighbours share the frequency 10000^(-2i / half).
    """
    half = size // 2
    index = torch.arange(half, device=device, dtype=torch.float32)
    divisor = 10_000 ** (2 * (index // 2) / half)

    def line(count: int) -> Tensor:
        place = torch.arange(1, count + 1, device=device, dtype=torch.float32)
        angle = (place / (place[-1] + 1e-6) * 2 * math.pi)[:, None] / divisor
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)

    rows = line(height)[:, None].expand(height, width, half)
    columns = line(width)[None].expand(height, width, half)
    return torch.cat([rows, columns], 2).flatten(0, 1)
