"""Writes trained weights back into the layout of the folder that they came from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Set
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from embodied_rl.errors import UserError

# weights in other forms: they would be those of the untrained policy
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf"}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a policy's weights: one, or several with an index beside them."""
    return sorted(p for p in folder.glob("*.safetensors") if p.name.startswith("model"))


def write_folder(
    source: Path,
    folder: Path,
    name: Callable[[str], str | None],
    weights: dict[str, Tensor],
    unread: Set[str] = frozenset(),
) -> None:
    """Writes a folder like `source`, with other weights.

    Files, names, order of files, precisions and metadata of the weights are those of `source`; its
    other files are copied byte for byte. A tensor that is still what it was when it was read is
    copied from there, so that reading in a lower precision costs nothing where nothing was learnt.

    Args:
        source: the published folder.
        folder: where to; made if it is not there.
        name: maps a published name to ours; None: known, but nothing here reads it, so that it is
            copied bit for bit.
        weights: ours, by name.
        unread: those of ours that a published folder may lack.

    Raises:
        UserError: names or shapes are not those of `source`, which must have changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = weight_files(source)
    written: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in names}
        for key, published in tensors.items():
            ours = name(key)
            if ours is None:
                continue
            mine = weights.get(ours)
            if mine is None or mine.shape != published.shape:
                what = "no such tensor" if mine is None else f"the shape {tuple(mine.shape)}"
                raise UserError(
                    f"{path}: {key} has the shape {tuple(published.shape)}, the trained policy "
                    f"{what}. Was the folder changed? Put the original files back there."
                )
            written.add(ours)
            mine = mine.detach().cpu()
            if not torch.equal(published.to(mine.dtype), mine):
                tensors[key] = mine.to(published.dtype).contiguous()
        save_file(tensors, folder / path.name, metadata)
    places = {weights[key].data_ptr() for key in written}  # tied weights have one for several names
    left = [k for k, v in weights.items() if k not in unread and v.data_ptr() not in places]
    if left:
        raise UserError(
            f"{source}: its weights have no place for {', '.join(sorted(left)[:3])} of the trained "
            "policy. Was the folder changed? Put the original files back there."
        )
    for path in source.iterdir():
        if path.is_file() and path not in files and path.suffix not in OTHER_WEIGHTS:
            shutil.copy2(path, folder / path.name)
