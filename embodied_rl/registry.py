"""Closed tables from a name in YAML to a class, imported on first use.

Adding a Q head, backbone, actor or environment is one file and one line here.
"""

from __future__ import annotations

import importlib
from typing import Any

from embodied_rl.errors import UserError, nearest


class Registry:
    """A closed table of names to `"module:Class"` paths.

    Args:
        kind: what the entries are, for error messages ("Q head").
        key: the config key that selects an entry ("algorithm.q_head_type").
        table: name to `"module:Class"`.
    """

    def __init__(self, kind: str, key: str, table: dict[str, str]) -> None:
        self.kind = kind
        self.key = key
        self._table = dict(table)

    def register(self, name: str, made: type | str) -> None:
        """Adds an entry of your own, for this process: a class, or its `"module:Class"` path.

        Raises:
            UserError: the name is taken.
        """
        path = made if isinstance(made, str) else f"{made.__module__}:{made.__qualname__}"
        if self._table.get(name, path) != path:
            raise UserError(f"the {self.kind} {name!r} is registered already: {self._table[name]}.")
        self._table[name] = path

    @property
    def names(self) -> list[str]:
        """The registered names, in table order."""
        return list(self._table)

    def module(self, name: str) -> str:
        """The module of the entry, which is not imported."""
        return self._table[name].partition(":")[0]

    def get(self, name: str) -> Any:
        """Returns the class registered under `name`.

        Raises:
            UserError: the name is not in the table; lists the choices.
        """
        if name not in self._table:
            raise UserError(
                f"{self.key}={name!r} is not a known {self.kind}. "
                f"Allowed: {', '.join(self.names)}.{nearest(str(name), self.names)}"
            )
        module, _, attribute = self._table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)


Q_HEADS = Registry(
    "Q head",
    "algorithm.q_head_type",
    {
        "default": "embodied_rl.q_heads.default:DefaultQHead",
        "crossq": "embodied_rl.q_heads.crossq:CrossQHead",
    },
)
BACKBONES = Registry(
    "backbone",
    "policy type",
    {
        "state": "embodied_rl.backbones.state:StateBackbone",
        "pi0": "embodied_rl.backbones.pi0:Pi0Backbone",
        "act": "embodied_rl.backbones.act:ActBackbone",
        "smolvla": "embodied_rl.backbones.smolvla:SmolVLABackbone",
        "small_vla": "embodied_rl.backbones.small_vla:SmallVLABackbone",
    },
)
# for `embodied_rl.plan`: backbones without weights
SKETCHES = Registry(
    "backbone that can be planned",
    "policy type",
    {
        "state": "embodied_rl.backbones.sketches:sketch_state",
        "small_vla": "embodied_rl.backbones.sketches:sketch_small_vla",
        "pi0": "embodied_rl.backbones.pi0_sketch:sketch_pi0",
        "act": "embodied_rl.backbones.act_sketch:sketch_act",
        "smolvla": "embodied_rl.backbones.smolvla_sketch:sketch_smolvla",
    },
)
# `type` or `model_type` in the config.json of another project's policy folder -> backbone
LAYOUTS: dict[str, str] = {"pi0": "pi0", "act": "act", "smolvla": "smolvla"}
ACTORS = Registry(
    "actor adapter",
    "actor.type",
    {
        "gaussian": "embodied_rl.actors.gaussian:GaussianActor",
        "residual": "embodied_rl.actors.residual:ResidualActor",
        "noise": "embodied_rl.actors.noise:NoiseActor",
    },
)
ENVS = Registry(
    "environment type",
    "env.type",
    {
        "maniskill": "embodied_rl.envs.maniskill:make_maniskill",
        "gymnasium": "embodied_rl.envs.gymnasium:make_gymnasium",
        "fake": "embodied_rl.envs.fake:make_fake",
    },
)
FORKED = ("maniskill", "gymnasium")  # environment types that run in processes of their own
EXPERTS = Registry(
    "scripted expert",
    "env.task",
    {
        "PickCube-v1": "embodied_rl.envs.experts:PickCubeExpert",
        "PushCube-v1": "embodied_rl.envs.experts:PushCubeExpert",
        "PullCube-v1": "embodied_rl.envs.experts:PullCubeExpert",
    },
)
