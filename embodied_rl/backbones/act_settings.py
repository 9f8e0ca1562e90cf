"""What surrounds an ACT network: sizes, statistics, cameras and state, out of LeRobot's files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from embodied_rl.backbones.act_network import ACTIVATIONS, ActSizes
from embodied_rl.backbones.act_resnet import RESNETS, resnet_config
from embodied_rl.backbones.lerobot_folder import (
    ACTION,
    CONFIG,
    STATE,
    LeRobotFolder,
    read_lerobot,
    short_name,
)
from embodied_rl.backbones.lerobot_normalise import Normaliser
from embodied_rl.backbones.pi0_inputs import (
    check_cameras,
    is_image,
    match_cameras,
    match_state,
    state_size,
)
from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.types import EnvSpec

ENVIRONMENT = "observation.environment_state"
ENVIRONMENT_KEY, ENVIRONMENT_GROUP = "environment_state", "extra."
KINDS = ("VISUAL", "STATE", "ENV")
# config.json's keys that are tensors' sizes, with LeRobot's defaults in ActSizes
COUNTS = (
    "chunk_size",
    "n_action_steps",
    "dim_model",
    "n_heads",
    "dim_feedforward",
    "n_encoder_layers",
    "n_decoder_layers",
    "latent_dim",
    "n_vae_encoder_layers",
)
ASPECT = 0.01  # by which an image may be wider or taller than the policy's before it is refused

log = logging.getLogger(__name__)


@dataclass
class ActSettings:
    """Everything around the network, JSON-able; part of the fingerprint.

    Attributes:
        state: `Normaliser` of the state vector, as its config.
        environment: `Normaliser` of the environment's state, as its config.
        action: `Normaliser` of the action, as its config.
        images: (policy's camera, [height, width], `Normaliser` as its config), in its order.
        cameras: (policy's camera, observation key), in its order; found by `fit` where not given.
        state_keys: observations that make the state vector; found by `fit` where not given.
        environment_keys: observations that make the environment's state; found by `fit`.
    """

    state: dict[str, Any] = field(default_factory=lambda: Normaliser().config_dict())
    environment: dict[str, Any] = field(default_factory=lambda: Normaliser().config_dict())
    action: dict[str, Any] = field(default_factory=lambda: Normaliser().config_dict())
    images: list[list[Any]] = field(default_factory=list)
    cameras: list[list[str]] = field(default_factory=list)
    state_keys: list[str] = field(default_factory=list)
    environment_keys: list[str] = field(default_factory=list)


def read_act(
    folder: Path, buffers: Mapping[str, Tensor], options: PolicyConfig
) -> tuple[ActSizes, ActSettings]:
    """Reads everything but the weights.

    Args:
        folder: the policy's folder.
        buffers: statistics among its weights.
        options: cameras and state that the user names.

    Raises:
        UserError: something is missing, does not agree, or is not what this backbone does.
    """
    told = read_lerobot(folder, scales_images=True, buffers=buffers)
    inputs = told.config.get("input_features") or {}
    where = folder / CONFIG
    _check_features(inputs, where)
    sizes = _sizes(told, inputs, where)
    settings = ActSettings(
        state=_statistics(told, STATE, sizes.state_dim, "STATE", told.state, where),
        action=_statistics(told, ACTION, sizes.action_dim, "ACTION", told.action, where),
        state_keys=list(options.state),
    )
    if sizes.environment_dim:
        own = told.inputs[ENVIRONMENT]
        settings.environment = _statistics(
            told, ENVIRONMENT, sizes.environment_dim, "ENV", own, where
        )
    for name, feature in inputs.items():
        if feature["type"] == "VISUAL":
            made = _statistics(told, name, 3, "VISUAL", told.inputs[name], where)
            settings.images.append([short_name(name), list(feature["shape"][1:]), made])
    chosen = check_cameras(options.cameras, told.cameras)
    settings.cameras = [list(pair) for pair in chosen.items()]
    return sizes, settings


def _check_features(inputs: Mapping[str, Mapping[str, Any]], where: Path) -> None:
    for name, feature in inputs.items():
        kind, shape = feature.get("type"), feature.get("shape") or []
        if kind not in KINDS or (kind != "VISUAL" and name not in (STATE, ENVIRONMENT)):
            raise UserError(
                f"{where}: the input {name!r} of type {kind!r} is unknown to ACT. Allowed: images "
                f"(VISUAL), {STATE} (STATE), {ENVIRONMENT} (ENV). Train the policy without it."
            )
        wanted = 3 if kind == "VISUAL" else 1
        good = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        if not good or len(shape) != wanted or (kind == "VISUAL" and shape[0] != 3):
            form = "[3, height, width]" if kind == "VISUAL" else "[entries]"
            raise UserError(f"{where}: {name} has shape {shape!r}. Allowed: {form}.")


def _sizes(told: LeRobotFolder, inputs: Mapping[str, Any], where: Path) -> ActSizes:
    config = told.config
    if told.action_dim is None:
        raise UserError(f"{where}: output_features must have {ACTION!r} with shape [entries].")
    if config.get("n_obs_steps", 1) != 1:
        raise UserError(f"{where}: n_obs_steps={config['n_obs_steps']!r}. Allowed: 1.")
    if config.get("replace_final_stride_with_dilation"):
        raise UserError(f"{where}: replace_final_stride_with_dilation=true. Allowed: false.")
    if not told.cameras and ENVIRONMENT not in inputs:
        raise UserError(f"{where}: the policy has neither a camera nor {ENVIRONMENT}.")
    counts = {key: config[key] for key in COUNTS if key in config}
    for key, value in counts.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {key}={value!r}. Allowed: whole numbers from 1.")
    flags = {key: config[key] for key in ("pre_norm", "use_vae") if key in config}
    activation = config.get("feedforward_activation", "relu")
    for key, value, allowed in (
        ("vision_backbone", config.get("vision_backbone", "resnet18"), tuple(RESNETS)),
        ("feedforward_activation", activation, tuple(ACTIVATIONS)),
        *((key, value, (True, False)) for key, value in flags.items()),
    ):
        if value not in allowed:
            names = ", ".join(map(str, allowed))
            raise UserError(f"{where}: {key}={value!r}. Allowed: {names}.")
    resnet = None
    if told.cameras:
        # `backbone_config`, arguments of transformers' ResNetConfig, is not LeRobot's: other sizes
        # than the published ones can be had with it
        name = config.get("vision_backbone", "resnet18")
        resnet = config.get("backbone_config") or resnet_config(name)
        wanted = sorted(resnet_config("resnet18"))
        if not isinstance(resnet, dict) or sorted(resnet) != wanted:
            raise UserError(f"{where}: backbone_config must have {', '.join(wanted)}.")
    made = ActSizes(
        told.action_dim,
        told.state_dim or 0,
        inputs[ENVIRONMENT]["shape"][0] if ENVIRONMENT in inputs else 0,
        resnet,
        feedforward_activation=activation,
        **counts,
        **flags,
    )
    if made.n_action_steps > made.chunk_size:
        raise UserError(
            f"{where}: n_action_steps={made.n_action_steps}. Allowed: up to chunk_size="
            f"{made.chunk_size}."
        )
    if made.dim_model % made.n_heads or made.dim_model % 4:
        raise UserError(
            f"{where}: dim_model={made.dim_model}. Allowed: multiples of 4 and of n_heads="
            f"{made.n_heads}."
        )
    if config.get("temporal_ensemble_coeff") is not None:
        log.warning(
            "%s: temporal_ensemble_coeff is not done here: chunks are not averaged over time, the "
            "first n_action_steps=%d actions of each are executed",
            where,
            made.n_action_steps,
        )
    return made


def _statistics(
    told: LeRobotFolder, name: str, size: int, kind: str, made: Normaliser, where: Path
) -> dict[str, Any]:
    """The config of a feature's normaliser, which must be there if its mode asks for one."""
    mode = (told.config.get("normalization_mapping") or {}).get(kind, "IDENTITY")
    if size and mode != "IDENTITY" and made.size is None:
        raise UserError(
            f"{where}: {kind} is normalised by {mode}, but the folder has no statistics of {name}. "
            "Copy policy_preprocessor.json, policy_postprocessor.json and their .safetensors files "
            "from where the policy was trained."
        )
    if made.size is not None and made.size != size:
        raise UserError(
            f"{where}: {name} has {size} entries, but {made.size} in its statistics. Write the "
            "folder again with LeRobot."
        )
    return made.config_dict()


def fit(settings: ActSettings, sizes: ActSizes, spec: EnvSpec) -> None:
    """Finds cameras and state among an environment's observations.

    Args:
        settings: changed in place, and only if everything fits.
        sizes: of the network.
        spec: the environment.

    Raises:
        UserError: cameras, state or action do not fit.
    """
    if sizes.action_dim != spec.action_dim:
        raise UserError(
            f"the policy was made for {sizes.action_dim} action entries, but {spec.name} has "
            f"{spec.action_dim}. Set env.task and env.control_mode as they were when the policy "
            "was pretrained."
        )
    names = [name for name, _, _ in settings.images]
    cameras = match_cameras(dict(settings.cameras), names, spec) if names else []
    absent = sorted(set(names) - {name for name, _ in cameras})
    if absent:
        images = ", ".join(sorted(k for k, s in spec.obs.items() if is_image(s)))
        raise UserError(
            f"the policy looks through the cameras {', '.join(names)}, all of them, but no image "
            f"of {spec.name} ({images}) is {', '.join(absent)}. Set policy.cameras, or choose the "
            "environment that the policy was trained in."
        )
    shapes = {name: shape for name, shape, _ in settings.images}
    for name, key in cameras:
        _check_shape(name, shapes[name], key, spec)
    state, environment = _state(settings, sizes, spec)
    if len(spec.instructions) > 1:
        log.warning("ACT reads no instruction: it cannot tell the tasks of %s apart", spec.name)
    settings.cameras = [list(pair) for pair in cameras]
    settings.state_keys, settings.environment_keys = state, environment


def _check_shape(name: str, shape: list[int], key: str, spec: EnvSpec) -> None:
    found = spec.obs[key].shape[:2]
    if tuple(shape) == found:
        return
    ratio = (shape[0] * found[1]) / (shape[1] * found[0])
    if abs(ratio - 1) > ASPECT:
        raise UserError(
            f"the policy's camera {name} gives {shape[0]} x {shape[1]} pixels (height x width), "
            f"but {key} of {spec.name} {found[0]} x {found[1]}: another aspect. Render it as the "
            "policy was trained, or choose another image in policy.cameras."
        )
    log.warning(
        "%s of %s has %d x %d pixels and is resized to the %d x %d of the policy's camera %s",
        *(key, spec.name, *found, *shape, name),
    )


def _state(settings: ActSettings, sizes: ActSizes, spec: EnvSpec) -> tuple[list[str], list[str]]:
    """Keys of the state and of the environment's state.

    With an environment token, entries under `extra.` belong to it unless `policy.state` names them.
    """
    state: list[str] = []
    rest = spec
    if sizes.environment_dim:
        taken = set(settings.state_keys)
        own = [k for k in spec.obs if k == ENVIRONMENT_KEY or k.startswith(ENVIRONMENT_GROUP)]
        kept = {k: s for k, s in spec.obs.items() if k in taken or k not in own}
        rest = replace(spec, obs=kept)
    if sizes.state_dim:
        state = match_state(settings.state_keys, sizes.state_dim, sizes.state_dim, rest)
    if not sizes.environment_dim:
        return state, []
    if ENVIRONMENT_KEY in spec.obs:
        environment = [ENVIRONMENT_KEY]
    else:
        environment = sorted(
            k for k in spec.obs if k.startswith(ENVIRONMENT_GROUP) and k not in state
        )
    size = state_size(environment, spec)
    if size != sizes.environment_dim:
        raise UserError(
            f"the policy reads an environment state of {sizes.environment_dim} entries, but "
            f"{spec.name} gives {size}: {', '.join(environment) or 'none'}. It is the observation "
            f"{ENVIRONMENT_KEY!r}, or all that begin with {ENVIRONMENT_GROUP!r}; what belongs to "
            "the robot's state instead can be named in policy.state."
        )
    return state, environment
