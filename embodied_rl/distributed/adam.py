"""torch's fused Adam as one operation, which a compiled update calls as it is.

Left to the compiler, Adam becomes a dozen passes over each parameter and takes ten times as long
on a CPU; and an optimiser object cannot go into a compiled function at all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam as functional_adam


@torch.library.custom_op(
    "embodied_rl::adam", mutates_args=("parameters", "exp_avgs", "exp_avg_sqs", "steps")
)
def adam(
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
        parameters: moved in place.
        gradients: theirs.
        exp_avgs: first moments.
        exp_avg_sqs: second moments.
        steps: scalars, one per parameter: steps taken so far.
        rate: scalar, the learning rate.
        beta1: decay of the first moments.
        beta2: decay of the second moments.
        weight_decay: decoupled (Loshchilov and Hutter 2019); 0 for none.
    """
    functional_adam(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=rate,  # type: ignore[arg-type]
        weight_decay=weight_decay,
        eps=1e-8,
        maximize=False,
        decoupled_weight_decay=weight_decay > 0,
    )
