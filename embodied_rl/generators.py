"""The process's global random generators, for the checkpoint."""

from __future__ import annotations

from random import getstate, setstate
from typing import Any

import numpy as np
import torch
from numpy.random import get_state, set_state


class Generators:
    """torch's default generators on every device, and numpy's and Python's global ones.

    The trainer itself draws from torch's only; a plug-in or a simulator that runs in this process
    may draw from the others.
    """

    def state_dict(self) -> dict[str, Any]:
        """All states, as tensors and JSON values."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        numpy: Any = get_state(legacy=False)
        version, words, gauss = getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": list(cuda),
            "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
            "python": [version, list(words), gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them; CUDA's only where the number of devices is the same."""
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        numpy = state["numpy"]
        key = np.asarray(numpy["state"]["key"], np.uint32)
        set_state({**numpy, "state": {**numpy["state"], "key": key}})
        version, words, gauss = state["python"]
        setstate((version, tuple(words), gauss))
