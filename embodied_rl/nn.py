"""Network parts: Batch Renormalisation, MLPs and the critic ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.config import BatchRenormConfig


class BatchRenorm(nn.Module):
    r"""Batch Renormalisation (Ioffe 2017) with CrossQ's settings (Bhatt et al. 2024, table 1).

    In training mode, with batch moments mu, v (biased variance) and the running moments m, w of
    *before* this forward:

        r = clip(sg[sqrt(v + eps) / sqrt(w + eps)], 1 / r_max, r_max)
        d = clip(sg[(mu - m) / sqrt(w + eps)], -d_max, d_max)
        y = gamma * ((x - mu) / sqrt(v + eps) * r + d) + beta

    with r = 1, d = 0 during the first `warmup_steps` training-mode forwards; then
    m <- momentum * m + (1 - momentum) * mu, and the same for w. Evaluation mode normalises with
    m and w and changes nothing. The unfolded form keeps gradients finite for a feature that is
    constant over the batch.

    Args:
        features: F, size of the last axis; all other axes are batch.
        momentum: weight of the old running moments.
        eps: added to variances.
        r_max: bound on the scale correction.
        d_max: bound on the shift correction.
        warmup_steps: training-mode forwards before the corrections apply.
    """

    running_mean: Tensor
    running_var: Tensor
    steps: Tensor

    def __init__(
        self,
        features: int,
        momentum: float = 0.99,
        eps: float = 1e-3,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 100_000,
    ) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.r_max, self.d_max = r_max, d_max
        self.warmup_steps = warmup_steps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [..., F]; statistics are kept in the parameters' precision.

        Raises:
            ValueError: training mode with fewer than two rows, or a wrong last axis.
        """
        features = self.weight.shape[0]
        if x.shape[-1] != features:
            raise ValueError(f"expected last axis {features}, got shape {tuple(x.shape)}")
        flat = x.reshape(-1, features).to(self.running_mean.dtype)
        out = self._normalise_batch(flat) if self.training else self._normalise_running(flat)
        return out.reshape(x.shape).to(x.dtype)

    def _normalise_batch(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        if n < 2:
            raise ValueError(f"batch statistics need at least 2 rows, got {n}")
        # with momentum 1 the native kernel leaves this batch's mean and unbiased variance here
        mean, var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        x_hat = F.batch_norm(x, mean, var, training=True, momentum=1.0, eps=self.eps)
        with torch.no_grad():
            var = var * ((n - 1) / n)
            running_std = (self.running_var + self.eps).sqrt()
            r, d = self.corrections(mean, var, running_std)
            self.running_mean.lerp_(mean, 1 - self.momentum)
            self.running_var.lerp_(var, 1 - self.momentum)
            self.steps += 1
        return torch.addcmul(self.weight * d + self.bias, x_hat, self.weight * r)

    def corrections(self, mean: Tensor, var: Tensor, running_std: Tensor) -> tuple[Tensor, Tensor]:
        """Returns r and d for batch moments [F], given the running standard deviation [F]."""
        r = ((var + self.eps).sqrt() / running_std).clamp(1 / self.r_max, self.r_max)
        d = ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
        renorm = self.steps >= self.warmup_steps  # on the device: no synchronisation
        return torch.where(renorm, r, torch.ones_like(r)), torch.where(
            renorm, d, torch.zeros_like(d)
        )

    def _normalise_running(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return torch.addcmul(self.bias - self.running_mean * scale, x, scale)

    def extra_repr(self) -> str:
        """Shows the settings in `print(module)`."""
        return (
            f"{self.weight.shape[0]}, momentum={self.momentum}, eps={self.eps}, "
            f"r_max={self.r_max}, d_max={self.d_max}, warmup_steps={self.warmup_steps}"
        )


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    *,
    renorm: BatchRenormConfig | None = None,
) -> nn.Sequential:
    """Builds [Linear -> ReLU (-> BRN)] x depth -> Linear, with BRN on the input where given.

    The layer order of CrossQ's critic (DESIGN section 4; the authors' code).
    """
    layers: list[nn.Module] = []
    arguments: dict[str, Any] = vars(renorm) if renorm is not None else {}
    if renorm is not None:
        layers.append(BatchRenorm(inputs, **arguments))
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        if renorm is not None:
            layers.append(BatchRenorm(width, **arguments))
        inputs = width
    layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


class CriticEnsemble(nn.Module):
    """K independent Q networks over features and a flattened action chunk.

    Members are separate modules: on a CPU that is faster than one batched product.

    Args:
        feature_dim: D.
        action_size: H * A.
        hidden: widths of the hidden layers.
        num_critics: K.
        renorm: Batch Renormalisation settings; None for plain MLPs.
    """

    def __init__(
        self,
        feature_dim: int,
        action_size: int,
        hidden: Sequence[int],
        num_critics: int,
        renorm: BatchRenormConfig | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            mlp(feature_dim + action_size, hidden, 1, renorm=renorm) for _ in range(num_critics)
        )

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        """Returns Q [K, B] for features x [B, D] and actions [B, H, A]."""
        inputs = torch.cat([x, action.flatten(1)], dim=-1)
        return torch.stack([member(inputs).squeeze(-1) for member in self.members])
