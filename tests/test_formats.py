"""ManiSkill files and LeRobot datasets, written, read back, and checked against their layouts."""

import json
import shutil

import numpy as np
import pytest
import torch

from embodied_rl.config import EnvConfig
from embodied_rl.demonstrations import read_demos
from embodied_rl.errors import UserError
from embodied_rl.formats.lerobot import INFO, OWN_FIELDS, STATS, TASKS
from embodied_rl.formats.lerobot_reader import read_lerobot
from embodied_rl.formats.lerobot_writer import write_lerobot
from embodied_rl.formats.maniskill import read_maniskill, write_maniskill
from embodied_rl.formats.recording import Recording, same
from embodied_rl.formats.statistics import describe, describe_images, merge
from embodied_rl.types import Trajectory

pytestmark = pytest.mark.unit
LENGTHS = (5, 1, 8)
SIZE = (16, 24)  # pixels of the images
FPS = 20
META = {"task": "PickCube-v1", "fingerprint": "abc"}


def images(count: int, seed: int) -> torch.Tensor:
    """Smooth moving pictures [count, 16, 24, 3], as video is made for."""
    t, y, x, c = np.ogrid[:count, : SIZE[0], : SIZE[1], :3]
    values = 127 + 90 * np.sin(0.2 * (x + y) + 0.3 * t + seed) + 20 * (c - 1)
    return torch.from_numpy(values.astype(np.uint8))


def trajectory(length: int, seed: int, *, image: bool = False, extra: bool = True) -> Trajectory:
    """Random values in every field; the last row of actions, rewards and flags is zero."""
    rng = torch.Generator().manual_seed(seed)

    def flags() -> torch.Tensor:
        return torch.cat(
            [torch.rand(length, generator=rng) < 0.3, torch.zeros(1, dtype=torch.bool)]
        )

    action = torch.rand(length + 1, 1, 3, generator=rng) * 2 - 1
    reward = torch.randn(length + 1, 1, generator=rng)
    action[-1], reward[-1] = 0, 0
    fields = {
        "obs.state": torch.randn(length + 1, 4, generator=rng),
        "action": action,
        "reward": reward,
        "steps": torch.tensor([1] * length + [0]),
        "terminated": flags(),
        "truncated": flags(),
        "success": flags(),
    }
    if image:
        fields["obs.sensor_data.base_camera.rgb"] = images(length + 1, seed)
    if extra:
        fields["obs.extra.pose"] = torch.randn(length + 1, 2, 3, generator=rng, dtype=torch.float64)
        fields["obs.extra.held"] = flags()
        fields["features.vector"] = torch.randn(length + 1, 6, generator=rng)
    return Trajectory(fields)


def trajectories(**options) -> list[Trajectory]:
    return [trajectory(length, seed, **options) for seed, length in enumerate(LENGTHS)]


def assert_equal(found: list[Trajectory], wanted: list[Trajectory], skip=()) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert set(a.fields) == set(b.fields)
        for name in set(b.fields) - set(skip):
            assert same(a.fields[name], b.fields[name]), name


# ---------------------------------------------------------------- ManiSkill


@pytest.mark.parametrize("extra", [False, True])
def test_maniskill_round_trip_is_exact(tmp_path, extra):
    path, wanted = tmp_path / "new" / "t.h5", trajectories(image=extra, extra=extra)
    assert write_maniskill(path, Recording(wanted, META), EnvConfig()) == len(LENGTHS)
    recording = read_maniskill(path)
    assert_equal(list(recording.trajectories), wanted)
    assert recording.meta == META and recording.notes == []


def test_maniskill_round_trip_keeps_odd_values(tmp_path):
    odd = trajectory(3, 0)
    odd.fields["action"][-1] = 0.5  # a last row that is not zero
    odd.fields["obs.state"][1, 2] = torch.nan
    odd.fields["reward"][-1] = -0.0
    odd.fields["expert_action"] = odd.fields["action"].double()
    write_maniskill(tmp_path / "t.h5", Recording([odd]), EnvConfig())
    assert_equal(list(read_maniskill(tmp_path / "t.h5").trajectories), [odd])


def test_maniskill_layout(tmp_path):
    import h5py

    wanted = trajectories(extra=False)
    env = EnvConfig(task="PushCube-v1", control_mode="pd_joint_pos", kwargs={"robot_uids": "panda"})
    write_maniskill(tmp_path / "t.h5", Recording(wanted), env)
    with h5py.File(tmp_path / "t.h5") as file:
        assert sorted(file) == ["traj_0", "traj_1", "traj_2"]
        for i, (length, one) in enumerate(zip(LENGTHS, wanted, strict=True)):
            group = file[f"traj_{i}"]
            assert group["obs"].shape == (length + 1, 4)
            assert np.array_equal(group["actions"][()], one.fields["action"][:-1, 0].numpy())
            assert group["rewards"].shape == (length,)
            for name in ("success", "terminated", "truncated"):
                assert group[name].dtype == bool
                assert np.array_equal(group[name][()], one.fields[name][:-1].numpy())
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["env_info"]["env_id"] == "PushCube-v1"
    assert document["env_info"]["env_kwargs"]["control_mode"] == "pd_joint_pos"
    assert document["env_info"]["env_kwargs"]["robot_uids"] == "panda"
    assert [e["elapsed_steps"] for e in document["episodes"]] == list(LENGTHS)
    assert [e["success"] for e in document["episodes"]] == [
        bool(t.fields["success"][-2]) for t in wanted
    ]


def test_demonstrations_need_flat_states(tmp_path):
    write_maniskill(tmp_path / "t.h5", Recording(trajectories(extra=False)), EnvConfig())
    assert len(read_demos(tmp_path / "t.h5")) == len(LENGTHS)
    nested = [trajectory(2, 0)]
    del nested[0].fields["obs.state"]
    write_maniskill(tmp_path / "d.h5", Recording(nested), EnvConfig())
    with pytest.raises(UserError, match="dictionary observations.*-o state"):
        read_demos(tmp_path / "d.h5")


def test_maniskill_refusals(tmp_path):
    chunked = trajectory(3, 0)
    chunked.fields["steps"][0] = 2
    with pytest.raises(UserError, match="execute up to 2 actions.*rollout.execute_steps=1"):
        write_maniskill(tmp_path / "t.h5", Recording([chunked]), EnvConfig())
    assert list(tmp_path.iterdir()) == [], "nothing half done is left"
    with pytest.raises(UserError, match="does not exist"):
        read_maniskill(tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("no hdf5")
    with pytest.raises(UserError, match="is not a ManiSkill trajectory file"):
        list(read_maniskill(tmp_path / "text.h5").trajectories)


# ---------------------------------------------------------------- LeRobot


@pytest.fixture
def dataset(tmp_path):
    """A dataset with an image, and what went into it."""
    pytest.importorskip("pyarrow")
    wanted = trajectories(image=True)
    folder = tmp_path / "dataset"
    assert write_lerobot(folder, Recording(wanted, META), "pick the cube", FPS) == len(LENGTHS)
    return folder, wanted


def test_lerobot_round_trip_is_exact_but_for_video(dataset):
    folder, wanted = dataset
    recording = read_lerobot(folder)
    found = list(recording.trajectories)
    image = "obs.sensor_data.base_camera.rgb"
    assert_equal(found, wanted, skip=[image])
    for a, b in zip(found, wanted, strict=True):
        difference = a.fields[image].int() - b.fields[image].int()
        assert difference.abs().float().mean() < 4, "H.264 at crf 18, smooth pictures"
        assert not difference[-1].any(), "the final observation is kept as it was"
    assert recording.meta == META
    assert recording.notes == [
        "images come from video, which is lossy: they are not the original pixels."
    ]


def test_lerobot_round_trip_without_images_is_exact(tmp_path):
    pytest.importorskip("pyarrow")
    odd = trajectories()
    odd[0].fields["action"][-1] = 0.5
    odd[0].fields["terminated"][1] = odd[0].fields["truncated"][1] = True
    write_lerobot(tmp_path / "d", Recording(odd, META), "x", FPS)
    recording = read_lerobot(tmp_path / "d")
    assert_equal(list(recording.trajectories), odd)
    assert recording.notes == []
    assert not (tmp_path / "d" / "videos").exists()


def test_lerobot_info_follows_the_documented_schema(dataset):
    folder, _ = dataset
    info = json.loads((folder / INFO).read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 14, 1)
    assert info["fps"] == FPS and info["splits"] == {"train": "0:3"}
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    assert info["video_path"] == video
    features = info["features"]
    camera = features.pop("observation.images.sensor_data.base_camera.rgb")
    assert camera["dtype"] == "video" and camera["shape"] == [*SIZE, 3]
    assert camera["names"] == ["height", "width", "channels"]
    assert camera["info"]["video.fps"] == FPS and camera["info"]["video.codec"] == "h264"
    assert {k: (f["dtype"], f["shape"]) for k, f in features.items()} == {
        "observation.state": ("float32", [4]),
        "observation.extra.pose": ("float64", [2, 3]),
        "observation.extra.held": ("bool", [1]),
        "action": ("float32", [3]),
        "next.reward": ("float32", [1]),
        "next.done": ("bool", [1]),
        "next.truncated": ("bool", [1]),
        "next.success": ("bool", [1]),
        "timestamp": ("float32", [1]),
        "frame_index": ("int64", [1]),
        "episode_index": ("int64", [1]),
        "index": ("int64", [1]),
        "task_index": ("int64", [1]),
    }


def test_lerobot_tables_follow_the_documented_schema(dataset):
    import pyarrow.parquet as pq

    folder, wanted = dataset
    data = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    assert pq.ParquetFile(folder / "data/chunk-000/file-000.parquet").num_row_groups == 3
    assert data["index"].to_pylist() == list(range(14))
    assert data["episode_index"].to_pylist() == [0] * 5 + [1] + [2] * 8
    assert data["frame_index"].to_pylist() == [*range(5), 0, *range(8)]
    stamps = np.float32([*range(5), 0, *range(8)]) / np.float32(FPS)
    assert np.array_equal(data["timestamp"].to_numpy(), stamps)
    assert str(data.schema.field("timestamp").type) == "float"
    actions = np.stack(data["action"].to_pylist()).astype(np.float32)
    assert np.array_equal(actions, np.concatenate([t.fields["action"][:-1, 0] for t in wanted]))
    done = np.concatenate([(t.fields["terminated"] | t.fields["truncated"])[:-1] for t in wanted])
    assert data["next.done"].to_pylist() == done.tolist()
    rows = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    camera = "videos/observation.images.sensor_data.base_camera.rgb"
    start = 0
    for number, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        assert row["episode_index"] == number and row["length"] == length
        assert row["tasks"] == ["pick the cube"]
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (start, start + length)
        for prefix in ("data", camera, "meta/episodes"):
            assert row[f"{prefix}/chunk_index"] == row[f"{prefix}/file_index"] == 0
        assert row[f"{camera}/from_timestamp"] == start / FPS
        assert row[f"{camera}/to_timestamp"] == (start + length) / FPS
        assert row["stats/action/count"] == [length]
        start += length
    tasks = pq.read_table(folder / TASKS)
    assert tasks.to_pydict() == {"task_index": [0], "task": ["pick the cube"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_lerobot_statistics(dataset):
    folder, wanted = dataset
    stats = json.loads((folder / STATS).read_text())
    state = torch.cat([t.fields["obs.state"][:-1] for t in wanted]).double().numpy()
    for name, values in (("min", state.min(0)), ("max", state.max(0)), ("mean", state.mean(0))):
        np.testing.assert_allclose(stats["observation.state"][name], values, rtol=1e-12)
    np.testing.assert_allclose(stats["observation.state"]["std"], state.std(0), rtol=1e-12)
    assert stats["observation.state"]["count"] == [14]
    assert np.shape(stats["next.done"]["mean"]) == (1,)
    pixels = [t.fields["obs.sensor_data.base_camera.rgb"][:-1] for t in wanted]
    scaled = torch.cat(pixels).double().numpy() / 255
    camera = stats["observation.images.sensor_data.base_camera.rgb"]
    for name in ("min", "max", "mean", "std", "q01", "q99"):
        assert np.shape(camera[name]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(camera["mean"]), scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(np.ravel(camera["std"]), scaled.std((0, 1, 2)), rtol=1e-9)


def test_statistics_by_numpy():
    rng = np.random.default_rng(0)
    values, pictures = rng.normal(size=(40, 3)), rng.integers(0, 255, (3, 8, 6, 3), np.uint8)
    found = describe(values)
    np.testing.assert_allclose(found["q10"], np.quantile(values, 0.1, 0))
    both = merge(describe(values[:15]), describe(values[15:]))
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(both[name], found[name], rtol=1e-12)
    flat = pictures.reshape(-1, 3) / 255
    found = {k: v.ravel() for k, v in describe_images(pictures).items()}
    for name, wanted in (("min", flat.min(0)), ("max", flat.max(0)), ("mean", flat.mean(0))):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-12)
    lower = np.quantile(flat, 0.9, 0, method="inverted_cdf")
    np.testing.assert_allclose(found["q90"], lower, rtol=1e-12)


@pytest.fixture
def foreign(dataset):
    """The same dataset as if somebody else had recorded it."""
    folder, wanted = dataset
    shutil.rmtree(folder / "embodied_rl")
    return folder, wanted


def test_foreign_dataset(foreign):
    folder, wanted = foreign
    recording = read_lerobot(folder)
    found = list(recording.trajectories)
    ended = [bool(t.fields["terminated"][-2] & ~t.fields["truncated"][-2]) for t in wanted]
    lengths = [n if end else n - 1 for n, end in zip(LENGTHS, ended, strict=True)]
    assert [t.length for t in found] == [n for n in lengths if n], "an empty one is left out"
    kept = [t for t, n in zip(wanted, lengths, strict=True) if n]
    for a, b in zip(found, kept, strict=True):
        n = a.length
        assert torch.equal(a.fields["obs.state"][:n], b.fields["obs.state"][:n])
        last = b.length - 1  # the last frame
        assert torch.equal(a.fields["obs.state"][n], b.fields["obs.state"][last])
        assert torch.equal(a.fields["action"][:n], b.fields["action"][:n])
        assert torch.equal(a.fields["reward"][:n], b.fields["reward"][:n])
        assert not a.fields["action"][n].any() and not a.fields["reward"][n].any()
        assert a.fields["obs.images.sensor_data.base_camera.rgb"].shape == (n + 1, *SIZE, 3)
        assert a.fields["steps"].tolist() == [1] * n + [0]
    text = " ".join(recording.notes)
    assert "lossy" in text and f"{ended.count(False)} episodes do not end the task" in text


def test_foreign_dataset_with_little_in_it(foreign):
    """Pictures in the table instead of video, no rewards, wide actions, a text per frame."""
    import imageio.v3 as imageio
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, _ = foreign
    path = folder / "data/chunk-000/file-000.parquet"
    table, camera = pq.read_table(path), "observation.images.sensor_data.base_camera.rgb"
    pictures = images(len(table), 0).numpy()
    encoded = [
        {"bytes": imageio.imwrite("<bytes>", p, extension=".png"), "path": None} for p in pictures
    ]
    action = (10 * np.ones((len(table), 3), np.float32)).tolist()
    table = table.drop_columns(["next.reward", "next.done", "next.truncated", "next.success"])
    table = table.set_column(table.schema.get_field_index("action"), "action", pa.array(action))
    table = table.append_column(camera, pa.array(encoded))
    table = table.append_column("language", pa.array(["hello"] * len(table)))
    pq.write_table(table, path)
    info = json.loads((folder / INFO).read_text())
    for name in ("next.reward", "next.done", "next.truncated", "next.success"):
        del info["features"][name]
    info["features"][camera] = {"dtype": "image", "shape": [*SIZE, 3], "names": None}
    info["features"]["language"] = {"dtype": "string", "shape": [1], "names": None}
    (folder / INFO).write_text(json.dumps(info))
    recording = read_lerobot(folder)
    found = list(recording.trajectories)
    assert [t.length for t in found] == [4, 7]
    assert np.array_equal(
        found[0].fields[f"obs.{camera.removeprefix('observation.')}"], pictures[:5]
    )
    assert not found[0].fields["reward"].any() and not found[0].fields["success"].any()
    text = " ".join(recording.notes)
    assert "for want of a place: language." in text
    assert "lacks it: next.reward, next.done, next.success." in text
    assert "actions reach 10" in text and "3 episodes do not end the task" in text


def test_damaged_datasets_are_refused(dataset):
    folder, _ = dataset
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    with pytest.raises(UserError, match="version v2.1; readable are v3"):
        read_lerobot(folder)
    (folder / INFO).write_text(json.dumps({**info, "total_episodes": 4}))
    with pytest.raises(UserError, match="4 episodes, meta/episodes of 3"):
        list(read_lerobot(folder).trajectories)
    (folder / INFO).write_text(json.dumps(info))
    (folder / OWN_FIELDS).with_name("rest-000.safetensors").unlink()
    with pytest.raises(UserError, match="is not a whole LeRobot dataset"):
        list(read_lerobot(folder).trajectories)
    (folder / "data/chunk-000/file-000.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match="is not a whole LeRobot dataset"):
        list(read_lerobot(folder).trajectories)


def test_a_truncated_video_is_refused(dataset):
    folder, _ = dataset
    (video,) = folder.glob("videos/*/*/*.mp4")
    video.write_bytes(video.read_bytes()[:100])
    with pytest.raises(UserError, match="is not a whole LeRobot dataset"):
        list(read_lerobot(folder).trajectories)


def test_fields_must_agree(tmp_path):
    pytest.importorskip("pyarrow")
    mixed = [trajectory(2, 0), trajectory(2, 1, extra=False)]
    with pytest.raises(UserError, match="trajectory 1 differs.*features.vector"):
        write_lerobot(tmp_path / "d", Recording(mixed), "x", FPS)
    assert not (tmp_path / "d" / INFO).exists(), "an export that broke off is no dataset"


def test_missing_pyarrow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[lerobot\]'"):
        write_lerobot(tmp_path / "d", Recording(trajectories()), "x", FPS)
    assert not (tmp_path / "d").exists()


def test_files_give_way_to_the_next(tmp_path, monkeypatch):
    """Small limits: several data, video and sidecar files, still exact."""
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("embodied_rl.formats.lerobot.DATA_MB", 1e-4)
    monkeypatch.setattr("embodied_rl.formats.lerobot.VIDEO_MB", 1e-9)
    monkeypatch.setattr("embodied_rl.formats.lerobot.FILES_PER_CHUNK", 2)
    monkeypatch.setattr("embodied_rl.formats.lerobot_writer.REST_BYTES", 1)
    wanted = trajectories(image=True)
    write_lerobot(tmp_path / "d", Recording(wanted), "x", FPS)
    assert len(list((tmp_path / "d").glob("data/*/*.parquet"))) == 3
    assert (tmp_path / "d/data/chunk-001/file-000.parquet").exists()
    assert len(list((tmp_path / "d").glob("embodied_rl/rest-*"))) == 3
    found = list(read_lerobot(tmp_path / "d").trajectories)
    assert_equal(found, wanted, skip=["obs.sensor_data.base_camera.rgb"])
