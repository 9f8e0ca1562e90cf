"""Updates on one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.interfaces import Trainable, UpdateEngine
from embodied_rl.schedules import learning_rate


class LocalTrainable(Trainable):
    """Parameters and their Adam optimiser on this process."""

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], config: Any) -> None:
        self.name = name
        self.parameters = list(parameters)
        self.config = config
        options: dict[str, Any] = {}
        # the temperature has neither betas nor weight decay of its own
        if hasattr(config, "betas"):
            options = {"betas": tuple(config.betas), "weight_decay": config.weight_decay}
        decays = options.get("weight_decay", 0.0) > 0
        kind = torch.optim.AdamW if decays else torch.optim.Adam
        self.optimizer = kind(self.parameters, lr=config.lr, fused=True, **options)

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_progress(self, progress: float) -> None:
        """Sets the learning rate for the share of the run that is over."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.lr_scheduler, config.lr, config.final_lr, progress)


class LocalEngine(UpdateEngine):
    """One process, no averaging."""

    def __init__(self) -> None:
        self._trainables: dict[str, LocalTrainable] = {}

    def attach(self, name: str, parameters: Iterable[nn.Parameter], config: Any) -> LocalTrainable:
        """Builds an Adam optimiser over `parameters`."""
        if name in self._trainables:
            raise ValueError(f"{name!r} is attached already")
        self._trainables[name] = LocalTrainable(name, parameters, config)
        return self._trainables[name]

    def step(
        self, trainable: Trainable, loss: Tensor | Iterable[Tensor], inputs: Sequence[Tensor] = ()
    ) -> Tensor:
        """Backward into this trainable's own parameters and `inputs` only, clip, step."""
        assert isinstance(trainable, LocalTrainable)
        gradients = self._gradients(trainable, loss, inputs)
        for parameter, gradient in zip(trainable.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.get_total_norm(gradients)
        if trainable.config.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(trainable.parameters, trainable.config.clip_grad, norm)
        trainable.optimizer.step()
        return norm

    def _gradients(
        self, trainable: Trainable, loss: Tensor | Iterable[Tensor], inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Those of the parameters; those of `inputs` go where they belong."""
        wanted = [*trainable.parameters, *inputs]
        gradients: list[Tensor] = []
        ours = False  # whether they are memory of their own, to be added to in place
        for part in [loss] if isinstance(loss, Tensor) else loss:
            found = torch.autograd.grad(part, wanted)
            if ours:
                for total, more in zip(gradients, found, strict=True):
                    total += more
            elif gradients:
                gradients = [a + b for a, b in zip(gradients, found, strict=True)]
                ours = True
            else:
                gradients = list(found)
        for value in inputs[::-1]:
            value.grad = gradients.pop()
        return gradients

    def set_progress(self, progress: float) -> None:
        """Moves every learning-rate schedule to the share of the run that is over."""
        for trainable in self._trainables.values():
            trainable.set_progress(progress)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser moments, per trainable and parameter position."""
        return {name: t.optimizer.state_dict()["state"] for name, t in self._trainables.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores optimiser moments.

        Raises:
            ValueError: the saved trainables are not the attached ones.
        """
        if set(state) != set(self._trainables):
            raise ValueError(f"saved {sorted(state)}, attached {sorted(self._trainables)}")
        for name, trainable in self._trainables.items():
            groups = trainable.optimizer.state_dict()["param_groups"]
            moments = {int(position): entry for position, entry in state[name].items()}
            trainable.optimizer.load_state_dict({"state": moments, "param_groups": groups})
