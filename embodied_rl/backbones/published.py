"""Backbones whose weights come from a folder in another project's layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from embodied_rl.backbones.source import record
from embodied_rl.command_configs import PretrainConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces import Imitator
from embodied_rl.types import EnvSpec, Trajectory


class PublishedBackbone(Imitator, ABC):
    """A policy that is loaded and taught further, and never begins with random weights.

    Attributes:
        name: its own in the registry.
        title: what people call it.
        layouts: of the folders that it reads.
        settings: everything around the network, a dataclass.
        dtype_name: the network's precision.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    layouts: ClassVar[str] = "LeRobot's layout"
    settings: Any
    dtype_name: str

    @abstractmethod
    def network_record(self) -> dict[str, Any]:
        """What the network is built from; JSON-able."""

    @abstractmethod
    def write_weights(self, source: Path, folder: Path) -> None:
        """Writes `folder` like `source`, with the weights of now."""

    def to_folder(self, folder: Path) -> None:
        """Writes the layout that the weights came from; published names and precisions."""
        if self.source is None:
            super().to_folder(folder)
        else:
            self.write_weights(Path(self.source), folder)

    def config_dict(self) -> dict[str, Any]:
        """Network, precision, source of the weights and settings."""
        return record(self.network_record(), self.dtype_name, self.source, self.settings)

    @classmethod
    def for_demos(
        cls,
        trajectories: Sequence[Trajectory],
        instructions: Sequence[str],
        config: PretrainConfig,
    ) -> Self:
        """Refuses: a few demonstrations teach this many random weights nothing."""
        raise UserError(
            f"backbone={cls.name} cannot be trained here from nothing. Drop it and give "
            f"init=<{cls.title} folder> ({cls.layouts}, or a run that finetuned one)."
        )

    @classmethod
    def for_env(cls, spec: EnvSpec) -> Self:
        """Refuses: this many random weights learn nothing from rewards."""
        raise UserError(
            f"policy.backbone={cls.name} cannot be trained from scratch on {spec.name}. Set "
            f"policy.path=<{cls.title} folder> ({cls.layouts})."
        )
