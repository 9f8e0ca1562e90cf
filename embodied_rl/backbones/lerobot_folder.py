"""A policy folder in LeRobot's layout: config, processors and their statistics. No LeRobot here.

Read from the published source (LeRobot 0.4 and later; checked against its repository, not run):

    config.json                 "type", input_features, output_features, normalization_mapping, ...
    model.safetensors           weights
    policy_preprocessor.json    steps: rename, batch, (newline), tokenizer, device, normalizer
    policy_postprocessor.json   steps: unnormalizer, device
    <state_file>.safetensors    of a step: "<feature>.<statistic>" -> tensor

Before 0.4 there were no such steps: the statistics are in model.safetensors (`lerobot_buffers`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from embodied_rl.backbones.lerobot_buffers import from_buffers
from embodied_rl.backbones.lerobot_normalise import Normaliser
from embodied_rl.errors import UserError

CONFIG = "config.json"
PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
# steps that this project does itself, or that only move tensors
PLAIN_STEPS = {
    "rename_observations_processor",
    "to_batch_processor",
    "device_processor",
    "tokenizer_processor",
    "normalizer_processor",
    "unnormalizer_processor",
}

log = logging.getLogger(__name__)


@dataclass
class LeRobotFolder:
    """What a LeRobot folder says besides its weights.

    Attributes:
        config: config.json.
        cameras: short names ("base_0_rgb" for "observation.images.base_0_rgb"), in its order.
        state_dim: size of observation.state; None where it is not told.
        action_dim: size of the action; None where it is not told.
        state: normalisation of observation.state.
        action: normalisation of the action.
        tokenizer: settings of the tokenizer step (tokenizer_name, max_length); empty: no such step.
        inputs: normalisation of every other input, by its long name.
    """

    config: dict[str, Any]
    cameras: tuple[str, ...]
    state_dim: int | None
    action_dim: int | None
    state: Normaliser
    action: Normaliser
    tokenizer: dict[str, Any]
    inputs: dict[str, Normaliser] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: it is missing or none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}. Copy it again from its source.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object. Copy it again from its source.")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is missing, damaged or truncated ({error}). Copy it again from its source."
        ) from None


def short_name(feature: str) -> str:
    """The camera's name in a feature's: what follows "observation.images."."""
    return feature.removeprefix(IMAGES).removeprefix("observation.")


def read_lerobot(
    folder: Path,
    own_steps: frozenset[str] = frozenset(),
    *,
    scales_images: bool = False,
    buffers: Mapping[str, Tensor] | None = None,
) -> LeRobotFolder:
    """Reads everything but the weights.

    Args:
        folder: the policy's folder.
        own_steps: processor steps that the calling backbone does itself.
        scales_images: whether it normalises images by their statistics.
        buffers: statistics found among the weights, for folders without processors.

    Raises:
        UserError: a file is missing or damaged, or asks for what this project does not do.
    """
    config = read_json(folder / CONFIG)
    inputs, outputs = _features(folder, config, "input"), _features(folder, config, "output")
    modes = config.get("normalization_mapping") or {}
    cameras = tuple(short_name(k) for k, f in inputs.items() if f.get("type") == "VISUAL")
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY" and not scales_images:
        raise UserError(
            f"{folder / CONFIG}: VISUAL normalisation {modes['VISUAL']!r} is not supported. "
            "Allowed: IDENTITY."
        )
    old = bool(buffers) and not (folder / PRE).is_file()
    pre = [] if old else _steps(folder / PRE, own_steps)
    post = [] if old else _steps(folder / POST, own_steps)

    def normaliser(feature: str, kind: str) -> Normaliser:
        if old:
            mode = str(modes.get(kind, "IDENTITY"))
            return from_buffers(buffers or {}, feature, mode, str(folder))
        if kind == "ACTION":
            return _normaliser(folder / POST, post, "unnormalizer_processor", feature, kind)
        return _normaliser(folder / PRE, pre, "normalizer_processor", feature, kind)

    others = {} if not scales_images else {k: f for k, f in inputs.items() if k != STATE}
    told = {k: normaliser(k, str(f.get("type"))) for k, f in others.items()}
    return LeRobotFolder(
        config,
        cameras,
        _size(inputs, STATE, config.get("max_state_dim")),
        _size(outputs, ACTION, config.get("max_action_dim")),
        normaliser(STATE, "STATE") if STATE in inputs or not scales_images else Normaliser(),
        normaliser(ACTION, "ACTION"),
        next((s.get("config", {}) for n, s in pre if n == "tokenizer_processor"), {}),
        told,
    )


def _features(folder: Path, config: dict[str, Any], side: str) -> dict[str, dict[str, Any]]:
    features = config.get(f"{side}_features") or {}
    if not isinstance(features, dict) or not all(isinstance(f, dict) for f in features.values()):
        raise UserError(
            f"{folder / CONFIG}: {side}_features must map names to type and shape, got {features!r}"
        )
    return features


def _size(features: dict[str, dict[str, Any]], name: str, most: int | None) -> int | None:
    """A vector's size. LeRobot writes the padded size where it was never told a real one."""
    shape = features.get(name, {}).get("shape")
    if shape is None or len(shape) != 1 or shape[0] == most:
        return None
    return int(shape[0])


def _steps(path: Path, own: frozenset[str]) -> list[tuple[str, dict[str, Any]]]:
    """Names and contents of a pipeline's steps.

    Raises:
        UserError: a step that would change what the policy sees or does, and is not known here.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing: it holds the policy's normalisation. Folders written by LeRobot "
            "before 0.4 have none: convert them with LeRobot's migrate_policy_normalization.py."
        )
    steps = []
    for step in read_json(path).get("steps", []):
        name, settings = step.get("registry_name"), step.get("config") or {}
        known = PLAIN_STEPS | own
        if name not in known and settings.get("enabled", True):
            raise UserError(
                f"{path}: the step {name or step.get('class')!r} is not one that this project "
                f"does. Known: {', '.join(sorted(known))}. No code is loaded from a policy's "
                "folder; export the policy without that step."
            )
        steps.append((name, step))
    return steps


def _normaliser(
    path: Path, steps: list[tuple[str, dict[str, Any]]], kind: str, feature: str, feature_type: str
) -> Normaliser:
    """The normalisation of one feature, from the step of that kind.

    A base checkpoint has no statistics at all and is taken as it is, with a warning, as LeRobot
    does silently. Statistics under other names (of several datasets) are refused: LeRobot would
    ignore them, and the actions would be in the wrong unit.
    """
    step = next((s for name, s in steps if name == kind), None)
    if step is None:
        log.warning("%s has no %s: %s is used as it is", path, kind, feature)
        return Normaliser()
    settings = step.get("config") or {}
    mode = str((settings.get("norm_map") or {}).get(feature_type, "IDENTITY"))
    if mode == "IDENTITY":
        return Normaliser()
    # only a name beside the pipeline's file: a folder's files never point out of it
    file = path.parent / Path(str(step.get("state_file", ""))).name
    tensors = read_tensors(file) if step.get("state_file") else {}
    found = {
        k.removeprefix(f"{feature}."): v for k, v in tensors.items() if k.startswith(f"{feature}.")
    }
    if not found:
        others = sorted({k.rpartition(".")[0] for k in tensors})
        same = [k for k in others if k.endswith(feature)]
        if same:
            raise UserError(
                f"{file} has no statistics of {feature!r}, only of "
                f"{', '.join(same)}. Rename the ones of your robot to '{feature}.<statistic>'."
            )
        log.warning("%s has no statistics of %s: it is used as it is", path, feature)
        return Normaliser()
    eps = float(settings.get("eps", 1e-8))
    return Normaliser.from_statistics(mode, found, eps, f"{path}, {feature}")
