"""Update engines: how a loss becomes an optimiser step, on one process or many.

The only place that may import accelerate, deepspeed or torch.distributed.
"""

from embodied_rl.distributed.choice import EngineChoice, choose_engine
from embodied_rl.distributed.ddp import DdpEngine
from embodied_rl.distributed.launch import join, leave, neighbours, own_gpu, train_command
from embodied_rl.distributed.local import LocalEngine, LocalTrainable
from embodied_rl.distributed.optimised import Optimised
from embodied_rl.distributed.ranks import Ranks
from embodied_rl.distributed.shares import share, share_replay

__all__ = [
    "DdpEngine",
    "EngineChoice",
    "LocalEngine",
    "LocalTrainable",
    "Optimised",
    "Ranks",
    "choose_engine",
    "join",
    "leave",
    "neighbours",
    "own_gpu",
    "share",
    "share_replay",
    "train_command",
]
