"""Updates on one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.distributed.adam import adam
from embodied_rl.distributed.optimised import Moments, Optimised, clipped, total_norm
from embodied_rl.interfaces import Trainable, UpdateEngine


class LocalTrainable(Optimised):
    """Parameters and their Adam optimiser on this process.

    All its tensors are there from the start, so that a compiled update can hold the step.
    """

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], config: Any) -> None:
        super().__init__(name, parameters, config)
        device = self.parameters[0].device
        # torch's kernels read it in double precision on a CPU, in single on a GPU. Not a scalar:
        # the compiler would first trace a CPU's as a number, and then everything once more
        kind = torch.float64 if device.type == "cpu" else torch.float32
        self.rate = torch.tensor([config.lr], dtype=kind, device=device)
        self._rate = config.lr
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]
        self.exp_avgs = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    def step(self, gradients: list[Tensor]) -> Tensor:
        """Clips and takes one step; returns the norm before clipping."""
        norm = total_norm(gradients)
        self.apply(clipped(gradients, norm, self.config.clip_grad))
        return norm

    @torch.no_grad()
    def apply(self, gradients: list[Tensor]) -> None:
        """Takes one Adam step; with weight decay AdamW's (Loshchilov and Hutter 2019)."""
        torch.ops.aten._foreach_add_(self.steps, 1)
        lists = (self.parameters, gradients, self.exp_avgs, self.exp_avg_sqs, self.steps)
        for kind in dict.fromkeys(p.dtype for p in self.parameters):  # one call for each
            kept = [p.dtype == kind for p in self.parameters]
            values, slopes, means, squares, steps = (list(compress(t, kept)) for t in lists)
            adam(values, slopes, means, squares, steps, self.rate, *self.betas, self.weight_decay)

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return float(self.rate)

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate."""
        if rate != self._rate:
            self._rate = rate
            self.rate.fill_(rate)

    def state_dict(self) -> Moments:
        """Moments by parameter position."""
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
        self._trainables: dict[str, Optimised] = {}

    def attach(self, name: str, parameters: Iterable[nn.Parameter], config: Any) -> Optimised:
        """Builds an Adam optimiser over `parameters`."""
        if name in self._trainables:
            raise ValueError(f"{name!r} is attached already")
        self._trainables[name] = self._optimise(name, list(parameters), config)
        return self._trainables[name]

    def _optimise(self, name: str, parameters: list[nn.Parameter], config: Any) -> Optimised:
        return LocalTrainable(name, parameters, config)

    def step(
        self, trainable: Trainable, loss: Tensor | Iterable[Tensor], inputs: Sequence[Tensor] = ()
    ) -> Tensor:
        """Backward into this trainable's own parameters and `inputs` only, clip, step."""
        assert isinstance(trainable, Optimised)
        return trainable.step(self._gradients(trainable, loss, inputs))

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
