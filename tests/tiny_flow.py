"""A flow policy of a few hundred weights over state, registered by the tests that need one."""

from __future__ import annotations

import torch
from torch import nn

from embodied_rl.errors import UserError
from embodied_rl.interfaces import FlowBackbone

STEPS = 4


class TinyFlow(FlowBackbone):
    """v(x, t, s) is a two-layer network; four Euler steps from noise to action."""

    def __init__(self, state_dim: int, action_dim: int, chunk_size: int = 3) -> None:
        super().__init__()
        self.feature_dim, self.action_dim, self.chunk_size = state_dim, action_dim, chunk_size
        self.noise_dim = action_dim
        size = chunk_size * action_dim
        self.net = nn.Sequential(
            nn.Linear(state_dim + size + 1, 16), nn.Tanh(), nn.Linear(16, size)
        )
        self.encoder = nn.Sequential(nn.Linear(state_dim, 8), nn.Tanh(), nn.Linear(8, state_dim))
        self.encoded, self.denoised = 0, 0  # rows that went through

    def prefix(self, obs):
        self.encoded += len(obs["state"])
        vector = torch.tanh(self.encoder(obs["state"].to(self.encoder[0].weight.dtype)))
        return vector, vector

    def denoise(self, context, noise):
        self.denoised += len(noise)
        x = noise
        for k in range(STEPS):
            t = x.new_full((len(x), 1), 1 - k / STEPS)
            velocity = self.net(torch.cat([context, x.flatten(1), t], 1)).view_as(x)
            x = x - velocity / STEPS
        return x

    def repeat(self, context, times):
        return context.repeat_interleave(times, 0)

    def blocks(self):
        return [self.encoder[0], self.encoder[2]]

    def check_env(self, spec):
        if "state" not in spec.obs or spec.action_dim != self.action_dim:
            raise UserError(f"the policy has {self.action_dim} action entries, but {spec.name} ...")

    def config_dict(self):
        sizes = (self.feature_dim, self.action_dim, self.chunk_size)
        return dict(zip(("state_dim", "action_dim", "chunk_size"), sizes, strict=True))

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    @classmethod
    def for_env(cls, spec):
        return cls(spec.obs["state"].shape[0], spec.action_dim)
