"""The entropy temperature alpha and its loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OBJECTIVES = ("alpha", "log_alpha")


class Temperature(nn.Module):
    """A positive scalar, tuned so that the policy's entropy meets a target.

    Args:
        alpha_type: softplus (alpha = log(1 + e^p)), exp (alpha = e^p) or fixed_alpha.
        initial_alpha: alpha before any update.
        target_entropy: entropy of the action chunk, in nats.
        objective: alpha, or log_alpha as in stable-baselines3 and sbx: what multiplies the entropy
            gap in the loss.

    Raises:
        ValueError: an unknown alpha_type or objective.
    """

    parameter: nn.Parameter

    def __init__(
        self,
        alpha_type: str,
        initial_alpha: float,
        target_entropy: float,
        objective: str = "alpha",
    ) -> None:
        super().__init__()
        start = {
            "softplus": math.log(math.expm1(initial_alpha)),
            "exp": math.log(initial_alpha),
            "fixed_alpha": initial_alpha,
        }
        if alpha_type not in start:
            raise ValueError(f"alpha_type={alpha_type!r}; allowed: {', '.join(start)}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective={objective!r}; allowed: {', '.join(OBJECTIVES)}")
        self.alpha_type, self.objective = alpha_type, objective
        self.target_entropy = target_entropy
        self.parameter = nn.Parameter(
            torch.tensor(start[alpha_type]), requires_grad=alpha_type != "fixed_alpha"
        )

    @property
    def tuned(self) -> bool:
        """Whether alpha learns."""
        return self.parameter.requires_grad

    def forward(self) -> Tensor:
        """Returns alpha, a scalar with gradient."""
        if self.alpha_type == "softplus":
            return F.softplus(self.parameter)
        return self.parameter.exp() if self.alpha_type == "exp" else self.parameter

    def loss(self, log_prob: Tensor) -> Tensor:
        """-alpha (log pi + target entropy), mean over the batch (Haarnoja et al. 2018b, eq. 18)."""
        alpha = self()
        factor = alpha.log() if self.objective == "log_alpha" else alpha
        return -(factor * (log_prob.detach() + self.target_entropy)).mean()
