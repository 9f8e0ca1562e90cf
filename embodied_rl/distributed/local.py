"""Updates on one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.distributed.adam import adam
from embodied_rl.interfaces import Trainable, UpdateEngine
from embodied_rl.schedules import learning_rate


class LocalTrainable(Trainable):
    """Parameters and their Adam optimiser on this process.

    All its tensors are there from the start, so that a compiled update can hold the step.
    """

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], config: Any) -> None:
        self.name = name
        self.parameters = list(parameters)
        self.config = config
        # the temperature has neither betas nor weight decay of its own
        full = hasattr(config, "betas")
        self.betas: tuple[float, float] = tuple(config.betas) if full else (0.9, 0.999)
        self.weight_decay: float = config.weight_decay if full else 0.0
        device = self.parameters[0].device
        # torch's kernels read it in double precision on a CPU, in single on a GPU
        kind = torch.float64 if device.type == "cpu" else torch.float32
        self.rate = torch.tensor(config.lr, dtype=kind, device=device)
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]
        self.exp_avgs = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def apply(self, gradients: list[Tensor]) -> None:
        """Takes one Adam step; with weight decay AdamW's (Loshchilov and Hutter 2019)."""
        adam(
            self.parameters,
            gradients,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            self.rate,
            *self.betas,
            self.weight_decay,
        )

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return float(self.rate)

    def set_progress(self, progress: float) -> None:
        """Sets the learning rate for the share of the run that is over."""
        config = self.config
        self.rate.fill_(learning_rate(config.lr_scheduler, config.lr, config.final_lr, progress))

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """Moments by parameter position, named as torch's optimisers name them."""
        return {
            i: {"step": step, "exp_avg": mean, "exp_avg_sq": square}
            for i, (step, mean, square) in enumerate(
                zip(self.steps, self.exp_avgs, self.exp_avg_sqs, strict=True)
            )
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[Any, dict[str, Tensor]]) -> None:
        """Restores them; no entries for a trainable that never took a step."""
        saved = {int(position): entry for position, entry in state.items()}
        for i, mine in self.state_dict().items():
            for name, tensor in mine.items():
                tensor.copy_(saved[i][name]) if saved else tensor.zero_()


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
        norm = torch.nn.utils.get_total_norm(gradients)
        if trainable.config.clip_grad is not None:  # as torch.nn.utils.clip_grad_norm_
            share = (trainable.config.clip_grad / (norm + 1e-6)).clamp(max=1.0)
            gradients = [gradient * share for gradient in gradients]
        trainable.apply(gradients)
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
        return {name: t.state_dict() for name, t in self._trainables.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores optimiser moments.

        Raises:
            ValueError: the saved trainables are not the attached ones.
        """
        if set(state) != set(self._trainables):
            raise ValueError(f"saved {sorted(state)}, attached {sorted(self._trainables)}")
        for name, trainable in self._trainables.items():
            trainable.load_state_dict(state[name])
