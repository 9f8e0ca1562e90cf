"""Network parts: MLPs and the critic ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.config import BatchRenormConfig
from embodied_rl.products import rounded_linear


class Linear(nn.Linear):
    """A linear layer whose products, forward and backward, may be of a lower precision.

    Weights, bias, gradients and what the layer returns keep their own; only the factors and the
    result of each product are rounded to it.

    Args:
        inputs: I.
        outputs: O.
        matmul_dtype: of the products; float32 for the weights' own.
    """

    def __init__(self, inputs: int, outputs: int, matmul_dtype: str = "float32") -> None:
        super().__init__(inputs, outputs)
        self.low = None if matmul_dtype == "float32" else getattr(torch, matmul_dtype)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Returns x [B, I] @ weight^T + bias, [B, O]; of x * scale + shift where both are given."""
        weight, bias = self.weight, self.bias
        if scale is not None and shift is not None:
            weight, bias = weight * scale, bias + (weight * shift).sum(1)
        if self.low is None:
            return F.linear(x, weight, bias)
        return rounded_linear(x, weight, bias, self.low)


class MLP(nn.Sequential):
    """Layers in a row.

    While the input's Batch Renormalisation trains, its scale and shift go into the weights of the
    layer behind it: the same function, but their gradients come from those weights' and not from a
    product of its own over the whole batch. Where the input wants a gradient that product is needed
    anyway.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, O] for x [B, I]."""
        if x.requires_grad or not (self.training and isinstance(self[0], BatchRenorm)):
            return super().forward(x)
        renorm, linear, *rest = self
        x = linear(renorm(x, affine=False), renorm.weight, renorm.bias)
        for layer in rest:
            x = layer(x)
        return x


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    *,
    renorm: BatchRenormConfig | None = None,
    matmul_dtype: str = "float32",
) -> MLP:
    """Builds (BRN ->) [Linear -> ReLU (-> BRN)] x depth -> Linear.

    With Batch Renormalisation that is the layer order of CrossQ's critic (Bhatt et al. 2024,
    section 3.3 and the authors' code); `renorm.order` and `renorm.on_input` change it.
    `matmul_dtype` is that of the hidden layers' products; the last layer is exact.
    """
    layers: list[nn.Module] = []
    if renorm is not None and renorm.on_input:
        layers.append(BatchRenorm.from_config(inputs, renorm))
    for width in hidden:
        block: list[nn.Module] = [Linear(inputs, width, matmul_dtype), nn.ReLU()]
        if renorm is not None:
            place = 1 if renorm.order == "before" else 2
            block.insert(place, BatchRenorm.from_config(width, renorm))
        layers += block
        inputs = width
    layers.append(Linear(inputs, outputs))
    return MLP(*layers)


class CriticEnsemble(nn.Module):
    """K independent Q networks over features and a flattened action chunk.

    Members are separate modules: on a CPU that is faster than one batched product.

    Args:
        feature_dim: D.
        action_size: H * A.
        hidden: widths of the hidden layers.
        num_critics: K.
        renorm: Batch Renormalisation settings; None for plain MLPs.
        matmul_dtype: of the hidden layers' products.
    """

    def __init__(
        self,
        feature_dim: int,
        action_size: int,
        hidden: Sequence[int],
        num_critics: int,
        renorm: BatchRenormConfig | None = None,
        matmul_dtype: str = "float32",
    ) -> None:
        super().__init__()
        size = feature_dim + action_size
        self.members = nn.ModuleList(
            mlp(size, hidden, 1, renorm=renorm, matmul_dtype=matmul_dtype)
            for _ in range(num_critics)
        )

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        """Returns Q [K, B] for features x [B, D] and actions [B, H, A]."""
        inputs = torch.cat([x, action.flatten(1)], dim=-1)
        return torch.stack([member(inputs).squeeze(-1) for member in self.members])
