"""Sampling transitions from trajectories: windows, returns, and batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.config import AlgorithmConfig
from embodied_rl.errors import ReplayNotReady
from embodied_rl.interfaces import ReplayBuffer
from embodied_rl.replay.ahead import Ahead
from embodied_rl.replay.cache import TrajectoryCache
from embodied_rl.replay.damage import LostError
from embodied_rl.replay.gather import Draw, TransitionReader
from embodied_rl.replay.prefetch import Prefetcher
from embodied_rl.replay.reader import StoreReader
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.replay.window import Window
from embodied_rl.types import Batch, Features, Obs, Trajectory

# The newest checkpoints, whose evicted trajectories stay on disk: the one being saved, and the one
# to go back to if that fails. Not `train.keep_checkpoints`: with many nothing would ever leave the
# disk, and with one a crash while saving would leave none that resumes exactly.
CHECKPOINTS = 2


class TrajectoryReplay(ReplayBuffer):
    """Uniform over the transitions of the newest `sample_window_size` trajectories.

    Args:
        store: where trajectories are kept; a `StoreReader` for sampling only; None keeps them in
            the cache only.
        config: gamma, n_step, bootstrap_type and the `replay_buffer` group.
        encode: backbone forward for trajectories that carry no features.
        device: where batches are built.
        seed: of this buffer's own generator.
        is_demo: marks the batch rows.
    """

    def __init__(
        self,
        store: StoreReader | None,
        config: AlgorithmConfig,
        encode: Callable[[Obs], Features],
        device: torch.device,
        seed: int,
        is_demo: bool = False,
    ) -> None:
        settings = config.replay_buffer
        self.store, self.config, self.device = store, config, device
        self.minimum, self.is_demo = settings.min_buffer_size, is_demo
        self._encode = encode
        self._rng = np.random.default_rng(seed)
        self._window = Window(settings.sample_window_size)
        self._planned: deque[Mapping[str, Any]] = deque()  # generator's, before prefetched draws
        self._prefetch = Prefetcher[dict[str, Tensor]](settings.prefetch)
        self._ahead = Ahead(self._rng, self._draw, lambda draw: self._reader.gather(draw))
        self._checkpoints: deque[int] = deque(maxlen=CHECKPOINTS)
        self._load_existing()

    def __len__(self) -> int:
        return len(self._window)

    @property
    def problems(self) -> list[str]:
        """What the store had to leave out so far."""
        return self.store.problems if self.store is not None else []

    @property
    def transitions(self) -> int:
        """Transitions that `sample` chooses from."""
        return self._window.transitions

    @property
    def ready(self) -> bool:
        """Whether `min_buffer_size` trajectories are there."""
        return len(self) - self._window.first >= self.minimum and self.transitions > 0

    def add(self, trajectory: Trajectory) -> None:
        """Appends a trajectory to disk and cache."""
        number = len(self)
        self._ahead.forget(rewind=True)
        self._prefetch.settle()  # adding may evict rows that were drawn ahead
        if self.store is not None:
            self._writable().append(trajectory)
            self._window.first = self.store.first
        self._window.append(trajectory.length)
        self._reader.admit(number, trajectory.fields)

    def sample(self, n: int) -> Batch:
        """Returns exactly n transitions, with replacement, from this buffer's own generator.

        Raises:
            ReplayNotReady: fewer than `min_buffer_size` trajectories.
        """
        if len(self._ahead) == 0:
            self._check_ready()
        while True:
            try:
                if self._prefetch.depth == 0:
                    return self._batch(self._ahead.next(n))
                rows = self._prefetch.take(lambda: self._plan(n))
                self._planned.popleft()
                return self._batch(rows)
            except LostError as error:
                for number in error.numbers:
                    self._window.forget(number)
                self._forget_ahead(rewind=False)
                self._check_ready()

    def _check_ready(self) -> None:
        if not self.ready:
            raise ReplayNotReady(
                f"{len(self)} trajectories of the {self.minimum} that "
                f"algorithm.replay_buffer.min_buffer_size asks for. {' '.join(self.problems)}"
            )

    def _plan(self, n: int) -> Callable[[], dict[str, Tensor]]:
        """Draws now, in the order of calls, what the prefetching thread will read."""
        self._planned.append(self._rng.bit_generator.state)
        draw = self._draw(n)
        return lambda: self._reader.gather(draw)

    def _forget_ahead(self, *, rewind: bool) -> None:
        """Drops batches ahead; `rewind` sets the generator back to before they were drawn."""
        self._ahead.forget(rewind=rewind)
        if rewind and self._planned:
            self._rng.bit_generator.state = self._planned[0]
        self._planned.clear()
        self._prefetch.drop()

    def _draw(self, n: int) -> Draw:
        return self._reader.locate(*self._window.draw(self._rng, n))

    def _batch(self, rows: dict[str, Tensor]) -> Batch:
        """Moves rows to the learner's device and encodes what is not encoded yet."""
        pin = self.config.replay_buffer.pin_memory and self.device.type == "cuda"
        here, after = {}, {}
        for name, value in rows.items():
            into, key = (after, name[5:]) if name.startswith("next.") else (here, name)
            if value.device != self.device:
                source = value.pin_memory() if pin and value.device.type == "cpu" else value
                value = source.to(self.device, non_blocking=pin)
            into[key] = value
        demo = torch.full((len(here["reward"]),), self.is_demo, device=self.device)
        features, following = Features.from_fields(here), Features.from_fields(after)
        obs = None
        if features is None or following is None:
            obs = _observations(here)
            features, following = self._encode(obs), self._encode(_observations(after))
        rest = (here["action"], here["reward"], here["discount"])
        return Batch(features, following, *rest, demo, obs)

    def _writable(self) -> TrajectoryStore:
        if not isinstance(self.store, TrajectoryStore):
            raise TypeError("this buffer samples from a store that it may not write to")
        return self.store

    def _load_existing(self) -> None:
        """Counts what the store holds and brings its newest trajectories into memory."""
        settings = self.config.replay_buffer
        self._window = Window(settings.sample_window_size)
        cache = None
        if settings.enable_cache or self.store is None:
            where = torch.device("cpu") if settings.cache_device == "cpu" else self.device
            cache = TrajectoryCache(settings.cache_size, where, settings.cache_bytes)
        self._reader = TransitionReader(self.store, cache, self.config)
        if self.store is None:
            return
        self._reader.fill()
        for length in self.store.lengths.tolist():
            self._window.append(length)
        self._window.first = self.store.first

    def state_dict(self) -> dict[str, Any]:
        """The generator, and which trajectories there are by now."""
        self._forget_ahead(rewind=True)
        if isinstance(self.store, TrajectoryStore):
            self.store.flush()
            self._window.first = self.store.first
            self._checkpoints.append(self._window.first)
            self.store.keep_from(min(self._checkpoints))
        return {
            "rng": self._rng.bit_generator.state,
            "trajectories": len(self),
            "first": self._window.first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to the trajectories and the generator of a checkpoint."""
        self._forget_ahead(rewind=False)
        if self.store is not None:
            self._writable().go_back(state["first"], state["trajectories"])
            self._load_existing()
        self._rng.bit_generator.state = state["rng"]

    def close(self) -> None:
        """Writes what is not on disk yet and lets go of the files."""
        self._forget_ahead(rewind=True)
        if self.store is not None:
            self.store.close()


def _observations(fields: Mapping[str, Tensor]) -> Obs:
    return {k.removeprefix("obs."): v for k, v in fields.items() if k.startswith("obs.")}
