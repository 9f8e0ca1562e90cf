"""The seams of the trainer: what each layer promises to the others.

Sizes: B batch, H chunk length, A action size, D feature size, K critics, N environments.
"""

from embodied_rl.interfaces.actor import ActorAdapter
from embodied_rl.interfaces.backbone import Backbone, FlowBackbone
from embodied_rl.interfaces.experience import ReplayBuffer, TrajectorySink, VecEnv
from embodied_rl.interfaces.imitation import Imitator
from embodied_rl.interfaces.learner import (
    QHead,
    Stateful,
    Trainable,
    UpdateEngine,
    aggregate,
)

__all__ = [
    "ActorAdapter",
    "Backbone",
    "FlowBackbone",
    "Imitator",
    "QHead",
    "ReplayBuffer",
    "Stateful",
    "Trainable",
    "TrajectorySink",
    "UpdateEngine",
    "VecEnv",
    "aggregate",
]
