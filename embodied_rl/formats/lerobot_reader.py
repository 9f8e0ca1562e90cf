"""A LeRobot dataset to trajectories; `lerobot.py` describes the layout.

What we exported comes back exactly, images apart. In other datasets an episode's T frames hold T
observations, so nobody knows what its last action led to. Where the last frame ends the task
(`next.done` without `next.truncated`) it stays a decision, whose successor is a copy of itself,
which no bootstrap reads (`algorithm.bootstrap_type=standard`). Elsewhere the last frame gives the
final observation and its action is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.formats import lerobot as layout
from embodied_rl.formats.recording import Recording
from embodied_rl.formats.video import VideoReader
from embodied_rl.types import Trajectory

TERMINATED = "terminated"  # follows from two features
NUMBERS = ("float", "int", "uint", "bool")  # beginnings of dtypes that a field can hold


def read_lerobot(folder: Path) -> Recording:
    """Opens a dataset.

    Raises:
        UserError: pyarrow is missing, no LeRobot dataset of version 3 (also while reading).
    """
    layout.arrow()
    try:
        info = json.loads((folder / layout.INFO).read_text(encoding="utf-8"))
        version, features = str(info["codebase_version"]), info["features"]
        own = _own(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(folder, error) from None
    if not version.startswith("v3."):
        raise UserError(
            f"{folder} is a LeRobot dataset of version {version}; readable are v3.*. Convert it "
            "with LeRobot's lerobot.scripts.convert_dataset_v21_to_v30."
        )
    if layout.ACTION not in features:
        raise UserError(f"{folder} has no feature {layout.ACTION!r}; it has {', '.join(features)}.")
    recording = Recording((), own["meta"] if own else {})
    source = _Dataset(folder, info, own["fields"] if own else None, recording)
    recording.trajectories = source.trajectories()
    return recording


def _own(folder: Path) -> dict[str, Any] | None:
    path = folder / layout.OWN_FIELDS
    if not path.is_file():
        return None
    own = json.loads(path.read_text(encoding="utf-8"))
    found, wanted = (own["format"], own["version"]), (layout.OWN_FORMAT, layout.OWN_VERSION)
    if found != wanted:
        raise UserError(f"{path} is {found}, readable is {wanted}. Use the version that wrote it.")
    return own


def _broken(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder} is not a whole LeRobot dataset ({type(error).__name__}: {error}). Copy or "
        "export it again."
    )


class _Dataset:
    """A dataset being read, one episode after the other."""

    def __init__(
        self,
        folder: Path,
        info: dict[str, Any],
        fields: dict[str, dict[str, Any]] | None,
        recording: Recording,
    ) -> None:
        self.folder, self.info, self.fields = folder, info, fields
        self.features: dict[str, dict[str, Any]] = info["features"]
        self.recording = recording
        self._pa, self._pq = layout.arrow()
        self._table: tuple[Path, Any] | None = None
        self._videos = {n: VideoReader() for n, f in self.features.items() if f["dtype"] == "video"}
        self._rest = self._open_rest()
        self._skipped: set[str] = set()
        self._largest, self._cut = 0.0, 0

    def trajectories(self) -> Iterator[Trajectory]:
        """Yields one per episode, then completes the notes.

        Raises:
            UserError: something is missing or unreadable.
        """
        read = self._exact if self.fields is not None else self._foreign
        try:
            for episode in self._episodes():
                trajectory = read(episode)
                if trajectory is not None:
                    yield trajectory
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise _broken(self.folder, error) from None  # pyarrow's errors are among these
        except (self._pa.ArrowException, SafetensorError) as error:
            raise _broken(self.folder, error) from None
        finally:
            for reader in self._videos.values():
                reader.close()
        self._complete_notes()

    def _episodes(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for path in sorted((self.folder / "meta/episodes").glob("*/*.parquet")):
            names = self._pq.read_schema(path).names
            wanted = [n for n in names if not n.startswith("stats/")]
            rows += self._pq.read_table(path, columns=wanted).to_pylist()
        if len(rows) != self.info["total_episodes"]:
            raise ValueError(
                f"{layout.INFO} speaks of {self.info['total_episodes']} episodes, "
                f"meta/episodes of {len(rows)}"
            )
        return sorted(rows, key=lambda row: row["episode_index"])

    def _rows(self, episode: dict[str, Any]) -> Any:
        """The frames of an episode as a table."""
        where = {k: episode[f"data/{k}"] for k in ("chunk_index", "file_index")}
        path = self.folder / self.info["data_path"].format(**where)
        if self._table is None or self._table[0] != path:
            self._table = path, self._pq.read_table(path)
        table = self._table[1]
        numbers = table["episode_index"].to_numpy()
        found = np.flatnonzero(numbers == episode["episode_index"])
        if len(found) != episode["length"] or found[-1] - found[0] + 1 != len(found):
            raise ValueError(
                f"episode {episode['episode_index']} has {len(found)} frames in {path.name}, "
                f"meta/episodes speaks of {episode['length']}"
            )
        return table.slice(int(found[0]), len(found))

    def _column(self, table: Any, name: str) -> np.ndarray:
        """A numeric feature, [T, ...] as `info.json` says; scalars are [T]."""
        array = table[name].combine_chunks()
        while self._nested(array.type):
            extended = isinstance(array.type, self._pa.BaseExtensionType)
            array = array.storage if extended else array.flatten()
        values = array.to_numpy(zero_copy_only=False).astype(self.features[name]["dtype"])
        shape = self.features[name]["shape"]
        return values.reshape(len(table), *(() if shape == [1] else shape))

    def _nested(self, kind: Any) -> bool:
        types = self._pa.types
        lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        return isinstance(kind, self._pa.BaseExtensionType) or any(check(kind) for check in lists)

    def _frames(self, episode: dict[str, Any], table: Any, name: str) -> np.ndarray:
        """A visual feature, uint8 [T, height, width, 3]."""
        if name not in self._videos:  # pictures inside the table
            pictures = table[name].to_pylist()
            return np.stack([imageio.imread(p["bytes"], plugin="pillow") for p in pictures])
        prefix = f"videos/{name}/"
        where = {k: episode[prefix + k] for k in ("chunk_index", "file_index")}
        path = self.folder / self.info["video_path"].format(video_key=name, **where)
        start = round(episode[prefix + "from_timestamp"] * self.info["fps"])
        return self._videos[name].read(path, start, episode["length"])

    def _exact(self, episode: dict[str, Any]) -> Trajectory:
        """What we exported."""
        assert self.fields is not None
        table, fields = self._rows(episode), {}
        for name, spec in self.fields.items():
            key = f"{episode['episode_index']}/{name}"
            rest = self._rest[key].get_tensor(key) if key in self._rest else None
            if rest is not None and len(rest) > 1:
                fields[name] = rest
                continue
            feature = spec["feature"]
            if rest is None and (name.startswith("obs.") or feature is None) and name != TERMINATED:
                raise KeyError(f"{key} is not in {Path(layout.OWN_REST).parent}/")
            rows = self._told(episode, table, feature, spec["shape"])
            fields[name] = torch.cat([rows, torch.zeros_like(rows[:1]) if rest is None else rest])
        return Trajectory(fields)

    def _told(
        self, episode: dict[str, Any], table: Any, feature: str | None, shape: list[int]
    ) -> Tensor:
        """The first T rows of a field from its feature, of `terminated` if it has none."""
        if feature in self._videos:
            return torch.from_numpy(self._frames(episode, table, feature))
        if feature is None:
            done = self._column(table, layout.DONE)
            return torch.from_numpy(done & ~self._column(table, layout.TRUNCATED))
        values = torch.from_numpy(self._column(table, feature))
        return values.reshape(len(values), *shape)

    def _foreign(self, episode: dict[str, Any]) -> Trajectory | None:
        """What somebody else recorded; None where nothing is left."""
        table, count = self._rows(episode), episode["length"]
        rows: dict[str, np.ndarray] = {}
        for name, feature in self.features.items():
            if name.startswith(layout.OBS):
                values = self._observation(episode, table, name, feature)
                if values is not None:
                    rows[f"obs.{name.removeprefix(layout.OBS)}"] = values
        told = {
            "reward": self._flag(table, layout.REWARD, count).astype(np.float32)[:, None],
            "truncated": self._flag(table, layout.TRUNCATED, count).astype(bool),
            "success": self._flag(table, layout.SUCCESS, count).astype(bool),
        }
        told["terminated"] = self._flag(table, layout.DONE, count).astype(bool) & ~told["truncated"]
        action = self._column(table, layout.ACTION).astype(np.float32).reshape(count, 1, -1)
        told["action"], told["steps"] = action, np.ones(count, np.int64)
        self._largest = max(self._largest, float(np.abs(action).max()))
        if told["terminated"][-1]:
            rows = {k: np.concatenate([v, v[-1:]]) for k, v in rows.items()}
        else:
            told = {k: v[:-1] for k, v in told.items()}
            self._cut += 1
        if not len(told["action"]):
            return None
        rows |= {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in told.items()}
        return Trajectory({k: torch.from_numpy(v) for k, v in rows.items()})

    def _observation(
        self, episode: dict[str, Any], table: Any, name: str, feature: dict[str, Any]
    ) -> np.ndarray | None:
        """One observation feature [T, ...], or None where no field can hold it."""
        if feature["dtype"] in ("video", "image"):
            notes = feature["info"] if feature.get("info") else {}
            depth = notes.get("is_depth_map") or notes.get("video.is_depth_map")
            if not depth:
                return self._frames(episode, table, name)
        elif feature["dtype"].startswith(NUMBERS):
            values = self._column(table, name)
            return values.reshape(len(values), *feature["shape"])
        self._skipped.add(name)
        return None

    def _flag(self, table: Any, name: str, count: int) -> np.ndarray:
        """A scalar feature [T], zeros where the dataset lacks it."""
        return self._column(table, name) if name in self.features else np.zeros(count, np.float32)

    def _open_rest(self) -> dict[str, Any]:
        """Key to the open file that holds it."""
        found: dict[str, Any] = {}
        for path in sorted((self.folder / layout.OWN_REST).parent.glob("rest-*.safetensors")):
            file = safe_open(path, framework="pt")
            found.update(dict.fromkeys(file.keys(), file))
        return found

    def _complete_notes(self) -> None:
        notes = self.recording.notes
        if self._videos:
            notes.append(
                "images come from video, which is lossy: they are not the original pixels."
            )
        if self.fields is not None:
            return
        known = {layout.ACTION, layout.REWARD, layout.DONE, layout.TRUNCATED, layout.SUCCESS}
        self._skipped |= {
            n
            for n in self.features
            if not n.startswith(layout.OBS) and n not in known | set(layout.INDEX_FEATURES)
        }
        if self._skipped:
            notes.append(f"not read, for want of a place: {', '.join(sorted(self._skipped))}.")
        absent = [n for n in (layout.REWARD, layout.DONE, layout.SUCCESS) if n not in self.features]
        if absent:
            notes.append(f"zero or false throughout, as the dataset lacks it: {', '.join(absent)}.")
        if self._cut:
            notes.append(
                f"{self._cut} episodes do not end the task: their last frame became the final "
                "observation, its action was dropped."
            )
        if self._largest > 1:
            notes.append(
                f"actions reach {self._largest:g}; policies here act in [-1, 1]. Rescale before "
                "training on them."
            )
