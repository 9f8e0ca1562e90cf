"""The tanh-squashed Gaussian that actors share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


def log_prob(pre_tanh: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a = tanh(u), u ~ N(mean, std), summed over all axes but the first.

    The squashing term uses log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which stays
    finite where tanh saturates (Haarnoja et al. 2018, appendix C, in softplus form).

    Args:
        pre_tanh: u [B, H, A].
        mean: of u, [B, H, A].
        log_std: of u, [B, H, A].

    Returns:
        [B].
    """
    noise = (pre_tanh - mean) * torch.exp(-log_std)
    normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    return (normal - squash).flatten(1).sum(-1)


def sample(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a reparameterised sample; returns (tanh(u), log-probability [B])."""
    pre_tanh = _draw(mean, log_std)
    return torch.tanh(pre_tanh), log_prob(pre_tanh, mean, log_std)


def explore(mean: Tensor, log_std: Tensor) -> Tensor:
    """Draws what `sample` draws, without its log-probability."""
    return torch.tanh(_draw(mean, log_std))


def _draw(mean: Tensor, log_std: Tensor) -> Tensor:
    return mean + torch.exp(log_std) * torch.randn_like(mean)


def split(output: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Splits a network's output [B, 2 H A] into location and log standard deviation [B, H, A]."""
    location, log_std = output.view(shape[0], 2, *shape[1:]).unbind(1)
    return location, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


@torch.no_grad()
def start_at(net: nn.Sequential, log_std: float) -> None:
    """Zeroes the last layer, so that `split` gives location 0 and `log_std` for every input."""
    last = net[-1]
    if not isinstance(last, nn.Linear):
        raise TypeError(f"expected a network that ends in Linear, got {type(last).__name__}")
    last.weight.zero_()
    last.bias.zero_()
    last.bias.view(2, -1)[1] = log_std
