"""Sharded updates with DeepSpeed's ZeRO, stages 1 and 2."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.distributed.optimised import HandOver, Moments, Optimised
from embodied_rl.distributed.ranks import Ranks
from embodied_rl.distributed.sharded import ShardedEngine
from embodied_rl.errors import UserError

MISSING = "train.engine=deepspeed needs DeepSpeed: pip install deepspeed (or '.[deepspeed]')."


def installed() -> bool:
    """Whether there is a DeepSpeed to import."""
    return importlib.util.find_spec("deepspeed") is not None


def load(device: torch.device) -> Any:
    """Imports DeepSpeed: late, for it takes seconds, and most runs need none.

    Raises:
        UserError: it is not installed.
    """
    if not installed():
        raise UserError(MISSING)
    if device.type == "cpu":  # else it takes the GPU that it sees, if the networks are there or not
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it sets its own as it comes
    # on a CPU it would compile a message passer of its own at first use, which needs g++, fails
    # where two processes begin to at once, and serves a launcher's LOCAL_SIZE only: gloo will do
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Holder(nn.Module):
    """A trainable's parameters as a module: DeepSpeed moves them into its flat memory in place.

    It wraps this and not the networks, which other losses and acting use as they are.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        """A scalar whose gradients are the given ones."""
        return HandOver.apply(gradients, *self.held)  # type: ignore[return-value]


class ZeroTrainable(Optimised):
    """Parameters whose moments, and in stage 2 gradients, DeepSpeed shares out.

    Args:
        name: that it was attached under.
        parameters: those that move.
        config: an OptimConfig.
        stage: 1 or 2.
        offload: whether moments and moving copies live in the host's memory.
    """

    def __init__(
        self, name: str, parameters: list[nn.Parameter], config: Any, stage: int, offload: bool
    ) -> None:
        super().__init__(name, parameters, config)
        device = self.parameters[0].device
        deepspeed = load(device)
        self._tools = importlib.import_module("deepspeed.utils")
        kind = torch.optim.AdamW if self.weight_decay > 0 else torch.optim.Adam
        adam = kind(
            self.parameters,
            lr=config.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True,
        )
        self._engine, self._zero, *_ = deepspeed.initialize(
            args=arguments(device),
            model=Holder(self.parameters),
            optimizer=adam,
            config=settings(stage, offload, config.clip_grad),
            dist_init_required=False,
        )
        self._adam = adam
        self._create_moments()

    def _create_moments(self) -> None:
        """Makes the moments that Adam would make in its first step: they may be loaded before."""
        for part in self._parts():
            self._adam.state[part] = {
                "step": torch.zeros((), dtype=torch.float32, device=part.device),
                "exp_avg": torch.zeros_like(part),
                "exp_avg_sq": torch.zeros_like(part),
            }
        self._zero._lazy_init_hp_params_optimizer_state()

    def _parts(self) -> list[Tensor]:
        """What the optimiser moves on this process: flat float32 copies of its part."""
        return [part for group in self._adam.param_groups for part in group["params"]]

    def step(self, gradients: list[Tensor]) -> Tensor:
        """Hands whole gradients to DeepSpeed, which averages, clips, steps and gathers."""
        self._zero.refresh_fp32_params()  # somebody may have loaded weights
        self._engine.backward(self._engine(gradients))
        self._engine.step()
        device = self.parameters[0].device
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=device).float()

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return float(self._adam.param_groups[0]["lr"])

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate."""
        for group in self._adam.param_groups:
            group["lr"] = rate

    @property
    def held(self) -> int:
        """Bytes of moments on this process."""
        states = [self._adam.state[part] for part in self._parts()]
        tensors = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> Moments:
        """Whole moments, in the host's memory; all processes must ask at the same time."""
        whole = self._tools.safe_get_full_optimizer_state
        step = self._adam.state[self._parts()[0]]["step"]  # all parameters move together
        return {
            i: {
                "step": step.detach().cpu().clone(),
                "exp_avg": whole(p, "exp_avg").cpu(),
                "exp_avg_sq": whole(p, "exp_avg_sq").cpu(),
            }
            for i, p in enumerate(self.parameters)
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[Any, dict[str, Tensor]]) -> None:
        """Restores this process's part of whole moments."""
        saved = {int(position): entry for position, entry in state.items()}
        for part in self._parts():
            for name, tensor in self._adam.state[part].items():
                tensor.zero_()
                if saved and name == "step":
                    tensor.copy_(saved[0]["step"])
        for i, entry in saved.items():
            for name in ("exp_avg", "exp_avg_sq"):
                self._tools.safe_set_full_optimizer_state(self.parameters[i], entry[name], name)


class ZeroEngine(ShardedEngine):
    """Moments (stage 1), or moments and gradients (stage 2), shared out by DeepSpeed.

    Args:
        ranks: the processes.
        stage: 1 or 2.
        offload: whether the optimiser's part lives, and steps, in the host's memory.
    """

    def __init__(self, ranks: Ranks, stage: int = 2, offload: bool = False) -> None:
        super().__init__(ranks)
        self.stage, self.offload = stage, offload

    def _shard(self, name: str, parameters: list[nn.Parameter], config: Any) -> ZeroTrainable:
        return ZeroTrainable(name, parameters, config, self.stage, self.offload)


def arguments(device: torch.device) -> SimpleNamespace | None:
    """Where DeepSpeed is to work: without it, on the GPU numbered LOCAL_RANK, whatever we use."""
    return SimpleNamespace(device_rank=device.index or 0) if device.type == "cuda" else None


def settings(stage: int, offload: bool, clip: float | None) -> dict[str, Any]:
    """What DeepSpeed is told: our losses and schedules do the rest."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # gradients come finished: no batch is its own
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if clip is None else clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's fused Adam, as in every engine
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled at first use
        "steps_per_print": 2**62,
    }
