"""What a run needs: parameters, memory, replay and work, before anything is built."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from embodied_rl.config import Config
from embodied_rl.costs.draft import Draft, draft
from embodied_rl.costs.measure import Costs, measure
from embodied_rl.costs.storage import Storage, storage
from embodied_rl.errors import UserError
from embodied_rl.interfaces.sketch import Assumed

HEADER = 8  # bytes of a safetensors file before its header: the header's length


@dataclass
class Part:
    """Weights that belong together.

    Attributes:
        name: of the part.
        count: parameters.
        trained: of them, those that an optimiser moves.
        nbytes: of parameters and buffers.
        dtype: of the parameters.
    """

    name: str
    count: int
    trained: int
    nbytes: int
    dtype: str


@dataclass
class Estimate:
    """A plan of one run, per device.

    Attributes:
        draft: its networks.
        assumed: what nothing could tell.
        devices: that share the batch and the environments.
        batch_rows: of an update, on each device.
        acting_rows: environments of each device.
        parts: weights, by part.
        download: bytes of the pretrained weights on disk; None: unknown, or none.
        costs: work.
        storage: replay.
        held: bytes held throughout, by name.
        phases: bytes held besides, by what is being done; one at a time.
    """

    draft: Draft
    assumed: Assumed
    devices: int
    batch_rows: int
    acting_rows: int
    parts: list[Part]
    download: int | None
    costs: Costs
    storage: Storage
    held: dict[str, int]
    phases: dict[str, int]

    @property
    def config(self) -> Config:
        """Of the run."""
        return self.draft.config

    @property
    def memory(self) -> int:
        """Bytes at most, without what the device itself reserves."""
        return sum(self.held.values()) + max(self.phases.values())

    @property
    def cache_on_device(self) -> bool:
        """Whether replay's memory is the device's."""
        return self.config.algorithm.replay_buffer.cache_device == "auto"


def estimate(config: Config, assumed: Assumed, devices: int) -> Estimate:
    """Plans a run.

    Raises:
        UserError: the policy cannot be planned, or keys do not fit it.
    """
    made = draft(config, assumed)
    batch_rows = math.ceil(config.algorithm.batch_size / devices)
    acting_rows = math.ceil(config.env.num_envs / devices)
    costs = measure(made, batch_rows, acting_rows)
    replay = storage(made, costs.features, assumed.max_episode_steps, devices)
    parts = _parts(made)
    accounts = made.engine.accounts.values()
    held = {
        "weights": sum(p.nbytes for p in parts),
        "gradients": sum(a.nbytes for a in accounts),
        "Adam moments": 2 * sum(a.nbytes for a in accounts),
        "replay cache": replay.cache_bytes,
    }
    if config.algorithm.replay_buffer.cache_device != "auto":
        del held["replay cache"]
    images = batch_rows * replay.observations  # of a batch that is encoded anew
    backbone = next(p for p in parts if p.name == "backbone").nbytes
    averaged = next(p for p in parts if p.name == "actor").nbytes
    phases = {"acting": costs.acting_peak, "update: heads": costs.heads_peak}
    if costs.encode is not None:
        phases["update: encoding"] = costs.encode.peak + 2 * images
    if costs.backbone is not None:
        phases["update: backbone"] = costs.backbone.peak + images
    # it loads the pretrained and the best policy anew
    phases["closing comparison"] = costs.acting_peak + 2 * backbone + averaged
    return Estimate(
        made,
        assumed,
        devices,
        batch_rows,
        acting_rows,
        parts,
        _stored_bytes(made.folder),
        costs,
        replay,
        held,
        {name: math.ceil(value) for name, value in phases.items()},
    )


def _parts(draft: Draft) -> list[Part]:
    actor, head, sketch = draft.policy.actor, draft.q_head, draft.sketch
    assert actor is not None
    average, critics = draft.sac.average.module, list(head.critic_parameters())
    owned = {id(p) for p in critics}
    others = [p for p in head.parameters() if id(p) not in owned]
    towers = nn.ModuleList(sketch.elsewhere)
    parts = [
        _part("backbone", sketch.backbone.parameters(), sketch.backbone.buffers()),
        _part("backbone's towers", towers.parameters(), towers.buffers()),
        _part("actor", actor.parameters(), actor.buffers()),
        _part("actor, running average", average.parameters(), average.buffers()),
        _part(f"critics x {draft.config.critic.num_critics}", critics, head.buffers()),
        _part("critics, target", others, []),
        _part("temperature", draft.temperature.parameters(), []),
    ]
    return [part for part in parts if part.nbytes]


def _part(name: str, parameters: Iterable[Tensor], buffers: Iterable[Tensor]) -> Part:
    parameters = list(parameters)
    both = [*parameters, *buffers]
    return Part(
        name,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(t.numel() * t.element_size() for t in both),
        "+".join(sorted({str(p.dtype)[6:] for p in parameters})),
    )


def _stored_bytes(folder: Path | None) -> int | None:
    """Bytes of a folder's weights: what its safetensors files hold besides their headers.

    Raises:
        UserError: a file is too short for its header.
    """
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    total = 0
    for path in files:
        with path.open("rb") as file:
            head = file.read(HEADER)
        if len(head) < HEADER or path.stat().st_size < HEADER + struct.unpack("<Q", head)[0]:
            raise UserError(f"{path} is damaged or truncated. Copy it again from its source.")
        total += path.stat().st_size - HEADER - struct.unpack("<Q", head)[0]
    return total or None
