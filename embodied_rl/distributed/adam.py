"""torch's fused Adam as one operation, which a compiled update calls as it is.

Left to the compiler, Adam becomes a dozen passes over each parameter and takes ten times as long
on a CPU; and an optimiser object cannot go into a compiled function at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
# defined by its schema: what torch.library.custom_op wraps around a function costs more than Adam
_LIBRARY = torch.library.Library("embodied_rl", "DEF")
_LIBRARY.define(
    "adam(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor[] steps, Tensor rate, float beta1, float beta2, "
    "float weight_decay) -> ()"
)


def _adam(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rate: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Takes one step of Adam, or of AdamW where there is weight decay.

    Args:
        parameters: of one dtype, moved in place.
        gradients: theirs.
        exp_avgs: first moments, moved in place.
        exp_avg_sqs: second moments, moved in place.
        steps: scalars, one per parameter: steps taken so far, this one included.
        rate: the learning rate [1], on the parameters' device.
        beta1: decay of the first moments.
        beta2: decay of the second moments.
        weight_decay: decoupled (Loshchilov and Hutter 2019); 0 for none.
    """
    kernel = torch.ops.aten._fused_adamw_ if weight_decay > 0 else torch.ops.aten._fused_adam_
    kernel.tensor_lr(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=EPS,
        amsgrad=False,
        maximize=False,
    )


_LIBRARY.impl("adam", _adam, "CompositeExplicitAutograd")


@torch.library.register_fake("embodied_rl::adam")
def _adam_fake(*args: object) -> None:
    """Shapes only: nothing comes back."""


adam = torch.ops.embodied_rl.adam.default  # a graph of torch.compile holds it whole
