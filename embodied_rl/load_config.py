"""YAML files and dot-list overrides to a validated config object."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from embodied_rl.config import Config
from embodied_rl.errors import UserError, nearest
from embodied_rl.validate import validate

C = TypeVar("C")
# mappings whose keys belong to somebody else
CONFIG = "config.yaml"  # in a run folder: what it was started with
FREE_FORM = ("env.kwargs", "env.instructions", "policy.cameras", "tune.cameras")


def schema_keys(schema: Any, prefix: str = "") -> list[str]:
    """Returns every dotted leaf key of a config dataclass."""
    keys: list[str] = []
    for f in dataclasses.fields(schema):
        value = getattr(schema, f.name)
        name = f"{prefix}{f.name}"
        keys += schema_keys(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return keys


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings under dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in FREE_FORM:
            leaves.update(flatten(value, f"{name}."))
        else:
            leaves[name] = value
    return leaves


def load_config(
    schema: type[C], args: Sequence[str], *, base: Path | None = None
) -> tuple[C, set[str]]:
    """Merges defaults, `config=` files and overrides, in that order, and validates.

    Args:
        schema: the config dataclass.
        args: command-line words, each `key.path=value`; `config=file.yaml` may be repeated.
        base: a YAML file merged before everything else (the config of a run being resumed).

    Returns:
        The config object and the set of dotted keys that `args` set.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or keys that contradict.
    """
    files, overrides = _split(args)
    layers = [(str(path), _read_yaml(path)) for path in ([base] if base else []) + files]
    typed = len(layers) - len(files)
    layers.append(("the command line", _parse_overrides(overrides)))
    merged = OmegaConf.structured(schema)
    known = schema_keys(schema())
    given: set[str] = set()
    named: set[str] = set()
    for position, (origin, layer) in enumerate(layers):
        tree: Any = OmegaConf.to_container(layer)
        if not isinstance(tree, dict):
            raise UserError(
                f"{origin}: expected a mapping of config keys, got {type(tree).__name__}."
            )
        keys = flatten(tree)
        _check_known(keys, known, origin)
        named |= set(keys)
        if position >= typed:
            given |= set(keys)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{origin}: {error.full_key or 'config'}: {first}") from None
    try:
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from None
    env = getattr(config, "env", None)
    if env is not None and env.instructions and "env.task" not in named:
        env.task = next(iter(env.instructions))
    validate(config)
    return config, given


def save_config(config: Any, path: Path) -> None:
    """Writes the resolved config; `config=<path>` reproduces the run."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def help_text(command: str, schema: type[Any]) -> str:
    """Returns the usage of a command line, with every key and its default."""
    return (
        f"usage: python -m embodied_rl.{command} [config=file.yaml ...] [key.path=value ...]\n\n"
        f"{(schema.__doc__ or '').strip()} Keys and defaults:\n\n"
        f"{OmegaConf.to_yaml(OmegaConf.structured(schema))}\n"
        "What each key means: embodied_rl/config.py and embodied_rl/command_configs.py."
    )


def _split(args: Sequence[str]) -> tuple[list[Path], list[str]]:
    files, overrides = [], []
    for arg in args:
        key, equals, value = arg.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(
                f"cannot read argument {arg!r}: expected key.path=value, such as "
                "algorithm.q_head_type=crossq, or config=file.yaml. --help lists the keys."
            )
        if key == "config":
            files.append(Path(value))
        else:
            overrides.append(arg)
    return files, overrides


def _read_yaml(path: Path) -> DictConfig:
    if path.is_dir():
        raise UserError(f"config={path} is a folder; expected a YAML file.")
    if not path.is_file():
        raise UserError(f"config={path}: no such file.")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"config={path} is not valid YAML: {error}") from None
    return OmegaConf.create({}) if loaded is None else loaded  # type: ignore[return-value]


def _parse_overrides(overrides: list[str]) -> DictConfig:
    try:
        return OmegaConf.from_dotlist(overrides)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"cannot read the overrides {overrides}: {error}") from None


def _check_known(keys: dict[str, Any], known: list[str], origin: str) -> None:
    groups = {k.rsplit(".", i)[0] for k in known for i in range(1, k.count(".") + 1)}
    for key, value in keys.items():
        free = any(key == f or key.startswith(f"{f}.") for f in FREE_FORM)
        if key in known or free or (key in groups and value in (None, {})):
            continue
        if key in groups:
            members = [k for k in known if k.startswith(f"{key}.")]
            raise UserError(
                f"{origin}: {key} is a group of keys, got the value {value!r}. "
                f"Set one of: {', '.join(members)}."
            )
        hint = nearest(key, known)
        if not hint:  # right name, wrong or missing group
            same = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
            hint = f" Did you mean '{same[0]}'?" if same else " --help lists the keys."
        raise UserError(f"{origin}: unknown config key '{key}'.{hint}")


def load_run_config(run: Path, args: Sequence[str]) -> tuple[Config, set[str]]:
    """Loads the config that a run folder recorded, with overrides on top.

    Raises:
        UserError: the folder holds no recorded config.
    """
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"resume={run}: no config.yaml there, so it is not a run folder.")
    return load_config(Config, args, base=path)
