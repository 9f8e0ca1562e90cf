"""Which engine takes the steps: what the config names, or what started the processes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from embodied_rl.config import TrainConfig
from embodied_rl.distributed.ddp import DdpEngine
from embodied_rl.distributed.local import LocalEngine
from embodied_rl.distributed.ranks import Ranks
from embodied_rl.distributed.zero import MISSING, installed
from embodied_rl.errors import UserError

WHOLE_WEIGHTS = (
    "Stage 3 shares out the weights as well, so that each forward is a message of all processes; "
    "but each acts, evaluates and bootstraps as often as its own episodes need. Use 1 or 2."
)


@dataclass
class EngineChoice:
    """An engine and how it works.

    Attributes:
        name: local, ddp, fsdp or deepspeed.
        zero_stage: of deepspeed.
        offload: whether the optimiser lives in the host's memory.
        source: what asked for it, for messages.
        note: what the user should know about it, if anything.
    """

    name: str
    zero_stage: int
    offload: bool
    source: str
    note: str | None = None

    def build(self, ranks: Ranks) -> LocalEngine:
        """Builds it; the sharding libraries are imported here and not before."""
        if self.name == "fsdp":
            from embodied_rl.distributed.fsdp import FsdpEngine

            return FsdpEngine(ranks, self.offload)
        if self.name == "deepspeed":
            from embodied_rl.distributed.zero import ZeroEngine

            return ZeroEngine(ranks, self.zero_stage, self.offload)
        return LocalEngine() if self.name == "local" else DdpEngine(ranks)


def choose_engine(config: TrainConfig, ranks: Ranks) -> EngineChoice:
    """Follows `train.engine`; `auto` follows accelerate, if that started the processes.

    A process alone has nobody to share with: whatever is named, it updates by itself, with a note.

    Raises:
        UserError: the engine cannot work here, or something was set that it has no use for.
    """
    choice = _accelerate(ranks) if config.engine == "auto" else None
    if choice is None:
        plain = "local" if ranks.world == 1 else "ddp"
        name = plain if config.engine == "auto" else config.engine
        choice = EngineChoice(name, 2, False, f"train.engine={config.engine}")
    if config.zero_stage is not None:
        if choice.name != "deepspeed":
            raise UserError(
                f"train.zero_stage={config.zero_stage} is for train.engine=deepspeed, but "
                f"{choice.source} means {choice.name} here. Set train.zero_stage=null."
            )
        choice.zero_stage = config.zero_stage
    shards = choice.name in ("fsdp", "deepspeed")
    if config.offload_optimizer and not shards:
        raise UserError(
            "train.offload_optimizer=true is for train.engine=fsdp and deepspeed, but "
            f"{choice.source} means {choice.name} here. Set it to false."
        )
    choice.offload = choice.offload or config.offload_optimizer
    if choice.zero_stage > 2:
        raise UserError(f"ZeRO stage {choice.zero_stage} ({choice.source}): {WHOLE_WEIGHTS}")
    if ranks.world == 1 and choice.name != "local":  # a run of several resumes with one, too
        note = (
            f"{choice.source} shares work out between processes, and this is one: it keeps all to "
            "itself (train.engine=auto). torchrun --nproc_per_node=N -m embodied_rl.train starts N"
        )
        return EngineChoice("local", 2, False, choice.source, note)
    if choice.name == "deepspeed" and not installed():
        raise UserError(MISSING)
    return choice


def _accelerate(ranks: Ranks) -> EngineChoice | None:
    """What `accelerate launch` was told; None where it started nothing of the kind."""
    if ranks.world == 1:
        return None  # a machine's default config must not stop a run of one process
    if _on("ACCELERATE_USE_DEEPSPEED"):
        source = "accelerate launch --use_deepspeed"
        if _text("ACCELERATE_DEEPSPEED_CONFIG_FILE") != "none":
            raise UserError(
                f"{source}: a DeepSpeed config file is not read. Name what it sets: "
                "train.engine=deepspeed train.zero_stage=... train.offload_optimizer=..."
            )
        stage = _text("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        device = _text("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
        if device not in ("none", "cpu") or stage not in ("1", "2", "3"):
            raise UserError(
                f"{source}: ZeRO stage {stage} with the optimiser on {device} is not supported. "
                "Use stage 1 or 2, and offload_optimizer_device none or cpu."
            )
        return EngineChoice("deepspeed", int(stage), device == "cpu", source)
    if _on("ACCELERATE_USE_FSDP"):
        offload = _on("FSDP_OFFLOAD_PARAMS")
        return EngineChoice("fsdp", 2, offload, "accelerate launch --use_fsdp")
    return None


def _text(name: str, default: str = "none") -> str:
    return os.environ.get(name, default).lower()


def _on(name: str) -> bool:
    return _text(name, "false") in ("true", "1", "yes")
