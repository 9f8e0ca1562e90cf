"""Store, cache and sampling, with trajectories whose rows say where they come from."""

import contextlib
import dataclasses
import json
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied_rl.collector import Collector
from embodied_rl.config import RolloutConfig
from embodied_rl.errors import ReplayNotReady, UserError
from embodied_rl.guard import Guard
from embodied_rl.nests import tensors_of
from embodied_rl.policy import Policy
from embodied_rl.replay import ahead
from embodied_rl.replay.buffer import TrajectoryReplay
from embodied_rl.replay.cache import TrajectoryCache
from embodied_rl.replay.mixed import MixedReplay
from embodied_rl.replay.prefetch import Prefetcher
from embodied_rl.replay.reader import StoreReader, read_all
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.types import Batch, Features, Trajectory

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


def die(store: TrajectoryStore) -> None:
    """What the end of a process does: the lock is gone, nothing is flushed."""
    store._held.close()


def encode(obs) -> Features:
    """The observation itself is the feature."""
    return Features(obs["state"], torch.zeros(len(obs["state"]), 1, 1))


@pytest.fixture
def make_replay(make_config, tmp_path):
    """`make_replay("enable_cache=false", gamma=0.5)`: a buffer over `tmp_path / name`.

    A second one over the same folder stands for a new process: the first one's lock is gone.
    """
    opened: dict[str, TrajectoryStore] = {}

    def make(*overrides, name="replay", seed=0, store=True, is_demo=False, meta=None, **algorithm):
        keys = [f"algorithm.replay_buffer.{o}" for o in overrides]
        keys += [f"algorithm.{k}={v}" for k, v in algorithm.items()]
        config = make_config("algorithm.replay_buffer.min_buffer_size=1", *keys).algorithm
        disk = None
        if store:
            settings = config.replay_buffer
            if name in opened:
                die(opened[name])
            disk = opened[name] = TrajectoryStore(
                tmp_path / name,
                settings.segment_size,
                meta or {},
                max_bytes=settings.max_bytes,
                compression=settings.compression,
            )
        return TrajectoryReplay(disk, config, encode, CPU, seed, is_demo)

    return make


def fill(replay, make_trajectory, lengths, **flags):
    for episode, length in enumerate(lengths):
        replay.add(make_trajectory(episode, length, **flags))
    return replay


def same_batch(a: Batch, b: Batch) -> bool:
    pick = (
        lambda x: x.features.vector,
        lambda x: x.features.base_action,
        lambda x: x.next_features.vector,
        lambda x: x.next_features.base_action,
        lambda x: x.action,
        lambda x: x.reward,
        lambda x: x.discount,
        lambda x: x.is_demo,
    )
    # strides too: a compiled update is made for one layout, and asks no more
    return all(torch.equal(p(a), p(b)) and p(a).stride() == p(b).stride() for p in pick)


# ---------------------------------------------------------------- sampling


def test_exactly_n_with_replacement(make_replay, make_trajectory):
    replay = fill(make_replay(), make_trajectory, [3, 2])
    for n in (1, 2, 5, 64):
        batch = replay.sample(n)
        assert len(batch) == n == len(batch.features.vector) == len(batch.action)
        assert batch.reward.shape == batch.discount.shape == batch.is_demo.shape == (n,)
        assert not batch.is_demo.any()


def test_not_ready_below_the_minimum(make_replay, make_trajectory):
    replay = make_replay("min_buffer_size=3")
    for episode in range(3):
        assert not replay.ready
        with pytest.raises(ReplayNotReady, match=f"{episode} trajectories of the 3"):
            replay.sample(1)
        replay.add(make_trajectory(episode, 2))
    assert replay.ready
    assert len(replay.sample(4)) == 4


@pytest.mark.parametrize("cache", ["enable_cache=true", "enable_cache=false"])
def test_uniform_over_transitions_with_the_right_successor(make_replay, make_trajectory, cache):
    lengths = [1, 7, 2, 4]
    replay = fill(make_replay(cache, gamma=0.9), make_trajectory, lengths)
    n = 200 if "false" in cache else 14_000
    batch = replay.sample(n)
    episode, t = batch.features.vector.T
    torch.testing.assert_close(
        batch.next_features.vector, torch.stack([episode, t + 1], 1), rtol=0, atol=0
    )
    torch.testing.assert_close(batch.reward, 100 * episode + t, rtol=0, atol=0)
    torch.testing.assert_close(
        batch.action[:, 0], torch.stack([episode, t], 1) / 1000, rtol=0, atol=0
    )
    assert (batch.discount == 0.9).all()
    counts = {}
    for row in batch.features.vector.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert set(counts) == {(e, float(t)) for e, length in enumerate(lengths) for t in range(length)}
    if n > 10_000:  # binomial n p = 1000, standard deviation 30.5: bound at five of them
        assert all(abs(count - 1000) < 155 for count in counts.values())


@pytest.mark.parametrize("cache", ["enable_cache=true", "enable_cache=false"])
def test_window_is_the_newest(make_replay, make_trajectory, cache):
    replay = make_replay(cache, "sample_window_size=3")
    for episode in range(8):
        replay.add(make_trajectory(episode, 1 + episode % 3))
        newest = set(range(max(0, episode - 2), episode + 1))
        assert replay.transitions == sum(1 + e % 3 for e in newest)
        seen = set(replay.sample(120).features.vector[:, 0].int().tolist())
        assert seen == newest


def test_no_transition_crosses_an_episode(make_env, make_replay, make_backbone, tmp_path):
    """Real rollouts: the observation holds episode seed and step, the reward the new position."""
    policy = Policy(make_backbone(), "state")
    replay = make_replay()
    env = make_env("reach-terminates", 3, 6)
    collector = Collector(
        env,
        policy,
        replay,
        RolloutConfig(),
        Guard(tmp_path / "failure", enabled=True),
        store_features=False,
        seed=4,
        device=CPU,
    )
    collector.start()
    for _ in range(60):
        collector.begin()
        collector.end()
    batch = replay.sample(2000)
    now, after = batch.features.vector, batch.next_features.vector
    assert torch.equal(now[:, 2], after[:, 2]), "one episode"
    assert torch.equal(now[:, 3] + 1, after[:, 3]), "the next step"
    moved = now[:, :2] + 0.2 * batch.action[:, 0].clamp(-1, 1)
    torch.testing.assert_close(after[:, :2], moved, rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.reward, -after[:, :2].norm(dim=1), rtol=0, atol=1e-6)
    reached = after[:, :2].norm(dim=1) < 0.15
    assert torch.equal(batch.discount == 0, reached), "cut exactly at terminations"
    assert reached.any() and (after[:, 3] == 6).any(), "both ends of an episode were seen"


# ---------------------------------------------------------------- returns


def sampled(replay, n: int = 300) -> dict[tuple[int, int], tuple[float, float, list[float]]]:
    """(episode, t) -> (reward, discount, next observation) of every transition."""
    batch = replay.sample(n)
    rows = zip(
        batch.features.vector.int().tolist(),
        batch.reward.tolist(),
        batch.discount.tolist(),
        batch.next_features.vector.tolist(),
        strict=True,
    )
    return {tuple(where): (reward, discount, after) for where, reward, discount, after in rows}


@pytest.mark.parametrize("bootstrap", ["standard", "always"])
def test_discount(make_replay, make_trajectory, bootstrap):
    replay = make_replay(gamma=0.5, bootstrap_type=bootstrap)
    replay.add(make_trajectory(0, 2, terminated=True))
    replay.add(make_trajectory(1, 2, truncated=True))
    found = sampled(replay)
    assert found[0, 0][1] == found[1, 0][1] == 0.5
    assert found[1, 1][1] == 0.5, "truncations bootstrap"
    assert found[0, 1][1] == (0.5 if bootstrap == "always" else 0.0)


@pytest.mark.parametrize("cache", ["enable_cache=true", "enable_cache=false"])
@pytest.mark.parametrize("bootstrap", ["standard", "always"])
def test_n_step_return_by_hand(make_replay, make_trajectory, cache, bootstrap):
    replay = make_replay(cache, gamma=0.5, n_step=3, bootstrap_type=bootstrap)
    replay.add(make_trajectory(0, 5, terminated=True))  # rewards 0 1 2 3 4
    replay.add(make_trajectory(1, 2, truncated=True))  # rewards 100 101
    found = sampled(replay)
    ends = 0.0 if bootstrap == "standard" else 1.0
    expected = {
        (0, 0): (0 + 0.5 * 1 + 0.25 * 2, 0.125, [0, 3]),
        (0, 1): (1 + 0.5 * 2 + 0.25 * 3, 0.125, [0, 4]),
        (0, 2): (2 + 0.5 * 3 + 0.25 * 4, 0.125 * ends, [0, 5]),
        (0, 3): (3 + 0.5 * 4, 0.25 * ends, [0, 5]),
        (0, 4): (4, 0.5 * ends, [0, 5]),
        (1, 0): (100 + 0.5 * 101, 0.25, [1, 2]),
        (1, 1): (101, 0.5, [1, 2]),
    }
    assert found.keys() == expected.keys()
    for where, (reward, discount, after) in expected.items():
        assert found[where] == (pytest.approx(reward, rel=1e-6), discount, after)


def test_n_step_stops_at_a_termination_inside_a_trajectory(make_replay, make_trajectory):
    """A piece may hold a termination before its end (imported data)."""
    trajectory = make_trajectory(0, 4)
    trajectory.fields["terminated"][1] = True
    replay = make_replay(gamma=0.5, n_step=3)
    replay.add(trajectory)
    found = sampled(replay)
    assert found[0, 0][:2] == (0 + 0.5 * 1, 0.0)
    assert found[0, 1][:2] == (1.0, 0.0)
    assert found[0, 2][:2] == (2 + 0.5 * 3, 0.25)


def test_chunk_return_by_hand(make_replay, make_trajectory):
    """A decision of three steps: sum of gamma^i r_i, gamma^steps; the last one executed two."""
    replay = make_replay(gamma=0.5)
    replay.add(make_trajectory(0, 2, chunk=3, last_steps=2, truncated=True))
    found = sampled(replay)
    assert found[0, 0][:2] == (0 + 0.5 * 0.25 + 0.25 * 0.5, 0.125)
    assert found[0, 1][:2] == (1 + 0.5 * 1.25, 0.25)


def test_chunks_and_n_step_together(make_replay, make_trajectory):
    replay = make_replay(gamma=0.5, n_step=2)
    replay.add(make_trajectory(0, 2, chunk=2, last_steps=1, terminated=True))
    found = sampled(replay)
    # decision 0: rewards 0, 0.25 over 2 steps; decision 1: reward 1 over 1 step, then the end
    assert found[0, 0] == (0.5 * 0.25 + 0.25 * 1, 0.0, [0, 2])
    assert found[0, 1] == (1.0, 0.0, [0, 2])


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("other", ["enable_cache=false", "cache_size=2", "cache_size=1"])
def test_cache_changes_nothing(make_replay, make_trajectory, other):
    """The same generator gives the same batch from memory, from disk and from both."""
    lengths = [3, 1, 6, 2, 5, 4, 3]
    whole = make_replay("enable_cache=true", name="a", n_step=2)
    partial = make_replay(other, name="b", n_step=2)
    for episode, length in enumerate(lengths):
        for replay in (whole, partial):
            replay.add(make_trajectory(episode, length, terminated=episode % 2 == 0))
        assert same_batch(whole.sample(20), partial.sample(20))


def test_window_larger_than_the_cache_reads_the_disk(make_replay, make_trajectory):
    replay = fill(make_replay("cache_size=2"), make_trajectory, [2] * 9)
    found = sampled(replay)
    assert len(found) == 18
    assert all(after == [e, t + 1] for (e, t), (_, _, after) in found.items())


@pytest.mark.parametrize("max_rows", [None, 40])
@pytest.mark.parametrize("seed", range(3))
def test_cache_ring_wraps_with_unequal_lengths(make_trajectory, seed, max_rows):
    rng = np.random.default_rng(seed)
    one = make_trajectory(0, 1).fields
    row_bytes = sum(v[0].numel() * v.element_size() for v in one.values())
    bound = None if max_rows is None else max_rows * row_bytes + 3
    cache = TrajectoryCache(5, CPU, bound)
    made: list[Trajectory] = []
    for number in range(300):
        made.append(make_trajectory(number, int(rng.integers(1, 12))))
        cache.admit(number, made[-1].fields)
        starts = cache.starts(np.arange(number + 1))
        held = np.flatnonzero(starts >= 0).tolist()
        assert len(cache) == len(held) <= 5 and held[-1] == number
        if max_rows is None:
            assert held == list(range(max(0, number - 4), number + 1)), "the five newest"
        else:
            assert cache.nbytes <= max_rows * row_bytes
            assert held == list(range(held[0], number + 1)), "the newest, without a gap"
            assert len(held) >= min(2, number + 1), "40 rows hold any two of at most 12"
        for n in held:
            for name, value in made[n].fields.items():
                rows = slice(starts[n], starts[n] + made[n].length + 1)
                assert torch.equal(cache.fields[name][rows], value)
    assert cache.fields["action"].shape[0] <= 8 * 5 * 12, "it wraps instead of growing for ever"


def test_cache_refuses_what_is_larger_than_its_bound(make_replay, make_trajectory):
    replay = make_replay("cache_bytes=100", "cache_size=8")
    replay.add(make_trajectory(0, 50))
    assert sampled(replay).keys() == {(0, t) for t in range(50)}, "read from disk"


# ---------------------------------------------------------------- demonstrations


@pytest.mark.parametrize(("fraction", "n", "demos"), [(0.25, 16, 4), (0.5, 7, 4), (0.1, 256, 26)])
def test_mixed_batches_hold_the_exact_share(make_replay, make_trajectory, fraction, n, demos):
    online = fill(make_replay(), make_trajectory, [3, 3])
    demo = make_replay(store=False, is_demo=True, seed=1)
    demo.add(make_trajectory(7, 5))
    mixed = MixedReplay(online, demo, fraction)
    assert mixed.ready
    for _ in range(5):
        batch = mixed.sample(n)
        assert len(batch) == n
        assert int(batch.is_demo.sum()) == demos
        assert torch.equal(batch.features.vector[:, 0] == 7, batch.is_demo)
        assert torch.equal(batch.next_features.vector[:, 1], batch.features.vector[:, 1] + 1)


def test_mixed_waits_for_the_online_part(make_replay, make_trajectory):
    demo = make_replay(store=False, is_demo=True)
    demo.add(make_trajectory(7, 5))
    mixed = MixedReplay(make_replay("min_buffer_size=2"), demo, 0.5)
    assert not mixed.ready
    with pytest.raises(ReplayNotReady):
        mixed.sample(4)
    mixed.add(make_trajectory(0, 2))
    mixed.add(make_trajectory(1, 2))
    assert mixed.ready and len(mixed.online) == 2 and len(mixed.demos) == 1


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("cache", ["enable_cache=true", "enable_cache=false", "cache_size=2"])
def test_the_next_batch_after_a_resume_is_the_one_that_would_have_come(
    make_replay, make_trajectory, cache
):
    replay = fill(make_replay(cache), make_trajectory, [2, 5, 3])
    replay.sample(8)
    state = json.loads(json.dumps(replay.state_dict()))  # JSON values only
    expected = [replay.sample(8), replay.sample(8)]
    fill(replay, make_trajectory, [4] * 6)  # after the checkpoint: a crash forgets these
    again = make_replay(cache, seed=99)
    again.load_state_dict(state)
    assert len(again) == 3
    assert all(same_batch(again.sample(8), batch) for batch in expected)
    again.add(make_trajectory(3, 2))
    assert sampled(again).keys() == {
        (0, 0),
        (0, 1),
        *((1, t) for t in range(5)),
        (2, 0),
        (2, 1),
        (2, 2),
        (3, 0),
        (3, 1),
    }


def test_mixed_resume(make_replay, make_trajectory):
    def build(seed):
        demo = make_replay(store=False, is_demo=True, seed=seed)
        demo.add(make_trajectory(7, 9))
        return MixedReplay(make_replay(seed=seed + 1), demo, 0.5)

    mixed = build(0)
    fill(mixed, make_trajectory, [6, 6])
    mixed.sample(8)
    state = mixed.state_dict()
    expected = mixed.sample(8)
    again = build(50)
    again.load_state_dict(state)
    assert same_batch(again.sample(8), expected)


@pytest.mark.parametrize(
    ("cache", "lost"),
    [
        ("enable_cache=true", 0),
        ("enable_cache=true", 1),
        ("enable_cache=false", 1),
        ("enable_cache=false", 0),
    ],
)
def test_resume_goes_on_without_a_damaged_segment(
    make_replay, make_trajectory, tmp_path, cache, lost
):
    replay = fill(make_replay(), make_trajectory, [2] * 12)  # segments of 4
    state = replay.state_dict()
    segments(tmp_path / "replay")[lost].write_bytes(b"")
    again = make_replay(cache)
    again.load_state_dict(state)
    left = set(range(12)) - set(range(4 * lost, 4 * lost + 4))
    assert {episode for episode, _ in sampled(again)} == left
    assert len(again.problems) == 1
    again.add(make_trajectory(12, 2))
    assert {episode for episode, _ in sampled(again)} == left | {12}


# ---------------------------------------------------------------- store


LATEST: dict[Path, TrajectoryStore] = {}  # the one that a next `open_store` takes over from


def open_store(folder, size=2, **options) -> TrajectoryStore:
    if folder in LATEST:
        die(LATEST.pop(folder))
    LATEST[folder] = TrajectoryStore(folder, size, {}, **options)
    return LATEST[folder]


def write(folder, make_trajectory, lengths, size=2) -> list[Trajectory]:
    store = open_store(folder, size)
    made = [make_trajectory(e, length) for e, length in enumerate(lengths)]
    for number, trajectory in enumerate(made):
        assert store.append(trajectory) == number
    store.flush()
    return made


def equal(read: dict, trajectory: Trajectory) -> bool:
    return read.keys() == trajectory.fields.keys() and all(
        torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in trajectory.fields.items()
    )


def segments(folder) -> list:
    return sorted(folder.glob("segment-*.safetensors"))


def test_store_round_trip(tmp_path, make_trajectory):
    store = open_store(tmp_path)
    made = [make_trajectory(e, length) for e, length in enumerate([3, 1, 4, 1, 5])]
    for trajectory in made:
        store.append(trajectory)
    assert len(segments(tmp_path)) == 2, "two full segments on disk, one trajectory in memory"
    assert all(equal(store.read(i), t) for i, t in enumerate(made))
    rows = store.gather(np.array([4, 0, 4]), np.array([3, 1, 2]), ["reward"])
    assert list(rows) == ["reward"] and rows["reward"].tolist() == [[403.0], [1.0], [402.0]]
    store.flush()
    store.flush()  # nothing left: writes nothing
    assert len(segments(tmp_path)) == 3
    again = open_store(tmp_path)
    assert again.lengths.tolist() == [3, 1, 4, 1, 5]
    assert all(equal(again.read(i), t) for i, t in enumerate(made))
    assert again.problems == []
    assert all(equal(t.fields, m) for t, m in zip(read_all(tmp_path), made, strict=True))


def test_unflushed_trajectories_are_all_that_a_crash_loses(tmp_path, make_trajectory):
    store = open_store(tmp_path)
    for episode in range(3):
        store.append(make_trajectory(episode, 2))
    (tmp_path / "segment-000000002.safetensors.tmp").write_bytes(b"half a file")
    again = open_store(tmp_path)
    assert len(again) == 2 and again.problems == []
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("harm", ["truncated", "header", "missing", "emptied"])
def test_damaged_segment_is_reported_and_the_rest_reads(tmp_path, make_trajectory, harm):
    made = write(tmp_path, make_trajectory, [2] * 6)
    victim = segments(tmp_path)[1]
    data = bytearray(victim.read_bytes())
    if harm == "truncated":
        victim.write_bytes(data[: len(data) // 2])
    elif harm == "header":
        data[100] ^= 1
        victim.write_bytes(data)
    elif harm == "emptied":
        victim.write_bytes(b"")
    else:
        victim.unlink()
    for opened in (StoreReader(tmp_path), open_store(tmp_path), open_store(tmp_path)):
        # the numbers of the others stay, the lost ones have length 0
        assert opened.lengths.tolist() == [2, 2, 0, 0, 2, 2]
        assert all(equal(opened.read(i), made[i]) for i in (0, 1, 4, 5))
        assert len(opened.problems) == 1 and victim.name in opened.problems[0]
        assert "2 trajectories are lost" in opened.problems[0]
        with pytest.raises(UserError, match="trajectory 2 is not there"):
            opened.read(2)
    assert victim.with_suffix(".corrupt").exists() == (harm != "missing")


def test_flipped_bit_costs_one_trajectory(tmp_path, make_trajectory):
    made = write(tmp_path, make_trajectory, [2] * 6)
    victim = segments(tmp_path)[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1  # the last field's last row belongs to trajectory 3
    victim.write_bytes(data)
    store = open_store(tmp_path)
    assert store.problems == [] and len(store.verify()) == 1, "found when it is read"
    for _ in range(2):
        with pytest.raises(UserError, match="trajectory 3 .*is damaged"):
            store.read(3)
    assert store.lengths.tolist() == [2, 2, 2, 0, 2, 2]
    again = open_store(tmp_path)  # left out from the start
    assert again.lengths.tolist() == [2, 2, 2, 0, 2, 2] and len(again.problems) == 1
    assert all(equal(again.read(i), made[i]) for i in (0, 1, 2, 4, 5))


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("cache", ["enable_cache=true", "enable_cache=false"])
def test_sampling_goes_on_without_a_damaged_trajectory(
    make_replay, make_trajectory, tmp_path, cache, ahead
):
    fill(make_replay(), make_trajectory, [2] * 8).state_dict()
    victim = segments(tmp_path / "replay")[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    replay = make_replay(cache, f"prefetch={ahead}")
    assert {episode for episode, _ in sampled(replay)} == {0, 1, 2, 3, 4, 5, 6}
    assert len(replay.problems) == 1 and "trajectory 7" in replay.problems[0]
    assert replay.transitions == 14


def test_appending_after_damage_harms_no_older_segment(tmp_path, make_trajectory):
    made = write(tmp_path, make_trajectory, [2] * 6)
    segments(tmp_path)[0].write_bytes(b"")
    store = open_store(tmp_path)
    extra = make_trajectory(9, 3)
    assert store.append(extra) == 6
    store.flush()
    expected = [*made, extra]
    assert all(equal(store.read(i), expected[i]) for i in range(2, 7))
    again = open_store(tmp_path)
    assert again.lengths.tolist() == [0, 0, 2, 2, 2, 2, 3]
    assert all(equal(again.read(i), expected[i]) for i in range(2, 7))
    again.go_back(0, 6)
    assert len(open_store(tmp_path)) == 6


def test_damaged_demonstrations_are_refused(tmp_path, make_trajectory):
    write(tmp_path, make_trajectory, [2] * 4)
    segments(tmp_path)[1].write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged: segment-000000002.*Copy it again"):
        read_all(tmp_path)


@pytest.mark.parametrize("harm", ["torn", "flipped", "gone"])
def test_a_damaged_index_costs_nothing(tmp_path, make_trajectory, harm):
    made = write(tmp_path, make_trajectory, [2] * 4)
    index = tmp_path / "index.jsonl"
    text = index.read_text()
    if harm == "gone":
        index.unlink()
    else:
        index.write_text(text[:-20] if harm == "torn" else text.replace("[2, 2]", "[2, 3]"))
    store = open_store(tmp_path)
    assert store.lengths.tolist() == [2] * 4 and store.problems == []
    assert index.read_text() == text, "rebuilt from what the segments say of themselves"
    extra = make_trajectory(9, 3)
    store.append(extra)
    store.flush()
    again = open_store(tmp_path)
    assert all(equal(again.read(i), t) for i, t in enumerate([*made, extra]))


def test_going_back_ends_at_back_to_a_flush(tmp_path, make_trajectory):
    made = write(tmp_path, make_trajectory, [2] * 6)
    store = open_store(tmp_path)
    store.go_back(0, 4)
    assert len(store) == 4 and len(segments(tmp_path)) == 2
    extra = make_trajectory(9, 5)
    store.append(extra)
    store.flush()
    again = open_store(tmp_path)
    assert [again.length(i) for i in range(5)] == [2, 2, 2, 2, 5]
    assert equal(again.read(3), made[3]) and equal(again.read(4), extra)
    again.go_back(0, 0)
    assert len(open_store(tmp_path)) == 0 and not segments(tmp_path)


def test_going_back_refuses_what_it_cannot_do(tmp_path, make_trajectory):
    write(tmp_path, make_trajectory, [2] * 4)
    store = open_store(tmp_path)
    with pytest.raises(UserError, match=r"holds 4 trajectories, the checkpoint counts 5"):
        store.go_back(0, 5)
    with pytest.raises(UserError, match="trajectory 3 is inside a segment"):
        store.go_back(0, 3)
    assert len(open_store(tmp_path)) == 4


def test_foreign_meta_is_an_error(tmp_path, make_replay):
    make_replay(meta={"fingerprint": "aaa"})
    with pytest.raises(UserError, match=r"fingerprint='aaa', this run has 'bbb'\. Use another"):
        make_replay(meta={"fingerprint": "bbb"})
    make_replay(meta={"fingerprint": "aaa"})
    meta = tmp_path / "replay" / "meta.json"
    meta.write_text(meta.read_text().replace('"version": 2', '"version": 99'))
    with pytest.raises(UserError, match="version 99; this version of embodied_rl reads"):
        make_replay(meta={"fingerprint": "aaa"})


def test_not_a_store(tmp_path):
    with pytest.raises(UserError, match=r"holds no meta\.json"):
        read_all(tmp_path)


def test_two_processes_cannot_write_the_same_folder(tmp_path, make_trajectory):
    store = open_store(tmp_path)
    with pytest.raises(UserError, match="is being written by another process"):
        TrajectoryStore(tmp_path, 2, {})
    store.close()
    TrajectoryStore(tmp_path, 2, {}).close()


def test_a_reader_sees_what_was_published_and_changes_nothing(tmp_path, make_trajectory):
    store = open_store(tmp_path)
    made = [make_trajectory(e, 2) for e in range(5)]
    for trajectory in made[:3]:
        store.append(trajectory)
    (tmp_path / "segment-000000002.safetensors.tmp").write_bytes(b"half a segment")
    files = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    reader = StoreReader(tmp_path)
    assert len(reader) == 2 and reader.problems == [] and equal(reader.read(1), made[1])
    assert reader.verify() == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == files
    for trajectory in made[3:]:
        store.append(trajectory)
    assert len(reader) == 2 and equal(reader.read(0), made[0])
    assert len(StoreReader(tmp_path)) == 4


def test_a_second_process_may_sample(tmp_path, make_replay, make_trajectory, make_config):
    fill(make_replay(), make_trajectory, [2] * 8)
    config = make_config("algorithm.replay_buffer.min_buffer_size=1").algorithm
    second = TrajectoryReplay(StoreReader(tmp_path / "replay"), config, encode, CPU, 0)
    assert {episode for episode, _ in sampled(second)} == set(range(8))
    with pytest.raises(TypeError, match="may not write"):
        second.add(make_trajectory(9, 2))


def test_read_only_folder_is_told(tmp_path, make_trajectory, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so modes cannot test this
    with pytest.raises(
        UserError, match=r"cannot write replay.*Permission denied.*make it writable"
    ):
        TrajectoryStore(tmp_path / "new", 2, {})


# ---------------------------------------------------------------- eviction


def bytes_of(folder) -> int:
    return sum(p.stat().st_size for p in segments(folder))


def test_eviction_keeps_the_newest_within_the_budget(tmp_path, make_trajectory):
    write(tmp_path / "one", make_trajectory, [5] * 2)
    one = bytes_of(tmp_path / "one")
    budget = 4 * one + 50
    store = open_store(tmp_path / "all", max_bytes=budget)
    made = [make_trajectory(e, 5) for e in range(40)]
    for trajectory in made:
        store.append(trajectory)
        assert bytes_of(tmp_path / "all") <= budget
    assert store.first == 32 and store.nbytes == bytes_of(tmp_path / "all")
    again = open_store(tmp_path / "all", max_bytes=budget)
    for opened in (store, again, StoreReader(tmp_path / "all")):
        assert (opened.first, len(opened), opened.problems) == (32, 40, [])
        assert all(equal(opened.read(i), made[i]) for i in range(32, 40))
        with pytest.raises(UserError, match="trajectory 31 is not there"):
            opened.read(31)
    assert again.append(make_trajectory(40, 5)) == 40, "numbers go on"


@pytest.mark.parametrize("cache", ["enable_cache=true", "enable_cache=false"])
def test_evicted_trajectories_are_not_sampled(make_replay, make_trajectory, tmp_path, cache):
    write(tmp_path / "one", make_trajectory, [5] * 4)
    budget = bytes_of(tmp_path / "one") * 2
    replay = fill(make_replay(cache, f"max_bytes={budget}"), make_trajectory, [5] * 40)
    assert {episode for episode, _ in sampled(replay)} == set(range(replay.store.first, 40))
    assert 28 <= replay.store.first <= 36


@pytest.mark.parametrize("cache", ["enable_cache=true", "enable_cache=false"])
def test_resume_is_exact_although_evicted_since(make_replay, make_trajectory, tmp_path, cache):
    write(tmp_path / "one", make_trajectory, [5] * 4)
    keys = (cache, f"max_bytes={bytes_of(tmp_path / 'one') * 2}")
    replay = fill(make_replay(*keys), make_trajectory, [5] * 24)
    state = replay.state_dict()
    expected = [replay.sample(16) for _ in range(3)]
    fill(replay, make_trajectory, [3] * 40)  # evicts all that the checkpoint sampled from
    assert replay.store.first >= 24
    again = make_replay(*keys)
    again.load_state_dict(state)
    assert again.problems == []
    assert all(same_batch(again.sample(16), batch) for batch in expected)
    assert bytes_of(tmp_path / "replay") < 4 * bytes_of(tmp_path / "one")


def test_old_checkpoints_let_go_of_the_disk(make_replay, make_trajectory, tmp_path):
    write(tmp_path / "one", make_trajectory, [5] * 4)
    one = bytes_of(tmp_path / "one")
    replay = make_replay(f"max_bytes={2 * one}")
    for _ in range(30):
        fill(replay, make_trajectory, [5] * 4)
        replay.state_dict()
    # the budget, and what the two newest checkpoints may still need
    assert bytes_of(tmp_path / "replay") <= (2 + 2) * one + 100


# ------------------------------------------------------------- reading ahead and compression


@pytest.mark.parametrize("cache", ["enable_cache=true", "enable_cache=false", "cache_size=2"])
def test_batches_read_together_are_those_read_one_by_one(
    make_replay, make_trajectory, monkeypatch, cache
):
    """Trajectories come, a checkpoint is made and the size changes between the batches."""

    def run(name, most):
        monkeypatch.setattr(ahead, "MOST", most)
        replay = fill(make_replay(cache, name=name), make_trajectory, [4] * 3)
        together, gather = [], replay._reader.gather

        def count(draw):
            together.append(len(draw.number))
            return gather(draw)

        monkeypatch.setattr(replay._reader, "gather", count)
        batches = [replay.sample(8) for _ in range(21)]
        replay.add(make_trajectory(3, 4))
        batches += [replay.sample(8) for _ in range(6)]
        replay.state_dict()
        batches += [replay.sample(8) for _ in range(2)]
        batches += [replay.sample(5) for _ in range(6)]
        return batches, together

    (several, reads), (single, alone) = run("a", 8), run("b", 1)
    assert all(same_batch(a, b) for a, b in zip(several, single, strict=True))
    assert alone == [8] * 29 + [5] * 6
    # as many as there were in a row; what is left over is dropped
    assert reads == [8, 8, 16, 32, 64, 64] + [8, 8, 16, 32] + [8, 8] + [5, 5, 10, 20]
    assert all(t.is_contiguous() for t in tensors_of(several))


def test_a_lost_trajectory_among_batches_read_together(
    make_replay, make_trajectory, tmp_path, monkeypatch
):
    """The batches before the first that holds it are those that one by one would have been."""

    def run(name, most):
        monkeypatch.setattr(ahead, "MOST", most)
        fill(make_replay(name=name), make_trajectory, [2] * 8).state_dict()
        victim = segments(tmp_path / name)[1]
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
        replay = make_replay("enable_cache=false", name=name)
        batches = [replay.sample(1) for _ in range(40)]
        assert len(replay.problems) == 1
        return batches

    both = zip(run("a", 8), run("b", 1), strict=True)
    assert all(same_batch(a, b) for a, b in both)


def test_large_batches_are_read_one_by_one(make_replay, make_trajectory, monkeypatch):
    replay = fill(make_replay(), make_trajectory, [4] * 3)
    replay.sample(8)
    monkeypatch.setattr(ahead, "ROOM", 3 * replay._ahead._bytes)
    for _ in range(6):  # reads of 1, 1, 2 and 3, all handed out
        replay.sample(8)
    assert len(replay._ahead) == 0
    replay.sample(8)
    assert len(replay._ahead) == 2


@pytest.mark.parametrize("cache", ["enable_cache=true", "enable_cache=false", "cache_size=2"])
def test_prefetched_batches_do_not_depend_on_timing(make_replay, make_trajectory, cache):
    """Each batch is drawn `prefetch` batches early, whatever the thread does meanwhile."""

    def run(name, pause):
        replay = fill(make_replay(cache, "prefetch=2", name=name), make_trajectory, [4] * 3)
        batches = []
        for episode in range(3, 30):
            batches.append(replay.sample(8))
            time.sleep(pause)
            replay.add(make_trajectory(episode, 4))
        return batches

    both = zip(run("a", 0.0), run("b", 0.003), strict=True)
    assert all(same_batch(a, b) for a, b in both)


def test_a_checkpoint_with_prefetched_batches(make_replay, make_trajectory):
    """A checkpoint sets both the run that goes on and the resumed one back to the same draw."""
    replay = fill(make_replay("prefetch=3"), make_trajectory, [4] * 6)
    replay.sample(8)
    state = replay.state_dict()
    expected = [replay.sample(8) for _ in range(6)]
    again = make_replay("prefetch=3", seed=9)
    again.load_state_dict(state)
    assert all(same_batch(again.sample(8), batch) for batch in expected)


def test_errors_of_the_prefetching_thread_surface_where_the_batch_is_taken(
    make_replay, make_trajectory, monkeypatch
):
    replay = fill(make_replay("prefetch=2", "enable_cache=false"), make_trajectory, [4] * 6)
    replay.sample(4)

    def fail(*arguments):
        raise OSError("the disk went away")

    monkeypatch.setattr(replay.store, "gather", fail)
    started = time.monotonic()
    with pytest.raises(OSError, match="the disk went away"):
        for _ in range(4):
            replay.sample(4)
    assert time.monotonic() - started < 5


def test_a_read_that_hangs_is_told():
    prefetcher = Prefetcher[int](1, timeout=0.05)
    block = threading.Event()
    with pytest.raises(UserError, match="took more than"):
        prefetcher.take(lambda: lambda: int(block.wait(30)))
    block.set()


def test_compressed_images_read_back_exactly(make_replay, make_trajectory, tmp_path):
    rng = np.random.default_rng(0)

    def with_image(episode, length):
        trajectory = make_trajectory(episode, length)
        image = np.zeros((length + 1, 16, 16, 3), np.uint8)
        image[:, :4] = rng.integers(0, 255, (length + 1, 4, 16, 3), np.uint8)
        return Trajectory({**trajectory.fields, "obs.rgb": torch.from_numpy(image)})

    made = [with_image(e, 2 + e) for e in range(6)]
    for compression in ("none", "zstd"):
        store = open_store(tmp_path / compression, compression=compression)
        for trajectory in made:
            store.append(trajectory)
        store.flush()
        reader = StoreReader(tmp_path / compression)
        assert all(equal(reader.read(i), t) for i, t in enumerate(made))
        rows = reader.gather(np.array([5, 0, 3]), np.array([7, 1, 0]), ["obs.rgb"])["obs.rgb"]
        for row, (n, t) in zip(rows, [(5, 7), (0, 1), (3, 0)], strict=True):
            assert torch.equal(row, made[n].fields["obs.rgb"][t])
    assert bytes_of(tmp_path / "zstd") < 0.6 * bytes_of(tmp_path / "none")
    victim = segments(tmp_path / "zstd")[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    victim.write_bytes(data)
    assert len(StoreReader(tmp_path / "zstd").verify()) == 1


@contextlib.contextmanager
def full_disk():
    """Files cannot grow beyond 512 bytes: what a full disk does to a write.

    Not a fixture: pytest reports between a test and its teardown, perhaps into a file itself.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_told_and_the_store_stays_readable(tmp_path, make_trajectory):
    made = write(tmp_path, make_trajectory, [2] * 2)
    store = open_store(tmp_path, size=1)
    with full_disk(), pytest.raises(UserError, match=r"cannot write replay to .*resume="):
        store.append(make_trajectory(2, 500))
    assert not list(tmp_path.glob("*.tmp"))
    assert equal(store.read(1), made[1]) and store.length(2) == 500
    again = open_store(tmp_path)
    assert len(again) == 2 and again.problems == []


def test_features_are_stored_or_encoded(make_replay, make_trajectory):
    """With cached features `encode` is never called; without them it sees the observations."""
    plain, cached = make_replay(name="a"), make_replay(name="b")
    trajectory = make_trajectory(1, 3)
    plain.add(trajectory)
    vector = torch.full((4, 5), 7.0)
    base = torch.full((4, 1, 2), 0.5)
    fields = {**trajectory.fields, "features.vector": vector, "features.base_action": base}
    cached.add(dataclasses.replace(trajectory, fields=fields))
    assert plain.sample(4).features.vector.shape == (4, 2)
    batch = cached.sample(4)
    for features in (batch.features, batch.next_features):
        assert torch.equal(features.vector, vector) and torch.equal(features.base_action, base)
