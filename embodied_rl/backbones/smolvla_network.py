"""The network of SmolVLA (Shukor et al. 2025, arXiv 2506.01844) over transformers' SmolVLM.

Written from the description and the tensor names of LeRobot's `smolvlm_with_expert.py` and
`modeling_smolvla.py`. A prefix of image, text and state tokens goes through the first layers of
the language model, which keep their keys and values; an expert of the same depth takes noisy
actions to a velocity, attending to the prefix and, in some layers, to the actions before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, SmolVLMConfig, SmolVLMModel

from embodied_rl.backbones.smolvla_sizes import SmolVLASizes

WAVELENGTH = 10_000  # of the rotary positions, whatever the language model was trained with


@dataclass
class SmolVLAContext:
    """What denoising reads of an observation. P prefix tokens, L layers. Never changed.

    Attributes:
        keys: L tensors [B, K, P, size], as the expert's layer reads them.
        values: L tensors [B, K, P, size].
        mask: [B, P] bool, false for padding.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor

    def repeat(self, times: int) -> SmolVLAContext:
        """Returns the context with each row `times` times."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, 0)

        keys, values = tuple(map(rows, self.keys)), tuple(map(rows, self.values))
        return SmolVLAContext(keys, values, rows(self.mask))


class SmolVLANetwork(nn.Module):
    """Vision-language model, action expert and the projections around them.

    Args:
        sizes: of its tensors.
    """

    def __init__(self, sizes: SmolVLASizes) -> None:
        super().__init__()
        self.sizes = sizes
        text = {**sizes.vlm["text_config"], "num_hidden_layers": sizes.num_vlm_layers}
        config = SmolVLMConfig(
            text_config={"model_type": "llama", **text},
            vision_config=sizes.vlm["vision_config"],
            scale_factor=sizes.vlm["scale_factor"],
        )
        self.vlm: Any = SmolVLMModel(config)
        width = sizes.expert
        narrow = {"hidden_size": width, "intermediate_size": sizes.expert_inner, "vocab_size": 1}
        none = {"bos_token_id": None, "eos_token_id": None}
        self.expert: Any = LlamaModel(LlamaConfig(**{**text, **narrow, **none}))
        del self.expert.embed_tokens  # its inputs are never tokens
        # positions are rotated here, not by transformers' tables
        del self.expert.rotary_emb, self.vlm.text_model.rotary_emb
        size = text["num_key_value_heads"] * text["head_dim"]
        for number, layer in enumerate(self.expert.layers):
            if not sizes.attends_to_actions(number):
                for name in ("k_proj", "v_proj"):
                    made = nn.Linear(size, size, bias=text["attention_bias"])
                    setattr(layer.self_attn, name, made)
        self.state_proj = nn.Linear(sizes.max_state_dim, sizes.hidden)
        self.action_in_proj = nn.Linear(sizes.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, sizes.max_action_dim)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.action_out_proj.weight.dtype

    def encode(
        self, pixels: Tensor, ids: Tensor, ids_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, SmolVLAContext]:
        """Runs the prefix: cameras, text, state.

        Args:
            pixels: [B, C, 3, h, h] in [-1, 1].
            ids: [B, T] token ids.
            ids_mask: [B, T] bool, false for padding.
            state: [B, S] normalised and padded.

        Returns:
            the last hidden state [B, P, M], normalised, and the context.
        """
        hidden = self.sizes.hidden
        seen = see(self.vlm.vision_model, pixels.flatten(0, 1))
        seen = self.vlm.connector(seen).unflatten(0, pixels.shape[:2]).flatten(1, 2)
        words = self.vlm.text_model.embed_tokens(ids)
        scale = math.sqrt(hidden)
        x = torch.cat([seen * scale, words * scale, self.state_proj(state)[:, None]], 1)
        ones = ids_mask.new_ones(len(ids), 1)
        mask = torch.cat([ones.expand(-1, seen.shape[1]), ids_mask, ones], 1)
        places = mask.cumsum(1) - 1
        # all see images and text, only the state's own token sees the state
        last = torch.arange(x.shape[1], device=x.device) == x.shape[1] - 1
        visible = mask[:, None, :] & (~last[None, None, :] | last[None, :, None])
        keys, values = [], []
        layers = zip(self.vlm.text_model.layers, self.expert.layers, strict=True)
        for number, (layer, own) in enumerate(layers):
            q, k, v = project(layer, layer.input_layernorm(x))
            q, k = rotate(q, places), rotate(k, places)
            x = finish(layer, x, attend(q, k, v, visible))
            if not self.sizes.attends_to_actions(number):
                # the expert projects the prefix's keys and values once more; they never change
                heads = own.self_attn.head_dim
                k, v = (
                    split(linear(merge(part)), heads)
                    for linear, part in ((own.self_attn.k_proj, k), (own.self_attn.v_proj, v))
                )
            keys.append(k)
            values.append(v)
        x = self.vlm.text_model.norm(x)
        return x, SmolVLAContext(tuple(keys), tuple(values), mask)

    def velocity(self, context: SmolVLAContext, noisy: Tensor, time: float | Tensor) -> Tensor:
        """Evaluates the velocity field at chunks [B, H, W] and a time in (0, 1], or times [B].

        Returns:
            [B, H, W] in the network's precision.
        """
        count, length = noisy.shape[:2]
        actions = self.action_in_proj(noisy.to(self.dtype))
        sines = time_embedding(time, self.sizes, noisy.device).to(self.dtype)
        joined = torch.cat([actions, sines.unsqueeze(-2).expand_as(actions)], 2)
        x = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(joined)))
        steps = torch.arange(length, device=noisy.device)
        own = steps[None].expand(count, length)
        after = own + context.mask.sum(1, keepdim=True)
        prefix = context.mask[:, None, :].expand(-1, length, -1)
        causal = (steps[None, :] <= steps[:, None])[None].expand(count, -1, -1)
        whole = torch.cat([prefix, causal], 2)
        for number, layer in enumerate(self.expert.layers):
            inner = layer.input_layernorm(x)
            keys, values = context.keys[number], context.values[number]
            if self.sizes.attends_to_actions(number):
                q, k, v = project(layer, inner)
                k = torch.cat([keys, rotate(k, after)], 2)
                out = attend(rotate(q, after), k, torch.cat([values, v], 2), whole)
            else:
                q = split(layer.self_attn.q_proj(inner), layer.self_attn.head_dim)
                out = attend(rotate(q, own), keys, values, prefix)
            x = finish(layer, x, out)
        return self.action_out_proj(self.expert.norm(x))

    def blocks(self) -> list[nn.Module]:
        """The parts between observation and features, in that order; not the expert."""
        vision, text = self.vlm.vision_model, self.vlm.text_model
        layers = list(text.layers)
        return [
            vision.embeddings,
            *vision.encoder.layers,
            nn.ModuleList([vision.post_layernorm, self.vlm.connector]),
            nn.ModuleList([text.embed_tokens, self.state_proj]),
            *layers[:-1],
            nn.ModuleList([layers[-1], text.norm]),
        ]


def see(vision: Any, pixels: Tensor) -> Tensor:
    """The vision tower's last hidden state [N, patches, width] of images [N, 3, h, h].

    Its own forward looks at a mask on the host first, in which every patch is there.
    """
    side = pixels.shape[-1] // vision.patch_size
    whole = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
    patches = vision.embeddings(pixel_values=pixels, patch_attention_mask=whole)
    return vision.post_layernorm(vision.encoder(inputs_embeds=patches).last_hidden_state)


def split(x: Tensor, size: int) -> Tensor:
    """[B, N, heads x size] to [B, heads, N, size]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[B, heads, N, size] to [B, N, heads x size]."""
    return x.transpose(1, 2).flatten(2)


def project(layer: Any, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, N, size] of a layer's normalised input."""
    attention = layer.self_attn
    q, k, v = (
        split(linear(inner), attention.head_dim)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return q, k, v


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions, in float32 at least: turns pairs (i, i + size / 2) of [B, heads, N, size].

    Args:
        x: queries or keys.
        places: [B, N].
    """
    half = x.shape[-1] // 2
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    index = torch.arange(half, device=x.device, dtype=torch.float32)
    angle = places[:, None, :, None].float() / WAVELENGTH ** (index * 2 / x.shape[-1])
    sin, cos = angle.sin(), angle.cos()
    first, second = exact.split(half, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention in float32 at least; several query heads share a key head.

    Args:
        q: [B, Q heads, N, size].
        k: [B, K heads, P, size].
        v: [B, K heads, P, size].
        visible: [B, N, P] bool.

    Returns:
        [B, N, Q heads x size] in v's precision.
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    out = F.scaled_dot_product_attention(
        q.to(exact), k.to(exact), v.to(exact), attn_mask=visible[:, None], enable_gqa=True
    )
    return merge(out).to(v.dtype)


def finish(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """What follows attention in a layer: projection, feed-forward, both with their residual."""
    x = x + layer.self_attn.o_proj(attended)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def time_embedding(time: float | Tensor, sizes: SmolVLASizes, device: torch.device) -> Tensor:
    """Sines, then cosines, of times [...], with periods spaced geometrically: [..., width] float64.

    The time itself is float32, as published: the shortest period tells the difference.
    """
    ratio = sizes.max_period / sizes.min_period
    when = torch.as_tensor(time, dtype=torch.float32, device=device).double()[..., None]
    place = torch.linspace(0, 1, sizes.expert // 2, dtype=torch.float64, device=device)
    angle = 2 * math.pi * when / (sizes.min_period * ratio**place)
    return torch.cat([angle.sin(), angle.cos()], -1)
