"""Trajectories to a LeRobot dataset; `lerobot.py` describes the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.formats import lerobot as layout
from embodied_rl.formats.lerobot_features import (
    NEXT,
    dtype_name,
    feature_name,
    number_feature,
    row_spec,
    video_feature,
)
from embodied_rl.formats.lerobot_files import MB, ParquetFiles, VideoFiles
from embodied_rl.formats.recording import Recording, check_single_steps, same
from embodied_rl.formats.statistics import Statistics, describe, describe_images, merge
from embodied_rl.types import Trajectory

REST_BYTES = 64 * MB  # a file of what LeRobot has no place for
EPISODES_AT_ONCE = 100  # rows of episode metadata per row group


def write_lerobot(folder: Path, recording: Recording, task: str, fps: int) -> int:
    """Writes a dataset; returns the number of episodes.

    Args:
        folder: empty or absent. `meta/info.json` is written last: without it, the export broke off.
        recording: what to write; decisions of one action.
        task: the instruction, one for all episodes.
        fps: decisions per second of the simulated robot.

    Raises:
        UserError: pyarrow is missing, chunks of several actions, fields that differ between
            trajectories, or the folder cannot be written.
    """
    pa, pq = layout.arrow()
    dataset = _Dataset(folder, task, fps, pa, pq)
    try:
        for number, trajectory in enumerate(recording.trajectories):
            check_single_steps(trajectory, f"trajectory {number}")
            dataset.append(trajectory)
        dataset.finish(recording.meta)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error}. Free some space (df -h), then export again with "
            "overwrite=true."
        ) from error
    return dataset.episodes


class _Dataset:
    """A dataset being written, one episode after the other."""

    def __init__(self, folder: Path, task: str, fps: int, pa: Any, pq: Any) -> None:
        self.folder, self.task, self.fps, self.pa, self.pq = folder, task, fps, pa, pq
        self.episodes, self.frames = 0, 0
        self._fields: dict[str, dict[str, Any]] = {}  # ours: feature, dtype and shape of a row
        self._features: dict[str, dict[str, Any]] = {}  # LeRobot's
        self._data = ParquetFiles(folder, layout.DATA_PATH, pq)
        self._index = ParquetFiles(folder, layout.EPISODES_PATH, pq)
        self._rows: list[dict[str, Any]] = []  # episodes that are not in the index yet
        self._videos: dict[str, VideoFiles] = {}
        self._stats: dict[str, Statistics] = {}
        self._rest: dict[str, Tensor] = {}
        self._rest_files = 0

    def append(self, trajectory: Trajectory) -> None:
        """Writes one episode."""
        fields, count = trajectory.fields, trajectory.length
        self._check_fields(fields)
        columns = self._columns(fields, count)
        row: dict[str, Any] = {
            "episode_index": self.episodes,
            "tasks": [self.task],
            "length": count,
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + count,
        }
        stats = {name: describe(values) for name, values in columns.items()}
        table = self.pa.table({name: self._array(values) for name, values in columns.items()})
        row |= _prefixed("data", self._data.place(table.nbytes))
        self._data.append(table)
        for name, videos in self._videos.items():
            frames = fields[self._field_of(name)][:-1].numpy()
            stats[name] = describe_images(frames)
            row |= _prefixed(f"videos/{name}", videos.append(frames))
        for name, found in stats.items():
            self._stats[name] = merge(self._stats.get(name), found)
            row |= _prefixed(f"stats/{name}", {k: v.tolist() for k, v in found.items()})
        self._rows.append(row)
        self._keep_rest(fields, columns)
        self.episodes += 1
        self.frames += count
        if len(self._rows) >= EPISODES_AT_ONCE:
            self._flush_rows()

    def finish(self, meta: dict[str, Any]) -> None:
        """Closes the files and writes what describes them."""
        self._flush_rows()
        self._flush_rest()
        for files in (self._data, self._index, *self._videos.values()):
            files.close()
        stats = {n: {k: v.tolist() for k, v in s.items()} for n, s in self._stats.items()}
        self._json(layout.STATS, stats)
        self._write_tasks()
        own = {"format": layout.OWN_FORMAT, "version": layout.OWN_VERSION, "meta": meta}
        self._json(layout.OWN_FIELDS, {**own, "fields": self._fields})
        self._json(
            layout.INFO,
            {
                "codebase_version": layout.VERSION,
                "robot_type": None,
                "total_episodes": self.episodes,
                "total_frames": self.frames,
                "total_tasks": 1,
                "chunks_size": layout.FILES_PER_CHUNK,
                "data_files_size_in_mb": layout.DATA_MB,
                "video_files_size_in_mb": layout.VIDEO_MB,
                "fps": self.fps,
                "splits": {"train": f"0:{self.episodes}"},
                "data_path": layout.DATA_PATH,
                "video_path": layout.VIDEO_PATH if self._videos else None,
                "features": self._features,
            },
        )

    def _check_fields(self, fields: dict[str, Tensor]) -> None:
        found = {name: row_spec(value) for name, value in fields.items()}
        if not self._fields:
            self._fields = {
                n: {"feature": feature_name(n, fields[n]), **s} for n, s in found.items()
            }
            self._plan(fields)
            return
        known = {n: {k: f[k] for k in ("dtype", "shape")} for n, f in self._fields.items()}
        if found != known:
            odd = sorted(n for n in {*found, *known} if found.get(n) != known.get(n))
            raise UserError(
                f"trajectory {self.episodes} differs from those before it in {', '.join(odd)}. A "
                "LeRobot dataset has one set of features: export the trajectories separately."
            )

    def _plan(self, fields: dict[str, Tensor]) -> None:
        """Decides the features from the first trajectory."""
        for name, value in fields.items():
            feature = self._fields[name]["feature"]
            if feature is None:
                continue
            if name.startswith("obs.") and layout.is_image(value):
                height, width = value.shape[1:3]
                self._videos[feature] = VideoFiles(self.folder, feature, (height, width), self.fps)
                self._features[feature] = video_feature(height, width, self.fps)
                continue
            shape = value.shape[2:] if name == "action" else value.shape[1:]
            self._features[feature] = number_feature(dtype_name(value), list(shape))
        self._features[layout.DONE] = number_feature("bool", [])
        for name, dtype in layout.INDEX_FEATURES.items():
            self._features[name] = number_feature(dtype, [])

    def _field_of(self, feature: str) -> str:
        return next(n for n, f in self._fields.items() if f["feature"] == feature)

    def _columns(self, fields: dict[str, Tensor], count: int) -> dict[str, np.ndarray]:
        """The values [T, ...] of every feature that is not a video."""
        columns = {}
        for name, value in fields.items():
            feature = self._fields[name]["feature"]
            if feature is not None and feature not in self._videos:
                rows = value[:-1, 0] if name == "action" else value[:-1]
                columns[feature] = rows.numpy()
        columns[layout.REWARD] = columns[layout.REWARD][:, 0]
        columns[layout.DONE] = (fields["terminated"] | fields["truncated"])[:-1].numpy()
        frame = np.arange(count)
        columns["timestamp"] = (frame / self.fps).astype(np.float32)
        columns["frame_index"] = frame
        columns["episode_index"] = np.full(count, self.episodes)
        columns["index"] = self.frames + frame
        columns["task_index"] = np.zeros(count, np.int64)
        return columns

    def _array(self, values: np.ndarray) -> Any:
        """[T, ...] as numbers, as lists of one size, or as nested lists."""
        pa = self.pa
        array = pa.array(np.ascontiguousarray(values).reshape(-1))
        inner = values.shape[1:]
        if inner in ((), (1,)):
            return array
        if len(inner) == 1:
            return pa.FixedSizeListArray.from_arrays(array, inner[0])
        for size in reversed(inner):
            bounds = pa.array(np.arange(0, len(array) + 1, size, dtype=np.int32))
            array = pa.ListArray.from_arrays(bounds, array)
        return array

    def _keep_rest(self, fields: dict[str, Tensor], columns: dict[str, np.ndarray]) -> None:
        """Puts aside what the columns do not say: final observations and fields of our own."""
        done, cut = columns[layout.DONE], columns[layout.TRUNCATED]
        told = {
            "action": columns[layout.ACTION][:, None],
            "terminated": done & ~cut,
            **{name: columns[feature] for name, feature in NEXT.items()},
        }
        for name, value in fields.items():
            key = f"{self.episodes}/{name}"
            if name.startswith("obs."):
                self._rest[key] = value[-1:].clone()
            elif name not in told or not same(_with_zeros(told[name], value), value):
                self._rest[key] = value.clone()
        if sum(v.numel() * v.element_size() for v in self._rest.values()) >= REST_BYTES:
            self._flush_rest()

    def _flush_rest(self) -> None:
        if self._rest:
            path = self.folder / layout.OWN_REST.format(self._rest_files)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self._rest, path)
            path.chmod(0o644)  # safetensors makes it readable by its owner alone
            self._rest, self._rest_files = {}, self._rest_files + 1

    def _flush_rows(self) -> None:
        if self._rows:
            table = self.pa.Table.from_pylist(self._rows)
            for name, index in self._index.place(table.nbytes).items():
                column = self.pa.array([index] * len(table))
                table = table.append_column(f"meta/episodes/{name}", column)
            self._index.append(table)
            self._rows = []

    def _write_tasks(self) -> None:
        """The table that pandas reads back with the task's text as its index."""
        text = {"name": "task", "field_name": "task", "pandas_type": "unicode"}
        number = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64"}
        notes = {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [
                {**number, "numpy_type": "int64", "metadata": None},
                {**text, "numpy_type": "object", "metadata": None},
            ],
            "pandas_version": "2.0.0",
        }
        table = self.pa.table({"task_index": np.zeros(1, np.int64), "task": [self.task]})
        table = table.replace_schema_metadata({"pandas": json.dumps(notes)})
        self.pq.write_table(table, self.folder / layout.TASKS)

    def _json(self, name: str, value: dict[str, Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")


def _prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{k}": v for k, v in values.items()}


def _with_zeros(rows: np.ndarray, like: Tensor) -> Tensor:
    """Rows [T, ...] and a last row of zeros, in the shape of a field where they fit."""
    full = torch.from_numpy(np.concatenate([rows, np.zeros_like(rows[:1])]))
    return full.reshape(like.shape) if full.numel() == like.numel() else full
