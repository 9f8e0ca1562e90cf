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
    device = own_gpu(device)
    visible = range(torch.cuda.device_count())
    gpus = {f"cuda:{i}": str(torch.cuda.get_device_properties(i).uuid) for i in visible}
    if device in gpus:
        torch.cuda.set_device(device)  # FSDP and DeepSpeed work on the present one
    patience = timedelta(seconds=timeout)
    try:
        store, rank, world = next(rendezvous("env://", timeout=patience))
        store = meet_in(store, rank, world, timeout)
        store.set(f"gpu/{rank}", gpus.get(device, ""))
        backend = backend_for([store.get(f"gpu/{other}").decode() for other in range(world)])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {os.environ.get('RANK', '?')} of {world} could not join the others: {error} "
            "Start all of them with one torchrun or accelerate launch."
        ) from error
    return Ranks(Presence(PrefixStore("presence", store), rank, world), patience), device


def neighbours() -> int:
    """Processes of the run on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_gpu(device: str) -> str:
    """The GPU of this process among those of its machine, where any of them would do."""
    visible = torch.cuda.device_count()
    if device not in ("auto", "cuda") or not visible:
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % visible}"


def backend_for(gpus: list[str]) -> str:
    """What carries the messages of processes on these GPUs; "" stands for none.

    Nccl refuses several processes on a GPU. Messages about what runs on the host (counts, scores)
    go by gloo beside it.
    """
    alone = "" not in gpus and len(set(gpus)) == len(gpus)
    return "cpu:gloo,cuda:nccl" if alone else "gloo"


def train_command(world: int) -> str:
    """What starts training with as many processes."""
    several = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
    return f"{several} -m embodied_rl.train"


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
