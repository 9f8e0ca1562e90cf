"""Joins the processes that torchrun or accelerate started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from embodied_rl.distributed.meeting import meet_in
from embodied_rl.distributed.presence import Presence
from embodied_rl.distributed.ranks import Ranks
from embodied_rl.errors import UserError


def join(device: str, timeout: float) -> tuple[Ranks, str]:
    """Joins the process group that the environment describes; alone where it describes none.

    `torchrun` and `accelerate launch` set RANK, LOCAL_RANK, WORLD_SIZE and where to meet.

    Args:
        device: `device=`, as the user gave it.
        timeout: seconds after which a message that does not arrive ends the run.

    Returns:
        The ranks, and the device of this one: its own GPU where there are several.

    Raises:
        UserError: the other processes do not answer.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(), device
    if device in ("auto", "cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = f"cuda:{local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    # messages about what runs on the host (counts, scores) go by gloo beside the gradients' nccl
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # of the ranks, those on this machine
    shared = here > torch.cuda.device_count()  # several ranks on a GPU: nccl refuses that
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") and not shared else "gloo"
    patience = timedelta(seconds=timeout)
    try:
        store, rank, world = next(rendezvous("env://", timeout=patience))
        store = meet_in(store, rank, world, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {os.environ.get('RANK', '?')} of {world} could not join the others: {error} "
            "Start all of them with one torchrun or accelerate launch."
        ) from error
    return Ranks(Presence(PrefixStore("presence", store), rank, world), patience), device


def train_command(world: int) -> str:
    """What starts training with as many processes."""
    several = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
    return f"{several} -m embodied_rl.train"


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
