"""Behaviour cloning: demonstrated action chunks, and the training of a backbone on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from embodied_rl.command_configs import PretrainConfig
from embodied_rl.distributed import LocalEngine
from embodied_rl.errors import UserError
from embodied_rl.interfaces import Imitator
from embodied_rl.types import Obs, Trajectory


class Examples:
    """What a backbone's loss reads, and the actions that were demonstrated from there on.

    There are `taught_steps` of them; at the end of an episode the last action repeats.

    Args:
        backbone: says what its loss reads, and whether that is kept or made for each batch.
        trajectories: of one environment step per row.
        device: where batches are.
    """

    def __init__(
        self, backbone: Imitator, trajectories: Sequence[Trajectory], device: torch.device
    ) -> None:
        self._backbone, self._device = backbone, device
        self._trajectories = list(trajectories)
        self._starts = np.cumsum([0, *(t.length for t in trajectories)])
        steps = torch.arange(backbone.taught_steps)
        self._chunks = torch.cat(
            [
                t.labels[(torch.arange(t.length)[:, None] + steps).clamp(max=t.length - 1)]
                for t in trajectories
            ]
        ).to(device)
        self._inputs: Obs | None = self._all_inputs() if backbone.keeps_inputs else None

    def __len__(self) -> int:
        return len(self._chunks)

    @torch.no_grad()
    def _all_inputs(self) -> Obs:
        inputs: dict[str, list[Tensor]] = {}
        for trajectory in tqdm(self._trajectories, unit="demo", leave=False, dynamic_ncols=True):
            rows = [(trajectory, slice(0, trajectory.length))]
            for key, value in self._backbone.inputs(self._observations(rows)).items():
                inputs.setdefault(key, []).append(value)
        return {k: torch.cat(v) for k, v in inputs.items()}

    def _observations(self, parts: Sequence[tuple[Trajectory, slice]]) -> Obs:
        names = [k for k in parts[0][0].fields if k.startswith("obs.")]
        return {
            k.removeprefix("obs."): torch.cat([t.fields[k][rows] for t, rows in parts]).to(
                self._device
            )
            for k in names
        }

    @torch.no_grad()
    def take(self, rows: Tensor) -> tuple[Obs, Tensor]:
        """Returns inputs [n, ...] and chunks [n, `taught_steps`, A] of demonstrated steps.

        Args:
            rows: their numbers [n], counted through all episodes, on the CPU.
        """
        here = rows.to(self._device)
        if self._inputs is not None:
            return {k: v[here] for k, v in self._inputs.items()}, self._chunks[here]
        parts = []
        for row in rows.tolist():
            episode = int(np.searchsorted(self._starts, row, side="right")) - 1
            step = row - int(self._starts[episode])
            parts.append((self._trajectories[episode], slice(step, step + 1)))
        return self._backbone.inputs(self._observations(parts)), self._chunks[here]


def fit(
    backbone: Imitator,
    config: PretrainConfig,
    training: Sequence[Trajectory],
    validation: Sequence[Trajectory],
    device: torch.device,
) -> None:
    """Trains those of the backbone's parameters that require a gradient, in place."""
    examples = Examples(backbone, training, device)
    held_out = Examples(backbone, validation, device) if validation else None
    engine = LocalEngine()
    trainable = engine.attach("backbone", _reached(backbone, examples), config.optim)
    rng = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    bar = tqdm(range(config.steps), unit="step", dynamic_ncols=True)
    for step in bar:
        engine.set_progress(step / config.steps)
        rows = torch.from_numpy(rng.integers(len(examples), size=config.batch_size))
        losses: list[Tensor] = []
        size = config.tune.micro_batch or len(rows)
        engine.step(trainable, _pieces(backbone, examples, rows, size, generator, losses))
        if step % 200 == 0 or step == config.steps - 1:
            shown = {"loss": f"{float(torch.stack(losses).sum()):.5f}"}
            if held_out is not None:
                with torch.no_grad():
                    same = torch.Generator().manual_seed(0)  # comparable from step to step
                    every = torch.arange(len(held_out))
                    size = len(every) if backbone.keeps_inputs else min(size, config.batch_size)
                    parts = _pieces(backbone, held_out, every, size, same, [])
                    shown["validation"] = f"{float(sum(parts)):.5f}"
            bar.set_postfix(shown)


def _pieces(
    backbone: Imitator,
    examples: Examples,
    rows: Tensor,
    size: int,
    generator: torch.Generator,
    losses: list[Tensor],
) -> Iterator[Tensor]:
    """Losses of `size` rows at a time, each with a graph of its own; they sum to the mean loss."""
    for part in rows.split(size):
        loss = backbone.imitation_loss(*examples.take(part), generator)
        loss = loss if len(part) == len(rows) else loss * (len(part) / len(rows))
        losses.append(loss.detach())
        yield loss


def _reached(backbone: Imitator, examples: Examples) -> list[nn.Parameter]:
    """Those of the parameters to train that the loss depends on.

    Of a model that is used in part, some have no say: in π0 what follows the last layer's keys and
    values in the language model, and the expert's token table.

    Raises:
        UserError: 16-bit weights would be trained in place.
    """
    wanted = [p for p in backbone.parameters() if p.requires_grad]
    small = {str(p.dtype) for p in wanted if torch.finfo(p.dtype).bits < 32}
    if small:
        raise UserError(
            f"tune.trainable=full would train {', '.join(sorted(small))} weights in place, where "
            "most updates round to nothing. Set tune.trainable=lora, whose own weights are "
            "float32, or tune.dtype=float32 where init is another project's folder."
        )
    loss = backbone.imitation_loss(*examples.take(torch.arange(1)), torch.Generator())
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [p for p, gradient in zip(wanted, found, strict=True) if gradient is not None]
